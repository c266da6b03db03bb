"""Densely connected convolutional networks, and Nystrom attention beside them (DenseFlow's).

Grcic et al., Densely connected normalizing flows, arXiv 2106.04627, section 3 and appendix; the
attention after Xiong et al., Nystromformer, arXiv 2102.03902. Written from the mathematics.
"""

import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.core.shapes import Images
from exactflow.models.denseflow.config import AttentionVariant, DenseFlowConfig
from exactflow.parallel import shared_batch as batch

INVERSE_STEPS = 6  # of the pseudo-inverse; not converged, so the number is part of the function
STATISTICS_MOMENTUM = 0.1  # weight of a new batch in the running statistics
STATISTICS_EPS = 1e-5


@final
class DenseLayer(nn.Module):
    """ReLU(conv3x3(ReLU(conv1x1(x)))): `growth` new channels from all the earlier ones."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.spatial = nn.Conv2d(channels, growth, 3, padding=1)

    def forward(self, x: Images) -> Float[Tensor, "batch growth height width"]:
        """The new channels alone."""
        return F.relu(self.spatial(F.relu(self.pointwise(x))))


@final
class DenselyConnected(nn.Module):
    """`depth` layers, each fed by all before it; then a + b sigmoid(c) over a 1x1 convolution.

    Args:
        channels: of the input.
        out_channels: of the output.
        depth: number of layers.
        growth: channels that each of them adds.
    """

    def __init__(self, channels: int, out_channels: int, depth: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DenseLayer(channels + index * growth, growth) for index in range(depth)
        )
        self.gate = nn.Conv2d(channels + depth * growth, 3 * out_channels, 1)

    def forward(self, x: Images) -> Float[Tensor, "batch out_channels height width"]:
        """A map of images to images of the same size."""
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        value, gated, gate = self.gate(x).chunk(3, dim=1)
        return value + gated * torch.sigmoid(gate)


@final
class DeferredBatchNorm(nn.Module):
    """Batch normalisation whose running statistics move only when `take_up` is called.

    A forward pass in training mode normalises by the batch and leaves its statistics in
    `batch_statistics`. The owner of the network calls `take_up` once after its whole forward pass,
    so that a part which activation checkpointing evaluates again in the backward pass moves the
    running statistics once.

    Processes that share a batch normalise by the statistics of all of it.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.batch_statistics: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Images) -> Images:
        """Normalised by the batch in training mode, by the running statistics in evaluation."""
        if not self.training:
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, STATISTICS_EPS)
        if batch.is_shared():
            return self._shared(x)
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        y = F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, STATISTICS_EPS)
        self.batch_statistics = (mean, var)  # momentum 1: exactly this batch's
        return y

    def _shared(self, x: Tensor) -> Tensor:
        """The same by the moments of all processes' rows, the second about the common mean."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = batch.mean(exact.mean((0, 2, 3), keepdim=True))
        var = batch.mean((exact - mean).square().mean((0, 2, 3), keepdim=True))
        count = batch.rows(len(x)) * x.shape[2] * x.shape[3]
        unbiased = var.detach() * (count / max(count - 1, 1))  # as batch_norm keeps it
        self.batch_statistics = (mean.detach().flatten(), unbiased.flatten())
        y = (exact - mean) * (var + STATISTICS_EPS).rsqrt()
        return (y * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def take_up(self) -> None:
        """Move the running statistics towards those of the last batch, once."""
        if self.batch_statistics is None:
            return
        mean, var = self.batch_statistics
        self.running_mean.lerp_(mean, STATISTICS_MOMENTUM)
        self.running_var.lerp_(var, STATISTICS_MOMENTUM)
        self.num_batches_tracked.add_(1)
        self.batch_statistics = None


def pseudo_inverse(kernel: Float[Tensor, "batch n n"]) -> Float[Tensor, "batch n n"]:
    """Six steps of the third-order iteration V <- V (13 I - KV (15 I - KV (7 I - KV))) / 4.

    An approximation, differentiated through: far from the inverse for nearly singular kernels.
    """
    identity = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    size = kernel.abs()
    columns, rows = size.sum(-2).amax(-1), size.sum(-1).amax(-1)
    inverse = kernel.mT / (columns * rows)[:, None, None]
    for _ in range(INVERSE_STEPS):
        product = kernel @ inverse
        inner = 15 * identity - product @ (7 * identity - product)
        inverse = 0.25 * inverse @ (13 * identity - product @ inner)
    return inverse


@final
class NystromAttention(nn.Module):
    """One head of attention through the means of a few runs of tokens, linear in their number.

    Two functions of the same weights:

    * "published": what the published models were trained with. A token is a run of 3 E values of
      the channel-major layout, mostly positions of one channel; every softmax runs over rows
      instead of columns; and landmarks are divided by the root of the number of tokens.
    * "corrected": a token is a position, a softmax weighs what a row attends to, and scores are
      divided by the root of E.

    Always evaluated in float32 or better: the landmarks' kernel is nearly singular.

    Args:
        channels: of input and output.
        embed: E, the length of a query.
        landmarks: number of runs.
        variant: which of the two.
    """

    def __init__(
        self, channels: int, embed: int, landmarks: int, variant: AttentionVariant
    ) -> None:
        super().__init__()
        self.landmarks = landmarks
        self.variant = variant
        self.qkv = nn.Conv2d(channels, 3 * embed, 1)
        self.output = nn.Conv2d(embed, channels, 1)

    def forward(self, x: Images) -> Images:
        """Raises ValueError where the positions do not fall into equal runs."""
        batch, _, height, width = x.shape
        tokens = height * width
        if tokens % self.landmarks:
            raise ValueError(
                f"attention through {self.landmarks} landmarks needs a number of positions that "
                f"is a multiple of {self.landmarks}, got {height} x {width}"
            )
        qkv = self.qkv(x)
        with torch.autocast(x.device.type, enabled=False):
            exact = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
            if self.variant == "published":
                attended = self.attend(exact.reshape(batch, tokens, -1))
                attended = attended.reshape(batch, -1, height, width)
            else:
                attended = self.attend(exact.flatten(2).mT).mT.unflatten(2, (height, width))
        return self.output(attended.to(qkv.dtype))

    def attend(self, qkv: Float[Tensor, "batch tokens three_e"]) -> Float[Tensor, "batch tokens e"]:
        """(k1 pinv(k2)) (k3 v) + v over the thirds q, k, v of each token."""
        query, key, value = qkv.chunk(3, dim=-1)
        first, second, third = self.kernels(query, key)
        return (first @ pseudo_inverse(second)) @ (third @ value) + value

    def kernels(
        self, query: Float[Tensor, "batch tokens e"], key: Float[Tensor, "batch tokens e"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens to landmarks, landmarks to landmarks, landmarks to tokens."""
        few_queries, few_keys = (t.unflatten(1, (self.landmarks, -1)).mean(2) for t in (query, key))
        if self.variant == "published":
            scale, axis = 1 / math.sqrt(query.shape[1]), -2
            few_queries, few_keys = few_queries * scale, few_keys * scale
        else:
            axis = -1
            scale = query.shape[-1] ** -0.25
            query, key, few_queries, few_keys = (
                t * scale for t in (query, key, few_queries, few_keys)
            )
        return (
            (query @ few_keys.mT).softmax(axis),
            (few_queries @ few_keys.mT).softmax(axis),
            (few_queries @ key.mT).softmax(axis),
        )


@final
class DenseCouplingNetwork(nn.Module):
    """Attention beside a densely connected part, mixed; the last convolution starts at zero.

    Args:
        channels: of the input.
        out_channels: of the output.
        width: channels inside.
        config: the model's configuration.
    """

    def __init__(
        self, channels: int, out_channels: int, width: int, config: DenseFlowConfig
    ) -> None:
        super().__init__()
        self.input = nn.Conv2d(channels, width, 1)
        self.attention = NystromAttention(width, width // 2, config.landmarks, config.attention)
        self.dense = DenselyConnected(width, width, config.dense_depth, config.dense_growth)
        self.norm = DeferredBatchNorm(2 * width)
        self.mix = nn.Conv2d(2 * width, width, 1, bias=False)
        self.output = zero_convolution(width, out_channels)

    def forward(self, x: Images) -> Float[Tensor, "batch out_channels height width"]:
        """A map of images to images of the same size."""
        h = self.input(x.to(self.input.weight.dtype))
        h = torch.cat([self.attention(h), self.dense(h)], dim=1)
        return self.output(self.mix(F.relu(self.norm(h))))


@final
class ConditionalNetwork(nn.Module):
    """x + dense(x) between two 1x1 convolutions, over an image and its context.

    Args:
        channels: of the image and its context together.
        out_channels: of the output.
        config: the model's configuration.
    """

    def __init__(self, channels: int, out_channels: int, config: DenseFlowConfig) -> None:
        super().__init__()
        width, depth = config.dequantizer_width, config.dequantizer_depth
        self.input = nn.Conv2d(channels, width, 1)
        self.dense = DenselyConnected(width, width, depth, config.dequantizer_growth)
        self.output = zero_convolution(width, out_channels)

    def forward(
        self, x: Images, context: Float[Tensor, "batch context height width"]
    ) -> Float[Tensor, "batch out_channels height width"]:
        """A map of images to images of the same size."""
        h = self.input(torch.cat([x.to(context.dtype), context], dim=1))
        return self.output(h + self.dense(h))


@final
class ContextNetwork(nn.Module):
    """The dequantiser's context: features of a clean image at half its resolution.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: DenseFlowConfig) -> None:
        super().__init__()
        width, depth = config.dequantizer_width, config.dequantizer_depth
        self.first = DenselyConnected(config.image_shape[0], width, depth, config.context_growth)
        self.down = nn.Conv2d(width, width, 2, stride=2)
        self.second = DenselyConnected(width, width, depth, config.context_growth)

    def forward(self, x: Images) -> Float[Tensor, "batch context half_height half_width"]:
        """The context of images in [-1, 1]."""
        return self.second(self.down(self.first(x.to(self.down.weight.dtype))))


@final
class NoiseNetwork(nn.Module):
    """Mean and raw log-scale of injected channels given all channels before; 0 at initialisation.

    Args:
        channels: of all inputs together.
        growth: how many channels are injected.
    """

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(channels, 4 * channels, 3, padding=1)
        self.output = zero_convolution(4 * channels, 2 * growth)

    def forward(
        self, *seen: Float[Tensor, "batch _ height width"]
    ) -> Float[Tensor, "batch two_growth height width"]:
        """Means first, then raw log-scales."""
        x = torch.cat(seen, dim=1).to(self.widen.weight.dtype)
        return self.output(F.relu(self.widen(x)))


def zero_convolution(channels: int, out_channels: int) -> nn.Conv2d:
    """A 1x1 convolution that starts as zero, bias included."""
    made = nn.Conv2d(channels, out_channels, 1)
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    return made
