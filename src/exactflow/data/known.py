"""Facts about published sets, which tell a set that bears such a name from one that may not.

Two downsampled ImageNets have one name: the PixelRNN download of 2016, PNG files (old), and the
labelled release of image-net.org, batch files (new), which is anti-aliased and easier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from exactflow.data.config import DataError, Split

Edition = Literal["old", "new", "n/a"]


@final
@dataclass(frozen=True)
class KnownSet:
    """What the published likelihoods of a data set were measured on.

    Attributes:
        shape: (C, H, W).
        levels: number of values a pixel can take.
        split: the split that papers report.
        images: number of images in it, by edition; "n/a" where there is only one.
        labelled: editions that come with labels.
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
    """The names a set may bear only if it is that set: imagenet64-old, imagenet64-new, cifar10."""
    return {
        name if edition == "n/a" else f"{name}-{edition}": (facts, edition)
        for name, facts in KNOWN_SETS.items()
        for edition in facts.images
    }


@final
@dataclass(frozen=True)
class Claim:
    """What a set that asks for a name is.

    Attributes:
        shape: (C, H, W) of its images.
        levels: number of values a pixel can take.
        stored: number of images in each stored split.
        taken: number of them that are read.
        labelled: stored splits that have labels.
        resized: whether images are changed in size or cut.
    """

    shape: tuple[int, int, int]
    levels: int
    stored: Mapping[Split, int]
    taken: Mapping[Split, int]
    labelled: frozenset[Split]
    resized: bool


def require_known(name: str, claim: Claim) -> None:
    """Refuse a published set's name for a set that is not that one; any other name is free.

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
    labels = "labels" if edition in facts.labelled else "no labels"
    expected_labels = frozenset({"train", split}) if edition in facts.labelled else frozenset()
    found_count = claim.stored.get(split, 0)
    checks: list[tuple[bool, str, object]] = [
        (claim.shape == facts.shape, f"images {facts.shape}", claim.shape),
        (claim.levels == facts.levels, f"{facts.levels} levels", claim.levels),
        (not claim.resized, "images as they are stored", "data.image_size"),
        (found_count == count, f"{count:,} stored {split} images", f"{found_count:,}"),
        (claim.taken.get(split) == count, "all of them, without data.limit", claim.taken),
        (
            claim.labelled & {"train", split} == expected_labels,
            f"{labels} in train and {split}",
            f"labels in {', '.join(sorted(claim.labelled)) or 'none'}",
        ),
    ]
    for holds, expected, found in checks:
        if not holds:
            raise DataError(f"id {name}: expected {expected}, found {found}")
