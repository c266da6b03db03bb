"""Random orders and draws that are pure functions of their key.

All functions use raw Philox words: unlike `Generator.permutation`, whose stream NumPy may change
between versions (NEP 19), raw words of a seeded bit generator never change. A split, an epoch's
order and its flips are therefore the same on every machine.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

# Each use draws from a stream of its own, so that equal seeds do not make equal orders.
_STREAMS = {"split": 0, "epoch": 1, "flip": 2, "translate": 3}
_Stream = Literal["split", "epoch", "flip", "translate"]


def permutation(count: int, stream: Literal["split", "epoch"], *key: int) -> np.ndarray:
    """A permutation of 0 .. count-1, int64, a function of the stream and the key (each >= 0)."""
    return np.argsort(_words(count, stream, *key), kind="stable").astype(np.int64)


def coin_flips(count: int, *key: int) -> np.ndarray:
    """One fair bool per index; entry i depends on the key and i alone."""
    return (_words(count, "flip", *key) >> np.uint64(63)).astype(bool)


def uniforms(count: int, stream: Literal["translate"], *key: int) -> np.ndarray:
    """One float64 in [0, 1) per index; entry i depends on the stream, the key and i alone."""
    return (_words(count, stream, *key) >> np.uint64(11)) * 2.0**-53


def _words(count: int, stream: _Stream, *key: int) -> np.ndarray:
    seeds = np.random.SeedSequence([_STREAMS[stream], *key])
    words = np.random.Philox(seeds).random_raw(count)
    return np.asarray(words, dtype=np.uint64)
