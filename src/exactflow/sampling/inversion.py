"""Inversion of a flow block by block, with records of its cost and repairs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from exactflow.core.shapes import Labels, PerSample, Tokens
from exactflow.core.transform import AutoregressiveTransform, Decoding, Solver
from exactflow.sampling.certificate import WHILE_SOLVING, backward_error, solved, tolerance_of
from exactflow.sampling.flow_solvers import Sequential
from exactflow.sampling.guidance import Guidance, GuidedTransform
from exactflow.sampling.nonfinite import OnNonFinite, Watch


@final
@dataclass(frozen=True)
class Pass:
    """One evaluation of the network while inverting, as seen from outside the solver.

    Attributes:
        start: first token whose parameters were asked for.
        stop: one past the last.
        rows: samples evaluated.
        least: known tokens after the pass, in the sample with the fewest: those before `start`,
            the solved ones from there on, and the next one, computed from them. None if samples
            have left the batch, since only the solver knows which.
        greatest: the same in the sample with the most.
    """

    start: int
    stop: int
    rows: int
    least: int | None
    greatest: int


@final
@dataclass(frozen=True)
class BlockRecord:
    """Cost and repairs of the inversion of one block.

    Attributes:
        evaluations: network passes, whatever their width; repairs included, checks not.
        tokens: tokens evaluated, summed over passes, per sample.
        seconds: wall-clock, repairs included.
        repaired: whether each sample was inverted again, token by token, because its backward error
            was above the tolerance.
        passes: every evaluation; empty unless they were observed.
    """

    evaluations: int
    tokens: int
    seconds: float
    repaired: Bool[Tensor, " batch"]
    passes: tuple[Pass, ...]


@final
class CountedTransform(AutoregressiveTransform):
    """A transform that counts evaluations of another one.

    Args:
        transform: the other one.
        v: the latents that are being inverted, to observe every pass; None: only count.
        tolerance: backward error up to which an observed token counts as known.
    """

    def __init__(
        self, transform: AutoregressiveTransform, v: Tokens | None = None, tolerance: float = 0.0
    ) -> None:
        super().__init__()
        self.transform = transform
        self.num_tokens = transform.num_tokens
        self.conditional = transform.conditional
        self.predicts_first = transform.predicts_first
        self.evaluations = 0
        self.tokens = 0
        self.passes: list[Pass] = []
        self._v, self._tolerance = v, tolerance

    def new_cache(self, x: Tokens, decoding: Decoding | None = None) -> Any:
        return self.transform.new_cache(x, decoding)

    def conditioner(
        self,
        x: Float[Tensor, "batch stop dim"],
        label: Labels | None = None,
        cache: Any = None,
        start: int = 0,
        temperature: PerSample | None = None,
    ) -> Float[Tensor, "batch window size"]:
        """See `AutoregressiveTransform.conditioner`; a constant theta_0 costs no evaluation."""
        read = x.shape[1] - start if self.predicts_first else x.shape[1] - 1 - max(start - 1, 0)
        self.evaluations += read > 0
        self.tokens += read
        theta = self.transform.conditioner(x, label, cache, start, temperature)
        if self._v is not None:
            self._observe(self._v, x, theta, start)
        return theta

    def _observe(self, v: Tensor, x: Tensor, theta: Tensor, start: int) -> None:
        stop = x.shape[1]
        if len(x) < len(v):
            self.passes.append(Pass(start, stop, len(x), None, stop))
            return
        u, target = x[:, start:], v[:, start:stop]
        image = self.conditional.inverse(target, theta)
        fine = solved(self.conditional, u, image, target, theta, self._tolerance)
        leading = fine.cumprod(1).sum(1)
        known = (start + leading + 1).clamp(max=stop)
        self.passes.append(Pass(start, stop, len(x), int(known.min()), int(known.max())))


@final
class Inversion:
    """A solver that guides, repairs, watches for non-finite values and keeps records.

    Args:
        solvers: one for every block in generation order, or one for all.
        seeds: of the samples, for error messages.
        guidance: None for none.
        null_label: see `GuidedTransform`.
        on_nonfinite: see `Watch`.
        tolerance: backward error of a block above which a sample is inverted again, token by
            token; None: by the network's dtype. Not checked for the sequential solver.
        observe: keep a record of every pass.
    """

    def __init__(
        self,
        solvers: Solver | Sequence[Solver],
        seeds: Sequence[int],
        *,
        guidance: Guidance | None = None,
        null_label: int | None = None,
        on_nonfinite: OnNonFinite = "raise",
        tolerance: float | None = None,
        observe: bool = False,
    ) -> None:
        self.solvers = solvers
        self.guidance = guidance
        self.null_label = null_label
        self.tolerance = tolerance
        self.observe = observe
        self.watch = Watch(seeds, on_nonfinite)
        self.records: list[BlockRecord] = []

    @torch.no_grad()
    def __call__(
        self, transform: AutoregressiveTransform, z: Tokens, label: Labels | None
    ) -> Tokens:
        """Invert one block; see `Solver`. Raises ValueError for more blocks than solvers."""
        began = time.perf_counter()
        index = len(self.records)
        solver = self.solvers
        if isinstance(solver, Sequence):
            if index >= len(solver):
                raise ValueError(f"expected a solver for every block, got {len(solver)}")
            solver = solver[index]
        system = transform
        if self.guidance is not None:
            system = GuidedTransform(transform, self.guidance, self.null_label)
        tolerance = tolerance_of(system, self.tolerance)
        counted = CountedTransform(system, z if self.observe else None, WHILE_SOLVING * tolerance)
        u = solver(counted, z, label)
        repaired = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        if not _is_exact(solver):
            residual = backward_error(system, u, z, label)
            repaired = ~(residual <= tolerance)  # also where it is not finite
            if bool(repaired.any()):
                _repair(counted, u, residual, z, label, repaired)
        self.watch(u, f"block {index + 1} in generation order")
        self.records.append(
            BlockRecord(
                counted.evaluations,
                counted.tokens,
                time.perf_counter() - began,
                repaired,
                tuple(counted.passes),
            )
        )
        return u


def _is_exact(solver: Solver) -> bool:
    """Whether it is the reference inverse in the network's own dtype."""
    return isinstance(solver, Sequential) and solver.decoding.dtype is None


def _repair(
    transform: CountedTransform,
    u: Tensor,
    residual: Tensor,
    z: Tensor,
    label: Tensor | None,
    rows: Tensor,
) -> None:
    """Put the reference inverse of these samples into `u`, unless its residual is larger."""
    part = None if label is None else label[rows]
    again = transform.inverse(z[rows], part)
    after = backward_error(transform.transform, again, z[rows], part)
    better = ~(after > residual[rows])  # also if either is not finite
    u[rows] = torch.where(better[:, None, None], again, u[rows])
