"""Loaded files are checked once, where they are read, with one-sentence errors."""

import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import exactflow
from exactflow.core import building
from exactflow.core.model import GenerativeModel
from exactflow.models import registry
from exactflow.models.pretrained import recorded_data
from exactflow.sampling.plan import read_plans

DEEP = '{"kind": ' + "[" * 10**5 + "]" * 10**5 + "}"
NESTED = '{"kind": "tarflow", "config": {"width": ' + "[" * 100 + "]" * 100 + "}}"


def small() -> GenerativeModel:
    shape = (1, 4, 4)
    return exactflow.build("tarflow-tiny", image_shape=shape, blocks=2, width=8, head_dim=8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    small().save_pretrained(folder, card={"training data": {"id": "toy", "version": "1"}})
    return folder


@pytest.fixture
def saved(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "model")


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "32 levels deep at most"),
        (NESTED, "32 levels deep at most"),
        ("[]", "expected a JSON object, got list"),
        ("3", "expected a JSON object, got int"),
        ("", "is not JSON"),
        ('{"kind": NaN}', "NaN is no number of JSON"),
        ("\xff\xfe{", "is not JSON"),
        ('{"kind": 3, "config": {}}', "kind: expected str, got 3"),
        ('{"kind": "tarflow", "config": []}', "config: expected named values, got "),
        ('{"kind": "tarflow", "config": null}', "config: expected named values, got None"),
        ('{"kind": "tarflow", "config": {}}', "does not hold the weights"),
        ('{"kind": "turflow", "config": {}}', "did you mean 'tarflow'"),
        ('{"kind": "tarflow", "config": {}, "card": 3}', "card: expected named values, got 3"),
        *(
            (f'{{"kind": "tarflow", "config": {{}}, "format_version": {v}}}', "format_version")
            for v in ("null", '"1"', "[1]", "true", "1.5", "{}")
        ),
    ],
)
def test_a_configuration_that_is_none(text: str, message: str, saved: Path) -> None:
    (saved / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message) as caught:
        exactflow.from_pretrained(saved)
    assert "config.json" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("value", [None, "8", [8], {"a": 8}, True, 8.5, -1, 0, 10**400])
@pytest.mark.parametrize("name", ["width", "blocks", "head_dim", "image_shape", "noise_std"])
def test_fields_of_another_type_or_range(name: str, value: object, saved: Path) -> None:
    if (name, value) in [("noise_std", 0), ("noise_std", 8.5)]:
        return  # these are values of it
    change(saved, lambda content: content["config"].update({name: value}))
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        exactflow.from_pretrained(saved)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("data", [3, "toy", ["toy"], {"id": 3}, {"id": "toy", "version": None}])
def test_a_card_of_another_type(data: object, saved: Path) -> None:
    change(saved, lambda content: content["card"].update({"training data": data}))
    model = exactflow.from_pretrained(saved)  # the weights are as good as before
    with pytest.raises(ValueError, match="the card's 'training data'"):
        recorded_data(model)


def test_a_card_may_say_more_or_nothing(saved: Path) -> None:
    change(saved, lambda content: content.update({"notes": [1]}))
    assert recorded_data(exactflow.from_pretrained(saved))["id"] == "toy"
    change(saved, lambda content: content.pop("card"))
    assert recorded_data(exactflow.from_pretrained(saved)) == {}


def peak() -> int:
    """Peak memory of this process in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@pytest.mark.parametrize(
    ("name", "value"),
    [("width", 10**9 * 8), ("width", 8 * 10**18), ("blocks", 10**9), ("layers_per_block", 10**18)],
)
def test_sizes_that_no_machine_has_take_no_memory(
    name: str, value: int, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "MOST_MODULES", 500)  # checked annotations are slow
    before = peak()
    with pytest.raises(ValueError, match=r"parameters|layers|cannot be built"):
        exactflow.build("tarflow-tiny", **{name: value})
    change(saved, lambda content: content["config"].update({name: value}))
    with pytest.raises(ValueError, match=r"config\.json"):
        exactflow.from_pretrained(saved)
    assert peak() - before < 2**29


def test_parts_without_numbers_are_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "MOST_MODULES", 500)
    with pytest.raises(ValueError, match="expected at most 500 layers, got more"):
        registry.without_numbers("hdit", {**hdit_fields(), "mapping_depth": 10**7}, 10**18)


def hdit_fields() -> dict[str, Any]:
    return dict(vars(registry.preset("hdit-tiny").config))


def test_weights_are_those_of_the_configuration_before_they_are_read(saved: Path) -> None:
    """A sparse file of 200 GB: its header is compared, and nothing else is read."""
    path = saved / "model.safetensors"
    shape = [5 * 10**4, 10**6]
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 2 * 10**11]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with path.open("r+b") as file:
        file.truncate(8 + len(header) + 2 * 10**11)
    before = peak()
    with pytest.raises(ValueError, match=r"model\.safetensors does not hold the weights"):
        exactflow.from_pretrained(saved)
    assert peak() - before < 2**28


def halved(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.bfloat16)


def test_numbers_of_two_types_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    state = load_file(path)
    first, *_, last = state
    save_file({**state, last: halved(state[last])}, path)
    with pytest.raises(ValueError, match=r"expected numbers of one type, got .*float.* in .* and"):
        exactflow.from_pretrained(saved)
    save_file({name: value.long() for name, value in state.items()}, path)
    with pytest.raises(ValueError, match=r"expected floating numbers, got torch\.int64"):
        exactflow.from_pretrained(saved)
    save_file({name: halved(value) for name, value in state.items()}, path)
    assert exactflow.from_pretrained(saved).dtype == torch.bfloat16
    save_file({name: v for name, v in state.items() if name != first}, path)
    with pytest.raises(ValueError, match=f"{first} of shape|expected {first}"):
        exactflow.from_pretrained(saved)


def test_pipes_are_no_weights(saved: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (saved / name).unlink()
        os.mkfifo(saved / name)
        with pytest.raises(ValueError, match="a pipe or a device"):
            exactflow.from_pretrained(saved)


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "gpu", "", "mps"])
def test_a_device_that_is_not_here_is_not_the_weights_fault(device: str, saved: Path) -> None:
    if device in ("cuda", "mps") and torch.accelerator.is_available():
        pytest.skip("such a device is here")
    with pytest.raises(ValueError, match="expected a device that is here") as caught:
        exactflow.from_pretrained(saved, device=device)
    assert "model.safetensors" not in str(caught.value)


def test_a_run_that_is_misspelt_is_not_asked_of_the_hub(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such run: 'runs/x'; runs has none"):
        exactflow.from_pretrained("runs/x")
    shutil.copytree(saved, tmp_path / "runs" / "digits")
    with pytest.raises(FileNotFoundError, match=r"did you mean 'runs/digits'"):
        exactflow.from_pretrained("runs/digit")
    with pytest.raises(FileNotFoundError, match=r"no such run: 'runs/xyz'; runs has digits"):
        exactflow.from_pretrained("runs/xyz")
    (tmp_path / "file.pth").touch()
    with pytest.raises(FileNotFoundError, match="exactflow convert"):
        exactflow.from_pretrained("file.pth")


def test_a_revision_pins_a_model_of_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(saved)

    monkeypatch.setattr(hub, "snapshot_download", download)
    exactflow.from_pretrained("somebody/model", revision="abc123")
    assert asked == [("somebody/model", "abc123")]
    with pytest.raises(ValueError, match="revision='abc123' is of a model on the hub"):
        exactflow.from_pretrained(saved, revision="abc123")


def test_a_plan_of_something_else_is_refused(saved: Path) -> None:
    for text in (
        "[" * 10**5,
        "[]",
        '{"format_version": 1, "plans": [{"blocks": [{"chosen": 3}]}]}',
    ):
        (saved / "plan.json").write_text(text)
        with pytest.raises(ValueError, match="is not a plan"):
            read_plans(saved)
