"""Files from other people: which ones are used, and how they are opened safely."""

from __future__ import annotations

import hashlib
import stat
from io import BufferedRandom, BufferedReader
from pathlib import Path

from exactflow.data.config import DataError

# Compressed images shrink to a fifth at most; zeros shrink to a thousandth.
_SMALL = 2**28  # bytes that any file may be unpacked to
_RATIO = 100


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is ignored."""
    return name.startswith(".") or name == "__MACOSX"  # which macOS adds to archives


def visible(folder: Path, pattern: str) -> list[Path]:
    """Files and folders that match a pattern in a folder, sorted, without hidden ones."""
    return sorted(found for found in folder.glob(pattern) if not is_hidden(found.name))


def regular_files(folder: Path, pattern: str) -> list[Path]:
    """As `visible`, for files only; raises a DataError for a folder, a pipe, or a broken link."""
    found = visible(folder, pattern)
    for file in found:
        if not file.is_file():
            raise DataError(f"{file}: expected a file, found {_kind(file)}")
    return found


def printable(name: str) -> str:
    r"""A name as text that can be written anywhere: bytes that are not UTF-8 become \xNN."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def open_regular(file: Path) -> BufferedReader:
    """Open a file for reading.

    Raises:
        OSError: it cannot be read, or is no regular file: a pipe would block, and a device need
            not end.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(f"{_kind(file)} in place of a file")
    return file.open("rb")


def folder_identity(folder: Path) -> tuple[int, int]:
    """Device and number on it: equal for all paths to one folder."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def sha256_of(stream: BufferedReader | BufferedRandom) -> str:
    """SHA-256 of the whole content of a file, in hex."""
    stream.seek(0)
    return hashlib.file_digest(stream, "sha256").hexdigest()


def _kind(path: Path) -> str:
    """Description of a path that is no file, for errors."""
    if path.is_dir():
        return "a folder"
    return "a pipe, a socket or a device" if path.exists() else "a link that leads nowhere"


def require_unpacked(file: Path, unpacked: int, packed: int) -> None:
    """Raise a DataError if a compressed file grows more than images do when it is unpacked."""
    if unpacked > max(_SMALL, _RATIO * packed):
        raise DataError(
            f"{file}: expected a compressed file that grows {_RATIO} times at most, found "
            f"{packed} bytes that become {unpacked}; unpack it first to use it"
        )
