"""Settings: strict, with suggestions; preset, file and words in that order."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

import exactflow
from exactflow.cli.settings import data_of, resolve
from exactflow.cli.words import parse_words
from exactflow.core.config import override
from exactflow.data import DataConfig, load


@dataclass(frozen=True)
class Toy:
    count: int = 1
    rate: float = 0.5
    maybe: float | None = None
    mode: Literal["fast", "slow"] = "fast"
    pair: tuple[float, float] = (0.9, 0.95)
    on: bool = False


def test_values_take_the_declared_type() -> None:
    changed = override(Toy(), {"rate": 2, "maybe": 1, "pair": [0, 1], "on": True})
    assert changed == Toy(rate=2.0, maybe=1.0, pair=(0.0, 1.0), on=True)
    assert isinstance(changed.rate, float)
    assert override(Toy(maybe=1.0), {"maybe": None}).maybe is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coutn": 1}, "did you mean 'count'"),
        ({"count": 1.5}, "Toy.count: expected int, got 1.5"),
        ({"count": True}, "expected int, got True"),
        ({"on": 1}, "expected bool, got 1"),
        ({"rate": "high"}, "expected float, got 'high'"),
        ({"mode": "slwo"}, r"'fast' \| 'slow', got 'slwo'; did you mean 'slow'"),
        ({"pair": [1]}, "expected 2 values"),
        ({"count": None}, "expected int, got None"),
    ],
)
def test_wrong_values_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(Toy(), changes)


def test_words_mean_what_their_fields_hold() -> None:
    words = ["training.learning_rate=1e-3", "model.image_shape=[1, 8, 8]", "data.flip=true"]
    settings = resolve("tarflow-digits", [*words, "data.limit=null"], None)
    assert settings.training.learning_rate == 1e-3
    assert settings.model.image_shape == (1, 8, 8)
    assert settings.data.flip is True
    assert settings.data.limit is None
    assert parse_words(["data.source=a=b"]) == {"data": {"source": "a=b"}}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("steps=3", "SECTION.FIELD=VALUE"),
        ("trainig.steps=3", "did you mean 'training'"),
        ("training.steps", "SECTION.FIELD=VALUE"),
    ],
)
def test_words_that_mean_nothing(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_words([word])


def test_file_over_preset_and_words_over_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "preset: tarflow-digits\ntraining: {steps: 70, warmup_steps: 5}\nmodel: {blocks: 3}\n"
    )
    settings = resolve(None, ["training.steps=80"], file)
    assert settings.preset == "tarflow-digits"
    assert settings.training.steps == 80
    assert settings.training.warmup_steps == 5
    assert settings.model.blocks == 3
    assert settings.training.ema_decay == 0.998, "the preset's own"


def test_the_model_follows_the_data_unless_file_or_words_say_otherwise(tmp_path: Path) -> None:
    digits = load(DataConfig(limit=8), "train")
    file = tmp_path / "run.yaml"
    file.write_text("preset: tarflow-tiny\ntraining: {steps: 70}\n")
    fitted = resolve(None, [], file).fitted(digits).model
    assert (fitted.image_shape, fitted.levels) == ((1, 8, 8), 17)
    file.write_text("preset: tarflow-tiny\nmodel: {levels: 32}\n")
    assert resolve(None, [], file).fitted(digits).model.levels == 32
    assert resolve("tarflow-tiny", ["model.levels=5"], None).fitted(digits).model.levels == 5


def test_a_resolved_configuration_resolves_to_itself(tmp_path: Path) -> None:
    settings = resolve("tarflow-digits", ["training.steps=300", "data.limit=9"], None)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings.describe()))
    assert resolve(None, [], file).describe() == settings.describe()


@pytest.mark.parametrize(
    ("preset", "word", "content", "message"),
    [
        ("tarflow-digitz", None, None, "did you mean 'tarflow-digits'"),
        (None, None, None, "expected a preset"),
        ("tarflow-tiny", "training.stpes=1", None, "did you mean 'steps'"),
        ("tarflow-imagenet64-2-768-8-8-uniform", None, None, "names no data set"),
        ("tarflow-tiny", None, "trianing: {steps: 1}", "did you mean 'training'"),
        ("tarflow-tiny", None, "training: 3", "expected a mapping under 'training'"),
        ("tarflow-tiny", None, "- a\n- b", "expected a mapping"),
        ("tarflow-tiny", None, "a: [", "not YAML"),
        ("tarflow-tiny", "run.samples=0", None, "run.samples"),
        ("tarflow-tiny", "run.samples=1000000000000", None, "run.samples: expected at most 4,096"),
        ("tarflow-tiny", "model.width=[1", None, r"width: expected int, got '\[1'"),
        ("tarflow-tiny", "model.image_shape=[1", None, r"image_shape=\[1 is not YAML"),
    ],
)
def test_settings_that_cannot_be(
    preset: str | None, word: str | None, content: str | None, message: str, tmp_path: Path
) -> None:
    file = None
    if content is not None:
        file = tmp_path / "c.yaml"
        file.write_text(content)
    with pytest.raises(ValueError, match=message):
        resolve(preset, [word] if word else [], file)


def test_a_model_that_does_not_say_its_data_needs_a_source(tmp_path: Path) -> None:
    exactflow.build("tarflow-tiny", width=16, head_dim=16).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"data\.source"):
        data_of(exactflow.from_pretrained(tmp_path / "model"), tmp_path / "model", [])
