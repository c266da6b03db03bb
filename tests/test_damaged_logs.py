"""A damaged log or state.json of a stopped run is reported or refused."""

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from exactflow.core.saved_run import LogState, finished, read_checkpoint
from exactflow.training.log import MetricsLog
from stopped_runs import STEP, go_on, stopped

DAMAGES: dict[str, tuple[Callable[[bytes], bytes | None], str]] = {
    "deleted": (lambda log: None, "it is gone, 3 of 3 lines are lost"),
    "empty": (lambda log: b"", "3 of 3 lines are lost"),
    "a digit": (lambda log: log.replace(b'"epoch": 0', b'"epoch": 1', 1), "values were changed"),
    "a line": (lambda log: log.split(b"\n", 1)[1], "1 of 3 lines are lost"),
    "a torn line": (lambda log: log[:40] + log[60:], "1 of 3 lines are lost"),
    "no mapping": (lambda log: b"[1]\n" + log.split(b"\n", 1)[1], "1 of 3 lines are lost"),
    "no step": (lambda log: log.replace(b'"step"', b'"stop"', 1), "1 of 3 lines are lost"),
    "nesting": (lambda log: b"[" * 10**6 + b"\n" + log.split(b"\n", 1)[1], "1 of 3 lines are lost"),
    "a type": (lambda log: log.replace(b'"loss": ', b'"loss": "', 1), "1 of 3 lines are lost"),
    "zeros": (lambda log: bytes(len(log)), "3 of 3 lines are lost"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after a checkpoint and before its line of the log."""
    return stopped(tmp_path_factory.mktemp("run")).parents[1]


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "run")


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_log_that_is_whole_is_gone_on_with_in_silence(run: Path) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    torn_later = before + b'{"step": 4, "lo'  # as a kill leaves it, after the checkpoint
    (run / "metrics.jsonl").write_bytes(torn_later)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go_on(run)
    assert (run / "metrics.jsonl").read_bytes().startswith(before)
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    assert not (run / "metrics.jsonl.damaged").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_log_is_told_and_kept(damage: str, run: Path) -> None:
    change, message = DAMAGES[damage]
    path = run / "metrics.jsonl"
    damaged = change(path.read_bytes())
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged)
    with pytest.warns(UserWarning, match=f"is not as the run left it at step {STEP}: .*{message}"):
        go_on(run)
    if damaged is not None:
        assert (run / "metrics.jsonl.damaged").read_bytes() == damaged
    assert steps(run)[-3:] == [4, 5, 6]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is told once
        go_on(run)


def test_any_changed_byte_of_the_log_is_told(run: Path) -> None:
    path, chosen = run / "metrics.jsonl", random.Random(0)
    log = path.read_bytes()
    known = read_checkpoint(finished(run / "checkpoints")[-1]).log
    for _ in range(50):
        damaged = bytearray(log)
        damaged[chosen.randrange(len(log))] ^= 1 << chosen.randrange(8)
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is not as the run left it"):
            MetricsLog(run, STEP, tensorboard=False, expected=known).close()


def test_a_second_damage_does_not_replace_what_was_kept(run: Path) -> None:
    path = run / "metrics.jsonl"
    log = path.read_bytes()
    known = LogState(3, "0" * 64)
    for damaged in (log, log[5:], log[:-30], log[5:]):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is not as the run left it"):
            MetricsLog(run, STEP, tensorboard=False, expected=known).close()
    kept = sorted(file.name for file in run.glob("*.damaged*"))
    assert kept == [f"metrics.jsonl.damaged{number}" for number in ("", "-2", "-3")]


def state_of(run: Path) -> Path:
    return run / "checkpoints" / f"step_{STEP:08d}" / "state.json"


@pytest.mark.parametrize(
    "field", ["step", "images", "seconds", "step_seconds", "logged_step", "loss_sum", "sha256"]
)
@pytest.mark.parametrize("version", [0, 1])
def test_state_without_a_field_is_damaged(field: str, version: int, run: Path) -> None:
    content = json.loads(state_of(run).read_text())
    (content if field in content else content["state"]).pop(field)
    if version == 0:  # as earlier versions wrote it
        for name in ("format_version", "checksum", "log"):
            del content[name]
    state_of(run).write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"is damaged .*: set aside"):
        done = go_on(run)
    assert done is not None
    assert done.step == 6
    assert state_of(run).parent.with_name(f"step_{STEP:08d}.damaged").is_dir()


@pytest.mark.parametrize(
    ("field", "value"),
    [("step", "4"), ("step", True), ("loss_sum", None), ("step", 3), ("images", [32])],
)
def test_state_with_another_value_is_damaged(field: str, value: object, run: Path) -> None:
    content = json.loads(state_of(run).read_text())
    content["state"][field] = value
    state_of(run).write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"is damaged .*: set aside"):
        go_on(run)


@pytest.mark.parametrize("text", ["[" * 10**5, "[]", '"x"', "{}", "NaN", '{"state": 3}', "\xff"])
def test_state_that_is_something_else_is_damaged(text: str, run: Path) -> None:
    state_of(run).write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match=r"is damaged .*: set aside"):
        go_on(run)


def test_checkpoints_of_earlier_versions_go_on(run: Path) -> None:
    for path in run.glob("checkpoints/*/state.json"):
        content = json.loads(path.read_text())
        for name in ("format_version", "checksum", "log"):
            del content[name]
        path.write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go_on(run)
    assert steps(run) == [1, 2, 3, 4, 5, 6]


def test_checkpoints_of_later_versions_are_refused_and_left_alone(run: Path) -> None:
    content = json.loads(state_of(run).read_text())
    state_of(run).write_text(json.dumps({**content, "format_version": 99, "more": 1}))
    with pytest.raises(ValueError, match="format version 99"):
        go_on(run)
    assert state_of(run).exists()
