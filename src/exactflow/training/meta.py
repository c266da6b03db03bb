"""The meta device made to act as another: what its kernels keep, without numbers.

Tensors of the meta device have shapes and no contents. A step taken on them runs the model's own
code, whatever its size; these modes say what it would do elsewhere.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, final

import torch
from torch import Tensor
from torch.fx.experimental import _config
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

# What autocast does on an accelerator, by the names of functions and of tensors' methods.
_REDUCED = frozenset(
    [
        "linear",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "matmul",
        "__matmul__",
        "mm",
        "mv",
        "bmm",
        "addmm",
        "addbmm",
        "baddbmm",
        "einsum",
    ]
)
_FULL = frozenset(
    [
        "exp",
        "expm1",
        "log",
        "log2",
        "log10",
        "log1p",
        "reciprocal",
        "rsqrt",
        "pow",
        "__pow__",
        "softplus",
        "layer_norm",
        "group_norm",
        "rms_norm",
        "logsumexp",
        "mse_loss",
    ]
)
_FULL_RESULT = frozenset(["sum", "prod", "cumsum", "cumprod", "softmax", "log_softmax"])


@final
class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside make, from first to last use.

    Args:
        known: tensors that were there before, and are not counted.

    Attributes:
        live: bytes now.
        peak: most bytes so far.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # kept, as are their addresses
        self._addresses = {storage._cdata for storage in self._known}
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in [result] if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._addresses:
                    self._note(storage)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        self._addresses.add(address)
        self._storages[address] = weakref.ref(storage, lambda _: self._forget(address, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, address: int, size: int) -> None:
        self._addresses.discard(address)
        self._storages.pop(address, None)
        self.live -= size


@contextmanager
def without_values() -> Iterator[None]:
    """On the meta device, steps are fast inside, and what is picked by values is all there is."""
    before = _config.meta_nonzero_assume_all_nonzero
    _config.meta_nonzero_assume_all_nonzero = True
    try:
        with RememberedShapes():
            yield
    finally:
        _config.meta_nonzero_assume_all_nonzero = before


@final
class RememberedShapes(TorchDispatchMode):
    """On the meta device, runs no operation twice on tensors of the same shapes.

    It makes again what the first one made. PyTorch infers most shapes in Python, and large models
    have the same layers over and over: this takes a fraction of the time. Operations that write to
    their inputs or return views of them always run.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[Any, tuple[Any, list[Any]]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not _makes_new(func):
            return func(*args, **kwargs)
        facts: list[Any] = [func]  # all that shapes of results depend on
        pending: list[Any] = [*args, *kwargs.items()]
        while pending:
            value = pending.pop()
            if isinstance(value, Tensor):
                facts += (value.dtype, value.shape, value.stride(), value.device)
            elif isinstance(value, list | tuple):
                facts.append(len(value))
                pending += value
            else:
                facts += (type(value), value)
        key = tuple(facts)
        if key in self._made:
            spec, leaves = self._made[key]
            again = [leaf and torch.empty_strided(*leaf[:2], **leaf[2]) for leaf in leaves]
            return again[0] if spec.is_leaf() else tree_unflatten(again, spec)
        result = func(*args, **kwargs)
        leaves, spec = tree_flatten(result)
        inputs = {_address(value) for value in tree_leaves((args, kwargs)) if _is_meta(value)}
        made = [leaf for leaf in leaves if leaf is not None]
        if made and all(_is_meta(leaf) and _address(leaf) not in inputs for leaf in made):
            self._made[key] = spec, [None if x is None else _likeness(x) for x in leaves]
        return result


@cache
def _makes_new(func: Any) -> bool:
    """Whether an operation neither writes to its inputs nor says that it returns views of them."""
    schema = func._schema
    return all(part.alias_info is None for part in (*schema.arguments, *schema.returns))


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _likeness(tensor: Tensor) -> tuple[Any, ...]:
    """Arguments of `empty_strided`."""
    return tensor.shape, tensor.stride(), {"dtype": tensor.dtype, "device": "meta"}


@final
class Kernels(TorchFunctionMode):
    """On the meta device, what PyTorch does elsewhere: fused attention, autocast, fused dropout.

    Autocast is on where the CPU's is, since the meta device has none.

    Args:
        weights: their reduced copies are made once and shared, as autocast does.
        accelerator: whether elsewhere is an accelerator; else a CPU.
    """

    def __init__(self, weights: Iterable[Tensor], accelerator: bool) -> None:
        super().__init__()
        self._weights = {id(weight) for weight in weights}
        self._copies = weakref.WeakValueDictionary[int, Tensor]()
        self._cache: list[Tensor] = []  # copies that are kept, whether something uses them or not
        self._accelerator = accelerator

    @contextmanager
    def active(self) -> Iterator[None]:
        """They are used inside; at the end autocast forgets its copies of weights."""
        with self:
            yield
        self._cache.clear()

    def while_recomputing(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a first evaluation, which is inside anyhow, and of a second one."""
        return nullcontext(), self.active()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self._attention(*args, **kwargs)
        if func is F.dropout and self._accelerator:
            return _dropout(*args, **kwargs)
        if torch.is_autocast_enabled("cpu"):
            if name in _REDUCED:
                args = tuple(self._reduced(arg) for arg in args)
                kwargs = {key: self._reduced(value) for key, value in kwargs.items()}
            elif name in _FULL:
                args = tuple(_full(arg) for arg in args)
            elif name in _FULL_RESULT and args and _is_reduced(args[0]):
                kwargs = {"dtype": torch.float32, **kwargs}
        return func(*args, **kwargs)

    def _reduced(self, value: Any) -> Any:
        """Tensors of float32 in bfloat16; those of weights are made once."""
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if id(value) not in self._weights:
            return value.to(torch.bfloat16)
        copy = self._copies.get(id(value))
        if copy is None:
            copy = self._copies[id(value)] = value.to(torch.bfloat16)
        self._cache.append(copy)
        return copy

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """What a fused kernel keeps, or the plain computation where none takes these inputs."""
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (self._reduced(part) for part in (query, key, value))
        on_cpu = attn_mask is None or attn_mask.dim() in (2, 4)  # a CPU's kernel wants no other
        if query.dim() == 4 and query.is_meta and (self._accelerator or on_cpu):
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype, device="meta")
            out = _FusedAttention.apply(query, key, value, attn_mask)
            assert isinstance(out, Tensor)
            return out
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale
        )


def _is_reduced(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def _full(value: Any) -> Any:
    """Tensors of bfloat16 in float32."""
    return value.to(torch.float32) if _is_reduced(value) else value


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout that keeps one byte for each number."""
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


@final
class _FusedAttention(torch.autograd.Function):
    """Attention that keeps its inputs, its output and the logarithms of its normalisers."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        batch, heads, tokens, _ = query.shape
        # Heads side by side: what follows takes them together without a copy.
        out = query.new_empty((batch, tokens, heads, value.shape[-1])).transpose(1, 2)
        normalisers = query.new_empty((batch, heads, tokens), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, out, normalisers)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
