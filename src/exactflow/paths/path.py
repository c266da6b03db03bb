"""Gaussian paths from noise to data: x_t = alpha(t) x0 + sigma(t) eps, with their rates.

Library time runs from noise to data: t = 0 is noise, t = 1 is data, whatever the source says
(diffusion papers mostly run the other way). Here x0 is the data, as in the diffusion literature.
Flow Matching, arXiv 2210.02747, section 4; Score SDE, arXiv 2011.13456, appendix C.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

SINGULAR_MARGIN = 1e-5  # how far short of a singular end a path is followed
BISECTIONS = 64  # halvings of [0, 1]: more than float64 resolves


@final
@dataclass(frozen=True)
class Point:
    """A path at times t: tensors of t's shape."""

    alpha: Float[Tensor, "*times"]
    sigma: Float[Tensor, "*times"]
    d_alpha: Float[Tensor, "*times"]
    d_sigma: Float[Tensor, "*times"]

    @property
    def log_snr(self) -> Float[Tensor, "*times"]:
        """2 ln(alpha / sigma); infinite where either is 0."""
        return 2 * (self.alpha.log() - self.sigma.log())

    @property
    def delta(self) -> Float[Tensor, "*times"]:
        """d_alpha sigma - alpha d_sigma: positive wherever the log-SNR rises."""
        return self.d_alpha * self.sigma - self.alpha * self.d_sigma


class Path(ABC):
    """alpha(t) and sigma(t), the factors of data and noise; the log-SNR rises with t."""

    @abstractmethod
    def at(self, t: Float[Tensor, "*times"]) -> Point:
        """Factors and rates at t in [0, 1], in t's dtype; rates may be infinite outside `span`."""

    @abstractmethod
    def time_of(self, log_snr: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        """The t with at(t).log_snr == log_snr, for a log-SNR that the path reaches."""

    @property
    @abstractmethod
    def span(self) -> tuple[float, float]:
        """First and last time between which the path is followed: all rates are finite there."""


class WholePath(Path, ABC):
    """A path whose rates are finite at both ends."""

    @property
    def span(self) -> tuple[float, float]:
        return 0.0, 1.0


@final
@dataclass(frozen=True)
class Straight(WholePath):
    """alpha = t, sigma = 1 - (1 - sigma_min) t: optimal transport (arXiv 2210.02747, eq. 20).

    Attributes:
        sigma_min: noise left at t = 1; 0 gives the straight path between noise and data.

    Example:
        >>> point = Straight().at(torch.tensor(0.25))
        >>> float(point.alpha), float(point.sigma), float(point.d_sigma)
        (0.25, 0.75, -1.0)
    """

    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError unless sigma_min lies in [0, 1)."""
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"expected sigma_min in [0, 1), got {self.sigma_min}")

    def at(self, t: Float[Tensor, "*times"]) -> Point:
        one = torch.ones_like(t)
        sigma = (1 - t) + self.sigma_min * t  # exact near t = 1
        return Point(t, sigma, one, (self.sigma_min - 1) * one)

    def time_of(self, log_snr: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        return 1 / (torch.exp(-log_snr / 2) + (1 - self.sigma_min))


@final
@dataclass(frozen=True)
class Polynomial(WholePath):
    """alpha = t^n, sigma = 1 - t^n."""

    n: float = 2.0

    def __post_init__(self) -> None:
        """Raise ValueError unless n >= 1: the rate at t = 0 would be infinite."""
        if not self.n >= 1:
            raise ValueError(f"expected an exponent of at least 1, got {self.n}")

    def at(self, t: Float[Tensor, "*times"]) -> Point:
        alpha, rate = t**self.n, self.n * t ** (self.n - 1)
        return Point(alpha, 1 - alpha, rate, -rate)

    def time_of(self, log_snr: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        return torch.sigmoid(log_snr / 2) ** (1 / self.n)


@final
@dataclass(frozen=True)
class LinearVP(Path):
    """alpha = t, sigma = sqrt(1 - t^2)."""

    @property
    def span(self) -> tuple[float, float]:
        return 0.0, 1 - SINGULAR_MARGIN

    def at(self, t: Float[Tensor, "*times"]) -> Point:
        sigma = ((1 - t) * (1 + t)).sqrt()
        return Point(t, sigma, torch.ones_like(t), -t / sigma)

    def time_of(self, log_snr: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        return torch.sigmoid(log_snr).sqrt()


@final
@dataclass(frozen=True)
class Cosine(WholePath):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""

    def at(self, t: Float[Tensor, "*times"]) -> Point:
        quarter = math.pi / 2
        alpha = torch.sin(quarter * t)
        sigma = torch.sin(quarter * (1 - t))  # 0 at t = 1, where the cosine is 6e-17
        return Point(alpha, sigma, quarter * sigma, -quarter * alpha)

    def time_of(self, log_snr: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        return torch.exp(log_snr / 2).atan() * (2 / math.pi)


@final
@dataclass(frozen=True)
class VariancePreserving(Path):
    """alpha = exp(-T/2) with dT = -(beta_min + (beta_max - beta_min) (1 - t)) dt, T(1) = 0.

    The VP diffusion (arXiv 2011.13456, eq. 33) as arXiv 2210.02747, eq. 19, uses it.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        """Raise ValueError unless 0 < beta_min < beta_max."""
        if not 0 < self.beta_min < self.beta_max:
            raise ValueError(
                f"expected 0 < beta_min < beta_max, got {self.beta_min}, {self.beta_max}"
            )

    @property
    def span(self) -> tuple[float, float]:
        return 0.0, 1 - SINGULAR_MARGIN

    def at(self, t: Float[Tensor, "*times"]) -> Point:
        s, slope = 1 - t, self.beta_max - self.beta_min
        integral = s * (self.beta_min + 0.5 * slope * s)
        return _variance_preserving(-0.5 * integral, 0.5 * (self.beta_min + slope * s))

    def time_of(self, log_snr: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        integral, slope = F.softplus(-log_snr), self.beta_max - self.beta_min
        root = (self.beta_min**2 + 2 * slope * integral).sqrt()
        return 1 - 2 * integral / (self.beta_min + root)


@final
@dataclass(frozen=True)
class DiscreteBetas(Path):
    """A discrete chain in continuous time: ln alpha-bar is linear between its steps.

    Step i = 0 .. T-1, nearest to the data first, stands at t = 1 - (i + 1) / T; the data at t = 1.
    That is the VP diffusion whose rate is constant within a step.

    Attributes:
        betas: noise variance added by each step, in (0, 1).
    """

    betas: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raise ValueError unless there are betas, all in (0, 1)."""
        if not self.betas or not (min(self.betas) > 0 and max(self.betas) < 1):
            raise ValueError("expected at least one beta, all of them in (0, 1)")

    @property
    def span(self) -> tuple[float, float]:
        return 0.0, 1 - 1 / len(self.betas)

    @cached_property
    def _log_alpha(self) -> Float[Tensor, " knots"]:
        """ln alpha at t = 1, 1 - 1/T, .. 0, float64 on the CPU."""
        betas = torch.tensor(self.betas, dtype=torch.float64)
        return F.pad(0.5 * torch.log1p(-betas).cumsum(0), (1, 0))

    def step_of(self, t: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        """The step at time t, a real number: -1 at the data, T - 1 at t = 0."""
        return (1 - t) * len(self.betas) - 1

    def at(self, t: Float[Tensor, "*times"]) -> Point:
        knots, place = self._log_alpha.to(t), self.step_of(t) + 1
        below = place.floor().clamp(0, len(self.betas) - 1)
        index = below.nan_to_num().long()  # a time that is NaN gives NaN
        left, right = knots[index], knots[index + 1]
        log_alpha = left + (place - below) * (right - left)
        return _variance_preserving(log_alpha, (left - right) * len(self.betas))

    def time_of(self, log_snr: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        log_alpha, knots = -0.5 * F.softplus(-log_snr), self._log_alpha.to(log_snr)
        above = torch.searchsorted(-knots, -log_alpha).clamp(1, len(self.betas))
        left, right = knots[above - 1], knots[above]
        return 1 - (above - 1 + (log_alpha - left) / (right - left)) / len(self.betas)


@final
@dataclass(frozen=True)
class InterpolatedCosine(WholePath):
    """Variance preserving, with a cosine log-SNR whose resolution shift changes over time.

    At t = 0 the schedule is shifted by 2 ln(low / size), at t = 1 by 2 ln(high / size), linearly
    between (Simple Diffusion, arXiv 2301.11093, eq. 5; HDiT, arXiv 2401.11605, section 4.1). Each
    shifted schedule is cut so that the noise level sigma / alpha runs from sigma_max to sigma_min.

    Attributes:
        size: side of the images.
        low: side at which the cosine needs no shift for high noise.
        high: the same for low noise.
        sigma_min: noise level at t = 1.
        sigma_max: noise level at t = 0.
        sigma_data: standard deviation of the data, whose noise level the cosine is made for.
    """

    size: int
    low: int
    high: int
    sigma_min: float = 1e-3
    sigma_max: float = 1e3
    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError unless all is positive, sigma_min < sigma_max, and log-SNRs rise."""
        if not min(self.size, self.low, self.high, self.sigma_data) > 0:
            raise ValueError(
                "expected positive size, low, high and sigma_data, got "
                f"{self.size}, {self.low}, {self.high}, {self.sigma_data}"
            )
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"expected 0 < sigma_min < sigma_max, got {self.sigma_min}, {self.sigma_max}"
            )
        slowest = min(start - stop for _, start, stop in map(self._angles, (self.low, self.high)))
        if 2 * math.log(self.low / self.high) >= 4 * slowest:  # the shift falls, the cosines rise
            raise ValueError(
                f"expected `low` not so far above `high` that the log-SNR falls, "
                f"got {self.low}, {self.high}"
            )

    def at(self, t: Float[Tensor, "*times"]) -> Point:
        log_snr, rate = self._log_snr(t)
        return _variance_preserving(-0.5 * F.softplus(-log_snr), 0.5 * rate * (-log_snr).sigmoid())

    def time_of(self, log_snr: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        wanted = log_snr.double()
        found = _bisect(lambda t: self._log_snr(t)[0] < wanted, wanted)
        return found.where(~wanted.isnan(), wanted).to(log_snr.dtype)

    def _log_snr(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Log-SNR and its rate."""
        at_low, rate_low = self._shifted(t, self.low)
        at_high, rate_high = self._shifted(t, self.high)
        gap = at_high - at_low
        return at_low + t * gap, rate_low + gap + t * (rate_high - rate_low)

    def _angles(self, side: int) -> tuple[float, float, float]:
        """Noise level at 45 degrees, first and last angle of the cosine made for `side`."""
        level = self.sigma_data * self.size / side
        return level, math.atan(self.sigma_max / level), math.atan(self.sigma_min / level)

    def _shifted(self, t: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """-2 ln(noise level) of that schedule, and its rate."""
        level, start, stop = self._angles(side)
        angle = (1 - t) * start + t * stop
        rate = 4 * (start - stop) / torch.sin(2 * angle)
        return -2 * (angle.tan().log() + math.log(level)), rate


def _variance_preserving(log_alpha: Tensor, rate: Tensor) -> Point:
    """The point with sigma^2 = 1 - alpha^2 for ln alpha and its rate."""
    alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
    d_alpha = rate * alpha
    return Point(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)


def _bisect(before: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The times in [0, 1] at which `before` turns from true to false."""
    low, high = torch.zeros_like(like), torch.ones_like(like)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        inside = before(middle)
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return (low + high) / 2
