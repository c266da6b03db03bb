"""Files that are trusted only as far as they agree with hashes that were written beside them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, final

import numpy as np

from exactflow.core.serialization import json_hash
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
        file: holds them one after the other.
        shape: (n, C, H, W).
        hashes: a file that holds the hash of each; None checks nothing.
        remedy: what to do about an image that is not what it was.
        rows: which of them these are, in order; None: all.
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
            DataError: an image is not the one whose hash was written down.
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
        return CheckedImages, (*self._arguments, self._rows)  # a map's contents would be copied


def sealed(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON-able fields, with a hash of them all."""
    return {**fields, "sha256": json_hash(fields)}


def is_intact(fields: dict[str, Any]) -> bool:
    """Whether fields are what was sealed."""
    rest = {name: value for name, value in fields.items() if name != "sha256"}
    return fields.get("sha256") == json_hash(rest)
