"""Frechet distances against closed forms; moments against numpy's."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from exactflow.data import DataConfig, load
from exactflow.metrics.extractors import pixels
from exactflow.metrics.frechet import FeatureStatistics, frechet_distance


def law(mean: list[float], covariance: np.ndarray, name: str | None = None) -> FeatureStatistics:
    return FeatureStatistics(np.array(mean), np.asarray(covariance, np.float64), 10**6, name)


def rotation(dims: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dims, dims)))[0]


def features(n: int, dims: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed))


def test_diagonal_covariances() -> None:
    a = law([1.0, 2.0, 3.0], np.diag([1.0, 4.0, 9.0]))
    b = law([1.0, 0.0, 4.0], np.diag([16.0, 4.0, 1.0]))
    # |shift|^2 = 4 + 1; squared differences of deviations 9 + 0 + 4
    assert frechet_distance(a, b) == pytest.approx(18.0, abs=1e-12)


def test_commuting_covariances() -> None:
    q = rotation(6)
    s, t = np.arange(1.0, 7.0), np.array([0.5, 3.0, 0.1, 2.0, 7.0, 1.0])
    a, b = (law([0.0] * 6, q @ np.diag(v**2) @ q.T) for v in (s, t))
    assert frechet_distance(a, b) == pytest.approx(float(((s - t) ** 2).sum()), abs=1e-10)


def test_covariances_that_do_not_commute() -> None:
    """In the plane tr sqrt(A B) = sqrt(tr(A B) + 2 sqrt(det(A) det(B)))."""
    a = np.array([[2.0, 1.0], [1.0, 3.0]])
    b = np.array([[5.0, -2.0], [-2.0, 1.0]])
    cross = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    expected = np.trace(a) + np.trace(b) - 2 * cross
    assert frechet_distance(law([0, 0.0], a), law([0, 0.0], b)) == pytest.approx(expected, abs=1e-9)


def test_covariances_of_one_dimension_in_many() -> None:
    """For u u' and v v' the trace of the root is |u . v|."""
    rng = np.random.default_rng(1)
    u, v = rng.normal(size=(2, 300))
    a, b = (law([0.0] * 300, np.outer(w, w)) for w in (u, v))
    expected = u @ u + v @ v - 2 * abs(u @ v)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    orthogonal = v - u * (u @ v) / (u @ u)
    far = law([0.0] * 300, np.outer(orthogonal, orthogonal))
    assert frechet_distance(a, far) == pytest.approx(u @ u + orthogonal @ orthogonal, rel=1e-10)


@pytest.mark.filterwarnings("ignore:30 images")
@pytest.mark.parametrize("n", [30, 1000])
def test_a_law_is_no_distance_from_itself_and_distances_are_symmetric(n: int) -> None:
    a, b = (FeatureStatistics.of(features(n, 200, seed) * 5 + 3) for seed in (0, 1))
    assert 0 <= frechet_distance(a, a) < 1e-8
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, b) > 1


def test_not_more_images_than_features_is_told() -> None:
    enough, few = (FeatureStatistics.of(features(n, 20)) for n in (21, 20))
    with pytest.warns(UserWarning, match="20 images for the covariance of 20 features"):
        frechet_distance(enough, few)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(enough, enough)


def test_a_shift_alone_is_its_square_and_nothing_has_no_spread() -> None:
    x = features(500, 10)
    a, b = FeatureStatistics.of(x.double()), FeatureStatistics.of(x.double() + 2)
    assert frechet_distance(a, b) == pytest.approx(40, abs=1e-9)
    point = law([0.0, 0.0], np.zeros((2, 2)))
    assert frechet_distance(point, law([3.0, 4.0], np.eye(2))) == pytest.approx(27)
    assert frechet_distance(point, point) == 0


def test_moments_are_those_of_numpy() -> None:
    x = features(101, 7).double() + 1e4
    whole = FeatureStatistics.of(x, "f")
    np.testing.assert_allclose(whole.mean, x.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(whole.covariance, np.cov(x.numpy().T), rtol=0, atol=1e-11)
    assert (whole.count, whole.extractor) == (101, "f")


def test_what_cannot_be_compared_is_refused() -> None:
    eye = np.eye(2)
    named = law([0, 0.0], eye, "inception-6726825d")
    with pytest.raises(ValueError, match=r"same features, got inception-6726825d .* and dct-2"):
        frechet_distance(named, law([0, 0.0], eye, "dct-2"))
    with pytest.raises(ValueError, match=r"\(2 features\) and None \(3\)"):
        frechet_distance(named, law([0, 0, 0.0], np.eye(3)))
    assert frechet_distance(named, law([0, 0.0], eye)) == pytest.approx(0)  # without a name
    with pytest.raises(ValueError, match="two images or more, got 1"):
        FeatureStatistics.of(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="two images or more, got 0"):
        FeatureStatistics.of(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="finite features"):
        FeatureStatistics.of(torch.tensor([[0.0], [math.inf]]))


def test_halves_of_the_digits_are_nearer_than_blurred_digits() -> None:
    data, extractor = load(DataConfig("digits"), "train"), pixels(16)
    images = torch.from_numpy(np.array(data.images))
    half, rest = images[::2], images[1::2]
    blurred = torch.nn.functional.avg_pool2d(rest.float(), 3, 1, 1).to(torch.uint8)
    real, same, other = (
        FeatureStatistics.of(extractor.features(x, data.levels), extractor.name)
        for x in (half, rest, blurred)
    )
    assert frechet_distance(real, same) < 0.05 * frechet_distance(real, other)
