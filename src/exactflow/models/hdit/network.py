"""The hourglass diffusion transformer: attention at every scale, linear in the number of pixels.

Crowson et al., Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion
Transformers, arXiv 2401.11605, section 4. Tokens are merged 2 x 2 from level to level, pass the
innermost level, and are split again and mixed with what stood there before. Submodules carry the
names of published checkpoints. Written from the paper's mathematics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from exactflow.core.shapes import Images, Labels, PerSample
from exactflow.models.hdit.attention import (
    AxialRotary,
    cosine_normalize,
    global_attention,
    neighborhood_attention,
    shifted_window_attention,
    token_positions,
)
from exactflow.models.hdit.conditioning import (
    AdaptiveRMSNorm,
    FourierFeatures,
    MappingNetwork,
    ScaledRMSNorm,
    geglu,
    zero_linear,
)

AttentionKind = Literal["global", "neighborhood", "shifted-window", "none"]

AUGMENTATIONS = 9  # numbers that describe how an image was augmented; all 0 if it was not
INITIAL_SCALE = 10.0  # of the logits of cosine-similarity attention


@final
@dataclass(frozen=True)
class HourglassLevel:
    """The layers at one scale.

    Attributes:
        depth: number of layers, on the way down and again on the way up.
        width: channels of a token.
        d_ff: channels within the feed-forward block.
        attention: what a token sees.
        head_dim: width of an attention head; divides `width`.
        reach: side of the neighbourhood or of the shifted window, in tokens.
        dropout: probability that a channel is dropped in training.
    """

    depth: int
    width: int
    d_ff: int
    attention: AttentionKind
    head_dim: int = 64
    reach: int = 7
    dropout: float = 0.0


@final
class GridAttention(nn.Module):
    """x + attention over the grid of tokens, by the cosines of queries and keys.

    Args:
        level: which attention, how wide.
        condition_width: width of the conditioning vector.
        index: place of the layer in its level, the way down first; odd ones shift their windows.
    """

    def __init__(self, level: HourglassLevel, condition_width: int, index: int) -> None:
        super().__init__()
        self.level = level
        self.shift = (level.reach // 2) * (index % 2)
        heads = level.width // level.head_dim
        self.norm = AdaptiveRMSNorm(level.width, condition_width)
        self.qkv_proj = nn.Linear(level.width, 3 * level.width, bias=False)
        self.scale = nn.Parameter(torch.full((heads,), INITIAL_SCALE))
        self.pos_emb = AxialRotary(level.head_dim, heads)
        self.dropout = nn.Dropout(level.dropout)
        self.out_proj = zero_linear(level.width, level.width)

    def forward(
        self,
        x: Float[Tensor, "batch height width channels"],
        position: Float[Tensor, "height width 2"],
        condition: Float[Tensor, "batch condition"],
    ) -> Float[Tensor, "batch height width channels"]:
        """The residual block."""
        qkv = self.qkv_proj(self.norm(x, condition))
        qkv = qkv.unflatten(-1, (3, -1, self.level.head_dim)).permute(3, 0, 4, 1, 2, 5)
        q, k, v = qkv.unbind(0)  # each batch, heads, height, width, dim
        q = self.pos_emb(cosine_normalize(q, self.scale), position).to(v.dtype)
        k = self.pos_emb(cosine_normalize(k, self.scale), position).to(v.dtype)
        seen = self._attend(q, k, v).permute(0, 2, 3, 1, 4).flatten(3)
        return x + self.out_proj(self.dropout(seen))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        match self.level.attention:
            case "neighborhood":
                return neighborhood_attention(q, k, v, self.level.reach)
            case "shifted-window":
                return shifted_window_attention(q, k, v, self.level.reach, self.shift)
            case _:
                return global_attention(q, k, v)


@final
class FeedForward(nn.Module):
    """x + a zero-initialised GEGLU network of each token."""

    def __init__(self, level: HourglassLevel, condition_width: int) -> None:
        super().__init__()
        self.norm = AdaptiveRMSNorm(level.width, condition_width)
        self.up_proj = nn.Linear(level.width, 2 * level.d_ff, bias=False)
        self.dropout = nn.Dropout(level.dropout)
        self.down_proj = zero_linear(level.d_ff, level.width)

    def forward(
        self,
        x: Float[Tensor, "batch height width channels"],
        condition: Float[Tensor, "batch condition"],
    ) -> Float[Tensor, "batch height width channels"]:
        """The residual block."""
        return x + self.down_proj(self.dropout(geglu(self.up_proj(self.norm(x, condition)))))


@final
class HourglassLayer(nn.Module):
    """Attention, if the level has any, then the feed-forward block."""

    def __init__(self, level: HourglassLevel, condition_width: int, index: int) -> None:
        super().__init__()
        attends = level.attention != "none"
        self.self_attn = GridAttention(level, condition_width, index) if attends else None
        self.ff = FeedForward(level, condition_width)

    def forward(
        self,
        x: Float[Tensor, "batch height width channels"],
        position: Float[Tensor, "height width 2"],
        condition: Float[Tensor, "batch condition"],
    ) -> Float[Tensor, "batch height width channels"]:
        """Both residual blocks."""
        if self.self_attn is not None:
            x = self.self_attn(x, position, condition)
        return self.ff(x, condition)


@final
class TokenMerge(nn.Module):
    """A square of side x side tokens becomes one: rows, columns, channels, then a linear map."""

    def __init__(self, inputs: int, outputs: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.proj = nn.Linear(inputs * side**2, outputs, bias=False)

    def forward(
        self, x: Float[Tensor, "batch height width inputs"]
    ) -> Float[Tensor, "batch rows columns outputs"]:
        """Sides shrink by `side`."""
        x = x.unflatten(2, (-1, self.side)).unflatten(1, (-1, self.side))
        return self.proj(x.transpose(2, 3).flatten(3))


@final
class TokenSplit(nn.Module):
    """The inverse arrangement of `TokenMerge`, without a skip or mixed with one."""

    def __init__(self, inputs: int, outputs: int, side: int, mixed: bool) -> None:
        super().__init__()
        self.side = side
        self.proj = nn.Linear(inputs, outputs * side**2, bias=False)
        self.fac = nn.Parameter(torch.full((1,), 0.5)) if mixed else None

    def forward(
        self,
        x: Float[Tensor, "batch rows columns inputs"],
        skip: Float[Tensor, "batch height width outputs"] | None = None,
    ) -> Float[Tensor, "batch height width outputs"]:
        """fac times the split tokens plus (1 - fac) times the skip."""
        x = self.proj(x).unflatten(3, (self.side, self.side, -1)).transpose(2, 3)
        x = x.flatten(3, 4).flatten(1, 2)
        return x if self.fac is None or skip is None else torch.lerp(skip, x, self.fac.to(x.dtype))


@final
class HourglassTransformer(nn.Module):
    """The network: a prediction of an image's shape from noisy images and their noise level.

    Args:
        levels: the scales, full resolution first.
        channels: channels of the images.
        patch_size: side of the pixels' squares that become one token.
        mapping: depth, width and inner width of the mapping network.
        class_rows: rows of the class table, a dropped label's included; 0 for no classes.
    """

    def __init__(
        self,
        levels: Sequence[HourglassLevel],
        channels: int,
        patch_size: int,
        mapping: tuple[int, int, int],
        class_rows: int = 0,
    ) -> None:
        super().__init__()
        depth, condition, d_ff = mapping
        *outer, inner = levels
        self.patch_in = TokenMerge(channels, levels[0].width, patch_size)
        self.time_emb = FourierFeatures(1, condition)
        self.time_in_proj = nn.Linear(condition, condition, bias=False)
        self.aug_emb = FourierFeatures(AUGMENTATIONS, condition)
        self.aug_in_proj = nn.Linear(condition, condition, bias=False)
        self.class_emb = nn.Embedding(class_rows, condition) if class_rows else None
        self.mapping = MappingNetwork(depth, condition, d_ff)
        self.down_levels = nn.ModuleList(_layers(level, condition, 0) for level in outer)
        self.mid_level = _layers(inner, condition, 0)
        self.up_levels = nn.ModuleList(_layers(level, condition, level.depth) for level in outer)
        pairs = [(a.width, b.width) for a, b in zip(outer, levels[1:], strict=True)]
        self.merges = nn.ModuleList(TokenMerge(a, b, 2) for a, b in pairs)
        self.splits = nn.ModuleList(TokenSplit(b, a, 2, mixed=True) for a, b in pairs)
        self.out_norm = ScaledRMSNorm(levels[0].width)
        self.patch_out = TokenSplit(levels[0].width, channels, patch_size, mixed=False)
        nn.init.zeros_(self.patch_out.proj.weight)

    def forward(
        self,
        x: Images,
        log_sigma: PerSample,
        label: Labels | None = None,
        augmentation: Float[Tensor, "batch 9"] | None = None,
    ) -> Images:
        """The network's output.

        Args:
            x: images, scaled to about unit variance.
            log_sigma: natural logarithm of the noise level.
            label: rows of the class table; None where there is none.
            augmentation: how the images were augmented; None: not at all.
        """
        condition = self._condition(log_sigma, label, augmentation)
        x = self.patch_in(x.permute(0, 2, 3, 1))
        skips = []
        for level, merge in zip(self.down_levels, self.merges, strict=True):
            x = _apply(level, x, condition)
            skips.append(x)
            x = merge(x)
        x = _apply(self.mid_level, x, condition)
        ways_up = zip(self.up_levels, self.splits, skips, strict=True)
        for level, split, skip in reversed(list(ways_up)):
            x = _apply(level, split(x, skip), condition)
        return self.patch_out(self.out_norm(x)).permute(0, 3, 1, 2)

    @property
    def layers(self) -> list[nn.Module]:
        """All layers in the order in which they act."""
        levels = [*self.down_levels, self.mid_level, *reversed(self.up_levels)]
        return [layer for level in levels for layer in level.children()]

    def _condition(
        self, log_sigma: Tensor, label: Tensor | None, augmentation: Tensor | None
    ) -> Tensor:
        if augmentation is None:
            augmentation = log_sigma.new_zeros(len(log_sigma), AUGMENTATIONS)
        total = self.time_in_proj(self.time_emb(log_sigma[:, None] / 4))
        total = total + self.aug_in_proj(self.aug_emb(augmentation))
        if self.class_emb is not None:
            total = total + self.class_emb(label)
        return self.mapping(total)


def _layers(level: HourglassLevel, condition_width: int, first: int) -> nn.ModuleList:
    indices = range(first, first + level.depth)
    return nn.ModuleList(HourglassLayer(level, condition_width, index) for index in indices)


def _apply(layers: nn.Module, x: Tensor, condition: Tensor) -> Tensor:
    assert isinstance(layers, nn.ModuleList)
    position = token_positions(x.shape[1], x.shape[2], condition)
    for layer in layers:
        x = layer(x, position, condition)
    return x
