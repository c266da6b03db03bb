"""The processes that work together on one model, as torchrun starts them.

Every process runs the same program. Only the main process, of rank 0, writes files and prints.
Functions that share work between processes say so, and every process must call them.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, final

import torch
import torch.distributed
from torch import Tensor

from exactflow.parallel.messages import SentError, pickled, unpickled

LAST_WORDS = 0.1  # seconds in which the last messages are sent before a group is destroyed
# Timeout of a silent process. A dead one is noticed at once, by closed connections and by torchrun.
# A process that works alone, as the main one does to read data or write files, sends the others a
# sign of life every BEAT seconds.
PATIENCE = timedelta(hours=1)
BEAT = 60.0

_OF_GLOO = re.compile(r"\[[^\]\n]*\bgloo/[^\]\n]*:\d+\]")

A = TypeVar("A")
B = TypeVar("B")
T = TypeVar("T")


@final
class ProcessLostError(RuntimeError):
    """Another process ended or failed, so that this one cannot go on."""


@final
@dataclass(frozen=True)
class Processes:
    """The group of processes that this one belongs to; of one process if there is no other.

    Every process of the group must call each method other than the properties and `rows`.

    Attributes:
        rank: number of this process, 0 .. count-1.
        count: number of processes.

    Example:
        >>> Processes(rank=1, count=3).rows(7)
        range(2, 4)
    """

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def rows(self, n: int) -> range:
        """This process's run of n rows, in the order of ranks; lengths differ by at most 1."""
        return range(n * self.rank // self.count, n * (self.rank + 1) // self.count)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of ranks; they are pickled.

        Tensors come back on the CPU, since devices differ between processes.
        """
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with self.explained_loss():
            torch.distributed.all_gather_object(values, pickled(value))
        return [unpickled(each) for each in values]

    def gather_rows(self, row: Tensor) -> Tensor:
        """Equally shaped tensors on the CPU, one from each process, stacked."""
        if self.count == 1:
            return row[None]
        found = [torch.empty_like(row) for _ in range(self.count)]
        with self.explained_loss():
            torch.distributed.all_gather(found, row)
        return torch.stack(found)

    def on_main(self, work: Callable[[], T]) -> T:
        """Call `work` in the main process alone; all processes have its result or raise its error.

        The others wait without a timeout.
        """
        if self.count == 1:
            return work()
        told: list[Any] = [None]
        with self._waited_for():
            if self.is_main:
                with separately():
                    told = [self._attempt(work)]
        with self.explained_loss():
            torch.distributed.broadcast_object_list(told, src=0)
        return _outcome(told[0])

    def main_first(self, work: Callable[[], T]) -> T:
        """Call `work` in the main process, then in the others, which find its files in a cache."""
        found: list[T] = []
        self.on_main(lambda: found.append(work()))
        return found[0] if found else work()

    def share(self, work: Callable[[], T]) -> list[T]:
        """The results of `work` in each process; all processes raise the first error of any.

        They wait for each other without a timeout. Tensors come back on the CPU.
        """
        if self.count == 1:
            return [work()]
        with self._waited_for():
            mine = self._attempt(work)
        return [_outcome(told) for told in self.gather(mine)]

    def spread(
        self,
        items: Sequence[A],
        work: Callable[[A], B],
        *,
        shown: Callable[[Sequence[A]], Iterable[A]] = iter,
    ) -> list[B]:
        """`work` of every item, in their order; one process does each, and all get the results.

        Args:
            items: the same in every process.
            work: of one item, by this process alone.
            shown: wraps the items of the main process, to show progress.
        """

        def done() -> list[B]:
            mine = items[self.rank :: self.count]
            with separately():
                return [work(item) for item in (shown(mine) if self.is_main else mine)]

        shares = self.share(done)
        return [shares[i % self.count][i // self.count] for i in range(len(items))]

    def barrier(self) -> None:
        """Return once every process has called this."""
        self.gather(None)

    @contextmanager
    def explained_loss(self) -> Iterator[None]:
        """Turn errors of communication inside into `ProcessLostError`."""
        try:
            yield
        except ProcessLostError:
            raise
        except RuntimeError as error:
            if self.count > 1 and _is_of_communication(error):
                raise self._lost(error) from error
            raise

    @contextmanager
    def _waited_for(self) -> Iterator[None]:
        """Suspend the timeout inside; all processes leave this together."""
        if _beats is None:  # somebody else made the group, with timeouts of its own
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=_beat, args=(_beats, ended), daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            ended.set()
            raise
        with self.explained_loss():
            ended.set()
            thread.join()
            while _any_works(_beats, False):
                pass

    def _attempt(self, work: Callable[[], Any]) -> bytes | SentError:
        """The result of `work`, or its error, pickled for others."""
        try:
            return pickled(work())
        except Exception as error:
            return SentError.of(error, f"process {self.rank} of {self.count}")

    def _lost(self, error: RuntimeError) -> ProcessLostError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return ProcessLostError(
            f"process {self.rank} of {self.count} cannot reach another one, which has ended or "
            f"hangs; run the same command to go on from what is saved ({reason})"
        )


ALONE = Processes()
_separate = False
_beats: Any = None  # the group for signs of life; None if `joined` did not make the group


def _outcome(sent: bytes | SentError) -> Any:
    if isinstance(sent, SentError):
        raise sent.error()
    return unpickled(sent)


def _any_works(beats: Any, mine: bool) -> bool:
    """Whether any process still works; `mine` says whether this one does."""
    working = torch.tensor(int(mine))
    torch.distributed.all_reduce(working, group=beats)
    return bool(working)


def _beat(beats: Any, ended: threading.Event) -> None:
    with suppress(RuntimeError):  # `_waited_for` reports a lost process at its end
        while not ended.wait(BEAT):
            _any_works(beats, True)


@contextmanager
def separately() -> Iterator[None]:
    """Inside, this process works alone: `current` is a group of one."""
    global _separate
    before, _separate = _separate, True
    try:
        yield
    finally:
        _separate = before


def current() -> Processes:
    """The group that this process has joined; `ALONE` inside `separately`."""
    if _separate or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return ALONE
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that torchrun describes in the environment, and leave them at the end.

    Without such processes, or inside another `joined`, this does nothing. On a machine with GPUs a
    process uses the one of its LOCAL_RANK.

    Raises:
        ValueError: RANK and WORLD_SIZE are no rank and number of processes, or there are more
            processes than GPUs here.
    """
    named = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if not named["WORLD_SIZE"] or torch.distributed.is_initialized():
        yield current()
        return
    try:
        rank, count = (int(text) for text in named.values())
        possible = 0 <= rank < count
    except ValueError:
        rank, count, possible = 0, 0, False
    if not possible:
        raise ValueError(
            "expected RANK and WORLD_SIZE as torchrun sets them, a rank 0 .. WORLD_SIZE-1, got "
            + ", ".join(f"{name}={text!r}" for name, text in named.items())
        )
    if count == 1:
        yield ALONE
        return
    global _beats
    torch.distributed.init_process_group(_backend(), timeout=PATIENCE)
    _beats = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield current()
    finally:
        _beats = None
        # gloo's threads need the interpreter's lock to release their last messages, but
        # destroy_process_group holds that lock while it waits for them.
        time.sleep(LAST_WORDS)
        torch.distributed.destroy_process_group()


def _backend() -> str:
    if not torch.cuda.is_available():
        return "gloo"
    local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= found:
        raise ValueError(
            f"expected at most one process for each of {found} GPUs, got LOCAL_RANK={local}: "
            f"start torchrun with --nproc-per-node={found}"
        )
    torch.cuda.set_device(local)
    return "cpu:gloo,cuda:nccl"


def _is_of_communication(error: RuntimeError) -> bool:
    """Whether a backend raised it; gloo's errors have no type but begin with a source file."""
    return isinstance(error, torch.distributed.DistError) or bool(_OF_GLOO.match(str(error)))
