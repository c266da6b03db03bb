"""Decoding a split once: into memory, or into a memory-mapped file where the source is large."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import PIL

from exactflow.core.serialization import write_atomically
from exactflow.data.checked import HASH_BYTES, CheckedImages, hashes_of, is_intact, sealed
from exactflow.data.config import DataError, cache_folder
from exactflow.data.decode import Payload, Preprocessing, decode_image
from exactflow.data.records import Records, StoredSplit

log = logging.getLogger(__name__)

RAM_LIMIT_BYTES = 2**30  # pixels of a whole source; a larger one is decoded to the cache folder
PROGRESS_AFTER_SECONDS = 2.0

_IMAGES_PER_BLOCK = 512
_IMAGES_PER_TASK = 32  # enough to hide what a thread's task costs, small enough to share evenly
_DECODING_THREADS = min(16, os.cpu_count() or 1)  # Pillow's decoders release the GIL

Shape = tuple[int, int, int]


@final
@dataclass(frozen=True, eq=False)
class Selection:
    """The images to decode, and how.

    Attributes:
        split: where they are stored.
        indices: which of them, ascending, int64.
        preprocessing: what is done to each.
        shape: (C, H, W) that each must have afterwards.
        shape_of: the image that `shape` was taken from, for errors.
        levels: number of values a pixel can take.
        on_error: whether an unreadable image raises or is skipped.
    """

    split: StoredSplit
    indices: np.ndarray
    preprocessing: Preprocessing
    shape: Shape
    shape_of: str
    levels: int
    on_error: Literal["raise", "skip"]


@final
@dataclass(frozen=True, eq=False)
class Decoded:
    """The result: images (n, C, H, W) uint8, labels int64 (n,) or None, names of the skipped."""

    images: np.ndarray | CheckedImages
    labels: np.ndarray | None
    skipped: tuple[str, ...]
    fingerprint: str


def first_shape(
    records: Records, preprocessing: Preprocessing, on_error: Literal["raise", "skip"]
) -> tuple[Shape, str]:
    """Shape and name of the first (under "skip": first readable) image; all others must match it.

    Raises:
        DataError: it, or under "skip" every image, is unreadable.
    """
    last: DataError | None = None
    for index, payload in enumerate(records.read(np.arange(len(records)))):
        name = records.name(index)
        try:
            channels, height, width = decode_image(payload, name, preprocessing).shape
        except DataError as error:
            if on_error == "raise":
                raise
            last = error
        else:
            return (channels, height, width), name
    raise DataError(f"expected at least one readable image, found none of {len(records)}") from last


def decode(selection: Selection, stamp: str, cache_dir: str | None, *, of: int) -> Decoded:
    """Decode into memory, or into a file of the cache folder where the source is large.

    Args:
        selection: what to decode.
        stamp: changes whenever the stored files do.
        cache_dir: the cache folder; None means ~/.cache/exactflow.
        of: number of images in all that are read of the source.

    Raises:
        DataError: an image is unreadable or of another shape, and is not to be skipped.
    """
    if of * math.prod(selection.shape) <= RAM_LIMIT_BYTES:
        return decode_to_memory(selection)
    return decode_to_file(selection, stamp, cache_folder(cache_dir))


def decode_to_memory(selection: Selection) -> Decoded:
    """Decode into one array, read-only so that it stays what its fingerprint says.

    Raises:
        DataError: an image is unreadable or of another shape, and is not to be skipped.
    """
    images = np.empty((len(selection.indices), *selection.shape), dtype=np.uint8)
    count = 0
    skipped: list[int] = []
    for block, bad in _decode_blocks(selection):
        images[count : count + len(block)] = block
        count += len(block)
        skipped += bad
    images = images[:count]
    images.setflags(write=False)
    labels, names = without_skipped(selection, skipped)
    return Decoded(images, labels, names, fingerprint(images, labels, selection.levels))


def decode_to_file(selection: Selection, stamp: str, folder: Path) -> Decoded:
    """Decode into a file of `folder` and map it; if it is there already, only map it.

    The pixels come first, with a hash of each image behind them, then a JSON file that says they
    are complete; both are written under temporary names, are on disk, and are renamed. What is
    damaged, or has no hashes, is decoded again. Processes that decode the same split at once do
    double work, but never read half a file.

    Args:
        selection: what to decode.
        stamp: changes whenever the stored files do.
        folder: the cache folder; made if missing.

    Raises:
        DataError: as in `decode_to_memory`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = _cache_key(selection, stamp)
    pixels, sidecar = folder / f"{key}.bin", folder / f"{key}.json"
    facts = _read_sidecar(sidecar, pixels, selection.shape)
    if facts is None:
        skipped = _write_pixels(selection, pixels)
        count = len(selection.indices) - len(skipped)
        labels, _ = without_skipped(selection, skipped)
        digest = fingerprint(_mapped(pixels, count, selection.shape), labels, selection.levels)
        facts = {"count": count, "skipped": skipped, "fingerprint": digest}
        write_atomically(sidecar, json.dumps(sealed(facts)).encode())
    labels, names = without_skipped(selection, facts["skipped"])
    images = _mapped(pixels, facts["count"], selection.shape)
    return Decoded(images, labels, names, facts["fingerprint"])


def _mapped(pixels: Path, count: int, shape: Shape) -> CheckedImages:
    """What `_write_pixels` wrote."""
    remedy = "remove it, and its images are decoded again"
    hashes = pixels, count * math.prod(shape)
    return CheckedImages(pixels, (count, *shape), hashes, remedy)


def fingerprint(images: np.ndarray | CheckedImages, labels: np.ndarray | None, levels: int) -> str:
    """sha256 (hex) of the shape, the levels, the labels and all pixels, in order."""
    header = {"shape": list(images.shape), "levels": levels, "labelled": labels is not None}
    digest = hashlib.sha256(json.dumps(header).encode())
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())
    for start in range(0, len(images), _IMAGES_PER_BLOCK):
        digest.update(images[start : start + _IMAGES_PER_BLOCK].tobytes())
    return digest.hexdigest()


def decode_blocks(
    selection: Selection,
    several: list[str],
    *,
    start: int = 0,
    workers: int | None = None,
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Decode from position `start` of the selection on, in order, one block ahead.

    Args:
        selection: what to decode.
        several: names of animations are added to it, for `tell_animations`.
        start: where to begin.
        workers: threads that decode; None: one per core. They change nothing but the time.

    Returns:
        Blocks of decoded images (k, C, H, W), each with the positions that were skipped in it.

    Raises:
        DataError: an image is unreadable or of another shape, and is not to be skipped.
    """
    total = len(selection.indices)
    payloads = selection.split.records.read(selection.indices[start:])
    ahead: deque[tuple[int, Iterator[list[np.ndarray | DataError]]]] = deque()
    with ThreadPoolExecutor(workers or _DECODING_THREADS) as threads:
        for first in range(start, total, _IMAGES_PER_BLOCK):
            block = list(islice(payloads, _IMAGES_PER_BLOCK))
            ahead.append((first, _decode_block(threads, selection, first, block, several)))
            if len(ahead) > 1:  # a block is decoded while the next one is read
                yield _gathered(selection, *ahead.popleft())
        for first, parts in ahead:
            yield _gathered(selection, first, parts)


def tell_animations(several: Sequence[str]) -> None:
    """Log how many images have further frames, which are not read."""
    if several:
        log.warning(
            "%d images are animations, of which the first frame is read, %s first",
            len(several),
            min(several),
        )


def _decode_blocks(selection: Selection) -> Iterator[tuple[np.ndarray, list[int]]]:
    """All blocks of a selection in which something can be read, with a bar where it takes long."""
    total = len(selection.indices)
    readable = 0
    several: list[str] = []
    with _late_progress(total, "decoding images") as advance:
        for block, bad in decode_blocks(selection, several):
            yield block, bad
            advance(len(block) + len(bad))
            readable += len(block)
    tell_animations(several)
    if not readable:
        raise DataError(f"expected at least one readable image, found none of {total}")


def _decode_block(
    threads: ThreadPoolExecutor,
    selection: Selection,
    start: int,
    block: list[Payload],
    several: list[str],
) -> Iterator[list[np.ndarray | DataError]]:
    """Start to decode the payloads at positions start, start + 1, ...; results come in order."""

    def task(offset: int) -> list[np.ndarray | DataError]:
        part = block[offset : offset + _IMAGES_PER_TASK]
        indices = selection.indices[start + offset :][: len(part)].tolist()
        pairs = zip(indices, part, strict=True)
        return [_try_decode(selection, index, payload, several) for index, payload in pairs]

    return threads.map(task, range(0, len(block), _IMAGES_PER_TASK))


def _gathered(
    selection: Selection, start: int, parts: Iterator[list[np.ndarray | DataError]]
) -> tuple[np.ndarray, list[int]]:
    """The images of a block whose first position is `start`, and the positions skipped in it."""
    images: list[np.ndarray] = []
    bad: list[int] = []
    for position, result in enumerate((result for part in parts for result in part), start):
        if isinstance(result, DataError):
            if selection.on_error == "raise":
                raise result
            log.warning("skipped %s", result)
            bad.append(position)
        else:
            images.append(result)
    if not images:
        return np.empty((0, *selection.shape), dtype=np.uint8), bad
    return np.ascontiguousarray(np.stack(images)), bad  # stacking keeps the colours' order


def _try_decode(
    selection: Selection, index: int, payload: Payload, several: list[str]
) -> np.ndarray | DataError:
    """The image, or the error that says why there is none."""
    name = selection.split.records.name(index)
    try:
        image = decode_image(payload, name, selection.preprocessing, several)
    except DataError as error:
        return error
    if image.shape == selection.shape:
        return image
    return DataError(
        f"{name}: expected channels, height, width {selection.shape} as in {selection.shape_of}, "
        f"found {image.shape}; set image_size and channels to make all images alike"
    )


def without_skipped(
    selection: Selection, skipped: list[int]
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels of the images that remain, and names of those at the positions `skipped`."""
    names = tuple(selection.split.records.name(int(selection.indices[i])) for i in skipped)
    if selection.split.labels is None:
        return None, names
    return selection.split.labels[np.delete(selection.indices, skipped)], names


def _cache_key(selection: Selection, stamp: str) -> str:
    """Names the decoded file: equal for equal pixels, labels and rules only."""
    digest = hashlib.sha256(selection.indices.tobytes())
    if selection.split.labels is not None:
        digest.update(selection.split.labels[selection.indices].tobytes())
    done = selection.preprocessing
    rules = (done.hash, done.max_pixels, selection.shape, selection.levels, selection.on_error)
    digest.update(json.dumps([stamp, *rules, PIL.__version__]).encode())
    return digest.hexdigest()[:32]


def _read_sidecar(sidecar: Path, pixels: Path, shape: Shape) -> dict[str, Any] | None:
    """What is known of complete pixels; None where they have to be decoded."""
    if not sidecar.is_file() or not pixels.is_file():
        return None
    try:
        facts = json.loads(sidecar.read_bytes())
    except (ValueError, RecursionError):
        facts = None
    if isinstance(facts, dict) and is_intact(facts):
        size = facts["count"] * (math.prod(shape) + HASH_BYTES)
        if pixels.stat().st_size == size:
            return facts
    log.warning(
        "%s: the images that were decoded to it are damaged, or of an earlier version; they are "
        "decoded again",
        pixels,
    )
    return None


def _write_pixels(selection: Selection, file: Path) -> list[int]:
    """Write the decoded images, then the hash of each; returns the positions that were skipped."""
    skipped: list[int] = []
    hashes: list[np.ndarray] = []
    with _atomic_file(file) as path, path.open("wb") as stream:
        for block, bad in _decode_blocks(selection):
            stream.write(block.data)
            hashes.append(hashes_of(block))
            skipped += bad
        stream.write(np.concatenate(hashes).data)
        stream.flush()
        os.fsync(stream.fileno())  # a rename may reach the disk before the content does
    return skipped


@contextmanager
def _atomic_file(file: Path) -> Iterator[Path]:
    """A temporary path beside `file` that is renamed to it on success and removed on failure."""
    handle, name = tempfile.mkstemp(prefix=".partial-", dir=file.parent)
    os.close(handle)
    path = Path(name)
    try:
        yield path
        path.replace(file)
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _late_progress(total: int, title: str) -> Iterator[Callable[[int], None]]:
    """Yield `advance(count)`; a bar appears on stderr after two seconds, on a terminal only."""
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=total)
    started = time.monotonic()
    shown = False

    def advance(count: int) -> None:
        nonlocal shown
        bar.advance(task, count)
        late = time.monotonic() - started > PROGRESS_AFTER_SECONDS
        if late and not shown and sys.stderr.isatty():
            shown = True
            bar.start()

    try:
        yield advance
    finally:
        if shown:
            bar.stop()
