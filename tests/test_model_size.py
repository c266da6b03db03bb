"""Models that are too large are refused in one sentence, before memory is allocated."""

from pathlib import Path

import pytest
import torch
from torch import nn

from exactflow.cli.cost import on_meta
from exactflow.cli.settings import resolve
from exactflow.core import building
from exactflow.models import registry

TOO_LARGE = [
    ("tarflow-tiny", {"width": 10**9}),
    ("tarflow-tiny", {"width": 10**18}),
    ("tarflow-tiny", {"num_classes": 10**12}),
    ("macow-tiny", {"hidden": (10**9, 10**9)}),
    ("denseflow-tiny", {"units": (10**9, 10**9)}),
    ("denseflow-tiny", {"growth": 10**18}),
    ("flow-matching-tiny", {"width": 10**18}),
    ("iddpm-tiny", {"diffusion_steps": 10**12}),
    ("iddpm-tiny", {"model_channels": 10**9}),
    ("hdit-tiny", {"mapping_width": 10**18}),
    ("hdit-tiny", {"num_classes": 10**18}),
]


def fields_of(preset: str) -> set[str]:
    return set(vars(registry.preset(preset).config))


@pytest.mark.parametrize(("preset", "fields"), TOO_LARGE)
def test_a_model_that_no_machine_holds_is_refused(preset: str, fields: dict) -> None:
    known = {name: value for name, value in fields.items() if name in fields_of(preset)}
    assert known == fields
    with pytest.raises(ValueError, match="expected") as caught:
        registry.build(preset, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("preset", ["tarflow-tiny", "iddpm-tiny"])
def test_too_many_layers_are_refused_while_they_are_counted(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "MOST_MODULES", 300)
    name = "blocks" if preset == "tarflow-tiny" else "num_res_blocks"
    for number in (10**7, 10**18):
        with pytest.raises(ValueError, match="at most 300 layers"):
            registry.build(preset, **{name: number})
        with pytest.raises(ValueError, match="at most 300 layers"), torch.device("meta"):
            registry.build(preset, **{name: number})
    registry.build(preset)


def test_words_and_saved_configurations_go_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "MOST_MODULES", 300)
    settings = resolve("tarflow-tiny", ["model.blocks=10000000", "data.source=digits"], None)
    with pytest.raises(ValueError, match="at most 300 layers"):
        settings.build()
    with pytest.raises(ValueError, match="at most 300 layers"):
        on_meta(settings)
    with pytest.raises(ValueError, match="at most 300 layers"):
        registry.from_config("tarflow", vars(settings.model))


def test_memory_is_compared_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "machine_memory", lambda: 100_000)
    made = []

    def make() -> nn.Module:
        made.append(torch.get_default_device().type)
        return nn.Sequential(nn.Linear(200, 200))

    with pytest.raises(ValueError, match="toy: expected at most 25,000 parameters, for which"):
        building.on_meta(make, "toy")
    assert made == ["meta"]
    monkeypatch.setattr(building, "machine_memory", lambda: None)
    assert next(building.on_meta(make, "toy").parameters()).device.type == "meta"


def test_counting_draws_no_random_numbers() -> None:
    for preset in ("tarflow-tiny", "macow-tiny", "iddpm-tiny"):
        torch.manual_seed(3)
        plain = registry.family_of(preset).model(registry.preset(preset).config)
        torch.manual_seed(3)
        for name, value in registry.build(preset).state_dict().items():
            assert torch.equal(value, plain.state_dict()[name]), name


def test_the_machine_tells_its_memory() -> None:
    memory = building.machine_memory()
    assert not Path("/proc/meminfo").exists() or (memory is not None and memory > 2**28)
