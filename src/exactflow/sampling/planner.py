"""Which solver for which block, by measurement on this machine: no lists tuned by hand.

Published accelerators choose segments and iteration caps per model by hand (arXiv 2505.12849) or
make all blocks but one parallel (arXiv 2505.24791). Whether a parallel pass pays depends on the
block, the batch and the machine: so ask them.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from exactflow.core.doors import as_flow, require_model
from exactflow.core.model import Flow, NonFiniteError, autoregressive_parts
from exactflow.core.progress import shown_progress
from exactflow.core.transform import AutoregressiveTransform, Decoding, Solver
from exactflow.nn import compiled
from exactflow.sampling.certificate import WHILE_SOLVING, backward_error, tolerance_of
from exactflow.sampling.flow_solvers import Adaptive, BlockSolvers, Sequential
from exactflow.sampling.inversion import CountedTransform
from exactflow.sampling.noise import Noise
from exactflow.sampling.plan import BlockPlan, Candidate, InversionPlan, Measured

FIRST_LOOKAHEAD = 32
MARGIN = 0.97  # of the reference's time: what is no faster than this is not chosen
ENOUGH = 0.5  # seconds spent on timing one candidate, warm-up aside
AS_GOOD = 2.0  # times the reference's own error: what is no worse counts as exact
HOPELESS = 2.0  # times the best: no relative of such a candidate is tried


def plan(
    model: Flow,
    batch_size: int = 64,
    *,
    tolerance: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> InversionPlan:
    """Measure on this machine how each block of a flow is inverted fastest.

    The blocks invert latents drawn from the prior by every solver that fits; what is not exact or
    no faster than token by token is not chosen. `sample` takes the result as a solver,
    `sample(model, 64, solver=plan.solvers())`, or finds it beside a model that is loaded later,
    `keep_plans(folder, [plan])`, which is what `exactflow plan` does.

    Args:
        model: a flow with autoregressive parts.
        batch_size: samples decoded together; with guidance, twice as many.
        tolerance: backward error up to which a candidate's result counts as exact; None: what
            rounding leaves of the network's dtype. One of 1e-2 admits bfloat16.
        seed: of the latents.
        progress: show which block and candidate is being measured.

    Raises:
        NonFiniteError: the model's own inverse is not finite.
        ValueError: a batch of no samples, or a model that is no flow.
    """
    require_model(model)
    as_flow(model)
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")
    noise = Noise(model, model.prior.shape, range(seed, seed + batch_size), "plan")()
    label = None
    if model.num_classes:
        label = torch.arange(batch_size, device=model.device) % model.num_classes
    blocks, found = autoregressive_parts(model), []
    memory: dict[Any, Any] = {}
    title = f"batch {batch_size}"
    with shown_progress(len(blocks), title, unit="blocks", quiet=not progress) as advance:

        def report(what: str) -> None:
            advance(0, f"block {len(found) + 1} of {len(blocks)}: {what}")

        def measure(transform: AutoregressiveTransform, z: Tensor, label: Tensor | None) -> Tensor:
            """A solver that plans its block on the way."""
            probe = _Probe(transform, z, label, tolerance_of(transform, tolerance), memory, report)
            found.append(probe.plan())
            advance(1)
            return probe.reference

        model.decode(model.prior.from_noise(noise), label, solver=measure)
    allowed = tolerance_of(blocks[0], tolerance) if blocks else math.inf
    return InversionPlan(*circumstances(model), batch_size, allowed, tuple(found))


@final
class _Probe:
    """One block, one batch: times candidates and checks their results."""

    def __init__(
        self,
        transform: AutoregressiveTransform,
        v: Tensor,
        label: Tensor | None,
        tolerance: float,
        memory: dict[Any, Any],
        report: Callable[[str], None],
    ) -> None:
        self.transform, self.v, self.label = transform, v, label
        self.tolerance, self.memory, self.report = tolerance, memory, report
        self.measured: dict[Candidate, Measured] = {}
        report("sequential")
        self.reference = transform.inverse(v, label)
        if not bool(self.reference.isfinite().all()):
            raise NonFiniteError("this model's inverse is not finite: there is nothing to plan")
        # kernels round differently: where that alone exceeds the tolerance, the reference does too
        own = float(backward_error(transform, self.reference, v, label).max())
        self.allowed = max(tolerance, AS_GOOD * own)

    def plan(self) -> BlockPlan:
        """Measure, choose, and confirm the choice against the reference."""
        reference = Candidate()
        self.run(reference)
        for candidate in filter(self.possible, self.sequential_ones()):
            self.run(candidate)
        self.climb(min(self.measured, key=self.seconds).step)
        best = min(self.measured, key=self.seconds)
        took = self.duel(reference, best)
        if took[1] > MARGIN * took[0]:
            best, took = reference, (took[0], took[0])
        self.report("windows")
        return BlockPlan(
            best,
            *took,
            self.windows(),
            self.frontier(),
            {str(candidate): found for candidate, found in self.measured.items()},
        )

    def seconds(self, candidate: Candidate) -> float:
        return self.measured[candidate].seconds

    def possible(self, candidate: Candidate) -> bool:
        """Whether this network can be decoded that way."""
        try:
            self.transform.new_cache(self.v, candidate.decoding(self.memory))
        except ValueError:
            return False
        return True

    def sequential_ones(self) -> Iterator[Candidate]:
        """Other steps, and in reduced precision where the tolerance may allow for it."""
        weight = next(self.transform.parameters())
        reduced = ["bfloat16"] if weight.dtype == torch.float32 and self.tolerance >= 1e-3 else []
        if weight.device.type == "cuda":
            yield from (Candidate(step="graph", dtype=dtype) for dtype in [None, *reduced])
        else:
            if compiled.available() and weight.dtype in (torch.float32, torch.float64):
                yield Candidate(step="compiled")
            yield from (Candidate(dtype=dtype) for dtype in reduced)

    def climb(self, step: Literal["eager", "compiled", "graph"]) -> None:
        """Adaptive solvers: from one lookahead to the next, both ways, while it gets better."""
        for factor in (2.0, 0.5):
            lookahead, best = float(min(FIRST_LOOKAHEAD, self.transform.num_tokens)), math.inf
            while 1 < lookahead <= 2 * self.transform.num_tokens:
                candidate = Candidate("adaptive", int(lookahead), step)
                if candidate not in self.measured:
                    self.run(candidate)
                took = self.measured.get(candidate)
                least = min(found.seconds for found in self.measured.values())
                if took is None or took.seconds >= best or took.seconds > HOPELESS * least:
                    break
                best, lookahead = took.seconds, lookahead * factor

    def run(self, candidate: Candidate) -> None:
        """Time a candidate; one whose result is not exact is dropped."""
        self.report(str(candidate))
        solver = candidate.build(self.tolerance, self.memory)
        counted = CountedTransform(self.transform)
        u = solver(counted, self.v, self.label)  # also compiles, captures, allocates
        worst = float(backward_error(self.transform, u, self.v, self.label).max())
        if not worst <= self.allowed and candidate != Candidate():
            return
        took = [self.time(solver)]
        while sum(took) < ENOUGH and len(took) < 5:
            took.append(self.time(solver))
        self.measured[candidate] = Measured(min(took), counted.evaluations, counted.tokens, worst)

    def duel(self, first: Candidate, second: Candidate) -> tuple[float, float]:
        """Least of five runs of each, in turn: other work on the machine only ever adds."""
        solvers = [c.build(self.tolerance, self.memory) for c in (first, second)]
        rounds = [[self.time(solver) for solver in solvers] for _ in range(5)]
        one, other = (min(column) for column in zip(*rounds, strict=True))
        return one, other

    def time(self, solver: Solver) -> float:
        _synchronize(self.v.device)
        began = time.perf_counter()
        solver(self.transform, self.v, self.label)
        _synchronize(self.v.device)
        return time.perf_counter() - began

    def windows(self) -> dict[int, float]:
        """Seconds of one pass over 1, 2, 4 ... tokens."""
        tokens, found = self.transform.num_tokens, {}
        with torch.inference_mode():
            cache = self.transform.new_cache(self.v, Decoding(memory=self.memory))
            self.transform.conditioner(self.reference, self.label, cache)
            size = 1
            while size < 2 * tokens:
                size = min(size, tokens)
                start = (tokens - size) // 2
                seen = self.reference[:, : start + size]
                took = []
                for _ in range(3):
                    _synchronize(self.v.device)
                    began = time.perf_counter()
                    self.transform.conditioner(seen, self.label, cache, start)
                    _synchronize(self.v.device)
                    took.append(time.perf_counter() - began)
                found[size] = min(took)
                size *= 2
        return found

    def frontier(self) -> tuple[int, ...]:
        """How fast the block converges when everything is evaluated at every pass."""
        observed = CountedTransform(self.transform, self.v, WHILE_SOLVING * self.tolerance)
        Adaptive(self.v.shape[1], tolerance=self.tolerance)(observed, self.v, self.label)
        return tuple(step.least for step in observed.passes if step.least is not None)


@final
class Planned(BlockSolvers):
    """What the model's plans say for so many samples at once; sequential without a plan.

    A plan of another machine or dtype does not count, and a warning says so. One for fewer samples
    does not either, since more samples leave parallel passes less to win; nor one that allows for
    more error than the tolerance. A process that has no compiled step yet loads it only where so
    many batches earn it.
    """

    def of_blocks(self, flow: Flow, rows: int, batches: int) -> Sequence[Solver]:
        """See `BlockSolvers.of_blocks`."""
        blocks, plans = autoregressive_parts(flow), flow.plans
        sequential, ours = [Sequential()] * len(blocks), circumstances(flow)
        here = [p for p in plans if (p.machine, p.dtype) == ours]
        if plans and not here:
            warnings.warn(
                f"the model's plan is not used: it was measured on {plans[0].machine}, "
                f"{plans[0].dtype}, and this is {', '.join(ours)}; `exactflow plan` measures here",
                stacklevel=3,
            )
        limit = tolerance_of(blocks[0], self.tolerance or None) if here else 0.0
        fitting = [p for p in here if p.batch_size >= rows and p.tolerance <= limit]
        if not fitting:
            return sequential
        chosen = min(fitting, key=lambda p: p.batch_size)
        if not compiled.loaded() and batches < chosen.batches_to_earn(compiled.LOADING):
            return sequential
        return chosen.solvers()


def machine(device: torch.device) -> str:
    """What a plan's times depend on beside the model."""
    name = f"cpu, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif compiled.available():
        name += ", compiled steps"
    return f"{name}, torch {torch.__version__}"


def circumstances(model: Flow) -> tuple[str, str]:
    """Machine and dtype that a plan for the model where it is must be of."""
    return machine(model.device), str(model.dtype).removeprefix("torch.")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
