"""Bijections of one token, given the parameters theta that a conditioner predicts for it.

A conditional is a value without weights: a bijection z = g(x; theta) of the numbers of a token,
increasing in each of them given those before it (the transformer of Papamakarios et al.,
Normalizing Flows for Probabilistic Modeling and Inference, arXiv 1912.02762, section 3.1). All of
it is elementary arithmetic in the dtype of the tokens, float32 or better.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from exactflow.core.shapes import PerSample, Tokens

Theta = Float[Tensor, "batch tokens size"]
Numbers = Float[Tensor, "*batch size"]  # raw outputs, or theta
Scale = float | Float[Tensor, "tokens 1"]

SOFTPLUS_OFFSET = 0.541324854612918  # softplus(offset) = 1: raw output 0 is the identity
LARGEST_COUPLING = 2.0  # of one number of a token to another
LOGISTIC_SCALE = 1.7  # logit(p) / 1.7 is within 0.01 of the normal quantile
LARGEST_MEAN = 1.5  # of a new mixture: its components lie evenly from minus to plus this
LEAST_SCALE = 0.3  # of these components; 0.4 of their distance where that is more
MOST_ITERATIONS = 100  # bisections alone need about 50 of them
CLOSE = {torch.float32: 1e-7, torch.float64: 1e-12}  # last change of a root that is found


class Conditional(ABC):
    """A bijection z = g(x; theta) of one token, given its parameters theta; see the module."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many numbers theta has for each token."""

    @property
    @abstractmethod
    def start(self) -> Float[Tensor, " size"]:
        """Raw parameters at which the map is close to the identity."""

    @abstractmethod
    def constrain(self, raw: Numbers) -> Numbers:
        """theta from a network's output, which may be any real numbers."""

    @abstractmethod
    def forward(self, x: Tokens, theta: Theta) -> tuple[Tokens, PerSample]:
        """z, and ln |det dz/dx| of each sample, summed over its tokens, in nats."""

    @abstractmethod
    def inverse(self, z: Tokens, theta: Theta) -> Tokens:
        """The x with forward(x, theta)[0] == z, up to rounding."""

    @abstractmethod
    def extrapolate(self, theta: Theta, other: Theta, scale: Scale) -> Theta:
        """theta + scale (theta - other), of what can be extrapolated (guidance)."""

    @abstractmethod
    def named(self, theta: Numbers) -> Mapping[str, Tensor]:
        """The parts of theta by their names, for tables and plots."""


class LinearlyGuided(Conditional, ABC):
    """A conditional whose whole theta guidance extrapolates."""

    def extrapolate(self, theta: Theta, other: Theta, scale: Scale) -> Theta:
        return theta + scale * (theta - other)


@final
@dataclass(frozen=True)
class Affine(LinearlyGuided):
    """z = (x - m) exp(-a) for every number by itself (TarFlow, arXiv 2412.06329, eq. 4).

    theta is the log-scales a, then the shifts m.

    Attributes:
        dim: numbers of a token.
        scale: the scale exp(a) that raw outputs r give: "exp", exp(r); "softplus",
            softplus(r + ln(e - 1)), STARFlow (arXiv 2506.06276).

    Example:
        >>> affine = Affine(dim=4)
        >>> z, log_abs_det = affine.forward(torch.zeros(1, 2, 4), torch.zeros(1, 2, affine.size))
    """

    dim: int
    scale: Literal["exp", "softplus"] = "exp"

    @property
    def size(self) -> int:
        return 2 * self.dim

    @property
    def start(self) -> Float[Tensor, " size"]:
        return torch.zeros(self.size)

    def constrain(self, raw: Numbers) -> Numbers:
        if self.scale == "exp":
            return raw
        r, shift = raw.chunk(2, dim=-1)
        return torch.cat([F.softplus(r + SOFTPLUS_OFFSET).log(), shift], dim=-1)

    def forward(self, x: Tokens, theta: Theta) -> tuple[Tokens, PerSample]:
        log_scale, shift = theta.chunk(2, dim=-1)
        return (x - shift) * torch.exp(-log_scale), -log_scale.flatten(1).sum(1)

    def inverse(self, z: Tokens, theta: Theta) -> Tokens:
        log_scale, shift = theta.chunk(2, dim=-1)
        return torch.addcmul(shift, z, log_scale.exp())

    def named(self, theta: Numbers) -> Mapping[str, Tensor]:
        log_scale, shift = theta.chunk(2, dim=-1)
        return {"log_scale": log_scale, "shift": shift}


@final
@dataclass(frozen=True)
class Triangular(Conditional):
    """z = (I + N) x, N strictly lower triangular: numbers of a token depend on those before them.

    Behind an affine map it makes a token's law a Gaussian with a full covariance; before one, every
    number is predicted linearly from others of its token. Its determinant is 1, its inverse a
    forward substitution. Guidance leaves N as it is.

    Attributes:
        dim: numbers of a token.
        entries: (row, column) of those of N that are predicted, the others are 0; None: all.

    Raises:
        ValueError: an entry that is not below the diagonal.
    """

    dim: int
    entries: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        for row, column in self.entries or ():
            if not 0 <= column < row < self.dim:
                raise ValueError(
                    f"expected entries below the diagonal of {self.dim} rows, got {row, column}"
                )

    @property
    def size(self) -> int:
        return self.dim * (self.dim - 1) // 2 if self.entries is None else len(self.entries)

    @property
    def start(self) -> Float[Tensor, " size"]:
        return torch.zeros(self.size)

    def constrain(self, raw: Numbers) -> Numbers:
        """See `Conditional.constrain`: |N_ij| < 2."""
        return LARGEST_COUPLING * torch.tanh(raw / LARGEST_COUPLING)

    def forward(self, x: Tokens, theta: Theta) -> tuple[Tokens, PerSample]:
        if self.entries is None:
            z = x + (self._matrix(theta) * x[..., None, :]).sum(-1)  # autocast rounds products of @
        else:  # few of them
            row, column = self._places(x.device)
            z = x.index_add(-1, row, theta * x[..., column])
        return z, x.new_zeros(len(x))

    def inverse(self, z: Tokens, theta: Theta) -> Tokens:
        matrix = self._matrix(theta)
        column = z[..., None]
        column = torch.linalg.solve_triangular(matrix, column, upper=False, unitriangular=True)
        return column[..., 0]

    def extrapolate(self, theta: Theta, other: Theta, scale: Scale) -> Theta:
        """See `Conditional.extrapolate`: an extrapolated covariance means nothing."""
        return theta

    def named(self, theta: Numbers) -> Mapping[str, Tensor]:
        return {"coupling": theta}

    def _matrix(self, theta: Tensor) -> Float[Tensor, "batch tokens dim dim"]:
        """N, from its rows one after another."""
        matrix = theta.new_zeros(*theta.shape[:-1], self.dim, self.dim)
        row, column = self._places(theta.device)
        matrix[..., row, column] = theta
        return matrix

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows and columns of the entries, in the order of theta."""
        if self.entries is None:
            row, column = torch.tril_indices(self.dim, self.dim, -1, device=device)
        else:
            row, column = (
                torch.tensor(self.entries, dtype=torch.long, device=device).view(-1, 2).unbind(1)
            )
        return row, column


@final
@dataclass(frozen=True)
class LogisticMixture(LinearlyGuided):
    """z = logit(F(x)) / 1.7, F the distribution function of a mixture of logistics, by number.

    (Ho et al., Flow++, arXiv 1902.00275, eq. 12.) theta is the log-weights, not normalised, the
    means and the log-scales of the components, each for all numbers of the token in turn. Both
    tails of F are kept in logarithms, so that z is exact far out, where it is linear in x.

    Attributes:
        dim: numbers of a token.
        components: K of them; one is an affine map.
    """

    dim: int
    components: int = 4

    @property
    def size(self) -> int:
        return 3 * self.components * self.dim

    @property
    def start(self) -> Float[Tensor, " size"]:
        means, log_scale = torch.zeros(self.components), -math.log(LOGISTIC_SCALE)
        if self.components > 1:
            means = torch.linspace(-LARGEST_MEAN, LARGEST_MEAN, self.components)
            log_scale = math.log(max(LEAST_SCALE, 0.8 * LARGEST_MEAN / (self.components - 1)))
        raw = torch.stack([torch.zeros_like(means), means, torch.full_like(means, log_scale)])
        return raw[:, :, None].expand(3, self.components, self.dim).flatten()

    def constrain(self, raw: Numbers) -> Numbers:
        """See `Conditional.constrain`: any numbers will do."""
        return raw

    def forward(self, x: Tokens, theta: Theta) -> tuple[Tokens, PerSample]:
        below, above, density = self._logarithms(x, *self._components(theta))
        log_derivative = density - below - above - math.log(LOGISTIC_SCALE)
        return (below - above) / LOGISTIC_SCALE, log_derivative.flatten(1).sum(1)

    @torch.no_grad()
    def inverse(self, z: Tokens, theta: Theta) -> Tokens:
        """See `Conditional.inverse`: Newton's method in float64, kept inside a shrinking bracket.

        The mixture's quantile lies between those of its components. Each number stops when its own
        root is found, so that it does not depend on the others. Carries no gradient.
        """
        weights, means, log_scales = (part.double() for part in self._components(theta))
        target = LOGISTIC_SCALE * z.double()
        quantiles = means + log_scales.exp() * target[..., None, :]
        low, high = quantiles.amin(-2), quantiles.amax(-2)
        x, last = (low + high) / 2, high - low
        active = (high > low) & target.isfinite()
        for _ in range(MOST_ITERATIONS):
            below, above, density = self._logarithms(x, weights, means, log_scales)
            error = below - above - target
            low, high = torch.where(error < 0, x, low), torch.where(error > 0, x, high)
            step = x - error * torch.exp(below + above - density)
            # a step that leaves the bracket, or is not half of the last one, gives way to bisection
            good = (step >= low) & (step <= high) & ((step - x).abs() <= last / 2)
            step = torch.where(good, step, (low + high) / 2)
            last = (step - x).abs()
            x = torch.where(active, step, x)
            active = active & (last > CLOSE[z.dtype] * (1 + x.abs()))
            if not bool(active.any()):
                break
        return x.to(z.dtype)

    def named(self, theta: Numbers) -> Mapping[str, Tensor]:
        names = "log_weight", "mean", "log_scale"
        return dict(zip(names, self._components(theta), strict=True))

    def _components(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ln w, mu and ln s, each (batch, tokens, components, dim)."""
        parts = theta.unflatten(-1, (3, self.components, self.dim))
        weights, means, log_scales = parts.unbind(-3)
        return weights.log_softmax(-2), means, log_scales

    @staticmethod
    def _logarithms(
        x: Tensor, weights: Tensor, means: Tensor, log_scales: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ln F, ln (1 - F) and ln f of the mixture at x."""
        place = (x[..., None, :] - means) * torch.exp(-log_scales)
        below = F.logsigmoid(place)
        above = below - place
        return (
            torch.logsumexp(weights + below, -2),
            torch.logsumexp(weights + above, -2),
            torch.logsumexp(weights + below + above - log_scales, -2),
        )


@final
@dataclass(frozen=True)
class Chain(Conditional):
    """One conditional after another, from data to latent; theta is that of the parts in order.

    Attributes:
        parts: at least one.
    """

    parts: tuple[Conditional, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def start(self) -> Float[Tensor, " size"]:
        return torch.cat([part.start for part in self.parts])

    def constrain(self, raw: Numbers) -> Numbers:
        pairs = zip(self.parts, self._split(raw), strict=True)
        return torch.cat([part.constrain(r) for part, r in pairs], dim=-1)

    def forward(self, x: Tokens, theta: Theta) -> tuple[Tokens, PerSample]:
        log_abs_det = x.new_zeros(len(x))
        for part, own in zip(self.parts, self._split(theta), strict=True):
            x, change = part.forward(x, own)
            log_abs_det = log_abs_det + change
        return x, log_abs_det

    def inverse(self, z: Tokens, theta: Theta) -> Tokens:
        for part, own in reversed([*zip(self.parts, self._split(theta), strict=True)]):
            z = part.inverse(z, own)
        return z

    def extrapolate(self, theta: Theta, other: Theta, scale: Scale) -> Theta:
        pairs = zip(self.parts, self._split(theta), self._split(other), strict=True)
        return torch.cat([part.extrapolate(t, o, scale) for part, t, o in pairs], dim=-1)

    def named(self, theta: Numbers) -> Mapping[str, Tensor]:
        """See `Conditional.named`; names of parts are numbered from 1."""
        pairs = enumerate(zip(self.parts, self._split(theta), strict=True), 1)
        return {
            f"{name} {place}": values
            for place, (part, own) in pairs
            for name, values in part.named(own).items()
        }

    def _split(self, theta: Tensor) -> Sequence[Tensor]:
        return theta.split([part.size for part in self.parts], dim=-1)
