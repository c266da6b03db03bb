"""Writing a prepared set: pixels are appended block by block; an interrupted call can be continued.

A journal beside the pixels says which blocks are complete. Both are on disk before the next block
begins: after a kill or a power cut, the same call cuts off what the journal does not list and
continues. The result depends on the source and the settings alone, neither on interruptions nor on
the number of workers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import PIL
from filelock import FileLock, Timeout

from exactflow.core.files import write_atomically
from exactflow.core.progress import shown_progress
from exactflow.data import store
from exactflow.data.checked import hashes_of
from exactflow.data.config import SPLITS, DataError, Split, cache_folder
from exactflow.data.journal import read_journal
from exactflow.data.prepared import (
    PREPARED_FILE,
    UNFINISHED_FILE,
    Identity,
    PreparedSet,
    SplitFacts,
    split_file,
)

log = logging.getLogger(__name__)

LOCK_FILE = "preparing.lock"


@final
@dataclass(frozen=True)
class _Done:
    """What is on disk of a split: number of images read and written, positions skipped."""

    read: int
    written: int
    skipped: tuple[int, ...]


def write_prepared(
    folder: Path,
    identity: Identity,
    selections: Mapping[Split, store.Selection],
    *,
    title: str,
    workers: int | None = None,
    after: float = 0.0,
    quiet: bool = False,
) -> None:
    """Decode what is missing of a set in a folder; nothing if the set is finished.

    Args:
        folder: `locked` by the caller; it holds nothing but this set, or a part of it.
        identity: of the set.
        selections: its splits.
        title: title of the progress; as of `shown_progress`, like `after` and `quiet`.
        workers: threads that decode; None: one per core, 16 at most.
        after: seconds before progress is shown.
        quiet: show none.

    Raises:
        DataError: an image is unreadable or of another shape, and is not to be skipped.
    """
    if not (folder / PREPARED_FILE).is_file():
        write_atomically(folder / UNFINISHED_FILE, (_text(identity) + "\n").encode())
        done = {split: _resume(selections[split], folder, split) for split in selections}
        total = sum(len(selection.indices) for selection in selections.values())
        before = sum(part.read for part in done.values())
        with shown_progress(total, title, done=before, quiet=quiet, after=after) as advance:
            for split, selection in selections.items():
                done[split] = _append(selection, done[split], folder, split, workers, advance)
        facts: dict[Split, SplitFacts] = {
            split: _facts(selections[split], done[split], folder, split) for split in selections
        }
        write_atomically(folder / PREPARED_FILE, PreparedSet(folder, identity, facts).to_json())
    for split in SPLITS:
        split_file(folder, split, "journal").unlink(missing_ok=True)
    (folder / UNFINISHED_FILE).unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock a folder against other processes; the lock ends with the process, however it ends.

    The lock's file stays: another process may have opened it already, and would lock a removed one.
    Partial files that a killed process left are removed.

    Raises:
        DataError: another process is writing the folder, unless `wait` says to wait for it.
    """
    try:
        with FileLock(folder / LOCK_FILE, blocking=wait):
            for file in folder.glob(".*.partial"):
                file.unlink()
            yield
    except Timeout:
        raise DataError(f"{folder}: another process is preparing it") from None


def cached(
    selection: store.Selection, identity: Identity, split: Split, cache_dir: str | None
) -> store.Decoded:
    """A split from a prepared set in the cache folder, which is made if missing or damaged.

    A process that wants a split which another one is decoding waits. Errors are those of
    `write_prepared`.
    """
    folder = cache_folder(cache_dir) / "decoded" / _cache_key(selection, identity.stamp)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=True):
        if (folder / PREPARED_FILE).is_file():
            try:
                return _read(folder, split)
            except DataError:
                log.warning(
                    "%s: the images that were decoded to it are damaged; they are decoded again",
                    folder,
                )
                _clear(folder)
        try:
            write_prepared(
                folder,
                identity,
                {split: selection},
                title="decoding images",
                after=store.PROGRESS_AFTER_SECONDS,
            )
        except DataError:  # a mended source has another key
            _clear(folder)
            raise
        return _read(folder, split)


def _read(folder: Path, split: Split) -> store.Decoded:
    remedy = f"remove {folder}, and its images are decoded again"
    return PreparedSet.of(folder.resolve()).read(split, remedy)


def _clear(folder: Path) -> None:
    for file in folder.iterdir():
        if file.name != LOCK_FILE:
            file.unlink()


def _cache_key(selection: store.Selection, stamp: str) -> str:
    """Name of the prepared set: equal for equal pixels, labels and settings only."""
    digest = hashlib.sha256(selection.indices.tobytes())
    if selection.split.labels is not None:
        digest.update(selection.split.labels[selection.indices].tobytes())
    done = selection.preprocessing
    rules = (done.hash, done.max_pixels, selection.shape, selection.levels, selection.on_error)
    digest.update(json.dumps([stamp, *rules, PIL.__version__]).encode())
    return digest.hexdigest()[:32]


def _resume(selection: store.Selection, folder: Path, split: Split) -> _Done:
    """What the journal lists; pixels beyond it are cut off."""
    pixels = split_file(folder, split, "bin")
    pixels.touch()
    image_bytes = int(np.prod(selection.shape))
    present = pixels.stat().st_size // image_bytes
    done = _Done(0, 0, ())

    def add(entry: Any) -> None:
        nonlocal done
        written = done.written + entry["written"]
        if written > present:
            raise ValueError("the pixels are not on disk")
        done = _Done(done.read + entry["read"], written, (*done.skipped, *entry["skipped"]))

    read_journal(split_file(folder, split, "journal"), add)
    os.truncate(pixels, done.written * image_bytes)
    return done


def _append(
    selection: store.Selection,
    done: _Done,
    folder: Path,
    split: Split,
    workers: int | None,
    advance: Callable[[int], None],
) -> _Done:
    """Decode what is missing; each block's pixels are on disk before its line of the journal."""
    pixels, journal = split_file(folder, split, "bin"), split_file(folder, split, "journal")
    read, written, skipped = done.read, done.written, list(done.skipped)
    with pixels.open("ab") as images, journal.open("ab") as lines:
        for block, bad in store.decode_blocks(selection, start=read, workers=workers):
            entry = _Done(len(block) + len(bad), len(block), tuple(bad))
            for stream, content in ((images, block.data), (lines, _text(entry).encode() + b"\n")):
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            read, written, skipped = read + entry.read, written + entry.written, [*skipped, *bad]
            advance(entry.read)
    store.require_some(written, read)
    return _Done(read, written, tuple(skipped))


def _facts(selection: store.Selection, done: _Done, folder: Path, split: Split) -> SplitFacts:
    """What is recorded of a split whose pixels are complete; writes its labels and hashes."""
    labels, names = store.without_skipped(selection, list(done.skipped))
    stored = None if labels is None else labels.astype("<i8").tobytes()
    if stored is not None:
        write_atomically(split_file(folder, split, "labels"), stored)
    shape = (done.written, *selection.shape)
    images = np.memmap(split_file(folder, split, "bin"), np.uint8, "r", shape=shape)
    write_atomically(split_file(folder, split, "hashes"), hashes_of(images).tobytes())
    return SplitFacts(
        count=done.written,
        labelled=labels is not None,
        fingerprint=store.fingerprint(images, labels, selection.levels),
        skipped=list(zip(done.skipped, names, strict=True)),
        labels_sha256=None if stored is None else hashlib.sha256(stored).hexdigest(),
    )


def _text(value: Identity | _Done) -> str:
    return json.dumps(asdict(value))
