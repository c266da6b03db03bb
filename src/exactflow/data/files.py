"""Files that others made: which of them are looked at, and how they are opened."""

from __future__ import annotations

import hashlib
import stat
from io import BufferedRandom, BufferedReader
from pathlib import Path

from exactflow.data.config import DataError

# Pixels of pictures are packed five times at most; all zeros a thousand times.
_SMALL = 2**28  # bytes that anything may be unpacked to
_RATIO = 100

_LITTER = "__MACOSX"  # macOS adds it to archives, with a small hidden file for every file


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is left alone."""
    return name.startswith(".") or name == _LITTER


def visible(folder: Path, pattern: str) -> list[Path]:
    """What matches a pattern in a folder, by name, without what is hidden."""
    return sorted(found for found in folder.glob(pattern) if not is_hidden(found.name))


def regular_files(folder: Path, pattern: str) -> list[Path]:
    """The same, of which all have to be files.

    Raises:
        DataError: one is a folder, a pipe, a device, or a link that leads nowhere.
    """
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
        OSError: it cannot be read, or is no regular file: a pipe would be waited for, and a device
            need not end.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(f"{_kind(file)} in place of a file")
    return file.open("rb")


def sha256_of(stream: BufferedReader | BufferedRandom) -> str:
    """Of the whole content of a file, in hex."""
    stream.seek(0)
    return hashlib.file_digest(stream, "sha256").hexdigest()


def _kind(path: Path) -> str:
    """What is there that is no file."""
    if path.is_dir():
        return "a folder"
    return "a pipe, a socket or a device" if path.exists() else "a link that leads nowhere"


def require_unpacked(file: Path, unpacked: int, packed: int) -> None:
    """Raise a DataError if a compressed file would become far larger than pictures do."""
    if unpacked > max(_SMALL, _RATIO * packed):
        raise DataError(
            f"{file}: expected a compressed file that grows {_RATIO} times at most, found "
            f"{packed} bytes that become {unpacked}; unpack it first to use it"
        )
