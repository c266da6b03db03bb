"""What exactflow is measured against: TarFlow as its public formulation states it.

Written from the equations of arXiv 2412.06329 and from a description of how the public code works,
never from that code. It is slow only where the description says so: an (N, N) mask of floats,
passed to attention as booleans; every position evaluated, the outputs then shifted by one token;
sampling token by token with keys and values that grow by concatenation; guidance as two passes
with two caches; LayerNorm in float32; PyTorch's AdamW. Everything else is written as fast as these
choices allow: no work is repeated, nothing is copied needlessly, everything runs in PyTorch's own
kernels, and inference keeps no graph.

`from_exactflow` copies a model's weights, so that every benchmark first shows that both sides give
the same numbers.
"""

import math
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.models.tarflow.model import TarFlow, TarFlowConfig


@final
class Past:
    """Keys and values of every layer, grown by one token per step.

    The public code keeps one tensor per token and concatenates all of them at every step. With
    `merged`, the concatenated tensor is kept instead: as many bytes are copied, in fewer pieces.
    """

    def __init__(self, layers: int, merged: bool) -> None:
        self.merged = merged
        self.keys: list[list[Tensor]] = [[] for _ in range(layers)]
        self.values: list[list[Tensor]] = [[] for _ in range(layers)]

    def grow(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of the layer, the new ones last."""
        keys, values = self.keys[layer], self.values[layer]
        keys.append(key)
        values.append(value)
        key, value = torch.cat(keys, 2), torch.cat(values, 2)
        if self.merged:
            keys[:], values[:] = [key], [value]
        return key, value


@final
class Norm(nn.LayerNorm):
    """LayerNorm in float32, cast back."""

    def forward(self, input: Tensor) -> Tensor:  # the name nn.LayerNorm gives it
        """Normalised over the last axis."""
        promoted = torch.promote_types(input.dtype, torch.float32)
        weight, bias = self.weight.to(promoted), self.bias.to(promoted)
        normal = F.layer_norm(input.to(promoted), self.normalized_shape, weight, bias, self.eps)
        return normal.to(input.dtype)


@final
class Attention(nn.Module):
    """Pre-norm attention under a mask, or of new tokens over a growing past."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = Norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(
        self, h: Tensor, mask: Tensor | None, past: Past | None, layer: int, temperature: float
    ) -> Tensor:
        """Output without the residual."""
        batch, tokens, channels = h.shape
        qkv = self.qkv(self.norm(h)).view(batch, tokens, -1, self.head_dim)
        query, key, value = qkv.transpose(1, 2).chunk(3, dim=1)
        if past is not None:
            key, value = past.grow(layer, key, value)
        scale = 1 / (math.sqrt(self.head_dim) * temperature)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, channels))


@final
class Layer(nn.Module):
    """Attention and perceptron, each with a residual."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.attention = Attention(channels, head_dim)
        self.perceptron = nn.Sequential(
            Norm(channels),
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
        )

    def forward(
        self, h: Tensor, mask: Tensor | None, past: Past | None, layer: int, temperature: float
    ) -> Tensor:
        """One layer."""
        h = h + self.attention(h, mask, past, layer, temperature)
        return h + self.perceptron(h)


@final
class Block(nn.Module):
    """One flow block over tokens in the image's order."""

    order: Tensor
    mask: Tensor

    def __init__(self, config: TarFlowConfig, reverse: bool) -> None:
        super().__init__()
        tokens, dim, channels = config.num_tokens, config.token_dim, config.width
        order = torch.arange(tokens)
        self.reverse = reverse
        self.merged_cache = False
        self.register_buffer("order", order.flip(0) if reverse else order)
        self.register_buffer("mask", torch.ones(tokens, tokens).tril())
        self.project_in = nn.Linear(dim, channels)
        self.place = nn.Parameter(torch.zeros(tokens, channels))
        self.classes = None
        if config.num_classes:
            self.classes = nn.Parameter(torch.zeros(config.num_classes, channels))
        self.layers = nn.ModuleList(
            Layer(channels, config.head_dim) for _ in range(config.layers_per_block)
        )
        self.shift_only = config.volume_preserving
        self.project_out = nn.Linear(channels, dim if self.shift_only else 2 * dim)

    def permute(self, tokens: Tensor) -> Tensor:
        """Change between the token order of the image and that of the block, either way."""
        return tokens[:, self.order] if self.reverse else tokens

    def embed(self, tokens: Tensor, place: Tensor, label: Tensor | None) -> Tensor:
        """Input of the first layer."""
        h = self.project_in(tokens) + place
        if self.classes is None:
            return h
        if label is None:
            return h + self.classes.mean(0)
        table = torch.cat([self.classes, self.classes.mean(0, keepdim=True)])
        return h + table[label][:, None]

    def split(self, raw: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Log-scale and shift."""
        raw = raw.to(dtype)
        if self.shift_only:
            return torch.zeros_like(raw), raw
        log_scale, shift = raw.chunk(2, dim=-1)
        return log_scale, shift

    def forward(self, tokens: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """All tokens at once, and the summed log-determinant."""
        u = self.permute(tokens)
        place = self.place[self.order] if self.reverse else self.place
        h = self.embed(u, place, label)
        mask = self.mask.bool()
        for index, layer in enumerate(self.layers):
            h = layer(h, mask, None, index, 1.0)
        log_scale, shift = self.split(self.project_out(h), u.dtype)
        first = torch.zeros_like(u[:, :1])
        log_scale = torch.cat([first, log_scale[:, :-1]], 1)
        shift = torch.cat([first, shift[:, :-1]], 1)
        moved = (u - shift) * torch.exp(-log_scale)
        return self.permute(moved), -log_scale.flatten(1).sum(1)

    def step(
        self, token: Tensor, t: int, label: Tensor | None, past: Past, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-scale and shift of token t + 1 from token t and what came before it."""
        h = self.embed(token, self.place[self.order[t]], label)
        for index, layer in enumerate(self.layers):
            h = layer(h, None, past, index, temperature)
        return self.split(self.project_out(h), token.dtype)

    def inverse(
        self,
        tokens: Tensor,
        label: Tensor | None,
        guidance: float,
        temperature: float,
        ramp: bool,
        stop: int | None,
    ) -> Tensor:
        """Token by token; with guidance, a second pass over a second cache for every token."""
        u = self.permute(tokens).clone()
        count = u.shape[1]
        past, past_free = (Past(len(self.layers), self.merged_cache) for _ in range(2))
        for t in range((stop or count) - 1):
            token = u[:, t : t + 1]
            log_scale, shift = self.step(token, t, label, past)
            if guidance:
                w = guidance * (t + 1) / (count - 1) if ramp else guidance
                log_scale_free, shift_free = self.step(token, t, None, past_free, temperature)
                log_scale = log_scale + w * (log_scale - log_scale_free)
                shift = shift + w * (shift - shift_free)
            u[:, t + 1] = u[:, t + 1] * log_scale[:, 0].exp() + shift[:, 0]
        return self.permute(u)


@final
class Baseline(nn.Module):
    """The model. Latents are token sequences in the order of the image.

    Args:
        config: of exactflow's model; STARFlow's variants are not part of the formulation.

    Raises:
        ValueError: for a configuration with such variants.
    """

    variance: Tensor

    def __init__(self, config: TarFlowConfig) -> None:
        super().__init__()
        if config.scale != "exp" or config.soft_clip or config.final_norm:
            raise ValueError("the public formulation knows no softplus, soft clip or final norm")
        self.config = config
        self.blocks = nn.ModuleList(Block(config, index % 2 == 1) for index in range(config.blocks))
        self.register_buffer("variance", torch.ones(config.num_tokens, config.token_dim))

    def encode(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents of images in [-1, 1] and ln |det| in nats."""
        side = self.config.patch_size
        tokens = F.unfold(x, side, stride=side).transpose(1, 2)
        log_abs_det = tokens.new_zeros(len(x))
        for block in self.blocks:
            tokens, change = block(tokens, label)
            log_abs_det = log_abs_det + change
        return tokens, log_abs_det

    @torch.no_grad()
    def decode(
        self,
        z: Tensor,
        label: Tensor | None = None,
        guidance: float = 0.0,
        *,
        temperature: float = 1.0,
        ramp: bool = True,
        stop: int | None = None,
    ) -> Tensor:
        """Images of latents.

        Args:
            z: latents, (batch, tokens, dim).
            label: classes, None for a dropped label.
            guidance: w of the published rule.
            temperature: of the attention of the unconditional branch.
            ramp: whether w grows linearly over the tokens.
            stop: invert only so many tokens of each block: a shorter measurement.
        """
        tokens = z
        for block in reversed(self.blocks):
            assert isinstance(block, Block)
            tokens = block.inverse(tokens, label, guidance, temperature, ramp, stop)
        _, height, width = self.config.image_shape
        side = self.config.patch_size
        return F.fold(tokens.transpose(1, 2), (height, width), side, stride=side)

    def merge_caches(self) -> None:
        """From now on, keep concatenated caches (`merged`, see `Past`)."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.merged_cache = True

    def sample(self, noise: Tensor, label: Tensor | None = None, guidance: float = 0.0) -> Tensor:
        """Images of standard normal noise."""
        return self.decode(noise * self.variance.sqrt(), label, guidance)

    def dequantize(self, images: Tensor, noise: Tensor) -> Tensor:
        """Grey levels plus noise in [0, 1), scaled to [-1, 1]."""
        return 2 * (images + noise) / self.config.levels - 1

    def loss(
        self,
        images: Tensor,
        label: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean over the batch of the training loss: nats per dimension, without a constant."""
        noise = torch.rand(images.shape, generator=generator, device=images.device)
        z, log_abs_det = self.encode(self.dequantize(images, noise), label)
        return 0.5 * z.square().mean() - log_abs_det.mean() / z[0].numel()

    @torch.no_grad()
    def log_likelihood(
        self, images: Tensor, label: Tensor | None = None, *, noise: Tensor | None = None
    ) -> Tensor:
        """Nats of each integer image: one draw of dequantisation noise, one full forward pass."""
        if noise is None:
            noise = torch.rand(images.shape, device=images.device)
        z, log_abs_det = self.encode(self.dequantize(images, noise), label)
        quadratic = (z.square() / self.variance).flatten(1).sum(1)
        constant = self.variance.log().sum() + z[0].numel() * math.log(2 * math.pi)
        interval = z[0].numel() * math.log(self.config.levels / 2)
        return -0.5 * (quadratic + constant) + log_abs_det - interval

    def make_optimizer(self) -> torch.optim.AdamW:
        """AdamW with the published settings, in PyTorch's default implementation."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4)


def corresponding(model: TarFlow, baseline: Baseline) -> Iterator[tuple[Tensor, Tensor]]:
    """Every parameter of the model with that of the baseline."""
    theirs = dict(baseline.named_parameters())
    names = (
        (".input.", ".project_in."),
        (".output.", ".project_out."),
        (".position", ".place"),
        (".class_embedding", ".classes"),
        (".attention_norm.", ".attention.norm."),
        (".qkv.", ".attention.qkv."),
        (".proj.", ".attention.proj."),
        (".mlp_norm.", ".perceptron.0."),
        (".expand.", ".perceptron.1."),
        (".contract.", ".perceptron.3."),
    )
    for name, parameter in model.named_parameters():
        for ours, other in names:
            name = name.replace(ours, other)
        yield parameter, theirs.pop(name)
    if theirs:
        raise ValueError(f"the model has nothing for {sorted(theirs)}")


@torch.no_grad()
def from_exactflow(model: TarFlow) -> Baseline:
    """A baseline with a copy of the model's weights, on its device and in its dtype."""
    with torch.device("meta"):  # weights that are replaced anyway need no values
        baseline = Baseline(model.config)
    baseline.to_empty(device=model.device).to(model.dtype)
    for block in baseline.blocks:  # buffers, which the meta device forgot
        assert isinstance(block, Block)
        tokens = model.config.num_tokens
        order = torch.arange(tokens, device=model.device)
        block.order.copy_(order.flip(0) if block.reverse else order)
        block.mask.copy_(torch.ones_like(block.mask).tril())
    baseline.variance.copy_(model.get_buffer("variance"))
    for ours, theirs in corresponding(model, baseline):
        theirs.copy_(ours)
    return baseline.train(model.training)
