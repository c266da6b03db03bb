"""Likelihoods and their kinds, against closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exactflow.core import grey_levels as grey
from exactflow.core.density_flow import DensityFlow
from exactflow.core.model import Flow, NonFiniteError, log_density
from exactflow.core.prior import Prior
from exactflow.likelihood.log_likelihood import LogLikelihood, log_likelihood
from exactflow.models.tarflow.model import TarFlow, TarFlowConfig
from flows import make, perturb, some_grey_levels, some_labels


class UniformPrior(Prior):
    """Uniform on [-1, 1]."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        inside = (z.abs() <= 1).flatten(1).all(1)
        return torch.where(inside, -math.prod(self._shape) * math.log(2), -math.inf)

    def from_noise(self, noise: torch.Tensor) -> torch.Tensor:
        return torch.erf(noise / math.sqrt(2))


class UniformModel(DensityFlow):
    """The identity with a uniform prior: every image is equally likely."""

    kind = "uniform"
    noise_std = 0.0
    num_classes = 0
    stages = ()

    def __init__(self, event_shape: tuple[int, int, int], levels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._shape, self._levels = event_shape, levels
        self.unused = torch.nn.Parameter(torch.zeros(1, dtype=dtype))

    @property
    def event_shape(self) -> tuple[int, int, int]:
        return self._shape

    @property
    def levels(self) -> int:
        return self._levels

    @property
    def prior(self) -> Prior:
        return UniformPrior(self._shape)

    def encode(self, x: torch.Tensor, label=None):
        return x, x.new_zeros(len(x))

    def trajectory(self, z, label=None, *, solver=None):
        yield z

    def loss(self, images, label=None, *, generator=None):
        raise NotImplementedError


@pytest.mark.parametrize("levels", [2, 17, 32, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 3])
def test_a_uniform_density_scores_log2_of_levels(levels: int, dtype: torch.dtype, k: int) -> None:
    model = UniformModel((3, 5, 7), levels, dtype)
    images = some_grey_levels(model, 6)
    images[0], images[1] = 0, levels - 1
    result = log_likelihood(model, images, k=k)
    assert result.kind == "dequantized"
    assert result.levels == levels
    assert abs(result.bits_per_dim - math.log2(levels)) < 1e-6
    torch.testing.assert_close(
        result.per_image, torch.full((6,), math.log2(levels), dtype=torch.float64)
    )


def test_all_weights_zero_scores_as_the_standard_normal() -> None:
    """Specification, section 4: z = x, so bpd = (mean 0.5 x^2 + 0.5 ln 2 pi) / ln 2 + 7."""
    model = TarFlow(TarFlowConfig((3, 8, 8), 4, 64, 2, 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    images = some_grey_levels(model, 5)
    result = log_likelihood(model, images, seed=4)
    x = torch.cat([_dequantized(model, images, row, 4) for row in range(5)])
    expected = (0.5 * x.square().mean() + 0.5 * math.log(2 * math.pi)) / math.log(2) + 7
    assert math.isclose(result.bits_per_dim, float(expected), abs_tol=1e-9)


def _dequantized(model: Flow, images: torch.Tensor, row: int, seed: int) -> torch.Tensor:
    from exactflow.core.randomness import generator, uniform_rows

    noise = uniform_rows(model.event_shape, [generator(seed, "score", row, 0)])
    return grey.dequantize(images[row : row + 1], noise, model.levels)


@pytest.mark.parametrize("name", ["rgb", "conditional", "volume preserving"])
def test_the_value_is_the_density_of_the_dequantised_image(name: str) -> None:
    model = make(name)
    images, labels = some_grey_levels(model), some_labels(model)
    result = log_likelihood(model, images, labels, seed=7)
    for row in range(len(images)):
        label = None if labels is None else labels[row : row + 1]
        density = log_density(model, _dequantized(model, images, row, 7), label)
        expected = float(density.detach()) - model.dims * math.log(model.levels / 2)
        assert math.isclose(float(result.nats[row]), expected, abs_tol=1e-9)
        bits = -expected / (model.dims * math.log(2))
        assert math.isclose(float(result.per_image[row]), bits, abs_tol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batch_size_changes_nothing(batch_size: int) -> None:
    model = make("rgb")
    images = some_grey_levels(model, 5)
    expected = log_likelihood(model, images, k=2, seed=1)
    result = log_likelihood(model, images, k=2, seed=1, batch_size=batch_size)
    part = log_likelihood(model, images[2:4], k=2, seed=1, first=2, batch_size=batch_size)
    torch.testing.assert_close(part.nats, result.nats[2:4], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.nats, expected.nats, rtol=0, atol=1e-10)


def test_seeds_name_the_noise() -> None:
    model = make("rgb")
    images = some_grey_levels(model)
    first = log_likelihood(model, images, seed=0)
    assert torch.equal(first.nats, log_likelihood(model, images, seed=0).nats)
    assert not torch.equal(first.nats, log_likelihood(model, images, seed=1).nats)


def test_more_draws_average_the_density_and_tighten_the_bound() -> None:
    model = perturb(TarFlow(TarFlowConfig((1, 4, 4), 2, 64, 2, 1, levels=2)), 0.5).double()
    images = some_grey_levels(model, 4)
    many = 64
    draws = torch.stack([log_likelihood(model, images, k=1, seed=s).nats for s in range(many)])
    one, several = draws.mean(0), log_likelihood(model, images, k=many).nats
    assert bool((several > one).all()), "Jensen"
    expected = draws.logsumexp(0) - math.log(many)  # other draws of the same mean density
    spread = draws.std(0)
    assert bool(((several - expected).abs() < 3 * spread + 0.1).all())


@pytest.mark.slow
def test_exactly_a_mass_function_on_one_pixel() -> None:
    """One pixel, few levels: with many draws the probabilities of all images sum to one."""
    torch.manual_seed(0)
    model = perturb(TarFlow(TarFlowConfig((1, 1, 2), 1, 64, 2, 1, levels=4))).double()
    images = torch.cartesian_prod(torch.arange(4), torch.arange(4)).view(16, 1, 1, 2)
    inside = log_likelihood(model, images.to(torch.uint8), k=500).nats.exp().sum()
    x = torch.linspace(-1, 1, 201, dtype=torch.float64)
    middle = (x[1:] + x[:-1]) / 2
    points = torch.cartesian_prod(middle, middle).view(-1, 1, 1, 2)
    mass = float(log_density(model, points).exp().sum().detach()) * (2 / 200) ** 2
    assert math.isclose(float(inside), mass, rel_tol=0.02)


def test_a_model_of_noisy_images_has_no_bits_per_dim() -> None:
    model = make("gaussian noise")
    result = log_likelihood(model, some_grey_levels(model))
    assert result.kind == "noisy-density"
    assert math.isfinite(result.nats_per_dim)
    for name in ("bits_per_dim", "per_image", "standard_error"):
        with pytest.raises(ValueError, match="not a code length"):
            getattr(result, name)


def test_standard_error_is_that_of_the_mean_over_images() -> None:
    result = LogLikelihood(torch.tensor([-10.0, -14.0, -18.0]).double(), "dequantized", 4, 256, 1)
    assert math.isclose(result.bits_per_dim, 14 / 4 / math.log(2))
    assert math.isclose(result.standard_error, 4 / 4 / math.log(2) / math.sqrt(3))


def test_a_non_finite_likelihood_is_an_error() -> None:
    model = make("rgb")
    dims = model.prior.shape[1]
    with torch.no_grad():
        model.blocks[0].output.bias[:dims] = -1000.0
    with pytest.raises(NonFiniteError, match="image 0 is"):
        log_likelihood(model, some_grey_levels(model))


def test_float32_accumulates_close_to_float64() -> None:
    images = some_grey_levels(make("rgb"), 8)
    single = log_likelihood(make("rgb", torch.float32), images)
    double = log_likelihood(make("rgb"), images)
    assert single.nats.dtype == torch.float64
    assert abs(single.bits_per_dim - double.bits_per_dim) < 1e-5


@given(level=st.integers(0, 255), levels=st.sampled_from([2, 17, 32, 256]), u=st.floats(0, 0.999))
def test_grey_levels_survive_both_maps(level: int, levels: int, u: float) -> None:
    value = torch.tensor([level % levels])
    noise = torch.tensor([u], dtype=torch.float64)
    x = grey.dequantize(value, noise, levels)
    assert -1 <= float(x) < 1
    assert torch.equal(grey.quantize_dequantized(x, levels).long(), value)
    centered = grey.center(value, levels)
    assert -1 <= float(centered) <= 1
    assert torch.equal(grey.quantize_centered(centered, levels).long(), value)


def test_the_two_maps_are_different_numbers() -> None:
    value = torch.tensor([0, 255])
    assert grey.center(value, 256).tolist() == [-1.0, 1.0]
    zero = torch.zeros(2, dtype=torch.float64)
    assert grey.dequantize(value, zero, 256).tolist() == [-1.0, 2 * 255 / 256 - 1]
    assert grey.display(torch.tensor([0, 8, 16]), 17).tolist() == [0, 128, 255]
