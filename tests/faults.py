"""Real faults, brought about by the process that they strike, in the midst of its training."""

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
    """Leave the file system of `folder` no room."""
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
    """Let no file grow beyond `size` bytes: what is possible where one may not mount."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def protect(folder: str) -> Undo:
    """Take the right away to write in the folder and those in it."""
    folders = [Path(folder), *(path for path in Path(folder).rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)

    def undo() -> None:
        for path in folders:
            path.chmod(0o755)

    return undo


def kill_loader(signum: int) -> Undo:
    """End one of the processes that load images."""
    os.kill(int(multiprocessing.active_children()[0].pid or 0), signum)
    return lambda: None


def order_loaders(signum: int) -> Undo:
    """What a scheduler does to all processes of a job, before it comes to the one that trains."""
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
