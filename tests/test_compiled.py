"""The compiled token step, captured passes and cached windows equal `causal_network`."""

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from exactflow.nn import compiled
from exactflow.nn.compiled import CompiledStep
from exactflow.nn.decoding import DecodingCache
from exactflow.nn.transformer import LayerWeights, NetworkWeights, causal_network

LENGTH = 7
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

needs_numba = pytest.mark.skipif(not compiled.available(), reason="the extra `fast` is missing")


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def network(
    channels: int,
    dim: int,
    out: int,
    depth: int = 2,
    norm: bool = False,
    dtype: torch.dtype = torch.float64,
) -> NetworkWeights:
    """Random weights, somewhat larger than initial ones."""
    seeds = iter(range(10**6))

    def matrix(rows: int, columns: int) -> Tensor:
        return random(rows, columns, seed=next(seeds), dtype=dtype) / columns**0.5

    def vector(size: int, mean: float = 0.0) -> Tensor:
        return mean + 0.5 * random(size, seed=next(seeds), dtype=dtype)

    def layer() -> LayerWeights:
        return LayerWeights(
            vector(channels, 1.0),
            vector(channels),
            *(matrix(3 * channels, channels), vector(3 * channels)),
            *(matrix(channels, channels), vector(channels)),
            *(vector(channels, 1.0), vector(channels)),
            *(matrix(4 * channels, channels), vector(4 * channels)),
            *(matrix(channels, 4 * channels), vector(channels)),
        )

    layers = tuple(layer() for _ in range(depth))
    scale = vector(channels, 1.0) if norm else None
    ends = matrix(channels, dim), vector(channels), matrix(out, channels), vector(out)
    return NetworkWeights(*ends[:2], layers, scale, *ends[2:])


def new_caches(weights: NetworkWeights, batch: int, head_dim: int) -> list[Tensor]:
    """Caches full of NaN, so that reading an unwritten value is noticed."""
    channels = len(weights.input)
    shape = (2, batch, channels // head_dim, LENGTH, head_dim)
    return [weights.input.new_full(shape, torch.nan) for _ in weights.layers]


def reference(
    w: NetworkWeights,
    caches: list[Tensor],
    tokens: Tensor,
    condition: Tensor,
    position: int,
    temperature: Tensor | None = None,
) -> Tensor:
    def keep(layer: int, new: Tensor) -> tuple[Tensor, None]:
        caches[layer][:, :, :, position : position + 1] = new
        return caches[layer][:, :, :, : position + 1], None

    return causal_network(w, tokens, condition, caches[0].shape[-1], temperature, keep)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float | None = None) -> None:
    bound = tolerance or TOLERANCE[theirs.dtype]
    torch.testing.assert_close(ours, theirs, atol=bound, rtol=bound, equal_nan=True)


def check(
    w: NetworkWeights,
    batch: int,
    head_dim: int,
    *,
    threads: int = 1,
    warm: bool = False,
    conditions: int = 1,
) -> None:
    """Step after step, the same outputs and the same caches."""
    dtype, (channels, dim) = w.input.dtype, w.input.shape
    ours, theirs = (new_caches(w, batch, head_dim) for _ in range(2))
    step = CompiledStep(w, ours, threads)
    tokens = random(batch, LENGTH, dim, seed=1, dtype=dtype)
    condition = random(conditions, LENGTH, channels, seed=2, dtype=dtype)
    temperature = (0.5 + random(batch, seed=3, dtype=dtype).abs()) if warm else None
    for t in range(LENGTH):
        call = tokens[:, t], condition[:, t], t, temperature
        assert_close(step(*call), reference(w, theirs, *call))
    for mine, torchs in zip(ours, theirs, strict=True):
        assert_close(mine, torchs)


@needs_numba
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 16])
@pytest.mark.parametrize(("channels", "head_dim"), [(64, 64), (128, 64), (64, 16), (15, 5)])
def test_is_the_network(dtype: torch.dtype, batch: int, channels: int, head_dim: int) -> None:
    check(network(channels, 3, 7, dtype=dtype), batch, head_dim)


@needs_numba
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("dim", "out"), [(1, 1), (3, 6), (48, 96)])
@pytest.mark.parametrize("norm", [False, True])
def test_ends_of_any_width(dtype: torch.dtype, dim: int, out: int, norm: bool) -> None:
    check(network(64, dim, out, norm=norm, dtype=dtype), 3, 64, warm=norm, conditions=3)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("step", ["eager", "graph", pytest.param("compiled", marks=needs_numba)])
def test_every_evaluation_is_that_of_training(
    dtype: torch.dtype, norm: bool, warm: bool, batch: int, step: str
) -> None:
    """After a prefix of any length: one token, several, or all that are left."""
    w = network(32, 3, 6, norm=norm, dtype=dtype)
    tokens, condition = random(batch, LENGTH, 3, seed=1, dtype=dtype), random(1, LENGTH, 32, seed=2)
    temperature = (0.5 + random(batch, seed=3, dtype=dtype).abs()) if warm else None
    expected = causal_network(w, tokens, condition.to(dtype), 16, temperature)
    expected = expected.view(batch, LENGTH, 6)
    for prefix in range(LENGTH):
        for window in {1, 2, LENGTH - prefix}:
            stop = min(prefix + window, LENGTH)
            cache = DecodingCache(w, 16, batch, LENGTH, step=step)
            cache.condition(lambda: condition)
            if prefix:
                assert_close(cache(tokens[:, :prefix], 0, temperature), expected[:, :prefix])
            found = cache(tokens[:, :stop], prefix, temperature)
            assert_close(found, expected[:, prefix:stop])


@needs_numba
@settings(max_examples=15)
@given(
    batch=st.integers(1, 20),
    heads=st.integers(1, 5),
    head_dim=st.integers(1, 33),
    dim=st.integers(1, 9),
    out=st.integers(1, 70),
    depth=st.integers(1, 3),
    norm=st.booleans(),
    warm=st.booleans(),
    single=st.booleans(),
)
@example(1, 1, 1, 1, 1, 1, False, False, False)
def test_any_shape(
    batch: int,
    heads: int,
    head_dim: int,
    dim: int,
    out: int,
    depth: int,
    norm: bool,
    warm: bool,
    single: bool,
) -> None:
    dtype = torch.float32 if single and heads * head_dim > 8 else torch.float64  # few channels: ill
    w = network(heads * head_dim, dim, out, depth, norm, dtype)
    check(w, batch, head_dim, warm=warm)


@needs_numba
@pytest.mark.parametrize("batch", [1, 2, 5, 40])
def test_threads_share_the_work(batch: int) -> None:
    check(network(64, 3, 6, norm=True), batch, 16, threads=2, warm=True)


@needs_numba
def test_every_sample_is_alone() -> None:
    """Bit by bit the same in any batch, on any number of threads."""
    w = network(128, 3, 6, dtype=torch.float32)
    tokens, condition = random(33, 3, seed=1, dtype=torch.float32), w.input.new_zeros(1, 128)
    alone = torch.cat(
        [CompiledStep(w, new_caches(w, 1, 64), 1)(x[None], condition, 0) for x in tokens]
    )
    for batch, threads in ((33, 1), (33, 2), (7, 1), (7, 2)):
        together = CompiledStep(w, new_caches(w, batch, 64), threads)
        assert torch.equal(together(tokens[:batch], condition, 0), alone[:batch])


@needs_numba
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_of_many_tokens_and_tails_of_gelu(dtype: torch.dtype) -> None:
    w = network(64, 3, 6, 1, dtype=dtype)
    w = w._replace(layers=tuple(x._replace(expand=4 * x.expand, qkv=3 * x.qkv) for x in w.layers))
    caches = [random(2, 2, 1, 300, 64, seed=5, dtype=dtype)]
    call = random(2, 3, seed=1, dtype=dtype), random(1, 64, seed=2, dtype=dtype), 299
    expected = reference(w, [c.clone() for c in caches], *call)
    assert_close(CompiledStep(w, caches)(*call), expected, 4 * TOLERANCE[dtype])


@needs_numba
def test_any_strides_and_types_of_arguments() -> None:
    w = network(64, 6, 4)
    tokens = random(LENGTH, 6, 3, seed=1).permute(2, 0, 1)[:, 2]
    condition = random(64, 3, seed=2).T
    step, expected = (
        CompiledStep(w, new_caches(w, 3, 64)),
        reference(w, new_caches(w, 3, 64), tokens, condition, 0),
    )
    assert_close(step(tokens, condition, 0), expected)
    single = step(tokens.float(), condition, 0, torch.ones(6)[::2])
    assert_close(single, expected, 1e-5)
    assert single.dtype == torch.float64


@needs_numba
def test_weights_are_those_of_the_construction() -> None:
    w, caches = network(64, 3, 6), new_caches(network(64, 3, 6), 2, 64)
    step, call = CompiledStep(w, caches), (random(2, 3, seed=1), random(1, 64, seed=2), 0)
    before = step(*call).clone()
    for t in (w.input, w.output_bias, *w.layers[0]):
        t.zero_()
    assert torch.equal(step(*call), before)


@needs_numba
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bad", [1e30, -1e30, torch.inf, torch.nan])
def test_what_is_not_finite_stays_so_and_stays_alone(dtype: torch.dtype, bad: float) -> None:
    w = network(64, 3, 6, dtype=dtype)
    ours, theirs, clean = (new_caches(w, 7, 64) for _ in range(3))
    step, healthy = CompiledStep(w, ours), CompiledStep(w, clean)
    condition = w.input.new_zeros(1, 64)
    for t in range(3):
        tokens = random(7, 3, seed=t, dtype=dtype)
        without = healthy(tokens, condition, t).clone()
        if t == 1:
            tokens[2, 1] = bad
        out = step(tokens, condition, t)
        expected = reference(w, theirs, tokens, condition, t)
        assert_close(out, expected)
        others = torch.arange(7) != 2
        assert torch.equal(out[others], without[others])


@needs_numba
def test_two_threads_of_python() -> None:
    w = network(64, 3, 6)

    def run(batch: int) -> None:
        for _ in range(5):
            check(w, batch, 64, threads=2)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, (3, 4)))


@needs_numba
def test_one_thread_without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str | None) -> None:
        raise TypeError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    check(network(64, 3, 6), 3, 64, threads=2)


@needs_numba
def test_foreign_tensors_are_refused() -> None:
    w = network(64, 3, 6)
    caches = new_caches(w, 2, 64)
    with pytest.raises(ValueError, match=r"all in float32 or all in float64, got .*bfloat16"):
        CompiledStep(w, [cache.bfloat16() for cache in caches])
    with pytest.raises(ValueError, match=r"all in float32 or all in float64, got .*float32"):
        CompiledStep(w, [cache.float() for cache in caches])
    with pytest.raises(ValueError, match="contiguous"):
        CompiledStep(w, [cache.mT.contiguous().mT for cache in caches])
    step, x, condition = CompiledStep(w, caches), w.input.new_zeros(2, 3), w.input.new_zeros(1, 64)
    with pytest.raises(ValueError, match=r"expected tokens \(2, 3\)"):
        step(x[:1], condition, 0)
    with pytest.raises(ValueError, match=r"a condition \(1 or 2, 64\)"):
        step(x, condition[:, :3], 0)
    with pytest.raises((ValueError, TypeError), match="temperature"):
        step(x, condition, 0, torch.ones(3))
    for position in (-1, LENGTH):
        with pytest.raises(ValueError, match=f"a position below {LENGTH}"):
            step(x, condition, position)


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "exactflow.nn.kernels", raising=False)
    monkeypatch.delattr("exactflow.nn.kernels", raising=False)
    compiled._kernels.cache_clear()
    assert not compiled.available()
    w = network(64, 3, 6)
    with pytest.raises(ImportError, match=r"pip install 'exactflow\[fast\]'"):
        CompiledStep(w, new_caches(w, 2, 64))
