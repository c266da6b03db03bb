"""Causal self-attention, with or without a cache: one function for training and decoding."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def causal_attention(
    qkv: Float[Tensor, "rows three_channels"],
    batch: int,
    head_dim: int,
    cache: Float[Tensor, "2 batch heads tokens head_dim"] | None = None,
    start: int = 0,
    temperature: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, "rows channels"]:
    """Multi-head attention in which position t sees positions 0 .. t.

    Args:
        qkv: queries, keys and values of positions start .. start + window - 1 of every sample,
            (batch * window, 3 * channels), each part in heads of `head_dim`.
        batch: number of samples.
        head_dim: width of one head; logits are scaled by 1 / sqrt(head_dim).
        cache: keys and values of positions 0 .. start - 1; takes up those of the window.
        start: first position; 0 without a cache.
        temperature: divides the logits of each sample.
    """
    heads = qkv.shape[1] // (3 * head_dim)
    parts = qkv.view(batch, -1, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    (query, key, value), window = parts.unbind(0), parts.shape[3]
    if temperature is not None:
        query = query / temperature.to(query.dtype).view(-1, 1, 1, 1)
    if cache is None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    else:
        stop = start + window
        cache.narrow(3, start, window).copy_(parts[1:])
        key, value = cache.narrow(3, 0, stop).unbind(0)
        if window == 1 or start == 0:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=window > 1)
        else:  # is_causal aligns top-left: wrong behind a prefix
            seen = torch.ones(window, stop, dtype=torch.bool, device=query.device).tril(start)
            out = F.scaled_dot_product_attention(query, key, value, seen)
    return out.transpose(1, 2).reshape(-1, heads * head_dim)
