"""Decoding the images of a split, in order, with several threads; into memory if they fit."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple, final

import numpy as np

from exactflow.core.progress import shown_progress
from exactflow.data.checked import CheckedImages
from exactflow.data.config import DataError
from exactflow.data.decode import Payload, Preprocessing, decode_image
from exactflow.data.records import Records, StoredSplit

log = logging.getLogger(__name__)

RAM_LIMIT_BYTES = 2**30  # pixels of a source; a larger one is decoded to the cache folder
PROGRESS_AFTER_SECONDS = 2.0

_IMAGES_PER_BLOCK = 512
_IMAGES_PER_TASK = 32  # enough to hide the cost of a task, few enough to share evenly
_DECODING_THREADS = min(16, os.cpu_count() or 1)  # Pillow's decoders release the GIL

Shape = tuple[int, int, int]


@final
@dataclass(frozen=True, eq=False)
class Selection:
    """The images to decode, and how.

    Attributes:
        split: where they are stored.
        indices: their positions there, ascending, int64.
        preprocessing: how each is changed.
        shape: (C, H, W) that each must have afterwards.
        shape_of: name of the image that `shape` is from, for errors.
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


class Decoded(NamedTuple):
    """Images (n, C, H, W) uint8, labels int64 (n,) or None, and the names of skipped images."""

    images: np.ndarray | CheckedImages
    labels: np.ndarray | None
    fingerprint: str
    skipped: tuple[str, ...]


def first_shape(
    records: Records, preprocessing: Preprocessing, on_error: Literal["raise", "skip"]
) -> tuple[Shape, str]:
    """Shape and name of the first (under "skip": first readable) image; all others must match it.

    Raises:
        DataError: that image, or under "skip" every image, is unreadable.
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


def fits_memory(images: int, shape: Shape) -> bool:
    """Whether this number of images is decoded into memory, and not into a file."""
    return images * math.prod(shape) <= RAM_LIMIT_BYTES


def decode_to_memory(selection: Selection) -> Decoded:
    """Decode into one read-only array; errors are those of `decode_blocks`."""
    total = len(selection.indices)
    with shown_progress(total, "decoding images", after=PROGRESS_AFTER_SECONDS) as advance:
        images, skipped = decode_array(selection, advance=advance)
    require_some(len(images), total)
    images.setflags(write=False)
    labels, names = without_skipped(selection, skipped)
    return Decoded(images, labels, fingerprint(images, labels, selection.levels), names)


def fingerprint(images: np.ndarray | CheckedImages, labels: np.ndarray | None, levels: int) -> str:
    """sha256 (hex) of the shape, the levels, the labels and all pixels, in order."""
    header = {"shape": list(images.shape), "levels": levels, "labelled": labels is not None}
    digest = hashlib.sha256(json.dumps(header).encode())
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())
    for start in range(0, len(images), _IMAGES_PER_BLOCK):
        digest.update(images[start : start + _IMAGES_PER_BLOCK].tobytes())
    return digest.hexdigest()


def decode_array(
    selection: Selection,
    *,
    workers: int | None = None,
    animations: list[str] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[np.ndarray, list[int]]:
    """All images of a selection, and the positions that were skipped.

    Arguments and errors are those of `decode_blocks`; `advance` is called with the number of images
    of each block.
    """
    images = np.empty((len(selection.indices), *selection.shape), dtype=np.uint8)
    count = 0
    skipped: list[int] = []
    for block, bad in decode_blocks(selection, workers=workers, animations=animations):
        images[count : count + len(block)] = block
        count += len(block)
        skipped += bad
        advance(len(block) + len(bad))
    return images[:count], skipped


def decode_blocks(
    selection: Selection,
    *,
    start: int = 0,
    workers: int | None = None,
    animations: list[str] | None = None,
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Decode from position `start` of the selection on, in order, one block ahead.

    Args:
        selection: what to decode.
        start: first position.
        workers: threads that decode; None: one per core. They change nothing but the time.
        animations: the names of animations are added to it; None: a warning tells their number.

    Returns:
        Blocks of decoded images (k, C, H, W), each with the positions that were skipped in it.

    Raises:
        DataError: an image is unreadable or of another shape, and is not to be skipped.
    """
    several: list[str] = [] if animations is None else animations
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
    if animations is None:
        warn_of_animations(several)


def warn_of_animations(several: Sequence[str]) -> None:
    """Log the number of images that have further frames, which are not read."""
    if several:
        log.warning(
            "%d images are animations, of which the first frame is read, %s first",
            len(several),
            min(several),
        )


def require_some(readable: int, total: int) -> None:
    """Raise a DataError where none of the images could be read."""
    if not readable:
        raise DataError(f"expected at least one readable image, found none of {total}")


def _decode_block(
    threads: ThreadPoolExecutor,
    selection: Selection,
    start: int,
    block: list[Payload],
    several: list[str],
) -> Iterator[list[np.ndarray | DataError]]:
    """Start decoding the payloads at positions start, start + 1, ...; yields results in order."""

    def task(offset: int) -> list[np.ndarray | DataError]:
        part = block[offset : offset + _IMAGES_PER_TASK]
        indices = selection.indices[start + offset :][: len(part)].tolist()
        pairs = zip(indices, part, strict=True)
        return [_try_decode(selection, index, payload, several) for index, payload in pairs]

    return threads.map(task, range(0, len(block), _IMAGES_PER_TASK))


def _gathered(
    selection: Selection, start: int, parts: Iterator[list[np.ndarray | DataError]]
) -> tuple[np.ndarray, list[int]]:
    """The images of a block that starts at position `start`, and the positions skipped in it."""
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
    """The decoded image, or the error that it raised."""
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
