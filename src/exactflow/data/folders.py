"""A folder of images: flat, one folder per class, or with a folder per split."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from exactflow.data.config import SPLIT_NAMES, DataError, Split
from exactflow.data.records import (
    FileRecords,
    Source,
    StoredSplit,
    local_id,
    relabel,
    version_and_stamp,
)

log = logging.getLogger(__name__)

_Scan = tuple[tuple[Path, ...], tuple[str, ...]]  # the images of a split, its class names

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


def open_folder(root: Path) -> Source:
    """Open a folder of images.

    With a `train` folder in the root, `train`, `val` (or `valid`, `validation`) and `test` are its
    splits; without one, the root is the training split. Inside a split, sub-folders are the classes
    (sorted by name, searched in depth), or all images lie loose and are unlabelled.

    Raises:
        DataError: loose images beside folders; a split folder without `train`, which would be
            read as a class; a folder that is no split beside `train`; an empty class; no image.
    """
    folders = _split_folders(root)
    scanned: dict[Split, _Scan] = {split: _scan(folder) for split, folder in folders.items()}
    class_names = scanned["train"][1]
    splits: dict[Split, StoredSplit] = {}
    for split, (files, found) in scanned.items():
        stored = StoredSplit(FileRecords(files), _labels(files, folders[split], found))
        splits[split] = relabel(stored, found, class_names, str(folders[split]))
    version, stamp = version_and_stamp([f for files, _ in scanned.values() for f in files], root)
    return Source(local_id(root), version, stamp, class_names, splits)


def _split_folders(root: Path) -> dict[Split, Path]:
    """Which folder is which split."""
    children = _subfolders(root)
    named: dict[Path, Split | None] = {
        child: SPLIT_NAMES.get(child.name.lower()) for child in children
    }
    if "train" not in named.values():
        strays = [child.name for child, split in named.items() if split is not None]
        if strays:
            raise DataError(
                f"{root}: expected class folders, or a train folder beside {', '.join(strays)}; "
                f"without it {strays[0]} would be trained on as a class"
            )
        return {"train": root}
    folders: dict[Split, Path] = {}
    for child, split in named.items():
        if split is None or split in folders:
            raise DataError(
                f"{root}: expected one train, one validation and one test folder at most, "
                f"found also {child.name}"
            )
        folders[split] = child
    _refuse_loose_images(root, "split folders")
    return folders


def _scan(folder: Path) -> _Scan:
    """The images of one split, sorted by relative path, and its class names (empty if flat)."""
    classes = _subfolders(folder)
    if classes:
        _refuse_loose_images(folder, "class folders")
        _refuse_split_names(folder, classes)
        files = [_images_below(child) for child in classes]
        for child, found in zip(classes, files, strict=True):
            if not found:
                raise DataError(f"{child}: expected images of this class, found none")
        return tuple(file for found in files for file in found), tuple(c.name for c in classes)
    files = _images_below(folder)
    if not files:
        raise DataError(
            f"{folder}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), IDX files or "
            f"parquet files, found none"
        )
    return tuple(files), ()


def _labels(
    files: tuple[Path, ...], folder: Path, class_names: tuple[str, ...]
) -> np.ndarray | None:
    if not class_names:
        return None
    index_of = {name: index for index, name in enumerate(class_names)}
    labels = [index_of[file.relative_to(folder).parts[0]] for file in files]
    return np.array(labels, dtype=np.int64)


def _subfolders(folder: Path) -> list[Path]:
    visible = (child for child in folder.iterdir() if not child.name.startswith("."))
    return sorted((child for child in visible if child.is_dir()), key=lambda child: child.name)


def _images_below(folder: Path) -> list[Path]:
    """Every image file in the folder and below it; links are followed, hidden files are not."""
    images: list[Path] = []
    others: list[Path] = []
    for parent, children, names in os.walk(folder, followlinks=True):
        children[:] = [child for child in children if not child.startswith(".")]
        for name in names:
            if not name.startswith("."):
                file = Path(parent, name)
                (images if file.suffix.lower() in IMAGE_SUFFIXES else others).append(file)
    if others:
        log.warning(
            "%s: %d files are no images and are not read, %s first", folder, len(others), others[0]
        )
    return sorted(images, key=lambda file: file.relative_to(folder).as_posix())


def _refuse_loose_images(folder: Path, beside: str) -> None:
    for child in sorted(folder.iterdir()):
        if child.suffix.lower() in IMAGE_SUFFIXES and child.is_file():
            raise DataError(f"{folder}: expected {beside} only, found also the image {child.name}")


def _refuse_split_names(folder: Path, classes: list[Path]) -> None:
    for child in classes:
        if child.name.lower() in SPLIT_NAMES:
            raise DataError(
                f"{folder}: expected class folders, found {child.name}, the name of a split"
            )
