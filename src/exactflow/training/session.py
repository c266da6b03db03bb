"""The process that trains: signals that ask it to stop, and its clock."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import final


@final
class Interrupted(Exception):
    """Training stopped at a signal, after its state was saved: run the same command to resume.

    Attributes:
        step: optimizer steps done, all of them in the checkpoint.
        exit_code: 128 + the signal's number, by which shells know that a signal ended a process.
    """

    def __init__(self, step: int, signum: int) -> None:
        self.step, self._signum = step, signum
        self.exit_code = 128 + signum
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} after step {step}; run the same command to resume")

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[int, int]]:
        return Interrupted, (self.step, self._signum)


@final
@dataclass
class StopRequest:
    """The signal that asked the process to stop; None before one came."""

    signum: int | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn the first SIGTERM or SIGINT into a request that the training loop reads.

    A second SIGINT raises KeyboardInterrupt at once. The previous handlers are restored at the end.
    Outside the main thread, where Python installs no handlers, signals act as before.
    """
    request = StopRequest()

    def note(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and request.signum is not None:
            raise KeyboardInterrupt
        request.signum = request.signum or signum

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {signum: signal.signal(signum, note) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@final
class Clock:
    """Seconds of the run in all its sessions, and the speed of training alone.

    Args:
        seconds: of earlier sessions.
        step_seconds: those of them that steps took.
    """

    def __init__(self, seconds: float, step_seconds: float) -> None:
        self._start = time.perf_counter() - seconds
        self.step_seconds = step_seconds
        self.lap()

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run."""
        return time.perf_counter() - self._start

    @property
    def steps_per_second(self) -> float:
        """Speed since the last lap, the time between steps left out; nan before a step."""
        return self._steps / self._stepping if self._steps else math.nan

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count and time the step that is taken inside."""
        start = time.perf_counter()
        yield
        took = time.perf_counter() - start
        self._stepping += took
        self.step_seconds += took
        self._steps += 1

    def lap(self) -> None:
        """Measure the speed from here on."""
        self._steps, self._stepping = 0, 0.0
