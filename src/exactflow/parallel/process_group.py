"""The processes that work together on one model, as torchrun starts them.

Every process runs the same program. What writes files or speaks to people is for the main one;
functions that share work say so, and are called by all processes alike.
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

LAST_WORDS = 0.1  # seconds for what was sent last before a group is left
# Others wait so long for one that is silent. One that has died is noticed at once, by closed
# connections and by torchrun; one that works alone, as the main process does that reads data or
# writes files, tells the others every so many seconds that it lives.
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
    """The group of processes that this one belongs to; alone, where there is no group.

    All methods but the properties and `rows` are called by every process alike.

    Attributes:
        rank: number of this process, 0 .. count-1.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and speaks to people."""
        return self.rank == 0

    def rows(self, n: int) -> range:
        """This process's rows of n: runs in the order of ranks, equal but for one row."""
        return range(n * self.rank // self.count, n * (self.rank + 1) // self.count)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, which are pickled, in the order of ranks.

        Tensors come back on the CPU: others have other devices.
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
        """What `work` returns in the main process alone, or raises there, for all processes.

        The others wait as long as it takes.
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
        return self._outcome(told[0])

    def main_first(self, work: Callable[[], T]) -> T:
        """What `work` returns in each process: the others find what the main one has kept."""
        found: list[T] = []
        self.on_main(lambda: found.append(work()))
        return found[0] if found else work()

    def share(self, work: Callable[[], T]) -> list[T]:
        """What each process's `work` returns; the first error of any of them is raised by all.

        They wait for each other as long as it takes. Tensors come back on the CPU.
        """
        if self.count == 1:
            return [work()]
        with self._waited_for():
            mine = self._attempt(work)
        return [self._outcome(told) for told in self.gather(mine)]

    def spread(
        self,
        items: Sequence[A],
        work: Callable[[A], B],
        *,
        shown: Callable[[Sequence[A]], Iterable[A]] = iter,
    ) -> list[B]:
        """`work` of every item, in their order; each is done by one process and known to all.

        Args:
            items: the same in every process.
            work: of one item, by this process alone.
            shown: the main process takes its items from what this makes of them: a progress bar.
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
        """What is done inside may take each process as long as it likes; all go on together."""
        if _beats is None:  # the group is not ours, and keeps its own time
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
        """What `work` returns, or how it failed, as others can read it."""
        try:
            return pickled(work())
        except Exception as error:
            return SentError.of(error, f"process {self.rank} of {self.count}")

    def _outcome(self, told: bytes | SentError) -> Any:
        if isinstance(told, SentError):
            raise told.error()
        return unpickled(told)

    def _lost(self, error: RuntimeError) -> ProcessLostError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return ProcessLostError(
            f"process {self.rank} of {self.count} cannot reach another one, which has ended or "
            f"hangs; run the same command to go on from what is saved ({reason})"
        )


ALONE = Processes()
_separate = False
_beats: Any = None  # the group over which processes tell that they live; None if not ours


def _any_works(beats: Any, mine: bool) -> bool:
    """Whether any process still works, each of which says so of itself."""
    working = torch.tensor(int(mine))
    torch.distributed.all_reduce(working, group=beats)
    return bool(working)


def _beat(beats: Any, ended: threading.Event) -> None:
    with suppress(RuntimeError):  # who is lost will be missed at the end
        while not ended.wait(BEAT):
            _any_works(beats, True)


@contextmanager
def separately() -> Iterator[None]:
    """Inside, this process works alone: others are elsewhere and would not answer."""
    global _separate
    before, _separate = _separate, True
    try:
        yield
    finally:
        _separate = before


def current() -> Processes:
    """The group that this process has joined, and works with here."""
    if _separate or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return ALONE
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that torchrun describes in the environment, and leave them at the end.

    Where there are none, or they were joined before, there is nothing to do. A process that has
    GPUs takes the one of its LOCAL_RANK.

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
        # gloo's threads need the interpreter's lock to let go of what they sent last, and the
        # group's end waits for these threads with that lock in its hands.
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
    """Whether a backend raised it: gloo has no type of its own, but tells its source file first."""
    return isinstance(error, torch.distributed.DistError) or bool(_OF_GLOO.match(str(error)))
