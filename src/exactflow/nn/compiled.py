"""The token step of a causal network on a CPU in one compiled call, with no Python inside."""

import ctypes
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib.util import find_spec
from types import ModuleType
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from exactflow.nn.kernel_arguments import Call, Layer
from exactflow.nn.transformer import NetworkWeights

LOADING = 1.0  # seconds, about, of importing the compiler and loading its code from disk
MANY_SAMPLES = 16  # of one thread: from here on, each thread takes samples of its own


def available() -> bool:
    """Whether the extra that compiles is installed."""
    return find_spec("numba") is not None


_seconds_loading = 0.0


def seconds_loading() -> float:
    """Seconds this process has spent on loading compiled steps, or on compiling them."""
    return _seconds_loading


def loaded() -> bool:
    """Whether this process has a compiled step already."""
    return _seconds_loading > 0


@cache
def _kernels(dtype: torch.dtype) -> ModuleType:
    """The kernels, with the step of that precision loaded or compiled."""
    global _seconds_loading
    began = time.perf_counter()
    try:
        from exactflow.nn import kernels
    except ImportError as error:
        raise ImportError(
            "the compiled step needs the extra: pip install 'exactflow[fast]'"
        ) from error
    kernels.step(dtype)
    _seconds_loading += time.perf_counter() - began
    return kernels


@final
class CompiledStep:
    """One token of every sample through the whole network.

    The outputs of every product, or the samples where there are many, are split over threads. These
    are torch's own: a second pool would fight with it for the cores. The first step of a precision
    takes seconds to compile, and is then kept on disk.

    Args:
        network: its weights are copied as they are now.
        caches: keys and values of every layer, contiguous. The step at a position writes it, and
            reads those before it, whoever wrote them.
        threads: how many; torch's number where None.

    Raises:
        ImportError: the extra is not installed.
        ValueError: tensors are not all on the CPU, or not all float32 or all float64.
    """

    def __init__(
        self,
        network: NetworkWeights,
        caches: Sequence[Float[Tensor, "2 batch heads tokens head_dim"]],
        threads: int | None = None,
    ) -> None:
        _check(network, caches)
        like = network.output
        kernels = _kernels(like.dtype)
        (out, channels), dim = network.output.shape, network.input.shape[1]
        _, batch, heads, length, head_dim = caches[0].shape
        panel = kernels.PANEL_BYTES // like.element_size()
        self._kept: list[Tensor] = []  # the call has but their addresses

        def keep(t: Tensor) -> int:
            self._kept.append(t)
            return t.data_ptr()

        def pack(w: Tensor) -> int:
            return keep(_in_panels(w, panel))

        def buffer(columns: int, rows: int = batch) -> int:
            return keep(like.new_empty(rows, columns + -columns % panel))

        layers = [
            Layer(cache=keep(cache), **{name: pack(t) for name, t in w._asdict().items()})
            for w, cache in zip(network.layers, caches, strict=True)
        ]
        self._layers = (Layer * len(layers))(*layers)
        raw = like.new_empty(batch, out + -out % panel)
        self._raw = raw[:, :out]
        self._call = Call(
            batch=batch,
            length=length,
            dim=dim,
            heads=heads,
            head_dim=head_dim,
            out=out,
            depth=len(caches),
            panel=panel,
            layers=ctypes.addressof(self._layers),
            input=pack(network.input),
            input_bias=pack(network.input_bias),
            norm=0 if network.norm is None else pack(network.norm),
            output=pack(network.output),
            output_bias=pack(network.output_bias),
            x=buffer(dim),
            h=buffer(channels),
            y=buffer(channels),
            qkv=buffer(3 * channels),
            change=buffer(channels),
            wide=buffer(4 * channels),
            raw=keep(raw),
        )
        threads = threads or torch.get_num_threads()
        self._call.logits = buffer(length, threads)
        self._call.by_samples = batch >= MANY_SAMPLES * threads
        self._run = _runner(kernels.step(like.dtype).address, self._call, threads)
        self._sizes = batch, dim, channels, length

    def __call__(
        self,
        tokens: Float[Tensor, "batch dim"],
        condition: Float[Tensor, "batch_or_1 channels"],
        position: int,
        temperature: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch out"]:
        """The network's output at `position`; valid until the next call.

        Args:
            tokens: those at `position`.
            condition: what is added to their embedding.
            position: their place in the caches.
            temperature: divides the attention logits of each sample, 1 where None.
        """
        batch, dim, channels, length = self._sizes
        fits = tokens.shape == (batch, dim) and 0 <= position < length
        fits &= condition.shape in ((1, channels), (batch, channels))
        if not (fits and (temperature is None or temperature.shape == (batch,))):
            raise ValueError(
                f"expected tokens ({batch}, {dim}), a condition (1 or {batch}, {channels}), "
                f"a position below {length}, and {batch} temperatures or none"
            )
        tokens, condition = tokens.to(self._raw), condition.to(self._raw)
        if temperature is not None:
            temperature = temperature.to(self._raw).contiguous()
        call = self._call
        call.tokens, call.condition = tokens.data_ptr(), condition.data_ptr()
        call.tokens_row, call.tokens_column = tokens.stride()
        call.condition_row, call.condition_column = condition.stride()
        if len(condition) == 1:
            call.condition_row = 0
        call.temperature = 0 if temperature is None else temperature.data_ptr()
        call.position = position
        self._run()
        return self._raw


def _check(network: NetworkWeights, caches: Sequence[Tensor]) -> None:
    weights = [t for w in (network, *network.layers) for t in w if isinstance(t, Tensor)]
    types = {t.dtype for t in (*weights, *caches)}
    if types not in ({torch.float32}, {torch.float64}):
        raise ValueError(f"expected all in float32 or all in float64, got {types}")
    if not all(t.is_cpu for t in (*weights, *caches)):
        raise ValueError("expected weights and caches on the CPU")
    if not all(cache.is_contiguous() for cache in caches):
        raise ValueError("expected contiguous caches")


def _in_panels(w: Tensor, panel: int) -> Tensor:
    """Panels of a few outputs each, (outputs / panel, inputs, panel), filled up with zeros."""
    packed = w.new_empty(-(-len(w) // panel), *w.shape[1:], panel)
    for columns, rows in zip(packed.numpy(), w.detach().split(panel), strict=True):
        columns[..., : len(rows)] = rows.numpy().T  # torch would wait for its threads
        columns[..., len(rows) :] = 0
    return packed


def _runner(function: int, call: Call, threads: int) -> Callable[[], object]:
    """Call the C function at that address on `call`, in that many threads where OpenMP is found."""
    address = ctypes.addressof(call)
    if threads > 1:
        # Other vendors' OpenMP has GNU's names too; where they are absent, one thread does all.
        with suppress(AttributeError, TypeError):
            openmp = ctypes.CDLL(None)
            start = openmp.GOMP_parallel
            start.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
            start.restype = None
            names = "omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"
            found = [ctypes.cast(openmp[name], ctypes.c_void_p).value for name in names]
            call.rank, call.ranks, call.barrier = found
            return partial(start, function, address, threads, 0)
    return partial(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function), address)
