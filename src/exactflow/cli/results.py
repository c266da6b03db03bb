"""`exactflow results`."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict

from rich import box
from rich.table import Table
from rich.text import Text

from exactflow.cli.arguments import Results
from exactflow.cli.terminal import say
from exactflow.comparison import published_results as published
from exactflow.comparison.published_results import Doubt, Metric, PublishedRow, Section
from exactflow.core.config import suggestion
from exactflow.core.files import finite, write_atomically

Tables = Mapping[Metric, tuple[Section, ...]]

NAMES: dict[Metric, str] = {"bits_per_dim": "bits/dim", "fid": "FID"}
HEADER = ("#", "value", "model", "parameters", "source", "remark")
VALUE: tuple[Doubt, ...] = ("value", "kind", "version")
LEGEND = (
    "Places (#) are inside a group; numbers of two groups are not comparable.",
    "† not comparable with the main group. * unverified: from memory or a single listing.",
)
CAVEATS: dict[Metric, str] = {
    "bits_per_dim": "On 10,000 images the standard error is about 0.01 bits/dim.",
    "fid": "Between papers, an FID's network, reference images and rounding differ, mostly unsaid.",
}


def run(command: Results) -> None:
    """List the data sets, or print the table of one, with one's own runs in it."""
    if command.dataset is None:
        if command.metric or command.runs or command.group or command.out:
            raise ValueError("expected a data set before the options: exactflow results DATASET")
        _list()
        return
    if command.out is not None and command.out.suffix not in (".md", ".json"):
        raise ValueError(f"--out: expected a name that ends in .md or .json, got {command.out}")
    tables = _tables(command, command.dataset)
    for metric, sections in tables.items():
        say(_rich(f"{command.dataset}, {NAMES[metric]}", sections))
    notes = _notes(command.dataset, tables)
    say(*notes)
    if command.out is not None:
        write = _json if command.out.suffix == ".json" else _markdown
        command.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(command.out, write(command.dataset, tables, notes).encode())


def _list() -> None:
    table = Table(title="published numbers")
    table.add_column("data set")
    for metric in NAMES.values():
        table.add_column(metric, justify="right")
    for dataset, counts in published.counts().items():
        table.add_row(dataset, *(str(counts[metric]) for metric in NAMES))
    say(table)
    say("exactflow results DATASET shows one; the numbers above are counts of rows")


def _tables(command: Results, dataset: str) -> Tables:
    """The sections of every metric that has rows."""
    wanted: list[Metric] = [
        m for m, name in NAMES.items() if command.metric in (None, name.lower())
    ]
    entries: dict[Metric, tuple[PublishedRow, ...]]
    entries = {metric: published.rows(dataset, metric) for metric in wanted}
    if command.runs and "bits_per_dim" not in entries:
        raise ValueError("--runs: evaluated runs have bits/dim, but --metric asks for FID only")
    if command.runs:
        entries["bits_per_dim"] += published.runs(command.runs, dataset)
    entries = {metric: found for metric, found in entries.items() if found}
    if not entries:
        raise ValueError(f"there is no published {command.metric} of {dataset}")
    labels = {metric: {row.group.label for row in found} for metric, found in entries.items()}
    if command.group is not None and not any(command.group in found for found in labels.values()):
        every = sorted(set().union(*labels.values()))
        raise ValueError(
            f"--group: unknown group {command.group!r}{suggestion(command.group, every)}"
        )
    return {
        metric: published.arrange(found, command.group if command.group in labels[metric] else None)
        for metric, found in entries.items()
    }


def _notes(dataset: str, metrics: Iterable[Metric]) -> list[str]:
    return [*LEGEND, *(CAVEATS[metric] for metric in metrics), *published.notes(dataset)]


def _rich(title: str, sections: Sequence[Section]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in HEADER:
        side = "right" if name in ("#", "value", "parameters") else "left"
        width = {"value": 8, "model": 18, "parameters": 10, "source": 16}.get(name)
        table.add_column(name, justify=side, overflow="fold", min_width=width)
    for section in sections:
        table.add_row("", "", Text(_heading(section), style="bold"))
        for cells, row in _cells(section):
            style = "green" if row.own else ""
            table.add_row(*(Text(cell, style=style) for cell in cells))
        table.add_row()
    return table


def _heading(section: Section) -> str:
    return section.group.label + (" (main group)" if section.main else "")


def _cells(section: Section) -> Iterator[tuple[tuple[str, ...], PublishedRow]]:
    for rank, row in section.rows:
        yield (
            (
                "" if rank is None else str(rank),
                _value(row)
                + ("" if section.main and not row.obstacle else " †")
                + _star(row, *VALUE),
                f"{row.model} (yours)" if row.own else row.model,
                _count(row.parameters) + _star(row, "parameters"),
                (row.source or "") + _star(row, "source"),
                "; ".join(filter(None, (row.obstacle, row.space, row.remark))),
            ),
            row,
        )


def _value(row: PublishedRow) -> str:
    if row.value is None:
        return "none"
    if row.own:
        error = "" if row.standard_error is None else f" ± {row.standard_error:.4f}"
        return f"{row.value:.4f}{error}"
    return f"{row.sign}{row.value:.{row.digits}f}"


def _star(row: PublishedRow, *parts: Doubt) -> str:
    return " *" if set(parts) & set(row.unverified) else ""


def _count(parameters: int | None) -> str:
    """Four digits at most: many were published rounded."""
    if parameters is None:
        return ""
    for size, letter in ((10**9, "B"), (10**6, "M")):
        if parameters >= size:
            return f"{parameters / size:.4g}{letter}"
    return f"{parameters:,}"


def _markdown(dataset: str, tables: Tables, notes: Sequence[str]) -> str:
    lines = [f"# {dataset}"]
    for metric, sections in tables.items():
        lines += ["", f"## {NAMES[metric]}"]
        for section in sections:
            lines += ["", f"### {_heading(section)}", "", _line(HEADER), _line(["---"] * 6)]
            lines += [_line(cells) for cells, _ in _cells(section)]
    return "\n".join([*lines, "", *(f"- {_escaped(note)}" for note in notes)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def _json(dataset: str, tables: Tables, notes: Sequence[str]) -> str:
    rows = [
        {
            **asdict(row),
            "group": section.group.label,
            "main": section.main,
            "rank": rank,
            "obstacle": row.obstacle,
        }
        for sections in tables.values()
        for section in sections
        for rank, row in section.rows
    ]
    content = finite({"dataset": dataset, "rows": rows, "notes": list(notes)})
    return json.dumps(content, indent=2, allow_nan=False) + "\n"
