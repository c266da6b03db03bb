"""Progress of a long job on stderr: a bar on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 10.0

Item = TypeVar("Item")


class Advance(Protocol):
    """Report that `count` more items are done, with a note on the last of them."""

    def __call__(self, count: int, note: str = "") -> None: ...


@contextmanager
def shown_progress(
    total: int,
    title: str,
    *,
    unit: str = "images",
    done: int = 0,
    quiet: bool = False,
    after: float = 0.0,
) -> Iterator[Advance]:
    """Yield `advance(count)`, which prints the count, the rate and the time left to stderr.

    Args:
        total: number of items.
        title: of the job.
        unit: noun for the items.
        done: items that were done before; they do not count in the rate.
        quiet: show nothing.
        after: seconds before a bar is shown.
    """
    if quiet:
        yield lambda count, note="": None
        return
    from rich.console import Console

    console = Console(stderr=True)
    bar = _bar(console) if console.is_terminal else None
    task = None if bar is None else bar.add_task(title, total=total, completed=done, text="")
    began = told = time.monotonic()
    finished = 0

    def advance(count: int, note: str = "") -> None:
        nonlocal finished, told
        finished += count
        now = time.monotonic()
        rate = finished / max(now - began, 1e-9)
        text = f"{note}{', ' if note else ''}{rate:,.{0 if rate >= 10 else 2}f} {unit}/s"
        if bar is not None and task is not None:
            bar.update(task, advance=count, text=text)
            if now - began >= after:
                bar.start()
        elif now - told >= SECONDS_BETWEEN_LINES or (note and done + finished == total):
            told = now
            left = timedelta(seconds=round((total - done - finished) / max(rate, 1e-9)))
            line = f"{title}: {done + finished:,} of {total:,}, {text}, {left} left"
            print(line, file=sys.stderr, flush=True)

    if bar is not None and after == 0:
        bar.start()
    try:
        yield advance
    finally:
        if bar is not None and bar.live.is_started:
            bar.stop()


def tracked(
    items: Iterable[Item], total: int, title: str, *, shown: bool, unit: str = "batches"
) -> Iterator[Item]:
    """Yield the items, with progress on stderr if `shown`."""
    with shown_progress(total, title, unit=unit, quiet=not shown) as advance:
        for item in items:
            yield item
            advance(1)


def _bar(console: Console) -> Progress:
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[text]}"),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, console=console, transient=True)
