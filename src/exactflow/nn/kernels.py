"""The token step that `nn/compiled.py` runs: numba, with matrix products in vector instructions.

It takes the addresses in one `Call`, so that starting it costs next to nothing. Fast-math rules are
restricted to those under which NaN and infinity keep their meaning. Functions without annotations
are compiled, and take their arguments one by one, which costs nothing once they are inlined. `k` is
always `Numbers`, and its type decides the precision.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, extending, njit, types
from numba.core import cgutils
from numba.np.numpy_support import from_dtype

from exactflow.nn.kernel_arguments import Call, Layer
from exactflow.nn.transformer import NORM_EPS

VECTOR_BYTES, VECTORS = (64, 4) if llvm.get_host_cpu_features().get("avx512f") else (32, 2)
PANEL_BYTES = VECTORS * VECTOR_BYTES  # outputs of a product that are summed side by side
ROWS = 6  # and the rows, at most: sums and operands just fit the registers


def _compiled(function: Callable[..., Any]) -> Any:
    """The function compiled, without the wrapper by which tests check annotations."""
    fast = {"contract", "reassoc", "nsz", "arcp"}
    return njit(fastmath=fast, error_model="numpy")(inspect.unwrap(function))


def _intrinsic(function: Callable[..., Any]) -> Any:
    return extending.intrinsic(inspect.unwrap(function))


class Numbers(NamedTuple):
    """Constants of one precision; a literal would turn single into double."""

    zero: Any
    half: Any
    one: Any
    two: Any
    infinity: Any
    log2_e: Any
    ln_2: Any
    lowest: Any  # exp of less is subnormal
    half_sqrt_half: Any
    layer_norm: Any
    rms_norm: Any
    exp: tuple[Any, ...]  # coefficients, highest power first
    erfc: tuple[Any, ...]


def _numbers(kind: type, exp_degree: int, erfc_degree: int) -> Numbers:
    limits = np.finfo(kind)
    plain = 0, 0.5, 1, 2, math.inf, math.log2(math.e), math.log(2), math.log(limits.tiny)
    exp = [1 / math.factorial(n) for n in range(exp_degree, -1, -1)]
    numbers = *plain, math.sqrt(0.5) / 2, NORM_EPS, limits.eps
    series = (tuple(map(kind, s)) for s in (exp, _erfc_series(erfc_degree)))
    return Numbers(*map(kind, numbers), *series)


def _erfc_series(degree: int) -> list[float]:
    """Coefficients of exp(z^2) erfc(z) in t = (z - 2) / (z + 2), for z from 0 to 6."""

    def scaled(t: np.ndarray) -> np.ndarray:
        return np.array([math.exp(z * z) * math.erfc(z) for z in 2 * (1 + t) / (1 - t)])

    series = np.polynomial.Chebyshev.interpolate(scaled, degree, domain=[-1, 0.5])
    powers = series.convert(kind=np.polynomial.Polynomial, domain=[-1, 1], window=[-1, 1])
    return powers.coef[::-1].tolist()


SINGLE, DOUBLE = _numbers(np.float32, 7, 10), _numbers(np.float64, 13, 18)  # to 1e-8 and 1e-14


@_intrinsic
def _pointer(_, address, like):
    """The address as a pointer to numbers of the type of `like`, or to layers."""
    result = types.CPointer(from_dtype(np.dtype(Layer)) if like == types.none else like)

    def build(context, builder, _, args):
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(address, like), build


@_intrinsic
def _invoke(_, address):
    """The C function `int f(void)` at that address."""

    def build(_, builder, __, args):
        kind = ir.FunctionType(ir.IntType(32), [])
        result = builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return builder.sext(result, args[0].type)

    return types.intp(address), build


@_intrinsic
def _power_of_two(_, exponent):
    """2^exponent, a normal number, for an integral exponent."""
    bits, mantissa, bias = (32, 23, 127) if exponent == types.float32 else (64, 52, 1023)

    def build(_, builder, __, args):
        whole = ir.IntType(bits)
        biased = builder.add(builder.fptosi(args[0], whole), whole(bias))
        return builder.bitcast(builder.shl(biased, whole(mantissa)), args[0].type)

    return exponent(exponent), build


@_intrinsic
def _panel(_, one, x, x_row, inner, w, bias, y, y_row, rows):
    """y = bias + x w for up to ROWS rows and one panel of w, all sums in registers.

    From loops LLVM makes vectors of half the width, and adds across them.
    """
    size = one.bitwidth // 8
    lanes = VECTOR_BYTES // size

    def build(context, builder, _, args):
        builder.function.attributes.add("noinline")  # beside others' constants the sums would spill
        number = context.get_value_type(one)
        vector, lane = ir.VectorType(number, lanes), ir.IntType(32)
        everywhere = ir.Constant(ir.VectorType(lane, lanes), [0] * lanes)
        x_row, inner, y_row, rows = args[2], args[3], args[7], args[8]
        x, w, bias, y = (builder.inttoptr(args[i], number.as_pointer()) for i in (1, 4, 5, 6))
        index = inner.type

        def vectors(base, offset):
            places = (builder.add(offset, index(v * lanes)) for v in range(VECTORS))
            return [builder.bitcast(builder.gep(base, [p]), vector.as_pointer()) for p in places]

        def broadcast(pointer):
            first = builder.insert_element(vector(ir.Undefined), builder.load(pointer), lane(0))
            return builder.shuffle_vector(first, vector(ir.Undefined), everywhere)

        end = builder.append_basic_block()
        switch = builder.switch(rows, end)
        for count in range(1, ROWS + 1):
            block = builder.append_basic_block()
            switch.add_case(index(count), block)
            builder.position_at_end(block)
            start = [builder.load(p, align=size) for p in vectors(bias, index(0))]
            sums = [[cgutils.alloca_once_value(builder, b) for b in start] for _ in range(count)]
            with cgutils.for_range(builder, inner) as loop:
                column = vectors(w, builder.mul(loop.index, index(VECTORS * lanes)))
                weights = [builder.load(p, align=size) for p in column]
                for r, row in enumerate(sums):
                    place = builder.add(builder.mul(x_row, index(r)), loop.index)
                    factor = broadcast(builder.gep(x, [place]))
                    for total, weight in zip(row, weights, strict=True):
                        term = builder.fmul(factor, weight, flags=["contract"])
                        term = builder.fadd(builder.load(total), term, flags=["contract"])
                        builder.store(term, total)
            for r, row in enumerate(sums):
                for total, place in zip(row, vectors(y, builder.mul(y_row, index(r))), strict=True):
                    builder.store(builder.load(total), place, align=size)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(one, x, x_row, inner, w, bias, y, y_row, rows), build


@_compiled
def _tile(one, x, x_row, inner, w, bias, y, y_row, rows):
    _panel(one, x, x_row, inner, w, bias, y, y_row, rows)


@_compiled
def _exp(x, k):
    """exp(x) for x <= 0."""
    power = np.rint(k.log2_e * (x if x > k.lowest else k.lowest))
    rest = x - power * k.ln_2
    value = k.zero
    for c in k.exp:
        value = value * rest + c
    return k.zero if x < k.lowest else value * _power_of_two(power)


@_compiled
def _gelu(x, k):
    """x Phi(x), Phi(-|x|) = erfc(|x| / sqrt(2)) / 2."""
    t = k.one - k.two / (abs(x) * k.half_sqrt_half + k.one)
    tail = k.zero
    for c in k.erfc:
        tail = tail * t + c
    tail *= k.half * _exp(-k.half * x * x, k)
    return x * (k.one - tail if x > k.zero else tail)


@_compiled
def _share(count, team):
    rank, ranks, _ = team
    return range(count * rank // ranks, count * (rank + 1) // ranks)


@_compiled
def _wait(team):
    if team[2]:
        _invoke(team[2])


@_compiled
def _vector(address, size, k):
    return carray(_pointer(address, k.one), (size,))


@_compiled
def _rows(address, first, last, columns, width, k):
    """Rows of a matrix whose columns are filled up to a multiple of `width`."""
    columns = (columns + width - 1) // width * width
    return carray(_pointer(address, k.one), (last, columns))[first:]


@_compiled
def _read(s, first, x, change, team, k):
    """Copy the tokens to x and the condition to change."""
    tokens, condition = _pointer(s.tokens, k.one), _pointer(s.condition, k.one)
    for r in _share(len(x), team):
        for c in range(s.dim):
            x[r, c] = tokens[(first + r) * s.tokens_row + c * s.tokens_column]
        for c in range(s.heads * s.head_dim):
            change[r, c] = condition[(first + r) * s.condition_row + c * s.condition_column]
    _wait(team)


@_compiled
def _product(x, inner, w, bias, y, gelu, width, team, k):
    """y = bias + x w, and the GELU of that, in tiles of a few rows and one panel of w."""
    tiles = (len(x) + ROWS - 1) // ROWS
    for task in _share(y.shape[1] // width * tiles, team):
        panel, tile = divmod(task, tiles)
        first, last = len(x) * tile // tiles, len(x) * (tile + 1) // tiles
        offset = panel * width * y.itemsize
        x_at = x.ctypes.data + first * x.strides[0]
        y_at = y.ctypes.data + first * y.strides[0] + offset
        w_at = w + offset * inner
        _tile(k.one, x_at, x.shape[1], inner, w_at, bias + offset, y_at, y.shape[1], last - first)
        if gelu:
            for r in range(first, last):
                part = y[r, panel * width : (panel + 1) * width]
                for c in range(width):
                    part[c] = _gelu(part[c], k)
    _wait(team)


@_compiled
def _layer_norm(h, change, scale, offset, y, team, k):
    """h += change, y = the layer norm of h."""
    channels = y.shape[1]
    share = k.one / y.dtype.type(channels)
    scale, offset = _vector(scale, channels, k), _vector(offset, channels, k)
    for r in _share(len(h), team):
        mean, variance = k.zero, k.zero
        for c in range(channels):
            h[r, c] += change[r, c]
            mean += h[r, c] * share
        for c in range(channels):
            variance += (h[r, c] - mean) * (h[r, c] - mean) * share
        if variance == k.infinity:  # torch's NaN, not 0 for what has no finite variance
            variance -= k.infinity
        factor = k.one / math.sqrt(variance + k.layer_norm)
        for c in range(channels):
            y[r, c] = (h[r, c] - mean) * factor * scale[c] + offset[c]
    _wait(team)


@_compiled
def _rms_norm(h, change, scale, y, team, k):
    """y = the RMS norm of h + change, or that itself where there is no scale."""
    channels = y.shape[1]
    share = k.one / y.dtype.type(channels)
    for r in _share(len(h), team):
        square = k.zero
        for c in range(channels):
            y[r, c] = h[r, c] + change[r, c]
            square += y[r, c] * y[r, c] * share
        if scale:
            factor = k.one / math.sqrt(square + k.rms_norm)
            for c in range(channels):
                y[r, c] *= factor * _vector(scale, channels, k)[c]
    _wait(team)


@_compiled
def _attend(qkv, cache, first, position, temperature, p, y, team, k):
    """Store key and value of `position`; y = attention to positions 0 .. position."""
    _, _, heads, _, size = cache.shape
    for task in _share(len(qkv) * heads, team):
        r, head = divmod(task, heads)
        start, third = head * size, heads * size
        query, out = qkv[r, start : start + size], y[r, start : start + size]
        keys, values = cache[0, first + r, head], cache[1, first + r, head]
        for d in range(size):
            keys[position, d] = qkv[r, third + start + d]
            values[position, d] = qkv[r, 2 * third + start + d]
            out[d] = k.zero
        scale = k.one / math.sqrt(y.dtype.type(size))
        if len(temperature):
            scale /= temperature[first + r]
        largest, total = -k.infinity, k.zero
        for j in range(position + 1):
            logit = k.zero
            for d in range(size):
                logit += query[d] * keys[j, d]
            p[j] = logit * scale
            largest = max(largest, p[j])
        for j in range(position + 1):
            p[j] = _exp(p[j] - largest, k)
            total += p[j]
        for j in range(position + 1):
            weight = p[j] / total
            for d in range(size):
                out[d] += weight * values[j, d]
    _wait(team)


@_compiled
def _step(call, k):
    s = carray(call, 1)[0]
    first, last, team = 0, s.batch, (0, 1, 0)
    p = _vector(s.logits, s.length, k)
    if s.ranks:
        rank, ranks = _invoke(s.rank), _invoke(s.ranks)
        p = _rows(s.logits, rank, rank + 1, s.length, 1, k)[0]
        if s.by_samples:
            first, last = s.batch * rank // ranks, s.batch * (rank + 1) // ranks
        else:
            team = (rank, ranks, s.barrier)
    channels, width = s.heads * s.head_dim, s.panel
    x = _rows(s.x, first, last, s.dim, 1, k)
    y = _rows(s.y, first, last, channels, 1, k)
    h = _rows(s.h, first, last, channels, width, k)
    change = _rows(s.change, first, last, channels, width, k)
    qkv = _rows(s.qkv, first, last, 3 * channels, width, k)
    wide = _rows(s.wide, first, last, 4 * channels, width, k)
    raw = _rows(s.raw, first, last, s.out, width, k)
    temperature = _vector(s.temperature, s.batch if s.temperature else 0, k)

    _read(s, first, x, change, team, k)
    _product(x, s.dim, s.input, s.input_bias, h, False, width, team, k)
    for w in carray(_pointer(s.layers, None), s.depth):
        shape = 2, s.batch, s.heads, s.length, s.head_dim
        cache = carray(_pointer(w.cache, k.one), shape)
        _layer_norm(h, change, w.attention_scale, w.attention_offset, y, team, k)
        _product(y, channels, w.qkv, w.qkv_bias, qkv, False, width, team, k)
        _attend(qkv, cache, first, s.position, temperature, p, y, team, k)
        _product(y, channels, w.proj, w.proj_bias, change, False, width, team, k)
        _layer_norm(h, change, w.mlp_scale, w.mlp_offset, y, team, k)
        _product(y, channels, w.expand, w.expand_bias, wide, True, width, team, k)
        _product(wide, 4 * channels, w.contract, w.contract_bias, change, False, width, team, k)
    _rms_norm(h, change, s.norm, y, team, k)
    _product(y, channels, s.output, s.output_bias, raw, False, width, team, k)


@cache
def step(dtype: torch.dtype) -> Any:
    """A C function of the address of a `Call`."""
    numbers = SINGLE if dtype == torch.float32 else DOUBLE

    def run(call):
        _step(call, numbers)

    run, record = inspect.unwrap(run), from_dtype(np.dtype(Call))
    signature = types.void(types.CPointer(record))
    try:
        return cfunc(signature, cache=True)(run)
    except RuntimeError:  # no folder for the cache can be written
        return cfunc(signature)(run)
