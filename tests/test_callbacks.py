"""Callbacks of a training, and its sample grids when samples fail."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import exactflow
from exactflow import runs
from exactflow.cli.settings import resolve
from exactflow.data import DataConfig, ImageDataset, load
from exactflow.models import registry
from exactflow.training import Progress, TrainConfig, fit
from exactflow.training.fitting import fit_closed_form


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load(DataConfig(limit=32), "train")


@pytest.mark.parametrize("preset", ["tarflow-tiny", "gaussianisation-tiny"])
def test_a_callback_may_return_nothing(preset: str, digits: ImageDataset, tmp_path: Path) -> None:
    seen = []

    def silent(progress: Progress) -> None:
        seen.append(progress.step)

    def telling(progress: Progress) -> Mapping[str, float]:
        return {"told": float(progress.step)}

    model: Any = registry.build(preset, image_shape=(1, 8, 8), levels=17)
    config = TrainConfig(steps=2, batch_size=16, warmup_steps=1)
    fitted = fit if preset == "tarflow-tiny" else fit_closed_form
    every = {1: silent, 2: telling}
    result = fitted(model, digits, config, tmp_path, every=every, progress=False)
    assert seen == list(range(1, result.step + 1))
    assert result.metrics["told"] == result.step


def test_a_grid_says_how_many_samples_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*args: Any, **options: Any) -> exactflow.Samples:
        drawn = exactflow.sample(*args, **options)
        return replace(drawn, failures={3: "block 1", 4: "block 2"})

    monkeypatch.setattr(runs, "sample", failing)
    words = ["training.steps=1", "training.warmup_steps=0", "run.samples=5", "data.limit=16"]
    words += ["training.batch_size=8", "model.blocks=1", "data.source=digits"]
    caplog.set_level("WARNING")
    trained = runs.execute(resolve("tarflow-tiny", words, None), tmp_path / "run", "cpu")
    said = caplog.text
    assert "step 1: 2 of 5 samples are not finite, and are left out of the grid" in said
    assert trained.history[-1]["nonfinite_samples"] == 2


def test_the_package_says_that_it_is_typed() -> None:
    assert files("exactflow").joinpath("py.typed").is_file()
