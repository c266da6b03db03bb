"""When and by whom checkpoints are written.

A whole model is written at once, by the main process. Of a split one every process copies its parts
aside and writes them while training goes on; once all are on disk, which every process must know,
the checkpoint gets its name.
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

from exactflow.core.saved_run import LogState
from exactflow.parallel.process_group import Processes
from exactflow.training import checkpoint as disk
from exactflow.training.tensors import RunTensors


@final
class Saver:
    """The checkpoints of a run, as the processes of a group write them together.

    Args:
        checkpoints: where to.
        tensors: what.
        split: whether their parts lie in different processes.
        group: the processes. All call the methods that do not say otherwise, alike.

    Attributes:
        last: the newest whole checkpoint, found or written.
    """

    def __init__(
        self, checkpoints: disk.Checkpoints, tensors: RunTensors, split: bool, group: Processes
    ) -> None:
        self._checkpoints, self._tensors, self._group = checkpoints, tensors, group
        self._writers: ProcessGroup | None = None
        if split:  # threads of all processes talk to each other while these train
            made = torch.distributed.new_group(backend="gloo")
            assert isinstance(made, ProcessGroup)
            self._writers = made
        self._thread = ThreadPoolExecutor(1)
        self._pending: tuple[disk.RunState, Mapping[str, Any], LogState] | None = None
        self._written: Future[dict[str, str]] | None = None
        self.last: disk.Checkpoint | None = None

    def save(self, state: disk.RunState, identity: Mapping[str, Any], log: LogState) -> None:
        """Write a checkpoint, or begin to. Raises OSError if this or the one before failed."""
        self.settle()
        if self._writers is None:
            files = self._tensors.files()
            self.last = self._group.on_main(
                lambda: self._checkpoints.save(state, identity, files, log)
            )
            return
        partial = self._group.on_main(lambda: self._checkpoints.begin(state.step))
        from torch.distributed import checkpoint as dcp  # takes seconds to import

        folder, named = partial / disk.SPLIT_FOLDER, self._tensors.named()
        writing = dcp.async_save(named, checkpoint_id=folder, process_group=self._writers)
        self._pending = (state, identity, log)
        self._written = self._thread.submit(_hashes, writing, folder, self._group.rank)

    @property
    def saved_step(self) -> int:
        """Step of the last checkpoint, also of one that was only begun; -1 before the first."""
        if self._pending is not None:
            return self._pending[0].step
        return -1 if self.last is None else self.last.state.step

    @property
    def has_written(self) -> bool:
        """Whether this process has written its parts of it; other processes may differ."""
        return self._written is not None and self._written.done()

    def settle(self) -> None:
        """Wait for the checkpoint that was begun, if any. Raises OSError if it failed."""
        if self._pending is None or self._written is None:
            return
        state, identity, log = self._pending
        written = self._written
        self._pending = self._written = None
        with self._checkpoints.undone(state.step):
            hashes: dict[str, str] = {}
            for found in self._group.share(written.result):
                hashes |= found
            self.last = self._group.on_main(
                lambda: self._checkpoints.commit(state, identity, hashes, log)
            )

    @contextmanager
    def vouching(self) -> Iterator[None]:
        """An OSError inside, of a file that could not be written, also says what is safe."""
        try:
            yield
        except OSError as error:
            if self.last is None or error.filename is not None:  # which has the last word
                raise
            safe = f"the previous checkpoint {self.last.folder} is intact, the same command goes on"
            raise OSError(error.errno, f"{error.strerror}; {safe}") from error

    def close(self) -> None:
        """Let go of the thread; this process alone."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _hashes(writing: Any, folder: Path, rank: int) -> dict[str, str]:
    """SHA-256 of the files that this process has written, once it has, by their names."""
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
