"""Tar shards as webdataset lays them out: the files of a sample lie together and share a stem.

An archive is walked once, when it is opened, and must be whole to its end mark; from then on images
are read at the offsets found. Nothing in it is passed over in silence.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, final

import numpy as np

from exactflow.data.config import SPLIT_NAMES, DataError, Split
from exactflow.data.decode import Payload
from exactflow.data.folders import IMAGE_SUFFIXES
from exactflow.data.records import (
    Records,
    Source,
    StoredSplit,
    check_labels,
    files_by_split,
    integer_labels,
    local_id,
    numbered_class_names,
    relabel,
    version_and_stamp,
)

log = logging.getLogger(__name__)

_LABEL_FIELDS = ("label", "labels", "class", "cls")  # of a .json file
_LABEL_ENDINGS = ("cls", "json", "txt")  # the first that gives a label counts
_LONGEST_CLASS_NAME = 64  # characters; a longer text is a caption

_Label = int | str | None


def has_shards(folder: Path) -> bool:
    """Whether the folder, or a folder in it that names a split, holds tar files."""
    return any(folder.glob("*.tar")) or bool(_split_folders(folder))


def open_shards(path: Path) -> Source:
    """Open one tar file, or a folder of them, read in the order of their names.

    Files named train-*, validation-* (or val-*, valid-*) and test-*, or folders named so, are the
    splits; otherwise all files are the training split. The stem of a sample is its path up to the
    first dot of the file name. A sample has one image, and a label or not: a .cls or .txt file with
    an integer or a class name, or a .json file with an integer, a name, or a field "label",
    "labels", "class" or "cls". Files of other kinds are counted and left alone.

    Raises:
        DataError: a shard is damaged, cut short, or holds a stem twice; a sample has no image, or
            several; some have a label and others none. The message names shard and member.
    """
    groups = _groups(path)
    shards = [shard for files in groups.values() for shard in files]
    indexed = {shard: _index(shard) for shard in shards}
    samples: dict[Split, list[_Sample]] = {
        split: [sample for shard in files for sample in indexed[shard]]
        for split, files in groups.items()
    }
    for split, found in samples.items():
        if not found:
            raise DataError(f"{path}: expected images for the {split} split, found none")
    splits, class_names = _labelled(samples, path)
    root = path if path.is_dir() else path.parent
    version, stamp = version_and_stamp(shards, root)
    contents = hashlib.sha256(version.encode())  # sizes of padded archives tell little
    for shard in shards:
        for sample in indexed[shard]:
            contents.update(f"{sample.member}\0{sample.size}\0{sample.label}\n".encode())
    version = f"files-{contents.hexdigest()[:12]}"
    return Source(local_id(path), version, stamp, class_names, splits)


@final
@dataclass(frozen=True, eq=False)
class TarRecords(Records):
    """Members of some tar files, one after the other.

    Attributes:
        shards: the files.
        shard: of each image, which of them; ascending.
        offset: where its bytes begin there.
        size: how many there are.
        members: its name there.
    """

    shards: tuple[Path, ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    members: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        return f"{self.shards[self.shard[index]]}[{self.members[index]}]"

    def read(self, indices: np.ndarray) -> Iterator[Payload]:
        for number in np.unique(self.shard[indices]):
            wanted = indices[self.shard[indices] == number]
            with self.shards[number].open("rb") as stream:
                for index in wanted.tolist():
                    stream.seek(int(self.offset[index]))
                    content = stream.read(int(self.size[index]))
                    if len(content) != self.size[index]:
                        raise DataError(
                            f"{self.name(index)}: expected {self.size[index]} bytes, "
                            f"found {len(content)}"
                        )
                    yield content


@final
@dataclass(frozen=True)
class _Sample:
    """An image of a shard and its label."""

    shard: Path
    member: str
    offset: int
    size: int
    label: _Label


def _groups(path: Path) -> dict[Split, list[Path]]:
    folders = _split_folders(path) if path.is_dir() else {}
    if not folders:
        return files_by_split(path, ".tar")
    if any(path.glob("*.tar")):
        raise DataError(f"{path}: expected split folders only, found also loose tar files")
    if "train" not in folders:
        raise DataError(f"{path}: expected a train folder of tar files, found {', '.join(folders)}")
    for child in sorted(path.iterdir()):
        if child.is_dir() and not child.name.startswith(".") and child not in folders.values():
            raise DataError(f"{path}: expected split folders of tar files only, found {child.name}")
    return {split: sorted(folder.glob("*.tar")) for split, folder in folders.items()}


def _split_folders(path: Path) -> dict[Split, Path]:
    found: dict[Split, Path] = {}
    for child in sorted(path.iterdir()):
        split = SPLIT_NAMES.get(child.name.lower())
        if split is None or not child.is_dir() or not any(child.glob("*.tar")):
            continue
        if split in found:
            raise DataError(f"{path}: expected one {split} folder, found also {child.name}")
        found[split] = child
    return found


def _index(shard: Path) -> list[_Sample]:
    """The samples of a shard, in its order."""
    ignored: Counter[str] = Counter()
    last = "its beginning"
    try:
        with shard.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            files: list[tarfile.TarInfo] = []
            for info in archive:
                last = info.name
                if not info.isdir():
                    files.append(info)
            _require_end(stream, archive.offset)
            samples = [_sample(archive, shard, parts, ignored) for parts in _by_stem(shard, files)]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{shard}: expected a whole tar file, found after {last}: {error}"
        ) from error
    if ignored:
        log.warning("%s: files that are left alone, by ending: %s", shard, dict(ignored))
    return samples


def _require_end(stream: BinaryIO, offset: int) -> None:
    """Raise ReadError unless nothing but zeros, the mark of an end, lies behind the last member.

    `tarfile` takes a damaged header, the end of the file, and what was appended for the end.
    """
    stream.seek(offset)
    block = stream.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"the end of the file at byte {offset + len(block)}, no end mark")
    while block:
        if any(block):
            raise tarfile.ReadError(f"neither a header nor the end at byte {offset}")
        offset += len(block)
        block = stream.read(tarfile.BLOCKSIZE)


def _by_stem(shard: Path, files: Sequence[tarfile.TarInfo]) -> Iterator[dict[str, tarfile.TarInfo]]:
    """The files of each sample, by what follows the stem, in small letters."""
    seen: set[str] = set()
    stem: str | None = None
    parts: dict[str, tarfile.TarInfo] = {}
    for info in files:
        where = f"{shard}[{info.name}]"
        if not info.isreg() or info.issparse():
            raise DataError(f"{where}: expected a plain file, found another kind")
        folder, _, name = info.name.rpartition("/")
        first, _, ending = name.partition(".")
        key = f"{folder}/{first}"
        if key != stem:
            if parts:
                yield parts
            if key in seen:
                raise DataError(f"{where}: expected each stem once, found {first} in two places")
            seen.add(key)
            stem, parts = key, {}
        if ending.lower() in parts:
            raise DataError(f"{where}: expected each file of a sample once, found it twice")
        parts[ending.lower()] = info
    if parts:
        yield parts


def _sample(
    archive: tarfile.TarFile,
    shard: Path,
    parts: Mapping[str, tarfile.TarInfo],
    ignored: Counter[str],
) -> _Sample:
    images = [ending for ending in parts if PurePosixPath(f"x.{ending}").suffix in IMAGE_SUFFIXES]
    first = next(iter(parts.values())).name
    if len(images) != 1:
        raise DataError(
            f"{shard}[{first}]: expected one image in the sample, found "
            f"{', '.join(parts[ending].name for ending in images) or 'none'}"
        )
    label: _Label = None
    for ending in _LABEL_ENDINGS:
        if label is None and ending in parts:
            stream = archive.extractfile(parts[ending])
            assert stream is not None  # a plain file
            label = _label(stream.read(), ending, f"{shard}[{parts[ending].name}]")
    ignored.update(parts.keys() - {images[0], *_LABEL_ENDINGS})
    info = parts[images[0]]
    return _Sample(shard, info.name, info.offset_data, info.size, label)


def _label(content: bytes, ending: str, where: str) -> _Label:
    """An integer or a class name; None for a .json file without one."""
    try:
        value = content.decode().strip()
        if ending == "json":
            value = json.loads(value)
    except ValueError as error:
        raise DataError(f"{where}: expected a class label, found: {error}") from error
    if isinstance(value, dict):
        fields = [value[name] for name in _LABEL_FIELDS if name in value]
        if not fields:
            return None
        value = fields[0]
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_CLASS_NAME or "\n" in value:
        raise DataError(
            f"{where}: expected an integer or a class name of a line of at most "
            f"{_LONGEST_CLASS_NAME} characters, found {str(value)[:_LONGEST_CLASS_NAME]!r}"
        )
    return int(value) if value.removeprefix("-").isdecimal() else value


def _labelled(
    samples: Mapping[Split, Sequence[_Sample]], path: Path
) -> tuple[dict[Split, StoredSplit], tuple[str, ...]]:
    """The stored splits with their labels as indices, and the class names."""
    splits: dict[Split, StoredSplit] = {}
    named = _has_names(samples["train"])
    names = _class_names(samples["train"]) if named else ()
    for split, found in samples.items():
        records, where = _records(found), f"{path} ({split})"
        if found[0].label is None:
            _has_names(found)
            splits[split] = StoredSplit(records, None)
        elif _has_names(found) != named:
            raise DataError(f"{where}: expected labels of the kind of the training split's")
        elif named:
            ours = _class_names(found)
            index_of = {name: index for index, name in enumerate(ours)}
            labels = np.array([index_of[str(s.label)] for s in found], dtype=np.int64)
            splits[split] = relabel(StoredSplit(records, labels), ours, names, where)
        else:
            values = np.array([sample.label for sample in found], dtype=np.int64)
            splits[split] = StoredSplit(records, integer_labels(values, where))
    names = names or numbered_class_names(list(splits.values()))
    for split, stored in splits.items():
        check_labels(stored.labels, names, f"{path} ({split})")
    return splits, names


def _has_names(samples: Sequence[_Sample]) -> bool:
    """Whether labels are names. Raises DataError where two samples differ in it."""
    kind = type(samples[0].label)
    for sample in samples:
        if type(sample.label) is not kind:
            raise DataError(
                f"{sample.shard}[{sample.member}]: expected a label like the first sample's, "
                f"{samples[0].label!r}, found {sample.label!r}"
            )
    return kind is str


def _class_names(samples: Sequence[_Sample]) -> tuple[str, ...]:
    return tuple(sorted({str(sample.label) for sample in samples}))


def _records(samples: Sequence[_Sample]) -> TarRecords:
    shards = tuple(dict.fromkeys(sample.shard for sample in samples))
    number = {shard: index for index, shard in enumerate(shards)}
    return TarRecords(
        shards=shards,
        shard=np.array([number[sample.shard] for sample in samples], dtype=np.int64),
        offset=np.array([sample.offset for sample in samples], dtype=np.int64),
        size=np.array([sample.size for sample in samples], dtype=np.int64),
        members=tuple(sample.member for sample in samples),
    )
