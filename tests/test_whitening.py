"""Laws of the fitted flows: closed forms, streaming, round trips, refusals."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.distributions import MultivariateNormal

import exactflow
from exactflow.core import grey_levels as grey
from exactflow.core.density_flow import FittedFlow
from exactflow.core.model import log_density
from exactflow.core.randomness import generator, normal_rows
from exactflow.data import DataConfig, load
from exactflow.data.augmentation import Augmentation
from exactflow.likelihood.log_likelihood import log_likelihood
from exactflow.metrics import baselines as floor
from exactflow.metrics.baselines import baselines
from exactflow.models import registry
from exactflow.models.gaussian import moments
from exactflow.models.gaussian.gaussianisation import Gaussianisation, GaussianisationConfig
from exactflow.models.gaussian.moments import LinearFit
from exactflow.models.gaussian.whitening import Whitening, WhiteningConfig
from exactflow.sampling.sample import sample
from exactflow.training import TrainConfig
from exactflow.training.fitting import fit_closed_form
from processes import call as cli

CPU = torch.device("cpu")
SHAPES = {
    "one channel": WhiteningConfig((1, 4, 4), levels=8),
    "odd, not square": WhiteningConfig((2, 3, 5), levels=8),
    "one value": WhiteningConfig((1, 1, 1), levels=8),
    "pca": WhiteningConfig((2, 3, 2), rotation="pca", levels=8),
    "zca": WhiteningConfig((2, 3, 2), rotation="zca", levels=8),
    "patch": WhiteningConfig((2, 4, 6), "patch", patch_size=2, levels=8),
    "patch, pca": WhiteningConfig((1, 4, 6), "patch", 2, "pca", levels=8),
    "dct": WhiteningConfig((3, 3, 4), "dct", levels=8),
    "dct, zca": WhiteningConfig((3, 3, 4), "dct", rotation="zca", levels=8),
    "dct, one channel": WhiteningConfig((1, 5, 3), "dct", levels=8),
    "diagonal": WhiteningConfig((2, 3, 3), "diagonal", levels=8),
}
LAYERED = [name for name in SHAPES if name not in ("pca", "patch, pca")]


def some(config: WhiteningConfig, count: int = 200, seed: int = 0) -> torch.Tensor:
    """Correlated integer images with a pixel that never changes."""
    source = torch.Generator().manual_seed(seed)
    dims = math.prod(config.image_shape)
    mixing = torch.randn(dims, dims, generator=torch.Generator().manual_seed(7)) / dims**0.5
    values = torch.randn(count, dims, generator=source) @ mixing
    values = ((values.exp() * 1.5).floor()).clamp(0, config.levels - 1)
    values[:, -1] = 3 % config.levels
    return values.view(count, *config.image_shape).to(torch.uint8)


def noise_images(low: int, high: int, *shape: int) -> torch.Tensor:
    """Independent grey levels low .. high - 1."""
    source = torch.Generator().manual_seed(0)
    return torch.randint(low, high, shape, generator=source, dtype=torch.uint8)


def fitted(config: WhiteningConfig, batches: Iterable[torch.Tensor]) -> LinearFit:
    return moments.fit_linear(config.layout, config.levels, config.shrinkage, batches, CPU)


def whitening(config: WhiteningConfig, images: torch.Tensor | None = None) -> Whitening:
    model = Whitening(config).double().eval()
    model.fit([some(config) if images is None else images])
    return model


def gaussianisation(config: WhiteningConfig, **fields: int) -> Gaussianisation:
    parts = (config.covariance, config.patch_size, config.rotation, config.shrinkage)
    layered = GaussianisationConfig(config.image_shape, *parts, config.levels, **fields)
    model = Gaussianisation(layered).double().eval()
    model.fit([some(config)])
    return model


def sample_noise(model: Whitening, seed: int) -> torch.Tensor:
    """The latent that `sample` draws for that seed."""
    return normal_rows(model.prior.shape, [generator(seed, "sample")])


def flows() -> list[tuple[str, str]]:
    return [("whitening", n) for n in SHAPES] + [("gaussianisation", n) for n in LAYERED]


def build(kind: str, name: str) -> Whitening | Gaussianisation:
    if kind == "whitening":
        return whitening(SHAPES[name])
    return gaussianisation(SHAPES[name], layers=2, bins=6)


@pytest.mark.parametrize(("kind", "name"), flows())
def test_log_abs_det_is_the_jacobians(kind: str, name: str) -> None:
    model = build(kind, name)
    images = some(model.linear, 3, seed=1)
    for row, image in enumerate(model.add_noise(images, torch.Generator().manual_seed(0))):
        log_abs_det = model.encode(image[None])[1]

        def flat(x: torch.Tensor, model=model) -> torch.Tensor:
            return model.encode(x.view(1, *model.event_shape))[0].flatten()

        jacobian = torch.autograd.functional.jacobian(flat, image.flatten())
        expected = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(expected, log_abs_det[0], rtol=0, atol=1e-9, msg=f"image {row}")


@pytest.mark.parametrize(("kind", "name"), flows())
def test_round_trip_far_into_the_tails(kind: str, name: str) -> None:
    model = build(kind, name)
    shape = (64, *model.prior.shape)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    x = model.decode(z)
    assert bool(x.isfinite().all())
    torch.testing.assert_close(model.encode(x)[0], z, rtol=0, atol=1e-9)
    away = torch.rand(64, *model.event_shape, dtype=torch.float64) * 4 - 2
    z, log_abs_det = model.encode(away)
    assert bool(log_abs_det.isfinite().all())
    torch.testing.assert_close(model.decode(z), away, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SHAPES)
def test_solvers_invert_it_as_any_autoregressive_flow(name: str) -> None:
    model = whitening(SHAPES[name])
    noise = torch.cat([sample_noise(model, seed) for seed in range(3)])
    expected = model.decode(noise)
    for solver in ("auto", "sequential", "jacobi", "gauss-seidel-jacobi", "selective", "adaptive"):
        drawn = sample(model, 3, solver=solver)
        assert float(drawn.certificate.max()) < 1e-9
        torch.testing.assert_close(drawn.x, expected, rtol=0, atol=1e-9)


def test_the_inverse_is_one_substitution(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not go token by token, unless a solver asks for that."""
    model = whitening(SHAPES["one channel"])
    z = sample_noise(model, 0)
    expected = sample(model, 1).x
    monkeypatch.setattr(type(model.whitening), "conditioner", None)
    torch.testing.assert_close(model.decode(z), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rotation", ["cholesky", "pca", "zca"])
@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 3, 5)])
def test_full_whitening_is_the_multivariate_normal(shape: tuple, rotation: str) -> None:
    config = WhiteningConfig(shape, rotation=rotation, levels=8)
    images = some(config)
    model = whitening(config, images)
    v = images.flatten(1).double()
    covariance = torch.cov(v.T, correction=0) + torch.eye(v.shape[1], dtype=torch.float64) / 12
    oracle = MultivariateNormal(v.mean(0) + 0.5, covariance)
    x = model.add_noise(images[:32], torch.Generator().manual_seed(0))
    expected = oracle.log_prob((x.flatten(1) + 1) * 4) + v.shape[1] * math.log(4)
    torch.testing.assert_close(log_density(model, x).detach(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["dct", "patch", "diagonal"])
def test_structured_whitening_is_a_normal_of_that_covariance(name: str) -> None:
    model = whitening(SHAPES[name])
    eye = torch.eye(model.dims, dtype=torch.float64)
    shape = (model.dims, *model.event_shape)
    zero = torch.zeros(1, *model.prior.shape, dtype=torch.float64)
    mean = model.decode(zero).flatten()
    columns = model.decode(eye.view(model.dims, *model.prior.shape)).flatten(1) - mean
    oracle = MultivariateNormal(mean, columns.T @ columns)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(
        log_density(model, x).detach(), oracle.log_prob(x.flatten(1)), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("name", SHAPES)
def test_whitened_training_covariance_is_the_identity(name: str) -> None:
    """The covariance of midpoints, plus that of the dequantisation noise."""
    model = whitening(SHAPES[name])
    layout, images = model.layout, some(model.linear)
    z = model.encode(model.from_grey_levels(images))[0].detach()
    zero = torch.zeros(1, *model.event_shape, dtype=torch.float64)
    eye = torch.eye(model.dims, dtype=torch.float64).view(-1, *model.event_shape)
    columns = (model.encode(eye)[0] - model.encode(zero)[0]).detach()  # (D, T, P)
    centred = z - z.mean(0)
    for at in range(layout.positions if layout.groups > 1 else 1):
        where = slice(at, at + 1) if layout.groups > 1 else slice(None)
        pooled = layout.positions if layout.groups == 1 else 1
        data = torch.einsum("ntp,nsp->ts", centred[:, :, where], centred[:, :, where])
        data = data / (len(images) * pooled)
        noise = torch.einsum("dtp,dsp->ts", columns[:, :, where], columns[:, :, where])
        noise = noise / pooled * (2 / model.levels) ** 2 / 12
        eye = torch.eye(layout.tokens, dtype=torch.float64)
        torch.testing.assert_close(data + noise, eye, rtol=0, atol=1e-10)


def test_pca_is_ordered_zca_symmetric_cholesky_triangular() -> None:
    maps = {}
    for rotation in ("pca", "zca", "cholesky"):
        model = whitening(WhiteningConfig((1, 3, 3), rotation=rotation, levels=8))
        eye = torch.eye(9, dtype=torch.float64).view(9, 1, 3, 3)
        maps[rotation] = (model.encode(eye)[0] - model.encode(0 * eye)[0]).squeeze(2).T.detach()
    zero = torch.zeros(9, 9, dtype=torch.float64)
    assert torch.equal(maps["cholesky"].triu(1), zero)
    torch.testing.assert_close(maps["zca"], maps["zca"].T, rtol=0, atol=1e-9)
    rows = maps["pca"].norm(dim=1)  # inverse deviations of the components
    assert bool((rows.diff() >= -1e-9).all())
    gram = maps["pca"] @ maps["pca"].T
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-8)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_a_constant_image_scores_the_floor(covariance: str) -> None:
    config = WhiteningConfig((1, 4, 4), covariance, levels=256)
    images = torch.full((16, 1, 4, 4), 9, dtype=torch.uint8)
    model = whitening(config, images)
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)
    u = (u[1:] + u[:-1]) / 2  # the exact mean over the noise, pixel by pixel alike
    x = (9 + u.view(-1, 1, 1, 1).expand(-1, 1, 4, 4)) / 128 - 1
    bits = -(log_density(model, x).detach().mean() - 16 * math.log(128)) / (16 * math.log(2))
    assert math.isclose(float(bits), 0.5 * math.log2(2 * math.pi * math.e / 12), abs_tol=1e-6)


def test_training_bits_are_the_closed_form() -> None:
    """1/2 log2(2 pi e) + 1/(2 D) log2 det S, the mean over all noise."""
    config = WhiteningConfig((1, 4, 4), levels=8)
    images = some(config)
    found = fitted(config, [images])
    grey_levels = found.covariance[0] * (config.levels / 2) ** 2
    closed = 0.5 * math.log2(2 * math.pi * math.e)
    closed += float(torch.logdet(grey_levels)) / (2 * 16 * math.log(2))
    model = whitening(config, images)
    draws = [log_likelihood(model, images, seed=seed).bits_per_dim for seed in range(16)]
    assert math.isclose(sum(draws) / len(draws), closed, abs_tol=5e-3)


@given(cuts=st.lists(st.integers(1, 199), max_size=6, unique=True), name=st.sampled_from([*SHAPES]))
def test_batching_changes_nothing(cuts: list[int], name: str) -> None:
    config = SHAPES[name]
    images = some(config)
    parts = [part for part in images.tensor_split(sorted(cuts)) if len(part)]
    with patch.object(moments, "CHUNK_VALUES", 17 * images[0].numel()):
        whole, streamed = (fitted(config, batches) for batches in ([images], parts))
    assert streamed.count == whole.count == 200
    for field in ("mean", "covariance"):
        assert torch.equal(getattr(streamed, field), getattr(whole, field)), field


@given(cuts=st.lists(st.integers(1, 199), max_size=6, unique=True), name=st.sampled_from([*SHAPES]))
def test_moments_of_parts_are_those_of_the_whole(cuts: list[int], name: str) -> None:
    layout = SHAPES[name].layout
    x = layout.arrange(some(SHAPES[name]).double() + 1e3)
    whole, merged, updated = (moments.Moments(layout, CPU) for _ in range(3))
    whole.update(x)
    for part in x.tensor_split(sorted(cuts)):
        updated.update(part)
        alone = moments.Moments(layout, CPU)
        alone.update(part)
        merged.merge(alone)
    for found in (merged, updated):
        assert found.count == 200
        torch.testing.assert_close(found.mean, whole.mean, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.covariance(), whole.covariance(), rtol=0, atol=1e-9)


def test_a_far_mean_costs_no_digits() -> None:
    config = WhiteningConfig((1, 2, 2), levels=256)
    images = noise_images(253, 256, 999, 1, 2, 2)
    found = fitted(config, images.split(10))
    v = images.flatten(1).double() / 128
    expected = torch.cov(v.T, correction=0) + torch.eye(4, dtype=torch.float64) / 12 / 128**2
    torch.testing.assert_close(found.covariance[0], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("count", [1, 2, 5, 12, 40])
@pytest.mark.parametrize("shrinkage", [None, 0.0, 0.3, 1.0])
def test_fewer_images_than_dimensions(count: int, shrinkage: float | None) -> None:
    config = WhiteningConfig((1, 5, 5), shrinkage=shrinkage, levels=256)
    images = noise_images(0, 256, count, 1, 5, 5)
    found = fitted(config, [images])
    assert 0 <= found.shrinkage <= 1
    assert bool((torch.linalg.eigvalsh(found.covariance) > 0).all())


def test_shrinkage_is_chosen_by_held_out_likelihood() -> None:
    config = WhiteningConfig((1, 4, 4), shrinkage=None, levels=256)
    independent = noise_images(0, 256, 60, 1, 4, 4)
    assert fitted(config, [independent]).shrinkage > 0.3
    many = some(config, 5000)
    assert fitted(config, [many]).shrinkage < 0.02
    source = torch.Generator().manual_seed(0)
    common = torch.randint(0, 180, (2040, 1, 1, 1), generator=source)
    images = (common + torch.randint(0, 76, (2040, 1, 4, 4), generator=source)).to(torch.uint8)
    few, test = images.split([40, 2000])
    scores = {}
    for rho in (None, 0.0, 1.0):
        model = whitening(WhiteningConfig((1, 4, 4), shrinkage=rho, levels=256), few)
        scores[rho] = log_likelihood(model, test).bits_per_dim
    assert scores[None] < min(scores[0.0], scores[1.0])


def test_chosen_shrinkage_is_the_brute_force_one() -> None:
    layout = WhiteningConfig((2, 3, 3)).layout
    part, held_out = (moments.Moments(layout, CPU) for _ in range(2))
    x = torch.randn(60, 18, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x + x[:, :1]
    part.update(x[:40])
    held_out.update(x[40:])
    noise = 1e-3
    rho = moments.chosen_shrinkage(part, held_out, noise)
    covariance, seen = part.covariance(noise)[0], held_out.covariance(noise, part.mean)[0]

    def cost(r: float) -> float:
        shrunk = torch.lerp(covariance, torch.diag(covariance.diagonal()), r)
        return float(torch.logdet(shrunk) + torch.trace(torch.linalg.solve(shrunk, seen)))

    assert all(cost(rho) <= cost(r) + 1e-3 for r in torch.linspace(0.001, 1, 200).tolist())


@pytest.mark.parametrize("name", LAYERED)
def test_layers_lose_no_likelihood_on_other_images(name: str) -> None:
    config = SHAPES[name]
    images = some(config, 2000, seed=5)
    first = log_likelihood(whitening(config), images).bits_per_dim
    for layers in (1, 3):
        model = gaussianisation(config, layers=layers)
        assert log_likelihood(model, images).bits_per_dim <= first + 1e-6
        gaussian = log_likelihood(model.gaussian(), images).bits_per_dim
        assert math.isclose(gaussian, first, abs_tol=1e-9)


def test_layers_leave_gaussian_images_alone() -> None:
    config = WhiteningConfig((1, 3, 3), levels=256)
    source = torch.Generator().manual_seed(0)
    values = torch.randn(4000, 1, 3, 3, generator=source) * 20 + 128
    model = Gaussianisation(GaussianisationConfig((1, 3, 3), layers=1)).double()
    said: list[str] = []
    model.fit([values.round().to(torch.uint8)], report=said.append)
    assert said[-1].startswith("layer 1 of 1")
    plain = whitening(config, values.round().to(torch.uint8))
    fresh = (torch.randn(4000, 1, 3, 3, generator=source) * 20 + 128).round().to(torch.uint8)
    loss = log_likelihood(model, fresh).bits_per_dim - log_likelihood(plain, fresh).bits_per_dim
    assert abs(loss) < 0.01


def test_gaussianisation_finds_what_a_gaussian_cannot() -> None:
    """Independent bytes: the true code has 8 bits, the Gaussian 0.2546 more."""
    images = noise_images(0, 256, 4000, 1, 2, 2)
    plain = log_likelihood(whitening(WhiteningConfig((1, 2, 2)), images), images).bits_per_dim
    assert math.isclose(plain, 8.254614, abs_tol=0.01)
    model = Gaussianisation(GaussianisationConfig((1, 2, 2), layers=1, bins=64)).double()
    model.fit([images])
    assert 8 < log_likelihood(model, images).bits_per_dim < 8.05


def test_the_noise_of_a_fit_is_seeded_and_batching_does_not_change_it() -> None:
    config = GaussianisationConfig((1, 4, 4), levels=8, layers=2, bins=6, fit_images=50)
    images = some(config.linear)
    states = []
    for seed, batches in ((0, [images]), (0, images.split(7)), (1, [images])):
        model = Gaussianisation(config).double()
        model.fit(batches, seed=seed)
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=1e-7, msg=name)
    assert not torch.equal(states[0]["layers.0.start"], states[2]["layers.0.start"])


def test_one_shot_batches_are_an_error_where_two_passes_are_needed() -> None:
    config = GaussianisationConfig((1, 4, 4), levels=8, layers=1)
    with pytest.raises(ValueError, match="twice"):
        Gaussianisation(config).fit(iter([some(config.linear)]))
    with pytest.raises(ValueError, match="at least one image"):
        Whitening(WhiteningConfig()).fit([])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"covariance": "patch", "patch_size": 3}, "divides height and width"),
        ({"shrinkage": 1.5}, "shrinkage in [0, 1]"),
        ({"image_shape": (3, 64, 64)}, "covariance=dct"),
        ({"levels": 1}, "levels >= 2"),
        ({"rotation": "ica"}, "'cholesky' | 'pca' | 'zca', got 'ica'"),
        ({"covariance": "block"}, "'full' | 'patch' | 'dct' | 'diagonal', got 'block'"),
    ],
)
def test_configurations_that_cannot_be_built(fields: dict, message: str) -> None:
    for preset in ("whitening-tiny", "gaussianisation-tiny"):
        with pytest.raises(ValueError, match=re.escape(message)):
            registry.build(preset, **fields)


def test_unfitted_is_the_identity_and_counts_what_is_free() -> None:
    model = Whitening(WhiteningConfig((1, 3, 3)))
    x = torch.rand(2, 1, 3, 3)
    torch.testing.assert_close(model.encode(x)[0].view_as(x), x)
    assert model.num_parameters == 9 + 9 * 10 // 2
    dct = Whitening(WhiteningConfig((3, 4, 4), "dct"))
    assert dct.num_parameters == 16 * (3 + 6)


def test_large_colour_images_in_the_cosine_basis() -> None:
    config = WhiteningConfig((3, 64, 64), "dct", shrinkage=None)
    images = noise_images(0, 256, 300, 3, 64, 64)
    model = Whitening(config)
    model.fit(images.split(64))
    assert model.num_parameters == 4096 * 9
    assert math.isclose(log_likelihood(model, images[:50]).bits_per_dim, 8.2546, abs_tol=0.05)
    x = model.from_grey_levels(images[:4])
    torch.testing.assert_close(model.decode(model.encode(x)[0]), x, rtol=0, atol=1e-4)


def test_stationary_noise_is_diagonal_in_the_cosine_basis() -> None:
    """Images that are white in that basis by construction: dct and full find one Gaussian."""
    config = WhiteningConfig((1, 4, 4), "dct")
    deviation = torch.linspace(20, 2, 16, dtype=torch.float64).view(1, 1, 16)
    source = torch.Generator().manual_seed(0)
    coefficients = torch.randn(20_000, 1, 16, generator=source, dtype=torch.float64) * deviation
    values = config.layout.restore(coefficients) + 128
    assert float(values.min()) >= 0
    assert float(values.max()) < 256
    images = values.floor().to(torch.uint8)
    dct, full = (whitening(WhiteningConfig((1, 4, 4), c), images) for c in ("dct", "full"))
    gap = log_likelihood(dct, images[:2000]).bits_per_dim
    gap -= log_likelihood(full, images[:2000]).bits_per_dim
    assert abs(gap) < 1e-3


def test_presets_build_save_and_load(tmp_path: Path) -> None:
    for name in ("whitening-tiny", "gaussianisation-tiny"):
        model = registry.build(name)
        assert isinstance(model, FittedFlow)
        model.fit([some(model.linear)])
        model.save_pretrained(tmp_path / name)
        back = exactflow.from_pretrained(tmp_path / name)
        images = some(model.linear, 5)
        before = log_likelihood(model, images).nats
        assert torch.equal(log_likelihood(back, images).nats, before)


def test_baselines_are_the_known_numbers() -> None:
    data = DataConfig(source="digits")
    training, held_out = load(data, "train"), load(data, "test")
    found = {n: b.likelihood.bits_per_dim for n, b in baselines(training, held_out).items()}
    assert math.isclose(found["full-covariance Gaussian"], 2.949, abs_tol=1e-3)
    assert math.isclose(found["independent pixels"], 3.375, abs_tol=1e-3)
    assert found["Gaussianisation"] < found["full-covariance Gaussian"]


def test_baselines_read_no_more_than_they_can_fit_in_seconds() -> None:
    data = DataConfig(source="digits")
    held_out = load(data, "test")
    with patch.object(floor, "FIT_VALUES", 100 * 64):
        training = floor.training_images(data, held_out)
    assert len(training) == 100
    few = floor.training_images(DataConfig(source="digits", limit=30), held_out)
    assert len(few) == 30
    found = {n: b.likelihood.bits_per_dim for n, b in baselines(few, held_out).items()}
    assert found["full-covariance Gaussian"] < found["independent pixels"] + 0.05


def test_baselines_of_images_too_large_for_one_covariance() -> None:
    images = noise_images(0, 256, 40, 3, 40, 40)
    training = replace(load(DataConfig(), "train"), images=images.numpy(), levels=256)
    found = baselines(training, training)
    assert [*found] == [
        "independent pixels",
        "DCT-factorised Gaussian",
        "DCT-factorised Gaussianisation",
    ]
    assert all(baseline.trained_on == 40 for baseline in found.values())


def test_a_fit_is_a_run_and_the_same_one_again_is_read(tmp_path: Path) -> None:
    training = load(DataConfig(source="digits", limit=100), "train")
    model = Whitening(WhiteningConfig(levels=17))
    options = {"augmentation": Augmentation(flip=True), "progress": False}
    told = []

    def note(progress) -> dict[str, float]:
        told.append(progress.step)
        return {"noted": 1.0}

    run = TrainConfig(batch_size=32)
    result = fit_closed_form(model, training, run, tmp_path, every={5: note}, **options)
    assert (result.step, result.images_seen, told) == (1, 200, [1])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["noted"] == 1
    assert math.isfinite(lines[0]["loss"])
    again = Whitening(WhiteningConfig(levels=17))
    fit_closed_form(again, training, run, tmp_path, every={5: note}, **options)
    assert told == [1]
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with pytest.raises(ValueError, match="another run"):
        fit_closed_form(again, training, TrainConfig(seed=1), tmp_path, **options)
    both = torch.tensor(training.images)
    both = torch.cat([both, both.flip(-1)])
    mirrored = Whitening(WhiteningConfig(levels=17))
    mirrored.fit([both])
    x = grey.dequantize(both[:9], torch.full_like(both[:9], 0.5, dtype=torch.float32), 17)
    torch.testing.assert_close(mirrored.encode(x)[0], model.encode(x)[0], rtol=1e-4, atol=1e-4)


def test_without_a_training_split_the_score_stands_alone(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for index in range(3):
            pixels = torch.full((8, 8), 60 * index, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "data" / split / f"{index}.png")
    (tmp_path / "data" / "train" / "2.png").write_bytes(b"not an image")
    Whitening(WhiteningConfig()).save_pretrained(tmp_path / "model")
    done = cli("evaluate", "model", "data.source=data", "--out", "e.json", cwd=tmp_path)
    assert "none: no training split" in done.stdout
    assert json.loads((tmp_path / "e.json").read_text())["baselines"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["whitening-full", "gaussianisation-tiny"])
def test_every_verb_of_the_command_line(preset: str, tmp_path: Path) -> None:
    words = ("data.source=digits", "data.limit=700")
    cli("train", preset, *words, "--out", "run", cwd=tmp_path)
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    again = cli("train", preset, *words, "--out", "run", cwd=tmp_path)
    assert "covariance of" not in again.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model", "config.yaml", "metrics.jsonl", "samples"} <= names
    done = cli("evaluate", "run", "--out", "e.json", cwd=tmp_path)
    assert "baseline: independent pixels" in done.stdout
    assert "fitted to 700 training images" in done.stdout
    result = json.loads((tmp_path / "e.json").read_text())
    assert {"independent pixels", "full-covariance Gaussian", "Gaussianisation"} == {
        *result["baselines"]
    }
    if preset == "whitening-full":
        own = result["baselines"]["full-covariance Gaussian"]
        assert math.isclose(result["bits_per_dim"], own["bits_per_dim"], abs_tol=1e-3)
        assert result["parameters"] == own["parameters"]
    cli("sample", "run", "--n", "3", "--out", "s", cwd=tmp_path)
    cost = json.loads((tmp_path / "s" / "samples.json").read_text())
    assert max(cost["certificate"]) < 1e-3
    cli("encode", "run", "--n", "3", "--out", "z", cwd=tmp_path)
    assert json.loads((tmp_path / "z" / "encode.json").read_text())["wrong_grey_levels"] == 0
    assert "fingerprint" in cli("info", "run", cwd=tmp_path).stdout
