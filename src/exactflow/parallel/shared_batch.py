"""A batch that several processes share, each of which has its own rows.

Inside `shared_by`, a model's loss sees the rows of one process; random numbers and statistics of
the whole batch come from here. Every process draws the random numbers of all rows and keeps its
own, and statistics are taken over all rows: the result does not depend on the number of processes.
Outside, the rows are the whole batch.

Dropout is the exception: every process draws the masks of its own rows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class _Share:
    rank: int
    count: int


# Shared by all threads: backward passes run in other threads, and recompute parts of the loss.
_share = _Share(0, 1)


@contextmanager
def shared_by(rank: int, count: int) -> Iterator[None]:
    """Batches inside are the rank-th of `count` equal runs of rows; all processes call this."""
    global _share
    before, _share = _share, _Share(rank, count)
    try:
        yield
    finally:
        _share = before


def is_shared() -> bool:
    """Whether other processes have rows of this batch."""
    return _share.count > 1


def rows(count: int) -> int:
    """Rows of the whole batch, of which this process has `count`."""
    return count * _share.count


def own_rows(draw: Callable[[int], Tensor], count: int) -> Tensor:
    """This process's `count` rows of what `draw(rows)` gives for all rows of the batch."""
    first = _share.rank * count
    drawn = draw(rows(count))
    return drawn[first : first + count] if is_shared() else drawn


def rand(
    shape: Sequence[int],
    *,
    generator: torch.Generator | None,
    dtype: torch.dtype | None = None,
    device: torch.device,
) -> Tensor:
    """This process's rows of `torch.rand` for the whole batch; `shape` is that of its rows."""
    options = {"generator": generator, "dtype": dtype, "device": device}
    return own_rows(lambda total: torch.rand(total, *shape[1:], **options), shape[0])


def randn(
    shape: Sequence[int],
    *,
    generator: torch.Generator | None,
    dtype: torch.dtype | None = None,
    device: torch.device,
) -> Tensor:
    """This process's rows of `torch.randn` for the whole batch, likewise."""
    options = {"generator": generator, "dtype": dtype, "device": device}
    return own_rows(lambda total: torch.randn(total, *shape[1:], **options), shape[0])


def all_rows(x: Tensor) -> Tensor:
    """The rows of all processes in the order of the batch, without gradient."""
    if not is_shared():
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(_share.count)]
    torch.distributed.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def mean(x: Tensor) -> Tensor:
    """The mean of equally shaped tensors of all processes, with gradient."""
    if not is_shared():
        return x
    averaged = _Mean.apply(x)
    assert isinstance(averaged, Tensor)
    return averaged


@final
class _Mean(torch.autograd.Function):
    """The mean over processes, whose gradient is the mean of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _mean(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _mean(grads[0])


def _mean(x: Tensor) -> Tensor:
    total = (x / _share.count).contiguous()
    torch.distributed.all_reduce(total)
    return total
