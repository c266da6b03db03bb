"""Flows with a density: trained on noisy images, or fitted to them in closed form."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from exactflow.core import grey_levels as grey
from exactflow.core.model import Dequantization, Flow, LikelihoodKind, log_density
from exactflow.core.shapes import GreyLevels, Images, Labels, PerSample
from exactflow.parallel import shared_batch as batch


class DensityFlow(Flow, ABC):
    """An exact flow that is trained on images with uniform or Gaussian noise."""

    exact: ClassVar[bool] = True

    @property
    def likelihood_kind(self) -> LikelihoodKind:
        return "noisy-density" if self.noise_std > 0 else "dequantized"

    @property
    def dequantization(self) -> Dequantization:
        return "gaussian" if self.noise_std > 0 else "uniform"

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return self.event_shape

    def with_noise(self, images: GreyLevels, noise: Images) -> Images:
        """Images in [-1, 1] with the noise of one draw: the variable of the flow's density."""
        if self.noise_std > 0:
            return grey.center(images, self.levels, noise.dtype) + self.noise_std * noise
        return grey.dequantize(images, noise, self.levels)

    def add_noise(self, images: GreyLevels, generator: torch.Generator | None = None) -> Images:
        """Images with training noise. Raises ValueError unless they are grey levels."""
        grey.check_images(images, self.event_shape, self.levels)
        options = {"dtype": self.wide_dtype, "device": images.device}
        draw = batch.randn if self.noise_std > 0 else batch.rand
        return self.with_noise(images, draw(images.shape, generator=generator, **options))

    def draw(
        self, images: GreyLevels, label: Labels | None, noise: Float[Tensor, "batch *noise"]
    ) -> PerSample:
        """See `Flow.draw`: ln p(x), times the volume of a grey level if it is dequantised."""
        nats = log_density(self, self.with_noise(images, noise), label).double()
        return nats if self.noise_std > 0 else nats - self.level_nats


class FittedFlow(DensityFlow):
    """A flow whose parameters follow from the data in closed form: no gradient, few passes."""

    closed_form: ClassVar[bool] = True

    @abstractmethod
    def fit(
        self,
        batches: Iterable[Integer[Tensor, "_ channels height width"]],
        *,
        seed: int = 0,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """Set all parameters from images. The result does not depend on how they are batched.

        Args:
            batches: grey levels 0 .. levels-1; iterated once or several times, each time alike.
            seed: names the dequantisation noise, where the fit needs any.
            report: called with a line of text for the user at each step.

        Raises:
            ValueError: no images, or images of another shape or range than the model's.
        """
