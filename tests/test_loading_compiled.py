"""Loading of compiled steps is timed separately, and only done if it saves time."""

from dataclasses import replace

import pytest

import exactflow
from exactflow.core.model import Flow
from exactflow.nn import compiled
from exactflow.sampling.flow_solvers import Sequential
from exactflow.sampling.plan import BlockPlan, Candidate, InversionPlan
from exactflow.sampling.planner import Planned, machine
from flows import make

pytestmark = pytest.mark.skipif(not compiled.available(), reason="the extra `fast` is not here")
COMPILED = Candidate(step="compiled")


def plan_of(model: Flow, reference: float, seconds: float, chosen: Candidate) -> InversionPlan:
    """A plan of two blocks with these seconds."""
    block = BlockPlan(chosen, reference / 2, seconds / 2, {}, (), {})
    return InversionPlan(machine(model.device), "float32", 4, 1.0, (block, block))


@pytest.fixture
def model() -> Flow:
    return make("rgb").float()


def steps(model: Flow, batches: int) -> set[str]:
    solvers = Planned(1.0).of_blocks(model, 4, batches)
    return {solver.decoding.step for solver in solvers if isinstance(solver, Sequential)}


def test_a_short_call_does_not_load_what_it_does_not_earn(
    model: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.plans = [plan_of(model, 0.5, 0.1, COMPILED)]  # wins 0.4 s in a batch
    monkeypatch.setattr(compiled, "_seconds_loading", 0.0)
    assert [steps(model, n) for n in (1, 2, 3)] == [{"eager"}, {"eager"}, {"compiled"}]
    monkeypatch.setattr(compiled, "_seconds_loading", 0.7)  # it is there: it costs nothing more
    assert steps(model, 1) == {"compiled"}


def test_what_a_plan_must_draw_to_earn_its_loading() -> None:
    model = make("rgb")
    assert plan_of(model, 0.5, 0.1, COMPILED).batches_to_earn(1.0) == 3
    assert plan_of(model, 3.0, 0.1, COMPILED).batches_to_earn(1.0) == 1
    assert plan_of(model, 0.5, 0.5, COMPILED).batches_to_earn(1.0) > 10**9
    assert plan_of(model, 0.5, 0.1, Candidate()).batches_to_earn(1.0) == 1  # nothing to load


def test_loading_is_no_part_of_the_seconds(model: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = exactflow.sample(model, 4)
    assert eager.loading == 0
    model.plans = [plan_of(model, 9.0, 0.1, COMPILED)]
    monkeypatch.setattr(compiled, "_seconds_loading", 0.0)
    compiled._kernels.cache_clear()
    first = exactflow.sample(model, 4, solver=Planned(1.0))
    assert first.loading == compiled.seconds_loading() > 0
    assert first.seconds > 0
    again = exactflow.sample(model, 4, solver=Planned(1.0))
    assert again.loading == 0
    assert again.x.equal(first.x)
    assert replace(again, loading=1.0).loading == 1.0
