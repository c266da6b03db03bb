"""Gaussianisation: a whitening, then rotations and one-dimensional maps, fitted layer by layer.

Rotation-based iterative Gaussianisation (Laparra, Camps-Valls, Malo, arXiv 1602.00229): rotate,
make every marginal Gaussian, repeat. A layer's maps are fitted to the quantiles of what the layers
before it leave, and a marginal is left alone unless maps fitted to either half of the images help
the other half, so that small sets are not overfitted.
"""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from exactflow.core import grey_levels as grey
from exactflow.core.shapes import Labels, PerSample
from exactflow.models.gaussian.moments import Arranged
from exactflow.models.gaussian.whitening import (
    FittedTransform,
    LinearFirstFlow,
    Whitening,
    WhiteningConfig,
)

REACH = 2.6  # standard deviations up to which maps are bent
TAIL = 0.3143  # mean of x - REACH where a normal x exceeds REACH
PSEUDO = 64  # normal quantiles mixed into every sample: no two knots coincide
LEAST_WIDTH = 1e-6  # of a line: float32 still tells its ends apart
CERTAINTY = 2.0  # standard errors that the gain of a map must exceed
SORTED_VALUES = 2**22  # numbers sorted at a time


@final
@dataclass(frozen=True)
class GaussianisationConfig:
    """A whitening (see `WhiteningConfig`) and the layers after it."""

    image_shape: tuple[int, int, int] = (1, 8, 8)  # channels, height, width
    covariance: Literal["full", "patch", "dct", "diagonal"] = "full"
    patch_size: int = 4  # side of a patch, for "patch"; divides height and width
    rotation: Literal["cholesky", "pca", "zca"] = "cholesky"  # of the first layer's input
    shrinkage: float | None = 0.0  # weight of diag(S); None: what held-out images like best
    levels: int = grey.PHOTOGRAPHIC_LEVELS  # grey levels of the images
    layers: int = 8
    bins: int = 32  # straight lines that a marginal's map is made of, the tails apart
    fit_images: int = 10_000  # at most so many images are used to fit the layers
    num_classes: ClassVar[int] = 0
    noise_std: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be built."""
        if self.layers < 1 or self.bins < 2 or self.fit_images < 2:
            given = f"{self.layers}, {self.bins}, {self.fit_images}"
            raise ValueError(f"expected layers >= 1, bins and fit_images >= 2, got {given}")
        assert self.linear is not None  # checks the rest

    @property
    def linear(self) -> WhiteningConfig:
        """The whitening in front."""
        names = [field.name for field in fields(WhiteningConfig)]
        return WhiteningConfig(**{name: getattr(self, name) for name in names})


@final
class Gaussianisation(LinearFirstFlow):
    """Whitening, then layers that rotate and make marginals Gaussian."""

    kind: ClassVar[str] = "gaussianisation"

    def __init__(self, config: GaussianisationConfig) -> None:
        layout = config.linear.layout
        layers = [
            MarginalLayer(layout.tokens, layout.groups, config.bins, rotates=index > 0)
            for index in range(config.layers)
        ]
        super().__init__(config.linear, layers, config.fit_images)
        self.config = config

    def gaussian(self) -> Whitening:
        """The whitening in front as a flow of its own, a copy: the Gaussian of the same fit."""
        flow = Whitening(self.config.linear).to(self.device, self.dtype)
        known = self.state_dict()
        flow.load_state_dict({name: known[name] for name in flow.state_dict()})
        return flow


@final
class MarginalLayer(FittedTransform):
    """Rotate the tokens, then map every value by a monotone function of its own.

    The rotation is a Hartley transform of tokens with random signs: it mixes all of them, costs
    T log T, and is orthogonal in every dtype, being its own inverse but for the signs. The function
    is a chain of straight lines that meet at equal steps of the output in [-REACH, REACH], the
    first and the last without an end: onto, and inverted exactly everywhere. Positions that share
    a covariance share the functions too.

    Args:
        tokens: T.
        groups: G, one for all positions or one for each.
        bins: K, lines between the outer two.
        rotates: whether there is a rotation.
    """

    signs: Tensor | None

    def __init__(self, tokens: int, groups: int, bins: int, *, rotates: bool) -> None:
        super().__init__()
        self.tokens, self.groups = tokens, groups
        self.register_buffer("signs", torch.ones(tokens, 1) if rotates else None)
        self.start = nn.Parameter(torch.full((tokens, groups), -REACH))  # where the first ends
        self.log_slope = nn.Parameter(torch.zeros(tokens, groups, bins + 2))

    def forward(self, x: Arranged, label: Labels | None = None) -> tuple[Arranged, PerSample]:
        lines = Lines(self.start.to(x.dtype), self.log_slope.to(x.dtype))
        y, log_rate = lines.forward(self._by_marginal(self._rotated(x)))
        return self._by_sample(y, x), self._by_sample(log_rate, x).flatten(1).sum(1)

    def inverse(self, z: Arranged, label: Labels | None = None) -> Arranged:
        lines = Lines(self.start.to(z.dtype), self.log_slope.to(z.dtype))
        x = self._by_sample(lines.inverse(self._by_marginal(z)), z)
        return x if self.signs is None else hartley(x) * self.signs

    @torch.no_grad()
    def fit(self, z: Float[Tensor, "n tokens positions"], source: torch.Generator) -> str:
        if self.signs is not None:
            coins = torch.randint(0, 2, self.signs.shape, generator=source)
            self.signs.copy_(2 * coins - 1)
        values = self._by_marginal(self._rotated(z)).flatten(0, 1)
        start, log_slope = self.start.data.flatten(), self.log_slope.data.flatten(0, 1)  # views
        step, mapped = max(1, SORTED_VALUES // values.shape[1]), 0
        for first in range(0, len(values), step):
            rows = slice(first, first + step)
            found, helps = fit_lines(values[rows], log_slope.shape[1] - 2)
            start[rows], log_slope[rows] = found.start.to(start), found.log_slope.to(start)
            mapped += int(helps.sum())
        return f"{mapped / len(values):.0%} of its marginals mapped"

    def _rotated(self, x: Tensor) -> Tensor:
        return x if self.signs is None else hartley(x * self.signs)

    def _by_marginal(self, z: Tensor) -> Tensor:
        """(tokens, groups, all values that share a function)."""
        by_token = z.transpose(0, 1)
        return by_token.flatten(1)[:, None] if self.groups == 1 else by_token.transpose(1, 2)

    def _by_sample(self, values: Tensor, like: Tensor) -> Tensor:
        if self.groups == 1:
            return values.reshape(self.tokens, len(like), -1).transpose(0, 1)
        return values.permute(2, 0, 1)


def hartley(x: Arranged) -> Arranged:
    """The orthonormal discrete Hartley transform of tokens (Bracewell 1983): its own inverse."""
    spectrum = torch.fft.fft(x, dim=1, norm="ortho")
    return spectrum.real - spectrum.imag


@final
class Lines:
    """Increasing chains of K + 2 lines, many at once, over the last axis of their arguments."""

    def __init__(self, start: Tensor, log_slope: Tensor) -> None:
        self.start, self.log_slope = start, log_slope
        self.step = 2 * REACH / (log_slope.shape[-1] - 2)
        widths = self.step * torch.exp(-log_slope[..., 1:-1])
        self.knots = torch.cat([start[..., None], start[..., None] + widths.cumsum(-1)], -1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values, and the logarithms of the rates."""
        line = torch.searchsorted(self.knots.detach(), x.detach().contiguous(), right=True)
        knot, value, log_rate = self._of(line)
        return value + (x - knot) * log_rate.exp(), log_rate

    def inverse(self, y: Tensor) -> Tensor:
        """The x of these values."""
        steps = ((y + REACH) / self.step).floor().nan_to_num()
        line = steps.clamp(-1, self.log_slope.shape[-1] - 2).long() + 1
        knot, value, log_rate = self._of(line)
        return knot + (y - value) * torch.exp(-log_rate)

    def _of(self, line: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A knot on each line, its value, and the line's log-slope."""
        index = (line - 1).clamp(min=0)  # where it begins; the first one has only an end
        value = index.to(self.knots.dtype) * self.step - REACH
        return self.knots.gather(-1, index), value, self.log_slope.gather(-1, line)


def fit_lines(values: Float[Tensor, "marginals n"], bins: int) -> tuple[Lines, Tensor]:
    """Maps of marginals to N(0, 1), and for which marginals they help; values in random order.

    Where maps fitted to either half of the values gain less likelihood on the other half than
    `CERTAINTY` standard errors of that gain, the map is the identity.
    """
    found = _quantile_lines(values, bins)
    one, other = values.tensor_split(2, 1)
    gain = torch.cat(
        [_gain(one, _quantile_lines(other, bins)), _gain(other, _quantile_lines(one, bins))], 1
    )
    helps = gain.mean(1) * values.shape[1] ** 0.5 > CERTAINTY * gain.std(1)
    start = torch.where(helps, found.start, -REACH)
    return Lines(start, torch.where(helps[:, None], found.log_slope, 0.0)), helps


def _gain(values: Tensor, lines: Lines) -> Tensor:
    """Log-likelihood of every value gained over the identity, in nats."""
    y, log_rate = lines.forward(values)
    return 0.5 * (values.square() - y.square()) + log_rate


def _quantile_lines(values: Tensor, bins: int) -> Lines:
    """Lines that meet at the quantiles which equal steps of a normal variable have."""
    n = values.shape[1] + PSEUDO
    spread = (torch.arange(PSEUDO, dtype=values.dtype, device=values.device) + 0.5) / PSEUDO
    prior = torch.special.ndtri(spread).expand(len(values), -1)
    ordered = _sorted(torch.cat([values, prior], 1))
    y = torch.linspace(-REACH, REACH, bins + 1, dtype=values.dtype, device=values.device)
    place = (torch.special.ndtr(y) * n - 0.5).clamp(0, n - 1)
    before = place.floor().long().clamp(max=n - 2)
    knots = torch.lerp(ordered[:, before], ordered[:, before + 1], place - before)
    width = knots.diff(dim=1).clamp(min=LEAST_WIDTH)
    start, end = knots[:, :1], knots[:, :1] + width.sum(1, keepdim=True)
    first = _tail_slope((start - ordered).clamp(min=0))
    last = _tail_slope((ordered - end).clamp(min=0))
    slope = torch.cat([first, 2 * REACH / bins / width, last], 1)
    return Lines(start[:, 0], slope.log())


def _sorted(values: Tensor) -> Tensor:
    """Every row in ascending order."""
    if values.device.type == "cpu":  # NumPy's vectorised sort takes a fifth of the time
        return torch.from_numpy(np.sort(values.numpy(), axis=1))
    return values.sort(1).values


def _tail_slope(excess: Tensor) -> Tensor:
    """The d > 0 of the greatest likelihood of excesses e under y = REACH + d e, normal.

    d^2 sum e^2 + d REACH sum e = n; one excess as the normal's own, for which d = 1, is added.
    """
    count = 1 + (excess > 0).sum(1, keepdim=True)
    linear = REACH * (TAIL + excess.sum(1, keepdim=True))
    square = 1 - REACH * TAIL + excess.square().sum(1, keepdim=True)
    return 2 * count / (linear + (linear.square() + 4 * square * count).sqrt())
