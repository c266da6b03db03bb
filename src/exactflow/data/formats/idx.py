"""MNIST-style folders of IDX files, plain or gzipped.

An IDX file is two zero bytes, a type byte (8: unsigned byte), the number of dimensions, each
dimension as a big-endian 32-bit integer, then the values (http://yann.lecun.com/exdb/mnist).
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import final

import numpy as np

from exactflow.data.config import DataError, Split
from exactflow.data.decode import Payload, require_pixels
from exactflow.data.files import open_regular, require_unpacked, visible
from exactflow.data.formats.label_columns import LabelPart, with_labels
from exactflow.data.records import Records, Source, local_id, local_source
from exactflow.data.splits import named_splits

# Names before the content: train, t10k, emnist-letters-train, ...
_IMAGES = re.compile(r"(.*?)[-_.]?images[-._]idx3[-._]ubyte(\.gz)?")
_LABELS = re.compile(r"(.*?)[-_.]?labels[-._]idx1[-._]ubyte(\.gz)?")
_TEST = re.compile("t10k", re.IGNORECASE)  # MNIST's word for its test split
_UNSIGNED_BYTE = 8

# IDX files carry no names; these are the published ones.
_CLASS_NAMES = {
    "fashion-mnist": (
        "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"
    )
}


def has_idx_files(folder: Path) -> bool:
    """Whether a folder holds the images of an MNIST-style set."""
    return bool(_found(folder, _IMAGES))


def open_idx(folder: Path, max_pixels: int) -> Source:
    """Open a folder of such files; those of t10k are the test split.

    What stands before "images" says the split (`splits.py`), and labels have the same name.

    Args:
        folder: the folder.
        max_pixels: as in `DataConfig`.

    Raises:
        DataError: a name says no split, or two say one; a header is wrong, a label file is
            truncated or has another name, or images and labels differ in number. A truncated image
            file raises when it is read.
    """
    known = _CLASS_NAMES.get(local_id(folder))
    names = () if known is None else tuple(known.split(", "))
    records: dict[Split, IdxRecords] = {}
    parts: dict[Split, list[LabelPart]] = {}
    files: list[Path] = []
    for split, prefix in _prefixes(folder).items():
        images = _found(folder, _IMAGES)[prefix]
        with _opened(images, dims=3) as (_, (count, height, width)):
            require_pixels(width, height, max_pixels, str(images))
        records[split] = IdxRecords(images, count)
        labels = _labels_of(prefix, images)
        if labels is not None:
            values = _read_labels(labels, records[split])
            parts[split] = [LabelPart(str(labels), values, names, by_name=False)]
        files += [images] if labels is None else [images, labels]
    splits, class_names = with_labels(records, parts)
    return local_source(folder, files, class_names, splits)


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
        """See `Records.read`; holds one image at a time, and reads the file to its end."""
        with _opened(self.file, dims=3) as (stream, (count, height, width)):
            size = height * width
            begin = stream.tell()
            for index in indices.tolist():
                stream.seek(begin + index * size)
                content = stream.read(size)
                if len(content) != size:
                    raise _wrong_length(self.file, (count, height, width), "fewer")
                yield np.frombuffer(content, dtype=np.uint8).reshape(height, width)
            stream.seek(begin + count * size)
            _require_end(stream, self.file, (count, height, width))


def _read_labels(file: Path, images: IdxRecords) -> np.ndarray:
    with _opened(file, dims=1) as (stream, (found,)):
        if found != images.count:
            raise DataError(
                f"{file}: expected {images.count} labels, one per image of {images.file.name}, "
                f"found {found}"
            )
        content = stream.read(found)
        if len(content) != found:
            raise _wrong_length(file, (found,), str(len(content)))
        _require_end(stream, file, (found,))
    return np.frombuffer(content, dtype=np.uint8)


def _prefixes(folder: Path) -> dict[Split, str]:
    """The prefix of the files of each split."""
    found = list(_found(folder, _IMAGES))
    words = {prefix: _TEST.sub("test", prefix) for prefix in found}
    named = named_splits(words.values(), str(folder))
    prefixes: dict[Split, str] = {}
    for prefix in found:
        split = named[words[prefix]]
        if split is None or split in prefixes:
            other = "" if split is None else f", and of {prefixes[split]}, which both say {split}"
            raise DataError(
                f"{folder}: expected one train-images-idx3-ubyte, and one of another split at "
                f"most, found images of {prefix or 'no name'}{other}"
            )
        prefixes[split] = prefix
    if "train" not in prefixes:
        raise DataError(f"{folder}: expected train-images-idx3-ubyte, found {', '.join(found)}")
    return prefixes


def _found(folder: Path, kind: re.Pattern[str]) -> dict[str, Path]:
    """Files by the prefix before their kind; of a file and its compressed copy, the first."""
    found: dict[str, Path] = {}
    for child in visible(folder, "*ubyte*"):
        match = kind.fullmatch(child.name)
        if match and not child.is_dir():
            found.setdefault(match[1], child)
    return found


def _labels_of(prefix: str, images: Path) -> Path | None:
    labels = _found(images.parent, _LABELS)
    if prefix in labels:
        return labels[prefix]
    for child in visible(images.parent, "*labels*"):
        if child.name.startswith(prefix) and child not in labels.values() and child.is_file():
            raise DataError(f"{child}: expected the labels of {images.name} in idx1-ubyte")
    return None


@contextmanager
def _opened(file: Path, dims: int) -> Iterator[tuple[BufferedIOBase, tuple[int, ...]]]:
    """An IDX file of unsigned bytes, gzipped or not, at its first value; and its `dims` dimensions.

    Raises:
        DataError: wrong magic number, damaged, or longer or shorter than its header says, which
            for a compressed file is known at its end.
    """
    try:
        with open_regular(file) as raw:
            gzipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = gzip.GzipFile(fileobj=raw) if gzipped else raw
            shape = _read_header(stream, file, dims)
            size = file.stat().st_size
            if gzipped:
                require_unpacked(file, math.prod(shape), size)
            elif size - raw.tell() != math.prod(shape):
                raise _wrong_length(file, shape, str(size - raw.tell()))
            yield stream, shape
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: expected a complete IDX file, found: {error}") from error


def _require_end(stream: BufferedIOBase, file: Path, shape: tuple[int, ...]) -> None:
    if stream.read(1):
        raise _wrong_length(file, shape, "more")


def _wrong_length(file: Path, shape: tuple[int, ...], found: str) -> DataError:
    return DataError(f"{file}: expected {math.prod(shape)} values {shape}, found {found}")


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
