"""A conditional in closed form both ways: splines of rational functions.

Durkan et al., Neural Spline Flows, arXiv 1906.04032, section 3.1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from exactflow.core.conditional import SOFTPLUS_OFFSET, LinearlyGuided, Numbers, Theta
from exactflow.core.shapes import PerSample, Tokens

BOUND = 4.0  # B: splines are the identity beyond
LEAST = 1e-2  # share of a bin, and slope at a knot, at the least


@final
@dataclass(frozen=True)
class Spline(LinearlyGuided):
    """z = g(x), g a monotone rational-quadratic spline on -B .. B and the identity outside.

    theta is, for all numbers of the token in turn, ln of the widths and of the heights of the bins,
    not normalised, and what gives the slopes at inner knots by softplus. Unlike that of a mixture,
    the inverse is in closed form.

    Attributes:
        dim: numbers of a token.
        bins: K of them.
    """

    dim: int
    bins: int = 8

    @property
    def size(self) -> int:
        return (3 * self.bins - 1) * self.dim

    @property
    def start(self) -> Float[Tensor, " size"]:
        return torch.zeros(self.size)  # the identity

    def constrain(self, raw: Numbers) -> Numbers:
        """See `Conditional.constrain`: any numbers will do."""
        return raw

    def forward(self, x: Tokens, theta: Theta) -> tuple[Tokens, PerSample]:
        knots, images, slopes = self._knots(theta)
        left, width, bottom, height, first, last, inside = _bin(x, knots, images, slopes)
        place = ((x - left) / width).clamp(0, 1)
        slope, mixed = height / width, place * (1 - place)
        below = slope + (first + last - 2 * slope) * mixed
        z = bottom + height * (slope * place**2 + first * mixed) / below
        rise = last * place**2 + 2 * slope * mixed + first * (1 - place) ** 2
        log_derivative = 2 * slope.log() + rise.log() - 2 * below.log()
        log_derivative = torch.where(inside, log_derivative, torch.zeros_like(x))
        return torch.where(inside, z, x), log_derivative.flatten(1).sum(1)

    @torch.no_grad()
    def inverse(self, z: Tokens, theta: Theta) -> Tokens:
        """See `Conditional.inverse`: the root of a quadratic, in float64. Carries no gradient."""
        knots, images, slopes = self._knots(theta.double())
        y = z.double()
        bottom, height, left, width, first, last, inside = _bin(y, images, knots, slopes)
        slope, above = height / width, (y - bottom).clamp(min=0).minimum(height)
        bent = above * (first + last - 2 * slope)
        a, b, c = height * (slope - first) + bent, height * first - bent, -slope * above
        place = 2 * c / (-b - (b * b - 4 * a * c).clamp(min=0).sqrt())
        return torch.where(inside, left + place * width, y).to(z.dtype)

    def named(self, theta: Numbers) -> Mapping[str, Tensor]:
        width, height, slope = self._parts(theta)
        return {"log_width": width, "log_height": height, "raw_slope": slope}

    def _parts(self, theta: Tensor) -> Sequence[Tensor]:
        counts = (self.bins, self.bins, self.bins - 1)
        return theta.unflatten(-1, (-1, self.dim)).split(counts, dim=-2)

    def _knots(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Places of the knots and their images, K + 1 in increasing order, and slopes there."""
        width, height, slope = self._parts(theta)
        share = 1 - LEAST * self.bins
        sizes = [2 * BOUND * (LEAST + share * r.softmax(-2)) for r in (width, height)]
        knots, images = (F.pad(size.cumsum(-2), (0, 0, 1, 0)) - BOUND for size in sizes)
        inner = LEAST + (1 - LEAST) * F.softplus(slope + SOFTPLUS_OFFSET)
        return knots, images, F.pad(inner, (0, 0, 1, 1), value=1.0)


def _bin(value: Tensor, edges: Tensor, others: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
    """The bin of each value by its edges: (left, width) of the edges and of the others, slopes at
    both ends, and whether there is one.
    """
    index = (
        (value[..., None, :] >= edges).sum(-2, keepdim=True).sub(1).clamp(0, edges.shape[-2] - 2)
    )
    left, right = (edges.gather(-2, index + k)[..., 0, :] for k in (0, 1))
    bottom, top = (others.gather(-2, index + k)[..., 0, :] for k in (0, 1))
    first, last = (slopes.gather(-2, index + k)[..., 0, :] for k in (0, 1))
    return left, right - left, bottom, top - bottom, first, last, value.abs() < BOUND
