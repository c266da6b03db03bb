"""MaskDiT's network: in training, the encoder sees a part of the tokens, the decoder all places.

Zheng et al., Fast Training of Diffusion Models with Masked Transformers, arXiv 2306.09305,
section 3; its blocks are those of a DiT (arXiv 2212.09748).
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.core.shapes import Images, Labels, PerSample
from exactflow.nn.dit import EMBEDDING_STD, TIME_FREQUENCIES, DiTBlock, grid_embedding, modulated
from exactflow.nn.unet_parts import sinusoidal_embedding


@final
@dataclass(frozen=True)
class Part:
    """Encoder or decoder: channels of a token, blocks, and attention heads, which divide both."""

    width: int
    depth: int
    heads: int

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be built."""
        if min(self.width, self.depth, self.heads) < 1 or self.width % self.heads or self.width % 4:
            raise ValueError(
                "expected blocks, heads and a width that is a multiple of both the heads and 4, "
                f"got {self}"
            )


@final
class MaskedTransformer(nn.Module):
    """The network F(x, c_noise, label).

    Args:
        image_shape: channels, height, width.
        side: of the pixels' squares that become one token.
        encoder: of the kept tokens.
        decoder: of all tokens; those that were removed are a learned mask token to it.
        classes: number of classes; a dropped label is the zero vector.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        side: int,
        encoder: Part,
        decoder: Part,
        classes: int,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.side, self.grid = side, (height // side, width // side)
        self.patch = nn.Linear(channels * side**2, encoder.width)
        self.time_in = nn.Linear(2 * TIME_FREQUENCIES, encoder.width)
        self.time_out = nn.Linear(encoder.width, encoder.width)
        self.label = nn.Embedding(classes, encoder.width) if classes else None
        self.encoder = _blocks(encoder, encoder.width)
        self.bridge_modulation = nn.Linear(encoder.width, 2 * encoder.width)
        self.bridge = nn.Linear(encoder.width, decoder.width)
        self.mask_token = nn.Parameter(torch.empty(decoder.width))
        self.decoder = _blocks(decoder, encoder.width)
        self.modulation = nn.Linear(encoder.width, 2 * decoder.width)
        self.output = nn.Linear(decoder.width, channels * side**2)
        for name, part in (("position", encoder), ("decoder_position", decoder)):
            table = grid_embedding(*self.grid, part.width).to(torch.get_default_dtype())
            self.register_buffer(name, table)
        self._initialize()

    def forward(
        self,
        x: Images,
        c_noise: PerSample,
        label: Labels | None = None,
        kept: Int[Tensor, "batch kept"] | None = None,
    ) -> Images:
        """The network's output for every pixel.

        Args:
            x: noisy images of unit variance.
            c_noise: what the time's sinusoids are of, ln(sigma) / 4.
            label: classes, or their number for a dropped label; None drops all.
            kept: places of the tokens that the encoder sees, row by row; None: all.
        """
        condition = self.condition(c_noise, label)
        tokens = self.encode(x, condition, kept)
        tokens = self.join(tokens, condition, kept)
        activated = F.silu(condition)
        for block in self.decoder:
            tokens = block(tokens, activated)
        shift, scale = self.modulation(activated)[:, None].chunk(2, dim=-1)
        return self.image(self.output(modulated(tokens, shift, scale)))

    def condition(
        self, c_noise: PerSample, label: Labels | None
    ) -> Float[Tensor, "batch features"]:
        """Embedding of the noise level plus that of the label."""
        features = sinusoidal_embedding(c_noise, 2 * TIME_FREQUENCIES).to(self.time_in.weight.dtype)
        found = self.time_out(F.silu(self.time_in(features)))
        if self.label is None or label is None:
            return found
        return found + F.embedding(label, F.pad(self.label.weight, (0, 0, 0, 1)))

    def encode(
        self,
        x: Images,
        condition: Float[Tensor, "batch features"],
        kept: Int[Tensor, "batch kept"] | None,
    ) -> Float[Tensor, "batch kept features"]:
        """The encoder's tokens."""
        tokens = self.patch(self.patches(x)) + self.get_buffer("position")
        if kept is not None:
            tokens = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
        activated = F.silu(condition)
        for block in self.encoder:
            tokens = block(tokens, activated)
        return tokens

    def join(
        self,
        tokens: Float[Tensor, "batch kept features"],
        condition: Float[Tensor, "batch features"],
        kept: Int[Tensor, "batch kept"] | None,
    ) -> Float[Tensor, "batch tokens decoder"]:
        """The decoder's input: the encoder's tokens, mask tokens between them, positions."""
        shift, scale = self.bridge_modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
        tokens = self.bridge(modulated(tokens, shift, scale))
        if kept is not None:
            places = self.mask_token.to(tokens.dtype).expand(len(tokens), *self._places, -1)
            tokens = places.scatter(1, kept[..., None].expand_as(tokens), tokens)
        return tokens + self.get_buffer("decoder_position")

    def patches(self, x: Images) -> Float[Tensor, "batch tokens values"]:
        """Squares of pixels in raster order; inside one, colour by colour."""
        return F.pixel_unshuffle(x, self.side).flatten(2).transpose(1, 2)

    def image(self, patches: Float[Tensor, "batch tokens values"]) -> Images:
        """The image of these patches."""
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, self.grid), self.side)

    @property
    def _places(self) -> tuple[int]:
        return (self.grid[0] * self.grid[1],)

    def _initialize(self) -> None:
        """The published: Xavier, small embeddings, and zero wherever blocks and bridge add."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        small = [self.time_in.weight, self.time_out.weight, self.mask_token]
        for weight in small if self.label is None else [*small, self.label.weight]:
            nn.init.normal_(weight, std=EMBEDDING_STD)
        blocks = [b.modulation for b in (*self.encoder, *self.decoder) if isinstance(b, DiTBlock)]
        ends = (self.bridge_modulation, self.bridge, self.modulation, self.output)
        for linear in (*blocks, *ends):
            nn.init.zeros_(linear.weight)


def _blocks(part: Part, condition: int) -> nn.ModuleList:
    blocks = (DiTBlock(part.width, part.heads, condition=condition) for _ in range(part.depth))
    return nn.ModuleList(blocks)
