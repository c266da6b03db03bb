"""The log of a run: metrics.jsonl, one JSON object per line."""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, final

from exactflow.core.files import explained_write, write_atomically
from exactflow.core.saved_run import LogState
from exactflow.parallel.process_group import ALONE, Processes

LOG_FILE = "metrics.jsonl"


@final
class MetricsLog:
    """Writes metrics.jsonl, whose lines do not depend on interruptions of the run, but for timings.

    Args:
        run_dir: folder of the run, made if absent.
        step: steps done. Lines of later steps, which will be repeated, and incomplete lines are
            dropped.
        tensorboard: write to `run_dir/tensorboard` too.
        group: only its main process writes; all know the last line.
        expected: the log as the run left it, if known. If the file does not begin like it, a
            warning says which lines are lost, and a copy of the file is kept beside it.

    Raises:
        OSError: a file could not be written, here or later.
        ImportError: tensorboard is not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        tensorboard: bool,
        group: Processes = ALONE,
        expected: LogState | None = None,
    ) -> None:
        self._path = run_dir / LOG_FILE
        self._board: Any = None
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._lines = 0
        self.last: dict[str, Any] = group.on_main(
            lambda: self._open(run_dir, step, tensorboard, expected)
        )

    @property
    def last_step(self) -> int:
        """Step of the last line; 0 before the first."""
        return self.last.get("step", 0)

    @property
    def state(self) -> LogState:
        """Length and hash of the file as it is now; correct in the main process only."""
        return LogState(self._lines, self._hash.hexdigest())

    def write(self, line: Mapping[str, int | float]) -> None:
        """Append a line. JSON has no NaN: what is not finite is written as "nan", "inf", "-inf"."""
        self.last = {k: v if math.isfinite(v) else str(float(v)) for k, v in line.items()}
        if self._file is None:
            return
        text = json.dumps(self.last).encode() + b"\n"
        try:
            with explained_write(self._path):
                self._file.write(text)
                self._file.flush()
        except OSError:
            file, self._file = self._file, None
            with suppress(OSError):  # closing writes once more
                file.close()
            raise
        self._count(text)
        if self._board is not None:
            for name, value in line.items():
                self._board.add_scalar(name, value, line["step"])

    def sync(self) -> None:
        """Return once all lines are on disk, where a power cut leaves them."""
        if self._file is not None:
            with explained_write(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            with explained_write(self._path):
                self._file.close()
        if self._board is not None:
            self._board.close()

    def _open(
        self, run_dir: Path, step: int, tensorboard: bool, expected: LogState | None
    ) -> dict[str, Any]:
        """Open the file and drop lines that do not count; return the last line that does."""
        with explained_write(self._path):
            run_dir.mkdir(parents=True, exist_ok=True)
            found = self._path.read_bytes() if self._path.exists() else None
        lines = (found or b"").splitlines(keepends=True)
        kept = _counting(lines, step)
        if expected is not None:
            written = hashlib.sha256(b"".join(lines[: expected.lines])).hexdigest()
            if written != expected.sha256:
                self._keep_damaged(found, kept, step, expected)
        if kept != lines:
            write_atomically(self._path, b"".join(kept))
        for line in kept:
            self._count(line)
        with explained_write(self._path):
            self._file = self._path.open("ab")
        self._board = _open_tensorboard(run_dir, step) if tensorboard else None
        return json.loads(kept[-1]) if kept else {}

    def _count(self, line: bytes) -> None:
        self._hash.update(line)
        self._lines += 1

    def _keep_damaged(
        self, found: bytes | None, kept: list[bytes], step: int, expected: LogState
    ) -> None:
        """Warn which lines of a changed log are lost, and keep a copy of it."""
        told = f"{self._path} is not as the run left it at step {step}"
        lost = expected.lines - len(kept)
        what = f"{lost} of {expected.lines} lines are lost" if lost > 0 else "values were changed"
        if found is None:
            warnings.warn(f"{told}: it is gone, {what}; the run goes on", stacklevel=2)
            return
        number, aside = 1, self._path.with_name(f"{LOG_FILE}.damaged")
        while (
            aside.exists() and _counting(aside.read_bytes().splitlines(keepends=True), step) != kept
        ):
            number += 1
            aside = aside.with_name(f"{LOG_FILE}.damaged-{number}")
        if not aside.exists():
            write_atomically(aside, found)
        warnings.warn(
            f"{told}: {what}; it is kept as found in {aside.name}, and the run goes on with the "
            "lines that can be read",
            stacklevel=2,
        )


def _open_tensorboard(run_dir: Path, last_step: int) -> Any:
    """A writer that hides the values of an interrupted session after `last_step`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "logging to TensorBoard needs tensorboard: pip install 'exactflow[track]'"
        ) from error
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=last_step + 1)


def _counting(lines: list[bytes], last_step: int) -> list[bytes]:
    """The complete lines of steps up to the last one."""
    return [line for line in lines if (step := _step_of(line)) is not None and step <= last_step]


def _step_of(line: bytes) -> int | None:
    """The step of a line that `MetricsLog.write` wrote; None for any other line."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    for value in values.values():
        if type(value) not in (int, float) and value not in ("nan", "inf", "-inf"):
            return None
    step = values.get("step")
    return step if type(step) is int else None
