"""Laws of training: which steps are applied, and that a kill changes nothing."""

import json
import math
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import processes
import training_worker
from exactflow.core.model import NonFiniteError
from exactflow.data.augmentation import Augmentation
from exactflow.training import Interrupted, Progress, TrainConfig, fit, trainer
from exactflow.training.optim import MovingAverage, Schedule
from processes import Said
from training_worker import EVERYTHING, PLAIN, Toy, ToyConfig, make_data, make_toy, train

TIMINGS = {"seconds", "step_seconds", "images_per_second"}


def run(folder: Path, config: TrainConfig = PLAIN, model: Toy | None = None, **options: Any) -> Toy:
    model = model or make_toy()
    fit(model, make_data(), config, folder, progress=False, **options)
    return model


def read_log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Tensors and numbers of a nested state, by path."""
    items = enumerate(value) if isinstance(value, list | tuple) else None
    items = value.items() if isinstance(value, dict) else items
    if items is None:
        return {path: value}
    return {name: leaf for key, part in items for name, leaf in flat(part, f"{path}/{key}").items()}


def final_state(folder: Path) -> dict[str, Any]:
    """All that the newest checkpoint holds."""
    newest = max((folder / "checkpoints").glob("step_????????"))
    state: dict[str, Any] = {f.name: load_file(f) for f in newest.glob("*.safetensors")}
    state["optimizer"] = torch.load(newest / "optimizer.pt", weights_only=True)
    described = json.loads((newest / "state.json").read_text())
    state["state"] = {k: v for k, v in described["state"].items() if k not in TIMINGS}
    return flat(state)


def assert_same_bits(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        same = (
            torch.equal(value, theirs[name])
            if isinstance(value, Tensor)
            else (value == theirs[name])
        )
        assert same, name


def work(folder: Path, what: str, step: int) -> Said:
    """Run tests/training_worker.py."""
    return processes.run(training_worker.__file__, folder, what, step, cwd=folder.parent)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# --- configuration and schedule -----------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [
        {"batch_size": 0},
        {"accumulate": 3},
        {"accumulate": 0},
        {"epochs": 0.0},
        {"epochs": math.nan},
        {"steps": 0},
        {"learning_rate": 0.0},
        {"min_learning_rate": 1.0},
        {"warmup_epochs": -1.0},
        {"warmup_steps": -1},
        {"betas": (0.9, 1.0)},
        {"weight_decay": -1.0},
        {"clip_norm": 0.0},
        {"ema_decay": 1.0},
        {"seed": -1},
        {"decay_factor": 1.5},
        {"fine_tuning_epochs": -1.0},
        {"num_workers": -1},
        {"log_every": 0},
        {"checkpoint_every": 0},
        {"keep_checkpoints": 0},
    ],
    ids=str,
)
def test_a_field_out_of_range_is_named(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"TrainConfig\.{next(iter(field))}: expected .*, got "):
        TrainConfig(**field)


@given(total=st.integers(3, 300), fraction=st.floats(0, 0.5), low=st.floats(0, 1e-3))
def test_learning_rate_rises_to_the_peak_and_falls_to_the_end(
    total: int, fraction: float, low: float
) -> None:
    warmup = int(fraction * total)
    schedule = Schedule(total, warmup, peak=1e-2, low=low)
    rates = [schedule.learning_rate(step) for step in range(1, total + 1)]
    assert rates[warmup] == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(low, abs=1e-15)
    assert warmup == 0 or rates[0] == low
    assert all(a < b for a, b in pairwise(rates[: warmup + 1]))
    assert all(a > b for a, b in pairwise(rates[warmup:]))


def test_exponential_decay_rises_from_zero_and_stops_falling_at_the_smallest_rate() -> None:
    config = TrainConfig(
        batch_size=10,
        steps=400,
        warmup_steps=4,
        learning_rate=1e-2,
        min_learning_rate=1e-3,
        decay="exponential",
        decay_factor=0.99,
    )
    schedule = config.schedule(100)
    rates = [schedule.learning_rate(step) for step in range(1, 401)]
    assert rates[:5] == pytest.approx([0, 0.25e-2, 0.5e-2, 0.75e-2, 1e-2])
    assert rates[104] == pytest.approx(1e-2 * 0.99**100)
    assert rates[-1] == 1e-3
    constant = replace(config, decay_factor=1.0).schedule(100)
    assert {constant.learning_rate(step) for step in range(5, 401)} == {1e-2}


@pytest.mark.parametrize("decay", ["cosine", "exponential"])
def test_fine_tuning_is_at_the_smallest_rate(decay: Any) -> None:
    config = TrainConfig(batch_size=10, epochs=12, fine_tuning_epochs=2, decay=decay)
    config = replace(config, learning_rate=1e-2, min_learning_rate=1e-4, warmup_epochs=1)
    schedule = config.schedule(100)
    assert (schedule.total, schedule.falling) == (120, 100)
    rates = [schedule.learning_rate(step) for step in range(1, 121)]
    assert rates[100:] == [1e-4] * 20
    assert min(rates[10:99]) > 1e-4
    with pytest.raises(ValueError, match="fine_tuning_epochs: expected less than epochs"):
        replace(config, fine_tuning_epochs=12)
    with pytest.raises(ValueError, match="0 where steps are given"):
        replace(config, steps=50)


def test_adamax_moves_every_weight_by_the_rate_at_first(tmp_path: Path) -> None:
    before = make_toy()
    config = replace(PLAIN, optimizer="adamax", steps=1, warmup_steps=0, weight_decay=0.0)
    after = run(tmp_path, replace(config, clip_norm=None))
    moved = [
        (new - old).abs().flatten()
        for new, old in zip(after.parameters(), before.parameters(), strict=True)
    ]
    sizes = torch.cat(moved)
    sizes = sizes[sizes > 0]  # weights above the diagonal have no gradient
    assert len(sizes) > 0
    assert torch.allclose(sizes, torch.full_like(sizes, config.learning_rate), rtol=1e-2)


def test_length_of_the_run_in_epochs_and_steps() -> None:
    config = TrainConfig(batch_size=10, epochs=2.5, warmup_epochs=0.5)
    schedule = config.schedule(109)  # ten batches per epoch: the rest is dropped
    assert (schedule.total, schedule.warmup) == (25, 5)
    assert replace(config, steps=7).schedule(109).total == 7
    assert replace(config, steps=7).schedule(109).warmup == 3  # at most half of the run
    with pytest.raises(ValueError, match="warmup_steps: expected less than the run's 7 steps"):
        replace(config, steps=7, warmup_steps=7).schedule(109)


# --- one step -----------------------------------------------------------------------------------


def test_accumulation_changes_nothing_without_noise(tmp_path: Path) -> None:
    trained = []
    for accumulate in (1, 4):
        model = make_toy(ToyConfig(noise_std=0.0)).double()
        run(tmp_path / str(accumulate), replace(PLAIN, accumulate=accumulate), model)
        trained.append(model.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("limit", [None, 1e-3, 1e3])
def test_gradients_are_clipped_to_the_norm(tmp_path: Path, limit: float | None) -> None:
    model = run(tmp_path, replace(PLAIN, steps=1, warmup_steps=0, clip_norm=limit))
    applied = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    logged = read_log(tmp_path)[-1]["grad_norm"]
    assert 1e-3 < logged < 1e3
    expected = logged if limit is None else min(limit, logged)
    assert float(applied) == pytest.approx(expected, rel=1e-3)


def test_moving_average_has_its_closed_form() -> None:
    model, decay = make_toy().double(), 0.8
    average = MovingAverage(model, decay)
    weights = [torch.full_like(model.blocks[0].shift.weight, value) for value in (3.0, -1.0, 2.0)]
    expected = model.blocks[0].shift.weight.detach().clone()
    for t in range(40):
        with torch.no_grad():
            model.blocks[0].shift.weight.copy_(weights[t % 3])
        average.update(t)
        used = min(decay, (1 + t) / (10 + t))
        expected = used * expected + (1 - used) * weights[t % 3]
    found = average.state_dict()["blocks.0.shift.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert average.state_dict()["variance"] is not None  # buffers too: it loads as a model


def test_the_first_average_is_nine_tenths_of_the_first_step(tmp_path: Path) -> None:
    model = run(tmp_path, replace(PLAIN, steps=1, warmup_steps=0, ema_decay=0.5))
    trained = final_state(tmp_path)["/model.safetensors/blocks.0.shift.weight"]
    initial = make_toy().blocks[0].shift.weight
    torch.testing.assert_close(model.blocks[0].shift.weight, 0.1 * initial + 0.9 * trained)


def test_every_micro_batch_has_noise_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    plain = Toy.loss

    def loss(model: Toy, images: Tensor, label: Any, *, generator: torch.Generator) -> Tensor:
        seeds.append(generator.initial_seed())
        return plain(model, images, label, generator=generator)

    monkeypatch.setattr(Toy, "loss", loss)
    run(tmp_path / "0", replace(PLAIN, accumulate=2))
    run(tmp_path / "1", replace(PLAIN, accumulate=2, seed=1))
    assert len(set(seeds)) == len(seeds) == 24


def test_average_is_swapped_in_and_out_bit_for_bit() -> None:
    model = make_toy()
    average = MovingAverage(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 / 3)
    average.update(3)
    own = {k: v.clone() for k, v in model.state_dict().items()}
    with average.applied():
        assert_same_bits(dict(model.state_dict()), average.state_dict())
        assert not torch.equal(model.blocks[0].shift.weight, own["blocks.0.shift.weight"])
    assert_same_bits(dict(model.state_dict()), own)


def test_recomputed_activations_give_the_same_bits_and_names(tmp_path: Path) -> None:
    for name in (False, True):
        train(tmp_path / str(name), replace(EVERYTHING, activation_checkpointing=name))
    ours, theirs = read_log(tmp_path / "True"), read_log(tmp_path / "False")
    assert ours == theirs
    assert_same_bits(final_state(tmp_path / "True"), final_state(tmp_path / "False"))


def test_recomputation_leaves_the_stages_as_they_were(tmp_path: Path) -> None:
    model = run(tmp_path, replace(PLAIN, activation_checkpointing=True))
    assert all("forward" not in vars(stage) for stage in model.stages)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling on a CPU needs g++")
def test_compiled_stages_train_alike(tmp_path: Path) -> None:
    run(tmp_path / "plain")
    done = work(tmp_path / "fast", "compile", 6)
    assert done.returncode == 0, done.stderr
    plain, fast = read_log(tmp_path / "plain")[-1], read_log(tmp_path / "fast")[-1]
    assert fast["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    ours, theirs = final_state(tmp_path / "fast"), final_state(tmp_path / "plain")
    assert ours.keys() == theirs.keys()


def test_training_learns_and_leaves_the_callers_randomness_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    model = run(tmp_path, replace(PLAIN, steps=60, learning_rate=3e-2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not model.training
    losses = [line["loss"] for line in read_log(tmp_path)]
    assert losses[-1] < losses[0] - 0.05


# --- log and callbacks --------------------------------------------------------------------------


def test_a_line_has_the_mean_since_the_line_before(tmp_path: Path) -> None:
    run(tmp_path / "each", replace(PLAIN, log_every=1))
    run(tmp_path / "some", replace(PLAIN, log_every=4))
    each, some = read_log(tmp_path / "each"), read_log(tmp_path / "some")
    assert [line["step"] for line in some] == [4, 6]
    for key in ("loss", "grad_norm"):
        assert some[0][key] == pytest.approx(sum(line[key] for line in each[:4]) / 4)
        assert some[1][key] == pytest.approx(sum(line[key] for line in each[4:]) / 2)
    assert some[1] | {"loss": 0, "grad_norm": 0} == {
        "step": 6,
        "images": 48,
        "epoch": 1.0,
        "loss": 0,
        "grad_norm": 0,
        "learning_rate": PLAIN.min_learning_rate,
    }


def test_speed_is_logged_where_a_checkpoint_is_saved_too(tmp_path: Path) -> None:
    run(tmp_path, replace(PLAIN, log_every=1, checkpoint_every=1))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["images_per_second"] > 0 for line in lines)
    assert all(a["seconds"] < b["seconds"] for a, b in pairwise(lines))


def test_callbacks_see_the_average_in_eval_mode_and_then_training_goes_on(tmp_path: Path) -> None:
    seen: list[Progress] = []
    weights: list[Tensor] = []

    def look(told: Progress) -> dict[str, float]:
        seen.append(told)
        weights.append(told.model.state_dict()["blocks.0.shift.weight"].clone())
        assert not told.model.training
        return {"score": math.inf}

    config = replace(PLAIN, ema_decay=0.9)
    watched = run(tmp_path / "watched", config, every={4: look})
    run(tmp_path / "alone", config)
    assert [told.step for told in seen] == [4, 6]
    assert [told.images_seen for told in seen] == [32, 48]
    ours, theirs = final_state(tmp_path / "watched"), final_state(tmp_path / "alone")
    assert torch.equal(weights[-1], ours["/ema.safetensors/blocks.0.shift.weight"])
    assert torch.equal(watched.blocks[0].shift.weight, weights[-1])  # kept in the end
    assert_same_bits({**ours, "/state": 0}, {**theirs, "/state": 0, **_state(ours)})
    assert read_log(tmp_path / "watched")[-1]["score"] == "inf"


def _state(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name.startswith("/state/")}


def test_two_metrics_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two metrics are called loss"):
        run(tmp_path, every={2: lambda told: {"loss": 0.0}})


def test_progress_without_a_terminal_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(make_toy(), make_data(), PLAIN, tmp_path)
    assert "training: 6 of 6, loss " in capsys.readouterr().err


def test_tensorboard_is_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(tmp_path, tensorboard=True)
    assert list((tmp_path / "tensorboard").glob("events.*"))


# --- resuming -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder)
    return folder


class Abandoned(Exception):
    """Stands for a kill between two steps."""


@pytest.fixture
def abandon_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    plain = trainer.training_batches

    def arrange(step: int) -> None:
        def batches(*args: Any, start: int, **options: Any) -> Iterator[Any]:
            for index, batch in enumerate(plain(*args, start=start, **options), start=start):
                if index == step:
                    raise Abandoned
                yield batch

        monkeypatch.setattr(trainer, "training_batches", batches)

    return arrange


@pytest.mark.slow
def test_killed_runs_end_in_the_same_bits(tmp_path: Path, uninterrupted: Path) -> None:
    """20 steps = kill -9 at three points and the same command again, with everything turned on."""
    first, second = sorted(random.Random(0).sample(range(2, 11), 2))
    for where, step in [("batch", first), ("log", second), ("write", 12), ("batch", 19)]:
        died = work(tmp_path, where, step)
        assert died.returncode == -signal.SIGKILL, died.stderr
    assert train(tmp_path).step == 20
    assert_same_bits(final_state(tmp_path), final_state(uninterrupted))
    assert read_log(tmp_path) == read_log(uninterrupted)
    assert names(tmp_path) == ["step_00000016", "step_00000020"]


@pytest.mark.parametrize(
    "options",
    [{}, {"ema_decay": 0.9}, {"precision": "bfloat16"}, {"accumulate": 4}],
    ids=["plain", "average", "bfloat16", "accumulation"],
)
def test_resuming_halfway_gives_the_same_bits(
    tmp_path: Path, options: dict[str, Any], abandon_at: Callable[[int], None]
) -> None:
    config = replace(PLAIN, checkpoint_every=2, log_every=3, **options)
    run(tmp_path / "whole", config)
    abandon_at(5)
    with pytest.raises(Abandoned):
        run(tmp_path / "parts", config)
    abandon_at(-1)
    run(tmp_path / "parts", config)
    assert_same_bits(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))
    assert read_log(tmp_path / "parts") == read_log(tmp_path / "whole")


def test_a_finished_run_returns_at_once_with_its_weights(
    tmp_path: Path, abandon_at: Callable[[int], None]
) -> None:
    first = make_toy()
    result = fit(first, make_data(), PLAIN, tmp_path, progress=False)
    abandon_at(6)
    again = Toy()
    assert fit(again, make_data(), PLAIN, tmp_path, progress=False) == result
    assert_same_bits(dict(first.state_dict()), dict(again.state_dict()))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, uninterrupted: Path, abandon_at: Callable[[int], None]
) -> None:
    abandon_at(14)
    with pytest.raises(Abandoned):
        train(tmp_path)
    newest = tmp_path / "checkpoints" / "step_00000012"
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    abandon_at(-1)
    with pytest.warns(UserWarning, match=r"step_00000012 is damaged \(model.safetensors does not"):
        train(tmp_path)
    assert_same_bits(final_state(tmp_path), final_state(uninterrupted))
    assert read_log(tmp_path) == read_log(uninterrupted)
    assert "step_00000012.damaged" in names(tmp_path)


def test_a_damaged_checkpoint_never_crowds_out_good_ones(
    tmp_path: Path, abandon_at: Callable[[int], None]
) -> None:
    config = replace(PLAIN, checkpoint_every=2, keep_checkpoints=1)
    abandon_at(4)
    with pytest.raises(Abandoned):
        run(tmp_path, config)
    (tmp_path / "checkpoints" / "step_00000004" / "state.json").write_text("{")
    abandon_at(3)
    with (
        pytest.warns(UserWarning, match="or from the start"),
        pytest.raises(Abandoned),
    ):
        run(tmp_path, replace(config, checkpoint_every=1))
    assert names(tmp_path) == ["step_00000003", "step_00000004.damaged"]


def test_leftovers_of_a_half_written_checkpoint_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints" / ".step_00000004.partial"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    run(tmp_path, replace(PLAIN, checkpoint_every=2))
    assert names(tmp_path) == ["step_00000004", "step_00000006"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 5}, r"training.steps: 6 in the checkpoint, 5 asked"),
        ({"learning_rate": 1e-3}, r"training.learning_rate"),
        ({"seed": 1}, r"training.seed"),
    ],
    ids=str,
)
def test_another_configuration_does_not_resume(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match=named):
        run(tmp_path, replace(PLAIN, **change))


def test_another_model_or_data_set_does_not_resume(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match=r"model.noise_std: 0.1 in the checkpoint, 0.2 asked"):
        run(tmp_path, model=make_toy(ToyConfig(noise_std=0.2)))
    with pytest.raises(ValueError, match=r"data.fingerprint: 'toy' in the checkpoint"):
        fit(make_toy(), make_data(name="other"), PLAIN, tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"data.flip: False in the checkpoint, True asked"):
        run(tmp_path, augmentation=Augmentation(flip=True))


def test_what_changes_no_weight_may_change_on_resume(
    tmp_path: Path, abandon_at: Callable[[int], None]
) -> None:
    config = replace(PLAIN, checkpoint_every=2)
    run(tmp_path / "whole", config)
    abandon_at(5)
    with pytest.raises(Abandoned):
        run(tmp_path / "parts", config)
    abandon_at(-1)
    free = {"checkpoint_every": 5, "keep_checkpoints": 1, "activation_checkpointing": True}
    run(tmp_path / "parts", replace(config, log_every=2, **free))
    ours, theirs = final_state(tmp_path / "parts"), final_state(tmp_path / "whole")
    weights = {k: v for k, v in ours.items() if not k.startswith("/state")}
    assert_same_bits(weights, {k: theirs[k] for k in weights})


# --- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [5, 7, 20])
def test_a_signal_saves_and_the_same_command_goes_on(
    tmp_path: Path, uninterrupted: Path, signum: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    plain = torch.optim.AdamW.step
    taken = []

    def step_and_signal(*args: Any) -> None:
        plain(*args)
        taken.append(1)
        if len(taken) == step:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_and_signal)
    with pytest.raises(Interrupted, match=f"after step {step}; run the same command") as caught:
        train(tmp_path)
    assert (caught.value.step, caught.value.exit_code) == (step, 128 + signum)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert read_log(tmp_path)[-1]["step"] < step  # callbacks, which may take long, can wait
    for _ in range(2):  # once more: what was left unsaid is said once
        train(tmp_path)
    assert len(taken) == 20
    assert_same_bits(final_state(tmp_path), final_state(uninterrupted))
    assert read_log(tmp_path) == read_log(uninterrupted)


def test_a_second_interrupt_aborts_at_once(tmp_path: Path) -> None:
    def press_twice(told: Progress) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, every={3: press_twice})
    assert not (tmp_path / "checkpoints").exists()


def test_threads_train_too(tmp_path: Path) -> None:
    thread = threading.Thread(target=run, args=(tmp_path,))
    thread.start()
    thread.join()
    assert names(tmp_path) == ["step_00000006"]


# --- what is not finite -------------------------------------------------------------------------


def expect_failure(folder: Path, model: Toy, pattern: str, **fields: Any) -> dict[str, Any]:
    """The saved batch, after making sure that nothing was applied."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=pattern) as caught:
        run(folder, replace(PLAIN, **fields), model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    path = folder / "nonfinite_step_000001.pt"
    assert str(path) in str(caught.value)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_nan_parameter_is_found_in_its_stage(tmp_path: Path, stage: int, accumulate: int) -> None:
    model = make_toy(ToyConfig(volume_preserving=True))
    with torch.no_grad():
        model.blocks[stage].shift.weight[2, 1] = math.nan
    pattern = (
        rf"(?s)step 1 is not finite .*was not applied.*first output .* is that of stage {stage} "
        rf"\(ToyStage\).*not finite: blocks.{stage}.shift.weight"
    )
    batch = expect_failure(tmp_path, model, pattern, accumulate=accumulate)
    assert batch["images"].shape == (8, 1, 2, 3)
    assert (batch["labels"], batch["step"], batch["seed"]) == (None, 1, 0)


def test_an_exploding_scale_is_found_with_its_range(tmp_path: Path) -> None:
    model = make_toy()
    with torch.no_grad():
        model.blocks[1].scale.bias[3] = -200.0
    pattern = r"(?s)that of stage 1.*stage 0 .*log_scale -\d\..*stage 1 .*log_scale -20\d"
    expect_failure(tmp_path, model, pattern)


def test_a_broken_gradient_of_a_finite_loss_names_its_parameter(tmp_path: Path) -> None:
    model = make_toy()
    model.blocks[2].scale.weight.register_hook(lambda gradient: gradient * math.inf)
    expect_failure(tmp_path, model, r"forward pass is finite.*not: blocks.2.scale.weight")


def test_it_is_never_skipped_on_resume(tmp_path: Path) -> None:
    for _ in range(2):
        model = make_toy()
        model.blocks[0].shift.bias.data[0] = math.inf
        expect_failure(tmp_path, model, "step 1 is not finite")


# --- what does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({}, {"shape": (1, 3, 2)}, r"shape \(1, 2, 3\).*the data have \(1, 3, 2\)"),
        ({}, {"levels": 5}, r"made for 4 grey levels, the data have 5"),
        ({"num_classes": 3}, {}, r"3 classes, the data have no labels"),
        ({"num_classes": 3}, {"classes": 2}, r"3 classes, the data have 2"),
        ({"num_classes": 3}, {"classes": 4}, r"3 classes, the data have 4"),
    ],
)
def test_data_that_do_not_fit_are_refused(
    tmp_path: Path, model: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(make_toy(ToyConfig(**model)), make_data(**data), PLAIN, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_an_unconditional_model_ignores_labels(tmp_path: Path) -> None:
    data = make_data(classes=3)
    fit(make_toy(), data, replace(PLAIN, steps=3), tmp_path, progress=False)


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"could not write .*file/run: Not a directory"):
        run(tmp_path / "file" / "run")
