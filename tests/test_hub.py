"""Models on disk: what is saved is what is loaded, and foreign files are read or refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import exactflow
from exactflow.models import registry
from flows import NAMES, blueprint, make, some_images, some_labels


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_is_loaded_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(name, dtype)
    model.save_pretrained(tmp_path / "m")
    loaded = exactflow.from_pretrained(tmp_path / "m")
    assert loaded.config == model.config
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    x, label = some_images(model), some_labels(model)
    for got, expected in zip(loaded.encode(x, label), model.encode(x, label), strict=True):
        assert torch.equal(got, expected)


def test_config_names_its_kind_and_the_card_its_data(tmp_path: Path) -> None:
    model = make("rgb")
    card = {"training data": {"id": "digits", "fingerprint": "abc"}, "cost": {"seconds": 3}}
    model.save_pretrained(tmp_path, card=card)
    description = json.loads((tmp_path / "config.json").read_text())
    assert description["kind"] == "tarflow"
    assert description["config"]["image_shape"] == [3, 4, 4]
    text = (tmp_path / "README.md").read_text()
    assert "| fingerprint | abc |" in text
    assert "Training data" in text
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_a_run_folder_is_a_model_too(tmp_path: Path) -> None:
    make("rgb").save_pretrained(tmp_path / "run" / "model")
    assert exactflow.from_pretrained(str(tmp_path / "run")).event_shape == (3, 4, 4)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    make("rgb").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    description = json.loads(path.read_text())
    description["format_version"] = 99
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="format version 99"):
        exactflow.from_pretrained(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    make("rgb").save_pretrained(tmp_path)
    make("conditional").save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not hold the weights"):
        exactflow.from_pretrained(tmp_path)


def test_converted_files_keep_what_weights_and_name_tell(tmp_path: Path, golden: Path) -> None:
    source = golden / "tarflow" / "uncond.pth"
    named = tmp_path / "toy_model_4_64_4_2_0.05.pth"
    named.write_bytes(source.read_bytes())
    model = exactflow.convert(named)
    assert model.config.noise_std == 0.05
    assert model.config.image_shape == (3, 16, 16)
    uniform = tmp_path / "toy_model_4_64_4_2_uniform.pth"
    uniform.write_bytes(source.read_bytes())
    assert exactflow.convert(uniform).config.noise_std == 0
    wrong = tmp_path / "toy_model_2_64_4_2_uniform.pth"
    wrong.write_bytes(source.read_bytes())
    with pytest.raises(ValueError, match=r"file name says .*\(2, 64, 4, 2\)"):
        exactflow.convert(wrong)
    with pytest.warns(UserWarning, match="training noise"):
        assert exactflow.convert(source).config.noise_std == 0
    assert exactflow.convert(source, noise_std=0.0, height=8).config.image_shape == (3, 8, 32)
    state = torch.load(source, weights_only=True)
    del state["blocks.1.proj_in.bias"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"not a complete TarFlow checkpoint"):
        exactflow.convert(tmp_path / "part.pth", noise_std=0.0)


def test_every_preset_can_be_built_and_changed() -> None:
    for name in registry.names():
        model = blueprint(name)
        assert model.num_parameters > 0
        assert model.event_shape[0] in (1, 3, 4)  # 4: of an autoencoder
    changed = registry.build("tarflow-tiny", blocks=3, image_shape=[1, 4, 4], noise_std=1)
    assert len(changed.stages) == 3
    assert changed.event_shape == (1, 4, 4)
