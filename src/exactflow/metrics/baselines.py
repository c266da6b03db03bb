"""Baselines for every table of likelihoods: models fitted in closed form, in seconds.

A model that does not beat the full-covariance Gaussian has learned less than second moments; one
that does not beat Gaussianisation has learned less than what linear prediction leaves, value by
value.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from exactflow.data import DataConfig, ImageDataset, load
from exactflow.data.passes import ImagePasses
from exactflow.likelihood.log_likelihood import log_likelihood
from exactflow.likelihood.value import LogLikelihood
from exactflow.models.gaussian.gaussianisation import Gaussianisation, GaussianisationConfig
from exactflow.models.gaussian.moments import FULL_COVARIANCE_DIMS
from exactflow.models.gaussian.whitening import LinearFirstFlow, Whitening, WhiteningConfig

BATCH = 500  # images at a time
FIT_IMAGES = 50_000  # training images that are read, at most
FIT_VALUES = 2**28  # pixel values of them, at most
ENOUGH = 10  # images per dimension of a covariance from which on it is not shrunk
LAYERS = 2  # of Gaussianisation: further ones gain next to nothing with many tokens
MARGINAL_VALUES = 2**24  # values that its layers are fitted to, at most


@final
@dataclass(frozen=True)
class Baseline:
    """A fitted model on held-out images.

    Attributes:
        likelihood: per image, with the noise that `log_likelihood` draws for the seed.
        parameters: number of fitted parameters.
        trained_on: number of training images.
    """

    likelihood: LogLikelihood
    parameters: int
    trained_on: int

    def describe(self) -> dict[str, Any]:
        """JSON-able, without the values of single images."""
        several = len(self.likelihood.nats) > 1
        return {
            "kind": self.likelihood.kind,
            "bits_per_dim": self.likelihood.bits_per_dim,
            "standard_error": self.likelihood.standard_error if several else None,
            "parameters": self.parameters,
            "trained_on": self.trained_on,
        }


def training_images(config: DataConfig, held_out: ImageDataset) -> ImageDataset:
    """The images of the training split that baselines are fitted to.

    Raises:
        DataError: the source has none, or it cannot be read.
    """
    most = max(1, min(FIT_IMAGES, FIT_VALUES // math.prod(held_out.event_shape)))
    limit = most if config.limit is None else min(most, config.limit)
    return load(replace(config, limit=limit), "train")


def baselines(
    training: ImageDataset,
    held_out: ImageDataset,
    *,
    seed: int = 0,
    k: int = 1,
    device: torch.device | None = None,
    progress: bool = False,
) -> dict[str, Baseline]:
    """Fit every baseline to `training` and score `held_out`.

    Args:
        training: images to fit to.
        held_out: images to score, of the same shape and levels.
        seed: of the noise of the score.
        k: draws of it per image.
        device: to compute on; None or one without float64: the CPU.
        progress: show the progress of each score.

    Returns:
        The baselines by name, weakest first.
    """
    images, _ = held_out.tensors()
    found = {}
    for name, model in _fitted(training, device).items():
        options = {"k": k, "seed": seed, "batch_size": BATCH, "progress": progress}
        likelihood = log_likelihood(model, images, **options)
        likelihood = replace(likelihood, data=held_out.fingerprint)
        found[name] = Baseline(likelihood, model.num_parameters, len(training))
    return found


def _fitted(training: ImageDataset, device: torch.device | None) -> dict[str, LinearFirstFlow]:
    """Independent pixels, a Gaussian, and its Gaussianisation, from two fits."""
    shape, levels = training.event_shape, training.levels
    dims = math.prod(shape)
    small = dims <= FULL_COVARIANCE_DIMS
    config = GaussianisationConfig(
        shape,
        "full" if small else "dct",
        levels=levels,
        layers=LAYERS,
        fit_images=max(2, MARGINAL_VALUES // dims),
    )
    if len(training) < ENOUGH * config.linear.layout.tokens:
        config = replace(config, shrinkage=None)
    independent = Whitening(WhiteningConfig(shape, "diagonal", levels=levels))
    layered = Gaussianisation(config)
    if device is None or device.type == "mps":
        device = torch.device("cpu")
    for model in (independent, layered):
        model.to(device).fit(ImagePasses(training, BATCH))
    return {
        "independent pixels": independent,
        "full-covariance Gaussian" if small else "DCT-factorised Gaussian": layered.gaussian(),
        "Gaussianisation" if small else "DCT-factorised Gaussianisation": layered,
    }
