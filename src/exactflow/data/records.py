"""What every source is opened as: stored splits of undecoded images."""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np

from exactflow.data.classes import listed, numbered
from exactflow.data.config import DataError, Split
from exactflow.data.decode import Payload
from exactflow.data.files import printable, regular_files
from exactflow.data.splits import Stored, by_split, is_only_a_split

log = logging.getLogger(__name__)

MANY_CLASSES = 2**16  # a larger label is accepted only in a set of more images


class Records(ABC):
    """The undecoded images of one stored split, in stored order."""

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Name of an image, for errors: its file, and its row in a file of many images."""

    @abstractmethod
    def read(self, indices: np.ndarray) -> Iterator[Payload]:
        """The images at `indices` (ascending), one by one.

        Raises:
            DataError: the file that holds them is broken.
        """


@final
@dataclass(frozen=True)
class FileRecords(Records):
    """One file per image."""

    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def read(self, indices: np.ndarray) -> Iterator[Payload]:
        return (self.files[index] for index in indices)


@dataclass(frozen=True)
class RowRecords(Records):
    """Images in the rows of some files, one file after the other.

    Attributes:
        files: the files.
        counts: number of rows of each.
    """

    files: tuple[Path, ...]
    counts: tuple[int, ...]

    @abstractmethod
    def read_file(self, file: Path, rows: np.ndarray) -> Iterator[Payload]:
        """The images of these rows (ascending) of a file. Raises DataError if it is broken."""

    def __len__(self) -> int:
        return sum(self.counts)

    def name(self, index: int) -> str:
        for file, count in zip(self.files, self.counts, strict=True):
            if index < count:
                return f"{file}[row {index}]"
            index -= count
        raise IndexError(index)

    def read(self, indices: np.ndarray) -> Iterator[Payload]:
        start = 0
        for file, count in zip(self.files, self.counts, strict=True):
            rows = indices[(indices >= start) & (indices < start + count)] - start
            if len(rows):
                yield from self.read_file(file, rows)
            start += count


@final
@dataclass(frozen=True)
class StoredSplit:
    """A split as the source stores it.

    Attributes:
        records: its images.
        labels: int64 (len(records),), indices into the source's class names; or None.
        shards: number of images in each shard that it is streamed from, which are not divided
            between splits; None where every image can be read at any time.
    """

    records: Records
    labels: np.ndarray | None
    shards: tuple[int, ...] | None = None


@final
@dataclass(frozen=True)
class Source:
    """An opened source; nothing is decoded yet.

    Attributes:
        id: its name in tables.
        version: changes with the stored data; equal for every copy of them.
        stamp: changes with the files on this disk (names, sizes, times); part of the cache's key.
        class_names: names of the labels 0, 1, ...; empty if unlabelled.
        splits: the stored splits; "train" is always there.
        levels: number of values a pixel can take before `bits` is applied.
    """

    id: str
    version: str
    stamp: str
    class_names: tuple[str, ...]
    splits: dict[Split, StoredSplit]
    levels: int = 256

    @property
    def stored(self) -> dict[Split, Stored]:
        """Size of each split, for `split_members`; JSON keeps it unchanged."""
        return {
            name: len(split.records) if split.shards is None else list(split.shards)
            for name, split in self.splits.items()
        }


def withheld(parts: Sequence[np.ndarray], where: str) -> bool:
    """Whether all labels of a split are -1, as the hub marks withheld ones; if so, logs it."""
    found = any(map(len, parts)) and all(bool((values == -1).all()) for values in parts)
    if found:
        log.warning("%s: every label is -1; the split is taken as unlabelled", where)
    return found


def bounded_labels(values: np.ndarray, images: int, name_of: Callable[[int], str]) -> np.ndarray:
    """Integer labels as int64, in a range that a split of so many images can have.

    Raises:
        DataError: a label is negative, or far beyond the number of images.
    """
    if not len(values):
        return np.empty(0, dtype=np.int64)
    low, high = int(values.min()), int(values.max())  # as Python's: no type overflows
    if low < 0:
        place = name_of(int(values.argmin()))
        raise DataError(f"{place}: expected labels from 0 upwards, found {low}")
    if high >= max(MANY_CLASSES, images):
        place = name_of(int(values.argmax()))
        raise DataError(
            f"{place}: expected labels that number classes, below {max(MANY_CLASSES, images):,} "
            f"for {images:,} images, found {high}"
        )
    return values.astype(np.int64)


def numbered_up_to(labels: Sequence[np.ndarray]) -> tuple[str, ...]:
    """Class names "0", "1", ... up to the largest of these labels; empty if there are none."""
    return numbered(max((int(values.max(initial=-1)) + 1 for values in labels), default=0))


def relabel(
    split: StoredSplit, found: tuple[str, ...], expected: tuple[str, ...], where: str
) -> StoredSplit:
    """The split with labels that index `expected` in place of `found`; see `translated`."""
    if split.labels is None:
        return split
    return replace(split, labels=translated(split.labels, found, expected, where))


def translated(
    labels: np.ndarray, found: tuple[str, ...], expected: tuple[str, ...], where: str
) -> np.ndarray:
    """Labels that index `expected` in place of `found`, by the names in both.

    Raises:
        DataError: a label has no name, or a class that is missing in the training split.
    """
    if len(labels) and labels.max() >= len(found):
        raise DataError(f"{where}: expected labels 0 .. {len(found) - 1}, found {labels.max()}")
    if found == expected:
        return labels
    index_of = {name: index for index, name in enumerate(expected)}
    translate = np.array([index_of.get(name, -1) for name in found], dtype=np.int64)
    translation = translate[labels]
    foreign = sorted({found[label] for label in np.unique(labels[translation < 0]).tolist()})
    if foreign:
        raise DataError(
            f"{where}: expected the classes of the training split, found also {listed(foreign)}; "
            f"they are {listed(expected) or 'not named'}"
        )
    return translation


def version_and_stamp(files: Sequence[Path], root: Path) -> tuple[str, str]:
    """Identity of a list of files, without reading them.

    Returns:
        The version, from relative names and sizes, equal for every copy; and the stamp, from full
        names, sizes and modification times.
    """
    version, stamp = hashlib.sha256(), hashlib.sha256(os.fsencode(root.resolve()))
    for file in files:
        try:
            status = file.stat()
            size, changed = status.st_size, status.st_mtime_ns
        except OSError:  # a link that leads nowhere, which raises or is skipped when it is read
            size = changed = -1
        line = os.fsencode(file.relative_to(root).as_posix()) + f"\0{size}\n".encode()
        version.update(line)
        stamp.update(line + str(changed).encode())
    return f"files-{version.hexdigest()[:12]}", stamp.hexdigest()


def files_by_split(path: Path, suffix: str) -> dict[Split, list[Path]]:
    """The files of a folder by the split that they name; a single file is the training split.

    Raises a DataError if only some files name a split, or none the training split.
    """
    if path.is_file():
        return {"train": [path]}
    files = regular_files(path, f"*{suffix}")
    return by_split({file: file.stem for file in files}, str(path), "files")


def local_source(
    path: Path,
    files: Sequence[Path],
    class_names: tuple[str, ...],
    splits: dict[Split, StoredSplit],
) -> Source:
    """A source made of files in the folder `path`, or of that single file."""
    version, stamp = version_and_stamp(files, path if path.is_dir() else path.parent)
    return Source(local_id(path), version, stamp, class_names, splits)


def local_id(path: Path) -> str:
    """Name of a local source: of its file or folder, or of the parent if that names a split."""
    path = path.resolve()
    stem = path.stem if path.is_file() else path.name
    return printable(path.parent.name if is_only_a_split(stem) else stem)
