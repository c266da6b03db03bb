"""A plan of another machine or dtype is reported and not used; sampling writes no plan."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest

import exactflow
from exactflow.core.model import Flow
from exactflow.sampling import planner
from exactflow.sampling.plan import InversionPlan, keep_plans
from exactflow.sampling.planner import machine
from flows import make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a small model."""
    make("rgb").float().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def loaded(folder: Path) -> Flow:
    model = exactflow.from_pretrained(folder)
    assert isinstance(model, Flow)
    return model


def test_sampling_goes_by_no_plan_of_another_machine_and_writes_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = exactflow.sample(loaded(folder), 2)
    foreign = InversionPlan("another machine", "float32", 64, 1.0, ())
    keep_plans(folder, [foreign, replace(foreign, machine="a third one")])
    before, saved = {path: path.read_bytes() for path in folder.iterdir()}, loaded(folder)
    monkeypatch.setattr(planner, "_Probe", None)  # nothing may be measured
    for _ in range(2):  # nor is it taken for known the second time
        with pytest.warns(UserWarning, match="plan is not used: it was measured on another"):
            drawn = exactflow.sample(saved, 2)
        assert drawn.x.equal(plain.x)
        assert drawn.evaluations == plain.evaluations
    with pytest.warns(UserWarning, match=r"this is .*, float64; `exactflow plan` measures here"):
        exactflow.sample(saved.double(), 2)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_named_solvers_do_not_ask_for_the_plan(folder: Path) -> None:
    keep_plans(folder, [InversionPlan("another machine", "float32", 64, 1.0, ())])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exactflow.sample(loaded(folder), 2, solver="sequential")


def test_a_plan_of_this_machine_is_used_beside_one_of_another(folder: Path) -> None:
    model = loaded(folder)
    here = exactflow.plan(model, 2)
    keep_plans(folder, [replace(here, machine="another machine"), here])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exactflow.sample(loaded(folder), 2)
    assert here.machine == machine(model.device)
