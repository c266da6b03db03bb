"""Log-likelihood of a path model by its probability flow: an estimate, with its error sources.

ln p(x) = ln N(x(0); 0, I) - integral of div v(x(t), t) dt over t = 0 .. 1, along the ODE
dx/dt = v solved from the image back to noise (arXiv 1806.07366, eq. 3; arXiv 2210.02747, app. C).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from exactflow.core import images as grey
from exactflow.core.model import NonFiniteError
from exactflow.core.prior import DiagonalGaussian
from exactflow.core.process_group import current
from exactflow.core.random import generator, normal_rows, uniform_rows
from exactflow.paths.ode import Field, OdeSolver, State, solve, uniform_times
from exactflow.paths.path_model import PathModel

Trace = Literal["hutchinson", "exact"]
Probe = Literal["rademacher", "gaussian"]
TrainedOn = Literal["dequantised images", "centred images"]


@final
@dataclass(frozen=True)
class OdeEstimate:
    """Estimated log-likelihood of each image, and what it rests on.

    Attributes:
        nats: (n,), float64: ln of the mean over k dequantisation draws of the estimated density
            times the volume of a grey level, an estimate of ln P(integer image). The probes' noise
            enters that mean's exponentials, so that for k > 1 it errs upwards.
        dims: C * H * W.
        levels: number of grey levels.
        k: dequantisation draws per image; 1 is what single-draw flows compare with.
        solver: how the ODE was solved.
        steps: of a fixed grid, at equal distances; None for an adaptive solver.
        tolerance: relative and absolute, of an adaptive solver, the log-determinant included in
            the norm; None for a fixed grid.
        evaluations: network evaluations for one image, all draws together, mean over images.
        trace: "hutchinson", or "exact" up to the solver's error.
        probe: law of Hutchinson's probes; each is fixed for the whole trajectory.
        probes: vector-Jacobian products per evaluation: number of probes, dims for "exact".
        probe_error: (n,) standard error in nats that the probes leave on each image; None for
            "exact" and for a single probe, which does not tell.
        prior_gap: nats per image, mean: KL(N(alpha x, sigma^2 I) || N(0, I)) where the trajectory
            ends. Bounds the divergence of the model's noise end from the prior that is scored.
        blur: sigma / alpha where the trajectory starts: the density is that of images with so
            much Gaussian noise, in [-1, 1] units; 0 for a path that reaches the data.
        trained_on: what the model knows the density of. Scored are dequantised images always; a
            model of centred ones, the grey levels without noise between them, is worse on those.
    """

    nats: Float[Tensor, " n"]
    dims: int
    levels: int
    k: int
    solver: OdeSolver
    steps: int | None
    tolerance: float | None
    evaluations: float
    trace: Trace
    probe: Probe | None
    probes: int
    probe_error: Float[Tensor, " n"] | None
    prior_gap: float
    blur: float
    trained_on: TrainedOn

    @property
    def per_image(self) -> Float[Tensor, " n"]:
        """Bits per dimension of each image."""
        return -self.nats / (self.dims * math.log(2))

    @property
    def bits_per_dim(self) -> float:
        """Mean of `per_image`."""
        return float(self.per_image.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of `bits_per_dim` over images, the probes' noise within; NaN for one."""
        return float(self.per_image.std()) / math.sqrt(len(self.nats))

    @property
    def probe_standard_error(self) -> float | None:
        """The part of the error of `bits_per_dim` that more probes would take away."""
        if self.probe_error is None:
            return 0.0 if self.trace == "exact" else None
        nats = float(self.probe_error.square().sum().sqrt()) / len(self.nats)
        return nats / (self.dims * math.log(2))


@torch.no_grad()
def ode_log_likelihood(
    model: PathModel,
    images: Integer[Tensor, "n channels height width"],
    label: Int[Tensor, " n"] | None = None,
    *,
    k: int = 1,
    seed: int = 0,
    solver: OdeSolver = "dopri5",
    steps: int | None = None,
    tolerance: float | None = None,
    trace: Trace = "hutchinson",
    probe: Probe | None = None,
    probes: int | None = None,
    first: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> OdeEstimate:
    """Score integer images; noise and probes of image i are functions of (seed, i).

    The result does not depend on the batch size beyond rounding: "dopri5" chooses the steps of
    every image by itself.

    Args:
        model: a model of a path; scored in evaluation mode.
        images: grey levels 0 .. levels-1, on any device.
        label: class of each image; None scores without labels.
        k: dequantisation draws per image.
        seed: names noise and probes.
        solver: see `paths.ode.solve`.
        steps: of a fixed grid, 100 where None; "dopri5" chooses its own.
        tolerance: of "dopri5", 1e-5 where None.
        trace: divergence by random probes (Hutchinson), or by all dims basis vectors.
        probe: law of random probes, "rademacher" where None: exact for diagonal Jacobians.
        probes: number of random probes, 1 where None.
        first: number of the first image, where these are a part of a set.
        batch_size: images solved together.
        progress: show a bar over batches.

    Raises:
        ValueError: for images that are not such integers, labels the model cannot take, or an
            option that has no meaning for this solver or trace.
        NonFiniteError: names the first image whose likelihood is not finite.
    """
    fixed = solver != "dopri5"
    _refuse(solver, tolerance=tolerance if fixed else None, steps=None if fixed else steps)
    if trace == "exact":
        _refuse("exact trace", probe=probe, probes=probes)
    steps, tolerance = 100 if steps is None else steps, 1e-5 if tolerance is None else tolerance
    probe, probes = probe or "rademacher", 1 if probes is None else probes
    if min(k, batch_size, probes, steps) < 1:
        raise ValueError(
            "expected k, batch_size, probes and steps of at least 1, "
            f"got {k}, {batch_size}, {probes}, {steps}"
        )
    if trace not in ("hutchinson", "exact") or probe not in ("rademacher", "gaussian"):
        raise ValueError(
            "expected trace hutchinson | exact and probe rademacher | gaussian, "
            f"got {trace!r} and {probe!r}"
        )
    grey.check_images(images, model.event_shape, model.levels)
    model.check_label(None if label is None else label.cpu(), len(images))
    start, end = model.span
    trajectory = _Trajectory(model, solver, uniform_times(steps, end, start), tolerance)

    def score(begin: int) -> tuple[Tensor, Tensor, int]:
        rows = slice(begin, begin + batch_size)
        chunk = None if label is None else label[rows].to(model.device)
        numbers = range(first + begin, first + begin + len(images[rows]))
        names = [[(seed, number, d) for number in numbers] for d in range(k)]
        draws, evaluations = [], 0
        for name in names:
            vectors = None if trace == "exact" else _probes(model, name, probe, probes)
            x = _noisy(model, images[rows], name)
            densities, count = trajectory.score(x, chunk, vectors, numbers)
            draws.append(densities)
            evaluations += count * len(name)
        return *_averaged(torch.stack(draws)), evaluations

    starts = range(0, len(images), batch_size)
    with _evaluating(model):
        results = current().spread(starts, score, bar="scoring" if progress else None)
    nats = torch.cat([mean for mean, _, _ in results])
    check_finite(nats, first, "the model's velocity overflows on it")
    return OdeEstimate(
        nats=nats - model.dims * grey.nats_per_level_interval(model.levels),
        dims=model.dims,
        levels=model.levels,
        k=k,
        solver=solver,
        steps=steps if fixed else None,
        tolerance=None if fixed else tolerance,
        evaluations=sum(count for _, _, count in results) / len(images),
        trace=trace,
        probe=None if trace == "exact" else probe,
        probes=model.dims if trace == "exact" else probes,
        probe_error=_probe_error([each for _, each, _ in results]),
        prior_gap=_prior_gap(model, images),
        blur=_blur(model),
        trained_on="dequantised images" if model.dequantized else "centred images",
    )


def _refuse(what: str, **options: object) -> None:
    """Raise ValueError for the first option that is given."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} has no meaning for {what}: expected none, got {value!r}")


@final
@dataclass(frozen=True)
class _Trajectory:
    """How to get from images to noise, and ln p along it."""

    model: PathModel
    solver: OdeSolver
    times: list[float]
    tolerance: float

    def score(
        self,
        x: Float[Tensor, "batch channels height width"],
        label: Int[Tensor, " batch"] | None,
        vectors: Float[Tensor, "probes batch channels height width"] | None,
        numbers: range,
    ) -> tuple[Float[Tensor, "batch probes"], int]:
        """ln p(x) in nats by each probe, one column if exact, float64 on the CPU; evaluations."""
        count = 1 if vectors is None else len(vectors)
        log_abs_det = x.new_zeros(len(x), count)
        field = with_divergence(self.model, label, vectors)
        names = [f"image {number}" for number in numbers]
        solved = solve(field, (x, log_abs_det), self.times, self.solver, self.tolerance, names)
        z, log_abs_det = solved.state
        prior = DiagonalGaussian(torch.ones_like(z[0])).log_prob(z)
        return (prior[:, None] + log_abs_det).double().cpu(), solved.evaluations


def with_divergence(
    model: PathModel,
    label: Int[Tensor, " batch"] | None,
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


def _probes(
    model: PathModel, names: list[tuple[int, int, int]], law: Probe, count: int
) -> Float[Tensor, "probes batch channels height width"]:
    """Probe j of a draw of an image is its own stream, whatever their number."""
    rows = []
    for j in range(count):
        sources = [generator(seed, "probe", image, draw, j) for seed, image, draw in names]
        if law == "gaussian":
            rows.append(normal_rows(model.event_shape, sources))
        else:
            rows.append(torch.where(uniform_rows(model.event_shape, sources) < 0.5, -1.0, 1.0))
    return torch.stack(rows).to(_dtype(model)).to(model.device)


def _noisy(
    model: PathModel, images: Tensor, names: list[tuple[int, int, int]]
) -> Float[Tensor, "batch channels height width"]:
    """Dequantised images, with the noise that `log_likelihood` gives the same draw."""
    sources = [generator(seed, "score", image, draw) for seed, image, draw in names]
    noise = uniform_rows(model.event_shape, sources).to(_dtype(model)).to(model.device)
    return grey.dequantize(images.to(model.device), noise, model.levels)


def _dtype(model: PathModel) -> torch.dtype:
    return torch.promote_types(model.dtype, torch.float32)


def _averaged(draws: Float[Tensor, "k batch probes"]) -> tuple[Tensor, Tensor]:
    """ln of the mean density over draws: of the probes' mean, (batch,), and of each probe alone."""
    k = len(draws)
    mean = draws.mean(2).logsumexp(0) - math.log(k)
    return mean, draws.logsumexp(0) - math.log(k)


def _probe_error(parts: list[Tensor]) -> Float[Tensor, " n"] | None:
    each = torch.cat(parts)
    return None if each.shape[1] == 1 else each.std(1) / math.sqrt(each.shape[1])


def _prior_gap(model: PathModel, images: Tensor) -> float:
    """See `OdeEstimate.prior_gap`."""
    noise = model.path.at(torch.tensor(model.span[0], dtype=torch.float64))
    middle = torch.full((model.levels,), 0.5, dtype=torch.float64)
    squares = grey.dequantize(torch.arange(model.levels), middle, model.levels).square()
    power = float(squares[images.cpu().long()].flatten(1).sum(1).mean())
    variance = float(noise.sigma) ** 2
    spread = model.dims * (variance - 1 - math.log(variance))
    return 0.5 * (float(noise.alpha) ** 2 * power + spread)


def _blur(model: PathModel) -> float:
    data = model.path.at(torch.tensor(model.span[1], dtype=torch.float64))
    return float(data.sigma / data.alpha)


def check_finite(nats: Float[Tensor, " n"], first: int, why: str) -> None:
    """Raise NonFiniteError that names the first image that has no finite likelihood.

    Args:
        nats: of each image.
        first: number of the first of them in the set that they are a part of.
        why: what it means.
    """
    failed = (~nats.isfinite()).nonzero()[:, 0].tolist()
    if failed:
        raise NonFiniteError(
            f"log-likelihood of image {first + failed[0]} is {float(nats[failed[0]])} "
            f"({len(failed)} of {len(nats)} are not finite): {why}"
        )


@contextmanager
def _evaluating(model: PathModel) -> Iterator[None]:
    """Without dropout; what the model's mode was is restored."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
