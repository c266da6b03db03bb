"""The U-Net of iDDPM and of ADM, as diffusion and flow-matching models share it.

Nichol & Dhariwal, arXiv 2102.09672; Dhariwal & Nichol, arXiv 2105.05233, section 3. The encoder
keeps the result of every stage, the stem's included; every decoder stage takes the last one kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.nn.unet_parts import (
    NORM_GROUPS,
    AttentionOrder,
    Downsample,
    GroupNorm32,
    ResBlock,
    SpatialAttention,
    TimeEmbedding,
    UNetLayer,
    UNetStage,
    Upsample,
    zero_initialized,
)

Resampling = Literal["conv", "resblock", "plain"]


@final
@dataclass(frozen=True)
class UNetConfig:
    """Architecture of a U-Net; the defaults are iDDPM's for 64 x 64 pixels, without labels.

    Level i = 0, 1, ... works at 1 / 2^i of the image's size with channel_mult[i] * model_channels
    channels. Just one of `num_heads` and `head_channels` is given.
    """

    in_channels: int = 3  # twice the image's where a second image is given beside it
    out_channels: int = 3  # twice the image's where the variance is learned
    model_channels: int = 128
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)
    num_res_blocks: int = 3  # per level of the encoder; the decoder has one more
    attention_factors: tuple[int, ...] = (4, 8)  # levels with attention, by their 2^i
    num_heads: int | None = 4
    head_channels: int | None = None
    attention_order: AttentionOrder = "legacy"  # of the qkv features, see `unet_parts.attend`
    scale_shift: bool = True  # False: the embedding is added
    resample: Resampling = "conv"  # "resblock": ADM; "plain": pooling and repetition, no weights
    dropout: float = 0.0
    num_classes: int = 0  # rows of the label table, the null class included; 0: no labels

    def __post_init__(self) -> None:
        sizes = (self.in_channels, self.out_channels, self.model_channels, self.num_res_blocks)
        if min(sizes) < 1 or not self.channel_mult or self.num_classes < 0:
            raise ValueError(f"expected positive sizes and at least one level, got {self}")
        if self.model_channels % 2 or any(width % NORM_GROUPS for width in self.widths):
            raise ValueError(
                f"expected an even model_channels and channels in every level that are multiples "
                f"of {NORM_GROUPS}, got {self.model_channels} and {self.widths}"
            )
        factors = [2**level for level in range(len(self.channel_mult))]
        if not set(self.attention_factors) <= set(factors):
            raise ValueError(
                f"expected attention_factors among {factors}, got {self.attention_factors}"
            )
        if (self.num_heads is None) == (self.head_channels is None):
            raise ValueError(
                f"expected either num_heads or head_channels, the other None, "
                f"got {self.num_heads} and {self.head_channels}"
            )
        divisor = self.num_heads if self.head_channels is None else self.head_channels
        assert divisor is not None
        attending = {w for f, w in zip(factors, self.widths, strict=True) if self.attends(f)}
        if divisor < 1 or any(width % divisor for width in attending | {self.widths[-1]}):
            raise ValueError(
                f"expected heads that divide {sorted(attending | {self.widths[-1]})} channels, "
                f"got num_heads={self.num_heads}, head_channels={self.head_channels}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected dropout in [0, 1), got {self.dropout}")
        if self.attention_order not in ("legacy", "new"):
            raise ValueError(f"expected 'legacy' or 'new' order, got {self.attention_order!r}")
        if self.resample not in ("conv", "resblock", "plain"):
            raise ValueError(f"expected 'conv', 'resblock' or 'plain', got {self.resample!r}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(int(multiple * self.model_channels) for multiple in self.channel_mult)

    @property
    def size_divisor(self) -> int:
        """Height and width of the images must be multiples of this."""
        return 2 ** (len(self.channel_mult) - 1)

    def attends(self, factor: int) -> bool:
        """Whether the level at 1 / factor of the image's size has attention."""
        return factor in self.attention_factors

    def channels_per_head(self, channels: int) -> int:
        """Width of one head of an attention layer with that many channels."""
        if self.head_channels is not None:
            return self.head_channels
        assert self.num_heads is not None
        return channels // self.num_heads


def encoder(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
    """The stages after the stem, and the channels of the stem's and of every stage's result."""
    stages, channels = nn.ModuleList(), [config.widths[0]]
    for level, width in enumerate(config.widths):
        for _ in range(config.num_res_blocks):
            stages.append(UNetStage(_block(config, level, channels[-1])))
            channels.append(width)
        if level + 1 < len(config.widths):
            stages.append(UNetStage([_resample(config, width, "down")]))
            channels.append(width)
    return stages, channels


def middle(config: UNetConfig) -> UNetStage:
    """Residual, attention, residual at the lowest resolution."""
    width = config.widths[-1]
    return UNetStage(
        [
            _residual(config, width, width),
            _attention(config, width),
            _residual(config, width, width),
        ]
    )


def _decoder(config: UNetConfig, kept: Sequence[int]) -> nn.ModuleList:
    """The stages after the middle; each takes one result of the encoder too, the last one first."""
    stages, skips, channels = nn.ModuleList(), list(kept), config.widths[-1]
    for level in reversed(range(len(config.widths))):
        for index in range(config.num_res_blocks + 1):
            layers = _block(config, level, channels + skips.pop())
            channels = config.widths[level]
            if level > 0 and index == config.num_res_blocks:
                layers.append(_resample(config, channels, "up"))
            stages.append(UNetStage(layers))
    return stages


def _block(config: UNetConfig, level: int, in_channels: int) -> list[UNetLayer]:
    """A residual block to the level's width, and attention where the level has it."""
    width = config.widths[level]
    layers: list[UNetLayer] = [_residual(config, in_channels, width)]
    if config.attends(2**level):
        layers.append(_attention(config, width))
    return layers


def _residual(
    config: UNetConfig,
    in_channels: int,
    out_channels: int,
    resample: Literal["down", "up"] | None = None,
) -> ResBlock:
    return ResBlock(
        in_channels,
        out_channels,
        4 * config.model_channels,
        dropout=config.dropout,
        scale_shift=config.scale_shift,
        resample=resample,
    )


def _attention(config: UNetConfig, channels: int) -> SpatialAttention:
    head_channels = config.channels_per_head(channels)
    return SpatialAttention(channels, head_channels, config.attention_order)


def _resample(config: UNetConfig, channels: int, direction: Literal["down", "up"]) -> UNetLayer:
    if config.resample == "resblock":
        return _residual(config, channels, channels, direction)
    layer = Downsample if direction == "down" else Upsample
    return layer(channels, convolve=config.resample == "conv")


def check_images(config: UNetConfig, x: Tensor) -> None:
    """Raise ValueError unless x is (batch, in_channels, H, W) with sizes that can be halved."""
    divisor = config.size_divisor
    if x.ndim != 4 or x.shape[1] != config.in_channels or any(n % divisor for n in x.shape[2:]):
        raise ValueError(
            f"expected images of shape (batch, {config.in_channels}, height, width) with height "
            f"and width that are multiples of {divisor}, got {tuple(x.shape)}"
        )


@final
class UNet(nn.Module):
    """A map of (noisy images, time, label) to images of the same size, zero at initialisation.

    Args:
        config: the architecture.

    Example:
        >>> config = UNetConfig(model_channels=32, channel_mult=(1, 2), attention_factors=(2,))
        >>> UNet(config)(torch.zeros(1, 3, 8, 8), t=torch.zeros(1)).shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        embedding_dim = 4 * config.model_channels
        self.time = TimeEmbedding(config.model_channels)
        self.label = None
        if config.num_classes:
            self.label = nn.Embedding(config.num_classes, embedding_dim)
        self.stem = nn.Conv2d(config.in_channels, config.widths[0], 3, padding=1)
        self.down, kept = encoder(config)
        self.middle = middle(config)
        self.up = _decoder(config, kept)
        self.norm = GroupNorm32(config.widths[0])
        head = nn.Conv2d(config.widths[0], config.out_channels, 3, padding=1)
        self.output = zero_initialized(head)

    @property
    def stages(self) -> Sequence[nn.Module]:
        """Encoder, middle and decoder in order of evaluation."""
        return [*self.down, self.middle, *self.up]

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        t: Float[Tensor, " batch"],
        label: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch out_channels height width"]:
        """The raw prediction, in x's type.

        Args:
            x: noisy images, with further channels if the network takes any.
            t: time as it enters the sinusoids; the caller scales it.
            label: rows of the label table; None only for a network without one.

        Raises:
            ValueError: images that cannot be halved often enough, or labels missing or too many.
        """
        check_images(self.config, x)
        h = self.stem(x.to(self.stem.weight.dtype))
        embedding = self._embed(t, label)
        kept = [h]
        for stage in self.down:
            h = stage(h, embedding)
            kept.append(h)
        h = self.middle(h, embedding)
        for stage in self.up:
            h = stage(torch.cat([h, kept.pop()], dim=1), embedding)
        return self.output(F.silu(self.norm(h))).to(x.dtype)

    def _embed(self, t: Tensor, label: Tensor | None) -> Tensor:
        if (label is None) != (self.label is None):
            rows = self.config.num_classes
            expected = f"labels 0 .. {rows - 1}" if rows else "label=None: no label table"
            raise ValueError(f"expected {expected}, got {'none' if label is None else 'labels'}")
        embedding = self.time(t)
        return embedding if self.label is None else embedding + self.label(label)
