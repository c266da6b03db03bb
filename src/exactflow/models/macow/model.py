"""MaCow: a multi-scale flow of masked convolutions.

Ma et al., MaCow: Masked Convolutional Generative Flow, arXiv 1902.04208. Rows (or columns) are
tokens: a masked convolution moves a row by an affine function of the few rows before it, in four
orientations by turns. Encoding is one parallel pass; decoding goes row by row, or by any solver for
autoregressive transforms. Written from the paper's mathematics.
"""

from collections.abc import Callable, Iterator
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.core import grey_levels as grey
from exactflow.core.model import DataInitialized, Flow, LikelihoodKind, log_density
from exactflow.core.prior import DiagonalGaussian
from exactflow.core.shapes import GreyLevels, Images, Labels, PerSample
from exactflow.core.transform import Solver
from exactflow.models.macow.config import MaCowConfig
from exactflow.models.macow.masked_convolution import ContextEncoder
from exactflow.models.macow.parts import MultiScale
from exactflow.nn.data_dependent import initializing
from exactflow.parallel import shared_batch as batch


@final
class Dequantizer(nn.Module):
    """q(u | image): a conditional flow from Gaussian noise, through a sigmoid (section 3.4).

    u = sigmoid(f(noise; context)), the context a function of the image without noise.
    """

    def __init__(self, config: MaCowConfig) -> None:
        super().__init__()
        halvings = len(config.dequantizer_steps) - 1
        self.encoder = ContextEncoder(config.image_shape[0], halvings, config.context)
        self.flow = MultiScale(config.dequantizer_plan)

    def forward(self, x: Images, noise: Images) -> tuple[Images, PerSample]:
        """u in (0, 1) and ln |det du/dnoise|, for images in [-1, 1] without noise."""
        v, log_abs_det = self.flow(noise, self.encoder(x).to(noise.dtype))
        slope = F.logsigmoid(v) + F.logsigmoid(-v)
        return torch.sigmoid(v), log_abs_det + slope.flatten(1).sum(1)


@final
class MaCow(Flow, DataInitialized):
    """The model: levels of masked convolutions and couplings, a standard normal latent.

    The latent has the image's shape, the published layout: what the conditional priors standardise
    on the way, z = (x - mu(rest)) / sigma(rest), is part of it. So the prior of the whole latent is
    N(0, I) and the density exact, with either dequantisation.

    Before training, `initialize` it on images.
    """

    kind: ClassVar[str] = "macow"
    exact: ClassVar[bool] = True

    def __init__(self, config: MaCowConfig) -> None:
        super().__init__()
        self.config = config
        self.flow = MultiScale(config.plan)
        self.dequantizer = Dequantizer(config) if config.dequantization == "variational" else None
        self.register_buffer("initialized", torch.tensor(False))

    @property
    def likelihood_kind(self) -> LikelihoodKind:
        return "dequantized"

    @property
    def dequantization(self) -> Literal["uniform", "variational"]:
        return self.config.dequantization

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return self.event_shape

    @property
    def initial_images(self) -> int:
        return self.config.initial_images

    @property
    def stages(self) -> list[nn.Module]:
        context = [] if self.dequantizer is None else [self.dequantizer.encoder]
        return [*context, *self.flow.steps]  # a dequantiser's steps are never inverted

    @property
    def prior(self) -> DiagonalGaussian:
        return DiagonalGaussian(torch.ones(self.event_shape, device=self.device))

    def encode(self, x: Images, label: Labels | None = None) -> tuple[Images, PerSample]:
        """See `Flow.encode`. Raises ValueError for a wrong shape or dtype, or for labels."""
        self.check_input(x, label)
        return self.flow(x.to(torch.promote_types(x.dtype, torch.float32)))

    @torch.no_grad()
    def trajectory(
        self, z: Images, label: Labels | None = None, *, solver: Solver | None = None
    ) -> Iterator[Images]:
        """See `Flow.trajectory`: levels, coarsest first. Raises ValueError as `encode` does."""
        self.check_input(z, label, latent=True)
        yield from self.flow.trajectory(z, solver)

    def dequantize(self, images: GreyLevels, noise: Images) -> tuple[Images, PerSample]:
        """Images in [-1, 1] with u inside their grey levels, and ln q(u | image) in nats.

        Args:
            images: grey levels.
            noise: u itself with uniform dequantisation, else standard normal: u is a map of it.

        Raises:
            ValueError: images that are not such integers.
        """
        grey.check_images(images, self.event_shape, self.levels)
        if self.dequantizer is None:
            return grey.dequantize(images, noise, self.levels), noise.new_zeros(len(noise))
        u, log_abs_det = self.dequantizer(self._noiseless(images, noise.dtype), noise)
        standard = DiagonalGaussian(torch.ones_like(noise[0]))
        return grey.dequantize(images, u, self.levels), standard.log_prob(noise) - log_abs_det

    def draw(
        self, images: GreyLevels, label: Labels | None, noise: Float[Tensor, "batch *noise"]
    ) -> PerSample:
        """See `Flow.draw`: p(x) / q(u | image), times the volume of a grey level."""
        x, log_q = self.dequantize(images, noise)
        return (log_density(self, x, label) - log_q).double() - self.level_nats

    def loss(
        self,
        images: GreyLevels,
        label: Labels | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> PerSample:
        """-(ln p(x) - ln q(u | image)) / D in nats per dimension, for one draw of u."""
        x, log_q = self._draw(images, generator)
        z, log_abs_det = self.encode(x, label)
        return (log_q - self.prior.log_prob(z) - log_abs_det) / self.dims

    def add_noise(self, images: GreyLevels, generator: torch.Generator | None = None) -> Images:
        """What the model is trained on: dequantised images."""
        return self._draw(images, generator)[0]

    def initialize(self, images: GreyLevels, *, generator: torch.Generator | None = None) -> None:
        """See `DataInitialized.initialize`; mandatory before training.

        Every convolution's output and every ActNorm's becomes standard on these images, and every
        scale and shift a constant. Uniform noise is added, which the published program does not
        do: without it, images that agree in a channel would give it an infinite scale.
        """
        if bool(self.get_buffer("initialized")):
            return
        grey.check_images(images, self.event_shape, self.levels)
        uniform = self._noise(torch.rand, images, generator)
        if self.dequantizer is not None:
            normal = self._noise(torch.randn, images, generator)
            with initializing(self.dequantizer):
                self.dequantizer(self._noiseless(images, normal.dtype), normal)
        with initializing(self.flow):
            self.flow(grey.dequantize(images, uniform, self.levels))
        self.get_buffer("initialized").fill_(True)

    def _draw(self, images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        grey.check_images(images, self.event_shape, self.levels)
        draw = batch.rand if self.dequantizer is None else batch.randn
        return self.dequantize(images, self._noise(draw, images, generator))

    def _noiseless(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """The lower ends of the grey levels' intervals, as published."""
        return grey.dequantize(images, torch.zeros_like(images, dtype=dtype), self.levels)

    def _noise(
        self, draw: Callable[..., Tensor], images: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        options = {"dtype": self.wide_dtype, "device": images.device}
        return draw(images.shape, generator=generator, **options)
