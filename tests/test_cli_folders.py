"""Folders of commands: no files of another call, model or set, and complete records."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import exactflow
from exactflow.cli import early
from exactflow.cli import sample as verb
from exactflow.cli.parsing import parsed
from exactflow.comparison.comparison import fingerprint
from exactflow.data import DataConfig
from exactflow.models import registry
from exactflow.training.folder import check_apart
from processes import call

Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Runs one command in `tmp_path`: its exit status, and what it printed."""

    def run(*words: object) -> tuple[int, str]:
        said = call(*words, cwd=tmp_path, fails=None)
        return said.returncode, said.stdout + said.stderr

    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a conditional flow whose classes have names."""
    folder = tmp_path / "runs" / "[v2] a"
    model = registry.build("tarflow-tiny", image_shape=(1, 8, 8), num_classes=2, blocks=1)
    model.class_names = ("cat", "dog")
    model.save_pretrained(folder / "model")
    (folder / "config.yaml").write_text("preset: tarflow-tiny\ndata: {source: digits}\n")
    return folder


def singles(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("seed_*.png"))


def test_samples_go_to_the_run_of_their_model(run: Path, tmp_path: Path, cli: Cli) -> None:
    for place in (run, run / "model"):
        status, printed = cli("sample", place, "--n", 2)
        assert status == 0, printed
        assert str(run / "sampled" / "samples.png") in printed, "brackets and all, on one line"
        assert singles(run / "sampled") == ["seed_000000.png", "seed_000001.png"]
    run.joinpath("model").rename(tmp_path / "alone")
    assert cli("sample", "alone", "--n", 1)[0] == 0
    assert singles(tmp_path / "alone" / "sampled") == ["seed_000000.png"]
    assert not (tmp_path / "runs" / "samples").exists()


def test_other_verbs_write_beside_their_model_too(tmp_path: Path, cli: Cli) -> None:
    model = registry.build("tarflow-tiny", image_shape=(1, 8, 8), levels=17, blocks=1)
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
        for words in (["encode", "--n", 2], ["convergence", "--n", 2]):
            status, printed = cli(words[0], name, *words[1:], "data.source=digits")
            assert status == 0, printed
            assert (tmp_path / name / words[0] / f"{words[0]}.json").is_file()
    assert not (tmp_path / "runs").exists()


def test_the_default_folder_has_the_last_call_only(run: Path, cli: Cli) -> None:
    cli("sample", run, "--n", 4, "--trace")
    assert (run / "sampled" / "trace.png").exists()
    cli("sample", run, "--n", 2, "--seed", 1)
    assert singles(run / "sampled") == ["seed_000001.png", "seed_000002.png"]
    assert not (run / "sampled" / "trace.png").exists()
    assert json.loads((run / "sampled" / "samples.json").read_text())["seeds"] == [1, 2]


def test_a_folder_that_was_named_keeps_its_samples(run: Path, tmp_path: Path, cli: Cli) -> None:
    cli("sample", run, "--n", 4, "--out", "mine")
    before = {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    status, printed = cli("sample", run, "--n", 2, "--out", "mine")
    assert status == 1
    assert "holds 2 samples of other seeds, such as seed_000002.png" in printed
    assert {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before
    assert cli("sample", run, "--n", 10, "--out", "mine")[0] == 0, "more, of the same and others"
    assert len(singles(tmp_path / "mine")) == 10


def test_the_record_names_all_that_samples_depend_on(run: Path, cli: Cli) -> None:
    words = ["--label", "dog", "cat", "null", "--guidance", 0.5, "--temperature", 0.9]
    status, printed = cli("sample", run, "--n", 3, "--solver", "jacobi", *words)
    assert status == 0, printed
    record = json.loads((run / "sampled" / "samples.json").read_text())
    model = exactflow.from_pretrained(run)
    assert record["fingerprint"] == fingerprint(model)
    expected = {
        "exactflow": exactflow.__version__,
        "torch": torch.__version__,
        "model": str(run),
        "kind": "tarflow",
        "seeds": [0, 1, 2],
        "label": [1, 0, 2],
        "label_names": ["dog", "cat", "null"],
        "solver": "jacobi",
        "steps": None,
        "tolerance": None,
        "temperature": 0.9,
        "denoise": None,
        "device": "cpu",
        "dtype": "float32",
    }
    assert {name: record[name] for name in expected} == expected
    assert record["guidance"] == {
        "scale": 0.5,
        "rule": "extrapolate",
        "schedule": "linear",
        "temperature": 1.0,
    }


@pytest.mark.parametrize("rule", ["raise", "omit"])
def test_a_sample_that_fails_does_not_take_the_others(
    rule: str, run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("sample", run, "--n", 3)

    def failing(*args: object, **options: object) -> exactflow.Samples:
        assert options["options"].on_nonfinite == "omit"
        drawn = exactflow.sample(*args, **options)
        rows = [0, 2]
        return replace(
            drawn,
            x=drawn.x[rows],
            images=drawn.images[rows],
            seeds=(0, 2),
            certificate=drawn.certificate[rows],
            failures={1: "block 1"},
        )

    monkeypatch.setattr(verb, "sample", failing)
    status, printed = cli("sample", run, "--n", 3, "--on-nonfinite", rule)
    assert status == (rule == "raise")
    assert "the sample with seed 1 became non-finite in block 1" in printed
    assert ("1 of 3 samples are not finite; the others are in" in printed) == (rule == "raise")
    assert singles(run / "sampled") == ["seed_000000.png", "seed_000002.png"], "none of the first"
    assert json.loads((run / "sampled" / "samples.json").read_text())["failures"] == {
        "1": "block 1"
    }


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (12, 8, 8))):
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize("out", ["photos", "photos/run", "link", "elsewhere/../photos"])
def test_nothing_is_written_into_the_images(
    out: str, photos: Path, run: Path, tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "link").symlink_to(photos)
    before = sorted(tmp_path.rglob("*"))
    for words in (
        ["train", "tarflow-tiny", "data.source=photos", "training.steps=1"],
        ["train", "tarflow-tiny", "data.source=digits", "data.validation=photos"],
        ["encode", run, "data.source=photos"],
        ["compare", "tarflow-tiny", "--data", "photos"],
    ):
        status, printed = cli(*words, "--out", out)
        assert status == 1, printed
        assert "expected a folder outside of the images in photos" in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_beside_and_above_the_images_is_allowed(photos: Path, tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "photos-run", tmp_path / "run"):
        check_apart(out, DataConfig(str(photos)))
    for source in ("digits", "hub:owner/name", "https://host/train-{0..9}.tar"):
        check_apart(Path("digits"), DataConfig(source))


def test_a_run_keeps_its_model(run: Path, tmp_path: Path, cli: Cli) -> None:
    weights = (run / "model" / "model.safetensors").read_bytes()
    for out in (run, run / "model"):
        status, printed = cli("convert", tmp_path / "none.pth", out)
        assert status == 1
        assert f"{run} is the folder of a run" in printed
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    assert "no such file" in cli("convert", tmp_path / "none.pth", "new")[1]


def test_records_are_json(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow whose inverse overflows has an infinite error, which JSON does not know."""
    from exactflow.cli import encode

    def overflowing(*args: object) -> object:
        found = exactflow.reconstruct(*args)
        return replace(found, error=torch.full_like(found.error, torch.inf))

    monkeypatch.setattr(encode, "reconstruct", overflowing)
    registry.build("tarflow-tiny", image_shape=(1, 8, 8), levels=17).save_pretrained(tmp_path / "m")
    status, printed = cli("encode", "m", "--n", 2, "--out", "e", "data.source=digits")
    assert status == 0, printed
    record = json.loads((tmp_path / "e" / "encode.json").read_text(), parse_constant=pytest.fail)
    assert record["max_error"] == [None, None]


def test_the_early_look_refuses_what_loading_refuses(tmp_path: Path) -> None:
    for place in (str(tmp_path / "none"), "none", "a/b/c", "./a"):
        with pytest.raises(FileNotFoundError) as late:
            exactflow.from_pretrained(place)
        with pytest.raises(FileNotFoundError) as soon:
            early.answered(parsed(["sample", place]))
        assert str(soon.value) == str(late.value)
