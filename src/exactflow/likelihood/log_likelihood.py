"""Log-likelihoods that say what they are."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from exactflow.core import images as grey
from exactflow.core.doors import LabelsLike, as_labels, require_model
from exactflow.core.model import (
    AugmentedFlow,
    DequantizingFlow,
    Flow,
    GenerativeModel,
    evaluating,
    log_density,
)
from exactflow.core.process_group import current
from exactflow.core.random import generator, normal_rows, uniform_rows
from exactflow.likelihood.bound import ChainBound, chain_bound
from exactflow.likelihood.ode_estimate import OdeEstimate, check_finite, ode_log_likelihood
from exactflow.paths.chain_model import ChainModel
from exactflow.paths.path_model import PathModel

ESTIMATE_FACTS = (
    *("solver", "steps", "tolerance", "evaluations", "trace", "probe", "probes"),
    *("probe_standard_error", "prior_gap", "blur", "trained_on"),
)
Kind = Literal["dequantized", "bound", "estimate", "noisy-density"]
Dequantization = Literal["uniform", "variational", "gaussian", "none"]


@final
@dataclass(frozen=True)
class LogLikelihood:
    """Log-likelihood of each image, with its kind.

    Attributes:
        nats: (n,), float64. For "dequantized", ln of a lower bound of the probability of the
            integer image: ln of the mean density over its grey-level cube, estimated by k draws
            (Theis et al., arXiv 1511.01844, eq. 3). For "bound", the same with the mean over what
            an augmented flow draws besides: the ELBO for k = 1, else the IWBO_k (Burda et al.,
            arXiv 1509.00519, eq. 8). For "noisy-density", ln p(x + sigma eps), a density with
            respect to [-1, 1] and not a code length.
        kind: "dequantized", an exact density over the noise inside a grey level; "bound", of an
            augmented flow or a diffusion chain; "estimate", of a probability flow; or
            "noisy-density", of a model trained with Gaussian noise.
        dims: C * H * W.
        levels: number of grey levels.
        k: noise draws per image; 1 is the published protocol, more tighten the bound.
        data: fingerprint of the images, where they come from a data set.
        dequantization: law of the noise inside a grey level; "gaussian" is noise across levels, and
            "none" a bound on the probability of the integers themselves.
        details: what else the number rests on: of an estimate, its solver, tolerance, evaluations,
            probes, prior gap and what the model was trained on; of a chain's bound, its steps and
            evaluations of the network.
    """

    nats: Float[Tensor, " n"]
    kind: Kind
    dims: int
    levels: int
    k: int
    data: str | None = None
    dequantization: Dequantization = "uniform"
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def off_its_data(self) -> bool:
        """Whether this is an estimate on dequantised images of a model trained on centred ones."""
        return self.details.get("trained_on") == "centred images"

    @property
    def nats_per_dim(self) -> float:
        """Mean over images of nats / dims; defined for every kind."""
        return float(self.nats.mean()) / self.dims

    @property
    def per_image(self) -> Float[Tensor, " n"]:
        """Bits per dimension of each image. Raises ValueError for a noisy density."""
        if self.kind == "noisy-density":
            raise ValueError(
                "a model trained with Gaussian noise has the density of noisy images, which is "
                "not a code length: it has no bits/dim comparable with any other "
                "(nats_per_dim gives the density itself)"
            )
        return -self.nats / (self.dims * math.log(2))

    @property
    def bits_per_dim(self) -> float:
        """Mean of `per_image`."""
        return float(self.per_image.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of `bits_per_dim` over images; NaN for a single one."""
        return float(self.per_image.std()) / math.sqrt(len(self.nats))


def log_likelihood(
    model: GenerativeModel,
    images: grey.ImagesLike,
    label: LabelsLike | None = None,
    k: int = 1,
    seed: int = 0,
    *,
    first: int = 0,
    batch_size: int = 64,
    data: str | None = None,
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
        seed: names the noise.
        first: number of the first image, where these are a part of a set.
        batch_size: images evaluated together.
        data: fingerprint of the data set, carried into the result.
        progress: show a bar over batches.

    Raises:
        ValueError: for images that are not such integers, or labels the model cannot take.
        NonFiniteError: names the first image whose likelihood is not finite.
    """
    require_model(model)
    images = grey.as_tensor(images, model.event_shape)
    label = as_labels(model, label, len(images))
    options: dict[str, Any] = {"first": first, "batch_size": batch_size, "progress": progress}
    if isinstance(model, ChainModel):
        if k != 1:
            raise ValueError(f"the bound of a chain has one draw per term: expected k=1, got {k}")
        return of_bound(chain_bound(model, images, label, seed=seed, data=data, **options))
    if isinstance(model, PathModel):
        return of_estimate(
            ode_log_likelihood(model, images, label, k=k, seed=seed, **options), data
        )
    if not isinstance(model, Flow):
        raise ValueError(f"a model of kind {model.kind!r} has no likelihood here")
    return _of_flow(model, images, label, k, seed, data, **options)


def of_bound(found: ChainBound) -> LogLikelihood:
    """A chain's bound, as a likelihood of its kind."""
    facts = {"steps": len(found.timesteps), "evaluations": len(found.strata)}
    return LogLikelihood(
        found.nats, found.kind, found.dims, found.levels, 1, found.data, "none", facts
    )


def of_estimate(found: OdeEstimate, data: str | None = None) -> LogLikelihood:
    """A probability flow's estimate, as a likelihood of its kind; `data` is a fingerprint."""
    facts = {name: getattr(found, name) for name in ESTIMATE_FACTS}
    return LogLikelihood(
        found.nats, "estimate", found.dims, found.levels, found.k, data, "uniform", facts
    )


@torch.no_grad()
def _of_flow(
    model: Flow,
    images: Integer[Tensor, "n channels height width"],
    label: Int[Tensor, " n"] | None,
    k: int,
    seed: int,
    data: str | None,
    *,
    first: int,
    batch_size: int,
    progress: bool,
) -> LogLikelihood:
    if k < 1 or batch_size < 1:
        raise ValueError(f"expected k >= 1 and batch_size >= 1, got {k}, {batch_size}")
    grey.check_images(images, model.event_shape, model.levels)
    model.check_label(None if label is None else label.cpu(), len(images))

    def score(start: int) -> Tensor:
        rows = slice(start, start + batch_size)
        chunk = None if label is None else label[rows].to(model.device)
        draws = [
            _log_weight_of_draw(model, images[rows], chunk, (seed, first + start, draw))
            for draw in range(k)
        ]
        return torch.stack(draws).logsumexp(0) - math.log(k)

    starts = range(0, len(images), batch_size)
    with evaluating(model):
        nats = current().spread(starts, score, bar="scoring" if progress else None)
    result = torch.cat(nats)
    check_finite(result, first, "the model's scales overflow on it")
    kind, dequantization = _kind(model)
    return LogLikelihood(result, kind, model.dims, model.levels, k, data, dequantization)


def _kind(model: Flow) -> tuple[Kind, Dequantization]:
    """What the numbers of this model are."""
    if isinstance(model, AugmentedFlow):
        return "bound", "variational"
    if model.noise_std > 0:
        return "noisy-density", "gaussian"
    uniform = not isinstance(model, DequantizingFlow) or model.dequantization == "uniform"
    return "dequantized", "uniform" if uniform else "variational"


def _log_weight_of_draw(
    model: Flow, images: Tensor, label: Tensor | None, name: tuple[int, int, int]
) -> Float[Tensor, " batch"]:
    """ln w in nats, float64 on the CPU, for the noise of one draw: E[w] is at most P(image)."""
    seed, first, draw = name
    sources = [generator(seed, "score", first + row, draw) for row in range(len(images))]
    dtype = torch.promote_types(model.dtype, torch.float32)
    images = images.to(model.device)
    kind, dequantization = _kind(model)
    shape = model.noise_shape if isinstance(model, AugmentedFlow) else model.event_shape
    rows = uniform_rows if dequantization == "uniform" else normal_rows
    noise = rows(shape, sources).to(dtype).to(model.device)
    if isinstance(model, AugmentedFlow):
        return model.bound(images, label, noise=noise).double().cpu()
    if kind == "noisy-density":
        x = grey.center(images, model.levels, dtype) + model.noise_std * noise
        return log_density(model, x, label).double().cpu()
    interval = model.dims * grey.nats_per_level_interval(model.levels)
    if isinstance(model, DequantizingFlow):
        x, log_q = model.dequantize(images, noise)
        return (log_density(model, x, label) - log_q).double().cpu() - interval
    x = grey.dequantize(images, noise, model.levels)
    return log_density(model, x, label).double().cpu() - interval
