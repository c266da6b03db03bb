"""The folder of a run, held against other runs while one trains in it."""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from exactflow.core.serialization import explained_write, write_atomically
from exactflow.data.config import DataConfig, is_path

LOCK_FILE = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder, made if absent; the kernel lets go of it when this process ends, however.

    Where the file system has no locks, it is not held.

    Raises:
        ValueError: another process holds it.
        OSError: nothing can be written there.
    """
    path = folder / LOCK_FILE
    with explained_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(path, blocking=False, fallback_to_soft=False))
        except Timeout:
            raise ValueError(
                f"{folder}: expected a folder in which nobody trains, found one in which "
                f"{path.read_text() or 'another process'} does; wait for its end, or choose another"
            ) from None
        except OSError:  # no locks here
            pass
        with suppress(OSError):
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield


def write_record(folder: Path, record: Mapping[str, bytes]) -> None:
    """Write what describes a run, by file name, once it is known to be the folder's own.

    Raises:
        OSError: a file could not be written.
    """
    for name, content in record.items():
        write_atomically(folder / name, content)


def check_apart(out: Path, data: DataConfig) -> None:
    """Raise ValueError for a folder inside of the images that are read: its pictures would be too.

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
