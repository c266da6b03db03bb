"""Samples of models on a path, by its differential equation or by its chain."""

import time
from collections.abc import Sequence
from typing import ClassVar, cast, final

import torch
from jaxtyping import Float, Int
from rich.progress import track
from torch import Tensor, nn

from exactflow.core.model import NonFiniteError, evaluating
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
        steps: of the solver; "dopri5" chooses its own.
        tolerance: of "dopri5".
        batch_size: samples drawn together.
        progress: show a bar.

    Raises:
        NonFiniteError: names the first seed whose sample is not finite.
        ValueError: for a solver or steps that the model does not have.
    """
    known = (*CHAIN_SOLVERS, *ODE_SOLVERS) if isinstance(model, ChainModel) else ODE_SOLVERS
    if solver == "auto":
        fine = isinstance(model.path, InterpolatedCosine)
        solver = "ancestral" if isinstance(model, ChainModel) else "dpm++" if fine else "heun"
    if solver not in known:
        raise ValueError(f"expected solver auto | {' | '.join(known)}, got {solver!r}")
    if scale and label is None:
        raise ValueError("guidance needs labels to guide to")
    count = STEPS.get(solver, 50) if steps is None else steps
    if isinstance(model, ChainModel) and solver in CHAIN_SOLVERS:
        return _by_chain(model, n, label, seed, solver, scale, count, batch_size, progress)
    began, evaluations, parts = time.perf_counter(), 0, []
    guided = ClassifierFree(model, scale) if scale else model
    starts = range(0, n, batch_size)
    with evaluating(model):
        for first in track(starts, "sampling", transient=True) if progress else starts:
            seeds = range(seed + first, seed + min(first + batch_size, n))
            chunk = None if label is None else label[first : first + len(seeds)]
            noise = _noise(model, seeds)
            x, passes = _solved(guided, noise, seeds, chunk, solver, count, tolerance)
            _check_finite(x, seeds)
            parts.append(x)
            evaluations += passes * (2 if scale else 1)
    return _samples(model, torch.cat(parts), label, seed, evaluations, began)


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
    solution = solve(field, (sigma * noise,), times, method, tolerance or TOLERANCE, names)
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
) -> Samples:
    began, whole = time.perf_counter(), model.chain.steps
    respacing = "" if steps >= whole else str(steps)
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
            progress=progress,
        )
    return _samples(model, drawn.x, label, seed, drawn.evaluations, began)


def _samples(
    model: PathModel, x: Tensor, label: Tensor | None, seed: int, evaluations: int, began: float
) -> Samples:
    return Samples(
        x=x,
        images=model.to_grey_levels(x),
        seeds=tuple(range(seed, seed + len(x))),
        label=label,
        evaluations=evaluations,
        iterations=(),
        seconds=time.perf_counter() - began,
        certificate=torch.full((len(x),), torch.nan),
        repairs=(),
        failures={},
        trace=None,
        passes=None,
    )


def _check_finite(x: Tensor, seeds: range) -> None:
    finite = x.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        seed = seeds[int((~finite).nonzero()[0, 0])]
        raise NonFiniteError(
            f"the sample of seed {seed} is not finite "
            f"({int((~finite).sum())} of {len(seeds)} samples of this batch are not)"
        )


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
    def event_shape(self) -> tuple[int, int, int]:
        return self.model.event_shape

    @property
    def levels(self) -> int:
        return self.model.levels

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

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
