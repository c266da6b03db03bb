"""The gradient of an exact density, inpainting and denoising with it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exactflow.core.model import NonFiniteError, log_density
from exactflow.latent.restoration import (
    denoise,
    exact_flow,
    inpaint,
    log_density_gradient,
    missing_region,
    psnr,
)
from exactflow.models import registry
from flows import make, some_grey_levels, some_images, some_labels
from gaussian_flow import GaussianFlow, some_factor

BOTTOM = missing_region((1, 4, 4), "bottom")


@pytest.mark.parametrize("name", ["rgb", "conditional", "softplus", "gaussian noise"])
def test_the_gradient_is_the_finite_difference(name: str) -> None:
    model = make(name)
    x, label = some_images(model, 2), some_labels(model, 2)
    nats, gradient = log_density_gradient(model, x, label)
    torch.testing.assert_close(nats, log_density(model, x, label).detach())
    step = 1e-5
    for pixel in range(model.dims):
        moved = torch.zeros(model.dims, dtype=x.dtype)
        moved[pixel] = step
        up, down = (log_density(model, x + s * moved.view(x.shape[1:]), label) for s in (1, -1))
        slope = ((up - down) / (2 * step)).detach()
        torch.testing.assert_close(gradient.flatten(1)[:, pixel], slope, rtol=0, atol=1e-7)
    assert not x.requires_grad


def test_the_gradient_of_a_gaussian_is_linear() -> None:
    mean = torch.full((1, 1, 2, 2), -0.3, dtype=torch.float64)
    model = GaussianFlow(mean, some_factor(4))
    x = some_images(model, 5)
    _, gradient = log_density_gradient(model, x)
    expected = -(x - mean).flatten(1) @ torch.linalg.inv(model.covariance)
    torch.testing.assert_close(gradient.flatten(1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["one channel, patch 1", "conditional", "gaussian noise"])
@pytest.mark.parametrize("region", ["bottom", "right", "center", "scattered"])
def test_known_pixels_stay_and_missing_ones_are_not_read(name: str, region: str) -> None:
    model = make(name)
    images, label = some_grey_levels(model, 3), some_labels(model, 3)
    missing = missing_region(model.event_shape, region)
    drawn = inpaint(model, images, missing, label, steps=8)
    known = ~missing.expand(images.shape)
    assert torch.equal(drawn.images[known], images[known])
    spoilt = torch.where(missing, model.levels - 1 - images, images)
    assert torch.equal(inpaint(model, spoilt, missing, label, steps=8).images, drawn.images)
    assert drawn.log_density.shape == (8, 3)
    assert bool((drawn.acceptance >= 0).all() & (drawn.acceptance <= 1).all())


def test_a_draw_depends_on_its_seed_and_not_on_its_mates() -> None:
    model = make("conditional")
    images, label = some_grey_levels(model, 3), torch.tensor([0, 1, 2])
    whole = inpaint(model, images, BOTTOM, label, steps=12)
    alone = inpaint(model, images[:1], BOTTOM, label[:1], steps=12)
    assert torch.equal(alone.images, whole.images[:1])
    torch.testing.assert_close(alone.log_density, whole.log_density[:, :1])
    other = inpaint(model, images, BOTTOM, label, steps=12, seed=1)
    assert not torch.equal(other.images, whole.images)


def test_draws_are_chains_of_their_own_whatever_their_number() -> None:
    model = make("conditional")
    images, label = some_grey_levels(model, 3), torch.tensor([0, 1, 2])
    drawn = inpaint(model, images, BOTTOM, label, draws=3, steps=12)
    assert drawn.images.shape == (9, *model.event_shape)
    first, second, _ = drawn.images.split(3)
    assert torch.equal(first, inpaint(model, images, BOTTOM, label, steps=12).images)
    assert not torch.equal(first, second)
    two = inpaint(model, images[:1], BOTTOM, label[:1], draws=2, steps=12)
    assert torch.equal(two.images, torch.stack([first[0], second[0]]))


@pytest.mark.slow
@pytest.mark.parametrize("noise_std", [0.0, 0.1])
def test_draws_follow_the_conditional_density(noise_std: float) -> None:
    """Of a Gaussian: mean m_u + S_uk S_kk^-1 (x_k - m_k), covariance the Schur complement.

    With Gaussian noise the state follows the law of noisy images, and its denoised image the
    posterior mean given it, which is linear in it.
    """
    chains = 1500
    mean = torch.full((1, 1, 2, 2), 0.1, dtype=torch.float64)
    model = GaussianFlow(mean, some_factor(4, scale=0.2), noise_std)
    images = torch.tensor([150, 100, 0, 0], dtype=torch.uint8).view(1, 1, 2, 2)
    missing = missing_region(model.event_shape, "bottom")
    drawn = inpaint(model, images.expand(chains, -1, -1, -1), missing, steps=240)
    x = model.from_grey_levels(drawn.images).flatten(1)[:, 2:]

    s, m = model.covariance, mean.flatten()
    weight = s[2:, :2] @ torch.linalg.inv(s[:2, :2])
    known = model.from_grey_levels(images).flatten()[:2]
    expected = m[2:] + weight @ (known - m[:2])
    spread = s[2:, 2:] - weight @ s[:2, 2:] + noise_std**2 * weight @ weight.T
    if noise_std:  # joint law of the noisy state, then the map from it to the posterior mean
        joint = torch.zeros(4, 4, dtype=torch.float64)
        joint[:2, :2] = noise_std**2 * torch.eye(2)
        joint[2:, :2] = noise_std**2 * weight
        joint[:2, 2:] = joint[2:, :2].T
        joint[2:, 2:] = spread
        shrink = torch.eye(4, dtype=torch.float64) - noise_std**2 * torch.linalg.inv(s)
        center = torch.cat([known, expected])
        expected = (m + shrink @ (center - m))[2:]
        spread = (shrink @ joint @ shrink.T)[2:, 2:]
    error = (spread.diagonal() / chains).sqrt()
    assert bool(((x.mean(0) - expected).abs() < 4 * error + 1e-3).all())
    variances = spread.diagonal()  # standard errors of a covariance: Wishart's
    error = ((variances[:, None] * variances + spread.square()) / chains).sqrt()
    assert bool(((x.T.cov() - spread).abs() < 4 * error).all())
    assert 0.4 < float(drawn.acceptance.mean()) < 0.75


def test_denoising_a_gaussian_is_its_posterior_mean() -> None:
    """y ~ N(m, S), S = S_x + sigma^2 I: E[x | y] = m + S_x S^-1 (y - m)."""
    mean = torch.full((1, 1, 2, 2), 0.2, dtype=torch.float64)
    model = GaussianFlow(mean, some_factor(4, scale=0.6), noise_std=0.3)
    images = some_grey_levels(model, 6)
    result = denoise(model, images, batch_size=4)
    s = model.covariance
    clean = s - 0.3**2 * torch.eye(4, dtype=torch.float64)
    off = (result.noisy - mean).flatten(1)
    expected = mean.flatten() + off @ torch.linalg.inv(s) @ clean
    torch.testing.assert_close(result.denoised.flatten(1), expected, rtol=0, atol=1e-12)
    assert torch.equal(result.clean, model.from_grey_levels(images))


def test_noise_to_remove_is_the_models_and_named_by_the_seed() -> None:
    model = GaussianFlow(torch.zeros(1, 1, 16, 16, dtype=torch.float64), noise_std=0.25)
    images = some_grey_levels(model, 20)
    result = denoise(model, images, seed=5)
    assert math.isclose(float((result.noisy - result.clean).std()), 0.25, rel_tol=0.03)
    assert torch.equal(denoise(model, images[:7], seed=5, batch_size=3).noisy, result.noisy[:7])
    assert not torch.equal(denoise(model, images, seed=6).noisy, result.noisy)
    numbers = result.describe()
    assert math.isclose(numbers["psnr_noisy"], 10 * math.log10(4 / 0.25**2), abs_tol=0.2)
    assert numbers["psnr_noisy_clipped"] > numbers["psnr_noisy"]


@given(st.floats(0.01, 1.0))
def test_signal_to_noise_of_a_constant_error(error: float) -> None:
    clean = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    expected = torch.full((2,), 20 * math.log10(2 / error), dtype=torch.float64)
    torch.testing.assert_close(psnr(clean + error, clean), expected)


@pytest.mark.parametrize(
    ("region", "share"), [("bottom", 0.5), ("right", 0.5), ("center", 0.25), ("scattered", 0.5)]
)
def test_regions_have_their_size(region: str, share: float) -> None:
    missing = missing_region((3, 28, 28), region)
    assert math.isclose(float(missing.double().mean()), share, abs_tol=0.06)
    assert torch.equal(missing[0], missing[2])


def test_what_has_no_density_is_named() -> None:
    for name in ("denseflow-tiny", "flow-matching-tiny", "iddpm-tiny"):
        model = registry.build(name)
        with pytest.raises(ValueError, match=f"exact density, got a model of kind '{model.kind}'"):
            exact_flow(model)
    with pytest.raises(ValueError, match="trained with Gaussian noise"):
        denoise(make("rgb"), some_grey_levels(make("rgb")))


def test_what_cannot_be_inpainted_is_refused() -> None:
    model = make("conditional")
    images = some_grey_levels(model)
    for mask in (torch.ones_like(BOTTOM), torch.zeros_like(BOTTOM)):
        with pytest.raises(ValueError, match="with missing and known pixels"):
            inpaint(model, images, mask)
    with pytest.raises(ValueError, match=r"mask \(1, 4, 4\) .* got \(1, 2, 4\)"):
        inpaint(model, images[:, :, 1:3], BOTTOM[:, 1:3])
    with pytest.raises(ValueError, match="draws >= 1"):
        inpaint(model, images, BOTTOM, draws=0)
    with pytest.raises(ValueError, match="steps >= 2, got 1 and 1"):
        inpaint(model, images, BOTTOM, steps=1)


def test_a_density_that_overflows_is_an_error_that_names_the_image() -> None:
    model = make("conditional")
    with torch.no_grad():
        model.blocks[1].output.bias[: model.prior.shape[1]] = -400.0
    with pytest.raises(NonFiniteError, match="image 0, its missing pixels from a sample"):
        inpaint(model, some_grey_levels(model), BOTTOM)
