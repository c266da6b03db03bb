"""Locks on open files, between processes and threads; they go with the process, however it ends.

These are for files that many read and one may remove, which `filelock` has no lock for. A lock
belongs to what one call of `open` gave. Where the system has no such locks (Windows) every
lock is granted: see `AVAILABLE`.
"""

from __future__ import annotations

from typing import IO, Any

try:
    import fcntl
except ImportError:
    fcntl = None

AVAILABLE = fcntl is not None


def lock(stream: IO[Any], *, exclusive: bool, wait: bool = True) -> bool:
    """Take or change the lock of an open file; whether it was granted, always so if one waits."""
    if fcntl is None:
        return True
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    try:
        fcntl.flock(stream, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(stream: IO[Any]) -> None:
    """Give the lock back, also for processes forked meanwhile, which closing would not do."""
    if fcntl is not None:
        fcntl.flock(stream, fcntl.LOCK_UN)
