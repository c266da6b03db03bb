"""Opening the source that a name means."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np

from exactflow.data.config import MEMORY, DataConfig, DataError, is_remote
from exactflow.data.decode import Payload
from exactflow.data.files import folder_identity, visible
from exactflow.data.formats.batch_files import has_batch_files, is_batch_file, open_batch_files
from exactflow.data.formats.folders import IMAGE_SUFFIXES, open_folder
from exactflow.data.formats.hub import open_hub
from exactflow.data.formats.idx import has_idx_files, open_idx
from exactflow.data.formats.parquet import open_parquet
from exactflow.data.formats.shards import has_shards, open_shards
from exactflow.data.prepared import PREPARED_FILE
from exactflow.data.records import FileRecords, Records, Source, StoredSplit, relabel
from exactflow.data.splits import named_splits
from exactflow.data.streaming.streamed import open_streamed

# Where Debian's package dataset-fashion-mnist puts its files.
_DEBIAN_DATASETS = Path("/usr/share/datasets")


def open_source(config: DataConfig) -> Source:
    """Open the sources that `config` names; nothing is decoded.

    Raises:
        DataError: a source is missing or broken, or the validation set lies inside the training
            set, or the other way round.
        ImportError: a library of the `data` extra is missing.
    """
    path: Path | None = None
    if config.source == MEMORY:
        raise DataError(
            "the images were in a program's memory: expected data.source=FOLDER (or another)"
        )
    if config.source == "digits":
        source = open_digits()
    elif config.source.startswith("hub:"):
        source = open_hub(config.source.removeprefix("hub:"), config.cache_dir)
    elif is_remote(config.source):
        source = open_streamed(config.source, config)
    else:
        path = _find_fashion_mnist() if config.source == "fashion-mnist" else Path(config.source)
        path = path.expanduser()
        if path.is_dir():
            _refuse_held_out(path)
        source = _open_path(path, config)
    if config.validation is None:
        return source
    if is_remote(config.validation):
        if config.validation == config.source:
            raise DataError(f"validation: expected other shards than those of {config.source}")
        other = open_streamed(config.validation, config)
    else:
        validation = Path(config.validation).expanduser()
        if path is not None:
            _require_apart(path, validation)
        other = _open_path(validation, config)
    return _with_validation(source, other, config.validation)


def open_digits() -> Source:
    """The 1,797 handwritten digits in scikit-learn: 8x8, values 0 .. 16, ten classes."""
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    images, labels = load_digits(return_X_y=True)
    pixels = np.asarray(images).astype(np.uint8).reshape(-1, 8, 8)
    split = StoredSplit(ArrayRecords(pixels, "digits"), np.asarray(labels).astype(np.int64))
    return Source(
        id="digits",
        version="uci-optdigits-1998",  # the data are frozen, whatever scikit-learn's version
        stamp="digits",
        class_names=tuple("0123456789"),
        splits={"train": split},
        levels=17,
    )


@final
@dataclass(frozen=True, eq=False)
class ArrayRecords(Records):
    """Decoded images in memory, uint8 (n, H, W) or (n, H, W, 3)."""

    images: np.ndarray
    source: str

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.source}[{index}]"

    def read(self, indices: np.ndarray) -> Iterator[Payload]:
        return (self.images[index] for index in indices)


def _open_path(path: Path, config: DataConfig) -> Source:
    """Open a parquet or a tar file, or a folder by the files in it."""
    if path.suffix.lower() == ".parquet" and path.is_file():
        return open_parquet(path)
    if path.suffix.lower() == ".tar" and path.is_file():
        return open_shards(path, config.cache_dir)
    if is_batch_file(path) and path.is_file():
        return open_batch_files(path)
    if not path.is_dir():
        raise DataError(
            f"{path}: expected digits, fashion-mnist, hub:owner/name, a .parquet or .tar file, "
            f"URLs of tar files, or a folder of images, IDX, parquet, tar or batch files; "
            f"found {'a file' if path.exists() else 'nothing'}"
        )
    if (path / PREPARED_FILE).is_file():
        raise DataError(f"{path}: expected a source, found a prepared set, which is data.source")
    if has_idx_files(path):
        return open_idx(path, config.max_pixels)
    if has_batch_files(path):
        return open_batch_files(path)
    kind = "parquet" if visible(path, "*.parquet") else "tar" if has_shards(path) else None
    if kind is None:
        return open_folder(path)
    images = [child.name for child in visible(path, "*") if child.suffix.lower() in IMAGE_SUFFIXES]
    if images:
        raise DataError(f"{path}: expected {kind} files only, found also the image {images[0]}")
    if kind == "parquet" and has_shards(path):
        raise DataError(f"{path}: expected parquet files only, found also tar files")
    return open_parquet(path) if kind == "parquet" else open_shards(path, config.cache_dir)


def _refuse_held_out(path: Path) -> None:
    """Refuse a folder whose files all have names of validation or test splits."""
    for suffix in (".parquet", ".tar"):
        names = [file.stem for file in visible(path, f"*{suffix}")]
        found = set(named_splits(names, str(path)).values())
        if found and not found & {"train", None}:
            raise DataError(
                f"{path}: expected {suffix} files of the training split too, found "
                f"{' and '.join(sorted(map(str, found)))} only"
            )


def _find_fashion_mnist() -> Path:
    variable = os.environ.get("EXACTFLOW_DATA")
    roots = [Path(variable).expanduser()] if variable else []
    places = [root / "fashion-mnist" for root in (*roots, _DEBIAN_DATASETS)]
    for place in places:
        if place.is_dir():
            return place
    raise DataError(
        f"fashion-mnist: expected its four IDX files, found none of the folders "
        f"{', '.join(map(str, places))}; set EXACTFLOW_DATA to the folder that holds "
        f"fashion-mnist{'' if variable else ' (it is not set)'}"
    )


def _require_apart(training: Path, validation: Path) -> None:
    """Refuse a validation set inside the training folder, and the reverse; links are resolved."""
    train, held_out = training.resolve(), validation.resolve()
    if held_out.is_relative_to(train):
        raise DataError(
            f"validation: expected a path outside the training data {train}, found {held_out}, "
            f"which would be trained on"
        )
    if train.is_relative_to(held_out):
        raise DataError(
            f"validation: expected a path that does not hold the training data {train}, "
            f"found {held_out}"
        )


def _image_folders(source: Source) -> dict[tuple[int, int], Path]:
    """The folders that hold image files, by device and number on it."""
    parts = [part.records for part in source.splits.values()]
    files = [file for part in parts if isinstance(part, FileRecords) for file in part.files]
    return {folder_identity(folder): folder for folder in {file.parent: None for file in files}}


def _with_validation(source: Source, other: Source, path: str) -> Source:
    """The source with the images of another, at `path`, as its validation split."""
    if "validation" in source.splits:
        raise DataError(
            f"validation: expected none, since {source.id} has a validation split, found {path}"
        )
    if set(other.splits) != {"train"} or other.levels != source.levels:
        raise DataError(
            f"validation: expected one set of images with {source.levels} levels, found {path} "
            f"with {other.levels} levels and the splits {', '.join(other.splits)}"
        )
    trained_on = _image_folders(source)
    for identity, folder in _image_folders(other).items():  # a link may lead to the same folder
        if identity in trained_on:
            raise DataError(
                f"validation: expected images outside of the training data, found {folder}, which "
                f"is also {trained_on[identity]}"
            )
    split = relabel(other.splits["train"], other.class_names, source.class_names, path)
    return replace(
        source,
        version=f"{source.version}+{other.version}",
        stamp=f"{source.stamp}+{other.stamp}",
        splits={**source.splits, "validation": split},
    )
