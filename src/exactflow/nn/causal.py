"""A causal pre-norm transformer layer: h <- h + Attention(h); h <- h + MLP(h)."""

from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.nn.attention import causal_attention

NORM_EPS = 1e-5
FEW_ELEMENTS = 8192  # below this, starting threads costs a CPU more than the work


class LayerWeights(NamedTuple):
    """The tensors of one layer, as `transformer_layer` takes them."""

    attention_scale: Tensor
    attention_offset: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    proj: Tensor
    proj_bias: Tensor
    mlp_scale: Tensor
    mlp_offset: Tensor
    expand: Tensor
    expand_bias: Tensor
    contract: Tensor
    contract_bias: Tensor


class NetworkWeights(NamedTuple):
    """The tensors of a whole causal network, from tokens to what it says of the next ones."""

    input: Tensor
    input_bias: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor | None  # scale of an RMS norm before the output map
    output: Tensor
    output_bias: Tensor


def transformer_layer(
    h: Float[Tensor, "rows channels"],
    w: LayerWeights,
    batch: int,
    head_dim: int,
    cache: Float[Tensor, "2 batch heads tokens head_dim"] | None = None,
    start: int = 0,
    temperature: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, "rows channels"]:
    """One layer on (batch * window) rows; arguments as in `causal_attention`."""
    size = w.attention_scale.shape
    y = torch.layer_norm(h, size, w.attention_scale, w.attention_offset, NORM_EPS)
    y = F.linear(y, w.qkv, w.qkv_bias)
    y = causal_attention(y, batch, head_dim, cache, start, temperature)
    h = h + F.linear(y, w.proj, w.proj_bias)
    y = torch.layer_norm(h, size, w.mlp_scale, w.mlp_offset, NORM_EPS)
    y = gelu(F.linear(y, w.expand, w.expand_bias))
    return h + F.linear(y, w.contract, w.contract_bias)


@final
class TransformerLayer(nn.Module):
    """The layer's parameters, PyTorch's default initialisation.

    Args:
        channels: width, a multiple of `head_dim`.
        head_dim: width of one attention head.
    """

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.attention_norm = nn.LayerNorm(channels, NORM_EPS)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.mlp_norm = nn.LayerNorm(channels, NORM_EPS)
        self.expand = nn.Linear(channels, 4 * channels)
        self.contract = nn.Linear(4 * channels, channels)

    def weights(self) -> LayerWeights:
        """The parameters themselves."""
        parts = self.attention_norm, self.qkv, self.proj, self.mlp_norm, self.expand, self.contract
        return LayerWeights(*(tensor for part in parts for tensor in (part.weight, part.bias)))

    def forward(
        self,
        h: Float[Tensor, "rows channels"],
        batch: int,
        temperature: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "rows channels"]:
        """The layer without a cache."""
        return transformer_layer(h, self.weights(), batch, self.head_dim, temperature=temperature)


def gelu(x: Float[Tensor, "rows channels"]) -> Float[Tensor, "rows channels"]:
    """x Phi(x) in its exact form."""
    if x.numel() > FEW_ELEMENTS or x.device.type != "cpu":
        return F.gelu(x)
    # A transposed view is not handed to oneDNN, whose threads take longer to start than to work.
    return F.gelu(x.view(2, -1).t()).t().view_as(x)
