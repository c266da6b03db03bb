"""Laws of messages between processes: errors keep their type, tensors arrive on the CPU."""

import os
import pickle
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ranks
from exactflow.core.model import NonFiniteError
from exactflow.data import DataError
from exactflow.parallel import process_group as processes
from exactflow.parallel.messages import SentError, pickled, unpickled
from exactflow.parallel.process_group import Processes, ProcessLostError, joined
from exactflow.training import Interrupted


class Stubborn(ValueError):
    """An exception whose constructor takes no message, as some packages have."""

    def __init__(self, number: int, name: str) -> None:
        super().__init__(f"{name} has {number}")


class Silent(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("no")


def failed(error: Exception) -> Exception:
    """The error that other processes raise for it."""
    try:
        raise error
    except type(error) as raised:
        return pickle.loads(pickle.dumps(SentError.of(raised, "process 1 of 2"))).error()


@pytest.mark.parametrize(
    "error",
    [
        DataError("x: expected a file"),
        NonFiniteError("image 3"),
        ProcessLostError("gone"),
        Interrupted(7, signal.SIGTERM),
        OSError(28, "No space left", "x"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        torch.OutOfMemoryError("out of memory"),
    ],
)
def test_errors_arrive_as_they_were(error: Exception) -> None:
    found = failed(error)
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert found.args == error.args
    (note,) = found.__notes__
    assert "In process 1 of 2:" in note
    assert "raise error" in note  # where it was raised
    if isinstance(error, Interrupted):
        assert isinstance(found, Interrupted)
        assert (found.step, found.exit_code) == (7, 143)


def test_others_arrive_as_the_nearest_built_in_one() -> None:
    found = failed(Stubborn(3, "x"))
    assert type(found) is ValueError
    assert str(found) == "Stubborn: x has 3"
    found = failed(Silent("why"))
    assert type(found) is Exception
    assert str(found) == "Silent: why"


def test_tensors_are_sent_from_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, asked = torch.Tensor.cpu, []

    def cpu(self: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(self.shape))
        return plain(self)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    value = {"a": torch.arange(3.0, requires_grad=True), "b": [torch.ones(2, 2)], "c": (1, "x")}
    found = unpickled(pickled(value))
    assert asked == [(3,), (2, 2)]
    assert torch.equal(found["a"], value["a"])
    assert torch.equal(found["b"][0], value["b"][0])
    assert (found["c"], found["a"].requires_grad) == ((1, "x"), False)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("Connection refused by the data base"), False),
        (RuntimeError("broken pipe in the model's nccl kernel"), False),
        (RuntimeError("shape '[2]' is invalid for input [gloo/x.cc:3]"), False),
        (RuntimeError("[/a/third_party/gloo/gloo/transport/tcp/pair.cc:5] Connection"), True),
        (torch.distributed.DistNetworkError("reset"), True),
        (torch.distributed.DistBackendError("NCCL"), True),
    ],
)
def test_communication_is_told_by_who_raised(error: RuntimeError, lost: bool) -> None:
    for group in (Processes(0, 2), Processes(0, 1)):
        kind = ProcessLostError if lost and group.count > 1 else type(error)
        with pytest.raises(RuntimeError) as found, group.explained_loss():
            raise error
        assert type(found.value) is kind


# Real processes, forked from this one


def carry_out(job: Callable[..., Any], count: int) -> list[dict[str, Any]]:
    ranks.JOBS["job"] = job
    try:
        return ranks.carry_out("job", count, {})
    finally:
        del ranks.JOBS["job"]


def fail_everywhere() -> list[str]:
    """The errors that this process gets when another one fails, in several ways."""
    told = []
    with joined() as group:

        def work() -> object:
            if group.rank == 1:
                raise Interrupted(5, signal.SIGINT)
            return group.rank

        def main_work() -> object:
            raise Stubborn(2, "main")

        def cannot_be_sent() -> object:
            return group.rank == 0 and (lambda: None)

        acts = (lambda: group.share(work), lambda: group.on_main(main_work))
        for act in (*acts, lambda: group.share(cannot_be_sent)):
            try:
                act()
            except Exception as error:
                told.append(f"{type(error).__name__}: {error}; {''.join(error.__notes__)}")
        told.append(str(group.gather(group.rank)))  # they still understand each other
    return told


def test_all_processes_raise_what_one_did() -> None:
    first, *others = carry_out(fail_everywhere, 3)
    assert "value" in first, first
    assert others == [first, first]
    stopped, main, unsent, gathered = first["value"]
    assert stopped.startswith("Interrupted: stopped by SIGINT after step 5;")
    assert "In process 1 of 3" in stopped
    assert "raise Interrupted(5, signal.SIGINT)" in stopped
    assert main.startswith("ValueError: Stubborn: main has 2; ")
    assert "raise Stubborn(2" in main
    assert "pickle" in unsent
    assert gathered == "[0, 1, 2]"


def wait_for_beats() -> int:
    """Work that ends only after several signs of life from all processes."""
    processes.BEAT, heard, enough = 0.01, [0], threading.Event()
    plain = processes._any_works

    def counted(beats: Any, mine: bool) -> bool:
        found = plain(beats, mine)
        heard[0] += found
        if heard[0] >= 5:
            enough.set()
        return found

    processes._any_works = counted
    with joined() as group:
        assert group.on_main(lambda: enough.wait(100)) is True
        assert heard[0] >= 5  # in each process: no single wait was longer than a beat
        enough.clear()
        heard[0] = 0
        assert group.share(lambda: group.rank == 1 or enough.wait(100)) == [True, True]
    return 1


def test_a_long_wait_is_many_short_ones() -> None:
    assert carry_out(wait_for_beats, 2) == [{"value": 1}, {"value": 1}]


def test_who_dies_while_others_wait_is_missed() -> None:
    found = carry_out(die_on_main, 2)
    assert found[0] == {"error": "SIGKILL"}
    assert found[1]["error"].startswith("ProcessLostError: process 1 of 2 cannot reach another one")


def die_on_main() -> None:
    with joined() as group:
        group.barrier()
        group.on_main(lambda: os.kill(os.getpid(), signal.SIGKILL))
