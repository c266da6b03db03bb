"""Laws of paths: published numbers, rates, times of log-SNRs, conversions; a Gaussian oracle."""

import itertools
import json
import math
from pathlib import Path as File
from typing import final, get_args

import pytest
import torch
from torch import Tensor, nn

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
from exactflow.paths.path_model import (
    Prediction,
    combine,
    convert,
    per_sample,
    velocity_gain,
)
from oracles import PathOracle

LINEAR_BETAS = tuple((1e-4 + (0.02 - 1e-4) * i / 999) for i in range(1000))
PATHS: dict[str, Path] = {
    "straight": Straight(),
    "ot": Straight(0.01),
    "polynomial": Polynomial(3.0),
    "linear-vp": LinearVP(),
    "cosine": Cosine(),
    "vp": VariancePreserving(),
    "betas": DiscreteBetas(LINEAR_BETAS),
    "interpolated": InterpolatedCosine(64, low=32, high=64, sigma_data=0.5),
    "interpolated down": InterpolatedCosine(28, low=32, high=28, sigma_data=0.5),
}
PUBLISHED: dict[str, Path] = {
    "condot": Straight(),
    "vp": VariancePreserving(),
    "polynomial_2": Polynomial(2.0),
    "linear_vp": LinearVP(),
    "cosine": Cosine(),
}
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)

SHAPE = (1, 2, 2)
DIMS = 4
MEAN = torch.tensor([0.3, -0.2, 0.1, 0.5], dtype=torch.float64)


def covariance() -> Tensor:
    """A covariance far from a multiple of the identity."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(DIMS, DIMS, generator=generator, dtype=torch.float64)
    return 0.05 * mix @ mix.T + 0.02 * torch.eye(DIMS, dtype=torch.float64)


@final
class GaussianModel(PathOracle):
    """The ideal network for data N(MEAN, covariance())."""

    def __init__(
        self, path: Path, prediction: Prediction = "velocity", cov: Tensor | None = None
    ) -> None:
        super().__init__(path, prediction, SHAPE)
        self.mean = nn.Parameter(MEAN.clone())
        self.cov = nn.Parameter(covariance() if cov is None else cov)

    def predict(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """With y = (alpha^2 S + sigma^2 I)^-1 (x - alpha m): x0 = m + alpha S y, eps = sigma y."""
        point = self.path.at(t)
        alpha, sigma = point.alpha[:, None], point.sigma[:, None]
        cov, mean = self.cov.to(x_t), self.mean.to(x_t)
        total = alpha[..., None] ** 2 * cov + sigma[..., None] ** 2 * torch.eye(DIMS).to(x_t)
        y = torch.linalg.solve(total, x_t.flatten(1) - alpha * mean)
        x0 = (mean + alpha * (y @ cov.T)).view_as(x_t)
        return combine(x0, (sigma * y).view_as(x_t), point, self.prediction)

    def law(self, t: float) -> torch.distributions.MultivariateNormal:
        """Distribution of x_t."""
        point = self.path.at(torch.tensor(t, dtype=torch.float64))
        cov = point.alpha**2 * self.cov + point.sigma**2 * torch.eye(DIMS, dtype=torch.float64)
        return torch.distributions.MultivariateNormal(point.alpha * self.mean, cov)


@pytest.fixture(scope="module")
def schedules(golden: File) -> dict[str, Tensor]:
    return torch.load(golden / "flows" / "fm_schedules.expected.pt", weights_only=True)


@pytest.fixture(scope="module")
def published(golden: File) -> dict[str, Tensor]:
    return torch.load(golden / "flows" / "fm_paths.expected.pt", weights_only=True)


def inner_times(path: Path, count: int = 101) -> Tensor:
    """Times inside the span, off the knots of a discrete chain."""
    first, last = path.span
    return first + (last - first) * (torch.arange(count, dtype=torch.float64) + 0.37) / count


@pytest.mark.parametrize("name", PUBLISHED)
def test_golden_schedules(name: str, schedules: dict[str, Tensor], golden: File) -> None:
    cases = json.loads((golden / "flows" / "fm_schedules.json").read_text())["schedules"]
    assert cases.keys() == PUBLISHED.keys()
    path, t = PUBLISHED[name], schedules[f"{name}.t"]
    point = path.at(t)
    for field in ("alpha", "sigma", "d_alpha", "d_sigma"):
        expected = schedules[f"{name}.{field}"]
        torch.testing.assert_close(getattr(point, field), expected, rtol=1e-10, atol=1e-10)
    log_snr = 2 * schedules[f"{name}.snr"].log()
    recovered = schedules[f"{name}.t_from_snr"]
    torch.testing.assert_close(path.time_of(log_snr), recovered, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["condot", "vp"])
def test_golden_paths_and_conversions(name: str, published: dict[str, Tensor]) -> None:
    point = PUBLISHED[name].at(published["t"])
    x, said = published["x_t_given"], published["prediction"]
    alpha, sigma = per_sample(point.alpha, x), per_sample(point.sigma, x)
    d_alpha, d_sigma = per_sample(point.d_alpha, x), per_sample(point.d_sigma, x)
    ours: dict[str, Tensor] = {
        "x_t": sigma * published["x_0"] + alpha * published["x_1"],
        "dx_t": d_sigma * published["x_0"] + d_alpha * published["x_1"],
    }
    names: dict[str, Prediction] = {"x1": "x0", "epsilon": "eps", "velocity": "velocity"}
    for source, target in itertools.permutations(names, 2):
        ours[f"{target}_from_{source}"] = convert(said, x, point, names[source], names[target])
    assert {f"{name}.{key}" for key in ours} == {k for k in published if k.startswith(f"{name}.")}
    for key, value in ours.items():
        torch.testing.assert_close(value, published[f"{name}.{key}"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PATHS)
def test_rates_are_derivatives(name: str) -> None:
    t = inner_times(PATHS[name]).requires_grad_()
    point = PATHS[name].at(t)
    for value, rate in ((point.alpha, point.d_alpha), (point.sigma, point.d_sigma)):
        (expected,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(rate, expected, rtol=1e-9, atol=1e-9)
    (log_snr_rate,) = torch.autograd.grad(point.log_snr.sum(), t)
    torch.testing.assert_close(2 * point.delta / (point.alpha * point.sigma), log_snr_rate)
    assert bool((point.delta > 0).all())


@pytest.mark.parametrize("name", PATHS)
def test_time_of_inverts_the_log_snr(name: str) -> None:
    t = inner_times(PATHS[name])
    recovered = PATHS[name].time_of(PATHS[name].at(t).log_snr)
    torch.testing.assert_close(recovered, t, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", PATHS)
def test_ends(name: str) -> None:
    path = PATHS[name]
    point = path.at(torch.tensor(path.span, dtype=torch.float32))
    for value in (point.alpha, point.sigma, point.d_alpha, point.d_sigma):
        assert bool(value.isfinite().all())
    if name in ("straight", "polynomial", "cosine", "linear-vp"):
        assert float(point.alpha[0]) == 0
    if name in ("straight", "polynomial", "cosine"):
        assert float(point.sigma[1]) == 0


@pytest.mark.parametrize("name", ["linear-vp", "cosine", "vp", "betas", "interpolated"])
def test_variance_is_preserved(name: str) -> None:
    point = PATHS[name].at(inner_times(PATHS[name]))
    power = point.alpha.square() + point.sigma.square()
    torch.testing.assert_close(power, torch.ones_like(power), rtol=0, atol=1e-13)


def test_discrete_betas_pass_through_the_chain() -> None:
    path, steps = DiscreteBetas(LINEAR_BETAS), torch.arange(1000, dtype=torch.float64)
    product = torch.cumprod(1 - torch.tensor(LINEAR_BETAS, dtype=torch.float64), 0)
    t = 1 - (steps + 1) / 1000
    torch.testing.assert_close(path.at(t).alpha.square(), product, rtol=1e-12, atol=0)
    torch.testing.assert_close(path.step_of(t), steps, rtol=0, atol=1e-9)
    assert float(t[0]) == pytest.approx(path.span[1])
    assert float(t[-1]) == path.span[0]


def test_interpolated_cosine_is_shifted_at_its_ends() -> None:
    """Without a cut the log-SNR is -2 ln tan(pi (1 - t) / 2) + 2 ln(side / size)."""
    t = torch.tensor([1e-3, 0.5, 1 - 1e-3], dtype=torch.float64)
    plain = -2 * (math.pi / 2 * (1 - t)).tan().log()
    path = InterpolatedCosine(256, low=32, high=256, sigma_min=1e-9, sigma_max=1e9)
    shift = (1 - t) * 2 * math.log(32 / 256)
    torch.testing.assert_close(path.at(t).log_snr, plain + shift, rtol=1e-5, atol=1e-5)
    cut = InterpolatedCosine(256, low=32, high=256, sigma_data=0.5)
    level = torch.exp(-cut.at(torch.tensor([0.0, 1.0], dtype=torch.float64)).log_snr / 2)
    torch.testing.assert_close(level, torch.tensor([1e3, 1e-3], dtype=torch.float64))


@pytest.mark.parametrize("name", PATHS)
def test_conversions_round_trip(name: str) -> None:
    path, generator = PATHS[name], torch.Generator().manual_seed(0)
    t = inner_times(path, 20)[2:-2]
    shape = (len(t), 2, 3, 3)
    x, said = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    point = path.at(t)
    for source, target in itertools.product(PREDICTIONS, repeat=2):
        there = convert(said, x, point, source, target)
        back = convert(there, x, point, target, source)
        scale = there.abs().amax().clamp(min=1)  # what is lost between numbers of that size
        assert float((back - said).abs().max()) < 1e-12 * float(scale), (source, target)


@pytest.mark.parametrize("name", PATHS)
def test_conversions_agree_on_what_the_path_mixes(name: str) -> None:
    path, generator = PATHS[name], torch.Generator().manual_seed(0)
    t = inner_times(path, 10)
    shape = (len(t), 1, 2, 2)
    x0, eps = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    point = path.at(t)
    a, s = per_sample(point.alpha, x0), per_sample(point.sigma, x0)
    x = a * x0 + s * eps
    velocity = per_sample(point.d_alpha, x0) * x0 + per_sample(point.d_sigma, x0) * eps
    truth = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "velocity": velocity}
    for source, target in itertools.product(PREDICTIONS, repeat=2):
        got = convert(truth[source], x, point, source, target)
        torch.testing.assert_close(got, truth[target], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("source", PREDICTIONS)
def test_velocity_gain_is_the_slope_of_the_conversion(source: Prediction) -> None:
    generator = torch.Generator().manual_seed(0)
    x, said, other = (
        torch.randn(5, 1, 1, 1, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    point = VariancePreserving().at(inner_times(VariancePreserving(), 5))
    change = convert(said + other, x, point, source, "velocity")
    change = change - convert(said, x, point, source, "velocity")
    expected = per_sample(velocity_gain(point, source), other) * other
    torch.testing.assert_close(change, expected)


def test_spans_stop_short_where_a_prediction_gives_no_velocity() -> None:
    assert GaussianModel(Straight(), "velocity").span == (0.0, 1.0)
    assert GaussianModel(Straight(), "v").span == (0.0, 1.0)
    assert GaussianModel(Straight(), "x0").span == (0.0, 1 - 1e-5)
    assert GaussianModel(Straight(), "eps").span == (1e-5, 1.0)
    assert GaussianModel(VariancePreserving(), "eps").span == (0.0, 1 - 1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Straight(1.0), r"sigma_min in \[0, 1\), got 1.0"),
        (lambda: Polynomial(0.5), "at least 1, got 0.5"),
        (lambda: VariancePreserving(2.0, 1.0), "beta_min < beta_max, got 2.0, 1.0"),
        (lambda: DiscreteBetas(()), "at least one beta"),
        (lambda: DiscreteBetas((0.1, 1.0)), r"in \(0, 1\)"),
        (lambda: InterpolatedCosine(0, 32, 64), "positive size, low, high .* got 0, 32, 64"),
        (lambda: InterpolatedCosine(64, low=64, high=2), "log-SNR falls, got 64, 2"),
        (
            lambda: InterpolatedCosine(64, 32, 64, sigma_min=2.0, sigma_max=1.0),
            "sigma_min < sigma_max",
        ),
    ],
)
def test_bad_paths(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()
