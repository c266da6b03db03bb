"""Real faults that a process inflicts on itself during its training."""

import errno
import multiprocessing
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

Undo = Callable[[], None]


def fill(folder: str) -> Undo:
    """Fill the file system of `folder`."""
    file = Path(folder) / "filler"
    with file.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    return file.unlink


def limit(size: int) -> Undo:
    """Let no file grow beyond `size` bytes, for machines where mounting is not allowed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def protect(folder: str) -> Undo:
    """Remove the permission to write in the folder and its subfolders."""
    folders = [Path(folder), *(path for path in Path(folder).rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)

    def undo() -> None:
        for path in folders:
            path.chmod(0o755)

    return undo


def kill_loader(signum: int) -> Undo:
    """Send a signal to one of the processes that load images."""
    os.kill(int(multiprocessing.active_children()[0].pid or 0), signum)
    return lambda: None


def order_loaders(signum: int) -> Undo:
    """Send a signal to all loaders, as a scheduler may before it reaches the training process."""
    pids = [str(child.pid) for child in multiprocessing.active_children()]
    subprocess.run(["kill", f"-{int(signum)}", *pids], check=True)  # not from their parent
    return lambda: None


FAULTS: dict[str, Callable[[Any], Undo]] = {
    "fill": fill,
    "limit": limit,
    "protect": protect,
    "kill loader": kill_loader,
    "order loaders": order_loaders,
}
