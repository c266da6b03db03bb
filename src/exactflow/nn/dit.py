"""A plain diffusion transformer: patches as tokens, conditioning by adaLN-zero.

Peebles & Xie, Scalable Diffusion Models with Transformers, arXiv 2212.09748, section 3. Every block
is modulated by six vectors, a linear function of the embedding of time and label, and starts as the
identity. Written from the paper's mathematics.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.nn.unet_parts import attend, sinusoidal_embedding

NORM_EPS = 1e-6
TIME_FREQUENCIES = 128  # a cosine and a sine each
LONGEST_PERIOD = 10_000.0  # of positions, in units of 2 pi
EMBEDDING_STD = 0.02  # of initial weights of the class table and of the time's network


@final
@dataclass(frozen=True)
class DiTConfig:
    """Architecture of a DiT, for pixels or latents."""

    image_shape: tuple[int, int, int] = (4, 32, 32)  # channels that come in, height, width
    out_channels: int = 4  # twice those that come in for a learned variance
    patch_size: int = 2  # divides height and width
    width: int = 384  # a multiple of num_heads and of 4
    depth: int = 12  # blocks
    num_heads: int = 6
    num_classes: int = 0  # the class table has one row more, for a dropped label; 0: no table
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _, height, width = self.image_shape
        if min(*self.image_shape, self.out_channels, self.patch_size, self.width, self.depth) < 1:
            raise ValueError(f"expected positive sizes, width and depth, got {self}")
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"expected a patch size that divides height and width, got {self.patch_size} "
                f"for {height} x {width}"
            )
        if self.num_heads < 1 or self.width % self.num_heads or self.width % 4:
            raise ValueError(
                f"expected a width that is a multiple of num_heads={self.num_heads} and of 4, "
                f"got {self.width}"
            )
        if self.num_classes < 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                "expected num_classes >= 0 and dropout in [0, 1), "
                f"got {self.num_classes}, {self.dropout}"
            )


@final
class DiTBlock(nn.Module):
    """x + gate attention(modulated norm of x), then the same with an MLP of four times the width.

    Args:
        width: channels of a token.
        heads: attention heads.
        dropout: probability that a channel of the branches' outputs is dropped in training.
        condition: channels of the condition; None: as many as a token has.
    """

    def __init__(
        self, width: int, heads: int, dropout: float = 0.0, condition: int | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(condition or width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        condition: Float[Tensor, "batch condition"],
    ) -> Float[Tensor, "batch tokens width"]:
        """Both residual branches."""
        parts = self.modulation(condition)[:, None].chunk(6, dim=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        qkv = self.qkv(modulated(x, shift, scale))
        x = x + gate * self.dropout(self.proj(attend(qkv, x.shape[2] // self.heads, "new")))
        hidden = F.gelu(self.expand(modulated(x, mlp_shift, mlp_scale)), approximate="tanh")
        return x + mlp_gate * self.dropout(self.contract(hidden))


@final
class DiT(nn.Module):
    """The network: noisy images or latents, times and labels -> a prediction.

    Args:
        config: the architecture.

    Example:
        >>> net = DiT(DiTConfig(image_shape=(1, 8, 8), out_channels=1, width=24, depth=1))
        >>> net(torch.zeros(2, 1, 8, 8), t=torch.zeros(2)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        channels, height, width = config.image_shape
        side, size = config.patch_size, config.width
        self.patch = nn.Linear(channels * side**2, size)
        self.time_in = nn.Linear(2 * TIME_FREQUENCIES, size)
        self.time_out = nn.Linear(size, size)
        rows = config.num_classes + 1
        self.label = nn.Embedding(rows, size) if config.num_classes else None
        blocks = (DiTBlock(size, config.num_heads, config.dropout) for _ in range(config.depth))
        self.blocks = nn.ModuleList(blocks)
        self.modulation = nn.Linear(size, 2 * size)
        self.output = nn.Linear(size, config.out_channels * side**2)
        position = grid_embedding(height // side, width // side, size).to(torch.get_default_dtype())
        self.register_buffer("position", position)
        self._initialize()

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        t: Float[Tensor, " batch"],
        label: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch out_channels height width"]:
        """The network's output.

        Args:
            x: images or latents.
            t: times exactly as they enter the sinusoidal embedding.
            label: classes 0 .. num_classes - 1, or num_classes for a dropped label; None drops all.

        Raises:
            ValueError: images of another shape than the network is made for.
        """
        if tuple(x.shape[1:]) != self.config.image_shape:
            raise ValueError(
                f"expected images of shape (batch, "
                f"{', '.join(map(str, self.config.image_shape))}), got {tuple(x.shape)}"
            )
        side = self.config.patch_size
        tokens = F.pixel_unshuffle(x, side).flatten(2).transpose(1, 2)
        tokens = self.patch(tokens) + self.get_buffer("position")
        condition = F.silu(self._condition(t, label))
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        tokens = self.output(modulated(tokens, shift, scale)).transpose(1, 2)
        grid = tokens.unflatten(2, (x.shape[2] // side, x.shape[3] // side))
        return F.pixel_shuffle(grid, side)

    def _condition(self, t: Tensor, label: Tensor | None) -> Tensor:
        """Embedding of the time plus that of the label."""
        features = sinusoidal_embedding(t, 2 * TIME_FREQUENCIES).to(self.time_in.weight.dtype)
        condition = self.time_out(F.silu(self.time_in(features)))
        if self.label is None:
            return condition
        if label is None:
            label = torch.full((len(t),), self.config.num_classes, device=t.device)
        return condition + self.label(label)

    def _initialize(self) -> None:
        """The paper's: Xavier, small embeddings, blocks that are the identity, an output of 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        tables = [] if self.label is None else [self.label.weight]
        for weight in (self.time_in.weight, self.time_out.weight, *tables):
            nn.init.normal_(weight, std=EMBEDDING_STD)
        blocks = [block.modulation for block in self.blocks if isinstance(block, DiTBlock)]
        for linear in (*blocks, self.modulation, self.output):
            nn.init.zeros_(linear.weight)


def grid_embedding(rows: int, columns: int, width: int) -> Float[Tensor, "tokens width"]:
    """Fixed positions in raster order: sines and cosines of the column, then of the row."""
    quarter = width // 4
    place = torch.arange(quarter, dtype=torch.float64) / quarter
    frequency = torch.exp(-math.log(LONGEST_PERIOD) * place)
    by_row, by_column = (
        torch.arange(size, dtype=torch.float64)[:, None] * frequency for size in (rows, columns)
    )
    row = torch.cat([by_row.sin(), by_row.cos()], dim=1)[:, None].expand(-1, columns, -1)
    column = torch.cat([by_column.sin(), by_column.cos()], dim=1).expand(rows, -1, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1)


def modulated(
    x: Float[Tensor, "batch tokens width"], shift: Tensor, scale: Tensor
) -> Float[Tensor, "batch tokens width"]:
    """LayerNorm without parameters of its own, in the autocast type; then scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift
