"""`exactflow compare`: models of any kind on the same images, trained under the same budget."""

import sys
from pathlib import Path

from rich import box
from rich.table import Table

from exactflow.cli.arguments import Compare
from exactflow.cli.contenders import Contenders
from exactflow.cli.terminal import note, say
from exactflow.cli.words import parse_words
from exactflow.comparison.compare import compare
from exactflow.comparison.protocol import Protocol
from exactflow.comparison.report import Report
from exactflow.core.config import override
from exactflow.core.devices import pick_device
from exactflow.data import DataConfig, load
from exactflow.metrics.extractors import inception
from exactflow.training import Interrupted
from exactflow.training.budget import Budget
from exactflow.training.folder import check_apart


def run(command: Compare) -> None:
    """Train what is a preset, measure everything, write the report."""
    words = parse_words(command.settings, ("data", "protocol"))
    data = override(DataConfig(command.data), words.get("data", {}))
    check_apart(command.out, data)
    protocol = override(Protocol(), words.get("protocol", {}))
    budget = Budget.parse(command.budget)
    device = pick_device(command.device)
    splits = load(data, "train"), load(data, "test")
    names = tuple(dict.fromkeys(command.models))
    contenders = Contenders(names, data, *splits, budget, command.out / "models", device)
    contenders.announce(protocol)
    try:
        report = compare(
            contenders,
            splits,
            command.out,
            extractor=inception(command.inception, device=device) if command.inception else None,
            protocol=protocol,
            setting={
                "command": " ".join(["exactflow", *sys.argv[1:]]),
                "budget of a training": str(budget),
            },
            progress=sys.stderr.isatty(),
        )
    except Interrupted as stop:
        note(f"{stop}; the same command continues")
        sys.exit(stop.exit_code)
    show(report, command.out)
    if report.failures:
        for name, reason in report.failures.items():
            note(f"error: {name}: {reason}")
        sys.exit(1)


def show(report: Report, folder: Path) -> None:
    """The summary on the terminal."""
    found = report.summary()
    table = Table(
        title=found.title,
        caption=found.note,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, name in enumerate(found.header):
        table.add_column(name, justify="right" if index else "left")
    for row in found.rows:
        table.add_row(*row)
    say(table)
    say(f"open {folder / 'report.html'}")
