"""The folder of a run, locked against other runs while one trains in it."""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from filelock import FileLock, Timeout

from exactflow.core.files import explained_write, write_atomically
from exactflow.data.config import DataConfig, is_path

LOCK_FILE = ".lock"


@final
@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, and the files there that describe the run.

    Attributes:
        path: folder of checkpoints and log.
        record: content of the describing files, by name. They are written once the folder is known
            to hold this run or none; a refused run writes none of them.
    """

    path: Path
    record: Mapping[str, bytes] = field(default_factory=dict)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder, made if absent, against other runs.

        The kernel ends the lock with this process, however it ends. Where the file system has no
        locks, there is none.

        Raises:
            ValueError: another process has the lock.
            OSError: nothing can be written there.
        """
        path = self.path / LOCK_FILE
        with explained_write(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            path.touch()
        with ExitStack() as stack:
            try:
                stack.enter_context(FileLock(path, blocking=False, fallback_to_soft=False))
            except Timeout:
                found = path.read_text() or "another process"
                raise ValueError(
                    f"{self.path}: expected a folder in which nobody trains, found one in which "
                    f"{found} does; wait for its end, or choose another"
                ) from None
            except OSError:  # no locks here
                pass
            with suppress(OSError):
                path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            yield

    def write_record(self) -> None:
        """Write the files that describe the run. Raises OSError."""
        for name, content in self.record.items():
            write_atomically(self.path / name, content)


def as_run_folder(place: str | Path | RunFolder) -> RunFolder:
    """The folder at a path, or the one given."""
    return place if isinstance(place, RunFolder) else RunFolder(Path(place))


def check_apart(out: Path, data: DataConfig) -> None:
    """Raise ValueError for a folder among the images, where its pictures would be read as images.

    Args:
        out: folder to write.
        data: where images come from.
    """
    for source in (data.source, data.validation):
        if source is None or not is_path(source):
            continue
        images, written = Path(source).expanduser().resolve(), out.resolve()
        if images == written or images in written.parents:
            raise ValueError(
                f"--out {out}: expected a folder outside of the images in {source}, where the "
                "pictures that are written would be read as images"
            )
