"""When and by whom checkpoints are written.

The main process writes a whole model at once. Of a split one every process copies its parts aside
and writes them while training goes on; once all processes know that all parts are on disk, the
checkpoint gets its name.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch.distributed import ProcessGroup

from exactflow.core.saved_run import SPLIT_FOLDER, Checkpoint, LogState, RunState
from exactflow.parallel.process_group import Processes
from exactflow.training.checkpoint import Checkpoints
from exactflow.training.tensors import RunTensors


@final
class Saver:
    """Writes the checkpoints of a run, together with the other processes of a group.

    All processes call the same methods in the same order, `close` excepted.

    Args:
        checkpoints: the folder to write to.
        tensors: what is written.
        split: whether different processes have different parts of the tensors.
        group: the processes.

    Attributes:
        last: the newest whole checkpoint, found or written.
    """

    def __init__(
        self, checkpoints: Checkpoints, tensors: RunTensors, split: bool, group: Processes
    ) -> None:
        self._checkpoints, self._tensors, self._group = checkpoints, tensors, group
        self._writers: ProcessGroup | None = None
        if split:  # the writing threads exchange messages of their own
            made = torch.distributed.new_group(backend="gloo")
            assert isinstance(made, ProcessGroup)
            self._writers = made
        self._thread = ThreadPoolExecutor(1)
        # Of the checkpoint that is being written; the last is the hashes of this process's files.
        self._pending: (
            tuple[RunState, Mapping[str, Any], LogState, Future[dict[str, str]]] | None
        ) = None
        self.last: Checkpoint | None = None

    def save(self, state: RunState, identity: Mapping[str, Any], log: LogState) -> None:
        """Write a checkpoint, or start to. Raises OSError if this or the last one failed."""
        self.settle()
        if self._writers is None:
            files = self._tensors.files()
            self.last = self._group.on_main(
                lambda: self._checkpoints.save(state, identity, files, log)
            )
            return
        partial = self._group.on_main(lambda: self._checkpoints.begin(state.step))
        from torch.distributed import checkpoint as dcp  # takes seconds to import

        folder, named = partial / SPLIT_FOLDER, self._tensors.named()
        writing = dcp.async_save(named, checkpoint_id=folder, process_group=self._writers)
        written = self._thread.submit(_hashes, writing, folder, self._group.rank)
        self._pending = (state, identity, log, written)

    @property
    def saved_step(self) -> int:
        """Step of the last checkpoint, written or being written; -1 before the first."""
        if self._pending is not None:
            return self._pending[0].step
        return -1 if self.last is None else self.last.state.step

    @property
    def has_written(self) -> bool:
        """Whether this process has written its parts of the last checkpoint."""
        return self._pending is not None and self._pending[-1].done()

    def settle(self) -> None:
        """Wait for the checkpoint that is being written, if any. Raises OSError if it failed."""
        if self._pending is None:
            return
        (state, identity, log, written), self._pending = self._pending, None
        with self._checkpoints.removed_on_error(state.step):
            parts = self._group.share(written.result)
            hashes = {name: sha256 for part in parts for name, sha256 in part.items()}
            self.last = self._group.on_main(
                lambda: self._checkpoints.commit(state, identity, hashes, log)
            )

    @contextmanager
    def naming_last_checkpoint(self) -> Iterator[None]:
        """Say in an OSError inside, of a file that was not written, which checkpoint is intact."""
        try:
            yield
        except OSError as error:
            if self.last is None or error.filename is not None:  # a file name ends the message
                raise
            safe = f"the previous checkpoint {self.last.folder} is intact, the same command goes on"
            raise OSError(error.errno, f"{error.strerror}; {safe}") from error

    def close(self) -> None:
        """End the writing thread of this process."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _hashes(writing: Any, folder: Path, rank: int) -> dict[str, str]:
    """Wait until this process has written its files; return their SHA-256 by name."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        writing.result()
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        if isinstance(first, OSError):
            reason = f"could not write {folder}: {first.strerror}"
            raise OSError(first.errno, reason) from error
        raise
    mine = sorted(folder.glob(f"__{rank}_*.distcp"))
    mine += [folder / ".metadata"] if rank == 0 else []
    found = {}
    for path in mine:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            name = path.relative_to(folder.parent).as_posix()
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
