"""Models that follow a Gaussian path: diffusion and flow matching are this one class.

A network predicts one of four quantities at x_t = alpha x0 + sigma eps, each of which determines
the others: x0, the data; eps, the noise; v = alpha eps - sigma x0 (Salimans & Ho,
arXiv 2202.00512); velocity = d_alpha x0 + d_sigma eps, the rate of x_t in library time.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from exactflow.core import grey_levels as grey
from exactflow.core.model import GenerativeModel, LikelihoodKind
from exactflow.core.shapes import GreyLevels, Images, Labels, PerSample, Values
from exactflow.parallel import shared_batch as batch
from exactflow.paths.path import SINGULAR_MARGIN, Path, Point

Prediction = Literal["x0", "eps", "v", "velocity"]


def data_and_noise(
    prediction: Values, x_t: Values, point: Point, source: Prediction
) -> tuple[Values, Values]:
    """(x0, eps) that a prediction at x_t stands for.

    Divides by sigma for x0, by alpha for eps, by alpha^2 + sigma^2 or delta, which are never 0,
    for v and velocity.
    """
    alpha, sigma = per_sample(point.alpha, x_t), per_sample(point.sigma, x_t)
    match source:
        case "x0":
            return prediction, (x_t - alpha * prediction) / sigma
        case "eps":
            return (x_t - sigma * prediction) / alpha, prediction
        case "v":
            power = alpha.square() + sigma.square()
            x0 = (alpha * x_t - sigma * prediction) / power
            return x0, (sigma * x_t + alpha * prediction) / power
        case "velocity":
            d_alpha, d_sigma = per_sample(point.d_alpha, x_t), per_sample(point.d_sigma, x_t)
            delta = per_sample(point.delta, x_t)
            x0 = (sigma * prediction - d_sigma * x_t) / delta
            return x0, (d_alpha * x_t - alpha * prediction) / delta


def combine(x0: Values, eps: Values, point: Point, target: Prediction) -> Values:
    """The prediction of kind `target` that is right for data x0 and noise eps; no division."""
    match target:
        case "x0":
            return x0
        case "eps":
            return eps
        case "v":
            return per_sample(point.alpha, x0) * eps - per_sample(point.sigma, x0) * x0
        case "velocity":
            return per_sample(point.d_alpha, x0) * x0 + per_sample(point.d_sigma, x0) * eps


def convert(
    prediction: Values, x_t: Values, point: Point, source: Prediction, target: Prediction
) -> Values:
    """A prediction of `source` at x_t, as one of `target`.

    Args:
        prediction: the network's output.
        x_t: its input.
        point: the path at the times of x_t, (batch,) or a scalar.
        source: kind of `prediction`.
        target: kind of the result.
    """
    if source == target:
        return prediction
    return combine(*data_and_noise(prediction, x_t, point, source), point, target)


def velocity_gain(point: Point, source: Prediction) -> Float[Tensor, "*times"]:
    """Derivative of the velocity by the prediction, at fixed x_t: `convert` is affine."""
    match source:
        case "x0":
            return point.delta / point.sigma
        case "eps":
            return -point.delta / point.alpha
        case "v":
            return -point.delta / (point.alpha.square() + point.sigma.square())
        case "velocity":
            return torch.ones_like(point.alpha)


def per_sample(values: Float[Tensor, "*times"], x: Values) -> Tensor:
    """One value per sample, shaped and typed to multiply x."""
    return values.to(x.dtype).reshape(values.shape + (1,) * (x.dim() - values.dim()))


@final
@dataclass(frozen=True)
class Posterior:
    """Mean of the data given x_t, and its variance if the model predicts one."""

    mean: Images
    var: Images | None = None


class PathModel(GenerativeModel):
    """A network that predicts data, noise or velocity along a path.

    Attributes:
        usual_solver: name of the solver that "auto" stands for.
        dequantized: whether the model is one of uniformly dequantised images; otherwise of
            centred grey levels.
        sampled_between: noise levels sigma / alpha, greatest first, between which samples are
            drawn; None: along the whole path, at even times.
    """

    iterative: ClassVar[bool] = True
    _likelihood_kind: ClassVar[LikelihoodKind] = "estimate"
    usual_solver: ClassVar[str] = "heun"
    quick_solver: ClassVar[str] = "heun"
    evaluations_per_step: ClassVar[int] = 2
    dequantized: bool = False
    sampled_between: ClassVar[tuple[float, float] | None] = None

    @property
    def likelihood_kind(self) -> LikelihoodKind:
        return self._likelihood_kind

    @property
    @abstractmethod
    def path(self) -> Path:
        """The path whose marginals the model knows."""

    @property
    @abstractmethod
    def prediction(self) -> Prediction:
        """The kind of quantity that `predict` returns."""

    @abstractmethod
    def predict(self, x_t: Images, t: PerSample, label: Labels | None = None) -> Images:
        """One evaluation of the network.

        Args:
            x_t: points on the path.
            t: their library times, 0 noise .. 1 data.
            label: class of each sample; None for a dropped label.
        """

    @property
    def span(self) -> tuple[float, float]:
        """The path's span, short of an end where this prediction gives no velocity.

        Noise does not determine the data where alpha = 0, nor data the noise where sigma = 0.
        """
        first, last = self.path.span
        ends = self.path.at(torch.tensor([first, last], dtype=torch.float64))
        if self.prediction == "eps" and ends.alpha[0] == 0:
            first += SINGULAR_MARGIN
        if self.prediction == "x0" and ends.sigma[1] == 0:
            last -= SINGULAR_MARGIN
        return first, last

    def denoise(self, x_t: Images, t: PerSample, label: Labels | None = None) -> Posterior:
        """The data expected behind x_t (arguments as for `predict`)."""
        predicted = self.predict(x_t, t, label)
        return Posterior(convert(predicted, x_t, self.path.at(t), self.prediction, "x0"))

    def velocity(self, x_t: Images, t: PerSample, label: Labels | None = None) -> Images:
        """Rate of x_t of the probability flow in library time (arguments as for `predict`)."""
        predicted = self.predict(x_t, t, label)
        return convert(predicted, x_t, self.path.at(t), self.prediction, "velocity")

    def as_data(self, images: GreyLevels, generator: torch.Generator | None = None) -> Images:
        """The data of training: grey levels in [-1, 1], dequantised or centred."""
        grey.check_images(images, self.event_shape, self.levels)
        if not self.dequantized:
            return grey.center(images, self.levels, self.wide_dtype)
        options = {"dtype": self.wide_dtype, "device": images.device}
        noise = batch.rand(images.shape, generator=generator, **options)
        return grey.dequantize(images, noise, self.levels)

    def to_grey_levels(self, x: Images) -> GreyLevels:
        """Grey levels of images in [-1, 1]; only here is anything clipped to the range."""
        quantize = grey.quantize_dequantized if self.dequantized else grey.quantize_centered
        return quantize(x, self.levels)
