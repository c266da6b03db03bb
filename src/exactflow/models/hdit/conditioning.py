"""The conditioning of an hourglass transformer, and the norms that apply it.

Random Fourier features, a mapping network, and RMS norms whose scale is a function of its output:
HDiT, arXiv 2401.11605, section 4. Submodules carry the names of published checkpoints.
"""

import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-6


@final
class FourierFeatures(nn.Module):
    """[cos | sin] of 2 pi W x, with a fixed random W ~ N(0, 1) that belongs to the checkpoint.

    Args:
        inputs: numbers in the input.
        features: numbers in the output, even.
    """

    def __init__(self, inputs: int, features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(features // 2, inputs))

    def forward(self, x: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch features"]:
        """Features in the dtype of x, also under autocast."""
        weight = self.get_buffer("weight").to(x.dtype)
        phase = 2 * math.pi * (x[:, None] * weight).sum(-1)
        return torch.cat([phase.cos(), phase.sin()], dim=-1)


@final
class ScaledRMSNorm(nn.Module):
    """x / rms(x), times a learned scale per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """In float32 or better inside."""
        return _rms_scaled(x, self.scale)


@final
class AdaptiveRMSNorm(nn.Module):
    """x / rms(x), times one plus a linear map of the conditioning, which starts at 0."""

    def __init__(self, width: int, condition_width: int) -> None:
        super().__init__()
        self.linear = zero_linear(condition_width, width)

    def forward(
        self,
        x: Float[Tensor, "batch height width channels"],
        condition: Float[Tensor, "batch condition"],
    ) -> Float[Tensor, "batch height width channels"]:
        """In float32 or better inside."""
        moved = self.linear(condition)[:, None, None]
        return _rms_scaled(x, 1 + moved.to(torch.promote_types(moved.dtype, torch.float32)))


@final
class MappingBlock(nn.Module):
    """x + a zero-initialised GEGLU network of the normalised x (arXiv 2002.05202)."""

    def __init__(self, width: int, d_ff: int) -> None:
        super().__init__()
        self.norm = ScaledRMSNorm(width)
        self.up_proj = nn.Linear(width, 2 * d_ff, bias=False)
        self.down_proj = zero_linear(d_ff, width)

    def forward(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        """The residual block."""
        return x + self.down_proj(geglu(self.up_proj(self.norm(x))))


@final
class MappingNetwork(nn.Module):
    """From the sum of all embeddings to the vector that conditions every layer."""

    def __init__(self, depth: int, width: int, d_ff: int) -> None:
        super().__init__()
        self.in_norm = ScaledRMSNorm(width)
        self.blocks = nn.ModuleList(MappingBlock(width, d_ff) for _ in range(depth))
        self.out_norm = ScaledRMSNorm(width)

    def forward(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        """Normalise, map, normalise."""
        x = self.in_norm(x)
        for block in self.blocks:
            x = block(x)
        return self.out_norm(x)


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear map without bias that starts at 0."""
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


def geglu(x: Float[Tensor, "*batch double"]) -> Float[Tensor, "*batch width"]:
    """value gelu(gate) of (value | gate) (arXiv 2002.05202)."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def _rms_scaled(x: Tensor, scale: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rms = (wide.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    return (wide * (rms * scale)).to(x.dtype)
