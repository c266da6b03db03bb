"""The log of a run: metrics.jsonl, one JSON object per line."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, final

from exactflow.core.processes import ALONE, Processes
from exactflow.core.serialization import explained_write, write_atomically

LOG_FILE = "metrics.jsonl"


@final
class MetricsLog:
    """metrics.jsonl: after any number of interruptions the same as without them, but for timings.

    Args:
        run_dir: folder of the run, made if absent.
        step: steps done. Lines of later ones are dropped, since these are about to be repeated;
            so are torn lines.
        tensorboard: write to `run_dir/tensorboard` too.
        group: only the main process of it writes; all know the last line.

    Raises:
        OSError: a file could not be written, here or later.
        ImportError: tensorboard is not installed.
    """

    def __init__(
        self, run_dir: Path, step: int, tensorboard: bool, group: Processes = ALONE
    ) -> None:
        self._path = run_dir / LOG_FILE
        self._board: Any = None
        self._file: BinaryIO | None = None
        self.last: dict[str, Any] = group.on_main(lambda: self._open(run_dir, step, tensorboard))

    @property
    def last_step(self) -> int:
        """Step of the last line; 0 before the first."""
        return self.last.get("step", 0)

    def write(self, line: Mapping[str, int | float]) -> None:
        """Append a line. JSON has no NaN: what is not finite is written as "nan", "inf", "-inf"."""
        self.last = {k: v if math.isfinite(v) else str(float(v)) for k, v in line.items()}
        if self._file is None:
            return
        try:
            with explained_write(self._path):
                self._file.write(json.dumps(self.last).encode() + b"\n")
                self._file.flush()
        except OSError:
            file, self._file = self._file, None
            with suppress(OSError):  # it tries once more
                file.close()
            raise
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

    def _open(self, run_dir: Path, step: int, tensorboard: bool) -> dict[str, Any]:
        """The last line that counts."""
        with explained_write(self._path):
            run_dir.mkdir(parents=True, exist_ok=True)
            lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        kept = [line for line in lines if _line_counts(line, step)]
        if kept != lines:
            write_atomically(self._path, b"".join(kept))
        with explained_write(self._path):
            self._file = self._path.open("ab")
        self._board = _open_tensorboard(run_dir, step) if tensorboard else None
        return json.loads(kept[-1]) if kept else {}


def _open_tensorboard(run_dir: Path, last_step: int) -> Any:
    """A writer that hides what an interrupted session wrote after `last_step`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "logging to TensorBoard needs tensorboard: pip install 'exactflow[track]'"
        ) from error
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=last_step + 1)


def _line_counts(line: bytes, last_step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= last_step
    except ValueError:
        return False
