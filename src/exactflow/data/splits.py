"""Which stored images make up a split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from exactflow.data.config import DataConfig, DataError, Split
from exactflow.data.order import permutation

# What a source stores of a split: so many images, or shards of so many images that stay whole.
Stored = int | Sequence[int]


def images_of(stored: Stored) -> int:
    """Number of images."""
    return stored if isinstance(stored, int) else sum(stored)


def split_members(
    config: DataConfig, split: Split, counts: Mapping[Split, Stored]
) -> tuple[Split, np.ndarray]:
    """Which stored images make up a split.

    What the source does not store is cut from its training split, in the split order: test first,
    then validation, the rest is for training. Where shards stay whole, it is an order of shards,
    and the fractions are of their number: a small split or limit needs few of them.

    Args:
        config: its fractions, seed and limit are used.
        split: the split asked for.
        counts: what is in each stored split; "train" is always there.

    Returns:
        The stored split and the indices in it, ascending, int64.

    Raises:
        DataError: no image is left for the split.
    """
    home: Split = split if split in counts else "train"
    stored = counts[home]
    units = stored if isinstance(stored, int) else len(stored)
    order = permutation(units, "split", config.split_seed)
    if home == "train":
        cut_test = 0 if "test" in counts else round(config.test_fraction * len(order))
        cut_both = cut_test
        if "validation" not in counts:
            cut_both += round(config.validation_fraction * len(order))
        bounds = {
            "test": slice(0, cut_test),
            "validation": slice(cut_test, cut_both),
            "train": slice(cut_both, None),
        }
        order = order[bounds[split]]
    if not isinstance(stored, int):
        order = _rows(stored, order)
    if not len(order):
        raise DataError(
            f"{config.source}: expected images for the {split} split, found none: "
            f"{_described(stored)} stored in {home}, test_fraction {config.test_fraction}, "
            f"validation_fraction {config.validation_fraction}"
        )
    return home, np.sort(order[: config.limit])


def _rows(sizes: Sequence[int], shards: np.ndarray) -> np.ndarray:
    """The images of some shards, those of each in stored order, int64."""
    starts = np.cumsum([0, *sizes]).tolist()
    ranges = [np.arange(starts[shard], starts[shard + 1]) for shard in shards.tolist()]
    return np.concatenate([np.empty(0, dtype=np.int64), *ranges])


def _described(stored: Stored) -> str:
    return str(stored) if isinstance(stored, int) else f"{sum(stored)} in {len(stored)} shards"
