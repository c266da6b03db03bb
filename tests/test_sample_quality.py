"""Kernel distance, precision, recall, density, coverage, neighbours; and the features they see."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from exactflow.data import DataConfig, ImageDataset, load
from exactflow.metrics import sample_quality
from exactflow.metrics.extractors import classifier, extract, pixels
from exactflow.metrics.feature_classifier import prepared, trained_classifier
from exactflow.metrics.sample_quality import (
    density_coverage,
    kernel_distance,
    memorisation,
    nearest_neighbours,
    precision_recall,
)


def normal(n: int, dims: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed)) + shift


def line(*places: float) -> Tensor:
    return torch.tensor(places, dtype=torch.float32)[:, None]


def test_kernel_distance_of_small_sets_by_hand() -> None:
    """One feature: k(x, y) = (x y + 1)^3; a = {0, 1}, b = {1, 2}."""
    found = kernel_distance(line(0, 1), line(1, 2), subsets=3, subset_size=2)
    within = 1 + 27  # k(0, 1) and k(1, 2)
    across = (1 + 1 + 8 + 27) / 4
    assert found.mean == pytest.approx(within - 2 * across)
    assert found.std == pytest.approx(0, abs=1e-12)


def test_kernel_distance_is_unbiased() -> None:
    """Its mean over many pairs is 0 for equal distributions, else that of the formula."""
    draws, size, shift = 400, 20, 0.5
    same, other = [], []
    for index in range(draws):
        a, b = normal(size, 1, 2 * index), normal(size, 1, 2 * index + 1)
        same.append(kernel_distance(a, b, subsets=1, subset_size=size).mean)
        other.append(kernel_distance(a, b + shift, subsets=1, subset_size=size).mean)
    assert min(same) < 0
    assert abs(np.mean(same)) < 3 * np.std(same) / math.sqrt(draws)
    # (x y + 1)^3 has the features x^3, sqrt(3) x^2, sqrt(3) x, 1: distances of their means.
    exact = (3 * shift + shift**3) ** 2 + 3 * shift**4 + 3 * shift**2
    assert abs(np.mean(other) - exact) < 3 * np.std(other) / math.sqrt(draws)


def test_kernel_distance_is_a_function_of_its_seed() -> None:
    a, b = normal(50, 4, 0), normal(60, 4, 1, shift=1.0)
    first, again, other = (kernel_distance(a, b, subsets=5, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first.std > 0
    assert first.mean > 0.1


def test_precision_and_recall_by_hand() -> None:
    real, fake = line(0, 1, 3, 10), line(0.5, 4, 18, 30, 31)
    # Nearest neighbours among the real: radii 1, 1, 2, 7: balls [-1, 1], [0, 2], [1, 5], [3, 17]
    # Among the others: radii 3.5, 3.5, 12, 1, 1: [-3, 4], [.5, 7.5], [6, 30], [29, 31], [30, 32]
    found = precision_recall(real, fake, k=1)
    assert found.precision == pytest.approx(2 / 5)
    assert found.recall == pytest.approx(1)
    assert precision_recall(fake, real, k=1) == sample_quality.PrecisionRecall(1.0, 2 / 5)
    # Second neighbours: radii of the real 3, 2, 3, 9; those of the others 17.5, 14, 13, 12, 13
    wide = precision_recall(real, fake, k=2)
    assert wide.precision == pytest.approx(3 / 5)


def test_density_and_coverage_by_hand() -> None:
    real, fake = line(0, 1, 3, 10), line(0.5, 4, 18, 30, 31)
    # 0.5 lies in the balls of 0 and 1, 4 in those of 3 and 10; the rest in none.
    found = density_coverage(real, fake, k=1)
    assert found.density == pytest.approx(4 / 5)
    assert found.coverage == pytest.approx(1)
    assert density_coverage(real, fake[1:], k=1).coverage == pytest.approx(2 / 4)
    # A copy of the set lies in each ball k + 1 times.
    grid = torch.arange(12.0)[:, None] ** 2
    assert density_coverage(grid, grid, k=3).density == pytest.approx(4 / 3)


def test_one_law_is_covered_and_a_far_one_is_not() -> None:
    real, fake, far = normal(400, 3, 0), normal(300, 3, 1), normal(300, 3, 2, shift=20)
    assert precision_recall(real, fake).precision > 0.9
    assert precision_recall(real, fake).recall > 0.9
    assert density_coverage(real, fake).density == pytest.approx(1, abs=0.15)
    assert density_coverage(real, fake).coverage > 0.85
    assert precision_recall(real, far) == sample_quality.PrecisionRecall(0.0, 0.0)
    assert density_coverage(real, far) == sample_quality.DensityCoverage(0.0, 0.0)


def test_neighbours_are_those_of_all_pairs_whatever_the_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points, training = normal(37, 5, 0), normal(53, 5, 1)
    everything = (points[:, None] - training).double().norm(dim=2)
    expected = everything.sort(dim=1)
    whole = precision_recall(training, points), density_coverage(training, points)
    for rows, columns in ((1024, 8192), (7, 10)):
        monkeypatch.setattr(sample_quality, "_ROWS", rows)
        monkeypatch.setattr(sample_quality, "_COLUMNS", columns)
        found = nearest_neighbours(points, training, k=4)
        assert torch.equal(found.indices, expected.indices[:, :4])
        torch.testing.assert_close(found.distances, expected.values[:, :4], rtol=1e-6, atol=0)
        again = precision_recall(training, points), density_coverage(training, points)
        assert again == whole


def test_a_copy_is_no_distance_away() -> None:
    training = normal(50, 100, 0, shift=1000)
    found = nearest_neighbours(training[[7, 3]], training)
    assert found.indices.tolist() == [[7], [3]]
    assert found.distances.tolist() == [[0.0], [0.0]]


def test_memorised_samples_are_seen() -> None:
    training, held_out, fresh = normal(2000, 4, 0), normal(1000, 4, 1), normal(1000, 4, 2)
    honest = memorisation(fresh, training, held_out, percentile=5)
    assert honest.fraction == pytest.approx(0.05, abs=0.03)
    copies = torch.cat([training[:300] + 1e-4, fresh[:700]])
    caught = memorisation(copies, training, held_out)
    assert 0.3 <= caught.fraction < 0.33
    assert caught.samples.indices[:300, 0].tolist() == list(range(300))
    assert caught.threshold == pytest.approx(
        float(np.percentile(caught.held_out.distances.numpy(), 1))
    )


def test_what_cannot_be_measured_is_refused() -> None:
    few, many = normal(3, 2, 0), normal(20, 2, 1)
    with pytest.raises(ValueError, match="2 to 3 images, got 100 of 4"):
        kernel_distance(few, many, subset_size=4)
    with pytest.raises(ValueError, match=r"subsets >= 1 .* got 0 of 3"):
        kernel_distance(few, many, subsets=0, subset_size=3)
    with pytest.raises(ValueError, match="expected 4 images or more, got 3"):
        precision_recall(many, few)
    with pytest.raises(ValueError, match="k >= 1 neighbours, got 0"):
        density_coverage(many, few, k=0)
    with pytest.raises(ValueError, match="expected 6 images or more, got 3"):
        density_coverage(few, many)
    with pytest.raises(ValueError, match="expected 5 images or more, got 3"):
        nearest_neighbours(many, few, k=5)
    with pytest.raises(ValueError, match="finite features"):
        nearest_neighbours(many * math.nan, few)
    with pytest.raises(ValueError, match="percentile of 0 to 100, got 101"):
        memorisation(few, many, many, percentile=101)


def images_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def test_low_frequencies_are_orthonormal() -> None:
    """All of them together keep distances; a constant image has only the first."""
    images = images_of((2, 3, 4, 5))
    whole = pixels(60)
    found = extract(whole, images, 256)
    values = images.double().flatten(1) / 127.5
    torch.testing.assert_close(
        (found[0] - found[1]).norm().double(), (values[0] - values[1]).norm(), rtol=1e-5, atol=0
    )
    white = extract(whole, torch.full((1, 3, 4, 5), 255, dtype=torch.uint8), 256)[0]
    assert float(white[0]) == pytest.approx(math.sqrt(60), rel=1e-5)
    assert float(white[1:].abs().max()) < 1e-5
    assert torch.equal(extract(pixels(7), images, 256), found[:, :7])
    assert (pixels().name, pixels().dims, pixels().distance_name) == ("dct-64", 64, "FD-dct-64")


def test_low_frequencies_see_large_shapes_and_colours_first() -> None:
    ramp = torch.arange(16, dtype=torch.float32).repeat(16, 1)
    stripes = (torch.arange(16) % 2).float().repeat(16, 1)
    red = torch.stack([torch.ones(16, 16), torch.zeros(16, 16), torch.zeros(16, 16)])
    grey = [(x / x.max()).expand(3, -1, -1) for x in (ramp, stripes)]
    pictures = torch.stack([*grey, red]).mul(255).to(torch.uint8)
    dims = 3 * 16 * 16
    kept = extract(pixels(22), pictures, 256)[:, 1:].square().sum(1)
    whole = extract(pixels(dims), pictures, 256)[:, 1:].square().sum(1)
    share = (kept / whole).tolist()
    assert share[0] > 0.95
    assert share[1] < 0.05
    assert share[2] > 0.99
    with pytest.raises(ValueError, match="at least 64 values"):
        extract(pixels(), images_of((1, 1, 4, 4)), 256)
    with pytest.raises(ValueError, match="at least one feature, got 0"):
        pixels(0)


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load(DataConfig("digits"), "train")


@pytest.fixture(scope="module")
def folder(digits: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features")
    classifier(digits, path)
    return path


@pytest.mark.slow
def test_the_classifier_knows_digits_and_is_trained_once(
    digits: ImageDataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exactflow.metrics.feature_classifier._train", None)
    found, test = classifier(digits, folder), load(DataConfig("digits"), "test")
    decided = trained_classifier(digits, folder, 0)(prepared(test.tensors()[0], test.levels))
    assert float((decided.argmax(1).numpy() == test.labels).mean()) >= 0.95
    assert found.name.startswith("cnn-digits-")
    assert found.distance_name == f"FD-{found.name}"
    assert found.dims == 128
    assert extract(found, digits.images[:3], digits.levels).shape == (3, 128)


@pytest.mark.slow
def test_the_classifier_is_a_function_of_data_and_seed(
    digits: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exactflow.metrics.feature_classifier._STEPS", 3)
    state = torch.get_rng_state()
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        classifier(digits, folder)
    assert torch.equal(torch.get_rng_state(), state)  # others' random numbers are left alone
    (first,), (again,) = one.iterdir(), two.iterdir()
    assert first.name == again.name
    assert first.read_bytes() == again.read_bytes()
    names = {
        classifier(data, two, seed).name
        for data, seed in (
            (digits, 1),
            (digits, 2),
            (dataclasses.replace(digits, fingerprint="other", images=digits.images[::-1]), 1),
        )
    }
    assert len(names) == 3
    assert len(list(two.iterdir())) == 4


def test_features_depend_on_their_image_alone(digits: ImageDataset, folder: Path) -> None:
    found = classifier(digits, folder)
    images = digits.images[:50]
    together = extract(found, images, digits.levels)
    for size in (1, 7, 50):
        apart = extract(found, images, digits.levels, batch_size=size)
        torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-5)


def test_the_bar_tells_rate_and_time_left(
    digits: ImageDataset, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    extract(pixels(), digits.images, digits.levels, progress=True)
    told = capsys.readouterr()
    assert "images/s" in told.err
    assert "1437/1437" in told.err
    assert told.out == ""


def test_a_classifier_takes_large_colour_images_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exactflow.metrics.feature_classifier._STEPS", 2)
    images, labels = images_of((9, 3, 40, 50)).numpy(), np.arange(9) % 3
    data = ImageDataset(
        images, labels, "o/big", "1", "train", 256, ("a", "b", "c"), "", "", "f" * 64
    )
    found = classifier(data, tmp_path)
    assert found.name.startswith("cnn-o-big-")
    assert extract(found, images, 256).isfinite().all()
    with pytest.raises(ValueError, match="expected images of 3 channels"):
        extract(found, images[:, :1], 256)


def test_a_classifier_that_cannot_be_trained_or_read_is_refused(
    digits: ImageDataset, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"labelled training split .* with no labels"):
        classifier(dataclasses.replace(digits, labels=None), tmp_path)
    with pytest.raises(ValueError, match=r"labelled training split .* got digits, test"):
        classifier(load(DataConfig("digits"), "test"), tmp_path)
    with pytest.raises(ValueError, match="at least 4 pixels"):
        classifier(dataclasses.replace(digits, images=digits.images[..., :2]), tmp_path)
    (kept,) = folder.iterdir()
    (tmp_path / kept.name).write_bytes(kept.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{kept.name} does not hold the classifier's weights"):
        classifier(digits, tmp_path)
