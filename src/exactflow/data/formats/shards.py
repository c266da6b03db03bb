"""Tar shards as webdataset lays them out: the files of a sample lie together and share a stem.

An archive is walked once (`tar_index.py`); images are then read at the offsets that were found.
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, final

import numpy as np

from exactflow.core.files import write_atomically
from exactflow.data.config import DataError, Split, cache_folder
from exactflow.data.decode import Payload
from exactflow.data.files import regular_files, visible
from exactflow.data.formats.label_columns import LabelPart, with_labels
from exactflow.data.formats.tar_index import Label, TarIndex, index_file, read_kept, write_index
from exactflow.data.records import (
    Records,
    Source,
    files_by_split,
    local_id,
    version_and_stamp,
)
from exactflow.data.splits import named_split, named_splits, refuse_mixed_splits, says_a_split

log = logging.getLogger(__name__)

KEEP_INDEX_FROM = 1000  # images; the index of a smaller set is made again each time


def has_shards(folder: Path) -> bool:
    """Whether the folder, or a folder in it that names a split, holds tar files."""
    return bool(visible(folder, "*.tar")) or bool(_split_folders(folder))


def open_shards(path: Path, cache_dir: str | None = None) -> Source:
    """Open one tar file, or a folder of them, read in the order of their names.

    Files or folders whose names say train, validation and test (`splits.py`) are the splits;
    otherwise all files are the training split. The stem of a sample is its path up to the
    first dot of the file name. A sample has one image, and perhaps a label: a .cls or .txt file
    with an integer or a class name, or a .json file with an integer, a name, or a field "label",
    "labels", "class" or "cls". Files of other kinds are counted and ignored.

    The index of a larger set is kept in the cache folder until a file changes.

    Raises:
        DataError: a shard is damaged, cut short, or holds a stem twice; a sample has no image, or
            several; some have a label and others none. The message names shard and member.
    """
    groups = shard_groups(path)
    root = path if path.is_dir() else path.parent
    files = [file for found in groups.values() for file in found]
    _, stamp = version_and_stamp(files, root)
    indexed = dict(zip(files, _indexed(files, root, stamp, cache_dir), strict=True))
    splits: dict[Split, list[TarIndex]] = {
        split: [indexed[file] for file in found] for split, found in groups.items()
    }
    parts: dict[Split, TarRecords] = {
        split: records_of(found, LocalFiles(tuple(groups[split])))
        for split, found in splits.items()
    }
    return source_of(splits, parts, name=local_id(path), stamp=stamp, where=str(path))


class ShardFiles(ABC):
    """Where the bytes of some shards come from."""

    @abstractmethod
    def name(self, shard: int) -> str:
        """Name of a shard, for errors."""

    @abstractmethod
    def open(self, shard: int) -> AbstractContextManager[BinaryIO]:
        """A whole shard as a seekable stream.

        Raises:
            DataError: it cannot be read.
        """


@final
@dataclass(frozen=True)
class LocalFiles(ShardFiles):
    """Shards on this disk."""

    files: tuple[Path, ...]

    def name(self, shard: int) -> str:
        return str(self.files[shard])

    def open(self, shard: int) -> AbstractContextManager[BinaryIO]:
        return self.files[shard].open("rb")


@final
@dataclass(frozen=True, eq=False)
class TarRecords(Records):
    """Members of some tar files, one after the other.

    Attributes:
        files: the shards.
        shard: number of each image's shard, ascending.
        offset: where the bytes of each image begin in its shard.
        size: number of bytes of each image.
        members: name of each image in its shard.
    """

    files: ShardFiles
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    members: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        return f"{self.files.name(int(self.shard[index]))}[{self.members[index]}]"

    def read(self, indices: np.ndarray) -> Iterator[Payload]:
        for number in np.unique(self.shard[indices]).tolist():
            wanted = indices[self.shard[indices] == number]
            with self.files.open(number) as stream:
                for index in wanted.tolist():
                    stream.seek(int(self.offset[index]))
                    content = stream.read(int(self.size[index]))
                    if len(content) != self.size[index]:
                        raise DataError(
                            f"{self.name(index)}: expected {self.size[index]} bytes, "
                            f"found {len(content)}"
                        )
                    yield content


def records_of(shards: Sequence[TarIndex], files: ShardFiles) -> TarRecords:
    """The images of some indexed shards, whose bytes are in `files`, in the same order."""
    return TarRecords(
        files=files,
        shard=np.repeat(np.arange(len(shards)), [len(shard) for shard in shards]),
        offset=np.concatenate([shard.offsets for shard in shards]),
        size=np.concatenate([shard.sizes for shard in shards]),
        members=tuple(member for shard in shards for member in shard.members),
    )


def source_of(
    splits: Mapping[Split, Sequence[TarIndex]],
    records: Mapping[Split, TarRecords],
    *,
    name: str,
    stamp: str,
    where: str,
) -> Source:
    """The source of indexed shards; a DataError for an empty split, or labels that do not fit."""
    for split, found in records.items():
        if not len(found):
            raise DataError(f"{where}: expected images for the {split} split, found none")
    if len(records) == 1:
        refuse_mixed_splits(records["train"].members, where)
    labels: dict[Split, list[Label]] = {
        split: [label for shard in shards for label in shard.labels]
        for split, shards in splits.items()
    }
    stored, class_names = with_labels(records, dict(_parts(labels, records, where)))
    shards = [shard for found in splits.values() for shard in found]
    return Source(name, _version(shards), stamp, class_names, stored)


def shard_groups(path: Path) -> dict[Split, list[Path]]:
    """The tar files of each split. Raises a DataError if only some names say a split."""
    folders = _split_folders(path) if path.is_dir() else {}
    if not folders:
        return files_by_split(path, ".tar")
    if visible(path, "*.tar"):
        raise DataError(f"{path}: expected split folders only, found also loose tar files")
    if "train" not in folders:
        raise DataError(f"{path}: expected a train folder of tar files, found {', '.join(folders)}")
    for child in visible(path, "*"):
        if child.is_dir() and child not in folders.values():
            raise DataError(f"{path}: expected split folders of tar files only, found {child.name}")
    groups: dict[Split, list[Path]] = {
        split: regular_files(folder, "*.tar") for split, folder in folders.items()
    }
    for split, files in groups.items():
        for file in files:
            if named_split(file.stem) not in (None, split):
                raise DataError(
                    f"{file}: expected a shard of the {split} split, as its folder says"
                )
    return groups


def _split_folders(path: Path) -> dict[Split, Path]:
    children = {
        child.name: child
        for child in visible(path, "*")
        if says_a_split(child.name) and child.is_dir() and visible(child, "*.tar")
    }
    found: dict[Split, Path] = {}
    for name, split in named_splits(children, str(path)).items():
        assert split is not None  # as it was asked above
        if split in found:
            raise DataError(f"{path}: expected one {split} folder, found also {name}")
        found[split] = children[name]
    return found


def _indexed(
    files: Sequence[Path], root: Path, stamp: str, cache_dir: str | None
) -> tuple[TarIndex, ...]:
    """The indexes of these files, from the cache folder if they lie there and no file changed."""
    kept = cache_folder(cache_dir) / "indexes" / f"{stamp}.json"
    shards = read_kept(kept)
    if shards is None:
        shards = tuple(
            index_file(file, file.relative_to(root).as_posix(), hashed=False) for file in files
        )
        if sum(len(shard) for shard in shards) >= KEEP_INDEX_FROM:
            try:
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(kept, write_index(shards))
            except OSError as error:
                log.warning("%s: the index of %s is not kept: %s", kept, root, error)
    for file, shard in zip(files, shards, strict=True):
        shard.log_ignored(str(file))
    return shards


def _version(shards: Sequence[TarIndex]) -> str:
    """Hash of names and sizes of files, names, sizes and labels of images: equal for copies."""
    files = hashlib.sha256()
    for shard in shards:
        files.update(_bytes_of(f"{shard.name}\0{shard.size}\n"))
    contents = hashlib.sha256(f"files-{files.hexdigest()[:12]}".encode())
    for shard in shards:  # sizes of padded archives tell little
        images = zip(shard.members, shard.sizes.tolist(), shard.labels, strict=True)
        for member, size, label in images:
            contents.update(_bytes_of(f"{member}\0{size}\0{label}\n"))
    return f"files-{contents.hexdigest()[:12]}"


def _bytes_of(text: str) -> bytes:
    """The bytes of names as they are stored, perhaps not in UTF-8."""
    return text.encode(errors="surrogateescape")


def _parts(
    labels: Mapping[Split, Sequence[Label]], records: Mapping[Split, TarRecords], path: str
) -> Iterator[tuple[Split, list[LabelPart]]]:
    """The labels of each labelled split. Raises DataError where two samples differ in kind."""
    for split, found in labels.items():
        kind = type(found[0])
        for index, label in enumerate(found):
            if type(label) is not kind:
                raise DataError(
                    f"{records[split].name(index)}: expected a label like the first sample's, "
                    f"{found[0]!r}, found {label!r}"
                )
        if found[0] is None:
            continue
        names = tuple(sorted({str(label) for label in found})) if kind is str else ()
        index_of: dict[Label, int] = {name: index for index, name in enumerate(names)}
        values = np.array([index_of[label] for label in found] if names else found, dtype=np.int64)
        where = f"{path} ({split})"
        yield split, [LabelPart(where, values, names, kind is str, records[split].name)]
