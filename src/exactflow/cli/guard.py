"""How a command ends: with a status, and at most one message. Imports nothing that takes time."""

import os
import platform
import select
import shlex
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exactflow import __version__
from exactflow.cli.terminal import note

FORESEEN = (ValueError, ArithmeticError, ImportError, OSError, MemoryError)
UNFORESEEN_STATUS = 70  # EX_SOFTWARE of sysexits.h


@contextmanager
def guarded() -> Iterator[None]:
    """End the process with one message, and without a traceback, however the inside ends.

    Status 1 is an error that was foreseen, 70 any other, whose traceback is in a file that the
    message names; 128 + signal is Ctrl-C, or a reader of stdout that went away, as `| head` does.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        note("interrupted")
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_abandoned():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush
            sys.exit(128 + signal.SIGPIPE)
        if isinstance(error, FORESEEN):
            note(f"error{_place()}: {_full(error) if isinstance(error, MemoryError) else error}")
            sys.exit(1)
        note(f"error{_place()}: {_unforeseen(error)}")
        sys.exit(UNFORESEEN_STATUS)


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Inside, Ctrl-C ends the process with one line, whatever code it meets.

    What is imported at the start would else say it in its own way, or take it for a fault.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(128 + signal.SIGINT)


def _is_abandoned() -> bool:
    """Whether stdout is a pipe that nobody reads."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # no file, or a system without poll
        return False


def _place() -> str:
    """Which process this is, where torchrun started several."""
    rank, count = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return f" in process {rank} of {count}" if rank.isdigit() and count not in ("", "1") else ""


def _full(error: MemoryError) -> str:
    """What to do where memory is full."""
    first = (str(error).splitlines() or ["no more is known"])[0]
    return f"out of memory: a smaller batch, or a smaller model, needs less ({first})"


def _unforeseen(error: Exception) -> str:
    """One line that names the file in which the traceback is."""
    first = (str(error).strip().splitlines() or [""])[0]
    what = f"{type(error).__name__}: {first}" if first else type(error).__name__
    try:
        return f"{what}; a fault of exactflow: please report it with {_report(error)}"
    except OSError as obstacle:
        traceback.print_exception(error)
        return f"{what}; a fault of exactflow: please report it (no log file: {obstacle})"


def _report(error: Exception) -> Path:
    """A new file with the traceback and what it may depend on."""
    handle, name = tempfile.mkstemp(prefix="exactflow-error-", suffix=".log")
    lines = [
        f"exactflow {__version__}, Python {platform.python_version()}, {platform.platform()}",
        shlex.join(sys.argv),
        "".join(traceback.format_exception(error)),
    ]
    with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write("\n".join(lines))
    return Path(name)
