"""Which stored images make up a split, and which split a name says.

The rule for folders, files, shards and splits of the hub: a name says a split if it contains one of
the words below, delimited by characters other than letters or by a change from small letters to a
capital. `photos-train-0000`, `val_2`, `TestImages` and `testing` do; `latest` and `trainer` do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import TypeVar

import numpy as np

from exactflow.data.config import DataConfig, DataError, Split
from exactflow.data.order import permutation

# Size of a stored split: its number of images, or that of each shard, which is never divided.
Stored = int | Sequence[int]

_Item = TypeVar("_Item")

# The words of the `datasets` library, which reads eval as test, and other common ones; of several
# in a set of the hub, the first here is taken.
SPLIT_WORDS: Mapping[str, Split] = {
    **dict.fromkeys(("train", "training", "trainset", "trainval"), "train"),
    **dict.fromkeys(
        ("validation", "valid", "val", "dev", "validset", "valset", "devset"), "validation"
    ),
    **dict.fromkeys(("test", "testing", "testset", "eval", "evaluation", "evalset"), "test"),
}
_BETWEEN_WORDS = re.compile(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])")

# Words of names that say nothing but a split. The names of sets in saved runs and cards depend on
# them, so this list does not change.
_ONLY_A_SPLIT = ("train", "validation", "valid", "val", "test")


def says_a_split(name: str) -> bool:
    """Whether a name says one split, or several."""
    return bool(_split_words(name))


def named_split(name: str) -> Split | None:
    """The split that a name says, if any. Raises a DataError if it says two."""
    found = _split_words(name)
    if len(found) > 1:
        raise DataError(
            f"{name}: expected a name that says one split at most, found {' and '.join(found)}"
        )
    return SPLIT_WORDS[found[0]] if found else None


def named_splits(names: Iterable[str], where: str) -> dict[str, Split | None]:
    """The split that each of the names in one place says, if any.

    Raises:
        DataError: a name says two, or the names have two words for one split, such as val and
            valid, which may be one split or two.
    """
    words: dict[Split, str] = {}
    named: dict[str, Split | None] = {}
    for name in names:
        split = named[name] = named_split(name)
        if split is not None:
            (word,) = _split_words(name)
            if words.setdefault(split, word) != word:
                raise DataError(
                    f"{where}: expected one word for the {split} split, found {words[split]} and "
                    f"{word} ({name})"
                )
    return named


def by_split(names: Mapping[_Item, str], where: str, kind: str) -> dict[Split, list[_Item]]:
    """Files, or shards, by the split that the name of each says.

    Where no name says a split, or all say the same, all together are the training split.

    Args:
        names: names of the items, in their order.
        where: place of the items, for errors.
        kind: what the items are, for errors.

    Raises:
        DataError: only some say a split, or none is of the training split.
    """
    named = named_splits(names.values(), where)
    if len(set(named.values())) <= 1:
        return {"train": list(names)}
    groups: dict[Split, list[_Item]] = {}
    for item, name in names.items():
        split = named[name]
        if split is None:
            raise DataError(
                f"{item}: expected a name that says train, validation or test, like those of the "
                f"other {kind}"
            )
        groups.setdefault(split, []).append(item)
    if "train" not in groups:
        raise DataError(
            f"{where}: expected {kind} of the training split too, found {' and '.join(groups)} only"
        )
    return groups


def is_split_word(name: str) -> bool:
    """Whether a name is the word for a split and nothing else."""
    return name.lower() in SPLIT_WORDS


def is_only_a_split(name: str) -> bool:
    """Whether a folder, or a file without its suffix, has no name of its own: train, val-0, ..."""
    return name.lower().split("-")[0] in _ONLY_A_SPLIT


def refuse_mixed_splits(names: Iterable[str], where: str) -> None:
    """Raise a DataError if the names of all images say a split, and not all the same one.

    A single `test.png` may be an image of a test; where all images have such names, those of the
    test split would be trained on.
    """
    found: dict[Split, str] = {}
    for name in names:
        words = [word for part in PurePath(name).parts for word in _split_words(part)]
        if not words:
            return
        for word in words:
            found.setdefault(SPLIT_WORDS[word], name)
    if len(found) > 1:
        raise DataError(
            f"{where}: expected the images of one split, or split folders, found "
            f"{' and '.join(f'{name} ({split})' for split, name in found.items())}"
        )


def _split_words(name: str) -> list[str]:
    """The words for splits in a name; the first word for each split."""
    found: dict[Split, str] = {}
    for word in _BETWEEN_WORDS.split(name):
        if word.lower() in SPLIT_WORDS:
            found.setdefault(SPLIT_WORDS[word.lower()], word.lower())
    return list(found.values())


def split_members(
    config: DataConfig, split: Split, counts: Mapping[Split, Stored]
) -> tuple[Split, np.ndarray]:
    """Which stored images make up a split.

    A split that the source does not store is cut from its training split, in the split order: test
    first, then validation; the rest is for training. Shards are not divided: the order is one of
    shards, and the fractions are of their number, so that a small split or limit needs few of them.

    Args:
        config: gives the fractions, the seed and the limit.
        split: the split asked for.
        counts: size of each stored split; "train" is always there.

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
