"""How far a long job is: a bar on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0

Item = TypeVar("Item")


@contextmanager
def shown_progress(
    total: int, title: str, *, unit: str = "images", done: int = 0, quiet: bool = False
) -> Iterator[Callable[[int], None]]:
    """Yield `advance(count)`; how many are done, their rate and the time left go to stderr.

    Args:
        total: number of things.
        title: what is done to them.
        unit: what they are.
        done: how many of them were done before; the rate is that of the others.
        quiet: show nothing.
    """
    if quiet:
        yield lambda count: None
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(total, title, unit, done)
        return
    with _bar(console, total, title, unit, done) as advance:
        yield advance


def tracked(
    items: Iterable[Item], total: int, title: str, *, shown: bool, unit: str = "batches"
) -> Iterator[Item]:
    """The items, one after the other, with the progress through them on stderr if `shown`."""
    with shown_progress(total, title, unit=unit, quiet=not shown) as advance:
        for item in items:
            yield item
            advance(1)


def _lines(total: int, title: str, unit: str, done: int) -> Callable[[int], None]:
    began = told = time.monotonic()
    count = 0

    def advance(more: int) -> None:
        nonlocal told, count
        count += more
        now = time.monotonic()
        if now - told >= SECONDS_BETWEEN_LINES:
            told = now
            rate = count / max(now - began, 1e-9)
            left = timedelta(seconds=round((total - done - count) / max(rate, 1e-9)))
            line = f"{title}: {done + count:,} of {total:,}, {rate:,.0f} {unit}/s, {left} left"
            print(line, file=sys.stderr, flush=True)

    return advance


@contextmanager
def _bar(
    console: "Console", total: int, title: str, unit: str, done: int
) -> Iterator[Callable[[int], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total, completed=done, rate="")
        began = time.monotonic()
        count = 0

        def advance(more: int) -> None:
            nonlocal count
            count += more
            rate = count / max(time.monotonic() - began, 1e-9)
            bar.update(task, advance=more, rate=f"{rate:,.0f} {unit}/s")

        yield advance
