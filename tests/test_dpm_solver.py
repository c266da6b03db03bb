"""DPM-Solver++(2M): its order and its end point on a Gaussian oracle; sample by sample."""

import itertools
import math
from collections.abc import Sequence
from typing import final

import pytest
import torch
from torch import Tensor

from exactflow.core.model import GenerativeModel
from exactflow.paths.ode import edm_times
from exactflow.paths.path import (
    Cosine,
    InterpolatedCosine,
    LinearVP,
    Path,
    Straight,
    VariancePreserving,
)
from exactflow.paths.path_model import PathModel
from exactflow.sampling.denoiser import Denoiser
from exactflow.sampling.path_solvers import DPMSolver
from oracles import PathOracle

MEAN, STD = 0.3, torch.tensor([0.05, 0.5, 1.5], dtype=torch.float64).view(3, 1, 1)
PATHS: dict[str, Path] = {
    "straight": Straight(),
    "vp": VariancePreserving(),
    "linear-vp": LinearVP(),
    "cosine": Cosine(),
    "interpolated": InterpolatedCosine(64, low=32, high=64, sigma_data=0.5),
}


@final
class Oracle(PathOracle):
    """Data N(MEAN, STD^2), whose posterior mean and flow are known."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "x0", (3, 1, 1))
        self.batches: list[int] = []

    def predict(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.batches.append(len(x_t))
        point = self.path.at(t)
        alpha, sigma = point.alpha.view(-1, 1, 1, 1), point.sigma.view(-1, 1, 1, 1)
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return MEAN + gain * (x_t - alpha * MEAN)

    def flow(self, x: Tensor, first: float, last: float) -> Tensor:
        """Where the probability flow takes x: Gaussians keep their standardised value."""
        (a, b), (c, d) = (
            (float(p.alpha), float(p.sigma))
            for p in (self.path.at(torch.tensor(t, dtype=torch.float64)) for t in (first, last))
        )
        ratio = ((c**2 * STD**2 + d**2) / (a**2 * STD**2 + b**2)).sqrt()
        return c * MEAN + ratio * (x - a * MEAN)


def follow(model: PathModel, x: Tensor, times: Sequence[float]) -> Tensor:
    """Solve along these times."""
    return DPMSolver(len(times) - 1).solve(Denoiser(model), x, times)


def log_snr_times(path: Path, steps: int, span: tuple[float, float]) -> list[float]:
    """steps + 1 times at equal distances in log-SNR."""
    ends = path.at(torch.tensor(span, dtype=torch.float64)).log_snr
    inner = torch.linspace(float(ends[0]), float(ends[1]), steps + 1, dtype=torch.float64)[1:-1]
    return [span[0], *path.time_of(inner).tolist(), span[1]]


def start(samples: int) -> Tensor:
    return torch.randn(samples, 3, 1, 1, generator=torch.Generator().manual_seed(0)).double()


def test_the_oracle_is_one() -> None:
    """The derivative of its flow is its velocity."""
    assert issubclass(Oracle, GenerativeModel)
    model, x, t, dt = Oracle(Cosine()), start(4), 0.4, 1e-5
    rate = (model.flow(x, t, t + dt) - model.flow(x, t, t - dt)) / (2 * dt)
    times = torch.full((4,), t, dtype=torch.float64)
    torch.testing.assert_close(model.velocity(x, times), rate, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", PATHS)
def test_order_two(name: str) -> None:
    model, x = Oracle(PATHS[name]), start(8)
    span = (0.02, 0.98)
    errors, counts = [], [40, 80, 160, 320]
    for steps in counts:
        solved = follow(model, x, log_snr_times(model.path, steps, span))
        errors.append(float((solved - model.flow(x, *span)).abs().max()))
    logs = [[math.log(v) for v in values] for values in (counts, errors)]
    pairs = [itertools.pairwise(values) for values in logs]
    slopes = [(d - c) / (b - a) for (a, b), (c, d) in zip(*pairs, strict=True)]
    assert all(-2.3 < slope < -1.8 for slope in slopes[1:]), (errors, slopes)


def test_evaluations_are_counted() -> None:
    model = Oracle(Cosine())
    denoiser = Denoiser(model)
    DPMSolver(7).solve(denoiser, start(5), log_snr_times(model.path, 7, (0.1, 0.9)))
    assert model.batches == [5] * denoiser.evaluations == [5] * 7


@pytest.mark.parametrize("name", ["straight", "interpolated"])
def test_from_noise_to_data(name: str) -> None:
    """To the end of the path, where the straight path has no noise and infinite log-SNR."""
    model, x = Oracle(PATHS[name]), start(16)
    first, last = model.path.span
    solved = follow(model, x, [first, *edm_times(model.path, 200, 80.0, 0.002)])
    torch.testing.assert_close(solved, model.flow(x, first, last), rtol=0, atol=3e-3)


def test_one_step_takes_the_posterior_mean() -> None:
    model, x = Oracle(Straight()), start(4)
    solved = follow(model, x, [0.0, 1.0])
    torch.testing.assert_close(solved, torch.full_like(x, MEAN))


def test_samples_are_independent_of_their_batch() -> None:
    model, x = Oracle(VariancePreserving()), start(6)
    times = log_snr_times(model.path, 12, model.path.span)
    together = follow(model, x, times)
    alone = torch.cat([follow(model, row[None], times) for row in x])
    assert torch.equal(together, alone)


def test_bad_input() -> None:
    model = Oracle(Straight())
    for times in ([0.5], [0.5, 0.4], [0.5, 1.5]):
        with pytest.raises(ValueError, match="rising in"):
            DPMSolver(1).solve(Denoiser(model), start(1), times)
