"""Files whose content is compared with hashes that were written with it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, final

import numpy as np

from exactflow.core.files import json_hash
from exactflow.data.config import DataError

HASH_BYTES = 16  # of an image's BLAKE2b


def hashes_of(images: np.ndarray) -> np.ndarray:
    """A hash of each image of an array (n, ...), uint8 (n, HASH_BYTES)."""
    found = [hashlib.blake2b(image.tobytes(), digest_size=HASH_BYTES).digest() for image in images]
    return np.frombuffer(b"".join(found), dtype=np.uint8).reshape(-1, HASH_BYTES)


@final
class CheckedImages:
    """Images in a file, uint8 (n, C, H, W), each compared with its hash when it is first read.

    Args:
        file: holds the images one after the other.
        shape: (n, C, H, W) of the file.
        hashes: a file with the hash of each; None checks nothing.
        remedy: what the error of a changed image advises.
        rows: the rows of the file to use, in order; None: all.
    """

    def __init__(
        self,
        file: Path,
        shape: tuple[int, int, int, int],
        hashes: Path | None,
        remedy: str,
        rows: np.ndarray | None = None,
    ) -> None:
        self.file = file
        self._arguments = file, shape, hashes, remedy
        self._remedy = remedy
        self._rows = np.arange(shape[0]) if rows is None else rows
        self.shape = (len(self._rows), *shape[1:])
        self._images = np.memmap(file, np.uint8, "r", shape=shape)
        self._hashes = self._unread = None
        if hashes is not None:
            self._hashes = np.memmap(hashes, np.uint8, "r", shape=(shape[0], HASH_BYTES))
            self._unread = np.ones(shape[0], dtype=np.bool_)

    def part(self, rows: np.ndarray) -> CheckedImages:
        """Some of the images, in the same file."""
        return CheckedImages(*self._arguments, self._rows[rows])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | np.integer | slice | np.ndarray) -> np.ndarray:
        """A copy of one image, or of some, as of an array.

        Raises:
            DataError: an image has another hash than was recorded.
        """
        if isinstance(rows, int | np.integer):
            return self[np.array([rows])][0]
        stored = self._rows[rows]
        images = np.array(self._images[stored])
        if self._hashes is not None and self._unread is not None:
            new = np.flatnonzero(self._unread[stored])
            wrong = (hashes_of(images[new]) != self._hashes[stored[new]]).any(axis=1)
            if wrong.any():
                row = int(stored[new[wrong.argmax()]])
                raise DataError(
                    f"{self.file}[{row}]: expected the image whose hash was written down, found "
                    f"another one: the file was damaged or changed; {self._remedy}"
                )
            self._unread[stored] = False
        return images

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or np.uint8, copy=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickling a memory map would copy its content.
        return CheckedImages, (*self._arguments, self._rows)


def sealed(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON-able fields and a hash of all of them."""
    return {**fields, "sha256": json_hash(fields)}


def is_intact(fields: dict[str, Any]) -> bool:
    """Whether `sealed` made the fields, and none has changed."""
    rest = {name: value for name, value in fields.items() if name != "sha256"}
    return fields.get("sha256") == json_hash(rest)
