"""What a run records of its data is what it was trained on, and is found again."""

from pathlib import Path

import pytest
import yaml

from exactflow.cli.settings import Settings, resolve
from exactflow.cli.train import CONFIG_FILE, train

TINY = ("model.width=16", "model.blocks=2", "model.layers_per_block=1", "model.head_dim=16")
FAST = ("training.steps=2", "training.warmup_steps=1", "training.batch_size=8")
SHORT = (*TINY, *FAST, "run.evaluation_images=4", "run.samples=1")


def settings(*words: str, preset: str = "tarflow-digits") -> Settings:
    return resolve(preset, (*SHORT, "data.limit=24", *words), None)


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("data.split_seed=1", "another run"),
        ("training.learning_rate=0.01", "another run"),
        ("model.width=32", "another run"),
        ("training.batch_size=1000", "1000"),
    ],
)
def test_a_refused_run_changes_nothing_on_disk(word: str, reason: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(settings(), folder, "cpu")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=reason):
        train(settings(word), folder, "cpu")
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before
    assert yaml.safe_load((folder / CONFIG_FILE).read_text())["data"]["split_seed"] == 0


def test_a_refused_closed_form_fit_keeps_its_configuration(tmp_path: Path) -> None:
    def fitted(*words: str) -> Settings:
        return resolve("whitening-tiny", ("data.source=digits", "data.limit=24", *words), None)

    train(fitted(), tmp_path, "cpu")
    before = (tmp_path / CONFIG_FILE).read_bytes()
    with pytest.raises(ValueError, match="another run"):
        train(fitted("data.split_seed=1"), tmp_path, "cpu")
    assert (tmp_path / CONFIG_FILE).read_bytes() == before
