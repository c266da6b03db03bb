"""Sizes of HDiT's attention are read level by level; assumed ones are reported."""

import warnings
from typing import Any

import pytest
from torch import Tensor

from exactflow.core.config import override
from exactflow.models import registry
from exactflow.models.hdit.model import HDiT, HDiTConfig
from exactflow.models.hdit.published import from_published

SIDE, NEAR = 64, {"type": "neighborhood"}


def weights(*attention: str) -> dict[str, Tensor]:
    changes = {
        "image_shape": (3, SIDE, SIDE),
        "depths": (1,) * len(attention),
        "widths": (16,) * len(attention),
        "attention": attention,
        "head_dim": 8,
        "window_size": 8,
        "d_ff": None,
        "dropout": None,
    }
    config: HDiTConfig = override(registry.preset("hdit-tiny").config, changes)
    return dict(HDiT(config).network.state_dict())


def run_of(*attention: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A training checkpoint of k-diffusion."""
    model = {
        "type": "image_transformer_v2",
        "input_channels": 3,
        "input_size": [SIDE, SIDE],
        "patch_size": [1, 1],
        "widths": [16] * len(attention),
        "self_attns": list(attention),
        **changes,
    }
    state = weights(*(level.get("type", "global") for level in attention))
    return {"config": {"model": model}, "weights": state}


def test_a_level_that_omits_its_size_has_the_usual_one_and_not_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"one kernel_size for all levels, got \[5, 7\]"):
        from_published(**run_of({**NEAR, "kernel_size": 5}, NEAR, {"type": "global"}))
    same = from_published(**run_of({**NEAR, "kernel_size": 7}, NEAR, {"type": "global"}))
    assert same.config.kernel_size == 7
    assert from_published(**run_of(NEAR, {"type": "global"})).config.kernel_size == 7
    five = {**NEAR, "kernel_size": 5}
    stray = {"type": "global", "kernel_size": 9}  # means nothing there
    assert from_published(**run_of(five, five, stray)).config.kernel_size == 5


def test_windows_have_no_usual_size_in_a_run() -> None:
    with pytest.raises(ValueError, match="expected window_size for each level"):
        from_published(**run_of({"type": "shifted-window"}, {"type": "global"}))
    found = from_published(
        **run_of({"type": "shifted-window", "window_size": 4}, {"type": "global"})
    )
    assert found.config.window_size == 4


@pytest.mark.parametrize(
    ("kind", "name", "usual"),
    [("neighborhood", "kernel_size", 7), ("shifted-window", "window_size", 8)],
)
def test_what_bare_weights_do_not_tell_is_assumed_aloud(kind: str, name: str, usual: int) -> None:
    state, told = weights(kind, "global"), {"image_shape": (3, SIDE, SIDE)}
    told["attention"] = (kind, "global")
    with pytest.warns(UserWarning, match=f"does not tell {name} .*: took {usual}"):
        assert getattr(from_published(state, hints=told).config, name) == usual
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_published(state, hints={**told, name: usual})
        from_published(weights("global"), hints={**told, "attention": ("global",)})


@pytest.mark.parametrize(
    "changes",
    [
        {"self_attns": [3, 4]},
        {"self_attns": [{}, {}]},
        {"input_size": 16},
        {"patch_size": []},
        {"widths": None},
        {"input_channels": "3"},
        {"loss_weighting": 3},
    ],
)
def test_a_run_of_something_else_is_refused_in_one_sentence(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected"):
        from_published(**run_of(NEAR, {"type": "global"}, **changes))
    with pytest.raises(ValueError, match="expected the configuration of a run of k-diffusion"):
        from_published(weights("neighborhood", "global"), {"model": [1]})
