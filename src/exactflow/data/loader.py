"""Batches as pure functions of (seed, step): resume is one integer, the hardware changes nothing.

Batch j is a slice of a permutation that is a function of (seed, epoch), see `order.epoch_order`.
Every rank computes the same permutation and takes its part of each batch, so the images of step j
are the same for 1 x 8 and 2 x 4, for any number of workers, and after any resume.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from multiprocessing import active_children
from multiprocessing.connection import wait
from threading import Thread, current_thread, main_thread
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from exactflow.core.main_guard import require_main_guard
from exactflow.data.augmentation import NO_AUGMENTATION, Augmentation, AugmentedEpoch
from exactflow.data.datasets import ImageDataset
from exactflow.data.streaming.streamed import StreamedImages
from exactflow.parallel.process_group import ProcessLostError

_HAS_SIGCHLD = sys.platform != "win32"


@final
@dataclass(frozen=True, eq=False)
class Batch:
    """Some images of a data set.

    Attributes:
        images: uint8 (B, C, H, W), in 0 .. levels-1.
        labels: int64 (B,), in 0 .. num_classes-1; None if the set is unlabelled.
        indices: int64 (B,), positions in the data set.
    """

    images: Tensor
    labels: Tensor | None
    indices: Tensor


@final
@dataclass(frozen=True)
class Share:
    """The rows of a batch that one of several processes gets.

    A batch is divided into `parts` micro-batches of consecutive rows, and each of these into
    `world_size` equal shares, of which rank r gets the r-th.

    >>> Share(rank=1, world_size=2, parts=2).rows(8).tolist()
    [2, 3, 6, 7]
    """

    rank: int = 0
    world_size: int = 1
    parts: int = 1

    def rows(self, batch_size: int) -> np.ndarray:
        """Row numbers, int64 (batch_size // world_size,).

        Raises:
            ValueError: `parts * world_size` does not divide `batch_size`, or there is no such rank.
        """
        if self.world_size < 1 or self.parts < 1 or batch_size % (self.world_size * self.parts):
            raise ValueError(
                f"world_size times parts: expected a divisor of {batch_size}, "
                f"found {self.world_size} times {self.parts}"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank: expected 0 .. {self.world_size - 1}, found {self.rank}")
        shares = np.arange(batch_size).reshape(self.parts, self.world_size, -1)
        return shares[:, self.rank].ravel()


WHOLE = Share()


def training_batches(
    dataset: ImageDataset,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    augmentation: Augmentation = NO_AUGMENTATION,
    num_workers: int = 0,
    share: Share = WHOLE,
) -> Iterator[Batch]:
    """Shuffled batches without end.

    An epoch is `len(dataset) // batch_size` batches; the rest of its permutation, different images
    in every epoch, is dropped.

    Args:
        dataset: the images.
        batch_size: images per step, over all ranks.
        seed: of the order and the augmentation, >= 0.
        start: global index of the first batch, >= 0: the number of steps taken so far.
        augmentation: random changes, a function of (seed, epoch, index).
        num_workers: processes that gather batches ahead; 0 gathers in this one.
        share: the rows that this process gets of every batch.

    Returns:
        An endless iterator over batches of `batch_size // share.world_size` images.

    Raises:
        ValueError: at once, if an argument is out of its range.
        RuntimeError: at once, in a worker process that is still importing the script of its parent.
        ProcessLostError: while batches are read, if a worker process ended.
    """
    if not 1 <= batch_size <= len(dataset):
        raise ValueError(
            f"batch_size: expected 1 .. {len(dataset)}, the number of training images, "
            f"found {batch_size}"
        )
    rows = share.rows(batch_size)
    if seed < 0 or start < 0:
        raise ValueError(f"seed and start: expected >= 0, found {seed} and {start}")
    reach, side = augmentation.translate, min(dataset.event_shape[1:])
    if reach >= side - 0.5:
        raise ValueError(f"translate: expected less than the image's {side} pixels, found {reach}")
    requests = _training_requests(dataset, batch_size, seed, start, augmentation, rows)
    return _gather_all(dataset, requests, num_workers)


def evaluation_batches(
    dataset: ImageDataset, batch_size: int, *, num_workers: int = 0
) -> Iterator[Batch]:
    """Every image once, in order and unchanged; the last batch may be smaller.

    Raises:
        ValueError: at once, if `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected >= 1, found {batch_size}")
    starts = range(0, len(dataset), batch_size)
    requests = (
        _Request(np.arange(begin, min(begin + batch_size, len(dataset))), None) for begin in starts
    )
    return _gather_all(dataset, requests, num_workers)


@final
@dataclass(frozen=True, eq=False)
class _Request:
    """Indices of one batch, int64 (B,), and changes of its images."""

    indices: np.ndarray
    augmentation: AugmentedEpoch | None


def _training_requests(
    dataset: ImageDataset,
    batch_size: int,
    seed: int,
    start: int,
    augmentation: Augmentation,
    rows: np.ndarray,
) -> Iterator[_Request]:
    steps_per_epoch = len(dataset) // batch_size
    first_epoch, first_step = divmod(start, steps_per_epoch)
    for epoch in count(first_epoch):
        order = dataset.epoch_order(seed, epoch)
        changes = augmentation.of_epoch(len(dataset), seed, epoch)
        for step in range(first_step, steps_per_epoch):
            indices = order[step * batch_size : (step + 1) * batch_size][rows]
            yield _Request(indices, changes.at(indices))
        first_step = 0


def _gather(dataset: ImageDataset, request: _Request) -> Batch:
    images = np.asarray(dataset.images[request.indices])  # a copy, since the index is an array
    if request.augmentation is not None:
        images = request.augmentation.apply(images)
    labels = None if dataset.labels is None else torch.from_numpy(dataset.labels[request.indices])
    return Batch(torch.from_numpy(images), labels, torch.from_numpy(request.indices.copy()))


def _gather_all(
    dataset: ImageDataset, requests: Iterator[_Request], num_workers: int
) -> Iterator[Batch]:
    if isinstance(dataset.images, StreamedImages):
        requests = dataset.images.read_ahead(requests, lambda request: request.indices)
    if num_workers == 0:
        return (_gather(dataset, request) for request in requests)
    require_main_guard()
    loader = DataLoader(
        _RequestedBatches(dataset),
        sampler=requests,
        batch_size=None,  # a request is a whole batch
        num_workers=num_workers,
        worker_init_fn=_exit_with_parent,
        # The loader draws a seed for its workers; from the global generator it would make the
        # noise of training depend on num_workers.
        generator=torch.Generator(),
    )
    return _from_workers(loader)


def _from_workers(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """The batches of worker processes; raises ProcessLostError when one of these has ended."""
    others, in_main_thread = active_children(), current_thread() is main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if in_main_thread and _HAS_SIGCHLD else None
    batches = iter(loader)
    if handler is not None:
        # PyTorch's own handler raises at any point of the program when a worker ends; PyTorch also
        # notices the end while it waits for a batch.
        signal.signal(signal.SIGCHLD, handler)
    workers = {p.sentinel: p for p in active_children() if p not in others}
    try:
        yield from batches
    except Exception as error:
        ended = [workers[s] for s in wait(list(workers), timeout=1.0) if isinstance(s, int)]
        for process in ended:
            process.join(1.0)  # its files close shortly before its exit code is known
        lost = next((process for process in ended if process.exitcode), None)
        if lost is None:  # a worker that finished its work is not the cause
            raise
        code = lost.exitcode or 0
        if code < 0:
            how = f"was ended by {signal.Signals(-code).name}, as when memory runs out"
        else:
            how = f"ended with exit code {code}, and has said why"
        raise ProcessLostError(
            f"process {lost.pid}, which loads images, {how}; run the same command to go on "
            "from what is saved, with fewer num_workers if need be"
        ) from error


def _exit_with_parent(worker: int) -> None:
    """Ignore stop signals that a whole job gets; end this process when its parent asks for it.

    The parent finishes and saves its step first, and needs batches for that.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # where the sender of a signal is known
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)


@final
class _RequestedBatches(Dataset[Batch]):
    """Adapts `_gather` to the workers of a torch DataLoader."""

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, request: _Request) -> Batch:
        return _gather(self._dataset, request)
