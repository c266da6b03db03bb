"""A stack of causal layers one window of tokens after another, on memory allocated once."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from exactflow.nn.causal import NORM_EPS, LayerWeights, TransformerLayer, gelu, transformer_layer

MANY_SAMPLES = 8  # from here on, a CPU multiplies faster by matrices stored by columns


@final
class DecodingCache:
    """What one decoding of one batch keeps: keys and values, weights, and buffers.

    Args:
        layers: the layers; their weights are taken as they are now, and get no gradient.
        batch: number of samples.
        tokens: number of positions.

    Attributes:
        condition: what is added to every token's embedding, (batch or 1, tokens, channels); a
            function of the label only, so its first use fills it in.
    """

    def __init__(self, layers: Sequence[TransformerLayer], batch: int, tokens: int) -> None:
        self.condition: Tensor | None = None
        self._batch, self._head_dim = batch, layers[0].head_dim
        weight = layers[0].qkv.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        shape = (2, batch, weight.shape[1] // self._head_dim, tokens, self._head_dim)
        self._layers = [
            (
                _for_decoding(layer.weights(), batch),
                torch.empty(shape, dtype=dtype, device=weight.device),
            )
            for layer in layers
        ]
        # autocast does not reach into operators that write to a given buffer
        self._step = None if autocast else TokenStep(self._layers)

    @torch.no_grad()
    def __call__(
        self,
        h: Float[Tensor, "rows channels"],
        start: int,
        temperature: Float[Tensor, " batch"] | None,
    ) -> Float[Tensor, "rows channels"]:
        """All layers on positions start .. start + window - 1, (batch * window) rows.

        The result is valid until the next call.
        """
        if len(h) == self._batch and self._step is not None:
            return self._step(h, start, temperature)
        for w, cache in self._layers:
            h = transformer_layer(h, w, self._batch, self._head_dim, cache, start, temperature)
        return h


@final
class TokenStep:
    """`transformer_layer` for one token of every sample, in as few operators as it takes.

    Buffers are allocated and views of them made once: half of a small model's step is neither
    arithmetic nor reading weights.
    """

    def __init__(self, layers: Sequence[tuple[LayerWeights, Tensor]]) -> None:
        weights, cache = layers[0]
        _, batch, heads, _, head_dim = cache.shape
        channels = heads * head_dim
        like = weights.qkv
        self._h, self._change = like.new_empty(2, batch, channels).unbind(0)
        self._qkv = like.new_empty(batch, 3 * channels)
        parts = self._qkv.view(batch, 1, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        self._query, self._key_value = parts[0], parts[1:]
        self._wide = like.new_empty(batch, 4 * channels)
        self._layers = [(_transposed(w), cache, *cache.unbind(0)) for w, cache in layers]

    def __call__(
        self,
        x: Float[Tensor, "batch channels"],
        position: int,
        temperature: Float[Tensor, " batch"] | None,
    ) -> Float[Tensor, "batch channels"]:
        """All layers at one position; the result is valid until the next call."""
        h, change, size = self._h.copy_(x), self._change, x.shape[1:]
        for w, cache, keys, values in self._layers:
            y = torch.layer_norm(h, size, w.attention_scale, w.attention_offset, NORM_EPS)
            torch.addmm(w.qkv_bias, y, w.qkv, out=self._qkv)
            cache.narrow(3, position, 1).copy_(self._key_value)
            query = self._query
            if temperature is not None:
                query = query / temperature.to(query.dtype).view(-1, 1, 1, 1)
            seen = position + 1
            y = F.scaled_dot_product_attention(
                query, keys.narrow(2, 0, seen), values.narrow(2, 0, seen)
            )
            h.add_(torch.addmm(w.proj_bias, y.view(x.shape), w.proj, out=change))
            y = torch.layer_norm(h, size, w.mlp_scale, w.mlp_offset, NORM_EPS)
            torch.addmm(w.expand_bias, y, w.expand, out=self._wide)
            h.add_(torch.addmm(w.contract_bias, gelu(self._wide), w.contract, out=change))
        return h


def _for_decoding(w: LayerWeights, batch: int) -> LayerWeights:
    """The weights without gradients, in the layout that suits products of a few rows."""
    by_columns = w.qkv.device.type == "cpu" and batch >= MANY_SAMPLES
    return LayerWeights(
        *(
            t.t().contiguous().t() if by_columns and t.dim() == 2 else t
            for t in map(Tensor.detach, w)
        )
    )


def _transposed(w: LayerWeights) -> LayerWeights:
    """The matrices as `addmm` takes them."""
    return LayerWeights(*(t.t() if t.dim() == 2 else t for t in w))
