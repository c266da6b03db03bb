"""Decoding a whole source once into a folder that is read at once from then on.

Pixels are appended block by block, and a journal beside them says which blocks are complete. Both
are on disk before the next block begins: after a kill or a power cut, the same call cuts off what
the journal does not vouch for and goes on. The result depends on the source and the words alone,
not on interruptions, nor on the number of workers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

import numpy as np
import PIL
from filelock import FileLock, Timeout

from exactflow.core.progress import shown_progress
from exactflow.core.serialization import write_atomically
from exactflow.data import store
from exactflow.data.checked import hashes_of
from exactflow.data.config import SPLITS, DataConfig, DataError, Split, is_path
from exactflow.data.datasets import ImageDataset, load, select
from exactflow.data.known import Claim, known_names, require_known
from exactflow.data.prepared import (
    FORMAT,
    PREPARED_FILE,
    UNFINISHED_FILE,
    WORDS,
    Identity,
    PreparedSet,
    SplitFacts,
    hash_file,
    label_file,
    open_prepared,
    pixel_file,
)
from exactflow.data.records import Source
from exactflow.data.sources import open_source
from exactflow.data.splits import split_members

log = logging.getLogger(__name__)

_LOCK_FILE = "preparing.lock"


def prepare(
    config: DataConfig,
    folder: Path,
    *,
    id: str | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> dict[Split, ImageDataset]:
    """Decode every split of a source into a folder, or go on with what an interrupted call left.

    `DataConfig(source=folder)` then reads it without decoding or hashing anything, with the id,
    version, preprocessing and fingerprint that the source itself gives under the same words:
    numbers agree, and a run begun on one goes on with the other. The splits are cut here, by the
    fractions, the seed and the limit of `config`, and kept; a set prepared with a limit holds no
    more.

    Args:
        config: the source and what is done to it; flip, translate and padding belong to training.
        folder: where to write; new, empty, or left by the same call.
        id: name of the set in place of the source's own. A name of `known.py`, such as
            "imagenet64-old", is refused unless shape, levels, number of held-out images and labels
            are those of that set.
        workers: threads that decode; None: one per core, 16 at most.
        progress: whether to say on stderr how far it is.

    Returns:
        The splits that have images, as `load` gives them.

    Raises:
        DataError: the source is not readable as asked, the folder holds anything else, another
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
    identity = _identity(config, source, selections["train"], id)
    _require_name(config, source, selections, identity.id)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        _remove_partial_files(folder)
        if not _is_finished(folder, identity):
            write_atomically(folder / UNFINISHED_FILE, (_text(identity) + "\n").encode())
            splits = _write_splits(selections, folder, workers, progress)
            finished = PreparedSet(folder, identity, splits).write()
            write_atomically(folder / PREPARED_FILE, finished)
        for split in SPLITS:
            _journal_file(folder, split).unlink(missing_ok=True)
        (folder / UNFINISHED_FILE).unlink(missing_ok=True)
    found = DataConfig(source=str(folder), cache_dir=config.cache_dir)
    return {split: load(found, split) for split in selections}


@final
@dataclass(frozen=True)
class _Done:
    """What is safely on disk of a split: images consumed, images written, positions skipped."""

    read: int
    written: int
    skipped: tuple[int, ...]


def _write_splits(
    selections: dict[Split, store.Selection], folder: Path, workers: int | None, progress: bool
) -> dict[Split, SplitFacts]:
    done = {split: _resume(selections[split], folder, split) for split in selections}
    total = sum(len(selection.indices) for selection in selections.values())
    before = sum(part.read for part in done.values())
    with shown_progress(total, "preparing", done=before, quiet=not progress) as advance:
        for split, selection in selections.items():
            done[split] = _append(selection, done[split], folder, split, workers, advance)
    return {split: _facts(selections[split], done[split], folder, split) for split in selections}


def _resume(selection: store.Selection, folder: Path, split: Split) -> _Done:
    """What the journal vouches for; whatever lies behind it in the files is cut off."""
    pixels, journal = pixel_file(folder, split), _journal_file(folder, split)
    for file in (pixels, journal):
        file.touch()
    image_bytes = int(np.prod(selection.shape))
    held = pixels.stat().st_size // image_bytes
    done, length = _Done(0, 0, ()), 0
    for line in journal.read_bytes().splitlines(keepends=True):
        entry = _entry(line)
        if entry is None or done.written + entry.written > held:
            break
        skipped = (*done.skipped, *entry.skipped)
        done = _Done(done.read + entry.read, done.written + entry.written, skipped)
        length += len(line)
    os.truncate(journal, length)
    os.truncate(pixels, done.written * image_bytes)
    return done


def _entry(line: bytes) -> _Done | None:
    """A line of a journal; None if it was not written to its end."""
    if not line.endswith(b"\n"):
        return None
    try:
        content = json.loads(line)
        return _Done(content["read"], content["written"], tuple(content["skipped"]))
    except (ValueError, KeyError, TypeError):
        return None


def _append(
    selection: store.Selection,
    done: _Done,
    folder: Path,
    split: Split,
    workers: int | None,
    advance: Callable[[int], None],
) -> _Done:
    """Decode what is missing; each block's pixels are on disk before its line of the journal."""
    pixels, journal = pixel_file(folder, split), _journal_file(folder, split)
    read, written, skipped = done.read, done.written, list(done.skipped)
    several: list[str] = []
    with pixels.open("ab") as images, journal.open("ab") as lines:
        for block, bad in store.decode_blocks(selection, several, start=read, workers=workers):
            entry = _Done(len(block) + len(bad), len(block), tuple(bad))
            for stream, content in ((images, block.data), (lines, _text(entry).encode() + b"\n")):
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            read, written, skipped = read + entry.read, written + entry.written, [*skipped, *bad]
            advance(entry.read)
    store.tell_animations(several)
    if not written:
        raise DataError(f"expected at least one readable image, found none of {read}")
    return _Done(read, written, tuple(skipped))


def _facts(selection: store.Selection, done: _Done, folder: Path, split: Split) -> SplitFacts:
    """What is recorded of a split whose pixels are all there; its labels are written here."""
    labels, names = store.without_skipped(selection, list(done.skipped))
    stored = None if labels is None else labels.astype("<i8").tobytes()
    if stored is not None:
        write_atomically(label_file(folder, split), stored)
    shape = (done.written, *selection.shape)
    images = np.memmap(pixel_file(folder, split), np.uint8, "r", shape=shape)
    write_atomically(hash_file(folder, split), hashes_of(images).tobytes())
    return SplitFacts(
        count=done.written,
        labelled=labels is not None,
        fingerprint=store.fingerprint(images, labels, selection.levels),
        skipped=list(zip(done.skipped, names, strict=True)),
        labels_sha256=None if stored is None else hashlib.sha256(stored).hexdigest(),
    )


def _selections(config: DataConfig, source: Source) -> dict[Split, store.Selection]:
    """Of every split that has images. Raises DataError if that of training has none."""
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


def _identity(
    config: DataConfig, source: Source, selection: store.Selection, id: str | None
) -> Identity:
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


def _require_name(
    config: DataConfig, source: Source, selections: dict[Split, store.Selection], id: str
) -> None:
    """Refuse a published set's name where the facts do not fit, before anything is decoded."""
    if id in known_names() and config.on_error == "skip":
        raise DataError(f"id {id}: expected on_error=raise, since that set is complete, found skip")
    claim = Claim(
        shape=selections["train"].shape,
        levels=selections["train"].levels,
        stored={split: len(stored.records) for split, stored in source.splits.items()},
        taken={split: len(selection.indices) for split, selection in selections.items()},
        labelled=frozenset(s for s, stored in source.splits.items() if stored.labels is not None),
        resized=config.image_size is not None,
    )
    require_known(id, claim)


def _remove_partial_files(folder: Path) -> None:
    """Remove what a kill left of files that are written under another name first."""
    parts = (file(folder, split).name for split in SPLITS for file in (label_file, hash_file))
    for name in (UNFINISHED_FILE, PREPARED_FILE, *parts):
        for file in folder.glob(f".{name}.*.partial"):
            file.unlink()


def _is_finished(folder: Path, identity: Identity) -> bool:
    """Whether the folder holds this very set, complete; anything but a part of it is an error."""
    unfinished = folder / UNFINISHED_FILE
    if (folder / PREPARED_FILE).is_file():
        prepared = open_prepared(str(folder.resolve()))
        assert prepared is not None
        _require_same(prepared.identity, identity, folder)
        return True
    if unfinished.is_file():
        _require_same(Identity(**json.loads(unfinished.read_text())), identity, folder)
        return False
    strays = sorted(child.name for child in folder.iterdir() if child.name != _LOCK_FILE)
    if strays:
        raise DataError(f"{folder}: expected a new or an empty folder, found {strays[0]} in it")
    return False


def _require_same(found: Identity, wanted: Identity, folder: Path) -> None:
    ours = asdict(wanted)
    for name, value in asdict(found).items():
        if value == ours[name] or name == "format":  # one that was begun earlier goes on
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


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes; the lock goes with the process, however it ends.

    Its file stays: another process may have opened it already, and would hold what nobody sees.
    """
    try:
        with FileLock(folder / _LOCK_FILE, blocking=False):
            yield
    except Timeout:
        raise DataError(f"{folder}: another process is preparing it") from None


def _journal_file(folder: Path, split: Split) -> Path:
    return folder / f"{split}.journal"


def _text(value: Identity | _Done) -> str:
    return json.dumps(asdict(value))
