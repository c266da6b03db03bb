"""A causal pre-norm transformer: h <- h + Attention(h); h <- h + MLP(h), layer after layer.

In training, with a cache and captured as a graph it is `causal_network`. `nn/kernels.py` has the
only other definition, compiled; a test holds the two together.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-5
FEW_ELEMENTS = 8192  # below this, starting threads costs a CPU more than the work


class LayerWeights(NamedTuple):
    """The tensors of one layer, in the order of `TransformerLayer`."""

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
    """The tensors of a whole causal network, from tokens to the parameters of the next ones."""

    input: Tensor
    input_bias: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor | None  # scale of an RMS norm before the output map
    output: Tensor
    output_bias: Tensor


# (index of a layer, keys and values of the window) -> keys and values of all positions so far, and
# a mask (window, keys); None: the causal mask of a window from position 0 on, or one token alone
Keep = Callable[[int, Tensor], tuple[Tensor, Tensor | None]]


def causal_network(
    net: NetworkWeights,
    tokens: Float[Tensor, "batch *window dim"],
    condition: Float[Tensor, "batch_or_1 *window channels"],
    head_dim: int,
    temperature: Float[Tensor, " batch"] | None = None,
    keep: Keep | None = None,
) -> Float[Tensor, "rows out"]:
    """The network at a window of positions of every sample, or at one.

    Args:
        net: its tensors.
        tokens: those of the window.
        condition: what is added to their embedding.
        head_dim: width of one attention head.
        temperature: divides the attention logits of each sample, 1 where None.
        keep: a cache, which stores keys and values and returns those of earlier positions too; None
            where the window begins at position 0.

    Returns:
        batch * window rows.
    """
    h = F.linear(tokens.to(net.input.dtype), net.input, net.input_bias) + condition
    h, size = h.flatten(0, -2), h.shape[-1:]
    for layer, w in enumerate(net.layers):
        y = torch.layer_norm(h, size, w.attention_scale, w.attention_offset, NORM_EPS)
        y = F.linear(y, w.qkv, w.qkv_bias)
        seen = None if keep is None else partial(keep, layer)
        y = causal_attention(y, len(tokens), head_dim, temperature, seen)
        h = h + F.linear(y, w.proj, w.proj_bias)
        y = torch.layer_norm(h, size, w.mlp_scale, w.mlp_offset, NORM_EPS)
        y = gelu(F.linear(y, w.expand, w.expand_bias))
        h = h + F.linear(y, w.contract, w.contract_bias)
    if net.norm is not None:
        h = F.rms_norm(h, size, net.norm)
    return F.linear(h, net.output, net.output_bias)


def causal_attention(
    qkv: Float[Tensor, "rows three_channels"],
    batch: int,
    head_dim: int,
    temperature: Float[Tensor, " batch"] | None = None,
    keep: Callable[[Tensor], tuple[Tensor, Tensor | None]] | None = None,
) -> Float[Tensor, "rows channels"]:
    """Multi-head attention in which position t sees positions 0 .. t.

    Args:
        qkv: queries, keys and values, (batch * window, 3 * channels), each part in heads of
            `head_dim`; logits are scaled by 1 / sqrt(head_dim).
        batch: number of samples.
        head_dim: width of one head.
        temperature: see `causal_network`.
        keep: likewise, of this layer.
    """
    heads = qkv.shape[1] // (3 * head_dim)
    parts = qkv.view(batch, -1, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    query, key_value = parts[0], parts[1:]
    if temperature is not None:
        query = query / temperature.to(query.dtype).view(-1, 1, 1, 1)
    mask = None
    if keep is not None:
        key_value, mask = keep(key_value)
    key, value = key_value.unbind(0)
    causal = mask is None and query.shape[2] > 1
    out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
    return out.transpose(1, 2).reshape(-1, heads * head_dim)


@final
class TransformerLayer(nn.Module):
    """The layer's parameters, PyTorch's default initialisation.

    Args:
        channels: width.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
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


def gelu(x: Float[Tensor, "rows channels"]) -> Float[Tensor, "rows channels"]:
    """x Phi(x) in its exact form."""
    if x.numel() > FEW_ELEMENTS or x.device.type != "cpu":
        return F.gelu(x)
    # A transposed view is not handed to oneDNN, whose threads take longer to start than to work.
    return F.gelu(x.view(2, -1).t()).t().view_as(x)
