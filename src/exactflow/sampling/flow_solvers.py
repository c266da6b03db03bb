"""Solvers that invert one autoregressive transform, token by token, in parallel, or in between.

The inverse u of v is the fixed point of F(u)_t = g^-1(v_t; theta_t(u_<t)), F strictly triangular
(MAF, arXiv 1705.07057, eq. 4). Solvers use only the conditioner and the conditional of the model.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Literal, final

import torch
from torch import Tensor

from exactflow.core.model import Flow, autoregressive_parts
from exactflow.core.shapes import Labels, Tokens
from exactflow.core.transform import AutoregressiveTransform, Decoding, Solver
from exactflow.sampling.certificate import WHILE_SOLVING, solved, tolerance_of

Start = Literal["latent", "zeros"]
WILD = 1e3  # times the latents: larger guesses could overflow the network, and are reset


@final
@dataclass(frozen=True)
class Sequential:
    """Token by token with a cache: the reference inverse."""

    decoding: Decoding = field(default_factory=Decoding)

    def __call__(
        self, transform: AutoregressiveTransform, z: Tokens, label: Labels | None
    ) -> Tokens:
        return transform.inverse(z, label, self.decoding)


@final
@dataclass(frozen=True)
class Jacobi:
    """u <- F(u) on all tokens at once, no cache; a sample leaves when all its tokens are solved.

    After n iterations the first n tokens are exact: as many iterations as tokens suffice. The
    published samplers (arXiv 2505.12849, 2505.24791) stop the whole batch at once, on its last
    change.

    Attributes:
        iterations: most iterations; None: no limit.
        start: first guess, the latent itself or zeros behind its first token.
        tolerance: backward error to stop at; None: by the network's dtype.
    """

    iterations: int | None = None
    start: Start = "latent"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        _check(self.tolerance, self.iterations, self.start)

    @torch.no_grad()
    def __call__(
        self, transform: AutoregressiveTransform, z: Tokens, label: Labels | None
    ) -> Tokens:
        tolerance = WHILE_SOLVING * tolerance_of(transform, self.tolerance)
        u = first_guess(z, self.start)
        active = torch.arange(len(z), device=z.device)
        for iteration in range(self.iterations or z.shape[1]):
            old, v = u[active], z[active]
            new, theta = _image(transform, old, v, None if label is None else label[active])
            done = solved(transform.conditional, old, new, v, theta, tolerance).all(1)
            u[active] = torch.where(done[:, None, None], old, _tame(new, v, iteration + 1))
            active = active[~done]
            if not len(active):
                break
        return u


@final
@dataclass(frozen=True)
class GaussSeidelJacobi:
    """Segment after segment, each by Jacobi with the finished ones in the cache.

    GS-Jacobi (arXiv 2505.12849) with two corrections: each sample stops by its own residual, and
    a segment reads the final values of earlier segments, not those before their last update.

    Attributes:
        segments: their number, of lengths that differ by at most 1; or the lengths of all.
        iterations: most iterations in a segment; None: no limit.
        start: first guess.
        tolerance: backward error to stop at; None: by the network's dtype.
    """

    segments: int | tuple[int, ...] = 8
    iterations: int | None = None
    start: Start = "latent"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        _check(self.tolerance, self.iterations, self.start)
        lengths = (self.segments,) if isinstance(self.segments, int) else self.segments
        if not lengths or min(lengths) < 1:
            raise ValueError(f"expected segments of at least one token, got {self.segments}")

    @torch.no_grad()
    def __call__(
        self, transform: AutoregressiveTransform, z: Tokens, label: Labels | None
    ) -> Tokens:
        """See `Solver`. Raises ValueError unless the segments' lengths sum to the tokens."""
        tolerance = WHILE_SOLVING * tolerance_of(transform, self.tolerance)
        u = first_guess(z, self.start)
        cache = transform.new_cache(z)
        stale = 0  # first token that has changed since the cache stored it
        for begin, end in pairwise(self._bounds(z.shape[1])):
            for iteration in range(self.iterations or end - begin):
                new, theta = _image(transform, u[:, :end], z[:, :end], label, cache, stale)
                old, v = u[:, begin:end], z[:, begin:end]
                new, theta = new[:, begin - stale :], theta[:, begin - stale :]
                done = solved(transform.conditional, old, new, v, theta, tolerance).all(1)
                guess = _tame(new, v, iteration + 1)
                u[:, begin:end] = torch.where(done[:, None, None], old, guess)
                stale = end if bool(done.all()) else begin
                if stale == end:
                    break
        return u

    def _bounds(self, tokens: int) -> list[int]:
        if isinstance(self.segments, int):
            count = min(self.segments, tokens)
            return [tokens * index // count for index in range(count + 1)]
        bounds = [0, *accumulate(self.segments)]
        if bounds[-1] != tokens:
            raise ValueError(f"expected segments that sum to {tokens} tokens, got {self.segments}")
        return bounds


@final
@dataclass(frozen=True)
class Adaptive:
    """A window of guesses ahead of an exact prefix, which each pass makes longer.

    The prefix stays in the cache. A pass evaluates the window. In each sample the leading solved
    tokens join the prefix as they are, and so does the next one as computed, since it depends on
    the prefix only. With tolerance 0 every token is computed from its final prefix, as in the
    sequential inverse. The window is `lookahead` times the tokens that recent passes gained: a
    token needs about `lookahead` passes to settle, however fast the prefix grows.

    Attributes:
        lookahead: passes that a token stays in the window.
        window: largest window; None: all tokens. 1 is the sequential inverse.
        tolerance: backward error to stop at; None: by the network's dtype.
        decoding: how passes are evaluated.
    """

    lookahead: int = 32
    window: int | None = None
    tolerance: float | None = None
    decoding: Decoding = field(default_factory=Decoding)

    def __post_init__(self) -> None:
        _check(self.tolerance)
        if self.lookahead < 1 or (self.window is not None and self.window < 1):
            raise ValueError(
                f"expected lookahead and window of at least 1, got {self.lookahead}, {self.window}"
            )

    @torch.no_grad()
    def __call__(
        self, transform: AutoregressiveTransform, z: Tokens, label: Labels | None
    ) -> Tokens:
        tolerance = WHILE_SOLVING * tolerance_of(transform, self.tolerance)
        u, tokens = z.clone(), z.shape[1]
        cache = transform.new_cache(z, self.decoding)
        place = torch.arange(tokens, device=z.device)
        prefix = torch.zeros(len(z), dtype=torch.int64, device=z.device)  # of each sample
        low, gained = 0, 1.0
        with torch.inference_mode():
            while low < tokens:
                ahead = min(int(self.lookahead * gained), self.window or tokens)
                high = min(low + ahead, tokens)
                old, v = u[:, low:high], z[:, low:high]
                new, theta = _image(transform, u[:, :high], v, label, cache, low)
                here, known = place[low:high], prefix[:, None]
                done = solved(transform.conditional, old, new, v, theta, tolerance)
                fine = done | (here < known)
                joins = fine.cumprod(1).bool()
                computed = low + joins.sum(1, keepdim=True)  # the one behind: final as computed
                guess = torch.where((here > computed)[..., None], _tame(new, v), new)
                u[:, low:high] = torch.where(joins[..., None], old, guess)
                # behind a token that is not finite, no token can become finite
                lost = ((here == computed) & ~new.isfinite().all(-1)).any(1)
                known = torch.maximum(known, (computed + 1).clamp(max=high))[:, 0]
                prefix = torch.where(lost, tokens, known)
                reached = int(prefix.min())
                gained, low = (gained + reached - low) / 2, reached
        return u


@dataclass(frozen=True)
class BlockSolvers(ABC):
    """A solver for each block of a flow.

    Attributes:
        tolerance: backward error to stop at; None: by the network's dtype.
    """

    tolerance: float | None = None

    def __post_init__(self) -> None:
        _check(self.tolerance)

    @abstractmethod
    def of_blocks(self, flow: Flow, rows: int, batches: int) -> Sequence[Solver]:
        """Solvers of the blocks in generation order, for batches of so many samples."""


@final
class Selective(BlockSolvers):
    """The first generated block token by token, the others by Jacobi (arXiv 2505.24791)."""

    def of_blocks(self, flow: Flow, rows: int, batches: int) -> Sequence[Solver]:
        others = len(autoregressive_parts(flow)) - 1
        return [Sequential(), *[Jacobi(tolerance=self.tolerance)] * others]


def per_block(
    solver: Solver | Sequence[Solver] | BlockSolvers, flow: Flow, rows: int = 1, batches: int = 1
) -> Sequence[Solver]:
    """One solver for each block of `flow` in generation order."""
    if isinstance(solver, BlockSolvers):
        return solver.of_blocks(flow, rows, batches)
    if isinstance(solver, Sequence):
        return solver
    return [solver] * len(autoregressive_parts(flow))


def own_tolerance(solver: object) -> float | None:
    """Backward error up to which a solver's result counts as exact; None: by the dtype.

    A solver with tolerance 0 computes every token from its final prefix; its error is then that of
    rounding, and judged by the dtype.
    """
    if isinstance(solver, Jacobi | GaussSeidelJacobi | Adaptive | BlockSolvers):
        return solver.tolerance or None
    return None


def first_guess(z: Tokens, start: Start) -> Tokens:
    """The latent, or zeros behind its first token."""
    u = z.clone()
    if start == "zeros":
        u[:, 1:] = 0
    return u


def _image(
    transform: AutoregressiveTransform,
    u: Tensor,
    v: Tensor,
    label: Tensor | None,
    cache: object = None,
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """F(u) of the tokens from `start` on, whose latents are the last of `v`; and their theta."""
    theta = transform.conditioner(u, label, cache, start)
    return transform.conditional.inverse(v[:, -theta.shape[1] :], theta), theta


def _tame(guess: Tensor, v: Tensor, known: int = 0) -> Tensor:
    """Replace guesses that are not finite, or larger than WILD allows, by the latent.

    The first `known` tokens are final, and stay as they are.
    """
    limit = WILD * (1 + v.abs().amax((1, 2), keepdim=True))
    tamed = torch.where(guess.abs() <= limit, guess, v)
    tamed[:, :known] = guess[:, :known]
    return tamed


def _check(tolerance: float | None, iterations: int | None = None, start: str = "latent") -> None:
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"expected a finite tolerance >= 0, got {tolerance}")
    if iterations is not None and iterations < 1:
        raise ValueError(f"expected at least one iteration, got {iterations}")
    if start not in ("latent", "zeros"):
        raise ValueError(f"expected start 'latent' or 'zeros', got {start!r}")
