"""Samples of models on a path, by its differential equation or by its chain."""

import math
import time
from collections.abc import Sequence
from typing import ClassVar, Literal, cast, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from exactflow.core.model import NonFiniteError, evaluating
from exactflow.core.progress import tracked
from exactflow.core.random import generator, normal_rows
from exactflow.paths.chain_model import ChainModel
from exactflow.paths.ode import OdeSolver, State, edm_times, solve, uniform_times
from exactflow.paths.path import InterpolatedCosine, Path
from exactflow.paths.path_model import PathModel, Prediction
from exactflow.sampling.dpm_solver import dpm_solver
from exactflow.sampling.reverse import DDIM, Ancestral, classifier_free
from exactflow.sampling.sample_chain import sample_chain
from exactflow.sampling.samples import Samples

ODE_SOLVERS = ("euler", "midpoint", "heun", "dopri5", "dpm++")
CHAIN_SOLVERS = ("ancestral", "ddim")
STEPS = {"ancestral": 250, "ddim": 50, "dpm++": 50}  # where none are given; others take 50
TOLERANCE = 1e-5  # of "dopri5"
OnNonFinite = Literal["raise", "omit"]
SIGMA_MAX, SIGMA_MIN = 160.0, 1e-2  # noise levels that HDiT is sampled between


def sample_path(
    model: PathModel,
    n: int,
    label: Int[Tensor, " n"] | None,
    seed: int,
    solver: str = "auto",
    scale: float = 0.0,
    *,
    steps: int | None = None,
    tolerance: float | None = None,
    batch_size: int = 64,
    on_nonfinite: OnNonFinite = "raise",
    progress: bool = False,
) -> Samples:
    """Draw `n` samples; sample k is a function of seed + k, whatever its batch.

    Args:
        model: a model on a path.
        n: number of samples.
        label: class of each sample; None for dropped labels.
        seed: first seed.
        solver: "euler", "midpoint", "heun", "dopri5" or "dpm++" of the probability flow, and for a
            chain "ancestral" or "ddim" besides; "auto": ancestral, dpm++ on a path of log-SNRs,
            heun.
        scale: of classifier-free guidance, w in (1 + w) conditional - w unconditional.
        steps: of the solver, of a chain at most its own; "dopri5" chooses its own.
        tolerance: of "dopri5".
        batch_size: samples drawn together.
        on_nonfinite: what a NaN or an infinity does: an error, or left out and reported.
        progress: show a bar.

    Raises:
        NonFiniteError: names the first seed whose sample is not finite.
        ValueError: for a solver or steps that the model does not have, and for an option that has
            no meaning for this solver.
    """
    known = (*CHAIN_SOLVERS, *ODE_SOLVERS) if isinstance(model, ChainModel) else ODE_SOLVERS
    if solver == "auto":
        fine = isinstance(model.path, InterpolatedCosine)
        solver = "ancestral" if isinstance(model, ChainModel) else "dpm++" if fine else "heun"
    if solver not in known:
        raise ValueError(f"expected solver auto | {' | '.join(known)}, got {solver!r}")
    if not 0 <= scale < math.inf:
        raise ValueError(f"expected a finite guidance scale >= 0, got {scale}")
    if scale and label is None:
        raise ValueError("guidance needs labels to guide to")
    count = _steps(model, solver, steps)
    if solver != "dopri5" and tolerance is not None:
        raise ValueError(f"tolerance has no meaning for the solver {solver!r}: it is of 'dopri5'")
    began = time.perf_counter()
    if isinstance(model, ChainModel) and solver in CHAIN_SOLVERS:
        x, evaluations = _by_chain(
            model, n, label, seed, solver, scale, count, batch_size, progress
        )
        failures = _failures(x, range(seed, seed + n), on_nonfinite)
        return _samples(model, x, label, seed, evaluations, failures, began)
    evaluations, parts, failures = 0, [], {}
    guided = ClassifierFree(model, scale) if scale else model
    starts = range(0, n, batch_size)
    with evaluating(model):
        for first in tracked(starts, len(starts), "sampling", shown=progress):
            seeds = range(seed + first, seed + min(first + batch_size, n))
            chunk = None if label is None else label[first : first + len(seeds)]
            noise = _noise(model, seeds)
            lost = "raise" if on_nonfinite == "raise" else "nan"
            x, passes = _solved(guided, noise, seeds, chunk, solver, count, tolerance, lost)
            failures |= _failures(x, seeds, on_nonfinite)
            parts.append(x)
            evaluations += passes * (2 if scale else 1)
    return _samples(model, torch.cat(parts), label, seed, evaluations, failures, began)


def _steps(model: PathModel, solver: str, steps: int | None) -> int:
    """How many this solver takes. Raises ValueError for a number that it cannot take."""
    most, least = None, 1
    if isinstance(model, ChainModel) and solver in CHAIN_SOLVERS:
        most, least = model.chain.steps, min(2, model.chain.steps)
    if steps is None:
        usual = STEPS.get(solver, 50)
        return usual if most is None else min(usual, most)
    if solver == "dopri5":
        raise ValueError("steps has no meaning for the solver 'dopri5', which chooses its own")
    if steps < least or (most is not None and steps > most):
        allowed = f"steps >= {least}" if most is None else f"{least} .. {most} steps of this chain"
        raise ValueError(f"expected {allowed}, got {steps}")
    return steps


def _noise(model: PathModel, seeds: range) -> Tensor:
    dtype = torch.promote_types(model.dtype, torch.float32)
    noise = normal_rows(model.event_shape, [generator(seed, "sample") for seed in seeds])
    return noise.to(dtype).to(model.device)


@torch.no_grad()
def _solved(
    model: PathModel,
    noise: Tensor,
    seeds: range,
    label: Tensor | None,
    solver: str,
    steps: int,
    tolerance: float | None,
    lost: Literal["raise", "nan"],
) -> tuple[Tensor, int]:
    """The end of the probability flow from noise, and passes of the network."""
    times = _times(model, solver, steps)
    sigma = float(model.path.at(torch.tensor(times[0], dtype=torch.float64)).sigma)
    if solver == "dpm++":
        found = dpm_solver(model, sigma * noise, times, label)
        return found.x, found.evaluations

    def field(t: Tensor, state: State) -> State:
        return (model.velocity(state[0], t, label),)

    method = cast("OdeSolver", solver)  # checked by `sample_path`
    names = [f"the sample of seed {seed}" for seed in seeds]
    tolerance = TOLERANCE if tolerance is None else tolerance
    solution = solve(field, (sigma * noise,), times, method, tolerance, names, lost)
    return solution.state[0], solution.evaluations


def _times(model: PathModel, solver: str, steps: int) -> list[float]:
    """Where the solver evaluates: published noise levels for HDiT's path, else even steps."""
    if isinstance(model.path, InterpolatedCosine):
        return edm_times(model.path, steps, SIGMA_MAX, SIGMA_MIN)
    if solver == "dpm++":  # in log-SNR, which is infinite at the ends
        ends = model.path.at(torch.tensor(model.span, dtype=torch.float64))
        most, least = (ends.sigma / ends.alpha).tolist()
        return edm_times(model.path, steps, min(80.0, 0.99 * most), max(0.002, 1.01 * least))
    return uniform_times(steps, *model.span)


def _by_chain(
    model: ChainModel,
    n: int,
    label: Tensor | None,
    seed: int,
    solver: str,
    scale: float,
    steps: int,
    batch_size: int,
    progress: bool,
) -> tuple[Tensor, int]:
    respacing = "" if steps == model.chain.steps else str(steps)
    with evaluating(model):
        drawn = sample_chain(
            model,
            n,
            label,
            seed,
            rule=Ancestral() if solver == "ancestral" else DDIM(),
            respacing=respacing,
            wrap=(lambda network: classifier_free(network, network, scale)) if scale else None,
            batch_size=batch_size,
            check_finite=False,  # by the caller, which may leave samples out
            progress=progress,
        )
    return drawn.x, drawn.evaluations


def _samples(
    model: PathModel,
    x: Tensor,
    label: Tensor | None,
    seed: int,
    evaluations: int,
    failures: dict[int, str],
    began: float,
) -> Samples:
    """Without the samples that failed."""
    kept = [row for row in range(len(x)) if seed + row not in failures]
    x = x[kept]
    return Samples(
        x=x,
        images=model.to_grey_levels(x),
        seeds=tuple(seed + row for row in kept),
        label=None if label is None else label[kept],
        evaluations=evaluations,
        iterations=(),
        seconds=time.perf_counter() - began,
        certificate=torch.full((len(x),), torch.nan),
        repairs=(),
        beyond_tolerance=(),
        failures=failures,
        trace=None,
        passes=None,
    )


def _failures(x: Tensor, seeds: range, on_nonfinite: OnNonFinite) -> dict[int, str]:
    """Seed -> place of samples that are not finite. Raises NonFiniteError unless told to omit."""
    finite = x.flatten(1).isfinite().all(1)
    failed = [seeds[row] for row in (~finite).nonzero()[:, 0].tolist()]
    if failed and on_nonfinite == "raise":
        raise NonFiniteError(
            f"the sample of seed {failed[0]} is not finite "
            f"({len(failed)} of {len(seeds)} samples of this batch are not)"
        )
    return dict.fromkeys(failed, "the image")


@final
class ClassifierFree(PathModel):
    """A model that says (1 + w) conditional - w unconditional (Ho and Salimans, 2207.12598).

    A view: two passes of the network for every prediction.
    """

    kind: ClassVar[str] = "classifier-free"

    def __init__(self, model: PathModel, scale: float) -> None:
        super().__init__()
        self.config = model.config
        self.dequantized = model.dequantized
        self.model, self.scale = model, scale

    @property
    def stages(self) -> Sequence[nn.Module]:
        return self.model.stages

    @property
    def path(self) -> Path:
        return self.model.path

    @property
    def prediction(self) -> Prediction:
        return self.model.prediction

    def predict(
        self,
        x_t: Float[Tensor, "batch channels height width"],
        t: Float[Tensor, " batch"],
        label: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """See `PathModel.predict`."""
        conditional = self.model.predict(x_t, t, label)
        return conditional + self.scale * (conditional - self.model.predict(x_t, t, None))

    def loss(
        self,
        images: Int[Tensor, "batch channels height width"],
        label: Int[Tensor, " batch"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, " batch"]:
        """The model's own loss: guidance does not enter it."""
        return self.model.loss(images, label, generator=generator)
