"""The index of tar shards: where their images lie, and what their labels are.

An archive is walked once and must be whole to its end mark; nothing in it is passed over in
silence. What was found is kept as JSON, a line for each shard, so that nobody has to walk it again.
"""

from __future__ import annotations

import json
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, final

import numpy as np

from exactflow.data.config import DataError
from exactflow.data.folders import IMAGE_SUFFIXES

log = logging.getLogger(__name__)

FORMAT = 1

_LABEL_FIELDS = ("label", "labels", "class", "cls")  # of a .json file
_LABEL_ENDINGS = ("cls", "json", "txt")  # the first that gives a label counts
_LONGEST_CLASS_NAME = 64  # characters; a longer text is a caption
_SHA256 = re.compile("[0-9a-f]{64}")

Label = int | str | None


@final
@dataclass(frozen=True, eq=False)
class TarIndex:
    """What a shard holds.

    Attributes:
        name: of the file, relative to the folder of all shards, with slashes.
        size: bytes of the file.
        sha256: of the file, in hex; None where it was walked and not read.
        members: names of the images, in the order of the file.
        offsets: where their bytes begin, int64.
        sizes: how many bytes they have, int64.
        labels: of each image; None for all or for none of them.
        ignored: files left alone, by ending.
    """

    name: str
    size: int
    sha256: str | None
    members: tuple[str, ...]
    offsets: np.ndarray
    sizes: np.ndarray
    labels: tuple[Label, ...]
    ignored: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.members)

    def tell_ignored(self, where: str) -> None:
        """Log the files left alone."""
        if self.ignored:
            kinds = dict(self.ignored)
            log.warning("%s: files that are left alone, by ending: %s", where, kinds)


def index_tar(stream: BinaryIO, name: str, size: int, sha256: str | None, where: str) -> TarIndex:
    """Walk an archive; the arguments are those of `TarIndex`, and what to call it in errors.

    Raises:
        DataError: it is damaged, cut short, or holds a stem twice; a sample has no image, or
            several; a label is none. The message names shard and member.
    """
    ignored: Counter[str] = Counter()
    last = "its beginning"
    stream.seek(0)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            files: list[tarfile.TarInfo] = []
            for info in archive:
                last = info.name
                if not info.isdir():
                    files.append(info)
            _require_end(stream, archive.offset)
            samples = [_sample(archive, where, parts, ignored) for parts in _by_stem(where, files)]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{where}: expected a whole tar file, found after {last}: {error}"
        ) from error
    infos = [info for info, _ in samples]
    return TarIndex(
        name=name,
        size=size,
        sha256=sha256,
        members=tuple(info.name for info in infos),
        offsets=np.array([info.offset_data for info in infos], dtype=np.int64),
        sizes=np.array([info.size for info in infos], dtype=np.int64),
        labels=tuple(label for _, label in samples),
        ignored=dict(ignored),
    )


def to_line(shard: TarIndex) -> str:
    """A shard as a line of JSON."""
    labelled = any(label is not None for label in shard.labels)
    return json.dumps(
        {
            "name": shard.name,
            "size": shard.size,
            "sha256": shard.sha256,
            "members": shard.members,
            "offsets": shard.offsets.tolist(),
            "sizes": shard.sizes.tolist(),
            "labels": shard.labels if labelled else None,
            "ignored": shard.ignored,
        }
    )


def from_fields(fields: Any, where: str) -> TarIndex:
    """A shard from what its line holds. Raises DataError for anything else."""
    try:
        members = tuple(fields["members"])
        labels = (None,) * len(members) if fields["labels"] is None else tuple(fields["labels"])
        shard = TarIndex(
            name=fields["name"],
            size=fields["size"],
            sha256=fields["sha256"],
            members=members,
            offsets=np.array(fields["offsets"], dtype=np.int64),
            sizes=np.array(fields["sizes"], dtype=np.int64),
            labels=labels,
            ignored=fields["ignored"],
        )
        if len({len(members), len(shard.offsets), len(shard.sizes), len(labels)}) != 1:
            raise ValueError(f"lists of different lengths for {shard.name}")
        if shard.sha256 is not None and not _SHA256.fullmatch(shard.sha256):
            raise ValueError(f"no SHA-256 for {shard.name}")  # it becomes the name of a file
        outside = (shard.offsets < 0) | (shard.sizes < 0)
        if (outside | (shard.offsets + shard.sizes > shard.size)).any():
            raise ValueError(f"images outside of {shard.name}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: expected an index of tar shards, found: {error!r}") from error
    return shard


def write_index(shards: Sequence[TarIndex]) -> bytes:
    """The content of an index file."""
    lines = ",\n".join(to_line(shard) for shard in shards)
    return f'{{"format": {FORMAT}, "shards": [\n{lines}\n]}}\n'.encode()


def read_index(content: bytes, where: str) -> tuple[TarIndex, ...]:
    """The shards of an index file, in its order.

    Raises:
        DataError: it is no such file, or one of a newer format.
    """
    try:
        found = json.loads(content)
        version, lines = found["format"], list(found["shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: expected an index of tar shards, found: {error!r}") from error
    if version != FORMAT:
        raise DataError(f"{where}: expected an index of format {FORMAT}, found {version}")
    return tuple(from_fields(line, where) for line in lines)


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


def _by_stem(shard: str, files: Sequence[tarfile.TarInfo]) -> Iterator[dict[str, tarfile.TarInfo]]:
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
    shard: str,
    parts: Mapping[str, tarfile.TarInfo],
    ignored: Counter[str],
) -> tuple[tarfile.TarInfo, Label]:
    images = [ending for ending in parts if PurePosixPath(f"x.{ending}").suffix in IMAGE_SUFFIXES]
    first = next(iter(parts.values())).name
    if len(images) != 1:
        raise DataError(
            f"{shard}[{first}]: expected one image in the sample, found "
            f"{', '.join(parts[ending].name for ending in images) or 'none'}"
        )
    label: Label = None
    for ending in _LABEL_ENDINGS:
        if label is None and ending in parts:
            stream = archive.extractfile(parts[ending])
            assert stream is not None  # a plain file
            label = _label(stream.read(), ending, f"{shard}[{parts[ending].name}]")
    ignored.update(parts.keys() - {images[0], *_LABEL_ENDINGS})
    return parts[images[0]], label


def _label(content: bytes, ending: str, where: str) -> Label:
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
