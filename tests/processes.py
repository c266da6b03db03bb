"""Start commands in processes that have torch and exactflow imported already.

Importing takes seconds of a processor, so it is done once, by a server (tests/ranks.py) from which
all other processes are forked. Each process of the tests starts a server when it needs the first.
"""

import atexit
import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import pytest

import exactflow
import ranks
from exactflow.cli import main

_running: set[int] = set()
PATIENCE = 600.0  # seconds, after which a process counts as hanging
spent = 0.0  # seconds of a processor that the servers and what they forked have taken


@dataclass(frozen=True)
class Said:
    """Exit status and output of a command."""

    returncode: int
    stdout: str
    stderr: str


def call(*words: object, cwd: Path, fails: bool | None = False) -> Said:
    """Run `exactflow WORDS` in this process; `fails` is what it must do, None: anything."""
    out, errors, status = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["exactflow", *map(str, words)])
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    said = Said(status, out.getvalue(), errors.getvalue())
    assert fails is None or (status != 0) is fails, said.stdout + said.stderr
    return said


def environment() -> dict[str, str]:
    """Environment in which exactflow is imported from the same folder as here."""
    path = [str(Path(str(exactflow.__file__)).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


@cache
def _server(under: tuple[str, ...]) -> tuple[subprocess.Popen[str], IO[bytes]]:
    """A server and the stderr of it and its processes."""
    said = tempfile.TemporaryFile()  # noqa: SIM115 - until the end of all tests
    process = subprocess.Popen(
        [*under, sys.executable, str(Path(ranks.__file__))],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=said,
        text=True,
    )
    atexit.register(process.kill)
    return process, said


def ask(request: Any, under: Sequence[str] = ()) -> Any:
    """The answer of the server, which the command `under` starts if it is given."""
    global spent
    process, said = _server(tuple(under))
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    text = process.stdout.readline()
    if not text:
        _server.cache_clear()
        said.seek(0)
        raise AssertionError(said.read().decode()[-3000:])
    answer = json.loads(text)
    spent += answer["seconds"]
    return answer["answer"]


def carry_out(*rounds: dict[str, Any], under: Sequence[str] = ()) -> list[list[dict[str, Any]]]:
    """Run rounds of processes (see tests/ranks.py); the results of each process, by round."""
    return ask(list(rounds), under)


class Command:
    """A forked process that runs `python WORDS`, under torchrun with that many ranks unless 0.

    It leads a session of its own, so that a signal can be sent to it and all its children.
    """

    def __init__(self, *words: str | Path | float, cwd: Path, torchrun: int = 0) -> None:
        self.words = [str(word) for word in words]
        with tempfile.NamedTemporaryFile(delete=False) as out:
            self._out = Path(out.name)
        self._errors = self._out.with_suffix(".err")
        self.returncode: int | None = None
        self.pid: int = ask(
            {
                "words": self.words,
                "cwd": str(cwd),
                "torchrun": torchrun,
                "out": str(self._out),
                "errors": str(self._errors),
            }
        )

        _running.add(self.pid)

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        if self.returncode is None:
            self.returncode = ask({"ended": self.pid})
            if self.returncode is not None:
                _running.discard(self.pid)
        return self.returncode

    def wait_until(self, reached: Callable[[], bool]) -> None:
        """Wait for a condition that must become true before the process ends."""
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert self.poll() is None, f"{shlex.join(self.words)} has ended: {self.end()}"
            self._be_patient(deadline)

    def end(self) -> Said:
        """Wait for its end; exit status and output."""
        deadline = time.monotonic() + PATIENCE
        while (status := self.poll()) is None:
            self._be_patient(deadline)
        said = Said(status, self._out.read_text(), self._errors.read_text())
        self._out.unlink()
        self._errors.unlink()
        return said

    def _be_patient(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            os.killpg(self.pid, signal.SIGKILL)
            errors = self._errors.read_text()
            raise AssertionError(f"{shlex.join(self.words)} hangs; it said: {errors}")
        time.sleep(0.02)


@atexit.register
def _leave_nothing_running() -> None:
    """Kill the processes that a failed test has left."""
    for pid in _running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def run(*words: str | Path | float, cwd: Path, torchrun: int = 0) -> Said:
    """Run `python WORDS` in a forked process to its end."""
    return Command(*words, cwd=cwd, torchrun=torchrun).end()
