"""MaCow: a multi-scale flow of masked convolutions.

Ma et al., MaCow: Masked Convolutional Generative Flow, arXiv 1902.04208. Rows (or columns) are
tokens: a masked convolution moves a row by an affine function of the few rows before it, in four
orientations by turns. Encoding is one parallel pass; decoding goes row by row, or by any solver for
autoregressive transforms. Written from the paper's mathematics.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.core import grey_levels as grey
from exactflow.core.model import DataInitialized, Flow, LikelihoodKind, log_density
from exactflow.core.prior import DiagonalGaussian
from exactflow.core.transform import Solver
from exactflow.models.macow.masked_convolution import ContextEncoder
from exactflow.models.macow.parts import MultiScale, Steps
from exactflow.nn.data_dependent import initializing
from exactflow.parallel import shared_batch as batch


@final
@dataclass(frozen=True)
class MaCowConfig:
    """Architecture and dequantisation of a MaCow.

    `steps` has one entry per level, finest first. The finest level works on the image itself and
    the coarsest has no split: one number each. Every number of a level between stands for so many
    steps, after which one part in `factor` of the level's channels leaves for the latent.
    """

    image_shape: tuple[int, int, int] = (3, 32, 32)  # channels, height, width
    steps: Steps = ((4,), (12, 12), (12, 12), (12,))
    hidden: tuple[int, ...] = (24, 512, 512, 512)  # channels of each level's coupling networks
    kernel: tuple[int, int] = (2, 3)  # rows seen, and columns, of orientation A
    factor: int = 4
    additive: bool = False  # masked convolutions and couplings only shift
    additive_prior: bool = False  # so do the conditional priors
    soft_clip: float = 0.0  # c > 0: raw shifts and scales r become c tanh(r / c); ours, not MaCow's
    dequantization: Literal["uniform", "variational"] = "uniform"
    dequantizer_steps: Steps = ((4,), (4,))
    dequantizer_hidden: tuple[int, ...] = (24, 256)
    dequantizer_kernel: tuple[int, int] = (2, 3)
    dequantizer_factor: int = 2
    context: int = 4  # features of the image that the dequantiser sees at every pixel
    levels: int = grey.PHOTOGRAPHIC_LEVELS  # grey levels of the images
    initial_images: int = 512  # how many to initialise on
    num_classes: ClassVar[int] = 0
    noise_std: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be built."""
        if min(self.image_shape) < 1 or self.levels < 2 or self.initial_images < 2:
            raise ValueError("expected positive sizes, levels >= 2 and initial_images >= 2")
        if self.dequantization not in ("uniform", "variational"):
            raise ValueError(
                f"expected dequantization 'uniform' or 'variational', got {self.dequantization!r}"
            )
        if min(self.factor, self.dequantizer_factor) < 2 or self.context < 1:
            raise ValueError("expected factors >= 2 and context >= 1")
        if not 0 <= self.soft_clip < math.inf:
            raise ValueError(f"expected a finite soft_clip >= 0, got {self.soft_clip}")
        self._check("", self.steps, self.hidden, self.kernel, self.factor)
        if self.dequantization == "variational":
            self._check(
                "dequantizer_",
                self.dequantizer_steps,
                self.dequantizer_hidden,
                self.dequantizer_kernel,
                self.dequantizer_factor,
            )

    def _check(
        self,
        of: str,
        steps: Steps,
        hidden: tuple[int, ...],
        kernel: tuple[int, int],
        factor: int,
    ) -> None:
        channels, height, width = self.image_shape
        if not steps or min(min(level, default=0) for level in steps) < 1:
            raise ValueError(f"expected {of}steps of at least one level and 1 each, got {steps}")
        if len(steps[0]) != 1 or len(steps[-1]) != 1:
            raise ValueError(f"expected one number for first and last level, got {of}steps={steps}")
        if len(hidden) != len(steps) or min(hidden) < 1:
            raise ValueError(
                f"expected {of}hidden with {len(steps)} positive numbers, one for each level, "
                f"got {hidden}"
            )
        if min(kernel) < 1 or kernel[1] % 2 == 0:
            raise ValueError(f"expected a {of}kernel with an odd number of columns, got {kernel}")
        side = 2 ** (len(steps) - 1)
        if height % side or width % side:
            raise ValueError(
                f"expected {len(steps)} levels to halve {height} x {width} evenly: "
                f"multiples of {side}"
            )
        for level in steps[1:-1]:
            if len(level) >= factor or 4 * channels % factor:
                raise ValueError(
                    f"expected levels of fewer than {of}factor={factor} numbers, whose "
                    f"{4 * channels} channels it divides, got {of}steps={steps}"
                )
            channels = 4 * channels // factor * (factor - len(level))


@final
class Dequantizer(nn.Module):
    """q(u | image): a conditional flow from Gaussian noise, through a sigmoid (section 3.4).

    u = sigmoid(f(noise; context)), the context a function of the image without noise.
    """

    def __init__(self, config: MaCowConfig) -> None:
        super().__init__()
        steps = config.dequantizer_steps
        self.encoder = ContextEncoder(config.image_shape[0], len(steps) - 1, config.context)
        self.flow = MultiScale(
            config.image_shape,
            steps,
            config.dequantizer_hidden,
            config.dequantizer_kernel,
            config.dequantizer_factor,
            context=config.context,
            soft_clip=config.soft_clip,
        )

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch channels height width"],
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, " batch"]]:
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
        self.flow = MultiScale(
            config.image_shape,
            config.steps,
            config.hidden,
            config.kernel,
            config.factor,
            config.additive,
            config.additive_prior,
            soft_clip=config.soft_clip,
        )
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

    def encode(
        self,
        x: Float[Tensor, "batch channels height width"],
        label: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, " batch"]]:
        """See `Flow.encode`. Raises ValueError for a wrong shape or dtype, or for labels."""
        self.check_input(x, label)
        return self.flow(x.to(torch.promote_types(x.dtype, torch.float32)))

    @torch.no_grad()
    def trajectory(
        self,
        z: Float[Tensor, "batch channels height width"],
        label: Int[Tensor, " batch"] | None = None,
        *,
        solver: Solver | None = None,
    ) -> Iterator[Float[Tensor, "batch channels height width"]]:
        """See `Flow.trajectory`: levels, coarsest first. Raises ValueError as `encode` does."""
        self.check_input(z, label, latent=True)
        yield from self.flow.trajectory(z, solver)

    def dequantize(
        self,
        images: Integer[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch channels height width"],
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, " batch"]]:
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
        self,
        images: Integer[Tensor, "batch channels height width"],
        label: Int[Tensor, " batch"] | None,
        noise: Float[Tensor, "batch *noise"],
    ) -> Float[Tensor, " batch"]:
        """See `Flow.draw`: p(x) / q(u | image), times the volume of a grey level."""
        x, log_q = self.dequantize(images, noise)
        return (log_density(self, x, label) - log_q).double() - self.level_nats

    def loss(
        self,
        images: Integer[Tensor, "batch channels height width"],
        label: Int[Tensor, " batch"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, " batch"]:
        """-(ln p(x) - ln q(u | image)) / D in nats per dimension, for one draw of u."""
        x, log_q = self._draw(images, generator)
        z, log_abs_det = self.encode(x, label)
        return (log_q - self.prior.log_prob(z) - log_abs_det) / self.dims

    def add_noise(
        self,
        images: Integer[Tensor, "batch channels height width"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """What the model is trained on: dequantised images."""
        return self._draw(images, generator)[0]

    def initialize(
        self,
        images: Integer[Tensor, "batch channels height width"],
        *,
        generator: torch.Generator | None = None,
    ) -> None:
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
