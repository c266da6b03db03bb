"""MNIST-style folders of IDX files, plain or gzipped.

An IDX file is two zero bytes, a type byte (8: unsigned byte), the number of dimensions, each
dimension as a big-endian 32-bit integer, then the values (http://yann.lecun.com/exdb/mnist).
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import final

import numpy as np

from exactflow.data.config import DataError, Split
from exactflow.data.decode import Payload
from exactflow.data.records import (
    Records,
    Source,
    StoredSplit,
    check_labels,
    integer_labels,
    local_id,
    numbered_class_names,
    version_and_stamp,
)

_PREFIXES: dict[Split, str] = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTE = 8

# IDX files carry no names; these are the published ones.
_CLASS_NAMES = {
    "fashion-mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
}


def has_idx_files(folder: Path) -> bool:
    """Whether the folder holds the training images of an MNIST-style set."""
    return _find(folder, "train", "images-idx3") is not None


def open_idx(folder: Path) -> Source:
    """Open a folder of train-* and (optionally) t10k-* files; t10k is the test split.

    Raises:
        DataError: a header is wrong, a label file is truncated, or images and labels differ in
            number. Truncated image files are found when they are read.
    """
    splits: dict[Split, StoredSplit] = {}
    files: list[Path] = []
    for split, prefix in _PREFIXES.items():
        images = _find(folder, prefix, "images-idx3")
        if images is None:
            continue
        labels = _find(folder, prefix, "labels-idx1")
        splits[split] = _open_split(images, labels)
        files += [file for file in (images, labels) if file is not None]
    name = local_id(folder)
    class_names = _CLASS_NAMES.get(name) or numbered_class_names(list(splits.values()))
    for split in splits.values():
        check_labels(split.labels, class_names, str(folder))
    labelled = any(split.labels is not None for split in splits.values())
    version, stamp = version_and_stamp(files, folder)
    return Source(name, version, stamp, class_names if labelled else (), splits)


@final
@dataclass(frozen=True)
class IdxRecords(Records):
    """The images of one IDX file; the header is read, the pixels wait."""

    file: Path
    count: int

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{self.file}[{index}]"

    def read(self, indices: np.ndarray) -> Iterator[Payload]:
        images = read_idx(self.file, dims=3)
        return (images[index] for index in indices)


def read_idx(file: Path, dims: int) -> np.ndarray:
    """All values of an IDX file of unsigned bytes with `dims` dimensions, gzipped or not.

    Raises:
        DataError: wrong magic number, truncated, or longer than its header says.
    """
    try:
        with _open(file) as stream:
            shape = _read_header(stream, file, dims)
            values = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: expected a complete IDX file, found: {error}") from error
    expected = int(np.prod(shape, dtype=np.int64))
    if len(values) != expected:
        raise DataError(f"{file}: expected {expected} values {shape}, found {len(values)}")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def _open_split(images: Path, labels: Path | None) -> StoredSplit:
    try:
        with _open(images) as stream:
            shape = _read_header(stream, images, dims=3)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{images}: expected an IDX file, found: {error}") from error
    records = IdxRecords(images, shape[0])
    if labels is None:
        return StoredSplit(records, None)
    values = read_idx(labels, dims=1)
    if len(values) != len(records):
        raise DataError(
            f"{labels}: expected {len(records)} labels, one per image of {images.name}, "
            f"found {len(values)}"
        )
    return StoredSplit(records, integer_labels(values, str(labels)))


def _find(folder: Path, prefix: str, content: str) -> Path | None:
    """The file as it is usually named, uncompressed first (both lie there after unpacking)."""
    for separator in ("-", "."):
        for suffix in ("", ".gz"):
            stem = f"{prefix}-{content.replace('-', separator)}-ubyte"
            file = folder / (stem + suffix)
            if file.is_file():
                return file
    return None


def _open(file: Path) -> BufferedIOBase:
    with file.open("rb") as stream:
        gzipped = stream.read(2) == b"\x1f\x8b"
    return gzip.open(file, "rb") if gzipped else file.open("rb")


def _read_header(stream: BufferedIOBase, file: Path, dims: int) -> tuple[int, ...]:
    length = 4 + 4 * dims
    header = stream.read(length)
    expected = bytes((0, 0, _UNSIGNED_BYTE, dims))
    if header[:4] != expected:
        raise DataError(
            f"{file}: expected the magic number {expected.hex()} (unsigned bytes, {dims} "
            f"dimensions), found {header[:4].hex() or 'an empty file'}"
        )
    if len(header) != length:
        raise DataError(f"{file}: expected a header of {length} bytes, found {len(header)}")
    return struct.unpack(f">{dims}I", header[4:])
