"""Random orders and draws that are pure functions of their key.

All functions use raw Philox words: unlike `Generator.permutation`, whose stream NumPy may change
between versions (NEP 19), raw words of a seeded bit generator never change. A split, an epoch's
order and its flips are therefore the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

# Each use has its own stream, so that equal seeds do not give equal orders.
_STREAMS = {"split": 0, "epoch": 1, "flip": 2, "translate": 3, "shard": 4}

# Images of as many shards are mixed with each other as hold MIXED_IMAGES, and of MIXED_SHARDS at
# least.
MIXED_IMAGES = 10_000
MIXED_SHARDS = 4


def permutation(count: int, stream: Literal["split", "epoch", "shard"], *key: int) -> np.ndarray:
    """A permutation of 0 .. count-1, int64, a function of the stream and the key (each >= 0)."""
    return np.argsort(_words(count, stream, *key), kind="stable").astype(np.int64)


def epoch_order(shards: Sequence[int] | None, count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which the `count` images of a set are shown in an epoch, int64.

    Without shards it is a permutation of all images. Images in shards, of `shards` images each, are
    shown group by group: the shards are permuted and taken `mixed_shards` at a time, and the images
    of a group are permuted. Every image comes once; both permutations are functions of
    (seed, epoch), so training resumes without any saved state or buffer.
    """
    if shards is None:
        return permutation(count, "epoch", seed, epoch)
    group = np.empty(len(shards), dtype=np.int64)
    group[permutation(len(shards), "shard", seed, epoch)] = np.arange(len(shards)) // mixed_shards(
        shards
    )
    words = _words(count, "epoch", seed, epoch)
    return np.lexsort((words, np.repeat(group, shards))).astype(np.int64)


def mixed_shards(shards: Sequence[int]) -> int:
    """Number of shards that are mixed with each other, given the number of images in each."""
    return max(MIXED_SHARDS, -(-MIXED_IMAGES * len(shards) // max(1, sum(shards))))


def coin_flips(count: int, *key: int) -> np.ndarray:
    """One fair bool per index; entry i depends on the key and i alone."""
    return (_words(count, "flip", *key) >> np.uint64(63)).astype(bool)


def uniforms(count: int, *key: int) -> np.ndarray:
    """One float64 in [0, 1) per index, for shifts; entry i depends on the key and i alone."""
    return (_words(count, "translate", *key) >> np.uint64(11)) * 2.0**-53


def _words(count: int, stream: str, *key: int) -> np.ndarray:
    seeds = np.random.SeedSequence([_STREAMS[stream], *key])
    words = np.random.Philox(seeds).random_raw(count)
    return np.asarray(words, dtype=np.uint64)
