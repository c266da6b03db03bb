"""What people read on a terminal. Names are shown as they are: neither markup nor escape codes."""

import logging
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


def printable(text: str) -> str:
    r"""The text with whatever a terminal obeys, or cannot show, written as escapes like \x1b."""
    kept = (c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return "".join(kept)


def note(text: str) -> None:
    """A line on stderr: progress, warnings and errors."""
    print(printable(text), file=sys.stderr, flush=True)


def say(*items: "RenderableType") -> None:
    """Print sentences and tables on stdout, each sentence on one line.

    Raises:
        BrokenPipeError: nobody reads them any more.
    """
    for item in items:
        text = f"{printable(item)}\n" if isinstance(item, str) else _rendered(item)
        sys.stdout.write(text)


def _rendered(item: "RenderableType") -> str:
    from rich.console import Console
    from rich.segment import Segment, Segments

    console = Console(markup=False, emoji=False)  # `[v2]` and `[/x]` are parts of names here
    parts = (p if p.control else Segment(printable(p.text), p.style) for p in console.render(item))
    # Not printed by the console itself, which would end the process where nobody reads.
    with console.capture() as captured:
        console.print(Segments(list(parts)), end="")
    return captured.get()


def show_warning(message: Warning | str, *_: object) -> None:
    """A warning in one line, in place of `warnings.showwarning`."""
    note(f"warning: {' '.join(str(message).split())}")


def safe_record(record: logging.LogRecord) -> bool:
    """Filter of a logging handler: what a record says, made printable."""
    record.msg, record.args = printable(record.getMessage()), None
    return True
