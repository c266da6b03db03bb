"""A report in one HTML file, pictures inside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, final

from exactflow.core.files import write_atomically
from exactflow.pictures import grids as pictures

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: .5rem 0; }
td, th { border-bottom: 1px solid #ddd; padding: .3rem .9rem .3rem 0; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
img { max-width: 100%; image-rendering: pixelated; } code { font-size: .9em; }
figure { margin: .5rem 0; } figcaption, .note { color: #666; font-size: .9rem; }
"""


@final
@dataclass(frozen=True)
class Table:
    """A titled table; numbers are set right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@final
@dataclass(frozen=True)
class Picture:
    """A titled PNG with a caption."""

    title: str
    content: bytes
    caption: str


def write_report(
    path: Path, title: str, parts: Sequence[Table | Picture], settings: Mapping[str, Any]
) -> None:
    """Write the report; `settings` are printed at its end, one line each."""
    body = [f"<h1>{escape(title)}</h1>"]
    body += [_table(p) if isinstance(p, Table) else _picture(p) for p in parts]
    listed = [[name, str(value)] for name, value in _flat(settings)]
    body.append(_table(Table("Resolved configuration", ["field", "value"], listed)))
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><body>{''.join(body)}</body></html>\n"
    )
    write_atomically(path, page.encode())


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return f"<h2>{escape(table.title)}</h2><table><tr>{head}</tr>{rows}</table>{note}"


def _cell(text: str) -> str:
    kind = ' class="number"' if text[:1].isdigit() and not text[-1:].isalpha() else ""
    return f"<td{kind}>{escape(text)}</td>"


def _picture(picture: Picture) -> str:
    return (
        f"<h2>{escape(picture.title)}</h2><figure>"
        f"{pictures.inline(picture.content, escape(picture.title))}"
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((prefix + name, value))
    return pairs
