"""Attention on a grid of tokens, as the hourglass transformer uses it.

Global, neighbourhood and shifted-window attention of queries and keys that are normalised and
rotated beforehand: HDiT, arXiv 2401.11605, section 4. Logits are plain inner products.
"""

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, cast, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

Grid = Float[Tensor, "batch heads height width dim"]

TILE = 8  # side of the squares of queries that share their keys
FLEX_TOKENS = 4096  # from this many tokens on, block-sparse kernels beat gathered tiles
NORM_EPS = 1e-6


def token_positions(
    height: int, width: int, like: Float[Tensor, "*any"]
) -> Float[Tensor, "height width 2"]:
    """(y, x) of the tokens' centres: the long side spans [-1, 1], tokens are square."""
    long = max(height, width)
    y, x = (
        (2 * torch.arange(size, device=like.device, dtype=like.dtype) + 1 - size) / long
        for size in (height, width)
    )
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)


@final
class AxialRotary(nn.Module):
    """Rotary embedding of the first half of a head: half of its pairs by y, half by x.

    Frequencies lie between pi and 10 pi, spread over all heads: no two heads share one.

    Args:
        head_dim: width of a head, a multiple of 8.
        heads: number of heads.
    """

    def __init__(self, head_dim: int, heads: int) -> None:
        super().__init__()
        pairs = head_dim // 8  # per axis
        log_frequencies = torch.linspace(
            math.log(math.pi), math.log(10 * math.pi), pairs * heads + 1
        )
        self.register_buffer("freqs", log_frequencies[:-1].exp().view(pairs, heads).T.contiguous())

    def forward(
        self, x: Grid, position: Float[Tensor, "height width 2"]
    ) -> Float[Tensor, "batch heads height width dim"]:
        """Pairs (a, b) become (a cos - b sin, b cos + a sin)."""
        freqs = self.get_buffer("freqs").to(x.dtype)
        angle = position.to(x.dtype)[..., None] * freqs[:, None, None, None]
        angle = angle.flatten(3)  # of heads, height, width, 2, pairs
        a, b, rest = x.tensor_split((angle.shape[-1], 2 * angle.shape[-1]), dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def cosine_normalize(x: Grid, scale: Float[Tensor, " heads"]) -> Grid:
    """Vectors of length sqrt(scale), one scale per head: their inner products are cosines times it.

    In float32 or better, whatever comes in.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, factor = x.to(dtype), scale.to(dtype).sqrt().view(-1, 1, 1, 1)
    return x * (factor * (x.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt())


def global_attention(q: Grid, k: Grid, v: Grid) -> Grid:
    """Every token sees every token."""
    q_flat, k_flat, v_flat = (part.flatten(2, 3) for part in (q, k, v))
    return F.scaled_dot_product_attention(q_flat, k_flat, v_flat, scale=1.0).view_as(q)


def neighborhood_attention(q: Grid, k: Grid, v: Grid, kernel: int) -> Grid:
    """Every token sees exactly kernel x kernel tokens, itself in the middle away from the border.

    At the border the window is moved inside, not cut (Neighborhood Attention, arXiv 2204.07143).

    Args:
        kernel: side of the window, odd and at most either side of the grid.

    Raises:
        ValueError: the grid is smaller than the window.
    """
    height, width = q.shape[2:4]
    if min(height, width) < kernel:
        raise ValueError(
            f"neighbourhood attention: expected at least {kernel} x {kernel} tokens "
            f"(kernel_size={kernel}), got {height} x {width}"
        )
    if q.is_cuda and height * width >= FLEX_TOKENS and q.dtype != torch.float64:
        flex = flex_kernel()
        if flex is not None:
            return _uncompiled_block_sparse(flex, q, k, v, kernel)
    return _tiled(q, k, v, kernel)


class _Axis(NamedTuple):
    """One axis cut into tiles of queries, each with the stretch of keys that covers its windows."""

    queries: Int[Tensor, "tiles side"]
    keys: Int[Tensor, "tiles span"]
    near: Bool[Tensor, "tiles side span"]  # whether the key lies in the query's window


def _axis(size: int, kernel: int, device: torch.device) -> _Axis:
    side = min(TILE, size)
    span = min(side + kernel - 1, size)
    tiles = torch.arange(-(-size // side), device=device)[:, None]
    # A last tile that is not full repeats its last query; the caller cuts the copies off.
    queries = (tiles * side + torch.arange(side, device=device)).clamp(max=size - 1)
    first = _window_start(queries, kernel, size)
    keys = first[:, :1].clamp(max=size - span) + torch.arange(span, device=device)
    offset = keys[:, None] - first[:, :, None]
    return _Axis(queries, keys, (offset >= 0) & (offset < kernel))


def _window_start(query: Tensor, kernel: int, size: int) -> Tensor:
    return (query - kernel // 2).clamp(0, size - kernel)


def _tiled(q: Grid, k: Grid, v: Grid, kernel: int) -> Grid:
    """Squares of queries against the keys around them, one row of squares at a time.

    Keys and values are copied about (1 + kernel / TILE)^2 times, a row at a time.
    """
    batch, heads, height, width, dim = q.shape
    rows, columns = _axis(height, kernel, q.device), _axis(width, kernel, q.device)
    tiles, side = columns.queries.shape
    result = []
    for query_rows, key_rows, near in zip(rows.queries, rows.keys, rows.near, strict=True):
        squares = [
            part[:, :, its_rows][:, :, :, its_columns]  # batch, heads, rows, tiles, columns, dim
            .permute(0, 3, 1, 2, 4, 5)
            .reshape(batch, tiles * heads, -1, dim)
            for part, its_rows, its_columns in (
                (q, query_rows, columns.queries),
                (k, key_rows, columns.keys),
                (v, key_rows, columns.keys),
            )
        ]
        seen = near[:, None, :, None] & columns.near[:, None, :, None, :]
        seen = seen.flatten(3).flatten(1, 2).repeat_interleave(heads, 0)
        out = F.scaled_dot_product_attention(*squares, attn_mask=seen, scale=1.0)
        out = out.view(batch, tiles, heads, -1, side, dim).permute(0, 2, 3, 1, 4, 5)
        result.append(out.flatten(3, 4)[:, :, :, :width])
    return torch.cat(result, dim=2)[:, :, :height]


def block_sparse(flex: Callable[..., Tensor], q: Grid, k: Grid, v: Grid, kernel: int) -> Grid:
    """Neighbourhood attention by `flex`, PyTorch's `flex_attention` or a compiled form of it."""
    height, width = q.shape[2:4]
    mask = _block_mask(height, width, kernel, q.device)
    flat = (part.flatten(2, 3) for part in (q, k, v))
    return flex(*flat, block_mask=mask, scale=1.0).view_as(q)


# A compiled layer leaves its graph here: masks are made and kept outside of any graph.
_uncompiled_block_sparse = cast(Callable[..., Tensor], torch.compiler.disable(block_sparse))


@cache
def _block_mask(height: int, width: int, kernel: int, device: torch.device) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    half, tokens = kernel // 2, height * width
    return create_block_mask(
        # A query at the border sees what the nearest one that has room on both sides sees.
        lambda _batch, _head, query, key: (
            ((key // width - (query // width).clamp(half, height - 1 - half)).abs() <= half)
            & ((key % width - (query % width).clamp(half, width - 1 - half)).abs() <= half)
        ),
        None,
        None,
        tokens,
        tokens,
        device,
    )


@cache
def flex_kernel() -> Callable[..., Tensor] | None:
    """The compiled `flex_attention`, tried once on a GPU; None, with a warning, if it fails."""
    try:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        trial = torch.zeros(1, 1, TILE, 2 * TILE, 2 * TILE, device="cuda")
        block_sparse(compiled, trial, trial, trial, 3)
    except Exception as error:  # a missing compiler, an old driver: all mean "not here"
        warnings.warn(f"FlexAttention does not run here, using SDPA: {error}", stacklevel=3)
        return None
    return compiled


def shifted_window_attention(q: Grid, k: Grid, v: Grid, window: int, shift: int) -> Grid:
    """Tokens see those of their window; the windows lie `shift` tokens towards the origin.

    Windows that wrap around the border do not look across it (Swin, arXiv 2103.14030).

    Args:
        window: side of the windows; divides both sides of the grid.
        shift: 0 .. window - 1.

    Raises:
        ValueError: the windows do not fill the grid.
    """
    height, width = q.shape[2:4]
    if height % window or width % window:
        raise ValueError(
            f"shifted-window attention: expected sides that are multiples of {window} tokens "
            f"(window_size={window}), got {height} x {width}"
        )
    rows, columns = height // window, width // window

    def cut(part: Tensor) -> Tensor:
        part = part.roll((shift, shift), (2, 3)).unflatten(3, (columns, window))
        part = part.unflatten(2, (rows, window)).permute(0, 2, 4, 1, 3, 5, 6)
        return part.flatten(4, 5).flatten(1, 3)  # batch, windows x heads, tokens, dim

    seen = None
    if shift:
        near_rows, near_columns = (_same_side(n, window, shift, q.device) for n in (rows, columns))
        seen = near_rows[:, None, :, None, :, None] & near_columns[None, :, None, :, None, :]
        seen = seen.flatten(4).flatten(2, 3).flatten(0, 1).repeat_interleave(q.shape[1], 0)
    out = F.scaled_dot_product_attention(cut(q), cut(k), cut(v), attn_mask=seen, scale=1.0)
    out = out.unflatten(2, (window, window)).unflatten(1, (rows, columns, q.shape[1]))
    out = out.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)
    return out.roll((-shift, -shift), (2, 3))


def _same_side(windows: int, window: int, shift: int, device: torch.device) -> Tensor:
    """(windows, query, key) along one axis: only the first window holds both ends of the image."""
    wrapped = torch.arange(window, device=device) < shift
    first = torch.arange(windows, device=device) == 0
    return ~first[:, None, None] | (wrapped[:, None] == wrapped)
