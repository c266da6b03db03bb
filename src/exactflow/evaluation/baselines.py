"""The floor of every likelihood table: Gaussians fitted in closed form.

A model that does not beat the full-covariance Gaussian has learned less than second moments.
"""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from exactflow.core.images import dequantize
from exactflow.core.random import generator, uniform_rows
from exactflow.data.datasets import ImageDataset
from exactflow.likelihood.log_likelihood import LogLikelihood

FULL_COVARIANCE_DIMS = 4096  # beyond this the covariance alone fills a laptop's memory
CHUNK = 1024  # images turned to float64 at a time


def gaussian_log_likelihood(
    training: ImageDataset,
    held_out: ImageDataset,
    *,
    covariance: Literal["diagonal", "full"],
    seed: int = 0,
) -> LogLikelihood:
    """Score `held_out` under the maximum-likelihood Gaussian of dequantised `training` images.

    Uniform dequantisation adds exactly 1/12 of a squared grey level to every variance, so the fit
    needs no draw; the score uses the draw that `log_likelihood` makes for the same seed.

    Args:
        training: images to fit mean and covariance (biased, divide by n) to.
        held_out: images to score.
        covariance: "diagonal" for independent pixels, "full" for all second moments (the
            whitening flow).
        seed: names the dequantisation noise.

    Raises:
        ValueError: for a full covariance of more dimensions than fit in memory.
    """
    dims = math.prod(training.event_shape)
    if covariance == "full" and dims > FULL_COVARIANCE_DIMS:
        raise ValueError(
            f"expected at most {FULL_COVARIANCE_DIMS} dimensions for a full covariance, got {dims}"
        )
    mean, second = _moments(training.images, full=covariance == "full")
    if covariance == "full":
        matrix = second - torch.outer(mean, mean)
        matrix.diagonal().add_(1 / 12)
        factor = torch.linalg.cholesky(matrix)
    else:
        factor = (second - mean.square() + 1 / 12).sqrt()
    mean = mean + 0.5  # of v + u
    log_det = (factor.diagonal() if factor.dim() == 2 else factor).log().sum()
    nats = []
    for first in range(0, len(held_out), CHUNK):
        chunk = torch.as_tensor(np.array(held_out.images[first : first + CHUNK]))
        sources = [generator(seed, "score", first + row, 0) for row in range(len(chunk))]
        noise = uniform_rows(held_out.event_shape, sources)
        x = dequantize(chunk, noise, held_out.levels).flatten(1)
        v = (x + 1) * (held_out.levels / 2) - mean
        if factor.dim() == 2:
            white = torch.linalg.solve_triangular(factor, v.T, upper=False).T
        else:
            white = v / factor
        constant = 0.5 * dims * math.log(2 * math.pi)
        nats.append(-0.5 * white.square().sum(1) - constant - log_det)
    return LogLikelihood(
        torch.cat(nats), "dequantized", dims, held_out.levels, 1, held_out.fingerprint
    )


def _moments(images: np.ndarray, *, full: bool) -> tuple[Tensor, Tensor]:
    """Mean and raw second moments (of pairs, if `full`), float64, in grey levels."""
    total: Tensor | float = 0.0
    second: Tensor | float = 0.0
    for first in range(0, len(images), CHUNK):
        v = torch.as_tensor(np.array(images[first : first + CHUNK])).double().flatten(1)
        total = total + v.sum(0)
        second = second + (v.T @ v if full else v.square().sum(0))
    assert isinstance(total, Tensor)
    assert isinstance(second, Tensor)
    return total / len(images), second / len(images)
