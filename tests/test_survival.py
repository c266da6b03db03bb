"""Faults of a run on a cluster: each is real, ends in one message, and the run can be resumed.

The toy is trained by the processes of tests/ranks.py, with the faults of tests/faults.py; the other
tests run `exactflow train` itself, alone and under torchrun.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import processes
from exactflow.cli.settings import resolve
from exactflow.data import DataConfig, load
from exactflow.training import Callback, Interrupted, Progress, fit
from exactflow.training.log import LOG_FILE
from processes import Command, Said, carry_out
from test_distributed import ALONE, WAYS, round_of, values
from test_training import assert_same_bits, final_state, names, read_log
from training_worker import PLAIN, make_data, make_toy

FILE_BYTES = 1500  # more than the toy's log, less than its weights
SAFE = r"; the previous checkpoint .*step_{} is intact, the same command goes on"
GO_ON = "run the same command to go on from what is saved"


def mounted(folder: Path, options: str) -> bool:
    """Whether a file system in memory could be mounted there."""
    folder.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def error_of(found: list[dict[str, Any]]) -> str:
    """The error of a round, which must be the same in all its processes."""
    assert all(each == found[0] for each in found), found
    return found[0]["error"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


EACH_STEP = {"checkpoint_every": 1, "keep_checkpoints": 9, "log_every": 1}


def train_plain(folder: Path, every: Mapping[int, Callback] | None = None, **changes: Any) -> Path:
    """Train the toy for six steps in this process; its last checkpoint."""
    config = replace(PLAIN, **changes)
    return fit(make_toy(), make_data(), config, folder, every=every, progress=False).checkpoint


def stop_at(step: int, folder: Path, **changes: Any) -> None:
    """The same, with SIGTERM after a step."""

    def order(told: Progress) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(Interrupted):
        train_plain(folder, {step: order}, **changes)


# --- file systems -------------------------------------------------------------------------------


@pytest.fixture(params=["file system", "limit"])
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str, Any, Any]]:
    """A folder, and a fault that leaves no room in it for weights, or for anything."""
    folder = tmp_path / "disk"
    if request.param == "limit":
        yield folder, "limit", FILE_BYTES, 0
        return
    if not mounted(folder, "size=2m"):
        pytest.skip("no right to mount; a limit of file sizes stands in for it")
    yield folder, "fill", str(folder), str(folder)
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, full: tuple[Path, str, Any, Any]
) -> None:
    disk, fault, for_weights, for_anything = full
    split, late = WAYS["fsdp"], {"log_every": 5}
    alone, alone_late, parts, stopped, last, *others = carry_out(
        round_of(ALONE, tmp_path / "alone"),
        round_of(ALONE, tmp_path / "late", config=late),
        round_of(split, tmp_path / "split"),
        round_of(ALONE, disk / "alone", strike=[0, 11, fault, for_weights]),  # in step 6
        round_of(ALONE, disk / "alone"),
        round_of(split, disk / "split", strike=[1, 17, fault, for_weights]),  # in step 9
        round_of(split, disk / "split"),
        round_of(ALONE, disk / "late", config=late, strike=[0, 9, fault, for_anything]),  # step 5
        round_of(ALONE, disk / "late", config=late),
        round_of(ALONE, disk / "nan", poison=[0, 9], strike=[0, 9, fault, for_anything]),
    )
    full_disk = "(No space left on device|File too large)"
    where = r"could not write .*step_00000008.partial/model.safetensors: "
    assert re.search(where + full_disk + SAFE.format("00000004"), error_of(stopped))
    assert values(last) == values(alone)
    assert_same_bits(final_state(disk / "alone"), final_state(tmp_path / "alone"))
    stopped, last, stopped_late, last_late, broken = others
    where = r"could not write .*/disk/split/checkpoints/.step_000000\d\d.partial/.*: "
    assert re.search(where + full_disk + SAFE.format(r"000000\d\d"), error_of(stopped))
    assert values(last) == values(parts)
    where = "could not write .*/disk/late/metrics.jsonl: "
    assert re.search(where + full_disk + SAFE.format("00000004"), error_of(stopped_late))
    assert values(last_late) == values(alone_late)
    told = error_of(broken)
    assert "NonFiniteError: step 5 is not finite" in told
    assert re.search(
        f"The batch is not kept: .*could not write .*step_000005.pt: {full_disk}", told
    )
    for name in ("alone", "split", "late"):
        assert read_log(disk / name) == read_log(tmp_path / name)


def test_a_read_only_file_system_is_told_before_any_step(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    if not mounted(folder, "size=2m"):
        pytest.skip("no right to mount; rights that are taken away stand in for it")
    try:
        stop_at(4, folder / "run", **EACH_STEP)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        before = contents(folder)
        for name in ("run", "new"):
            message = f"could not write {folder / name}: Read-only file system"
            with pytest.raises(OSError, match=re.escape(message)):
                train_plain(folder / name, **EACH_STEP)
        assert contents(folder) == before
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        train_plain(folder / "run", **EACH_STEP)
        train_plain(tmp_path / "alone", **EACH_STEP)
        assert_same_bits(final_state(folder / "run"), final_state(tmp_path / "alone"))
        assert read_log(folder / "run") == read_log(tmp_path / "alone")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_rights_that_are_taken_away_are_told(tmp_path: Path) -> None:
    under = []
    if os.geteuid() == 0:  # root may write everywhere
        if shutil.which("setpriv") is None:
            pytest.skip("no setpriv to give root's power over rights away")
        under = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    folder, closed, secret = tmp_path / "run", tmp_path / "closed", tmp_path / "secret"
    closed.mkdir(mode=0o555)
    stop_at(4, secret, **EACH_STEP)
    unreadable = secret / "checkpoints" / names(secret)[-1] / "model.safetensors"
    unreadable.chmod(0)
    alone, refused, unread, *stopped, last = carry_out(
        round_of(ALONE, tmp_path / "alone"),
        round_of(ALONE, closed / "run"),
        round_of(ALONE, secret),
        round_of(ALONE, folder, strike=[0, 11, "protect", str(folder)]),
        round_of(WAYS["ddp"], folder, strike=[1, 5, "protect", str(folder)]),
        round_of(ALONE, folder),
        under=under,
    )
    denied = f"PermissionError: [Errno 13] could not write {closed / 'run'}: Permission denied"
    assert error_of(refused) == denied
    assert error_of(unread) == f"PermissionError: [Errno 13] Permission denied: '{unreadable}'"
    assert unreadable.exists(), "it was taken for damaged"
    for found in stopped:
        where = "could not write .*step_00000008.partial: Permission denied"
        assert re.search(where + SAFE.format("00000004"), error_of(found))
    assert values(last)["sums"] == pytest.approx(values(alone)["sums"], abs=1e-10)


# --- processes ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_loader_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    loaders = {"num_workers": 2}
    strike = [0, 11, "kill loader", signal.SIGKILL]
    alone, both, stopped, last, stopped_both, last_both = carry_out(
        round_of(ALONE, tmp_path / "alone"),
        round_of(WAYS["ddp"], tmp_path / "both"),
        round_of(ALONE, tmp_path / "one", config=loaders, strike=strike),
        round_of(ALONE, tmp_path / "one", config=loaders),
        round_of(WAYS["ddp"], tmp_path / "two", config=loaders, strike=strike),
        round_of(WAYS["ddp"], tmp_path / "two", config=loaders),
    )
    killed = (
        r"ProcessLostError: process \d+, which loads images, was ended by SIGKILL, as when memory "
        f"runs out; {GO_ON}"
    )
    assert re.match(killed, error_of(stopped))
    assert re.match(killed, stopped_both[0]["error"])
    assert re.search(f"process 1 of 2 cannot reach another one.*{GO_ON}", stopped_both[1]["error"])
    assert values(last) == values(alone)
    assert values(last_both) == values(both)
    assert read_log(tmp_path / "one") == read_log(tmp_path / "alone")
    assert read_log(tmp_path / "two") == read_log(tmp_path / "both")


def test_an_order_that_all_processes_get_saves_the_step(tmp_path: Path) -> None:
    """Loaders get the signal too, perhaps first, with more steps left than they have read."""
    run, loaders = tmp_path / "run", {"num_workers": 2}
    alone, killed, *stopped, last = carry_out(
        round_of(ALONE, tmp_path / "alone"),
        round_of(ALONE, run, config=loaders, kill=[0, 9]),  # its loaders outlive it for a while
        *(
            round_of(
                ALONE,
                run,
                config=loaders,
                strike=[0, 1, "order loaders", signum],
                order=[0, 14],
            )
            for signum in (signal.SIGTERM, signal.SIGINT)
        ),
        round_of(ALONE, run, config=loaders),
    )
    assert error_of(killed) == "SIGKILL"
    for found, step in zip(stopped, (11, 18), strict=True):
        message = f"stopped by SIGTERM after step {step}; run the same command to resume"
        assert error_of(found) == f"Interrupted: {message}"
    assert values(last) == values(alone)
    assert read_log(run) == read_log(tmp_path / "alone")


def test_two_runs_in_one_folder_are_one_too_many(tmp_path: Path) -> None:
    rounds = [
        {"job": "beset", "count": 1, "options": {"folder": str(tmp_path), "config": {}}},
        round_of(ALONE, tmp_path, config={"precision": "bfloat16"}),
    ]
    beset, after = carry_out(*rounds)
    said = values(beset)
    assert len(said) == 2
    for (other,) in said:
        assert re.fullmatch(
            rf"ValueError: {tmp_path}: expected a folder in which nobody trains, found one in "
            r"which process \d+ on .+ does; wait for its end, or choose another",
            other["error"],
        )
    assert values(after)["step"] == 20
    assert [line["step"] for line in read_log(tmp_path)] == [3, 6, 9, 12, 15, 18, 20]


# --- clocks -------------------------------------------------------------------------------------

CLOCK = r"""
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* A day on, a day back, with every look at it; what is monotonic stays so. */
static long jump(void) {
    static int looks;
    return looks++ % 2 ? 86400 : -86400;
}
int clock_gettime(clockid_t id, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, id, now);
    if (id == CLOCK_REALTIME) now->tv_sec += jump();
    return failed;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    int failed = clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return failed;
}
time_t time(time_t *told) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (told) *told = exact.tv_sec;
    return exact.tv_sec;
}
"""


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path) -> None:
    """Not the system's clock but the C library's is moved, for Python and PyTorch alike."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler, or no such C library")
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(CLOCK)
    words = [compiler, "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run(words, check=True, capture_output=True)
    under = ["env", f"LD_PRELOAD={library}"]
    look = [sys.executable, "-c", "import time; print(time.time() - time.time())"]
    seen = subprocess.run([*under, *look], capture_output=True, text=True, check=True).stdout
    assert abs(float(seen)) > 86400
    began = time.monotonic()
    told = carry_out(
        *(round_of(ALONE, tmp_path / "one", order=order) for order in ([0, 13], [0, 15], None)),
        *(round_of(WAYS["fsdp"], tmp_path / "two", order=order) for order in ([1, 13], None)),
        under=under,
    )
    took = time.monotonic() - began
    assert values(told[2])["sums"] == pytest.approx(values(told[4])["sums"], rel=0.2)
    for name in ("one", "two"):
        lines = [json.loads(x) for x in (tmp_path / name / LOG_FILE).read_text().splitlines()]
        assert [line["step"] for line in lines] == [3, 5, 6, 9, 10, 12, 15, 18, 20]
        for key in ("seconds", "step_seconds"):
            seconds = [0.0, *(line[key] for line in lines), took]
            assert all(before < after for before, after in pairwise(seconds))
        speeds = [line["images_per_second"] for line in lines]
        assert all(speed == "nan" or speed > 0 for speed in speeds)  # nan: no step since it began


def test_times_of_files_decide_nothing(tmp_path: Path) -> None:
    stop_at(4, tmp_path, **EACH_STEP)
    for age, folder in enumerate(sorted((tmp_path / "checkpoints").iterdir())):
        for path in [*folder.iterdir(), folder]:
            os.utime(path, (4e9 - age * 1e6,) * 2)  # the older, the later, and all to come
    assert train_plain(tmp_path, **EACH_STEP).name == "step_00000006"
    train_plain(tmp_path / "whole", **EACH_STEP)
    assert_same_bits(final_state(tmp_path), final_state(tmp_path / "whole"))
    assert read_log(tmp_path) == read_log(tmp_path / "whole")


def test_seconds_of_the_log_never_go_back(tmp_path: Path) -> None:
    """A checkpoint has the time of its start; the line of its step may be later."""
    stop_at(4, tmp_path, **EACH_STEP)
    lines = (tmp_path / LOG_FILE).read_text().splitlines()
    slow = {**json.loads(lines[-1]), "seconds": 3600.0}
    (tmp_path / LOG_FILE).write_text("\n".join([*lines[:-1], json.dumps(slow)]) + "\n")
    train_plain(tmp_path, **EACH_STEP)
    seconds = [json.loads(x)["seconds"] for x in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert seconds[3] == 3600
    assert all(before < after for before, after in pairwise(seconds))


def test_decoded_images_are_told_from_changed_files_by_any_other_time(tmp_path: Path) -> None:
    """By any other time, not only a later one: clocks are set back, older files restored."""
    config = DataConfig(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    file = tmp_path / "set" / "train-0.bmp"
    file.parent.mkdir()
    found = []
    for level, when in ((3, 1e9), (5, 5e8), (7, 2e9)):
        Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(file)
        os.utime(file, (when, when))
        found.append(int(load(config, "train").images[:].max()))
    assert found == [3, 5, 7]


# --- the command line ---------------------------------------------------------------------------

TRAIN = [
    *("train", "tarflow-digits", "model.width=32", "model.blocks=2", "model.layers_per_block=1"),
    *("model.head_dim=16", "data.limit=64", "training.batch_size=8", "training.steps=4000"),
    *("training.log_every=1", "training.checkpoint_every=5", "run.samples=1"),
    "model.num_classes=0",  # given, so nothing is said of the classes of digits
]


def steps_of(run: Path) -> list[int]:
    log = run / LOG_FILE
    whole = log.read_text().rpartition("\n")[0] if log.exists() else ""
    return [json.loads(line)["step"] for line in whole.splitlines()]


def reaches(run: Path, step: int) -> Callable[[], bool]:
    """Whether the log of a run has reached a step."""
    return lambda: any(found >= step for found in steps_of(run))


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def descendants(pid: int) -> list[int]:
    found = children(pid)
    return [*found, *(below for child in found for below in descendants(child))]


def error_in(said: Said) -> str:
    """The one line that is an error; progress lines may come before it on slow machines."""
    assert "Traceback" not in said.stderr, said.stderr
    (line,) = (line for line in said.stderr.splitlines() if line.startswith("error: "))
    return line


def saved_step(run: Path) -> int:
    return int(names(run)[-1].removeprefix("step_"))


@pytest.mark.slow
def test_a_run_from_the_command_line(tmp_path: Path) -> None:
    """A second run in its folder, a killed loader, and SIGTERM to the whole job."""
    run, words = tmp_path / "run", ["-m", "exactflow", *TRAIN, "--out", "run"]
    words += ["training.num_workers=2"]
    first = Command(*words, cwd=tmp_path)
    first.wait_until(reaches(run, 1))
    config = (run / "config.yaml").read_text()
    said = processes.run(*words, "training.learning_rate=1", cwd=tmp_path)
    assert said.returncode == 1, said
    assert error_in(said).startswith("error: run: expected a folder in which nobody trains")
    assert (run / "config.yaml").read_text() == config
    os.kill(children(first.pid)[-1], signal.SIGKILL)
    said = first.end()
    assert said.returncode == 1, said
    assert re.match(rf"error: process \d+, which loads images, was .*; {GO_ON}", error_in(said))
    reached = saved_step(run)
    again = Command(*words, cwd=tmp_path)
    again.wait_until(reaches(run, reached + 6))
    os.killpg(again.pid, signal.SIGTERM)
    said = again.end()
    assert said.returncode == 128 + signal.SIGTERM, said
    assert f"stopped by SIGTERM after step {saved_step(run)}; run the same command" in said.stderr
    assert "Traceback" not in said.stderr
    steps = steps_of(run)
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_torchrun_is_killed_in_part_and_stopped_in_whole(tmp_path: Path) -> None:
    """kill -9 of a rank, SIGTERM to the agent, SIGTERM to all: each time the run is resumed."""
    run = tmp_path / "run"
    words = ["-m", "exactflow", *TRAIN, "training.num_workers=1", "--out", "run"]

    def session(strike: Callable[[int], None]) -> str:
        before = saved_step(run) if run.exists() else 0
        agent = Command(*words, cwd=tmp_path, torchrun=2)
        agent.wait_until(reaches(run, before + 7))
        strike(agent.pid)
        said = agent.end()
        assert said.returncode != 0
        return said.stderr

    def kill_a_rank(agent: int) -> None:
        os.kill(children(agent)[1], signal.SIGKILL)

    def order(pids: Sequence[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGTERM)

    session(kill_a_rank)  # the agent may end the other one before that tells of the loss
    for strike in (lambda pid: order([pid]), lambda pid: order([pid, *descendants(pid)])):
        said = session(strike)
        assert f"stopped by SIGTERM after step {saved_step(run)}; run the same command" in said
    steps = steps_of(run)
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 20
    losses = losses_of_an_uninterrupted_run(tmp_path / "alone", len(steps))
    assert [line["loss"] for line in read_log(run)] == pytest.approx(losses, rel=1e-5)


def losses_of_an_uninterrupted_run(folder: Path, steps: int) -> list[float]:
    """The first losses of the training TRAIN, run in this process."""
    settings = resolve(TRAIN[1], TRAIN[2:], None)
    data = load(settings.data, "train")

    def stop(told: Progress) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    options = {"augmentation": settings.data.augmentation, "progress": False}
    model = settings.fitted(data).build()
    with pytest.raises(Interrupted):
        fit(model, data, settings.training, folder, every={steps: stop}, **options)
    return [line["loss"] for line in read_log(folder)]
