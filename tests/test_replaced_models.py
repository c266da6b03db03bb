"""A model folder is replaced whole or not at all, for any card and at any kill."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import exactflow
from exactflow.core.model import GenerativeModel


def small(width: int, blocks: int = 2) -> GenerativeModel:
    shape = (1, 4, 4)
    return exactflow.build(
        "tarflow-tiny", image_shape=shape, blocks=blocks, width=width, head_dim=8
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def circular() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("card", "place"),
    [
        ({"validation": {"loss": math.nan}}, r"card\.validation\.loss: .*got nan"),
        ({"a": [0.0, math.inf]}, r"card\.a\[1\]: .*got inf"),
        ({"a": torch.ones(1)}, r"card\.a: .*of type Tensor"),
        ({"a": np.float32(1)}, r"card\.a: .*of type float32"),
        ({"a": {(1, 2): 3}}, r"card\.a: expected text for keys, got \(1, 2\)"),
        ({"a": circular()}, "levels of nesting"),
        ({"a": {1, 2}}, r"card\.a: .*of type set"),
        ({"path": Path("x")}, r"card\.path: .*of type"),
    ],
)
def test_a_card_that_is_no_json_replaces_nothing(card: Any, place: str, tmp_path: Path) -> None:
    small(8).save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "plan.json").write_text("{}")
    before = contents(tmp_path / "old")
    for folder in ("old", "new"):
        with pytest.raises(ValueError, match=place):
            small(16).save_pretrained(tmp_path / folder, card=card)
    assert contents(tmp_path / "old") == before
    assert not (tmp_path / "new").exists()


class Killed(BaseException):
    """Stands for a kill: code that runs after it must not change anything; see `killing`."""


def killing(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """From call number `at` on, no call changes the file system."""
    calls = [0]

    def guarded(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] >= at:
                raise Killed
            return plain(*args, **kwargs)

        return call

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))


@pytest.mark.parametrize("first", [False, True])
def test_a_kill_leaves_the_old_model_or_the_new_one(
    first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each change of the file system: config, weights and card are all old or all new."""
    old, new = small(8), small(16)
    found, at = [], 0
    while found[-1:] != ["end"]:
        at += 1
        folder = tmp_path / str(at)
        if not first:
            old.save_pretrained(folder, card={"name": "old"})
        with monkeypatch.context() as patch:
            killing(patch, at)
            try:
                new.save_pretrained(folder, card={"name": "new"})
                found.append("end")
            except Killed:
                try:
                    loaded = exactflow.from_pretrained(folder)
                except (ValueError, FileNotFoundError):
                    assert first
                    found.append("none")
                else:
                    width = loaded.config.width
                    found.append({8: "old", 16: "new"}[width])
                    expected = {"old": old, "new": new}[found[-1]]
                    for name, value in loaded.state_dict().items():
                        assert torch.equal(value, expected.state_dict()[name])
        new.save_pretrained(folder, card={"name": "last"})  # whatever was left
        assert json.loads((folder / "config.json").read_text())["card"] == {"name": "last"}
        assert {path.name for path in folder.iterdir()} == {
            *("config.json", "model.safetensors", "README.md")
        }
    kinds = sorted(set(found), key=found.index)
    assert kinds == (["none", "new", "end"] if first else ["old", "new", "end"])


def test_other_files_of_the_folder_stay_and_the_plan_goes(tmp_path: Path) -> None:
    small(8).save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "plan.json").write_text("{}")
    small(16).save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "plan.json").exists()  # it was of other weights
