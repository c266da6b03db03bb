"""Streamed tar shards: they stay on a server, and only some of them are on this disk.

A source is one or several URLs of tar files in a pattern, such as

    https://host/set/train-{000000..000099}.tar
    s3://bucket/set/{train-{000..099},val-{00..04}}.tar

or of a folder, or of the `index.json` in it that names its shards. The contents of shards are in an
index (`indexing.py`), so that opening a set fetches only its first shard, for the shape of images.
Images are decoded when they are read.

The `webdataset` package is not used: its shuffle buffer is not saved, so that a run cannot be
resumed exactly. Here the order is a function of (seed, epoch), see `order.epoch_order`, and the
cache folder holds the shards that it needs next.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import BinaryIO, TypeVar, final

import numpy as np
from torch.utils.data import get_worker_info

from exactflow.data import store
from exactflow.data.config import DataConfig, DataError, Split, cache_folder
from exactflow.data.formats.shards import ShardFiles, TarRecords, records_of, source_of
from exactflow.data.formats.tar_index import TarIndex
from exactflow.data.order import mixed_shards
from exactflow.data.records import Source
from exactflow.data.streaming.background import done_ahead
from exactflow.data.streaming.indexing import find_index
from exactflow.data.streaming.shard_cache import RemoteShard, ShardCache

DOWNLOADS = 4  # at once, in each process
GROUPS_KEPT = 3  # groups of mixed shards in the cache: the previous, the current, and the next

_MOST_WAITING = 4096  # requests
_Request = TypeVar("_Request")


def open_streamed(pattern: str, config: DataConfig) -> Source:
    """Open the shards that a pattern of URLs means; none is fetched.

    Raises:
        DataError: they have no index, labels do not fit together, or `cache_gib` is less than
            training needs at once.
    """
    found, shards = find_index(pattern, config.cache_dir)
    splits = found.by_split(shards)
    cache = ShardCache(cache_folder(config.cache_dir) / "shards", round(config.cache_gib * 2**30))
    records: dict[Split, TarRecords] = {}
    for split, ours in splits.items():
        _require_room(ours, cache.limit, pattern)
        remote = tuple(RemoteShard(found.url(s.name), s.size, s.sha256) for s in ours)
        records[split] = records_of(ours, CachedFiles(cache, remote))
        for shard in ours:
            shard.log_ignored(found.url(shard.name))
    hashes = json.dumps([[shard.name, shard.sha256] for s in splits.values() for shard in s])
    stamp = hashlib.sha256(hashes.encode()).hexdigest()
    source = source_of(splits, records, name=found.title, stamp=stamp, where=pattern)
    stored = {
        split: replace(part, shards=tuple(len(shard) for shard in splits[split]))
        for split, part in source.splits.items()
    }
    return replace(source, splits=stored)


@final
@dataclass(frozen=True)
class CachedFiles(ShardFiles):
    """Remote shards that are read through a cache folder."""

    cache: ShardCache
    shards: tuple[RemoteShard, ...]

    def name(self, shard: int) -> str:
        return self.shards[shard].url

    def open(self, shard: int) -> AbstractContextManager[BinaryIO]:
        return self.cache.open(self.shards[shard])

    def fetch(self, shard: int) -> None:
        """Download a shard unless it is cached."""
        self.cache.fetch(self.shards[shard])


@final
class StreamedImages:
    """Images, uint8 (n, C, H, W), that are fetched and decoded when their rows are read.

    Args:
        selection: the images, of records whose files are `CachedFiles`.

    Raises:
        DataError: unreadable images are to be skipped, but are not known before they are decoded.
    """

    def __init__(self, selection: store.Selection) -> None:
        records = selection.split.records
        assert isinstance(records, TarRecords)
        assert isinstance(records.files, CachedFiles)
        if selection.on_error != "raise":
            raise DataError(
                f"{selection.shape_of}: expected on_error=raise, since it is streamed and no image "
                f"is decoded ahead, found {selection.on_error}; `exactflow prepare` can skip"
            )
        self._selection, self._records, self._files = selection, records, records.files
        self._shard = records.shard[selection.indices]
        self._warned = False  # of animations; once, since every batch is decoded here
        self.shape = (len(selection.indices), *selection.shape)

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        """A copy of one image, or of some, as of an array.

        Raises:
            DataError: a shard cannot be read, or an image is unreadable or of another shape.
        """
        if isinstance(rows, int):
            return self[np.array([rows])][0]
        stored = self._selection.indices[rows]
        wanted, position = np.unique(stored, return_inverse=True)
        # The workers of a loader already use all cores.
        threads = 1 if get_worker_info() is not None else None
        part = replace(self._selection, indices=wanted)
        several: list[str] = []
        images, _ = store.decode_array(part, workers=threads, animations=several)
        if several and not self._warned:
            self._warned = True
            store.warn_of_animations(several)
        return images if np.array_equal(stored, wanted) else images[position]

    @property
    def shards(self) -> tuple[int, ...]:
        """Number of these images in each of their shards, in order."""
        _, counts = np.unique(self._shard, return_counts=True)
        return tuple(counts.tolist())

    def fingerprint(self, labels: np.ndarray | None) -> str:
        """sha256 (hex) of all that decides pixels and labels, since the pixels are not decoded yet.

        It covers the content of the shards, the selected images, the preprocessing, and labels. An
        equal set on this disk has another fingerprint, that of its pixels.
        """
        selection = self._selection
        header = {
            "streamed": [self._files.shards[n].sha256 for n in np.unique(self._shard).tolist()],
            "shape": list(self.shape),
            "levels": selection.levels,
            "preprocessing": selection.preprocessing.hash,
            "labelled": labels is not None,
        }
        digest = hashlib.sha256(json.dumps(header).encode())
        _, number = np.unique(self._shard, return_inverse=True)
        for values in (number, self._records.offset[selection.indices], labels):
            if values is not None:
                digest.update(values.astype("<i8").tobytes())
        return digest.hexdigest()

    def read_ahead(
        self, requests: Iterator[_Request], rows_of: Callable[[_Request], np.ndarray]
    ) -> Iterator[_Request]:
        """The same requests, while the shards of later ones are fetched in the background.

        Requests are taken ahead as long as the cache folder has room for their shards, and for one
        more group: that of the requests being answered.
        """
        sizes = [shard.size for shard in self._files.shards]
        room = self._files.cache.limit - _largest(sizes, mixed_shards(self.shards))
        everything = len(self.shards)
        waiting: deque[tuple[_Request, list[int]]] = deque()
        wanted_by: Counter[int] = Counter()
        held = 0
        with done_ahead(self._files.fetch, DOWNLOADS) as want:
            for request in requests:
                shards = np.unique(self._shard[rows_of(request)]).tolist()
                waiting.append((request, shards))
                for shard in shards:
                    if not wanted_by[shard]:
                        held += sizes[shard]
                        want(shard)
                    wanted_by[shard] += 1
                while waiting and (
                    held > room or len(wanted_by) == everything or len(waiting) > _MOST_WAITING
                ):
                    request, shards = waiting.popleft()
                    yield request
                    for shard in shards:
                        wanted_by[shard] -= 1
                        if not wanted_by[shard]:
                            held -= sizes[shard]
                            del wanted_by[shard]
            for request, _ in waiting:
                yield request


def _require_room(shards: Sequence[TarIndex], limit: int, pattern: str) -> None:
    """Raise a DataError unless the cache has room for GROUPS_KEPT groups, or for all shards."""
    count = GROUPS_KEPT * mixed_shards([len(shard) for shard in shards])
    needed = _largest([shard.size for shard in shards], count)
    if needed > limit:
        raise DataError(
            f"{pattern}: expected data.cache_gib of at least {needed / 2**30:.3g}, which holds "
            f"{min(count, len(shards))} shards, found {limit / 2**30:.3g}"
        )


def _largest(sizes: Sequence[int], count: int) -> int:
    """Sum of the largest sizes."""
    return sum(sorted(sizes, reverse=True)[:count])
