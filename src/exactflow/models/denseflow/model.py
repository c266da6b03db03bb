"""DenseFlow: coupling flows that inject noise channels between densely connected units.

Grcic et al., Densely connected normalizing flows, arXiv 2106.04627. Gaussian channels are added
inside every block, so the flow maps (image, noise) to its latent, one to one, and gives a lower
bound of ln p(image), not the density. Sampling is one parallel pass that drops the noise again.
Written from the paper's mathematics.
"""

import math
from collections.abc import Iterator
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.core import grey_levels as grey
from exactflow.core.model import DataInitialized, Dequantization, Flow, LikelihoodKind
from exactflow.core.shapes import GreyLevels, Images, Labels, PerSample
from exactflow.core.transform import Solver
from exactflow.models.denseflow.config import DenseFlowConfig
from exactflow.models.denseflow.network import DeferredBatchNorm
from exactflow.models.denseflow.parts import (
    ChannelGaussian,
    ChannelNorm,
    CouplingDequantizer,
    DenseBlock,
    standard_normal_log_prob,
)
from exactflow.nn.data_dependent import initializing
from exactflow.parallel import shared_batch as batch


@final
class DenseFlow(Flow, DataInitialized):
    """The model: a variational dequantiser, and dense blocks between which half is dropped.

    A latent is flat: the dropped halves, first dropped first, which are N(0, 1), then the last
    block's output, a Gaussian with a learned mean and scale per channel.

    Before training, `initialize` it on images: without, every `ChannelNorm` starts as the identity.
    """

    kind: ClassVar[str] = "denseflow"
    exact: ClassVar[bool] = False

    def __init__(self, config: DenseFlowConfig) -> None:
        super().__init__()
        self.config = config
        self.dequantizer = CouplingDequantizer(config)
        self.blocks = nn.ModuleList(DenseBlock(config, index) for index in range(len(config.units)))
        last = config.channels[-1][1]
        self.prior_mean = nn.Parameter(torch.zeros(1, last, 1, 1))
        self.prior_log_scale = nn.Parameter(torch.zeros(1, last, 1, 1))

    @property
    def likelihood_kind(self) -> LikelihoodKind:
        return "bound"

    @property
    def dequantization(self) -> Dequantization:
        return "variational"

    @property
    def initial_images(self) -> int:
        return self.config.initial_images

    @property
    def stages(self) -> list[nn.Module]:
        blocks = [block for block in self.blocks if isinstance(block, DenseBlock)]
        return [*self.dequantizer.stages, *(stage for block in blocks for stage in block.stages)]

    @property
    def prior(self) -> ChannelGaussian:
        standard = sum(math.prod(shape) for shape in self.config.dropped_shapes)
        size = self.config.size(len(self.blocks) - 1)
        return ChannelGaussian(standard, self.prior_mean, self.prior_log_scale, size)

    @property
    def injected_dims(self) -> int:
        """Standard normal numbers that `encode` takes for each image: the injected channels."""
        return sum(math.prod(shape) for shape in self.config.injected_shapes)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the standard normal noise of one draw: D numbers, the dequantiser's,
        then the injected ones. It is also the latent's size.
        """
        return (self.dims + self.injected_dims,)

    def encode(
        self,
        x: Images,
        label: Labels | None = None,
        noise: Float[Tensor, "batch injected"] | None = None,
    ) -> tuple[Float[Tensor, "batch latent"], PerSample]:
        """Latent of images in [-1, 1] with noise, and ln |det dz/d(x, noise)|.

        Args:
            x: images.
            label: None; the model is unconditional.
            noise: standard normal, see `injected_dims`; None for zeros, so that every injected
                channel is its mean.

        Raises:
            ValueError: wrong shape or dtype, or a label.
        """
        self.check_input(x, label)
        h = x.to(torch.promote_types(x.dtype, torch.float32)) / 2  # the published range, centred
        if noise is None:
            noise = h.new_zeros(len(x), self.injected_dims)
        _check_noise(noise, (len(x), self.injected_dims))
        injected = _as_shapes(noise.to(h.dtype), self.config.injected_shapes)
        log_abs_det = h.new_full((len(x),), -self.dims * math.log(2))
        latent: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            h = F.pixel_unshuffle(h, 2)  # channel slowest, then row, then column
            if index:
                h, dropped = h.chunk(2, dim=1)
                latent.append(dropped.flatten(1))
            count = self.config.units[index] - 1
            h, change = block(h, injected[:count])
            injected = injected[count:]
            log_abs_det = log_abs_det + change
        return torch.cat([*latent, h.flatten(1)], dim=1), log_abs_det

    @torch.no_grad()
    def trajectory(
        self,
        z: Float[Tensor, "batch latent"],
        label: Labels | None = None,
        *,
        solver: Solver | None = None,
    ) -> Iterator[Images]:
        """See `Flow.trajectory`: blocks in reverse order; `solver` has nothing to invert.

        A state has more numbers than an image: all but the last show its first channels.
        """
        self.check_input(z, label, latent=True)
        last = len(self.blocks) - 1
        shapes = [*self.config.dropped_shapes, self._last_shape]
        *dropped, h = _as_shapes(z.to(torch.promote_types(z.dtype, torch.float32)), shapes)
        yield self._as_image(h, last)
        for index in reversed(range(last + 1)):
            block = self.blocks[index]
            assert isinstance(block, DenseBlock)
            h = block.inverse(h)
            if index:
                h = F.pixel_shuffle(torch.cat([h, dropped[index - 1]], dim=1), 2)
                yield self._as_image(h, index - 1)
        yield 2 * F.pixel_shuffle(h, 2)

    @property
    def _last_shape(self) -> tuple[int, int, int]:
        return (self.config.channels[-1][1], *self.config.size(len(self.blocks) - 1))

    def _as_image(self, h: Tensor, block: int) -> Tensor:
        """As many channels of a block's state as an image has numbers, or zeros, as an image."""
        channels = self.event_shape[0] * 4 ** (block + 1)
        h = F.pad(h, (0, 0, 0, 0, 0, max(channels - h.shape[1], 0)))[:, :channels]
        return F.pixel_shuffle(h, 2 ** (block + 1))

    def dequantize(
        self, images: GreyLevels, noise: Float[Tensor, "batch dims"]
    ) -> tuple[Images, PerSample]:
        """Images in [-1, 1] with the u that standard normal `noise` becomes, and ln q(u | image).

        Raises ValueError for images that are not such integers.
        """
        grey.check_images(images, self.event_shape, self.levels)
        channels, height, width = self.event_shape
        clean = grey.center(images, self.levels, noise.dtype)
        u, log_q = self.dequantizer(clean, noise.view(-1, 4 * channels, height // 2, width // 2))
        return grey.dequantize(images, u, self.levels), log_q

    def draw(
        self, images: GreyLevels, label: Labels | None, noise: Float[Tensor, "batch *noise"]
    ) -> PerSample:
        """One draw of ln w in nats, with E[w] = P(image): its mean is the ELBO (section 3.3).

        ln w = ln p(z) + ln |det dz/d(x, e)| - ln N(e) - ln q(u | image) - D ln(levels / 2), and the
        log of the mean of w over k draws is the IWBO_k. Each call in training mode moves the
        running statistics once.

        Args:
            images: grey levels 0 .. levels-1.
            label: None; the model is unconditional.
            noise: standard normal, see `noise_shape`.

        Raises:
            ValueError: images that are not such integers, noise of a wrong shape, or a label.
        """
        _check_noise(noise, (len(images), *self.noise_shape))
        ours, injected = noise.split([self.dims, self.injected_dims], dim=1)
        x, log_q = self.dequantize(images, ours)
        z, log_abs_det = self.encode(x, label, injected)
        if self.training:
            for part in self.modules():
                if isinstance(part, DeferredBatchNorm):
                    part.take_up()
        log_q = log_q + standard_normal_log_prob(injected)
        return self.prior.log_prob(z) + log_abs_det - log_q - self.level_nats

    def loss(
        self,
        images: GreyLevels,
        label: Labels | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> PerSample:
        """Minus one draw of the bound of ln P(image), per dimension."""
        return -self.draw(images, label, self._noise(images, generator)) / self.dims

    def initialize(self, images: GreyLevels, *, generator: torch.Generator | None = None) -> None:
        """See `DataInitialized.initialize`: every `ChannelNorm` starts from what reaches it.

        One pass without gradient, which moves no running statistics. In training mode it gives the
        numbers that the published program takes from its first batch on the way.

        Raises:
            ValueError: images that are not such integers, or fewer than two.
        """
        if all(bool(part.initialized) for part in self.modules() if isinstance(part, ChannelNorm)):
            return
        if len(images) < 2:
            raise ValueError(f"expected two images or more to initialise on, got {len(images)}")
        ours, injected = self._noise(images, generator).split(
            [self.dims, self.injected_dims], dim=1
        )
        with initializing(self):
            self.encode(self.dequantize(images, ours)[0], None, injected)

    def _noise(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Noise for one draw of the bound of each image."""
        options = {"dtype": self.wide_dtype, "device": images.device}
        return batch.randn((len(images), *self.noise_shape), generator=generator, **options)


def _check_noise(noise: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(noise.shape) != shape:
        raise ValueError(f"expected noise of shape {shape}, got {tuple(noise.shape)}")


def _as_shapes(flat: Tensor, shapes: list[tuple[int, int, int]]) -> list[Tensor]:
    """Rows cut into images of these shapes."""
    if not shapes:
        return []
    pieces = flat.split([math.prod(shape) for shape in shapes], dim=1)
    return [piece.unflatten(1, shape) for piece, shape in zip(pieces, shapes, strict=True)]
