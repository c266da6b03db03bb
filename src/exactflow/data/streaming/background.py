"""Tasks done ahead by threads that end with the process and are never waited for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from exactflow.data.config import DataError

_Task = TypeVar("_Task")


@contextmanager
def done_ahead(action: Callable[[_Task], None], threads: int) -> Iterator[Callable[[_Task], None]]:
    """Yield `want(task)`, which queues `action(task)`: first requested, first served.

    DataError and OSError of an action are ignored: the caller that needs its result repeats it, and
    gets the error itself. Tasks that are not begun at the end are dropped.
    """
    tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
    ended = threading.Event()

    def work() -> None:
        while (task := tasks.get()) is not None and not ended.is_set():
            try:
                action(task)
            except (DataError, OSError):
                continue

    for _ in range(threads):
        threading.Thread(target=work, daemon=True).start()
    try:
        yield tasks.put
    finally:
        ended.set()
        for _ in range(threads):
            tasks.put(None)
