"""Log-likelihood of a path model by its probability flow: an estimate, with its error sources.

ln p(x) = ln N(x(0); 0, I) - integral of div v(x(t), t) dt over t = 0 .. 1, along the ODE
dx/dt = v solved from the image back to noise (arXiv 1806.07366, eq. 3; arXiv 2210.02747, app. C).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from exactflow.core import grey_levels as grey
from exactflow.core.prior import DiagonalGaussian
from exactflow.core.randomness import generator, normal_rows, uniform_rows
from exactflow.core.shapes import GreyLevels, Labels, PerSample
from exactflow.likelihood.draws import ONE_DRAW, Draws
from exactflow.likelihood.value import LogLikelihood, check_finite
from exactflow.paths.ode import Dopri5, Field, OdeSolver, State, uniform_times
from exactflow.paths.path_model import PathModel

Probe = Literal["rademacher", "gaussian"]


@final
@dataclass(frozen=True)
class Hutchinson:
    """The divergence by random probes, each fixed for the whole trajectory.

    Attributes:
        probe: their law; "rademacher" is exact for diagonal Jacobians.
        probes: how many.
    """

    probe: Probe = "rademacher"
    probes: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError for another law, or no probe."""
        if self.probe not in get_args(Probe) or self.probes < 1:
            raise ValueError(
                f"expected probe {' | '.join(get_args(Probe))} and probes of at least 1, "
                f"got {self.probe!r} and {self.probes}"
            )

    def vectors(
        self, model: PathModel, seed: int, numbers: range, draw: int
    ) -> Float[Tensor, "probes batch channels height width"]:
        """The probes of a draw of these images; probe j has a stream of its own."""
        rows = []
        for j in range(self.probes):
            sources = [generator(seed, "probe", number, draw, j) for number in numbers]
            if self.probe == "gaussian":
                rows.append(normal_rows(model.event_shape, sources))
            else:
                rows.append(torch.where(uniform_rows(model.event_shape, sources) < 0.5, -1.0, 1.0))
        return torch.stack(rows).to(model.wide_dtype).to(model.device)

    def facts(self, dims: int) -> dict[str, Any]:
        """Its entries in the details of an estimate."""
        return {"trace": "hutchinson", "probe": self.probe, "probes": self.probes}

    def error(self, each: Float[Tensor, "n probes"], dims: int) -> float | None:
        """Standard error, in bits/dim, of the mean over images that is due to the probes."""
        if self.probes == 1:
            return None
        error = each.std(1) / math.sqrt(self.probes)
        return -grey.bits_per_dim(float(error.square().sum().sqrt()) / len(each), dims)


@final
@dataclass(frozen=True)
class ExactTrace:
    """The divergence by all basis vectors: exact up to the solver's error."""

    def vectors(self, model: PathModel, seed: int, numbers: range, draw: int) -> None:
        """See `Hutchinson.vectors`: none, which stands for the basis."""

    def facts(self, dims: int) -> dict[str, Any]:
        """Its entries in the details of an estimate."""
        return {"trace": "exact", "probe": None, "probes": dims}

    def error(self, each: Float[Tensor, "n one"], dims: int) -> float:
        """See `Hutchinson.error`."""
        return 0.0


ADAPTIVE, ONE_PROBE = Dopri5(), Hutchinson()


@torch.no_grad()
def ode_log_likelihood(
    model: PathModel,
    images: Integer[Tensor, "n channels height width"],
    label: Int[Tensor, " n"] | None = None,
    draws: Draws = ONE_DRAW,
    *,
    solver: OdeSolver = ADAPTIVE,
    trace: Hutchinson | ExactTrace = ONE_PROBE,
) -> LogLikelihood:
    """Score integer images; noise and probes of image i are functions of (seed, i).

    The result does not depend on the batch size beyond rounding: "dopri5" chooses the steps of
    every image by itself. Its `details` are:

    - solver, and its steps or its tolerance;
    - evaluations of the network for one image, all draws together, mean over images;
    - trace, probe and probes: vector-Jacobian products per evaluation, dims for the exact trace;
    - probe_standard_error, the part of the error of `bits_per_dim` that more probes would remove;
      None for a single probe;
    - prior_gap, nats per image, mean: KL(N(alpha x, sigma^2 I) || N(0, I)) where the trajectory
      ends. Bounds the divergence of the model's noise end from the prior that is scored;
    - blur, sigma / alpha where the trajectory starts: the density is that of images with so much
      Gaussian noise, in [-1, 1] units; 0 for a path that reaches the data;
    - trained_on: dequantised or centred images. Scored are always dequantised ones, on which a
      model of centred images (grey levels without noise) is worse.

    Args:
        model: a model of a path; scored in evaluation mode.
        images: grey levels 0 .. levels-1, on any device.
        label: class of each image; None scores without labels.
        draws: noise and batches.
        solver: of the differential equation, over equal steps.
        trace: how the divergence is computed.

    Raises:
        ValueError: for images that are not such integers, or labels the model cannot take.
        NonFiniteError: names the first image whose likelihood is not finite.
    """
    trajectory = _Trajectory(model, draws, solver, trace)
    results = draws.by_batch(model, images, label, trajectory.score)
    nats = torch.cat([mean for mean, _, _ in results])
    check_finite(nats, draws.first, "the model's velocity overflows on it")
    details = {
        "solver": solver.name,
        "steps": solver.steps,
        "tolerance": solver.tolerance,
        "evaluations": sum(count for _, _, count in results) / len(images),
        **trace.facts(model.dims),
        "probe_standard_error": trace.error(torch.cat([by for _, by, _ in results]), model.dims),
        "prior_gap": _prior_gap(model, images),
        "blur": _blur(model),
        "trained_on": "dequantised images" if model.dequantized else "centred images",
    }
    facts = model.dims, model.levels, draws.k
    return LogLikelihood(nats - model.level_nats, "estimate", *facts, details=details)


@final
@dataclass(frozen=True)
class _Trajectory:
    """ln p of images by the probability flow from images to noise."""

    model: PathModel
    draws: Draws
    solver: OdeSolver
    trace: Hutchinson | ExactTrace

    def score(
        self, images: GreyLevels, label: Labels | None, numbers: range
    ) -> tuple[PerSample, Float[Tensor, "batch probes"], int]:
        """ln of the mean density over draws, the same by each probe alone, and evaluations."""
        densities, evaluations, model = [], 0, self.model
        for draw in range(self.draws.k):
            noise = self.draws.noise(model, model.event_shape, numbers, draw, uniform=True)
            x = grey.dequantize(images, noise, model.levels)
            vectors = self.trace.vectors(model, self.draws.seed, numbers, draw)
            found, count = self._density(x, label, vectors, numbers)
            densities.append(found)
            evaluations += count * len(numbers)
        each = torch.stack(densities)
        k = math.log(len(each))
        return each.mean(2).logsumexp(0) - k, each.logsumexp(0) - k, evaluations

    def _density(
        self, x: Tensor, label: Tensor | None, vectors: Tensor | None, numbers: range
    ) -> tuple[Float[Tensor, "batch probes"], int]:
        """ln p(x) in nats by each probe, one column if exact, float64 on the CPU; evaluations."""
        count = 1 if vectors is None else len(vectors)
        state = x, x.new_zeros(len(x), count)
        field = with_divergence(self.model, label, vectors)
        start, end = self.model.span
        times = uniform_times(self.solver.steps or 1, end, start)
        names = [f"image {number}" for number in numbers]
        solved = self.solver.solve(field, state, times, names)
        z, log_abs_det = solved.state
        prior = DiagonalGaussian(torch.ones_like(z[0])).log_prob(z)
        return (prior[:, None] + log_abs_det).double().cpu(), solved.evaluations


def with_divergence(
    model: PathModel,
    label: Labels | None,
    vectors: Float[Tensor, "probes batch channels height width"] | None,
) -> Field:
    """Rate of (x, ln det): the velocity, and its divergence by each probe, (batch, probes).

    Args:
        model: gives the velocity.
        label: class of each sample.
        vectors: probes z, E[z z^T] = I: z^T J z estimates the trace of the Jacobian J (Hutchinson);
            None: the trace itself, one backward pass per dimension, as one column.
    """

    def field(t: Tensor, state: State) -> State:
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            v = model.velocity(x, t, label)
        probes = _basis(x) if vectors is None else vectors
        traces = []
        for index, z in enumerate(probes):
            more = index + 1 < len(probes)
            (pulled,) = torch.autograd.grad(v, x, z.expand_as(v), retain_graph=more)
            traces.append((pulled * z).flatten(1).sum(1))
        divergence = torch.stack(traces, 1)
        if vectors is None:
            divergence = divergence.sum(1, keepdim=True)
        return v.detach(), divergence

    return field


def _basis(x: Tensor) -> Float[Tensor, "dims 1 channels height width"]:
    dims = x[0].numel()
    return torch.eye(dims, dtype=x.dtype, device=x.device).view(dims, 1, *x.shape[1:])


def _prior_gap(model: PathModel, images: Tensor) -> float:
    """The entry prior_gap of `ode_log_likelihood`."""
    noise = model.path.at(torch.tensor(model.span[0], dtype=torch.float64))
    middle = torch.full((model.levels,), 0.5, dtype=torch.float64)
    squares = grey.dequantize(torch.arange(model.levels), middle, model.levels).square()
    power = float(squares[images.cpu().long()].flatten(1).sum(1).mean())
    variance = float(noise.sigma) ** 2
    excess = model.dims * (variance - 1 - math.log(variance))
    return 0.5 * (float(noise.alpha) ** 2 * power + excess)


def _blur(model: PathModel) -> float:
    data = model.path.at(torch.tensor(model.span[1], dtype=torch.float64))
    return float(data.sigma / data.alpha)
