"""How much memory a model would take, found out before any is taken."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

# The largest published model, of 14,274 tensors, takes seconds to make. One of 10^7 takes hours
# and fills memory with modules, before any weight is drawn.
MAX_TENSORS = 20_000

Model = TypeVar("Model", bound=nn.Module)


def built(make: Callable[[], Model], kind: str) -> Model:
    """The model that `make` returns, if this machine can hold it.

    It is made on the meta device first, which takes no memory, and counted there; under
    `torch.device("meta")` that is all.

    Raises:
        ValueError: its weights and buffers are too many, or too large for the machine's memory.
    """
    if torch.get_default_device().type == "meta":
        with _counted(kind):
            return make()
    with torch.random.fork_rng(devices=[]), torch.device("meta"), _counted(kind):
        counted = make()
    size = sum(tensor.nbytes for tensor in (*counted.parameters(), *counted.buffers()))
    room = machine_memory()
    if room is not None and size > room:
        raise ValueError(
            f"{kind}: expected a model that fits into this machine's {_gib(room)} of memory, got "
            f"one whose weights take {_gib(size)}"
        )
    return make()


def machine_memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


@contextmanager
def _counted(kind: str) -> Iterator[None]:
    """Stop, inside, at more than `MAX_TENSORS` tensors or at sizes that overflow."""
    found = 0

    def count(_module: nn.Module, _name: str, _tensor: Tensor | None) -> None:
        nonlocal found
        found += 1
        if found > MAX_TENSORS:
            raise ValueError(
                f"{kind}: expected a model of at most {MAX_TENSORS:,} tensors, got one of more: "
                "its blocks, layers or steps are too many"
            )

    handle = registration.register_module_parameter_registration_hook(count)
    try:
        yield
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        reason = str(error).lower()
        if isinstance(error, MemoryError) or any(w in reason for w in ("overflow", "memory")):
            raise ValueError(
                f"{kind}: expected a model whose sizes a machine can count, got widths or shapes "
                "that overflow"
            ) from error
        raise
    finally:
        handle.remove()


def _gib(size: int) -> str:
    return f"{size / 2**30:,.4g} GiB"
