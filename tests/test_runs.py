"""`exactflow.train`: images in memory, weights to start from, longer runs, early stops."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import exactflow
from exactflow.training import Interrupted, Progress
from processes import call

FAST: Any = {"steps": 4, "warmup_steps": 1, "training.batch_size": 8, "samples": 2, "blocks": 1}


def images(count: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)


def test_an_array_is_trained_on_started_from_and_trained_longer(tmp_path: Path) -> None:
    run = exactflow.train("tarflow-tiny", images(), tmp_path / "a", **FAST)
    assert run.history[-1]["step"] == 4
    assert exactflow.evaluate(run.model, images()).likelihood.kind == "dequantized"
    longer = exactflow.train("tarflow-tiny", images(), tmp_path / "a", **{**FAST, "steps": 6})
    assert longer.metrics["step"] == 6
    low: Any = {**FAST, "learning_rate": 1e-12, "min_learning_rate": 0.0, "steps": 2}
    again = exactflow.train("tarflow-tiny", images(), tmp_path / "b", start=tmp_path / "a", **low)
    for name, value in longer.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value)
    with pytest.raises(ValueError, match=r"expected, .* there"):
        exactflow.train(
            "tarflow-tiny", images(), tmp_path / "c", start=tmp_path / "a", **FAST, width=128
        )


class Pairs(Dataset[tuple[torch.Tensor, int]]):
    """Pictures of two classes."""

    classes = ("cat", "dog")

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(images()[index : index + 1]), index % 2


def test_images_of_any_library_are_the_same_images() -> None:
    datasets = pytest.importorskip("datasets")
    grey, labels = images(), np.arange(40) % 2
    table = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(each) for each in grey], "label": labels.tolist()}
    )
    for data in (grey, torch.from_numpy(grey)[:, None], (grey, labels), Pairs(), table):
        found = exactflow.load_data(data)
        np.testing.assert_array_equal(np.asarray(found.images)[:, 0], grey)
        if found.labels is not None:
            np.testing.assert_array_equal(np.asarray(found.labels), labels)
    assert exactflow.load_data(Pairs()).class_names == ("cat", "dog")
    halves = exactflow.load_data(grey / np.float32(255))
    np.testing.assert_array_equal(np.asarray(halves.images)[:, 0], grey)


def test_a_model_of_ones_own_is_trained_in_place(tmp_path: Path) -> None:
    model = exactflow.build("tarflow-tiny", image_shape=(1, 8, 8), num_classes=2, blocks=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings: Any = {name: value for name, value in FAST.items() if name != "blocks"}
    run = exactflow.train(model, Pairs(), tmp_path / "own", **settings)
    assert run.model is model
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="expected no settings of a given model"):
        exactflow.train(model, Pairs(), tmp_path / "other", width=64)


def test_a_run_that_was_stopped_ends_where_one_that_was_not_does(tmp_path: Path) -> None:
    """A resumed run reads from its log why it should end early."""
    slow: Any = {**FAST, "learning_rate": 1e-12, "min_learning_rate": 0.0, "steps": 9}
    slow |= {"evaluate_every": 1, "patience": 3, "training.checkpoint_every": 1}
    whole = exactflow.train("tarflow-tiny", images(), tmp_path / "whole", **slow)

    def stop(told: Progress) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(Interrupted):
        exactflow.train("tarflow-tiny", images(), tmp_path / "parts", every={2: stop}, **slow)
    parts = exactflow.train("tarflow-tiny", images(), tmp_path / "parts", **slow)
    assert parts.result.step == whole.result.step < 9
    for name, value in whole.model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[name], value)


def test_the_command_line_starts_from_weights(tmp_path: Path) -> None:
    words = ["model.blocks=1", "training.warmup_steps=1", "run.samples=1"]
    frozen = ["training.learning_rate=1e-12", "training.min_learning_rate=0"]
    call("train", "tarflow-tiny", "training.steps=4", *words, "--out", "first", cwd=tmp_path)
    begin = ["train", "tarflow-tiny", "training.steps=2", *words, *frozen]
    call(*begin, "--out", "second", "--start", "first", cwd=tmp_path)
    first, second = (exactflow.from_pretrained(tmp_path / name) for name in ("first", "second"))
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value)
    said = call(*begin, "--out", "third", "--start", "nowhere", cwd=tmp_path, fails=True)
    assert "got 'nowhere'" in said.stderr


def test_a_run_ends_early_and_stays_ended(tmp_path: Path) -> None:
    slow: Any = {**FAST, "learning_rate": 1e-12, "min_learning_rate": 0.0, "steps": 9}
    slow |= {"evaluate_every": 1, "patience": 2}
    ended = exactflow.train("tarflow-tiny", images(), tmp_path, **slow)
    step = ended.result.step
    assert step < 9
    assert ended.metrics["ended"] == 1
    again = exactflow.train("tarflow-tiny", images(), tmp_path, **slow)
    assert again.result.step == step


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (images().astype(np.int64), "int64"),
        (images().astype(np.float32), r"\[0, 1\], got 0 to 255"),
        ((images(), [0, 1]), "got 2 labels"),
    ],
)
def test_what_cannot_be_read_is_one_clear_error(data: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        exactflow.load_data(data)
