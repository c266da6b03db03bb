"""Preparing a source: every split is decoded once into a folder, which is then read directly."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

from exactflow.data import store
from exactflow.data.config import SPLITS, DataConfig, DataError, Split, is_path
from exactflow.data.datasets import ImageDataset, load, select
from exactflow.data.known import require_known
from exactflow.data.prepared import (
    PREPARED_FILE,
    UNFINISHED_FILE,
    Identity,
    PreparedSet,
    identity_of,
    open_prepared,
)
from exactflow.data.prepared_writer import LOCK_FILE, locked, write_prepared
from exactflow.data.records import Source
from exactflow.data.sources import open_source
from exactflow.data.splits import split_members

log = logging.getLogger(__name__)


def prepare(
    config: DataConfig,
    folder: Path,
    *,
    id: str | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> dict[Split, ImageDataset]:
    """Decode every split of a source into a folder, or continue an interrupted call.

    `DataConfig(source=folder)` then reads it without decoding or hashing anything, with the id,
    version, preprocessing and fingerprint that the source itself has under the same settings:
    numbers agree, and a run begun on one continues with the other. The splits are cut here, by the
    fractions, the seed and the limit of `config`, and kept; a set prepared with a limit holds no
    more.

    Args:
        config: the source and what is done to it; flip, translate and padding do not count.
        folder: where to write; new, empty, or left by the same call.
        id: name of the set, instead of the source's. A name of `known.py`, such as
            "imagenet64-old", is refused unless shape, levels, number of held-out images and labels
            are those of that set.
        workers: threads that decode; None: one per core, 16 at most.
        progress: whether to show progress on stderr.

    Returns:
        The splits that have images, as `load` gives them.

    Raises:
        DataError: the source cannot be read as asked, the folder holds anything else, another
            process is writing it, or the name is another set's.
        ImportError: a library of the `data` extra is missing.
    """
    if open_prepared(config.source) is not None:
        raise DataError(f"{config.source}: expected a source, found a set that is prepared already")
    if workers is not None and workers < 1:
        raise DataError(f"workers: expected at least 1, found {workers}")
    folder = folder.expanduser()
    _require_outside(config, folder)
    source = open_source(config)
    selections = _selections(config, source)
    identity = identity_of(config, source, selections["train"], id)
    require_known(identity.id, config, source, selections)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _require_ours(folder, identity)
        write_prepared(
            folder, identity, selections, title="preparing", workers=workers, quiet=not progress
        )
    found = DataConfig(source=str(folder), cache_dir=config.cache_dir)
    return {split: load(found, split) for split in selections}


def _selections(config: DataConfig, source: Source) -> dict[Split, store.Selection]:
    """The images to read of every split that has some. Raises DataError if "train" has none."""
    counts = source.stored
    found: list[Split] = ["train"]
    for split in SPLITS[1:]:
        try:
            split_members(config, split, counts)
        except DataError as error:
            log.info("%s", error)
        else:
            found.append(split)
    return {split: select(config, source, split) for split in found}


def _require_ours(folder: Path, identity: Identity) -> None:
    """Raise a DataError unless a folder is empty, or holds this set or a part of it."""
    unfinished = folder / UNFINISHED_FILE
    if (folder / PREPARED_FILE).is_file():
        _require_same(PreparedSet.of(folder).identity, identity, folder)
    elif unfinished.is_file():
        _require_same(Identity(**json.loads(unfinished.read_text())), identity, folder)
    else:
        strays = sorted(child.name for child in folder.iterdir() if child.name != LOCK_FILE)
        if strays:
            raise DataError(f"{folder}: expected a new or an empty folder, found {strays[0]} in it")


def _require_same(found: Identity, wanted: Identity, folder: Path) -> None:
    ours = asdict(wanted)
    for name, value in asdict(found).items():
        if value == ours[name] or name == "format":  # an older format is continued
            continue
        what = "the files of the source have changed" if name == "stamp" else f"{name} {value!r}"
        expected = "the same files" if name == "stamp" else repr(ours[name])
        raise DataError(
            f"{folder}: expected {expected}, as it is prepared now, found one begun with other "
            f"settings: {what}; remove the folder, or choose another"
        )


def _require_outside(config: DataConfig, folder: Path) -> None:
    """Refuse to write into the source, where the result would be read as a part of it."""
    if not is_path(config.source):
        return
    source = Path(config.source).expanduser().resolve()
    if folder.resolve().is_relative_to(source):
        raise DataError(f"expected a folder outside the source {source}, found {folder}")
