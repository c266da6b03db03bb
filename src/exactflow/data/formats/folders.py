"""A folder of images: flat, one folder per class, or with a folder per split."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from exactflow.data.config import DataError, Split
from exactflow.data.files import folder_identity, is_hidden, printable, visible
from exactflow.data.formats.batch_files import has_batch_files
from exactflow.data.formats.idx import has_idx_files
from exactflow.data.records import FileRecords, Source, StoredSplit, local_source, relabel
from exactflow.data.splits import is_split_word, named_split, named_splits, refuse_mixed_splits

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


def open_folder(root: Path) -> Source:
    """Open a folder of images.

    With a folder in the root whose name says train (`splits.py`), those that say train, validation
    and test are its splits; without one, the root is the training split. Inside a split,
    sub-folders are the classes (sorted by name, searched in depth), or all images lie loose and are
    unlabelled. Links are followed; hidden files and folders are ignored.

    Raises:
        DataError: loose images beside folders; a split folder without one of training, which would
            be read as a class; a folder that is no split beside split folders; images whose names
            say several splits; an empty class; no image; a folder that cannot be listed, or that a
            link leads to again.
    """
    lister = _Lister()
    folders = _split_folders(root, lister)
    scanned: dict[Split, _Scan] = {
        split: _scan(folder, listing, lister) for split, (folder, listing) in folders.items()
    }
    class_names = scanned["train"].class_names
    splits: dict[Split, StoredSplit] = {}
    for split, found in scanned.items():
        stored = StoredSplit(FileRecords(found.files), found.labels)
        where = str(folders[split][0])
        splits[split] = relabel(stored, found.class_names, class_names, where)
    files = [file for found in scanned.values() for file in found.files]
    if folders["train"][0] == root:
        refuse_mixed_splits((str(file.relative_to(root)) for file in files), str(root))
    return local_source(root, files, class_names, splits)


@final
@dataclass(frozen=True)
class _Listing:
    """The folders and files in a folder, sorted by name, without hidden ones."""

    folders: list[Path]
    files: list[Path]


@final
@dataclass(frozen=True, eq=False)
class _Scan:
    """The images of one split, sorted by relative path, and their classes; none if it is flat."""

    files: tuple[Path, ...]
    class_names: tuple[str, ...] = ()
    labels: np.ndarray | None = None


@final
class _Lister:
    """Lists each folder once, since a link to a folder above would never end."""

    def __init__(self) -> None:
        self._listed: dict[tuple[int, int], Path] = {}

    def __call__(self, folder: Path) -> _Listing:
        listing = _Listing([], [])
        try:
            first = self._listed.setdefault(folder_identity(folder), folder)
            if first != folder:
                raise DataError(f"{folder}: expected each folder once, found {first} again, a link")
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    path = Path(entry.path)
                    if is_hidden(entry.name):
                        continue
                    # A link to nowhere is a file; `entry.is_dir` would raise for a ring of links.
                    is_file = entry.is_file(follow_symlinks=False) or not path.is_dir()
                    (listing.files if is_file else listing.folders).append(path)
        except OSError as error:
            raise DataError(f"{folder}: expected a folder to read, found: {error}") from error
        return listing


def _split_folders(root: Path, lister: _Lister) -> dict[Split, tuple[Path, _Listing]]:
    """The folder of each split, and its listing."""
    listing = lister(root)
    named = named_splits([child.name for child in listing.folders], str(root))
    if "train" not in named.values():
        strays = [name for name, split in named.items() if split is not None]
        if strays:
            raise DataError(
                f"{root}: expected class folders, or a train folder beside {', '.join(strays)}; "
                f"without it {strays[0]} would be trained on as a class (folders of classes with "
                f"such a word in their names go into a folder called train)"
            )
        return {"train": (root, listing)}
    folders: dict[Split, tuple[Path, _Listing]] = {}
    for child in listing.folders:
        split = named[child.name]
        if split is None or split in folders:
            raise DataError(
                f"{root}: expected one train, one validation and one test folder at most, "
                f"found also {child.name} (folders of classes go into the folder of their split)"
            )
        folders[split] = child, lister(child)
    _refuse_loose_images(root, listing, "split folders")
    return folders


def _scan(folder: Path, listing: _Listing, lister: _Lister) -> _Scan:
    if not listing.folders:
        files = tuple(_images(folder, listing.files))
        if not files:
            raise DataError(
                f"{folder}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), IDX files or "
                f"parquet files, found none{_other_source(folder)}"
            )
        return _Scan(files)
    _refuse_loose_images(folder, listing, "class folders")
    _refuse_split_names(folder, listing.folders)
    classes = [_images_below(child, lister) for child in listing.folders]
    for child, found in zip(listing.folders, classes, strict=True):
        if not found:
            raise DataError(
                f"{child}: expected images of this class, found none{_other_source(child)}"
            )
    return _Scan(
        files=tuple(file for found in classes for file in found),
        class_names=tuple(printable(child.name) for child in listing.folders),
        labels=np.repeat(np.arange(len(classes)), [len(found) for found in classes]),
    )


def _images_below(folder: Path, lister: _Lister) -> list[Path]:
    """Every image file in the folder and below it."""
    files: list[Path] = []
    waiting = [folder]
    while waiting:
        listing = lister(waiting.pop())
        waiting += listing.folders
        files += listing.files
    return sorted(_images(folder, files), key=lambda file: file.relative_to(folder).as_posix())


def _images(folder: Path, files: list[Path]) -> list[Path]:
    """Those with an image's suffix; the number of others is logged."""
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    others = [file for file in files if file.suffix.lower() not in IMAGE_SUFFIXES]
    if others:
        log.warning(
            "%s: %d files are no images and are not read, %s first", folder, len(others), others[0]
        )
    return images


def _refuse_loose_images(folder: Path, listing: _Listing, beside: str) -> None:
    for child in listing.files:
        if child.suffix.lower() in IMAGE_SUFFIXES and child.is_file():
            raise DataError(f"{folder}: expected {beside} only, found also the image {child.name}")


def _refuse_split_names(folder: Path, classes: list[Path]) -> None:
    """Refuse splits inside a split: the word alone, or class names that all hold one."""
    words = [child.name for child in classes if is_split_word(child.name)]
    if not words and all(named_split(child.name) for child in classes):
        words = [child.name for child in classes]
    if words:
        raise DataError(f"{folder}: expected class folders, found {words[0]}, the name of a split")


def _other_source(folder: Path) -> str:
    """The end of an error message: a source of another kind in or below the folder, if any."""
    for below in (folder, *visible(folder, "*"), *visible(folder, "*/*")):
        if not below.is_dir():
            continue
        if has_idx_files(below):
            kind = "IDX files"
        elif has_batch_files(below):
            kind = "batch files"
        elif visible(below, "*.parquet"):
            kind = "parquet files"
        elif visible(below, "*.tar"):
            kind = "tar files"
        else:
            continue
        return f"; there are {kind} in {below}: name that folder as the source"
    return ""
