"""Bayes' rule from conditional densities, its calibration, and the numbers that describe both."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from exactflow.core import grey_levels as grey
from exactflow.core.model import GenerativeModel
from exactflow.core.randomness import generator, uniform_rows
from exactflow.latent.bayes import (
    Classification,
    calibrate,
    class_log_likelihoods,
    classification_plot,
    log_posterior,
)
from flows import make, some_grey_levels
from gaussian_flow import GaussianFlow, some_factor


def classes_of_gaussians() -> GaussianFlow:
    source = torch.Generator().manual_seed(3)
    means = torch.randn(3, 1, 2, 2, generator=source, dtype=torch.float64) * 0.4
    return GaussianFlow(means, some_factor(4, scale=0.5), levels=8)


def posterior(
    model: GenerativeModel, images: Tensor, prior: Sequence[float] | None = None, **options: Any
) -> Tensor:
    return log_posterior(class_log_likelihoods(model, images, **options), prior)


def test_of_gaussian_classes_is_the_analytic_posterior() -> None:
    """Quadratic discriminant analysis of the dequantised image, with unequal priors."""
    model = classes_of_gaussians()
    images = some_grey_levels(model, 5)
    prior = (0.5, 0.2, 0.3)
    noise = uniform_rows(model.event_shape, [generator(7, "score", i, 0) for i in range(5)])
    x = grey.dequantize(images, noise, model.levels)
    off = x.flatten(1)[:, None] - model.means.detach().flatten(1)[None]
    precision = torch.linalg.inv(model.covariance)
    joint = -0.5 * torch.einsum("ncd,de,nce->nc", off, precision, off)
    joint = joint.exp() * torch.tensor(prior, dtype=torch.float64)
    expected = joint / joint.sum(1, keepdim=True)
    found = posterior(model, images, prior, seed=7)
    torch.testing.assert_close(found.exp(), expected, rtol=0, atol=1e-12)


def test_more_draws_average_the_densities_before_bayes() -> None:
    model = classes_of_gaussians()
    images = some_grey_levels(model, 4)
    nats = class_log_likelihoods(model, images, k=3, seed=1)
    for c in range(3):
        weights = []
        for draw in range(3):
            sources = [generator(1, "score", i, draw) for i in range(4)]
            x = grey.dequantize(images, uniform_rows(model.event_shape, sources), model.levels)
            z, log_abs_det = model.encode(x, torch.full((4,), c))
            weights.append((model.prior.log_prob(z) + log_abs_det).exp())
        expected = torch.stack(weights).mean(0).log() - model.dims * math.log(model.levels / 2)
        torch.testing.assert_close(nats[:, c], expected.detach(), rtol=0, atol=1e-12)


def test_sums_to_one_and_depends_on_no_batch() -> None:
    model = make("conditional")
    images = some_grey_levels(model, 7)
    whole = posterior(model, images, batch_size=7)
    torch.testing.assert_close(whole.exp().sum(1), torch.ones(7, dtype=torch.float64))
    for size in (1, 3):
        parts = posterior(model, images, batch_size=size)
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)


def test_all_classes_are_scored_under_the_same_noise() -> None:
    """Classes with the same density have exactly the same score, whatever the draw."""
    means = torch.full((4, 1, 2, 2), 0.2, dtype=torch.float64)
    found = posterior(GaussianFlow(means), some_grey_levels(GaussianFlow(means), 3), k=2)
    assert torch.equal(found, found[:, :1].expand(3, 4))
    torch.testing.assert_close(found, torch.full_like(found, -math.log(4)))


def test_log_sum_exp_keeps_what_underflows() -> None:
    nats = torch.tensor([[-1e6, -1e6 - 2.0], [-1e6, 1e6]], dtype=torch.float64)
    found = log_posterior(nats)
    expected = torch.tensor([-math.log1p(math.exp(-2)), -2e6], dtype=torch.float64)
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-9, atol=0)


def test_temperature_divides_the_likelihood_and_not_the_prior() -> None:
    nats = torch.tensor([[-3.0, -5.0]], dtype=torch.float64)
    odds = float(log_posterior(nats, (1, 3), 4.0).diff())
    assert math.isclose(odds, -2 / 4 + math.log(3), rel_tol=1e-12)
    far = log_posterior(nats, (1, 3), 1e9).exp()
    torch.testing.assert_close(far, torch.tensor([[0.25, 0.75]], dtype=torch.float64))


def drawn_at(temperature: float, n: int = 20_000) -> tuple[Tensor, Tensor]:
    """Log-likelihoods, and labels that follow their posterior at that temperature."""
    source = torch.Generator().manual_seed(0)
    nats = 10 * torch.randn(n, 4, generator=source, dtype=torch.float64)
    chances = log_posterior(nats, temperature=temperature).exp()
    return nats, torch.multinomial(chances, 1, generator=source)[:, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 6.0])
def test_calibration_finds_the_temperature_that_labels_follow(temperature: float) -> None:
    nats, labels = drawn_at(temperature)
    found = calibrate(nats, labels)
    assert math.isclose(found, temperature, rel_tol=0.05)
    before = Classification(log_posterior(nats), labels)
    after = Classification(log_posterior(nats, temperature=found), labels)
    assert after.reliability().error < 0.01
    assert after.negative_log_likelihood <= before.negative_log_likelihood
    assert torch.equal(after.decided, before.decided)


def test_calibration_minimises_the_loss() -> None:
    nats, labels = drawn_at(3.0, 500)
    prior = (1, 2, 3, 4)
    best = calibrate(nats, labels, prior)

    def loss(t: float) -> float:
        return Classification(log_posterior(nats, prior, t), labels).negative_log_likelihood

    assert all(loss(best) <= loss(best * factor) for factor in (0.5, 0.99, 1.01, 2.0))


def test_images_that_are_all_right_say_nothing_of_the_temperature() -> None:
    nats = torch.tensor([[0.0, -1.0], [-2.0, 0.0]], dtype=torch.float64)
    assert calibrate(nats, torch.tensor([0, 1])) == 1.0
    assert calibrate(nats, torch.tensor([1, 0])) > 1e5  # all wrong: nothing to be trusted


def test_numbers_of_a_classification() -> None:
    chances = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], dtype=torch.float64)
    result = Classification(chances.log(), torch.tensor([0, 1, 1, 0]))
    assert result.accuracy == 0.75
    assert torch.equal(result.confusion, torch.tensor([[2, 0], [1, 1]]))
    expected = -(math.log(0.9) + math.log(0.2) + math.log(0.7) + math.log(0.6)) / 4
    assert math.isclose(result.negative_log_likelihood, expected, rel_tol=1e-12)
    bins = result.reliability(2)  # all four in the upper bin: |0.75 - mean confidence|
    assert bins.count.tolist() == [0, 4]
    assert math.isclose(bins.error, 0.0, abs_tol=1e-12)
    parts = result.reliability(10)  # 0.9, 0.8, 0.7 and 0.6 each alone in a bin
    assert math.isclose(parts.error, (0.1 + 0.8 + 0.3 + 0.4) / 4, rel_tol=1e-9)
    assert result.describe()["accuracy_standard_error"] == math.sqrt(0.75 * 0.25 / 4)


def test_certainty_falls_into_the_last_bin() -> None:
    sure = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    bins = Classification(sure, torch.tensor([0])).reliability()
    assert int(bins.count[-1]) == 1
    assert bins.error == 0.0


def test_the_picture_shows_both_posteriors() -> None:
    pytest.importorskip("matplotlib")
    nats, labels = drawn_at(2.0, 50)
    found = {
        "uncalibrated": Classification(log_posterior(nats), labels),
        "calibrated": Classification(log_posterior(nats, temperature=2.0), labels),
    }
    assert classification_plot(found, "abcd", "four classes").startswith(b"\x89PNG")


def test_what_has_no_posterior_is_refused() -> None:
    model = make("conditional")
    images = some_grey_levels(model, 2)
    nats = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"conditional model, .* got an unconditional one of kind 'tarflow'"
    ):
        posterior(make("rgb"), some_grey_levels(make("rgb")))
    with pytest.raises(ValueError, match="batch_size >= 1"):
        posterior(model, images, batch_size=0)
    for prior in ((1, 1), (1, 1, 0), (1, 1, -1), (1, 1, math.inf)):
        with pytest.raises(ValueError, match="positive prior probability for each of 3 classes"):
            posterior(model, images, prior)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature > 0"):
            log_posterior(nats, temperature=temperature)
    for labels in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match=r"label 0 \.\. 2 for each"):
            calibrate(nats, torch.tensor(labels))
