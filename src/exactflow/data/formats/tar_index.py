"""The index of tar shards: where their images lie, and what their labels are.

An archive is walked once and must be whole to its end mark; ignored files are counted in the log.
The index is kept as JSON, a line for each shard. Sizes are compared with the limits below before
anything of that size is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeGuard, TypeVar, final

import numpy as np

from exactflow.data.config import DataError
from exactflow.data.files import sha256_of
from exactflow.data.formats.folders import IMAGE_SUFFIXES
from exactflow.data.formats.label_columns import LONGEST_CLASS_NAME

log = logging.getLogger(__name__)

FORMAT = 1
LARGEST_IMAGE = 2**28  # bytes of one encoded image
LARGEST_PART = 2**20  # bytes of a header, and of a file that holds a label

_LABEL_FIELDS = ("label", "labels", "class", "cls")  # of a .json file
_LABEL_ENDINGS = ("cls", "json", "txt")  # the first that gives a label counts
_SHA256 = re.compile("[0-9a-f]{64}")
_SHARDS = b'"shards"'  # the hash in an index file is of all that follows this

Label = int | str | None
_Item = TypeVar("_Item")


@final
@dataclass(frozen=True, eq=False)
class TarIndex:
    """What a shard holds.

    Attributes:
        name: of the file, relative to the folder of all shards, with slashes.
        size: bytes of the file.
        sha256: of the file, in hex; None if it was not computed.
        members: names of the images, in the order of the file.
        offsets: where their bytes begin, int64.
        sizes: how many bytes they have, int64.
        labels: of each image; None where a sample has none.
        ignored: numbers of ignored files, by ending.
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

    def log_ignored(self, where: str) -> None:
        """Log the numbers of ignored files."""
        if self.ignored:
            kinds = dict(self.ignored)
            log.warning("%s: ignored files, by ending: %s", where, kinds)


def index_tar(stream: BinaryIO, name: str, size: int, sha256: str | None, where: str) -> TarIndex:
    """Walk an archive; the arguments are those of `TarIndex`, and its name for errors.

    Raises:
        DataError: it is damaged, cut short, or holds a stem twice; a sample has no image, or
            several; a label is malformed. The message names shard and member.
    """
    ignored: Counter[str] = Counter()
    last = "its beginning"
    stream.seek(0)
    bounded: Any = _Bounded(stream)  # it has all methods that tarfile calls
    try:
        with tarfile.open(fileobj=bounded, mode="r:") as archive:
            files: list[tarfile.TarInfo] = []
            for info in archive:
                last = info.name
                if not info.isdir():
                    files.append(info)
            _require_end(stream, archive.offset)
            samples = [_sample(archive, where, parts, ignored) for parts in _by_stem(where, files)]
    except DataError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
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


def index_file(file: Path, name: str, *, hashed: bool = True) -> TarIndex:
    """Walk an archive on this disk; `hashed` says whether to compute its SHA-256.

    Raises:
        DataError: as in `index_tar`, or it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            sha256 = sha256_of(stream) if hashed else None
            return index_tar(stream, name, file.stat().st_size, sha256, str(file))
    except OSError as error:
        raise DataError(f"{file}: expected a readable tar file, found: {error}") from error


def to_line(shard: TarIndex) -> str:
    """A shard as a line of JSON."""
    labelled = any(label is not None for label in shard.labels)
    arrays = {"offsets": shard.offsets.tolist(), "sizes": shard.sizes.tolist()}
    return json.dumps({**vars(shard), **arrays, "labels": shard.labels if labelled else None})


def from_fields(fields: Any, where: str) -> TarIndex:
    """A shard from the fields of its line. Raises DataError for other content."""
    try:
        members = tuple(_list_of(str, fields["members"]))
        count, name, size = len(members), fields["name"], fields["size"]
        shard = TarIndex(
            name=name,
            size=size,
            sha256=fields["sha256"],
            members=members,
            offsets=np.array(_list_of(int, fields["offsets"]), dtype=np.int64),
            sizes=np.array(_list_of(int, fields["sizes"]), dtype=np.int64),
            labels=(None,) * count if fields["labels"] is None else tuple(fields["labels"]),
            ignored=dict(fields["ignored"]),
        )
        if type(name) is not str or type(size) is not int or not 0 <= size < 2**63:
            raise ValueError(f"{name!r} of {size!r} bytes")
        if len({count, len(shard.offsets), len(shard.sizes), len(shard.labels)}) != 1:
            raise ValueError(f"lists of different lengths for {name}")
        if shard.sha256 is not None and not _SHA256.fullmatch(shard.sha256):
            raise ValueError(f"no SHA-256 for {name}")  # it becomes the name of a file
        sizes, offsets = shard.sizes, shard.offsets
        if ((offsets < 0) | (sizes < 0) | (sizes > size) | (offsets > size - sizes)).any():
            raise ValueError(f"images outside of {name}")
        if sizes.max(initial=0) > LARGEST_IMAGE:
            raise ValueError(f"an image of more than {LARGEST_IMAGE:,} bytes in {name}")
        if not all(label is None or _is_label(label) for label in shard.labels):
            raise ValueError(f"labels of {name} that are neither integers nor names")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: expected an index of tar shards, found: {error!r}") from error
    return shard


def _list_of(kind: type[_Item], values: Any) -> list[_Item]:
    if type(values) is not list or not all(type(value) is kind for value in values):
        raise TypeError(f"no list of {kind.__name__}")
    return values


def write_index(shards: Sequence[TarIndex]) -> bytes:
    """The content of an index file."""
    lines = ",\n".join(to_line(shard) for shard in shards)
    rest = f": [\n{lines}\n]}}\n".encode()
    head = f'{{"format": {FORMAT}, "sha256": "{hashlib.sha256(rest).hexdigest()}", '
    return head.encode() + _SHARDS + rest


def read_index(content: bytes, where: str) -> tuple[TarIndex, ...]:
    """The shards of an index file, in its order. Raises a DataError for any other content."""
    try:
        found = json.loads(content)
        version, lines = found["format"], list(found["shards"])
        written = found.get("sha256")  # earlier versions wrote none
        digest = hashlib.sha256(content.partition(_SHARDS)[2]).hexdigest()
        if found.keys() - {"format", "sha256", "shards"} or written not in (None, digest):
            raise ValueError("another one than was written: damaged, or changed")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{where}: expected an index of tar shards, found: {error!r}") from error
    if version != FORMAT:
        raise DataError(f"{where}: expected an index of format {FORMAT}, found {version}")
    return tuple(from_fields(line, where) for line in lines)


def read_kept(file: Path) -> tuple[TarIndex, ...] | None:
    """The shards of an index in the cache folder; None if it is missing or damaged."""
    if not file.is_file():
        return None
    try:
        return read_index(file.read_bytes(), str(file))
    except DataError as error:
        log.warning("%s; it is left aside", error)
        return None


@final
class _Bounded:
    """A file of which at most LARGEST_PART bytes are read at once, as for a header or a label."""

    def __init__(self, stream: BinaryIO) -> None:
        self.seek, self.tell = stream.seek, stream.tell
        self._stream = stream

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LARGEST_PART:
            raise tarfile.ReadError(f"a header or a label of {size:,} bytes")
        return self._stream.read(size)


def _require_end(stream: BinaryIO, offset: int) -> None:
    """Raise ReadError unless zeros alone, which mark the end, follow the last member.

    `tarfile` accepts a damaged header, the end of the file, or appended content as the end.
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
    """The files of each sample, by ending (all that follows the stem), in small letters."""
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
    image = parts[images[0]]
    _require_size(image, LARGEST_IMAGE, shard)
    label: Label = None
    for ending in _LABEL_ENDINGS:
        if label is None and ending in parts:
            _require_size(parts[ending], LARGEST_PART, shard)
            stream = archive.extractfile(parts[ending])
            assert stream is not None  # a plain file
            label = _label(stream.read(), ending, f"{shard}[{parts[ending].name}]")
    ignored.update(parts.keys() - {images[0], *_LABEL_ENDINGS})
    return image, label


def _require_size(info: tarfile.TarInfo, limit: int, shard: str) -> None:
    if info.size > limit:
        raise DataError(
            f"{shard}[{info.name}]: expected at most {limit:,} bytes, found {info.size:,}"
        )


def _label(content: bytes, ending: str, where: str) -> Label:
    """An integer or a class name; None for a .json file without one."""
    try:
        value = content.decode().strip()
        if ending == "json":
            value = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected a class label, found: {error}") from error
    if isinstance(value, dict):
        fields = [value[name] for name in _LABEL_FIELDS if name in value]
        if not fields:
            return None
        value = fields[0]
    if isinstance(value, str) and value.removeprefix("-").isdecimal() and _is_label(value):
        value = int(value)
    if not _is_label(value):
        raise DataError(
            f"{where}: expected an integer or a class name, of 64 bits or a line of at most "
            f"{LONGEST_CLASS_NAME} characters, found {str(value)[:LONGEST_CLASS_NAME]!r}"
        )
    return value


def _is_label(value: Any) -> TypeGuard[int | str]:
    if isinstance(value, str):
        # Half of a UTF-16 pair, which JSON can contain, can be neither stored nor shown.
        whole = not any("\ud800" <= character <= "\udfff" for character in value)
        return whole and 0 < len(value) <= LONGEST_CLASS_NAME and "\n" not in value
    return type(value) is int and -(2**63) <= value < 2**63
