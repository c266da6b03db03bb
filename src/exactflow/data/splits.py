"""Which stored images make up a split."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from exactflow.data.config import DataConfig, DataError, Split
from exactflow.data.order import permutation


def split_members(
    config: DataConfig, split: Split, counts: Mapping[Split, int]
) -> tuple[Split, np.ndarray]:
    """Which stored images make up a split.

    What the source does not store is cut from its training split, in the split order: test first,
    then validation, the rest is for training.

    Args:
        config: its fractions, seed and limit are used.
        split: the split asked for.
        counts: number of images in each stored split; "train" is always there.

    Returns:
        The stored split and the indices in it, ascending, int64.

    Raises:
        DataError: no image is left for the split.
    """
    home: Split = split if split in counts else "train"
    order = permutation(counts[home], "split", config.split_seed)
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
    if not len(order):
        raise DataError(
            f"{config.source}: expected images for the {split} split, found none: "
            f"{counts[home]} stored in {home}, test_fraction {config.test_fraction}, "
            f"validation_fraction {config.validation_fraction}"
        )
    return home, np.sort(order[: config.limit])
