"""Prepared sets: folders of decoded pixels with their identity, and how they are read.

`prepare` writes such a folder for a whole source. `load` keeps one in the cache folder for each
split that is too large for memory.

A prepared set is a folder:

    prepared.json   identity, settings, and what every split holds; written last
    SPLIT.bin       pixels, uint8 (n, C, H, W), one image after the other
    SPLIT.hashes    a hash of each image, with which it is compared when it is first read
    SPLIT.labels    int64, little-endian; missing where the split is unlabelled

Beside them stays preparing.lock, which is empty. Sets of format 1 have no hashes, neither of images
nor of labels nor of prepared.json. An unfinished set has preparing.json in place of prepared.json,
and a journal per split, SPLIT.journal.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, final

import numpy as np
import PIL

from exactflow.data import store
from exactflow.data.checked import HASH_BYTES, CheckedImages, is_intact, sealed
from exactflow.data.config import DataConfig, DataError, Split, is_path
from exactflow.data.records import Source
from exactflow.data.splits import Stored, split_members

FORMAT = 2
UNHASHED = 1  # the format before
PREPARED_FILE = "prepared.json"
UNFINISHED_FILE = "preparing.json"

_REMEDY = "prepare the source again into another folder"

log = logging.getLogger(__name__)

# The fields of `DataConfig` that decide which pixels are stored, and in which split.
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
    """The source and settings of a prepared set; a preparation continues only an equal one.

    Attributes:
        format: version of the layout of the folder.
        id: name of the set.
        version: as of `Source`, like `stamp`.
        stamp: see there.
        source: `DataConfig.source`.
        words: the values of `WORDS`.
        on_error: whether unreadable images were skipped.
        preprocessing: as of `ImageDataset`, like its hash.
        preprocessing_hash: see there.
        levels: number of values a pixel can take.
        shape: (C, H, W).
        class_names: names of the labels 0, 1, ...
        stored: size of each stored split, as of `Source`.
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


def identity_of(
    config: DataConfig, source: Source, selection: store.Selection, id: str | None = None
) -> Identity:
    """The identity of a source decoded under a config; `id` replaces the source's name."""
    return Identity(
        format=FORMAT,
        id=id or source.id,
        version=source.version,
        stamp=source.stamp,
        source=config.source,
        words={name: getattr(config, name) for name in WORDS},
        on_error=config.on_error,
        preprocessing=selection.preprocessing.text,
        preprocessing_hash=selection.preprocessing.hash,
        levels=selection.levels,
        shape=list(selection.shape),
        class_names=list(source.class_names),
        stored=source.stored,
        decoder=f"pillow-{PIL.__version__}",
    )


@final
@dataclass(frozen=True)
class SplitFacts:
    """The record of one split in prepared.json.

    Attributes:
        count: number of images.
        labelled: whether it has labels.
        fingerprint: as of `ImageDataset`.
        skipped: positions in the split, and names, of skipped images.
        labels_sha256: hash of the file of labels, in hex; None without labels, or in format 1.
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

    @classmethod
    def of(cls, folder: Path) -> PreparedSet:
        """The set in a folder with a prepared.json; a DataError if it is damaged or newer."""
        file = folder / PREPARED_FILE
        try:
            content = json.loads(file.read_text())
            intact = is_intact(content)
            content.pop("sha256", None)
            found = content.pop("format")
            if found not in (UNHASHED, FORMAT):
                raise DataError(f"{file}: expected format {UNHASHED} or {FORMAT}, found {found}")
            if found != UNHASHED and not intact:
                raise DataError(
                    f"{file}: expected what `prepare` writes, found it damaged or changed"
                )
            splits = {
                name: SplitFacts(**{**facts, "skipped": [tuple(pair) for pair in facts["skipped"]]})
                for name, facts in content.pop("splits").items()
            }
            return cls(folder, Identity(format=found, **content), splits)
        except DataError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise DataError(f"{file}: expected what `prepare` writes, found: {error!r}") from error

    def to_json(self) -> bytes:
        """The content of prepared.json."""
        splits = {name: asdict(facts) for name, facts in self.splits.items()}
        text = json.dumps(sealed({**asdict(self.identity), "splits": splits}), indent=1)
        return (text + "\n").encode()

    def read(self, split: Split, remedy: str = _REMEDY) -> store.Decoded:
        """All pixels and labels of a split; the pixels are mapped, and not read yet.

        Args:
            split: which.
            remedy: what the errors advise.

        Raises:
            DataError: a file has not the recorded size, or other labels than were written.
        """
        facts = self.splits[split]
        channels, height, width = self.identity.shape
        hashed = self.identity.format != UNHASHED
        pixels, hashes = (split_file(self.folder, split, kind) for kind in ("bin", "hashes"))
        sizes = {pixels: facts.count * channels * height * width}
        if hashed:
            sizes[hashes] = facts.count * HASH_BYTES
        if facts.labelled:
            sizes[split_file(self.folder, split, "labels")] = 8 * facts.count
        for file, expected in sizes.items():
            found = file.stat().st_size if file.is_file() else None
            if found != expected:
                raise DataError(f"{file}: expected {expected:,} bytes, found {found}")
        shape = facts.count, channels, height, width
        images = CheckedImages(pixels, shape, hashes if hashed else None, remedy)
        labels = self._labels(split, remedy) if facts.labelled else None
        return store.Decoded(images, labels, facts.fingerprint, tuple(n for _, n in facts.skipped))

    def _labels(self, split: Split, remedy: str) -> np.ndarray:
        file = split_file(self.folder, split, "labels")
        expected = self.splits[split].labels_sha256
        content = file.read_bytes()
        if expected is not None and hashlib.sha256(content).hexdigest() != expected:
            raise DataError(
                f"{file}: expected the labels that were written, found others: {remedy}"
            )
        return np.frombuffer(content, dtype="<i8").astype(np.int64)


def split_file(folder: Path, split: Split, kind: str) -> Path:
    """Where the "bin", "hashes", "labels" or "journal" of a split is."""
    return folder / f"{split}.{kind}"


def open_prepared(source: str) -> PreparedSet | None:
    """The prepared set that a source names; None for any other source.

    Raises:
        DataError: it is unfinished, damaged, or of a newer format.
    """
    if not is_path(source):
        return None
    folder = Path(source).expanduser()
    if (folder / PREPARED_FILE).is_file():
        return PreparedSet.of(folder)
    if (folder / UNFINISHED_FILE).is_file():
        raise DataError(
            f"{folder}: expected a finished set, found one that `prepare` was writing; "
            f"the same command goes on with it"
        )
    return None


def read_prepared(prepared: PreparedSet, config: DataConfig, split: Split) -> store.Decoded:
    """One split, or the part of it that a smaller `limit` takes; both are mapped.

    Raises:
        DataError: a setting differs from what the set was prepared with, the set has no such
            split, or a file has not the recorded size.
    """
    _require_same_words(prepared, config)
    identity = prepared.identity
    made = DataConfig(source=config.source, **identity.words)
    _, members = split_members(made, split, identity.stored)
    limit = min(config.limit or len(members), len(members))
    _, wanted = split_members(replace(made, limit=limit), split, identity.stored)
    if identity.format == UNHASHED:
        _warn_unhashed(prepared.folder)
    whole = prepared.read(split)
    if len(wanted) == len(members):
        return whole
    facts = prepared.splits[split]
    skipped = {int(members[position]): name for position, name in facts.skipped}
    readable = np.delete(members, [position for position, _ in facts.skipped])
    rows = np.flatnonzero(np.isin(readable, wanted))
    assert isinstance(whole.images, CheckedImages)
    images = whole.images.part(rows)
    labels = None if whole.labels is None else whole.labels[rows]
    names = tuple(skipped[index] for index in wanted.tolist() if index in skipped)
    return store.Decoded(images, labels, store.fingerprint(images, labels, identity.levels), names)


@cache
def _warn_unhashed(folder: Path) -> None:
    log.warning(
        "%s: prepared by an earlier version, without hashes: damage to its images would not be "
        "noticed; `exactflow prepare %s --verify` compares all of them with their fingerprint",
        folder,
        folder,
    )


def verify(folder: Path) -> PreparedSet:
    """Read all of a prepared set, and compare it with its hashes and its fingerprints.

    Raises:
        DataError: there is no such set, or it has changed; the message names the file and, except
            in format 1, the image.
    """
    prepared = open_prepared(str(folder.expanduser().resolve()))
    if prepared is None:
        raise DataError(f"{folder}: expected a set that `prepare` wrote, found none")
    for split, facts in prepared.splits.items():
        read = prepared.read(split)
        found = store.fingerprint(read.images, read.labels, prepared.identity.levels)
        if found != facts.fingerprint:
            raise DataError(
                f"{split_file(prepared.folder, split, 'bin')}: expected the fingerprint "
                f"{facts.fingerprint}, which was written down, found {found}: {_REMEDY}"
            )
    return prepared


def _require_same_words(prepared: PreparedSet, config: DataConfig) -> None:
    """Raise a DataError for a setting that is neither at its default nor as it was prepared.

    A limit may be smaller; a larger one means all images.
    """
    for name, recorded in prepared.identity.words.items():
        given = getattr(config, name)
        if name != "limit" and given not in (recorded, getattr(DataConfig(), name)):
            raise DataError(
                f"{prepared.folder}: expected {name} {recorded!r}, as it was prepared, found "
                f"{given!r}; leave the word out, or prepare the source again into another folder"
            )
