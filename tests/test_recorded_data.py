"""A run records the data that it was trained on, and they are found again."""

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from exactflow.cli import classify, evaluate, outliers
from exactflow.cli.arguments import Classify, Evaluate, Outliers
from exactflow.cli.settings import data_of, resolve
from exactflow.cli.trained_on import trained_on
from exactflow.data import DataConfig, ImageDataset, load, prepare
from exactflow.models.pretrained import from_pretrained
from exactflow.runs import execute
from exactflow.training.settings import CONFIG_FILE, Settings

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
    execute(settings(), folder, "cpu")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=reason):
        execute(settings(word), folder, "cpu")
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before
    assert yaml.safe_load((folder / CONFIG_FILE).read_text())["data"]["split_seed"] == 0


def test_a_refused_closed_form_fit_keeps_its_configuration(tmp_path: Path) -> None:
    def fitted(*words: str) -> Settings:
        return resolve("whitening-tiny", ("data.source=digits", "data.limit=24", *words), None)

    execute(fitted(), tmp_path, "cpu")
    before = (tmp_path / CONFIG_FILE).read_bytes()
    with pytest.raises(ValueError, match="another run"):
        execute(fitted("data.split_seed=1"), tmp_path, "cpu")
    assert (tmp_path / CONFIG_FILE).read_bytes() == before


def photos(folder: Path) -> Path:
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(40):
        image = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{index:02}.png")
    return folder


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with photos, and a run that read them in a way of its own, by a relative path."""
    project = tmp_path_factory.mktemp("project")
    photos(project / "data" / "album")
    with contextlib.chdir(project):
        read = ("data.source=data/album", "data.split_seed=5", "data.test_fraction=0.3")
        read += ("data.image_size=4", "data.bits=4", "data.limit=12")
        run = resolve("tarflow-tiny", (*SHORT, "model.patch_size=2", *read), None)
        execute(run, Path("run"), "cpu")
    return project


def held_out(run: Path, *words: str) -> ImageDataset:
    return load(data_of(from_pretrained(run), run, words), "test")


@pytest.mark.parametrize(
    "source", ["data/album/", "./data/album", "data/../data/album", "{here}/data/album", "link"]
)
def test_the_training_set_is_read_as_in_training_under_any_name(album: Path, source: str) -> None:
    with contextlib.chdir(album):
        expected = held_out(Path("run")).fingerprint
        link = Path("link")
        if not link.is_symlink():
            link.symlink_to(album / "data" / "album")
        found = held_out(Path("run"), f"data.source={source.format(here=album)}")
        assert found.fingerprint == expected
        assert found.levels == 16


def test_a_copy_is_read_as_in_training_under_another_name_too(album: Path, tmp_path: Path) -> None:
    expected = held_out(album / "run").fingerprint
    copy = tmp_path / "renamed"
    shutil.copytree(album / "data" / "album", copy)
    assert held_out(album / "run", f"data.source={copy}").fingerprint == expected
    (copy / "00.png").unlink()
    other = data_of(from_pretrained(album / "run"), album / "run", (f"data.source={copy}",))
    assert other == DataConfig(source=str(copy))  # another set: nothing of that reading applies


def test_a_run_finds_its_data_from_any_folder_and_after_a_move(album: Path, tmp_path: Path) -> None:
    expected = held_out(album / "run").fingerprint
    with contextlib.chdir(tmp_path):
        assert held_out(album / "run").fingerprint == expected
    recorded = yaml.safe_load((album / "run" / CONFIG_FILE).read_text())
    assert recorded["data"]["source"] == str(album / "data" / "album")
    assert recorded["typed"] == {"source": "data/album"}
    moved = tmp_path / "moved"
    shutil.copytree(album, moved, symlinks=True)
    away = album.rename(album.with_name("away"))
    try:
        with contextlib.chdir(moved):
            assert held_out(Path("run")).fingerprint == expected
            again = resolve(None, (), Path("run") / CONFIG_FILE)
            assert again.data.source == "data/album"
    finally:
        away.rename(album)


def test_images_that_were_trained_on_do_not_pass_for_held_out_ones(album: Path) -> None:
    model = from_pretrained(album / "run")
    data = data_of(model, album / "run", ())
    assert trained_on(model, data, load(data, "test")) == ""
    few = replace(data, limit=3)  # of the same splits
    assert trained_on(model, few, load(few, "test")) == ""
    other = replace(data, split_seed=6)
    assert "may be among those it was trained on" in trained_on(model, other, load(other, "test"))


def test_evaluate_says_so(album: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def result(*words: str) -> dict:
        out = tmp_path / "e.json"
        evaluate.run(Evaluate(model=str(album / "run"), settings=words, out=out, device="cpu"))
        return json.loads(out.read_text())

    plain = result()
    assert "trained on" not in plain
    source = f"data.source={album}/data/../data/album"
    assert result(source)["data"]["fingerprint"] == plain["data"]["fingerprint"]
    assert "may be among" in result(source, "data.split_seed=6")["trained on"]
    assert "may be among" in " ".join(capsys.readouterr().out.split())


def test_a_prepared_set_and_its_source_are_read_alike(tmp_path: Path) -> None:
    set_ = tmp_path / "set"
    for index in range(30):
        set_.mkdir(exist_ok=True)
        Image.new("L", (8, 8), index * 8).save(set_ / f"{index:02}.png")
    read = DataConfig(str(set_), split_seed=3, test_fraction=0.4, bits=5)
    prepare(read, tmp_path / "ready")
    run = resolve("tarflow-tiny", (*SHORT, f"data.source={tmp_path / 'ready'}"), None)
    execute(run, tmp_path / "run", "cpu")
    expected = load(read, "test").fingerprint
    assert held_out(tmp_path / "run").fingerprint == expected
    assert held_out(tmp_path / "run", f"data.source={set_}").fingerprint == expected


def test_the_other_verbs_that_measure_held_out_images_say_so_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = resolve("tarflow-tiny", (*SHORT, "model.num_classes=10", "data.source=digits"), None)
    execute(labelled, tmp_path / "run", "cpu")
    run, words, outside = str(tmp_path / "run"), ("data.split_seed=6",), str(photos(tmp_path / "p"))
    given = {"model": run, "settings": words, "n": 2, "device": "cpu"}
    classify.run(Classify(**given, calibrate_on=2, out=tmp_path / "c"))
    outliers.run(Outliers(**given, outside=outside, training=2, out=tmp_path / "o"))
    for file in (tmp_path / "c" / "classify.json", tmp_path / "o" / "outliers.json"):
        assert "may be among" in json.loads(file.read_text())["trained on"]
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("the model was trained on digits") == 2
