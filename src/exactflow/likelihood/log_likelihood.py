"""Log-likelihoods with their kind: one algorithm for each kind of model."""

import math
from dataclasses import dataclass
from functools import singledispatch
from typing import final

import torch
from jaxtyping import Int, Integer
from torch import Tensor

from exactflow.core import grey_levels as grey
from exactflow.core.doors import LabelsLike, as_labels, require_model
from exactflow.core.model import Flow, GenerativeModel
from exactflow.likelihood.bound import chain_bound
from exactflow.likelihood.draws import Draws
from exactflow.likelihood.ode_estimate import ADAPTIVE, ode_log_likelihood
from exactflow.likelihood.value import LogLikelihood, check_finite
from exactflow.paths.chain_model import ChainModel
from exactflow.paths.ode import OdeSolver
from exactflow.paths.path_model import PathModel


@final
@dataclass(frozen=True)
class Effort:
    """The cost of scores that take many evaluations of the network.

    Attributes:
        bound_evaluations: of the network for each image, in a chain's bound; None: every step.
        solver: of the differential equation of an estimate.
    """

    bound_evaluations: int | None = None
    solver: OdeSolver = ADAPTIVE


FULL = Effort()


def log_likelihood(
    model: GenerativeModel,
    images: grey.ImagesLike,
    label: LabelsLike | None = None,
    k: int = 1,
    seed: int = 0,
    *,
    first: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> LogLikelihood:
    """Score integer images; image i's noise is a function of (seed, i), whatever the batch size.

    Processes that work together share the batches.

    Args:
        model: a flow, a diffusion chain (scored by its bound, all steps) or another model on a path
            (scored by its probability flow, with dopri5 at 1e-5 and one probe: `ode_log_likelihood`
            has the options); scored in evaluation mode.
        images: grey levels 0 .. levels-1, on any device, (n, channels, height, width); or PIL
            images.
        label: class of each image, or of all; None scores without labels.
        k: noise draws per image.
        seed: of the noise.
        first: number of the first image, if these are a part of a set.
        batch_size: images evaluated together.
        progress: show a bar over batches.

    Raises:
        ValueError: for images that are not such integers, or labels the model cannot take.
        NonFiniteError: names the first image whose likelihood is not finite.
    """
    require_model(model)
    images = grey.as_tensor(images, model.event_shape)
    label = as_labels(model, label, len(images))
    return score(model, images, label, Draws(k, seed, first, batch_size, progress), FULL)


@singledispatch
def score(
    model: GenerativeModel,
    images: Integer[Tensor, "n channels height width"],
    label: Int[Tensor, " n"] | None,
    draws: Draws,
    effort: Effort,
) -> LogLikelihood:
    """`log_likelihood` with a given effort, which raises the same errors."""
    raise ValueError(f"a model of kind {model.kind!r} has no likelihood here")


@score.register
@torch.no_grad()
def _of_flow(
    model: Flow, images: Tensor, label: Tensor | None, draws: Draws, effort: Effort
) -> LogLikelihood:
    uniform = model.dequantization == "uniform"

    def log_mean_weight(some: Tensor, chunk: Tensor | None, numbers: range) -> Tensor:
        """ln of the mean over draws of w, E[w] at most P(image), float64 on the CPU."""
        found = []
        for draw in range(draws.k):
            noise = draws.noise(model, model.noise_shape, numbers, draw, uniform=uniform)
            found.append(model.draw(some, chunk, noise).double().cpu())
        return torch.stack(found).logsumexp(0) - math.log(draws.k)

    nats = torch.cat(draws.by_batch(model, images, label, log_mean_weight))
    check_finite(nats, draws.first, "the model's scales overflow on it")
    facts = model.dims, model.levels, draws.k
    return LogLikelihood(nats, model.likelihood_kind, *facts, dequantization=model.dequantization)


@score.register
def _of_chain(
    model: ChainModel, images: Tensor, label: Tensor | None, draws: Draws, effort: Effort
) -> LogLikelihood:
    return chain_bound(model, images, label, draws, evaluations=effort.bound_evaluations).likelihood


@score.register
def _of_path(
    model: PathModel, images: Tensor, label: Tensor | None, draws: Draws, effort: Effort
) -> LogLikelihood:
    return ode_log_likelihood(model, images, label, draws, solver=effort.solver)
