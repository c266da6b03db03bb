"""The parts of a DenseFlow: coupling modules, dense blocks that inject noise, the dequantiser.

Grcic et al., Densely connected normalizing flows, arXiv 2106.04627. Written from the mathematics.
Raw network outputs r become log-scales 2 tanh(r / 2) throughout.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.core.composition import Composition, ElementaryTransform
from exactflow.core.prior import Prior
from exactflow.core.shapes import Images, Labels, Latents, PerSample, Values
from exactflow.models.denseflow.config import DenseFlowConfig
from exactflow.models.denseflow.network import (
    ConditionalNetwork,
    ContextNetwork,
    DenseCouplingNetwork,
    NoiseNetwork,
)
from exactflow.models.transforms import (
    AffineCoupling,
    Context,
    InvertibleComposition,
    InvertibleConvolution,
    Kept,
    Moved,
)
from exactflow.nn.data_dependent import DataDependent, standardize


def standard_normal_log_prob(x: Values) -> PerSample:
    """ln N(x; 0, I) in nats, summed."""
    flat = x.flatten(1)
    return -0.5 * (flat.square().sum(1) + flat.shape[1] * math.log(2 * math.pi))


def bounded_log_scale(raw: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """2 tanh(r / 2): the identity near 0, never beyond 2."""
    return 2 * torch.tanh(raw / 2)


def scale_and_shift(
    raw: Float[Tensor, "batch two_channels height width"], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-scale and shift of each channel j, from the raw channels 2j and 2j + 1; dtype of like."""
    scale, shift = raw.to(like.dtype).unflatten(1, (-1, 2)).unbind(2)
    return bounded_log_scale(scale), shift


@final
class ChannelGaussian(Prior):
    """Standard normal numbers, then images with a mean and a log-scale per channel; laid flat.

    Args:
        standard: how many numbers are N(0, 1).
        mean: of each channel of the rest, (1, channels, 1, 1).
        log_scale: of the same shape.
        size: height and width of the rest.
    """

    def __init__(
        self, standard: int, mean: Tensor, log_scale: Tensor, size: tuple[int, int]
    ) -> None:
        none = mean.new_zeros(standard)
        self._mean = torch.cat([none, mean.expand(-1, -1, *size).flatten()])
        self._log_scale = torch.cat([none, log_scale.expand(-1, -1, *size).flatten()])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._mean.shape)

    def log_prob(self, z: Latents) -> PerSample:
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        mean, log_scale = self._mean.to(z.dtype), self._log_scale.to(z.dtype)
        return standard_normal_log_prob((z - mean) * torch.exp(-log_scale)) - log_scale.sum()

    def from_noise(self, noise: Latents) -> Latents:
        return self._mean.to(noise.dtype) + noise * self._log_scale.to(noise.dtype).exp()


@final
class ChannelNorm(ElementaryTransform, DataDependent):
    """z = (x - shift) exp(-log_scale) per channel, the identity until initialised (ActNorm).

    Initialised on data, every channel of z has mean 0 and standard deviation 1 there.
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.register_buffer("initialized", torch.zeros(1))  # 0 or 1, as published

    def forward(
        self, x: Images, label: Labels | None = None, context: Context | None = None
    ) -> tuple[Images, PerSample]:
        shift, log_scale = self.shift.to(x.dtype), self.log_scale.to(x.dtype)
        change = -log_scale.sum() * (x.shape[2] * x.shape[3])
        return (x - shift) * torch.exp(-log_scale), change.expand(len(x))

    def inverse(
        self, z: Images, label: Labels | None = None, context: Context | None = None
    ) -> Images:
        return z * self.log_scale.to(z.dtype).exp() + self.shift.to(z.dtype)

    @torch.no_grad()
    def initialize(self, x: Images) -> None:
        mean, scale = standardize(x)
        self.shift.copy_(mean.view_as(self.shift))
        self.log_scale.copy_(-scale.log().view_as(self.log_scale))
        self.initialized.fill_(1)


@final
class DenseCoupling(AffineCoupling):
    """The first half of the channels, rounded up, stays and moves the rest.

    Args:
        channels: of the input.
        network: gives the raw scales and shifts of the second half from the first, and from the
            context if it is one of those that see any.
    """

    def __init__(self, channels: int, network: DenseCouplingNetwork | ConditionalNetwork) -> None:
        super().__init__()
        self.kept = channels - channels // 2
        self.network = network

    def move(self, kept: Kept, context: Context | None) -> tuple[Moved, Moved]:
        raw = self.network(kept) if context is None else self.network(kept, context)
        log_scale, shift = scale_and_shift(raw, kept)
        return shift, log_scale


@final
class Exchange(ElementaryTransform):
    """The first `size` channels go to the end."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(
        self, x: Images, label: Labels | None = None, context: Context | None = None
    ) -> tuple[Images, PerSample]:
        return torch.cat([x[:, self.size :], x[:, : self.size]], dim=1), x.new_zeros(len(x))

    def inverse(
        self, z: Images, label: Labels | None = None, context: Context | None = None
    ) -> Images:
        return torch.cat([z[:, -self.size :], z[:, : -self.size]], dim=1)


@final
class CouplingModule(InvertibleComposition):
    """Normalise, mix channels, couple, and exchange the halves.

    Args:
        channels: of the input.
        coupling: what moves the second half of them.
    """

    def __init__(self, channels: int, coupling: DenseCoupling) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.mix = InvertibleConvolution(channels)
        self.coupling = coupling
        self.exchange = Exchange(coupling.kept)

    @property
    def parts(self) -> tuple[ChannelNorm, InvertibleConvolution, DenseCoupling, Exchange]:
        return self.norm, self.mix, self.coupling, self.exchange


@final
class DenseUnit(InvertibleComposition):
    """Coupling modules in turn, named by their numbers."""

    def __init__(self, modules: Iterable[CouplingModule]) -> None:
        super().__init__()
        for index, module in enumerate(modules):
            self.add_module(str(index), module)

    @property
    def parts(self) -> list[CouplingModule]:
        return [module for module in self.children() if isinstance(module, CouplingModule)]


@final
class DenseBlock(nn.Module):
    """Units of coupling modules; before each but the first, Gaussian channels are injected.

    Injected channels are mu + exp(s) e with (mu, s) a function of the block's input and of the
    outputs of all units before the one that they extend (cross-unit coupling, section 3.1).

    Args:
        config: the model's configuration.
        index: which of its blocks this is.
    """

    def __init__(self, config: DenseFlowConfig, index: int) -> None:
        super().__init__()
        self.growth = config.growth
        channels, _ = config.channels[index]
        widths = [channels + unit * config.growth for unit in range(config.units[index])]

        def module(size: int) -> CouplingModule:
            kept, moved = size - size // 2, size // 2
            network = DenseCouplingNetwork(kept, 2 * moved, config.widths[index], config)
            return CouplingModule(size, DenseCoupling(size, network))

        self.units = nn.ModuleList(
            DenseUnit(module(size) for _ in range(config.modules[index])) for size in widths
        )
        seen = [channels + sum(widths[:unit]) for unit in range(len(widths) - 1)]
        self.noise_networks = nn.ModuleList(NoiseNetwork(size, config.growth) for size in seen)

    @property
    def stages(self) -> list[nn.Module]:
        """Noise networks and coupling modules, first applied first."""
        found: list[nn.Module] = []
        for index, unit in enumerate(self._units):
            found += [*self.noise_networks[index - 1 : index], *unit.parts]
        return found

    def inject(
        self, index: int, seen: Sequence[Tensor], noise: Float[Tensor, "batch growth height width"]
    ) -> tuple[Float[Tensor, "batch growth height width"], PerSample]:
        """The channels that standard normal `noise` becomes, and ln |det| of that map."""
        raw = self.noise_networks[index](*seen).to(noise.dtype)
        mean, log_scale = raw.chunk(2, dim=1)
        log_scale = bounded_log_scale(log_scale)
        return mean + log_scale.exp() * noise, log_scale.flatten(1).sum(1)

    def forward(
        self, x: Images, noise: Sequence[Float[Tensor, "batch growth height width"]]
    ) -> tuple[Float[Tensor, "batch out_channels height width"], PerSample]:
        """The image of (x, noise), and ln |det| of this map of both."""
        log_abs_det = x.new_zeros(len(x))
        seen = [x]
        for index, unit in enumerate(self._units):
            if index:
                injected, change = self.inject(index - 1, seen, noise[index - 1])
                log_abs_det = log_abs_det + change
                seen.append(x)
                x = torch.cat([x, injected], dim=1)
            x, change = unit(x)
            log_abs_det = log_abs_det + change
        return x, log_abs_det

    def inverse(self, z: Float[Tensor, "batch out_channels height width"]) -> Images:
        """The x of forward(x, noise)[0] == z, whatever the noise was."""
        for index, unit in reversed([*enumerate(self._units)]):
            z = unit.inverse(z)
            if index:
                z = z[:, : -self.growth]
        return z

    @property
    def _units(self) -> list[DenseUnit]:
        return [unit for unit in self.units if isinstance(unit, DenseUnit)]


@final
class CouplingDequantizer(Composition):
    """q(u | image) on (0, 1)^D: a conditional flow from a Gaussian per channel to a sigmoid.

    Variational dequantisation (Ho et al., Flow++, arXiv 1902.00275, eq. 10).

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: DenseFlowConfig) -> None:
        super().__init__()
        inner, steps = 4 * config.image_shape[0], config.dequantizer_steps
        self.context = ContextNetwork(config)
        self.mean = nn.Parameter(torch.zeros(1, inner, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(1, inner, 1, 1))
        self.mixes = nn.ModuleList(InvertibleConvolution(inner) for _ in range(steps + 1))
        seen, moved = inner - inner // 2 + config.dequantizer_width, inner // 2
        self.couplings = nn.ModuleList(
            DenseCoupling(inner, ConditionalNetwork(seen, 2 * moved, config)) for _ in range(steps)
        )

    @property
    def parts(self) -> list[nn.Module]:
        """A mixing, then couplings with a mixing after each."""
        rest = zip(self.couplings, self.mixes[1:], strict=True)
        return [self.mixes[0], *chain.from_iterable(rest)]

    @property
    def stages(self) -> list[nn.Module]:
        """The dense parts of the context's network and the couplings."""
        return [self.context.first, self.context.second, *self.couplings]

    def forward(
        self, clean: Images, noise: Float[Tensor, "batch inner half_height half_width"]
    ) -> tuple[Images, PerSample]:
        """The u that standard normal `noise` becomes, and ln q(u | image).

        Args:
            clean: centred images in [-1, 1].
            noise: its dtype is that of the results.
        """
        context = self.context(clean)
        log_scale = self.log_scale.to(noise.dtype)
        x = self.mean.to(noise.dtype) + log_scale.exp() * noise
        log_q = standard_normal_log_prob(noise) - log_scale.sum() * noise[0, 0].numel()
        x, change = self.through(x, context)
        x = F.pixel_shuffle(x, 2)
        squashed = F.logsigmoid(x) + F.logsigmoid(-x)
        return torch.sigmoid(x), log_q - change - squashed.flatten(1).sum(1)
