"""Plans: measurements decide, nothing slower than the reference is chosen, files are kept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import exactflow
from exactflow.core.model import Flow, NonFiniteError
from exactflow.core.serialization import PLAN_FILE
from exactflow.core.transform import Solver
from exactflow.models.tarflow.model import TarFlow
from exactflow.sampling import planner
from exactflow.sampling.flow_solvers import Adaptive, Sequential
from exactflow.sampling.plan import Candidate, InversionPlan, keep_plans, read_plans
from exactflow.sampling.planner import Planned
from exactflow.sampling.sample import sample
from flows import CONFIGS, make, perturb


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a small conditional model."""
    make("conditional", torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def loaded(folder: Path) -> Flow:
    model = exactflow.from_pretrained(folder)
    assert isinstance(model, Flow)
    return model


@pytest.fixture
def saved(folder: Path) -> Flow:
    """The model of the folder, as it was loaded before there was a plan."""
    return loaded(folder)


def pretend(monkeypatch: pytest.MonkeyPatch, sequential: float, adaptive: float) -> None:
    """Replace the measured seconds by given ones."""

    def shown(self: object, solver: Solver) -> float:
        return adaptive if isinstance(solver, Adaptive) else sequential

    monkeypatch.setattr(planner._Probe, "time", shown)


def test_a_plan_measures_every_block_and_says_what_it_saw(
    saved: Flow, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = exactflow.plan(saved, 3)
    assert capsys.readouterr().err == ""
    assert len(plan.blocks) == 2
    assert plan.batch_size == 3
    assert plan.dtype == "float32"
    for block in plan.blocks:
        assert str(block.chosen) in block.measured
        assert block.seconds <= block.reference_seconds
        assert block.measured["sequential, eager"].passes == 3
        assert list(block.window_seconds) == [1, 2, 4]
        assert block.frontier[-1] == 4
        assert any(name.startswith("adaptive") for name in block.measured)
        assert all(found.residual < 1e-4 for found in block.measured.values())
    assert plan.speedup >= 1


def test_what_is_faster_is_chosen(saved: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, sequential=1.0, adaptive=0.5)
    plan = exactflow.plan(saved, 2)
    assert [block.chosen.solver for block in plan.blocks] == ["adaptive"] * 2
    assert plan.speedup == 2
    assert [type(solver) for solver in plan.solvers()] == [Adaptive] * 2


@pytest.mark.parametrize("adaptive", [0.99, 1.0, 10.0])
def test_nothing_slower_than_sequential_is_chosen(
    saved: Flow, monkeypatch: pytest.MonkeyPatch, adaptive: float
) -> None:
    pretend(monkeypatch, sequential=1.0, adaptive=adaptive)
    plan = exactflow.plan(saved, 2)
    assert [block.chosen for block in plan.blocks] == [Candidate()] * 2
    assert plan.speedup == 1


def test_what_is_not_exact_is_not_chosen(saved: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast: bfloat16 is measured if the tolerance might allow it, and dropped."""
    pretend(monkeypatch, sequential=1.0, adaptive=1.0)
    tried = []
    built = Candidate.build

    def build(self: Candidate, *rest):
        tried.append(self.dtype)
        return built(self, *rest)

    monkeypatch.setattr(Candidate, "build", build)
    coarse = exactflow.plan(saved, 2, tolerance=1.1e-3)
    assert "bfloat16" in tried
    for block in coarse.blocks:
        assert not any("bfloat16" in name for name in block.measured)
    tried.clear()
    loose = exactflow.plan(saved, 2, tolerance=1.0)
    assert all(any("bfloat16" in name for name in block.measured) for block in loose.blocks)
    exactflow.plan(saved, 2)
    tried.clear()
    exactflow.plan(saved, 2)
    assert set(tried) == {None}


def test_a_plan_survives_its_file_and_is_used_by_default(
    saved: Flow, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sample(saved, 2, 1)  # no plan yet: sequential
    assert expected.iterations == (3, 3)
    pretend(monkeypatch, sequential=1.0, adaptive=0.5)
    plan = exactflow.plan(saved, 2)
    keep_plans(folder, [plan])
    saved = loaded(folder)
    assert saved.plans == read_plans(folder) == [plan]
    assert all(isinstance(solver, Adaptive) for solver in Planned().of_blocks(saved, 2, 1))
    assert all(isinstance(solver, Adaptive) for solver in Planned().of_blocks(saved, 1, 1))
    # not for more samples than were measured, nor for a smaller tolerance
    assert all(isinstance(solver, Sequential) for solver in Planned().of_blocks(saved, 3, 1))
    assert all(isinstance(solver, Sequential) for solver in Planned(1e-6).of_blocks(saved, 2, 1))
    drawn = sample(saved, 2, 1)
    assert drawn.x.equal(sample(saved, 2, 1, solver=plan.solvers()).x)
    torch.testing.assert_close(drawn.x, expected.x, rtol=0, atol=1e-4)
    assert drawn.repairs == (0, 0)
    guided = sample(saved, 2, 1, guidance=1.0)  # four rows at once
    assert guided.iterations == (3, 3)
    wider = replace(plan, batch_size=4)
    keep_plans(folder, [wider])
    assert read_plans(folder) == [plan, wider]
    keep_plans(folder, [plan])
    assert read_plans(folder) == [plan, wider]


def test_a_plan_does_not_outlive_its_weights(saved: Flow, folder: Path) -> None:
    keep_plans(folder, [exactflow.plan(saved, 1)])
    saved.save_pretrained(folder)
    assert not (folder / PLAN_FILE).exists()


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"format_version": 1}', '{"format_version": 99, "plans": []}',
     '{"format_version": 1, "plans": [{"machine": "x"}]}'],
)  # fmt: skip
def test_a_damaged_plan_is_named_and_does_not_hide_its_model(folder: Path, content: str) -> None:
    (folder / PLAN_FILE).write_text(content)
    message = r"plan\.json is not a plan .*delete it, or plan anew"
    with pytest.warns(UserWarning, match=f"no plan is used: .*{message}"):
        model = loaded(folder)
    assert sample(model, 1, 0).x.isfinite().all()
    with pytest.raises(ValueError, match=message):
        keep_plans(folder, [])
    assert (folder / PLAN_FILE).read_text() == content


def test_a_model_that_overflows_cannot_be_planned() -> None:
    model = perturb(TarFlow(CONFIGS["rgb"]))
    with torch.no_grad():
        model.blocks[0].output.bias[: model.prior.shape[1]] = 1000.0
    with pytest.raises(NonFiniteError, match="nothing to plan"):
        exactflow.plan(model, 2)
    with pytest.raises(ValueError, match="batch_size >= 1, got 0"):
        exactflow.plan(make("rgb"), 0)


@pytest.mark.parametrize("name", ["one token", "two tokens", "volume preserving"])
def test_small_and_odd_models_can_be_planned(name: str) -> None:
    plan = exactflow.plan(make(name), 2)
    assert json.loads(json.dumps(plan.blocks[0].window_seconds))
    assert isinstance(plan, InversionPlan)
