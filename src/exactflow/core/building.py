"""Models built on the meta device, where they take no memory: their size is checked first."""

import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar, final

import torch
from torch import nn
from torch.nn.modules import module as hooks

MOST_MODULES = 20_000  # twice those of the largest published model; seconds to build
ANY_NUMBER = 2**62  # of parameters: no limit, for a model that stays on the meta device

M = TypeVar("M", bound=nn.Module)


@final
class TooLargeError(ValueError):
    """A model with more modules than MOST_MODULES, or more parameters than there is room for."""


def on_meta(make: Callable[[], M], name: str, most: int | None = None) -> M:
    """The model with tensors on the meta device: shapes without values.

    Args:
        make: builds it.
        name: of the model in messages.
        most: parameters that it may have; None for as many as fit into this machine's memory.

    Raises:
        TooLargeError: it has more.
        ValueError: such a model cannot be built.
    """
    if most is None and (memory := machine_memory()) is not None:
        most = memory // 4
    try:
        with _SizeLimit(most, name), torch.random.fork_rng(devices=()), torch.device("meta"):
            return make()
    except (ArithmeticError, AssertionError, IndexError, MemoryError, RuntimeError, TypeError) as e:
        reason = (str(e).splitlines() or [""])[0]
        raise ValueError(
            f"{name} cannot be built: expected sizes that can be counted and fit together, got "
            f"{type(e).__name__}: {reason}"
        ) from e


def machine_memory() -> int | None:
    """Bytes of this machine's memory; None if the system does not report them."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return None


@final
class _SizeLimit:
    """Inside, this thread may build `limit` parameters (None: any number), MOST_MODULES modules."""

    def __init__(self, limit: int | None, name: str) -> None:
        self._limit, self._name, self._thread = limit, name, threading.get_ident()
        self._modules = self._numbers = 0

    def __enter__(self) -> None:
        self._hooks = (
            hooks.register_module_module_registration_hook(self._count_module),
            hooks.register_module_parameter_registration_hook(self._count_parameter),
        )

    def __exit__(self, *raised: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count_module(self, owner: nn.Module, part: str, module: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        self._modules += 1
        if self._modules > MOST_MODULES:
            raise TooLargeError(f"{self._name}: expected at most {MOST_MODULES:,} layers, got more")

    def _count_parameter(self, owner: nn.Module, part: str, parameter: Any) -> None:
        if threading.get_ident() != self._thread or parameter is None:
            return
        self._numbers += parameter.numel()
        if self._limit is not None and self._numbers > self._limit:
            raise TooLargeError(
                f"{self._name}: expected at most {self._limit:,} parameters, for which there is "
                f"room, got {self._numbers:,} or more"
            )
