"""Solvers against published numbers and orders; the ODE likelihood against closed forms."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path as File
from typing import final

import pytest
import torch
from torch import Tensor, nn

from exactflow.core import grey_levels as grey
from exactflow.core.model import NonFiniteError
from exactflow.core.randomness import generator
from exactflow.likelihood import ode_estimate
from exactflow.likelihood.draws import Draws
from exactflow.likelihood.ode_estimate import (
    ExactTrace,
    Hutchinson,
    ode_log_likelihood,
    with_divergence,
)
from exactflow.paths.ode import (
    ODE_SOLVERS,
    Dopri5,
    Euler,
    Field,
    FixedSteps,
    Heun,
    Midpoint,
    OdeMethod,
    OdeSolver,
    Solution,
    State,
    edm_times,
    uniform_times,
)
from exactflow.paths.path import Polynomial, Straight, VariancePreserving
from exactflow.paths.path_model import PathModel, Prediction
from oracles import PathOracle
from test_paths import DIMS, PATHS, SHAPE, GaussianModel, covariance

FIXED: dict[OdeMethod, int] = {"euler": 1, "midpoint": 2, "heun": 2}  # their orders


@final
class LinearField(PathOracle):
    """v(x, t) = (cos(2 t) M + t M M) x, the golden field; with one_rate, v = M x."""

    def __init__(self, matrix: Tensor, shape: tuple[int, int, int], one_rate: bool = False) -> None:
        super().__init__(Straight(), "velocity", shape)
        self.matrix, self.one_rate = nn.Parameter(matrix), one_rate

    def predict(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        m, flat = self.matrix, x_t.flatten(1)
        if self.one_rate:
            return (flat @ m.T).view_as(x_t)
        t = t[:, None]
        moved = torch.cos(2 * t) * (flat @ m.T) + t * (flat @ (m @ m).T)
        return moved.view_as(x_t)


@pytest.fixture(scope="module")
def published(golden: File) -> dict[str, Tensor]:
    return torch.load(golden / "flows" / "fm_ode.expected.pt", weights_only=True)


def stepped(step: float) -> list[float]:
    """0, h, 2h, .., the last step shortened to end at 1."""
    return [i * step for i in range(math.ceil(1 / step - 1e-9))] + [1.0]


def velocity(model: PathModel) -> ode_estimate.Field:
    def field(t: Tensor, state: State) -> State:
        return (model.velocity(state[0], t),)

    return field


def solve(field: Field, state: State, times: Sequence[float], solver: OdeMethod) -> Solution:
    """Solve with fixed steps between these times."""
    return ODE_SOLVERS[solver](len(times) - 1).solve(field, state, times)


def log_density(x: Tensor) -> Tensor:
    return torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1)


GRIDS: list[tuple[OdeMethod, float]] = [
    ("euler", 0.1),
    ("euler", 0.3),
    ("midpoint", 0.1),
    ("midpoint", 0.25),
]


@pytest.mark.parametrize(("solver", "step"), GRIDS)
def test_golden_fixed_steps(solver: OdeMethod, step: float, published: dict[str, Tensor]) -> None:
    model, times = LinearField(published["M"], (3, 2, 2)), stepped(step)
    name = f"{solver}.step_{step}"
    forward = solve(velocity(model), (published["x_0"],), times, solver)
    torch.testing.assert_close(forward.state[0], published[f"{name}.x_1"], rtol=1e-10, atol=1e-10)
    back = [1 - t for t in times]  # a shortened step comes last both ways
    start = (published["x_1"], torch.zeros(4, 1, dtype=torch.float64))
    x, log_det = solve(with_divergence(model, None, None), start, back, solver).state
    torch.testing.assert_close(x, published[f"{name}.x_0"], rtol=1e-10, atol=1e-10)
    got = log_density(x) + log_det[:, 0]
    torch.testing.assert_close(got, published[f"{name}.log_prob"], rtol=1e-10, atol=1e-10)
    assert forward.evaluations == FIXED[solver] * (len(times) - 1)


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_golden_time_grid(solver: OdeMethod, published: dict[str, Tensor]) -> None:
    model, grid = LinearField(published["M"], (3, 2, 2)), published["time_grid"].tolist()
    for stop in range(2, len(grid) + 1):
        got = solve(velocity(model), (published["x_0"],), grid[:stop], solver).state[0]
        expected = published[f"{solver}.on_time_grid.path"][stop - 1]
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_golden_hutchinson(published: dict[str, Tensor], golden: File) -> None:
    (key,) = (k for k in published if k.startswith("hutchinson.midpoint"))
    step = float(key.removeprefix("hutchinson.midpoint.step_").removesuffix(".log_prob"))
    model = LinearField(published["M"], (3, 2, 2))
    field = with_divergence(model, None, published["hutchinson.probe"][None])
    start = (published["x_1"], torch.zeros(4, 1, dtype=torch.float64))
    x, log_det = solve(field, start, [1 - t for t in stepped(step)], "midpoint").state
    got = log_density(x) + log_det[:, 0]
    torch.testing.assert_close(got, published[key], rtol=1e-10, atol=1e-10)
    error = json.loads((golden / "flows" / "fm_ode.json").read_text())["error_against_closed_form"]
    exact = published["hutchinson.exact_log_prob"]
    assert float((got - exact).abs().max()) == pytest.approx(error["hutchinson"], rel=1e-6)


@pytest.mark.parametrize("tolerance", [1e-5, 1e-10])
def test_golden_dopri5(tolerance: float, published: dict[str, Tensor]) -> None:
    """Against the closed form, since adaptive solvers differ in their digits."""
    model = LinearField(published["M"], (3, 2, 2))
    start = (published["x_0"],)
    got = Dopri5(tolerance).solve(velocity(model), start, [0.0, 1.0]).state[0]
    slack = 100 * tolerance
    torch.testing.assert_close(got, published["exact.x_1_from_x_0"], rtol=slack, atol=slack)
    state = (published["x_1"], torch.zeros(4, 1, dtype=torch.float64))
    field = with_divergence(model, None, None)
    x, log_det = Dopri5(tolerance).solve(field, state, [1.0, 0.0]).state
    torch.testing.assert_close(x, published["exact.x_0_from_x_1"], rtol=slack, atol=slack)
    torch.testing.assert_close(
        log_density(x) + log_det[:, 0], published["exact.log_prob"], rtol=slack, atol=slack
    )


@pytest.mark.parametrize("solver", FIXED)
def test_solver_order(solver: OdeMethod, published: dict[str, Tensor]) -> None:
    """The slope of log error over log step is the order, for point and log-density."""
    model = LinearField(published["M"], (3, 2, 2))
    steps = [20, 40, 80, 160]
    errors: list[list[float]] = []
    for count in steps:
        start = (published["x_1"], torch.zeros(4, 1, dtype=torch.float64))
        field = with_divergence(model, None, None)
        x, log_det = solve(field, start, uniform_times(count, 1.0, 0.0), solver).state
        point = (x - published["exact.x_0_from_x_1"]).abs().max()
        change = log_det[:, 0] + published["exact.integral_of_divergence"]
        errors.append([math.log(float(point)), math.log(float(change.abs().max()))])
    h = -torch.tensor(steps, dtype=torch.float64).log()
    h = h - h.mean()
    slopes = (h[:, None] * torch.tensor(errors, dtype=torch.float64)).sum(0) / h.square().sum()
    assert slopes[0] == pytest.approx(FIXED[solver], abs=0.15)
    assert slopes[1] >= FIXED[solver] - 0.15  # a quadrature may be better than its trajectory


@pytest.mark.parametrize("solver", FIXED)
def test_samples_do_not_depend_on_their_batch(solver: OdeMethod) -> None:
    model, x = GaussianModel(Straight()), torch.randn(5, *SHAPE, dtype=torch.float64)
    times = uniform_times(7)
    together = solve(velocity(model), (x,), times, solver).state[0]
    alone = torch.cat([solve(velocity(model), (row[None],), times, solver).state[0] for row in x])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-13)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0), (0.2, 0.7)])
def test_dopri5_stays_within_its_times_and_counts(ends: tuple[float, float]) -> None:
    asked: list[Tensor] = []

    def field(t: Tensor, state: State) -> State:
        asked.append(t)
        return (torch.sin(5 * state[0]) + t,)

    solution = Dopri5(1e-6).solve(field, (torch.ones(3, dtype=torch.float64),), ends)
    assert float(torch.cat(asked).min()) >= min(ends)
    assert float(torch.cat(asked).max()) <= max(ends)
    assert solution.evaluations == len(asked) > 6


def test_dopri5_fails_with_words() -> None:
    with pytest.raises(NonFiniteError, match=r"from t = 0\.0 to 1\.0 with tolerance 1e-05"):
        Dopri5().solve(lambda t, state: (state[0] ** 2,), (torch.full((1,), 2.0),), [0.0, 1.0])


def test_time_grids() -> None:
    assert uniform_times(4) == [0, 0.25, 0.5, 0.75, 1]
    assert uniform_times(2, 1.0, 0.5) == [1.0, 0.75, 0.5]
    times = edm_times(Straight(), 50)
    assert len(times) == 51
    assert times[0] == pytest.approx(1 / 81)
    assert times[-2:] == [pytest.approx(1 / 1.002), 1.0]
    assert all(a < b for a, b in itertools.pairwise(times))
    middle = (0.5 * (80 ** (1 / 7) + 0.002 ** (1 / 7))) ** 7
    assert edm_times(Straight(), 3)[1] == pytest.approx(1 / (1 + middle))
    level = edm_times(VariancePreserving(), 3)
    point = VariancePreserving().at(torch.tensor(level[:3], dtype=torch.float64))
    expected = torch.tensor([80, middle, 0.002], dtype=torch.float64)
    torch.testing.assert_close(point.sigma / point.alpha, expected)
    with pytest.raises(ValueError, match="noise levels within the path's"):
        edm_times(Straight(0.1), 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Euler(2).solve(lambda t, s: s, (torch.ones(1),), [0.0, 1.0, 0.5]),
            "rising or falling",
        ),
        (lambda: Euler(1).solve(lambda t, s: s, (torch.ones(1),), [0.0]), "expected 2 times"),
        (
            lambda: Dopri5(0.0).solve(lambda t, s: s, (torch.ones(1),), [0.0, 1.0]),
            "tolerance > 0, got 0.0",
        ),
        (lambda: uniform_times(0), "at least one step, got 0"),
        (lambda: edm_times(Straight(), 5, 1.0, 2.0), "sigma_max > sigma_min"),
    ],
)
def test_bad_ode(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("prediction", ["velocity", "v", "x0", "eps"])
@pytest.mark.parametrize("name", ["straight", "ot", "polynomial", "cosine", "vp", "linear-vp"])
def test_sampler_reproduces_the_gaussian(name: str, prediction: Prediction) -> None:
    """The flow of a Gaussian is affine: its mean and covariance follow from DIMS + 1 points."""
    model = GaussianModel(PATHS[name], prediction)
    first, last = model.span
    basis = torch.cat([torch.zeros(1, DIMS), torch.eye(DIMS)]).double().view(-1, *SHAPE)
    ends = Dopri5(1e-9).solve(velocity(model), (basis,), [first, last]).state[0].flatten(1)
    offset, linear = ends[0], (ends[1:] - ends[0]).T
    torch.testing.assert_close(offset, model.mean.detach(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(linear @ linear.T, model.cov.detach(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["straight", "ot", "polynomial", "cosine", "vp", "linear-vp"])
def test_estimate_meets_the_density(name: str) -> None:
    """With the exact trace: the closed form, less the prior's error at the noise end."""
    model = GaussianModel(PATHS[name])
    images = torch.randint(16, (6, *SHAPE), generator=torch.Generator().manual_seed(0))
    result = ode_log_likelihood(
        model, images, None, Draws(seed=4), solver=Dopri5(1e-9), trace=ExactTrace()
    )
    noise = [
        torch.rand(*SHAPE, generator=generator(4, "score", i, 0), dtype=torch.float64)
        for i in range(6)
    ]
    x = grey.dequantize(images, torch.stack(noise), 16)
    first, last = model.span
    z = Dopri5(1e-9).solve(velocity(model), (x,), [last, first]).state[0]
    gap = model.law(first).log_prob(z.flatten(1)) - log_density(z)
    expected = (model.law(last).log_prob(x.flatten(1)) - gap - DIMS * math.log(8)).detach()
    torch.testing.assert_close(result.nats, expected, rtol=0, atol=2e-5)
    assert bool((gap.abs().max() > 1e-4) == (name == "vp"))
    drift = model.law(first).log_prob(x.flatten(1)) - model.law(last).log_prob(x.flatten(1))
    assert float(drift.detach().abs().min()) > 0.1  # the divergence is felt
    facts = result.details
    assert (facts["prior_gap"] > 1e-5) == (name == "vp")
    assert (facts["probes"], facts["probe"], facts["probe_standard_error"]) == (DIMS, None, 0.0)
    assert facts["evaluations"] > 50
    assert result.bits_per_dim == pytest.approx(-float(expected.mean()) / (4 * math.log(2)), 1e-3)


def test_sign_of_the_divergence() -> None:
    """v = a x: x(0) = x e^-a, and ln p falls by a D."""
    rate, dims = 0.7, 12
    model = LinearField(rate * torch.eye(dims, dtype=torch.float64), (3, 2, 2), one_rate=True)
    images = torch.randint(16, (3, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    result = ode_log_likelihood(model, images, solver=Dopri5(1e-9))
    noise = [
        torch.rand(3, 2, 2, generator=generator(0, "score", i, 0), dtype=torch.float64)
        for i in range(3)
    ]
    x = grey.dequantize(images, torch.stack(noise), 16)
    expected = log_density(x * math.exp(-rate)) - rate * dims - dims * math.log(8)
    torch.testing.assert_close(result.nats, expected, rtol=0, atol=1e-6)


def test_hutchinson_is_exact_for_a_diagonal_jacobian() -> None:
    model = GaussianModel(Straight(), cov=torch.diag(torch.tensor([0.1, 0.2, 0.3, 0.4])).double())
    images = torch.randint(16, (4, *SHAPE), generator=torch.Generator().manual_seed(0))
    grid = Midpoint(20)
    exact = ode_log_likelihood(model, images, solver=grid, trace=ExactTrace())
    probed = ode_log_likelihood(model, images, solver=grid, trace=Hutchinson(probes=2))
    torch.testing.assert_close(probed.nats, exact.nats, rtol=0, atol=1e-10)
    assert probed.details["probe_standard_error"] < 1e-10
    gaussian = ode_log_likelihood(model, images, solver=grid, trace=Hutchinson("gaussian", 2))
    assert float((gaussian.nats - exact.nats).abs().min()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_and_knows_its_error(probe: ode_estimate.Probe) -> None:
    model = GaussianModel(Polynomial(2.0))
    images = torch.randint(16, (8, *SHAPE), generator=torch.Generator().manual_seed(0))
    grid = Heun(8)
    exact = ode_log_likelihood(model, images, solver=grid, trace=ExactTrace())

    def errors(probes: int) -> tuple[Tensor, Tensor]:
        """Error of the probes for each image, and their standard error."""
        nats, known = [], []
        for index in range(len(images)):
            draws, trace = Draws(first=index), Hutchinson(probe, probes)
            one = images[index : index + 1]
            found = ode_log_likelihood(model, one, None, draws, solver=grid, trace=trace)
            nats.append(found.nats)
            known.append(found.details["probe_standard_error"] * DIMS * math.log(2))
        return torch.cat(nats) - exact.nats, torch.tensor(known)

    off, many = errors(400)
    z = off / many
    assert float(z.abs().max()) < 4
    assert 0.3 < float(z.std()) < 2
    _, few = errors(100)
    assert float((few / many).mean()) == pytest.approx(2, rel=0.2)
    whole = ode_log_likelihood(model, images, solver=grid, trace=Hutchinson(probe, 400))
    assert whole.details["probe_standard_error"] < whole.standard_error


def test_estimate_rises_with_k_on_average() -> None:
    model = GaussianModel(Straight())
    images = torch.randint(16, (64, *SHAPE), generator=torch.Generator().manual_seed(0))
    nats = [
        float(
            ode_log_likelihood(
                model, images, None, Draws(k), solver=Heun(10), trace=ExactTrace()
            ).nats.mean()
        )
        for k in (1, 4, 16)
    ]
    assert nats[0] < nats[1] < nats[2]


@pytest.mark.slow
@pytest.mark.parametrize("solver", [Heun(10), Dopri5(1e-7)])
def test_estimate_is_a_function_of_seed_and_index(solver: OdeSolver) -> None:
    model = GaussianModel(Straight())
    images = torch.randint(16, (7, *SHAPE), generator=torch.Generator().manual_seed(0))
    draws, how = Draws(k=2), {"solver": solver, "trace": Hutchinson(probes=3)}
    whole = ode_log_likelihood(model, images, None, draws, **how)
    parts = ode_log_likelihood(model, images, None, replace(draws, batch_size=2), **how)
    other = ode_log_likelihood(model, images, None, replace(draws, seed=1), **how)
    torch.testing.assert_close(whole.nats, parts.nats, rtol=0, atol=1e-10)
    assert float((whole.nats - other.nats).abs().min()) > 1e-3
    facts = whole.details
    if isinstance(solver, FixedSteps):
        evaluations = facts["evaluations"], parts.details["evaluations"]
        assert evaluations == pytest.approx((2 * 2 * 10, 2 * 2 * 10))
    assert (facts["steps"], facts["tolerance"]) == (solver.steps, solver.tolerance)


def test_estimate_names_its_ends() -> None:
    images = torch.full((2, *SHAPE), 15)
    vp = ode_log_likelihood(GaussianModel(VariancePreserving()), images, solver=Euler(2)).details
    ends = VariancePreserving().at(torch.tensor([0.0, 1 - 1e-5], dtype=torch.float64))
    assert vp["blur"] == pytest.approx(float(ends.sigma[1] / ends.alpha[1]))
    alpha, variance = float(ends.alpha[0]), float(ends.sigma[0]) ** 2
    kl = 0.5 * DIMS * ((alpha * 15 / 16) ** 2 + variance - 1 - math.log(variance))
    assert vp["prior_gap"] == pytest.approx(kl, rel=1e-6)
    blurred = ode_log_likelihood(GaussianModel(Straight(0.01)), images, solver=Euler(2)).details
    assert (blurred["prior_gap"], blurred["blur"]) == (0.0, pytest.approx(0.01))


def test_estimate_of_a_uniform_model_is_what_the_prior_says() -> None:
    """Velocity 0: the density is that of the prior, and a grey level's volume enters once."""
    model = LinearField(torch.zeros(4, 4, dtype=torch.float64), SHAPE, one_rate=True)
    images = torch.randint(16, (2, *SHAPE), generator=torch.Generator().manual_seed(0))
    result = ode_log_likelihood(model, images, None, Draws(k=200), solver=Euler(1))
    edges = torch.linspace(-1, 1, 17, dtype=torch.float64)
    mass = torch.distributions.Normal(0.0, 1.0).cdf(edges).diff().log()
    expected = mass[images].flatten(1).sum(1)
    torch.testing.assert_close(result.nats, expected, rtol=0, atol=0.03)


def test_scoring_restores_the_mode_and_names_what_is_not_finite() -> None:
    model = GaussianModel(Straight(), cov=covariance() * math.nan).train()
    images = torch.zeros(2, *SHAPE, dtype=torch.int64)
    with pytest.raises(NonFiniteError, match="image 0 is nan"):
        ode_log_likelihood(model, images, solver=Euler(2))
    assert model.training
