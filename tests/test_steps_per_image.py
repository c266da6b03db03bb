"""An adaptive solver chooses steps for each image; it names what it cannot solve."""

import math

import pytest
import torch
from torch import Tensor

import exactflow
from exactflow.core.model import NonFiniteError
from exactflow.likelihood.draws import Draws
from exactflow.likelihood.ode_estimate import ode_log_likelihood
from exactflow.paths.ode import Dopri5, Euler, State
from exactflow.paths.path import (
    Cosine,
    DiscreteBetas,
    InterpolatedCosine,
    LinearVP,
    Path,
    Polynomial,
    Straight,
    VariancePreserving,
)
from exactflow.paths.path_model import PathModel


def model_of(name: str, dtype: torch.dtype = torch.float32) -> PathModel:
    """A tiny model with weights away from zero."""
    torch.manual_seed(0)
    model = exactflow.build(name)
    assert isinstance(model, PathModel)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def stiff(t: Tensor, state: State) -> State:
    """Rows that need from few to very many steps."""
    rate = torch.logspace(0, 1.5, len(state[0]), dtype=t.dtype)
    return (rate * (torch.cos(rate * t) - state[0]),)


def test_rows_of_unlike_difficulty_are_solved_alike_alone() -> None:
    start = (torch.linspace(-1, 1, 3, dtype=torch.float64),)
    together = Dopri5(1e-8).solve(stiff, start, [0.0, 1.0])
    rates, passes = torch.logspace(0, 1.5, 3, dtype=torch.float64), []
    for row, rate in enumerate(rates):
        alone = Dopri5(1e-8).solve(
            lambda t, s, rate=rate: (rate * (torch.cos(rate * t) - s[0]),),
            (start[0][row : row + 1],),
            [0.0, 1.0],
        )
        torch.testing.assert_close(alone.state[0][0], together.state[0][row], rtol=0, atol=1e-13)
        passes.append(alone.evaluations)
        free = (start[0][row] - 0.5) * (-rate).exp()
        exact = 0.5 * (rate.cos() + rate.sin()) + free
        assert float((together.state[0][row] - exact).abs()) < 1e-6
    assert together.evaluations == max(passes)  # the slowest row, and no more
    assert min(passes) < max(passes) / 2


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_an_image_has_one_likelihood_whatever_its_batch(dtype: torch.dtype, close: float) -> None:
    """In nats per image; steps shared by a batch changed them by tenths."""
    model = model_of("flow-matching-tiny", dtype)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, *model.event_shape), generator=generator)
    images[2:] = images[2:] // 64  # another image than the rest
    whole = ode_log_likelihood(model, images, solver=Dopri5(1e-2))
    parts = ode_log_likelihood(model, images, None, Draws(batch_size=2), solver=Dopri5(1e-2))
    torch.testing.assert_close(parts.nats, whole.nats, rtol=0, atol=close)
    last = ode_log_likelihood(model, images[2:], None, Draws(first=2), solver=Dopri5(1e-2))
    torch.testing.assert_close(last.nats, whole.nats[2:], rtol=0, atol=close)


@pytest.mark.parametrize("name", ["flow-matching-tiny", "hdit-tiny", "iddpm-tiny"])
def test_a_sample_is_its_seeds_with_adaptive_steps(name: str) -> None:
    model = model_of(name, torch.float64)
    drawn = exactflow.sample(model, 3, solver=Dopri5(1e-2))
    alone = exactflow.sample(model, 1, seed=2, solver=Dopri5(1e-2))
    torch.testing.assert_close(alone.x[0], drawn.x[2], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["flow-matching-tiny", "iddpm-tiny", "hdit-tiny"])
def test_an_adaptive_solver_names_what_it_cannot_solve(name: str) -> None:
    model = model_of(name)
    with pytest.raises(NonFiniteError, match=r"tolerance 1e-30 for the sample of seed 7: at t = "):
        exactflow.sample(model, 2, seed=7, solver=Dopri5(1e-30))
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"for the sample of seed 7: .*not finite or too"):
        exactflow.sample(model, 2, seed=7, solver="dopri5")


def test_one_row_that_blows_up_is_named() -> None:
    start = (torch.tensor([-1.0, 0.5, 2.0]),)

    def field(t: Tensor, state: State) -> State:
        return (state[0] ** 2,)

    with pytest.raises(NonFiniteError, match=r"from t = 0\.0 to 1\.0 with tolerance 1e-05 for c"):
        Dopri5().solve(field, start, [0.0, 1.0], names="abc")
    with pytest.raises(NonFiniteError, match=r"at t = 0\.5 its step"):
        Dopri5().solve(field, start, [0.0, 1.0])


@pytest.mark.parametrize(
    "path",
    [
        Straight(),
        Polynomial(),
        LinearVP(),
        Cosine(),
        VariancePreserving(),
        DiscreteBetas((0.1, 0.2, 0.3)),
        InterpolatedCosine(32, 8, 32),
    ],
    ids=lambda path: type(path).__name__,
)
def test_a_time_that_is_no_number_gives_none(path: Path) -> None:
    t = torch.tensor([0.5, math.nan])
    point = path.at(t)
    assert point.alpha.isnan().tolist() == [False, True]
    assert path.time_of(torch.tensor([0.0, math.nan])).isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("name", "word"),
    [("tarflow-tiny", "image 5000"), ("flow-matching-tiny", "image 5000"),
     ("iddpm-tiny", "image 5000")],
)  # fmt: skip
def test_an_image_without_a_likelihood_has_the_number_of_its_set(name: str, word: str) -> None:
    torch.manual_seed(0)
    model = exactflow.build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    images = torch.zeros(2, *model.event_shape, dtype=torch.int64)
    with pytest.raises(NonFiniteError, match=word):
        exactflow.log_likelihood(model, images, first=5000)
    if isinstance(model, PathModel) and name != "iddpm-tiny":
        with pytest.raises(NonFiniteError, match=word):
            ode_log_likelihood(model, images, None, Draws(first=5000), solver=Euler(2))
