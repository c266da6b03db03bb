"""Causal self-attention with a preallocated cache: one function for training and decoding."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


@final
class KVCache:
    """Keys and values of every layer for one decoding of one batch, allocated once.

    Attributes:
        layers: per layer, keys and values, (2, batch, heads, tokens, head_dim).
        condition: what is added to every token's embedding, (batch or 1, tokens, channels); a
            function of the label only, so the first use fills it in.
    """

    def __init__(
        self, layers: int, batch: int, heads: int, tokens: int, head_dim: int, like: Tensor
    ) -> None:
        shape = (2, batch, heads, tokens, head_dim)
        self.layers = [like.new_empty(shape) for _ in range(layers)]
        self.condition: Tensor | None = None


@final
class CausalSelfAttention(nn.Module):
    """Pre-norm multi-head attention in which position t sees positions 0 .. t.

    Args:
        channels: width, a multiple of `head_dim`.
        head_dim: width of one head; logits are scaled by 1 / sqrt(head_dim).
    """

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        if channels % head_dim:
            raise ValueError(f"expected width to be a multiple of {head_dim}, got {channels}")
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(
        self,
        h: Float[Tensor, "batch window channels"],
        cache: Float[Tensor, "2 batch heads tokens head_dim"] | None = None,
        start: int = 0,
        temperature: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch window channels"]:
        """Attention output, without the residual.

        Args:
            h: positions start .. start + window - 1.
            cache: keys and values of positions 0 .. start - 1; takes up those of the window.
            start: first position of `h`; 0 without a cache.
            temperature: divides the logits of each sample.
        """
        batch, window, channels = h.shape
        qkv = self.qkv(self.norm(h)).view(batch, window, 3, -1, self.head_dim)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        query, (key, value) = qkv[0], qkv[1:]
        if temperature is not None:
            query = query / temperature.to(query.dtype).view(-1, 1, 1, 1)
        mask = None
        if cache is not None:
            cache[:, :, :, start : start + window] = qkv[1:]
            key, value = cache[:, :, :, : start + window]
            if start > 0 and window > 1:  # is_causal aligns top-left: wrong behind a prefix
                mask = torch.ones(window, start + window, dtype=torch.bool, device=h.device)
                mask = mask.tril(start)
        causal = mask is None and window > 1
        out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
        return self.proj(out.transpose(1, 2).reshape(batch, window, channels))
