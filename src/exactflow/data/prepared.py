"""Reading a prepared set: pixels decoded before by `prepare`, mapped, with their identity.

A prepared set is a folder:

    prepared.json   identity, words, and what every split holds; written last
    SPLIT.bin       pixels, uint8 (n, C, H, W), one image after the other
    SPLIT.hashes    a hash of each image, with which it is compared when it is first read
    SPLIT.labels    int64, little-endian; missing where the split is unlabelled

Beside them stays preparing.lock, which is empty. Sets of format 1 have no hashes, neither of images
nor of labels nor of prepared.json.

While `prepare` runs there is preparing.json in place of prepared.json, and a journal per split.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, final

import numpy as np

from exactflow.data import store
from exactflow.data.checked import HASH_BYTES, CheckedImages, is_intact, sealed
from exactflow.data.config import DataConfig, DataError, Split, is_path
from exactflow.data.decode import Payload, Preprocessing
from exactflow.data.records import Records, StoredSplit
from exactflow.data.splits import Stored, split_members

FORMAT = 2
UNHASHED = 1  # the format before
PREPARED_FILE = "prepared.json"
UNFINISHED_FILE = "preparing.json"

_REMEDY = "prepare the source again into another folder"

log = logging.getLogger(__name__)

# The words of `DataConfig` that decide which pixels are stored, and in which split.
WORDS = (
    "image_size",
    "channels",
    "bits",
    "validation",
    "validation_fraction",
    "test_fraction",
    "split_seed",
    "limit",
)


@final
@dataclass(frozen=True)
class Identity:
    """What a prepared set was made of; a preparation goes on only with an equal one.

    Attributes:
        format: version of the layout of the folder.
        id: name of the set.
        version: of the stored data.
        stamp: of the files on this disk.
        source: as it was given.
        words: the values of `WORDS`.
        on_error: whether unreadable images were skipped.
        preprocessing: for people.
        preprocessing_hash: for machines.
        levels: number of values a pixel can take.
        shape: (C, H, W).
        class_names: of the labels 0, 1, ...
        stored: number of images in each stored split of the source, by shard if these stay whole.
        decoder: version of Pillow.
    """

    format: int
    id: str
    version: str
    stamp: str
    source: str
    words: dict[str, Any]
    on_error: str
    preprocessing: str
    preprocessing_hash: str
    levels: int
    shape: list[int]
    class_names: list[str]
    stored: dict[Split, Stored]
    decoder: str


@final
@dataclass(frozen=True)
class SplitFacts:
    """What a split holds.

    Attributes:
        count: number of images.
        labelled: whether it has labels.
        fingerprint: as of `ImageDataset`.
        skipped: the images left out: positions in the split, and names.
        labels_sha256: of the file of labels, in hex; None where there is none, or in format 1.
    """

    count: int
    labelled: bool
    fingerprint: str
    skipped: list[tuple[int, str]]
    labels_sha256: str | None = None


@final
@dataclass(frozen=True)
class PreparedSet:
    """A finished folder."""

    folder: Path
    identity: Identity
    splits: dict[Split, SplitFacts]

    def write(self) -> bytes:
        """The content of prepared.json."""
        splits = {name: asdict(facts) for name, facts in self.splits.items()}
        text = json.dumps(sealed({**asdict(self.identity), "splits": splits}), indent=1)
        return (text + "\n").encode()


def pixel_file(folder: Path, split: Split) -> Path:
    """Where the pixels of a split are."""
    return folder / f"{split}.bin"


def label_file(folder: Path, split: Split) -> Path:
    """Where its labels are."""
    return folder / f"{split}.labels"


def hash_file(folder: Path, split: Split) -> Path:
    """Where the hashes of its images are, unless it is of format 1."""
    return folder / f"{split}.hashes"


def open_prepared(source: str) -> PreparedSet | None:
    """The prepared set that a source names; None where it names anything else.

    Raises:
        DataError: it is unfinished, damaged, or of a newer format.
    """
    if not is_path(source):
        return None
    folder = Path(source).expanduser()
    file = folder / PREPARED_FILE
    if not file.is_file():
        if (folder / UNFINISHED_FILE).is_file():
            raise DataError(
                f"{folder}: expected a finished set, found one that `prepare` was writing; "
                f"the same command goes on with it"
            )
        return None
    try:
        content = json.loads(file.read_text())
        intact = is_intact(content)
        content.pop("sha256", None)
        found = content.pop("format")
        if found not in (UNHASHED, FORMAT):
            raise DataError(f"{file}: expected format {UNHASHED} or {FORMAT}, found {found}")
        if found != UNHASHED and not intact:
            raise DataError(f"{file}: expected what `prepare` writes, found it damaged or changed")
        splits = {
            name: SplitFacts(**{**facts, "skipped": [tuple(pair) for pair in facts["skipped"]]})
            for name, facts in content.pop("splits").items()
        }
        return PreparedSet(folder, Identity(format=found, **content), splits)
    except DataError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: expected what `prepare` writes, found: {error!r}") from error


def read_prepared(prepared: PreparedSet, config: DataConfig, split: Split) -> store.Decoded:
    """One split: a memory map as a whole, a copy of a part of it under a smaller `limit`.

    Raises:
        DataError: a word differs from what the set was prepared with, the set has no such split,
            or a file has not the size that was recorded.
    """
    _require_same_words(prepared, config)
    identity = prepared.identity
    made = DataConfig(source=config.source, **identity.words)
    _, members = split_members(made, split, identity.stored)
    limit = min(config.limit or len(members), len(members))
    _, wanted = split_members(replace(made, limit=limit), split, identity.stored)
    facts = prepared.splits[split]
    if identity.format == UNHASHED:
        _tell_unhashed(prepared.folder)
    images, labels = _mapped(prepared, split)
    if len(wanted) == len(members):
        names = tuple(name for _, name in facts.skipped)
        return store.Decoded(images, labels, names, facts.fingerprint)
    skipped = {int(members[position]): name for position, name in facts.skipped}
    readable = np.delete(members, [position for position, _ in facts.skipped])
    rows = np.flatnonzero(np.isin(readable, wanted))
    names = tuple(skipped[index] for index in wanted.tolist() if index in skipped)
    part = _part(prepared, config, split, StoredSplit(_Rows(images), labels), rows)
    return replace(part, skipped=names)


@cache
def _tell_unhashed(folder: Path) -> None:
    log.warning(
        "%s: prepared by an earlier version, without hashes: damage to its images would not be "
        "noticed; `exactflow prepare %s --verify` compares all of them with their fingerprint",
        folder,
        folder,
    )


def verify(folder: Path) -> PreparedSet:
    """Read all of a prepared set, and compare it with its hashes and its fingerprints.

    Raises:
        DataError: there is no such set, or it is not what was prepared; the message names the file
            and, but for sets of format 1, the image.
    """
    prepared = open_prepared(str(folder.expanduser().resolve()))
    if prepared is None:
        raise DataError(f"{folder}: expected a set that `prepare` wrote, found none")
    for split, facts in prepared.splits.items():
        images, labels = _mapped(prepared, split)
        found = store.fingerprint(images, labels, prepared.identity.levels)
        if found != facts.fingerprint:
            raise DataError(
                f"{pixel_file(prepared.folder, split)}: expected the fingerprint "
                f"{facts.fingerprint}, which was written down, found {found}: {_REMEDY}"
            )
    return prepared


def _mapped(prepared: PreparedSet, split: Split) -> tuple[CheckedImages, np.ndarray | None]:
    """All pixels and labels of a split, not read yet but for the labels."""
    folder, facts = prepared.folder, prepared.splits[split]
    channels, height, width = prepared.identity.shape
    hashed = prepared.identity.format != UNHASHED
    pixels, hashes = pixel_file(folder, split), hash_file(folder, split)
    sizes = {pixels: facts.count * channels * height * width}
    if hashed:
        sizes[hashes] = facts.count * HASH_BYTES
    if facts.labelled:
        sizes[label_file(folder, split)] = 8 * facts.count
    for file, expected in sizes.items():
        found = file.stat().st_size if file.is_file() else None
        if found != expected:
            raise DataError(f"{file}: expected {expected:,} bytes, found {found}")
    shape = facts.count, channels, height, width
    images = CheckedImages(pixels, shape, (hashes, 0) if hashed else None, _REMEDY)
    return images, _labels(prepared, split) if facts.labelled else None


def _labels(prepared: PreparedSet, split: Split) -> np.ndarray:
    file, expected = label_file(prepared.folder, split), prepared.splits[split].labels_sha256
    content = file.read_bytes()
    if expected is not None and hashlib.sha256(content).hexdigest() != expected:
        raise DataError(f"{file}: expected the labels that were written, found others: {_REMEDY}")
    return np.frombuffer(content, dtype="<i8").astype(np.int64)


def _part(
    prepared: PreparedSet, config: DataConfig, split: Split, stored: StoredSplit, rows: np.ndarray
) -> store.Decoded:
    channels, height, width = prepared.identity.shape
    selection = store.Selection(
        split=stored,
        indices=rows,
        preprocessing=Preprocessing(max_pixels=height * width),
        shape=(channels, height, width),
        shape_of=PREPARED_FILE,
        levels=prepared.identity.levels,
        on_error="raise",
    )
    stamp = prepared.splits[split].fingerprint
    return store.decode(selection, stamp, config.cache_dir, of=len(rows))


def _require_same_words(prepared: PreparedSet, config: DataConfig) -> None:
    """A word at its default means: as prepared. A limit may be smaller, and a larger one is all."""
    for name, recorded in prepared.identity.words.items():
        given = getattr(config, name)
        if name != "limit" and given not in (recorded, getattr(DataConfig(), name)):
            raise DataError(
                f"{prepared.folder}: expected {name} {recorded!r}, as it was prepared, found "
                f"{given!r}; leave the word out, or prepare the source again into another folder"
            )


@final
@dataclass(frozen=True, eq=False)
class _Rows(Records):
    """The images of a memory map, as pixels."""

    images: CheckedImages

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, indices: np.ndarray) -> Iterator[Payload]:
        for index in indices:
            image = self.images[index]
            yield image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
