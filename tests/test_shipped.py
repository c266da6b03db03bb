"""Models that ship with the package, and the program that ships one."""

import hashlib
import json
import math
import shlex
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import exactflow
from exactflow.cli import ship as shipping
from exactflow.cli.settings import data_of, resolve
from exactflow.cli.ship import ship
from exactflow.core.serialization import CONFIG_FILE, WEIGHTS_FILE
from exactflow.core.tensor_files import read_safetensors
from exactflow.data import load
from exactflow.models import registry, shipped
from exactflow.models.pretrained import READING, from_pretrained, located, recorded_data
from exactflow.runs import execute
from exactflow.training.settings import Settings
from processes import call

ROOT = Path(__file__).parents[1]
DOCUMENTED = ("digits", "fashion-mnist", "fashion-mnist-samples", "cifar10")
MOST = 8 * 10**6  # bytes of all together
CLOSE = 1e-4  # bits/dim

TINY = ("model.width=16", "model.blocks=2", "model.layers_per_block=1", "model.head_dim=16")
FAST = ("training.steps=2", "training.warmup_steps=1", "training.batch_size=8")
SHORT = (*TINY, *FAST, "run.evaluation_images=4", "run.samples=1")


# The models that are there.


def test_they_are_the_documented_ones() -> None:
    there = {path.parent.name for path in shipped.FOLDER.glob(f"*/{CONFIG_FILE}")}
    assert shipped.NAMES == DOCUMENTED
    assert there == set(DOCUMENTED)
    assert not there & set(registry.names()), "a preset's name means the preset"


def test_they_are_small() -> None:
    assert sum(path.stat().st_size for path in shipped.FOLDER.rglob("*") if path.is_file()) <= MOST


def check_scores(name: str) -> None:
    """The stored images have the stored likelihoods."""
    model = exactflow.from_pretrained(name)
    stored, _ = read_safetensors(shipped.FOLDER / name / shipped.CHECK_FILE)
    assert stored["images"].dtype == torch.uint8
    assert len(stored["images"]) == len(stored["nats"]) == 8
    assert ("label" in stored) is bool(model.num_classes)
    found = exactflow.log_likelihood(model, stored["images"], stored.get("label"), seed=0)
    off = (found.nats - stored["nats"]).abs() / (model.dims * math.log(2))
    assert off.max() <= CLOSE


def check_card(name: str) -> None:
    """The card names data, training and scores of exactly these weights."""
    model = exactflow.from_pretrained(name)
    card = model.card
    data, training, test = card["training data"], card["training"], card["test"]
    for text in (data["id"], data["version"], data["fingerprint"], data["licence"]):
        assert text
    assert training["command"].startswith("exactflow train ")
    assert min(training["images_seen"], training["threads"]) > 0
    assert training["torch"]
    assert test["kind"]
    assert (test["bits_per_dim"] is None) is (test["kind"] == "noisy-density")
    assert (test["standard_error"] is None) is (test["kind"] == "noisy-density")
    assert test["images"] == test["data"]["count"] > 0
    assert test["data"]["split"] == "test"
    assert test["data"]["version"] == data["version"]
    assert test["parameters"] == model.num_parameters
    weights = (shipped.FOLDER / name / WEIGHTS_FILE).read_bytes()
    assert card["weights"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert card["made"]["date"]
    assert card["made"]["torch"]
    assert str(Path.home()) not in json.dumps(card), "paths of whoever trained it"


def check_offline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model loads from the package alone, in float32, and samples."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "socket", refuse)
    stored, _ = read_safetensors(shipped.FOLDER / name / WEIGHTS_FILE)
    assert torch.float16 in {value.dtype for value in stored.values()}
    model = exactflow.from_pretrained(name)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not {value.dtype for value in model.state_dict().values()} & {torch.float16}
    label = 0 if model.num_classes else None
    drawn = exactflow.sample(model, 1, label)
    assert drawn.x.shape == (1, *model.event_shape)
    assert drawn.x.dtype == torch.float32
    assert drawn.x.isfinite().all()


@pytest.mark.parametrize("name", shipped.NAMES)
def test_a_model_scores_its_images_as_when_it_was_made(name: str) -> None:
    check_scores(name)


@pytest.mark.parametrize("name", shipped.NAMES)
def test_a_model_has_a_whole_card(name: str) -> None:
    check_card(name)
    assert exactflow.from_pretrained(name).card["training"]["seconds"] > 0


@pytest.mark.parametrize("name", shipped.NAMES)
def test_a_model_loads_offline_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_offline(name, monkeypatch)


@pytest.mark.parametrize("name", shipped.NAMES)
def test_the_page_says_what_the_card_says(name: str) -> None:
    model = exactflow.from_pretrained(name)
    test = model.card["test"]
    page = (ROOT / "docs" / "getting-started.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
    assert f"{model.num_parameters:,}" in row
    if test["bits_per_dim"] is not None:
        assert f"{test['bits_per_dim']:.3f} ± {test['standard_error']:.3f}" in row
        assert f"{test['images']:,} test images" in row


# Any such model, and how it is made.

NAME = "toy-digits"


def settings(*words: str, preset: str = "tarflow-digits") -> Settings:
    return resolve(preset, (*SHORT, *words), None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "run"
    execute(settings("model.num_classes=10", "data.limit=100", "data.split_seed=3"), folder, "cpu")
    return folder


@pytest.fixture(scope="module")
def made(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package's folder with one model."""
    package = tmp_path_factory.mktemp("package").resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipped, "FOLDER", package)
        ship(run, NAME, samples={"frechet_distance": 13.8, "how": "of 512 samples"})
    return package


@pytest.fixture
def package(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shipped, "FOLDER", made)
    monkeypatch.setattr(shipped, "NAMES", (NAME,))
    return made


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_made_is_whole(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_scores(NAME)
    check_card(NAME)
    check_offline(NAME, monkeypatch)
    model = exactflow.from_pretrained(NAME)
    card = model.card
    assert card["samples"]["frechet_distance"] == 13.8
    assert card[READING] == {"source": "digits", "split_seed": 3, "limit": 100}
    assert model.class_names == tuple("0123456789")
    stored, _ = read_safetensors(package / NAME / shipped.CHECK_FILE)
    assert stored["nats"].dtype == torch.float64


def test_other_weights_are_noticed(package: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shipped, "FOLDER", shutil.copytree(package, tmp_path / "p").resolve())
    model = exactflow.from_pretrained(NAME)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(shipped.FOLDER / NAME, card=model.card)
    for check in (check_scores, check_card):
        with pytest.raises(AssertionError):
            check(NAME)


def test_only_a_model_that_ships_is_widened(package: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(package / NAME, tmp_path / "copy")
    assert exactflow.from_pretrained(copy).dtype == torch.float16
    assert exactflow.from_pretrained(package / NAME).dtype == torch.float32


def test_a_folder_of_that_name_counts_if_it_holds_a_model(
    package: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "photo.png").touch()
    assert located(NAME) == package / NAME
    call("sample", NAME, "--n", 1, cwd=tmp_path)
    assert [path.name for path in (tmp_path / NAME).iterdir()] == ["photo.png"]
    assert (tmp_path / "runs" / NAME / "sampled" / "samples.png").is_file()
    shutil.copytree(run, tmp_path / NAME, dirs_exist_ok=True)
    assert located(NAME) == Path(NAME) / "model"
    with pytest.raises(ValueError, match="of a model on the hub"):
        from_pretrained(NAME, revision="main")


def test_verbs_take_the_name_and_leave_the_package_alone(package: Path, tmp_path: Path) -> None:
    before = contents(package)
    call("sample", NAME, "--n", 2, "--label", 3, "--guidance", 1.5, cwd=tmp_path)
    call("sample", package / NAME, "--n", 1, "--seed", 5, cwd=tmp_path)
    assert (tmp_path / "runs" / NAME / "sampled" / "seed_000005.png").is_file()
    call("encode", NAME, "--n", 2, "--steps", 2, cwd=tmp_path)
    assert (tmp_path / "runs" / NAME / "encode" / "encode.json").is_file()
    refused = call("plan", NAME, cwd=tmp_path, fails=True)
    assert "save it in a folder first" in refused.stderr
    assert "licence: CC BY 4.0" in call("info", NAME, cwd=tmp_path).stdout
    assert NAME in call("info", cwd=tmp_path).stdout
    assert contents(package) == before
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_it_knows_its_data(package: Path, tmp_path: Path) -> None:
    call("evaluate", NAME, "--out", "e.json", cwd=tmp_path)
    found = json.loads((tmp_path / "e.json").read_text())
    expected = from_pretrained(NAME).card["test"]
    assert found["bits_per_dim"] == pytest.approx(expected["bits_per_dim"], abs=CLOSE)
    assert found["data"] == expected["data"]
    assert "trained on" not in found


@pytest.mark.parametrize("words", [("sample", "toy-digist"), ("info", "toy-digist")])
def test_a_mistyped_name(words: tuple[str, ...], package: Path, tmp_path: Path) -> None:
    assert f"did you mean '{NAME}'" in call(*words, cwd=tmp_path, fails=True).stderr
    assert f"shipped: {NAME}" in call("sample", "nowhere", cwd=tmp_path, fails=True).stderr
    with pytest.raises(FileNotFoundError, match=f"did you mean '{NAME}'"):
        from_pretrained("toy-digist")


def test_a_card_of_another_type(package: Path, tmp_path: Path) -> None:
    model = from_pretrained(NAME)
    model.save_pretrained(tmp_path, card={READING: "digits"})
    with pytest.raises(ValueError, match=f"'{READING}', got 'digits'"):
        data_of(from_pretrained(tmp_path), tmp_path, ())


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Images of a set that has no built-in name, and a run that read them in a way of its own."""
    images = tmp_path / "set"
    images.mkdir()
    draws = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(draws.integers(0, 256, (8, 8), dtype=np.uint8)).save(
            images / f"{index:02}.png"
        )
    words = (f"data.source={images}", "data.bits=4", "data.test_fraction=0.3")
    execute(settings(*words, preset="tarflow-tiny"), tmp_path / "run", "cpu")
    return tmp_path


def test_data_without_a_name_are_asked_for_and_read_as_then(
    album: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"data of known licence.*got 'set'"):
        ship(album / "run", NAME)
    monkeypatch.setattr(shipped, "FOLDER", (album / "package").resolve())
    monkeypatch.setattr(shipped, "NAMES", (NAME,))
    monkeypatch.setattr(shipping, "LICENCES", {"set": "ours"})
    ship(album / "run", NAME)
    check_card(NAME)
    model = from_pretrained(NAME)
    assert model.card[READING] == {"bits": 4, "test_fraction": 0.3}
    assert str(album) not in (shipped.FOLDER / NAME / CONFIG_FILE).read_text()
    with pytest.raises(ValueError, match=r"was trained on set \(version .*give data.source="):
        data_of(model, NAME, ())
    elsewhere = album / "moved"
    shutil.copytree(album / "set", elsewhere)
    data = data_of(model, NAME, (f"data.source={elsewhere}",))
    assert load(data, "train").fingerprint == recorded_data(model)["fingerprint"]
    (elsewhere / "00.png").unlink()
    assert data_of(model, NAME, (f"data.source={elsewhere}",)).bits == 8  # another set


@pytest.mark.parametrize(
    ("preset", "words", "told"),
    [
        ("tarflow-digits", (), "exactflow train tarflow-digits"),
        ("tarflow-digits", ("data.source=/x/digits",), "exactflow train tarflow-digits"),
        ("tarflow-tiny", ("data.source=/x",), "exactflow train tarflow-tiny data.source=FOLDER"),
        ("tarflow-imagenet64-4-1024-8-8-0.05", ("data.source=/x",), "... data.source=FOLDER"),
        (
            "tarflow-digits",
            ("model.conditional=[affine, mixture]", "model.start_token=yes", "data.flip=yes"),
            "...",
        ),
    ],
)
def test_the_command_trains_such_a_model(preset: str, words: tuple, told: str) -> None:
    asked = resolve(preset, words, None)
    command = shipping.command(asked, "digits" if "/x/digits" in str(words) else "set")
    if not told.startswith("..."):
        assert command == told
    assert command.endswith(told.removeprefix("..."))
    program, verb, *rest = shlex.split(command)
    again = resolve(rest[0], rest[1:], None)
    assert (program, verb) == ("exactflow", "train")
    assert (again.model, again.training) == (asked.model, asked.training)
    assert again.data.flip == asked.data.flip


def test_a_run_that_has_not_ended_is_refused(run: Path, tmp_path: Path) -> None:
    begun = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(begun / "model")
    with (
        pytest.warns(UserWarning, match="newest checkpoint"),
        pytest.raises(ValueError, match="a finished run"),
    ):
        ship(begun, NAME)
    config = run / "model" / CONFIG_FILE
    shutil.copytree(run / "model", begun / "model")
    content = json.loads(config.read_text())
    del content["card"]["cost"]["threads"]
    (begun / "model" / CONFIG_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="give --threads"):
        ship(begun, NAME)


def test_weights_that_float16_cannot_hold_are_refused(run: Path, tmp_path: Path) -> None:
    large = shutil.copytree(run, tmp_path / "run")
    model = from_pretrained(large)
    with torch.no_grad():
        next(model.parameters()).fill_(1e6)
    model.save_pretrained(large / "model", card=model.card)
    with pytest.raises(ValueError, match="float16 can hold"):
        ship(large, NAME)
