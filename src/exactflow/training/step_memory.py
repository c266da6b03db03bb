"""What a training step holds in memory, found out on the meta device: without weights or images.

The step is taken as the trainer takes it, the model's own loss and its backward pass, on tensors
that have shapes and no contents, and every storage is counted for as long as it lives. Where an
accelerator runs other kernels than the meta device does (fused attention, autocast), they stand in
with what they keep.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from exactflow.core.model import FittedFlow, GenerativeModel
from exactflow.training.optim import TrainConfig, make_optimizer, recomputed

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
@dataclass(frozen=True)
class StepMemory:
    """Bytes on one device at the peak of a training step.

    Not counted: what kernels need inside, what an allocator loses to fragments, the device's own
    context, and the batches that a loader prepares.

    Attributes:
        weights: parameters, and buffers with the trainer's copy of them.
        gradients: of all parameters; they are part of `working`.
        optimizer: its state.
        average: of the moving average.
        buckets: in which gradients are sent to other devices.
        activations: what the forward pass leaves behind for the backward pass.
        working: at the peak, all that forward and backward pass hold: `activations`, and the
            gradients and temporaries beside them.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    buckets: int
    activations: int
    working: int

    @property
    def state(self) -> int:
        """What is there from step to step, however few images are in it."""
        return self.weights + self.optimizer + self.average + self.buckets

    @property
    def total(self) -> int:
        """The peak."""
        return self.state + self.working


def micro_batch(config: TrainConfig, devices: int = 1) -> int:
    """Images that a device sees at once. Raises ValueError unless the batch falls into such."""
    if devices < 1 or config.batch_size % (devices * config.accumulate):
        raise ValueError(
            f"expected a batch size that {devices} devices times {config.accumulate} "
            f"micro-batches divide, got {config.batch_size}"
        )
    return config.batch_size // (devices * config.accumulate)


def step_memory(
    model: GenerativeModel, config: TrainConfig, *, devices: int = 1, accelerator: bool = True
) -> StepMemory:
    """Memory of a training step on each of `devices`.

    Args:
        model: on the meta device; left without gradients.
        config: of the training.
        devices: processes that share the batch, each with all weights.
        accelerator: whether kernels are those of an accelerator; else those of a CPU.

    Raises:
        ValueError: a model that is elsewhere, or takes no training steps; a batch that does not
            fall into equal parts.
    """
    share = micro_batch(config, devices)
    if isinstance(model, FittedFlow):
        raise ValueError(f"a model of kind {model.kind!r} is fitted in closed form, without steps")
    if model.device.type != "meta":
        raise ValueError(f"expected a model on the meta device, got one on {model.device}")
    weights, buffers = list(model.parameters()), list(model.buffers())
    ledger = Ledger([*weights, *buffers])
    training = model.training
    model.train()
    with ExitStack() as stack:
        stack.enter_context(recomputed(model.stages, config.activation_checkpointing))
        stack.enter_context(_Kernels(weights, accelerator))
        stack.enter_context(ledger)
        activations = 0
        for _ in range(min(config.accumulate, 2)):  # the second meets the gradients of the first
            before = ledger.live
            loss = _loss(model, share, config.precision == "bfloat16")
            activations = max(activations, ledger.live - before)
            loss.backward()
            del loss
    optimizer = make_optimizer(model, config)
    optimizer.step()
    gradients = _bytes(p.grad for p in weights if p.grad is not None)
    memory = StepMemory(
        weights=_bytes(weights) + 2 * _bytes(buffers),
        gradients=gradients,
        optimizer=_bytes(tree_leaves(list(optimizer.state.values()))),
        average=_bytes(weights) if config.ema_decay else 0,
        buckets=gradients if devices > 1 else 0,
        activations=activations,
        working=max(ledger.peak, gradients),
    )
    model.zero_grad(set_to_none=True)
    model.train(training)
    return memory


def _loss(model: GenerativeModel, count: int, reduced: bool) -> Tensor:
    """Mean loss of images without contents, as the trainer takes it."""
    images = torch.zeros((count, *model.event_shape), dtype=torch.uint8, device="meta")
    label = torch.zeros(count, dtype=torch.int64, device="meta") if model.num_classes else None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=reduced):  # tells _Kernels
        return model.loss(images, label).mean()


def _bytes(values: Iterable[Any]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


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
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._addresses:
            return
        self._addresses.add(address)
        self._storages[address] = weakref.ref(storage, lambda _: self._forget(address, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, address: int, size: int) -> None:
        self._addresses.discard(address)
        self._storages.pop(address, None)
        self.live -= size


@final
class _Kernels(TorchFunctionMode):
    """On the meta device, what PyTorch does elsewhere: fused attention, autocast, fused dropout.

    Autocast is on where the CPU's is, since the meta device has none.

    Args:
        weights: their reduced copies are made once and shared, as autocast does.
        accelerator: whether elsewhere is an accelerator; else a CPU.
    """

    def __init__(self, weights: Iterable[Tensor], accelerator: bool) -> None:
        super().__init__()
        self._weights = {id(weight) for weight in weights}
        self._copies: dict[int, weakref.ref[Tensor]] = {}
        self._accelerator = accelerator

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
        """Tensors of float32 in bfloat16; the copies of weights are shared while they are used."""
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if id(value) not in self._weights:
            return value.to(torch.bfloat16)
        held = self._copies.get(id(value))
        copy = None if held is None else held()
        if copy is None:
            copy = value.to(torch.bfloat16)
            self._copies[id(value)] = weakref.ref(copy)
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
