"""Layers of the diffusion U-Nets, all of them maps of (feature maps, embedding of time and label).

Ho et al., arXiv 2006.11239; Nichol & Dhariwal, iDDPM, arXiv 2102.09672; Dhariwal & Nichol, ADM,
arXiv 2105.05233, section 3. Every residual branch ends in a map initialised to zero.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

AttentionOrder = Literal["legacy", "new"]

NORM_GROUPS = 32
MAX_PERIOD = 10_000  # of the sinusoidal embedding, in units of t over 2 pi
Map = TypeVar("Map", nn.Linear, nn.Conv2d)


def zero_initialized(layer: Map) -> Map:
    """The layer with weight and bias zero, so that its residual branch is 0 at first."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def sinusoidal_embedding(t: Float[Tensor, " batch"], dim: int) -> Float[Tensor, "batch dim"]:
    """[cos(t w_i) | sin(t w_i)] with w_i = 10000^(-i / half), i < half = dim / 2; at least float32.

    Args:
        t: time in the unit the network was trained with (a step index, or a real number).
        dim: width, even.
    """
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    exponents = torch.arange(dim // 2, dtype=t.dtype, device=t.device) / (dim // 2)
    angles = t[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def attend(
    qkv: Float[Tensor, "batch tokens three_channels"], head_channels: int, order: AttentionOrder
) -> Float[Tensor, "batch tokens channels"]:
    """Softmax attention of all tokens to all, logits scaled by 1 / sqrt(head_channels).

    Args:
        qkv: the features of queries, keys and values.
        head_channels: width of one head.
        order: of the features: "legacy" is q, k, v of the first head, then of the second (iDDPM);
            "new" is all queries, all keys, all values.
    """
    batch, tokens, features = qkv.shape
    heads = features // (3 * head_channels)
    if order == "legacy":
        parts = qkv.view(batch, tokens, heads, 3, head_channels).permute(3, 0, 2, 1, 4)
    else:
        parts = qkv.view(batch, tokens, 3, heads, head_channels).permute(2, 0, 3, 1, 4)
    query, key, value = parts.unbind(0)
    out = F.scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).reshape(batch, tokens, features // 3)


@final
class GroupNorm32(nn.GroupNorm):
    """Group normalisation in 32 groups, in float32 or better, returned in the input's type."""

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels, eps=1e-5)

    def forward(self, input: Float[Tensor, "batch channels *space"]) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        h = F.group_norm(input.to(dtype), self.num_groups, weight, bias, self.eps)
        return h.to(input.dtype)


@final
class TimeEmbedding(nn.Module):
    """Sinusoids of time through a perceptron with one hidden layer, 4 times as wide."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.input = nn.Linear(channels, 4 * channels)
        self.output = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t: Float[Tensor, " batch"]) -> Float[Tensor, "batch embedding"]:
        sinusoids = sinusoidal_embedding(t, self.channels).to(self.input.weight.dtype)
        return self.output(F.silu(self.input(sinusoids)))


class UNetLayer(nn.Module, ABC):
    """A map of feature maps, possibly given the embedding of time and label."""

    @abstractmethod
    def forward(
        self,
        h: Float[Tensor, "batch channels height width"],
        embedding: Float[Tensor, "batch embedding"],
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """New feature maps; height and width may be halved or doubled."""


@final
class Downsample(UNetLayer):
    """Half the height and width: a convolution of stride 2, or the mean of 2 x 2 without one."""

    def __init__(self, channels: int, convolve: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if convolve else None

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return F.avg_pool2d(h, 2) if self.conv is None else self.conv(h)


@final
class Upsample(UNetLayer):
    """Every pixel four times, then a convolution where there is one."""

    def __init__(self, channels: int, convolve: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if convolve else None

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        h = F.interpolate(h, scale_factor=2, mode="nearest")
        return h if self.conv is None else self.conv(h)


@final
class ResBlock(UNetLayer):
    """Norm - SiLU - (resample) - conv, modulated norm - SiLU - dropout - zero conv, and a skip.

    Args:
        in_channels: channels of h.
        out_channels: channels of the result; where they differ the skip is a 1 x 1 convolution.
        embedding_dim: width of the embedding.
        dropout: probability that training drops a feature.
        scale_shift: whether the embedding scales and shifts the second norm's result (iDDPM), or
            is added before that norm (DDPM).
        resample: of both branches, without weights of its own (BigGAN's blocks, ADM).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int,
        *,
        dropout: float,
        scale_shift: bool,
        resample: Literal["down", "up"] | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.norm_in = GroupNorm32(in_channels)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(embedding_dim, (1 + scale_shift) * out_channels)
        self.norm_out = GroupNorm32(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zero_initialized(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        branch = self.conv_in(self._resampled(F.silu(self.norm_in(h))))
        modulation = self.modulation(F.silu(embedding))[:, :, None, None]
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
            branch = torch.addcmul(shift, self.norm_out(branch), 1 + scale)
        else:
            branch = self.norm_out(branch + modulation)
        branch = self.conv_out(self.dropout(F.silu(branch)))
        return self.skip(self._resampled(h)) + branch

    def _resampled(self, h: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(h, 2)
        return F.interpolate(h, scale_factor=2, mode="nearest") if self.resample == "up" else h


@final
class SpatialAttention(UNetLayer):
    """Self-attention of all pixels, with a residual.

    Args:
        channels: width, a multiple of `head_channels`.
        head_channels: width of one head.
        order: of the features of `qkv`, as in `attend`.
    """

    def __init__(self, channels: int, head_channels: int, order: AttentionOrder) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.order: AttentionOrder = order
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.output = zero_initialized(nn.Linear(channels, channels))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        tokens = self.norm(h).flatten(2).transpose(1, 2)
        tokens = self.output(attend(self.qkv(tokens), self.head_channels, self.order))
        return h + tokens.transpose(1, 2).reshape(h.shape)


@final
class UNetStage(nn.ModuleList):
    """Layers in sequence, whose result the encoder keeps for one stage of the decoder."""

    def forward(
        self,
        h: Float[Tensor, "batch channels height width"],
        embedding: Float[Tensor, "batch embedding"],
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        for layer in self:
            h = layer(h, embedding)
        return h
