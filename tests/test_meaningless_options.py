"""Options that a model or solver does not have are refused, for paths and flows."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import exactflow
from exactflow.core.model import GenerativeModel, NonFiniteError
from exactflow.likelihood.draws import Draws
from exactflow.likelihood.ode_estimate import Hutchinson, ode_log_likelihood
from exactflow.paths.ode import Dopri5, Euler, Heun
from exactflow.paths.path_model import PathModel
from exactflow.sampling.denoiser import ClassifierGuidance
from exactflow.sampling.flow_solvers import Sequential
from exactflow.sampling.guidance import Guidance
from exactflow.sampling.path_solvers import DDIM, Ancestral
from exactflow.sampling.request import SamplingOptions
from exactflow.sampling.solvers import solver_for


@pytest.fixture(scope="module")
def models() -> dict[str, GenerativeModel]:
    torch.manual_seed(0)
    return {
        "flow": exactflow.build("tarflow-tiny", num_classes=2),
        "path": exactflow.build("flow-matching-tiny", num_classes=2),
        "chain": exactflow.build("iddpm-tiny", num_classes=2),
        "levels": exactflow.build("hdit-tiny"),
    }


LOW, BY_CLASSIFIER = torch.zeros(1, 1, 2, 2), ClassifierGuidance(lambda x, t: x.flatten(1), 1.0)
NO_MEANING: list[tuple[str, dict[str, Any], str]] = [
    ("chain", {"steps": 21}, r"expected 2 \.\. 20 steps of this chain, got 21"),
    ("chain", {"solver": "ddim", "steps": 21}, r"expected 2 \.\. 20 steps of this chain, got 21"),
    ("chain", {"steps": 0}, r"expected 2 \.\. 20 steps of this chain, got 0"),
    ("chain", {"tolerance": 1e-3}, "tolerance has no meaning for the solver 'ancestral'"),
    ("chain", {"guidance": -1.0, "label": 0}, "expected a finite guidance scale >= 0, got -1"),
    ("path", {"steps": 0}, "expected steps >= 1, got 0"),
    ("path", {"solver": "heun", "tolerance": 1e-3}, "tolerance has no meaning .* 'heun'"),
    ("path", {"solver": "heun", "tolerance": 0.0}, "tolerance has no meaning .* 'heun'"),
    ("path", {"solver": "dopri5", "tolerance": 0.0}, "expected tolerance > 0, got 0"),
    ("path", {"solver": "dopri5", "steps": 9}, "steps has no meaning for the solver 'dopri5'"),
    ("path", {"guidance": -1.0, "label": 0}, "expected a finite guidance scale >= 0, got -1"),
    ("path", {"guidance": math.inf, "label": 0}, "expected a finite guidance scale >= 0, got inf"),
    (
        "path",
        {"options": SamplingOptions(temperature=0.5)},
        "temperature has no meaning for this model",
    ),
    ("path", {"guidance": Guidance(1.0, rule="gaussian-score")}, "guidance rule 'gaussian-score'"),
    ("path", {"guidance": Guidance(1.0, schedule="constant")}, "guidance schedule 'constant'"),
    ("chain", {"guidance": Guidance(0.0, temperature=0.3)}, "guidance temperature 0.3 has no"),
    ("levels", {"tolerance": 1e-3}, "tolerance has no meaning for the solver 'dpm\\+\\+'"),
    ("flow", {"steps": 0}, "steps has no meaning for this model"),
    ("flow", {"tolerance": -1.0}, "expected a finite tolerance >= 0, got -1"),
    ("flow", {"tolerance": math.nan}, "expected a finite tolerance >= 0, got nan"),
    ("flow", {"eta": 0.5}, "eta has no meaning for this model"),
    ("chain", {"eta": 0.5}, "eta has no meaning for the solver 'ancestral'"),
    ("path", {"eta": 0.5}, "eta has no meaning for this model"),
    ("flow", {"solver": "sequential", "tolerance": 0.1}, "tolerance has no .* 'sequential'"),
    ("path", {"solver": DDIM(5)}, r"expected solver auto \| euler .*, got DDIM\(steps=5"),
    ("flow", {"solver": Heun(5)}, r"expected solver auto \| sequential .*, got Heun\(steps=5\)"),
    ("path", {"solver": Sequential()}, r"expected solver auto \| euler .*, got Sequential"),
    ("flow", {"options": SamplingOptions(low=LOW)}, "low has no meaning for this model"),
    ("flow", {"guidance": BY_CLASSIFIER, "label": 0}, "a flow is not guided by a classifier"),
    ("path", {"guidance": BY_CLASSIFIER, "label": 0}, "the solver ancestral or ddim, got Heun"),
    ("flow", {"guidance": math.inf, "label": 0}, "expected a finite guidance scale >= 0"),
]


@pytest.mark.parametrize(("kind", "options", "message"), NO_MEANING)
def test_what_has_no_meaning_is_refused(
    kind: str, options: dict[str, Any], message: str, models: dict[str, GenerativeModel]
) -> None:
    owned = {k: v for k, v in options.items() if k in ("steps", "tolerance", "eta")}
    others = {k: v for k, v in options.items() if k not in ("solver", *owned)}

    def draw() -> None:
        solver = options.get("solver", "auto")
        if isinstance(solver, str):
            solver = solver_for(models[kind], solver, **owned)
        exactflow.sample(models[kind], 1, solver=solver, **others)

    with pytest.raises(ValueError, match=message):
        draw()


def test_what_has_one_meaning_may_be_said_in_both_ways(models: dict[str, GenerativeModel]) -> None:
    """A guidance scale, or a rule that has only a scale."""
    plain = exactflow.sample(models["path"], 1, 0, guidance=1.5, solver=Euler(2))
    ruled = exactflow.sample(models["path"], 1, 0, guidance=Guidance(1.5), solver=Euler(2))
    assert torch.equal(plain.x, ruled.x)
    whole = exactflow.sample(models["chain"], 1, 0)
    assert torch.equal(exactflow.sample(models["chain"], 1, 0, solver=Ancestral(20)).x, whole.x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: {"solver": Heun(0)}, "expected steps >= 1, got 0"),
        (lambda: {"solver": Dopri5(0.0)}, "expected tolerance > 0, got 0"),
        (lambda: {"trace": Hutchinson(probes=0)}, "probes of at least 1"),
        (lambda: {"draws": Draws(k=0)}, "k >= 1"),
    ],
)
def test_an_estimate_refuses_them_too(
    options: Callable[[], dict[str, Any]], message: str, models: dict[str, GenerativeModel]
) -> None:
    model = models["path"]
    assert isinstance(model, PathModel)
    images = torch.zeros(1, *model.event_shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=re.escape(message)):
        ode_log_likelihood(model, images, **options())


@pytest.mark.parametrize(
    ("kind", "solver"),
    [("path", "euler"), ("path", "dopri5"), ("chain", "ancestral"), ("chain", "dopri5")],
)
def test_a_sample_that_fails_is_left_out_where_that_is_asked_for(
    kind: str, solver: str, models: dict[str, GenerativeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`on_nonfinite` had no effect on paths: a sample grid ended the training run."""
    model = models[kind]
    owned: dict[str, Any] = {"tolerance": 1e-2} if solver == "dopri5" else {"steps": 3}
    settings: dict[str, Any] = {"seed": 5, "batch_size": 2}
    settings["solver"] = solver_for(model, solver, **owned)
    labels = torch.tensor([0, 1, 0])
    whole = exactflow.sample(model, 3, labels, **settings)

    def broken(
        network: torch.nn.Module, given: tuple[Any, ...], said: torch.Tensor
    ) -> torch.Tensor:
        """NaN for class 1, whose only sample has seed 6."""
        return said.masked_fill((given[2] == 1).view(-1, 1, 1, 1), math.nan)

    handle = model.get_submodule("network").register_forward_hook(broken)
    try:
        with pytest.raises(NonFiniteError, match="sample of seed 6"):
            exactflow.sample(model, 3, labels, **settings)
        drawn = exactflow.sample(
            model, 3, labels, **settings, options=SamplingOptions(on_nonfinite="omit")
        )
    finally:
        handle.remove()
    assert drawn.seeds == (5, 7)
    assert drawn.failures == {6: "the image"}
    assert drawn.label is not None
    assert drawn.label.tolist() == [0, 0]
    torch.testing.assert_close(drawn.x, whole.x[[0, 2]], rtol=0, atol=1e-5)
