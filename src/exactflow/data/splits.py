"""Which stored images make up a split, and which split a name says.

One rule for folders, files, shards and splits of the hub: a name says a split if it holds one of
the words below, between characters that are no letters or where small letters turn into a capital.
`photos-train-0000`, `val_2`, `TestImages` and `testing` do; `latest` and `trainer` do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import TypeVar

import numpy as np

from exactflow.data.config import DataConfig, DataError, Split
from exactflow.data.order import permutation

# What a source stores of a split: so many images, or shards of so many images that stay whole.
Stored = int | Sequence[int]

_Item = TypeVar("_Item")

# Those of the `datasets` library, which reads eval as test, and what else people call them; the
# first that a hub's set has is taken.
SPLIT_WORDS: Mapping[str, Split] = {
    **dict.fromkeys(("train", "training", "trainset", "trainval"), "train"),
    **dict.fromkeys(
        ("validation", "valid", "val", "dev", "validset", "valset", "devset"), "validation"
    ),
    **dict.fromkeys(("test", "testing", "testset", "eval", "evaluation", "evalset"), "test"),
}
_BETWEEN_WORDS = re.compile(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])")

# What makes a name one that says nothing but the split. Names of sets depend on it, and those are
# kept in runs and cards: it stays as it was.
_ONLY_A_SPLIT = ("train", "validation", "valid", "val", "test")


def says_a_split(name: str) -> bool:
    """Whether a name says one split, or several."""
    return bool(_said(name))


def named_split(name: str) -> Split | None:
    """The split that a name says.

    Raises:
        DataError: it says two.
    """
    found = _said(name)
    if len(found) > 1:
        raise DataError(
            f"{name}: expected a name that says one split at most, found {' and '.join(found)}"
        )
    return SPLIT_WORDS[found[0]] if found else None


def named_splits(names: Iterable[str], where: str) -> dict[str, Split | None]:
    """The split that each of some names says, which lie together.

    Raises:
        DataError: a name says two, or the names have two words for one split, such as val and
            valid: are they one split or two?
    """
    words: dict[Split, str] = {}
    named: dict[str, Split | None] = {}
    for name in names:
        split = named[name] = named_split(name)
        if split is not None:
            (word,) = _said(name)
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
        names: of the items, in their order.
        where: they lie, for errors.
        kind: what they are, for errors.

    Raises:
        DataError: some say a split and others do not, or none is of the training split.
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
    """Raise a DataError if every one of some images says a split, and not all the same.

    A single `test.png` may be a picture of a test; where all images have such names, training on
    those of the test split is what nobody wants.
    """
    found: dict[Split, str] = {}
    for name in names:
        words = [word for part in PurePath(name).parts for word in _said(part)]
        if not words:
            return
        for word in words:
            found.setdefault(SPLIT_WORDS[word], name)
    if len(found) > 1:
        raise DataError(
            f"{where}: expected the images of one split, or split folders, found "
            f"{' and '.join(f'{name} ({split})' for split, name in found.items())}"
        )


def _said(name: str) -> list[str]:
    """The words for splits in a name; the first word for each split."""
    words = dict.fromkeys(word.lower() for word in _BETWEEN_WORDS.split(name))
    return list(
        {SPLIT_WORDS[word]: word for word in reversed(words) if word in SPLIT_WORDS}.values()
    )[::-1]


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
