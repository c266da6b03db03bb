"""The batch files of image-net.org's downsampled ImageNet (Chrabaszcz et al., arXiv 1707.08819).

    train_data_batch_1 .. train_data_batch_10, val_data             pickles
    train_data_batch_1.npz .. train_data_batch_10.npz, val_data.npz    the same as arrays

Each holds `data`, (N, 3 S S) uint8 with the planes of red, green and blue one after the other,
`labels` from 1 on, and in training files `mean`, which is not needed. This is the *new* of the two
downsampled ImageNets (`known.py`): the old one, PixelRNN's download of 2016, is folders of PNG.

A pickle is a program: `array_pickles.py` says what may be run.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from exactflow.data.classes import numbered
from exactflow.data.config import DataError, Split
from exactflow.data.decode import Payload
from exactflow.data.files import is_hidden, open_regular, require_unpacked
from exactflow.data.formats.array_pickles import load_arrays
from exactflow.data.records import RowRecords, Source, StoredSplit, bounded_labels, local_source

_TRAIN = re.compile(r"train_data_batch_(\d+)(\.npz)?")
_VALIDATION = re.compile(r"val_data(\.npz)?")


def is_batch_file(file: Path) -> bool:
    """Whether a file has the name of a batch file."""
    return bool(_TRAIN.fullmatch(file.name) or _VALIDATION.fullmatch(file.name))


def has_batch_files(folder: Path) -> bool:
    """Whether a folder holds training files."""
    return any(_TRAIN.fullmatch(child.name) for child in folder.iterdir())


def open_batch_files(path: Path) -> Source:
    """Open a folder of batch files, in the order of their numbers, or a single one.

    `val_data` is the validation split. Class names are the labels of the files, "1", "2", ...: the
    index 0 is class "1". Every file is read once here, for its labels.

    Raises:
        DataError: a file is damaged or holds something else, a number is missing, or pickles and
            archives lie together.
    """
    groups: dict[Split, list[Path]] = {"train": [path]} if path.is_file() else _groups(path)
    splits: dict[Split, StoredSplit] = {}
    classes = 0
    for split, files in groups.items():
        parts = [_read(file)[1] for file in files]
        records = BatchFileRecords(tuple(files), tuple(map(len, parts)))
        labels = np.concatenate(parts)
        splits[split] = StoredSplit(records, labels - 1)
        classes = max(classes, int(labels.max()))
    files = [file for group in groups.values() for file in group]
    return local_source(path, files, numbered(classes + 1)[1:], splits)


@final
@dataclass(frozen=True)
class BatchFileRecords(RowRecords):
    """The images of some batch files, one after the other; a file is read as a whole."""

    def read_file(self, file: Path, rows: np.ndarray) -> Iterator[Payload]:
        """See `RowRecords.read_file`."""
        images, _ = _read(file)
        count = self.counts[self.files.index(file)]
        if len(images) != count:
            raise DataError(f"{file}: expected {count} images, found {len(images)}")
        for row in rows:
            yield np.ascontiguousarray(images[row].transpose(1, 2, 0))


def _groups(folder: Path) -> dict[Split, list[Path]]:
    """The files of each split, in the order of their numbers."""
    train: dict[int, Path] = {}
    validation: list[Path] = []
    for child in sorted(folder.iterdir()):
        found = _TRAIN.fullmatch(child.name)
        if found:
            number = int(found[1])
            if number in train:
                raise DataError(f"{child}: expected each batch once, found also {train[number]}")
            train[number] = child
        elif _VALIDATION.fullmatch(child.name):
            validation.append(child)
        elif not is_hidden(child.name):
            raise DataError(f"{child}: expected train_data_batch_1, ... and val_data only")
    for number in range(1, max(train) + 1):
        if number not in train:
            raise DataError(
                f"{folder}: expected train_data_batch_1 to {max(train)}, found no number {number}"
            )
    if len({file.suffix for file in train.values()}) > 1:
        raise DataError(f"{folder}: expected pickles or .npz files, found both")
    if len(validation) > 1:
        raise DataError(f"{folder}: expected val_data once, found also {validation[1].name}")
    groups: dict[Split, list[Path]] = {"train": [train[number] for number in sorted(train)]}
    if validation:
        groups["validation"] = validation
    return groups


def _read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images, (N, 3, S, S) uint8, and labels from 1 on, int64 (N,)."""
    try:
        data, labels = _read_archive(file) if file.suffix == ".npz" else _read_pickle(file)
    except DataError:
        raise
    except Exception as error:  # damaged pickles and archives make their readers raise anything
        raise DataError(f"{file}: expected a whole batch file, found: {error!r}") from error
    data = _whole_numbers(data, "data", 0, 255, file).astype(np.uint8)
    labels = _whole_numbers(labels, "labels", 1, None, file)
    labels = bounded_labels(labels, labels.size, lambda row: f"{file}[row {row}]")
    side = math.isqrt(data.shape[1] // 3) if data.ndim == 2 else 0
    if side == 0 or data.shape[1] != 3 * side * side:
        raise DataError(f"{file}: expected data (N, 3 S S), found {data.shape}")
    if labels.shape != (len(data),):
        raise DataError(f"{file}: expected {len(data)} labels, found {labels.shape}")
    return data.reshape(-1, 3, side, side), labels


def _whole_numbers(
    values: np.ndarray, name: str, least: int, most: int | None, file: Path
) -> np.ndarray:
    if not values.size or values.dtype.kind not in "iu":
        found = f"values of {values.dtype}" if values.size else "none"
        raise DataError(f"{file}: expected whole numbers as {name}, found {found}")
    low, high = int(values.min()), int(values.max())
    if low < least or (most is not None and high > most):
        to = "on" if most is None else f"to {most}"
        raise DataError(f"{file}: expected {name} from {least} {to}, found {low} to {high}")
    return values


def _read_archive(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with open_regular(file) as stream:
        for entry in zipfile.ZipFile(stream).infolist():
            require_unpacked(file, entry.file_size, entry.compress_size)
        stream.seek(0)
        with np.load(stream, allow_pickle=False) as archive:
            return archive["data"], archive["labels"]


def _read_pickle(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with open_regular(file) as stream:
        content = load_arrays(stream)
        size = os.fstat(stream.fileno()).st_size
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__} in place of a dict")
    # Python 2 wrote its strings as bytes.
    fields = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
    return _numbers(fields["data"], size), _numbers(fields["labels"], size)


def _numbers(value: Any, most: int) -> np.ndarray:
    """An array, or lists of at most `most` numbers, as an array.

    Raises:
        ValueError: there are more (a list may contain another one many times), or other values.
    """
    if isinstance(value, list):
        count = 0
        for row in value:
            cells = row if isinstance(row, list) else [row]
            count += len(cells)
            if count > most:
                raise ValueError(f"more than {most} numbers in a file of {most} bytes")
            for cell in cells:
                if not isinstance(cell, int | float | np.number):
                    raise ValueError(f"a {type(cell).__name__} in place of a number")
    elif not isinstance(value, np.ndarray):
        raise ValueError(f"a {type(value).__name__} in place of an array")
    return np.asarray(value)
