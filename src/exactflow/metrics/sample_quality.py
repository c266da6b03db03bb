"""Samples against real images in a space of features: distance, quality, variety, memorisation.

All functions take vectors, features of `extractors` or flattened pixels, and compute in float64.
Balls are closed, and the nearest neighbours of a set within itself leave each point out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from exactflow.core.randomness import generator

_ROWS, _COLUMNS = 1024, 8192  # of a block of distances: 64 MiB
_SUBSET = 1000  # images in a subset for the kernel distance, as by custom


@final
@dataclass(frozen=True)
class KernelDistance:
    """The kernel distance: mean and standard deviation of its values over subsets."""

    mean: float
    std: float


@final
@dataclass(frozen=True)
class PrecisionRecall:
    """Fractions of samples that look real, and of real images that the samples reach."""

    precision: float
    recall: float


@final
@dataclass(frozen=True)
class DensityCoverage:
    """Density of real images around samples (1 for the same law), and the part that is covered."""

    density: float
    coverage: float


@final
@dataclass(frozen=True)
class Neighbours:
    """Nearest first: indices into the set that was searched, and Euclidean distances."""

    indices: Int64[Tensor, "n k"]
    distances: Float64[Tensor, "n k"]


@final
@dataclass(frozen=True)
class Memorisation:
    """Whether samples lie nearer to training images than held-out images do.

    Attributes:
        fraction: share of samples at most `threshold` away from a training image. For samples of
            the images' own law it is `percentile` / 100.
        percentile: percentile of the held-out images' distances that is the threshold.
        threshold: a distance.
        samples: nearest training image of each sample.
        held_out: nearest training image of each held-out image.
    """

    fraction: float
    percentile: float
    threshold: float
    samples: Neighbours
    held_out: Neighbours


def kernel_distance(
    a: Float[Tensor, "n dims"],
    b: Float[Tensor, "m dims"],
    *,
    subsets: int = 100,
    subset_size: int | None = None,
    seed: int = 0,
) -> KernelDistance:
    """KID: the unbiased squared maximum mean discrepancy with the kernel (x . y / dims + 1)^3.

    Binkowski et al., "Demystifying MMD GANs", arXiv 1801.01401, section 4. Its mean over draws of
    images is 0 for the same law, so estimates may be negative.

    Args:
        a: features of one set.
        b: of the other.
        subsets: pairs of subsets.
        subset_size: images drawn, without replacement, from each set; None is 1000, or half of the
            smaller set if that is less.
        seed: of the draws.

    Raises:
        ValueError: no subsets, or subsets of less than two images or more than there are.
    """
    _check((a, b), at_least=2)
    smaller = min(len(a), len(b))
    size = min(_SUBSET, max(2, smaller // 2)) if subset_size is None else subset_size
    if subsets < 1 or not 2 <= size <= smaller:
        raise ValueError(f"expected subsets >= 1 of 2 to {smaller} images, got {subsets} of {size}")
    source = generator(seed, "kernel distance")
    values = np.empty(subsets)
    for index in range(subsets):
        x, y = (s[torch.randperm(len(s), generator=source)[:size]].double() for s in (a, b))
        within = sum(_off_diagonal_mean(_cubic(s, s)) for s in (x, y))
        values[index] = within - 2 * float(_cubic(x, y).mean())
    return KernelDistance(float(values.mean()), float(values.std()))


def squared_radii(points: Float[Tensor, "n dims"], k: int) -> Float64[Tensor, " n"]:
    """Squared distance of each point from its k-th neighbour among the others.

    Raises:
        ValueError: not more than k points.
    """
    _check((points,), at_least=k + 1, k=k)
    return _nearest(points, points, k, leave_out_self=True)[0][:, -1]


def precision_recall(
    real: Float[Tensor, "n dims"],
    fake: Float[Tensor, "m dims"],
    k: int = 3,
    *,
    real_radii: Float64[Tensor, " n"] | None = None,
) -> PrecisionRecall:
    """Fractions of each set inside the other's balls up to the k-th neighbour.

    Kynkaanniemi et al., arXiv 1904.06991, equations 1 and 2.

    Args:
        real: features of real images.
        fake: of samples.
        k: neighbours in a ball.
        real_radii: `squared_radii(real, k)`, where they are known.

    Raises:
        ValueError: not more than k images in a set.
    """
    _check((real, fake), at_least=k + 1, k=k)
    real_radii = squared_radii(real, k) if real_radii is None else real_radii
    precision, recall = (
        float((_inside(points, centres, radii)[0] > 0).double().mean())
        for points, centres, radii in (
            (fake, real, real_radii),
            (real, fake, squared_radii(fake, k)),
        )
    )
    return PrecisionRecall(precision, recall)


def density_coverage(
    real: Float[Tensor, "n dims"],
    fake: Float[Tensor, "m dims"],
    k: int = 5,
    *,
    real_radii: Float64[Tensor, " n"] | None = None,
) -> DensityCoverage:
    """Density and coverage with balls around real images up to their k-th neighbours.

    Naeem et al., arXiv 2002.09797, equations 3 and 4. Arguments as of `precision_recall`.

    Raises:
        ValueError: not more than k real images, or no others.
    """
    _check((real,), at_least=k + 1, k=k)
    _check((fake,), at_least=1)
    around, within = _inside(
        fake, real, squared_radii(real, k) if real_radii is None else real_radii
    )
    return DensityCoverage(float(around.double().mean()) / k, float((within > 0).double().mean()))


def nearest_neighbours(
    points: Float[Tensor, "n dims"], training: Float[Tensor, "m dims"], k: int = 1
) -> Neighbours:
    """The k nearest training vectors of each point, by blocks: (n, k).

    Raises:
        ValueError: fewer than k training vectors, or no points.
    """
    _check((points,), at_least=1)
    _check((training,), at_least=k, k=k)
    indices = _nearest(points, training, k)[1]
    chosen = [
        (training[found].double() - points[rows, None].double()).norm(dim=2)
        for rows, found in ((slice(s, s + _ROWS), indices[s : s + _ROWS]) for s in _starts(points))
    ]
    return Neighbours(indices, torch.cat(chosen))  # distances of differences: 0 for a copy


def memorisation(
    samples: Float[Tensor, "n dims"],
    training: Float[Tensor, "m dims"],
    held_out: Float[Tensor, "h dims"] | Neighbours,
    percentile: float = 1.0,
) -> Memorisation:
    """Distances to the nearest training image, of samples against those of held-out images.

    Args:
        samples: features of samples.
        training: of training images.
        held_out: of held-out images; or, where they are known, their nearest training images.
        percentile: percentile of the held-out images' distances that is the threshold.

    Raises:
        ValueError: an empty set, or a percentile outside 0 .. 100.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"expected a percentile of 0 to 100, got {percentile}")
    near = nearest_neighbours(samples, training)
    known = isinstance(held_out, Neighbours)
    usual = held_out if known else nearest_neighbours(held_out, training)
    threshold = float(np.percentile(usual.distances.numpy(), percentile))
    fraction = float((near.distances <= threshold).double().mean())
    return Memorisation(fraction, percentile, threshold, near, usual)


def _check(sets: tuple[Tensor, ...], *, at_least: int, k: int = 1) -> None:
    """Raise ValueError for k < 1, too small sets, or features that are not finite."""
    if k < 1:
        raise ValueError(f"expected k >= 1 neighbours, got {k}")
    for each in sets:
        if len(each) < at_least:
            raise ValueError(f"expected {at_least} images or more, got {len(each)}")
        if not bool(each.isfinite().all()):
            raise ValueError("expected finite features, got some that are not")


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal_mean(kernel: Tensor) -> float:
    return float((kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1)))


def _starts(points: Tensor) -> range:
    return range(0, len(points), _ROWS)


def _blocks(points: Tensor, others: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Squared distances of some points and some others: first row, first column, block."""
    for row in _starts(points):
        x = points[row : row + _ROWS].double()
        for column in range(0, len(others), _COLUMNS):
            y = others[column : column + _COLUMNS].double()
            norms = x.square().sum(1)[:, None] + y.square().sum(1)
            yield row, column, (norms - 2 * x @ y.T).clamp_(min=0)


def _nearest(
    points: Tensor, others: Tensor, k: int, *, leave_out_self: bool = False
) -> tuple[Tensor, Tensor]:
    """Squared distances and indices, (n, k) each, nearest first."""
    distances = torch.full((len(points), k), torch.inf, dtype=torch.float64)
    indices = torch.zeros(len(points), k, dtype=torch.int64)
    for row, column, block in _blocks(points, others):
        rows = slice(row, row + len(block))
        if leave_out_self:
            own = torch.arange(rows.start, rows.stop)[:, None]
            here = torch.arange(column, column + block.shape[1])
            block = block.masked_fill(here == own, torch.inf)
        near, columns = block.topk(min(k, block.shape[1]), largest=False)
        both = torch.cat([distances[rows], near], dim=1)
        distances[rows], order = both.topk(k, largest=False)
        indices[rows] = torch.cat([indices[rows], column + columns], dim=1).gather(1, order)
    return distances, indices


def _inside(points: Tensor, centres: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
    """Number of balls around each point, and number of points in each ball."""
    around = torch.zeros(len(points), dtype=torch.int64)
    within = torch.zeros(len(centres), dtype=torch.int64)
    for row, column, block in _blocks(points, centres):
        inside = block <= radii[column : column + block.shape[1]]
        around[row : row + len(block)] += inside.sum(1)
        within[column : column + block.shape[1]] += inside.sum(0)
    return around, within
