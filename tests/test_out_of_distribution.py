"""Outlier scores, and the area under the ROC curve."""

import math

import numpy as np
import pytest
import torch

from exactflow.data import DataConfig, load
from exactflow.latent.out_of_distribution import (
    SCORES,
    auroc,
    compressed_bits_per_dim,
    foreign_set,
    outlier_plot,
    outlier_scores,
    roc,
)
from exactflow.likelihood.log_likelihood import log_likelihood
from exactflow.models import registry
from flows import make, some_grey_levels
from gaussian_flow import GaussianFlow, some_factor

NAN = math.nan


@pytest.mark.parametrize(
    ("inside", "outside", "area"),
    [
        ([0.0, 1.0], [2.0, 3.0], 1.0),
        ([2.0, 3.0], [0.0, 1.0], 0.0),
        ([1.0, 1.0], [1.0], 0.5),
        ([0.0, 2.0], [1.0], 0.5),
        ([0.0, 1.0, 2.0], [1.0, 3.0], 0.75),  # (1.5 + 3) of 6 pairs
        ([0.0], [math.inf], 1.0),
    ],
)
def test_area_of_closed_cases(inside: list[float], outside: list[float], area: float) -> None:
    assert auroc(torch.tensor(inside), torch.tensor(outside)) == area


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_area_with_ties_is_scikit_learns(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    source = np.random.default_rng(seed)
    inside, outside = (torch.as_tensor(source.integers(0, 9, n) + 0.0) for n in (83, 41))
    truth = [0] * len(inside) + [1] * len(outside)
    expected = metrics.roc_auc_score(truth, torch.cat([inside, outside]).numpy())
    assert math.isclose(auroc(inside, outside), expected, rel_tol=1e-12)
    assert math.isclose(auroc(outside, inside), 1 - expected, rel_tol=1e-12)
    false_alarms, found = roc(inside, outside)
    assert math.isclose(float(torch.trapezoid(found, false_alarms)), expected, rel_tol=1e-6)
    assert false_alarms[0] == found[0] == 0
    assert false_alarms[-1] == found[-1] == 1


@pytest.mark.parametrize(("inside", "outside"), [([], [1.0]), ([1.0], []), ([NAN], [1.0])])
def test_scores_without_an_order_are_refused(inside: list[float], outside: list[float]) -> None:
    for measure in (auroc, roc):
        with pytest.raises(ValueError, match=r"on both sides|got NaN"):
            measure(torch.tensor(inside), torch.tensor(outside))


def test_scores_of_a_gaussian_are_closed() -> None:
    factor, mean = some_factor(4), torch.full((1, 1, 2, 2), 0.1, dtype=torch.float64)
    model = GaussianFlow(mean, factor, levels=16)
    images = some_grey_levels(model, 5)
    found = outlier_scores(model, images, typical=2.0, seed=3, batch_size=2)
    assert found.keys() == SCORES.keys()
    bits = log_likelihood(model, images, seed=3).per_image
    torch.testing.assert_close(found["log-likelihood"], bits)
    torch.testing.assert_close(found["typicality"], (bits - 2).abs())
    png = compressed_bits_per_dim(images, 16)
    torch.testing.assert_close(found["complexity-corrected"], bits - png)
    assert torch.equal(found["PNG alone"], -png)
    off = (model.from_grey_levels(images) - mean).flatten(1)
    slope = off @ torch.linalg.inv(model.covariance)
    torch.testing.assert_close(found["gradient norm"], slope.norm(dim=1))


def test_scores_depend_on_no_batch() -> None:
    model = make("conditional")
    images = some_grey_levels(model, 5)
    whole = outlier_scores(model, images, 3.0)
    parts = outlier_scores(model, images, 3.0, batch_size=2)
    for name, score in whole.items():
        torch.testing.assert_close(parts[name], score, rtol=1e-9, atol=1e-9)


def test_noise_compresses_less_than_nothing() -> None:
    flat = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    noise = torch.randint(0, 256, flat.shape, dtype=torch.uint8)
    nothing, something = compressed_bits_per_dim(torch.cat([flat, noise]), 256).tolist()
    assert 0 < nothing < 0.5
    assert 8 < something < 8.5  # random bytes, the file's header besides
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        compressed_bits_per_dim(torch.zeros(1, 2, 4, 4, dtype=torch.uint8), 256)


def test_models_without_bits_per_dim_are_refused() -> None:
    noisy, augmented = make("gaussian noise"), registry.build("denseflow-tiny")
    path = registry.build("flow-matching-tiny")
    with pytest.raises(ValueError, match="density of noisy images"):
        outlier_scores(noisy, some_grey_levels(noisy), 1.0)
    for model in (augmented, path):
        with pytest.raises(ValueError, match=f"exact density, got .* kind '{model.kind}'"):
            outlier_scores(model, torch.zeros(1, *model.event_shape, dtype=torch.uint8), 1.0)


def test_another_set_in_the_models_shape_has_an_identity_of_its_own() -> None:
    plain = foreign_set("digits", (1, 8, 8), 17, 20)
    assert len(plain) == 20
    whole = load(DataConfig("digits", image_size=8, channels=1), "test")
    assert plain.levels == whole.levels
    stretched = foreign_set("digits", (1, 8, 8), 256, 20)
    expected = np.rint(plain.images * (255 / 16)).astype(np.uint8)
    assert np.array_equal(stretched.images, expected)
    assert stretched.levels == 256
    assert "17 levels stretched to 256" in stretched.preprocessing
    for name in ("fingerprint", "preprocessing_hash"):
        ours, theirs = getattr(stretched, name), getattr(plain, name)
        assert ours != theirs
        assert len(ours) == len(theirs)
    assert foreign_set("digits", (3, 28, 28), 256, 4).event_shape == (3, 28, 28)
    with pytest.raises(ValueError, match=r"square images .* got 8 x 4"):
        foreign_set("digits", (1, 8, 4), 256)


def test_a_border_frames_the_images_in_black() -> None:
    plain, framed = (
        foreign_set("digits", (1, s, s), 17, 20, border=b) for s, b in ((8, 0), (14, 3))
    )
    assert framed.event_shape == (1, 14, 14)
    assert np.array_equal(framed.images[..., 3:-3, 3:-3], plain.images)
    assert int(framed.images.sum()) == int(plain.images.sum())
    assert framed.fingerprint != plain.fingerprint
    assert framed.preprocessing_hash != plain.preprocessing_hash
    for border in (-1, 4):
        with pytest.raises(ValueError, match=rf"border of 0 \.\. 3 pixels, got {border}"):
            foreign_set("digits", (1, 8, 8), 17, border=border)


def test_the_picture_has_a_panel_for_every_score() -> None:
    pytest.importorskip("matplotlib")
    sides = [{name: torch.randn(30) + shift for name in SCORES} for shift in (0, 1)]
    assert outlier_plot(sides[0], sides[1], ("in", "out")).startswith(b"\x89PNG")
