"""Copies of models without contents, on which the work and memory of a step are counted.

PyTorch's fake tensors have a shape, a dtype and a device, and take no memory. Autograd, autocast
and the choice of kernels are those of a CPU; the model's own code runs on them, whatever its size.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from exactflow.core.model import GenerativeModel


@contextmanager
def fake_copy(
    model: GenerativeModel, shards: int = 1
) -> Iterator[tuple[GenerativeModel, "Ledger"]]:
    """Yield a copy of `model` without contents, and a ledger of the bytes that its use takes.

    Args:
        model: on any device; it is not changed.
        shards: parameters of the copy are the first of so many parts, along the first dimension.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second to import

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        buffers = {id(tensor): torch.empty_like(tensor, device="cpu") for tensor in model.buffers()}
        parts = {id(tensor): part_of(tensor, shards) for tensor in model.parameters()}
    copy = deepcopy(model, memo={**buffers, **parts})
    with mode, Ledger([*buffers.values(), *parts.values()]) as ledger:
        yield copy, ledger


def part_of(weight: Tensor, shards: int) -> nn.Parameter:
    """The first of equal parts along the first dimension, the last of which may be smaller."""
    shape = weight.shape and (-(-weight.shape[0] // shards), *weight.shape[1:])
    return nn.Parameter(torch.empty(shape, dtype=weight.dtype), weight.requires_grad)


def loss_of_zeros(model: GenerativeModel, count: int) -> Tensor:
    """The loss of each of `count` images, of class 0 where there are classes."""
    images = torch.zeros((count, *model.event_shape), dtype=torch.uint8)
    label = torch.zeros(count, dtype=torch.int64) if model.num_classes else None
    return model.loss(images, label)


@final
class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside make, as long as each is in use.

    A number that code reads off a fake tensor is 1, or False.

    Args:
        known: tensors from before, which are not counted.

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
        if func is torch.ops.aten._local_scalar_dense.default and type(args[0]) is not Tensor:
            return False if args[0].dtype == torch.bool else 1
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
