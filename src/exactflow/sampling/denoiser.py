"""Predictions of a model on a path for a solver: guided, and counted."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from exactflow.core.shapes import Images, Labels, PerSample
from exactflow.paths.chain import Steps
from exactflow.paths.chain_model import ChainModel
from exactflow.paths.path_model import PathModel, Prediction, convert

Classifier = Callable[[Tensor, Tensor], Tensor]  # (x_t, original timestep) -> logits of classes


@final
@dataclass(frozen=True)
class ClassifierGuidance:
    """Guidance by a classifier of noisy images (Dhariwal and Nichol, arXiv 2105.05233, section 4).

    Attributes:
        classifier: (x_t, original timestep of each image) -> logits.
        scale: s; 0 leaves the model as it is.
    """

    classifier: Classifier
    scale: float

    def __post_init__(self) -> None:
        """Raise ValueError for a negative scale."""
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"expected a finite guidance scale >= 0, got {self.scale}")

    def gradient(self, x_t: Images, timestep: Steps, label: Labels) -> Images:
        """s times the gradient of ln p(label | x_t) by x_t."""
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            log_p = self.classifier(x, timestep).log_softmax(dim=1)
            (gradient,) = torch.autograd.grad(log_p.gather(1, label[:, None]).sum(), x)
        return self.scale * gradient


@final
class Denoiser:
    """A model with the labels and guidance of one batch; it counts its evaluations.

    Args:
        model: any model on a path.
        label: class of each sample; None for a dropped label.
        guidance: w of classifier-free guidance, (1 + w) conditional - w unconditional (Ho and
            Salimans, arXiv 2207.12598, eq. 6), or by a classifier.
        low: small images in [-1, 1] that an upsampler enlarges.
    """

    def __init__(
        self,
        model: PathModel,
        label: Labels | None = None,
        guidance: float | ClassifierGuidance = 0.0,
        low: Float[Tensor, "batch channels low_height low_width"] | None = None,
    ) -> None:
        self.model, self.label, self.low = model, label, low
        self.classifier = guidance if isinstance(guidance, ClassifierGuidance) else None
        self.scale = 0.0 if isinstance(guidance, ClassifierGuidance) else guidance
        self.evaluations = 0

    def denoise(self, x_t: Images, t: PerSample) -> Images:
        """The data expected behind x_t at library times t."""
        return self._predicted(x_t, t, "x0")

    def velocity(self, x_t: Images, t: PerSample) -> Images:
        """Rate of x_t of the probability flow in library time."""
        return self._predicted(x_t, t, "velocity")

    def noise(
        self, x_t: Images, timestep: Steps, label: Labels | None
    ) -> tuple[Tensor, Tensor | None]:
        """Predictions of a chain model, as a `chain.Network`.

        Guidance leaves the variance as the conditional's. An unconditional model gets no label,
        which only a classifier uses then.
        """
        model = chain_model(self.model)
        self.evaluations += 1
        label = label if model.num_classes else None
        eps, v = model.predict_noise(x_t, timestep, label, self.low)
        if self.scale:
            self.evaluations += 1
            other, _ = model.predict_noise(x_t, timestep, None, self.low)
            eps = eps + self.scale * (eps - other)
        return eps, v

    def gradient(self, x_t: Images, timestep: Steps) -> Images | None:
        """The classifier's gradient; None without one."""
        if self.classifier is None or self.label is None:
            return None
        return self.classifier.gradient(x_t, timestep, self.label)

    def _predicted(self, x_t: Tensor, t: Tensor, target: Prediction) -> Tensor:
        model = self.model
        self.evaluations += 1
        predicted = model.predict(x_t, t, self.label)
        if self.scale:
            self.evaluations += 1
            predicted = predicted + self.scale * (predicted - model.predict(x_t, t, None))
        return convert(predicted, x_t, model.path.at(t), model.prediction, target)


def chain_model(model: PathModel) -> ChainModel:
    """The model, if it has a chain. Raises ValueError otherwise."""
    if not isinstance(model, ChainModel):
        raise ValueError(f"expected a model with a chain, got {model.kind!r}")
    return model
