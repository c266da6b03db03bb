"""Random changes of training images, as pure functions of (seed, epoch, image)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

import numpy as np

from exactflow.data.order import coin_flips, uniforms


@final
@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images; images that are scored are never changed.

    Attributes:
        flip: mirror left to right with probability 1/2.
        translate: shift by round(U(-translate, translate)) pixels, independently along each axis:
            4.5 gives -4 .. 4, all equally likely.
        padding: what fills the space: the nearest pixel, or the image mirrored at its border.

    >>> Augmentation(translate=1.0).of_epoch(count=4, seed=0, epoch=0).shifts.shape
    (4, 2)
    """

    flip: bool = False
    translate: float = 0.0
    padding: Literal["edge", "reflect"] = "edge"

    def __post_init__(self) -> None:
        """Raise ValueError for a field out of its range."""
        if not 0 <= self.translate < math.inf:
            raise ValueError(f"expected translate >= 0, got {self.translate!r}")
        if self.padding not in ("edge", "reflect"):
            raise ValueError(f'expected padding "edge" or "reflect", got {self.padding!r}')

    def of_epoch(self, count: int, seed: int, epoch: int) -> AugmentedEpoch:
        """The changes of each of `count` images in an epoch."""
        flips = coin_flips(count, seed, epoch) if self.flip else None
        shifts = None
        if self.translate:
            draws = [uniforms(count, seed, epoch, axis) for axis in (0, 1)]
            scaled = (2 * np.stack(draws, axis=1) - 1) * self.translate
            shifts = np.rint(scaled).astype(np.int64)
        return AugmentedEpoch(flips, shifts, self.padding)


NO_AUGMENTATION = Augmentation()


@final
@dataclass(frozen=True, eq=False)
class AugmentedEpoch:
    """Flips, bool (n,), and shifts down and to the right, int64 (n, 2), of n images, or None."""

    flips: np.ndarray | None
    shifts: np.ndarray | None
    padding: Literal["edge", "reflect"]

    def at(self, indices: np.ndarray) -> AugmentedEpoch:
        """The changes of these images only."""
        flips = None if self.flips is None else self.flips[indices]
        shifts = None if self.shifts is None else self.shifts[indices]
        return AugmentedEpoch(flips, shifts, self.padding)

    def apply(self, images: np.ndarray) -> np.ndarray:
        """The changed images (n, C, H, W); may overwrite `images`."""
        if self.flips is not None:
            images[self.flips] = images[self.flips, ..., ::-1]
        if self.shifts is None:
            return images
        reach = int(np.abs(self.shifts).max(initial=0))
        height, width = images.shape[2:]
        around = [(0, 0), (0, 0), (reach, reach), (reach, reach)]
        padded = np.pad(images, around, mode=self.padding)
        for row, (down, right) in enumerate(reach - self.shifts):
            images[row] = padded[row, :, down : down + height, right : right + width]
        return images
