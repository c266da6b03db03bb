"""Facts about published sets, which a set must have to bear one of their names.

Two downsampled ImageNets have one name: the PixelRNN download of 2016, PNG files (old), and the
labelled release of image-net.org, batch files (new), which is anti-aliased and easier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from exactflow.data.config import DataConfig, DataError, Split
from exactflow.data.records import Source
from exactflow.data.store import Selection

Edition = Literal["old", "new", "n/a"]


@final
@dataclass(frozen=True)
class KnownSet:
    """The data set that published likelihoods were measured on.

    Attributes:
        shape: (C, H, W).
        levels: number of values a pixel can take.
        split: the split that papers report.
        images: number of images in it, by edition; "n/a" where there is only one.
        labelled: editions that have labels.
    """

    shape: tuple[int, int, int]
    levels: int
    split: Split
    images: Mapping[Edition, int]
    labelled: frozenset[Edition]


def _downsampled_imagenet(size: int) -> KnownSet:
    images: Mapping[Edition, int] = {"old": 49_999, "new": 50_000}
    return KnownSet((3, size, size), 256, "validation", images, frozenset({"new"}))


KNOWN_SETS: Mapping[str, KnownSet] = {
    "cifar10": KnownSet((3, 32, 32), 256, "test", {"n/a": 10_000}, frozenset({"n/a"})),
    "imagenet32": _downsampled_imagenet(32),
    "imagenet64": _downsampled_imagenet(64),
}


def known_names() -> dict[str, tuple[KnownSet, Edition]]:
    """All reserved names, such as imagenet64-old and cifar10, with their facts and edition."""
    return {
        name if edition == "n/a" else f"{name}-{edition}": (facts, edition)
        for name, facts in KNOWN_SETS.items()
        for edition in facts.images
    }


def require_known(
    name: str, config: DataConfig, source: Source, selections: Mapping[Split, Selection]
) -> None:
    """Refuse a published set's name for a set that is not that one; any other name is free.

    Args:
        name: the name asked for.
        config: the settings it is read with.
        source: the stored set.
        selections: the images to read of every split; "train" is there.

    Raises:
        DataError: a fact does not fit; or the name leaves open which of two editions is meant.
    """
    if name in KNOWN_SETS and name not in known_names():
        choices = " or ".join(f"{name}-{edition}" for edition in KNOWN_SETS[name].images)
        raise DataError(f"id: expected {choices}, since two sets are called {name}, found {name}")
    if name not in known_names():
        return
    facts, edition = known_names()[name]
    split, count = facts.split, facts.images[edition]
    train = selections["train"]
    stored = len(source.splits[split].records) if split in source.splits else 0
    taken = {each: len(selection.indices) for each, selection in selections.items()}
    found_labels = {each for each, part in source.splits.items() if part.labels is not None}
    labels = "labels" if edition in facts.labelled else "no labels"
    expected_labels: set[str] = {"train", split} if edition in facts.labelled else set()
    checks: list[tuple[bool, str, object]] = [
        (config.on_error == "raise", "on_error=raise, since that set is complete", "skip"),
        (train.shape == facts.shape, f"images {facts.shape}", train.shape),
        (train.levels == facts.levels, f"{facts.levels} levels", train.levels),
        (config.image_size is None, "images as they are stored", "data.image_size"),
        (stored == count, f"{count:,} stored {split} images", f"{stored:,}"),
        (taken.get(split) == count, "all of them, without data.limit", taken),
        (
            found_labels & {"train", split} == expected_labels,
            f"{labels} in train and {split}",
            f"labels in {', '.join(sorted(found_labels)) or 'none'}",
        ),
    ]
    for holds, expected, found in checks:
        if not holds:
            raise DataError(f"id {name}: expected {expected}, found {found}")
