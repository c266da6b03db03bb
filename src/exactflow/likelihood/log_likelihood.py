"""Log-likelihoods that say what they are."""

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, Int, Integer
from rich.progress import track
from torch import Tensor

from exactflow.core import images as grey
from exactflow.core.model import Flow, NonFiniteError, log_density
from exactflow.core.random import generator, normal_rows, uniform_rows

Kind = Literal["dequantized", "noisy-density"]


@final
@dataclass(frozen=True)
class LogLikelihood:
    """Log-likelihood of each image, with its kind.

    Attributes:
        nats: (n,), float64. For "dequantized", ln of a lower bound of the probability of the
            integer image: ln of the mean density over its grey-level cube, estimated by k draws
            (Theis et al., arXiv 1511.01844, eq. 3). For "noisy-density", ln p(x + sigma eps), a
            density with respect to [-1, 1] and not a code length.
        kind: "dequantized", or "noisy-density" for a model trained with Gaussian noise.
        dims: C * H * W.
        levels: number of grey levels.
        k: noise draws per image; 1 is the published protocol, more tighten the bound.
        data: fingerprint of the images, where they come from a data set.
    """

    nats: Float[Tensor, " n"]
    kind: Kind
    dims: int
    levels: int
    k: int
    data: str | None = None

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


@torch.no_grad()
def log_likelihood(
    model: Flow,
    images: Integer[Tensor, "n channels height width"],
    label: Int[Tensor, " n"] | None = None,
    k: int = 1,
    seed: int = 0,
    *,
    batch_size: int = 64,
    data: str | None = None,
    progress: bool = False,
) -> LogLikelihood:
    """Score integer images; image i's noise is a function of (seed, i), whatever the batch size.

    Args:
        model: an exact flow.
        images: grey levels 0 .. levels-1, on any device.
        label: class of each image; None scores without labels.
        k: noise draws per image.
        seed: names the noise.
        batch_size: images evaluated together.
        data: fingerprint of the data set, carried into the result.
        progress: show a bar over batches.

    Raises:
        ValueError: for images that are not such integers, or labels the model cannot take.
        NonFiniteError: names the first image whose likelihood is not finite.
    """
    if k < 1 or batch_size < 1:
        raise ValueError(f"expected k >= 1 and batch_size >= 1, got {k}, {batch_size}")
    grey.check_images(images, model.event_shape, model.levels)
    model.check_label(None if label is None else label.cpu(), len(images))
    starts = range(0, len(images), batch_size)
    nats = []
    for first in track(starts, "scoring", transient=True) if progress else starts:
        rows = slice(first, first + batch_size)
        chunk = None if label is None else label[rows].to(model.device)
        draws = [
            _log_density_of_draw(model, images[rows], chunk, (seed, first, draw))
            for draw in range(k)
        ]
        nats.append(torch.stack(draws).logsumexp(0) - math.log(k))
    result = torch.cat(nats)
    if not bool(result.isfinite().all()):
        index = int((~result.isfinite()).nonzero()[0, 0])
        raise NonFiniteError(
            f"log-likelihood of image {index} is {float(result[index])} "
            f"({int((~result.isfinite()).sum())} of {len(result)} are not finite): "
            "the model's scales overflow on it"
        )
    if model.noise_std > 0:
        return LogLikelihood(result, "noisy-density", model.dims, model.levels, k, data)
    result = result - model.dims * grey.nats_per_level_interval(model.levels)
    return LogLikelihood(result, "dequantized", model.dims, model.levels, k, data)


def _log_density_of_draw(
    model: Flow, images: Tensor, label: Tensor | None, name: tuple[int, int, int]
) -> Float[Tensor, " batch"]:
    """ln p(x) in nats, float64 on the CPU, of images with the noise of one draw."""
    seed, first, draw = name
    sources = [generator(seed, "score", first + row, draw) for row in range(len(images))]
    dtype = torch.promote_types(model.dtype, torch.float32)
    images = images.to(model.device)
    if model.noise_std > 0:
        noise = normal_rows(model.event_shape, sources).to(dtype).to(model.device)
        x = grey.center(images, model.levels, dtype) + model.noise_std * noise
    else:
        noise = uniform_rows(model.event_shape, sources).to(dtype).to(model.device)
        x = grey.dequantize(images, noise, model.levels)
    return log_density(model, x, label).double().cpu()
