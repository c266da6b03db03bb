"""A plan of another machine or dtype is reported and not used; sampling writes no plan."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest

import exactflow
from exactflow.core.model import Flow
from exactflow.core.serialization import PLAN_FILE
from exactflow.sampling import planner
from exactflow.sampling.plan import InversionPlan, keep_plans
from exactflow.sampling.planner import machine
from flows import make


@pytest.fixture
def saved(tmp_path: Path) -> Flow:
    """A small model that was loaded from a folder."""
    make("rgb").float().save_pretrained(tmp_path / "model")
    model = exactflow.from_pretrained(tmp_path / "model")
    assert isinstance(model, Flow)
    return model


def test_sampling_goes_by_no_plan_of_another_machine_and_writes_none(
    saved: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert saved.home is not None
    plain = exactflow.sample(saved, 2)
    foreign = InversionPlan("another machine", "float32", 64, 1.0, ())
    keep_plans(saved.home, [foreign, replace(foreign, machine="a third one")])
    before = {path: path.read_bytes() for path in saved.home.iterdir()}
    monkeypatch.setattr(planner, "_Probe", None)  # nothing may be measured
    for _ in range(2):  # nor is it taken for known the second time
        with pytest.warns(UserWarning, match=r"plan\.json is not used: it was measured on another"):
            drawn = exactflow.sample(saved, 2)
        assert drawn.x.equal(plain.x)
        assert drawn.evaluations == plain.evaluations
    with pytest.warns(UserWarning, match=r"this is .*, float64; `exactflow plan` measures here"):
        exactflow.sample(saved.double(), 2)
    assert {path: path.read_bytes() for path in saved.home.iterdir()} == before


def test_named_solvers_do_not_ask_for_the_plan(saved: Flow) -> None:
    assert saved.home is not None
    keep_plans(saved.home, [InversionPlan("another machine", "float32", 64, 1.0, ())])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exactflow.sample(saved, 2, solver="sequential")


def test_a_plan_of_this_machine_is_used_beside_one_of_another(saved: Flow) -> None:
    assert saved.home is not None
    here = planner.make_plan(saved, 2)
    keep_plans(saved.home, [replace(here, machine="another machine"), here])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exactflow.sample(saved, 2)
    assert here.machine == machine(saved.device)
    assert (saved.home / PLAN_FILE).is_file()
