"""Flow matching: the loss, the laws of its parts, and the published configurations."""

import dataclasses
import itertools
import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from exactflow.core import grey_levels as grey
from exactflow.core.config import override
from exactflow.core.randomness import generator
from exactflow.models.flow_matching.model import (
    FlowMatching,
    FlowMatchingConfig,
    PathName,
    TimeLaw,
    draw_times,
)
from exactflow.models.registry import FAMILIES
from exactflow.paths.coupling import minibatch_transport
from exactflow.paths.path import Cosine, Straight, VariancePreserving
from exactflow.paths.path_model import Prediction, convert
from flows import blueprint
from test_paths import GaussianModel

PRESETS = FAMILIES["flow-matching"].presets

SMALL = FlowMatchingConfig(
    image_shape=(1, 4, 4), network="dit", width=16, depth=1, num_heads=2, levels=8
)
PATH_NAMES: tuple[PathName, ...] = get_args(PathName)
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
PAPER_COUNTS = {
    "cifar10": (171_268_099, 153_094_915),
    "imagenet32": (228_149_507, 209_976_323),
    "imagenet64": (295_131_267, 276_421_059),
    "imagenet128": (542_804_483, 507_319_043),
}
LIBRARY_COUNTS = {
    "meta-cifar10": 55_676_419,
    "meta-imagenet32": 295_900_035,
    "meta-imagenet64": 295_900_035,
    "torchcfm-cifar10": 35_746_307,
}


def make(**changes: Any) -> FlowMatching:
    """A small model in which every weight has an effect."""
    torch.manual_seed(0)
    model = FlowMatching(dataclasses.replace(SMALL, **changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def some_images(model: FlowMatching, count: int = 4) -> Tensor:
    shape = (count, *model.event_shape)
    return torch.randint(model.levels, shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("name", "counts"), PAPER_COUNTS.items())
def test_parameter_counts_of_the_paper(name: str, counts: tuple[int, int]) -> None:
    """The paper does not say how it resamples, so both counts are given."""
    preset = PRESETS[f"flow-matching-paper-{name}"]
    for resample, count in zip(("resblock", "conv"), counts, strict=True):
        with torch.device("meta"):
            model = FlowMatching(dataclasses.replace(preset.config, resample=resample))
        assert model.num_parameters == count
        assert f"{count:,}" in preset.published


@pytest.mark.parametrize(("name", "count"), LIBRARY_COUNTS.items())
def test_parameter_counts_of_the_libraries(name: str, count: int) -> None:
    assert blueprint(f"flow-matching-{name}").num_parameters == count


def test_every_published_preset_is_counted() -> None:
    published = {name for name, preset in PRESETS.items() if preset.published}
    counted = {*(f"paper-{name}" for name in PAPER_COUNTS), *LIBRARY_COUNTS}
    assert published == {f"flow-matching-{name}" for name in counted}


def test_presets_for_a_cpu_are_small() -> None:
    own = [n for n in PRESETS if not any(who in n for who in ("paper", "meta", "torchcfm"))]
    assert len(own) == 5
    for name in own:
        assert blueprint(name).num_parameters < 1_200_000


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PATH_NAMES)
def test_velocity_loss_is_the_velocity_s_square_error(
    name: PathName, prediction: Prediction
) -> None:
    """For every prediction: equal to regressing `velocity` on d_alpha x0 + d_sigma eps."""
    model = make(path=name, prediction=prediction)
    images = some_images(model)
    loss = model.loss(images, generator=generator(0, "loss"))
    source = generator(0, "loss")  # the same draws, in the order the loss makes them
    x0 = grey.center(images, model.levels, torch.float64)
    eps = torch.randn(x0.shape, generator=source, dtype=x0.dtype)
    t = torch.rand(len(x0), generator=source, dtype=x0.dtype)
    point = model.path.at(t)
    a, s, da, ds = (
        v.view(-1, 1, 1, 1) for v in (point.alpha, point.sigma, point.d_alpha, point.d_sigma)
    )
    said = model.velocity(a * x0 + s * eps, t)
    expected = (said - (da * x0 + ds * eps)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_prediction_loss_is_that_of_the_prediction(prediction: Prediction) -> None:
    model = make(path="cosine", prediction=prediction, weight="prediction")
    images = some_images(model)
    loss = model.loss(images, generator=generator(0, "loss"))
    source = generator(0, "loss")
    x0 = grey.center(images, model.levels, torch.float64)
    eps = torch.randn(x0.shape, generator=source, dtype=x0.dtype)
    t = torch.rand(len(x0), generator=source, dtype=x0.dtype)
    point = Cosine().at(t)
    a, s = point.alpha.view(-1, 1, 1, 1), point.sigma.view(-1, 1, 1, 1)
    truth = {"x0": x0, "eps": eps, "v": a * eps - s * x0}
    truth["velocity"] = (math.pi / 2) * (s * x0 - a * eps)
    x_t = a * x0 + s * eps
    error = model.predict(x_t, t) - truth[prediction]
    torch.testing.assert_close(loss, error.square().flatten(1).mean(1))


@pytest.mark.slow
def test_training_on_a_gaussian_finds_its_velocity() -> None:
    """The minimiser of the loss is the marginal velocity, here that of one grey level's cube."""
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, width=32, dequantize=True, levels=2, time_scale=1.0)
    model = FlowMatching(config)
    images = torch.ones(256, *model.event_shape, dtype=torch.int64)  # x0 uniform on [0, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 150)
        optimizer.zero_grad()
        model.loss(images, generator=generator(0, step)).mean().backward()
        optimizer.step()
    model.eval()
    source = generator(1, "test")
    t = torch.full((512,), 0.6)
    x0, eps = (
        torch.rand(512, 1, 4, 4, generator=source),
        torch.randn(512, 1, 4, 4, generator=source),
    )
    x = 0.6 * x0 + 0.4 * eps
    nodes = torch.linspace(0, 1, 401)[:, None, None, None, None]  # E[x0 | x_t] by quadrature
    weight = torch.softmax(-0.5 * ((x - 0.6 * nodes) / 0.4).square(), dim=0)
    mean = (weight * nodes).sum(0)
    truth = convert(mean, x, Straight().at(t), "x0", "velocity")
    with torch.no_grad():
        error = (model.velocity(x, t) - truth).square().mean()
    assert float(error) < 0.05 * float(truth.var())


@pytest.mark.parametrize("law", get_args(TimeLaw))
def test_laws_of_t(law: TimeLaw) -> None:
    """Against their distribution functions (Kolmogorov-Smirnov, at a level of 0.001)."""
    count = 4000
    t = draw_times(law, Straight(), torch.zeros(count, 1, dtype=torch.float64), generator(0, law))
    normal = torch.distributions.Normal(0.0, 1.0)
    logit = torch.logit(t)
    ranks = {
        "uniform": t,
        "stratified": t,
        "edm": normal.cdf((logit - 1.2) / 1.2),  # -ln sigma = logit(t) is N(1.2, 1.2^2)
        "logit-normal": normal.cdf(logit),
    }[law]
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    distance = float((ranks.sort().values - steps).abs().max())
    assert distance < 1.95 / math.sqrt(count)
    if law == "stratified":
        assert distance <= 1 / count
        assert bool(((t * count).long() == torch.arange(count)).all())


def test_edm_times_are_noise_levels_on_every_path() -> None:
    x = torch.zeros(1000, 1, dtype=torch.float64)
    level = {
        name: torch.exp(-path.at(draw_times("edm", path, x, generator(0, "edm"))).log_snr / 2)
        for name, path in (("straight", Straight()), ("vp", VariancePreserving()))
    }
    torch.testing.assert_close(level["straight"], level["vp"], rtol=1e-6, atol=1e-9)


def test_minibatch_transport_is_optimal_and_a_permutation() -> None:
    source = torch.Generator().manual_seed(0)
    noise, data = (torch.randn(6, 1, 2, 2, generator=source) for _ in range(2))
    paired = minibatch_transport(noise, data)

    def cost(order: tuple[int, ...]) -> float:
        return float((noise[list(order)] - data).square().sum())

    best = min(itertools.permutations(range(6)), key=cost)
    assert torch.equal(paired, noise[list(best)])
    assert torch.equal(paired, minibatch_transport(noise, data))
    assert torch.equal(minibatch_transport(noise, noise), noise)


def test_coupling_changes_the_pairs_only() -> None:
    plain, coupled = make(), make(coupling="minibatch-ot")
    images = some_images(plain, 16)
    x0 = grey.center(images, plain.levels, torch.float64)
    source = generator(0, "loss")
    eps = torch.randn(x0.shape, generator=source, dtype=x0.dtype)
    t = torch.rand(len(x0), generator=source, dtype=x0.dtype)
    moved = minibatch_transport(eps, x0)
    assert not torch.equal(moved, eps)
    w = t.view(-1, 1, 1, 1)
    for model, noise in ((plain, eps), (coupled, moved)):
        error = model.velocity(w * x0 + (1 - w) * noise, t) - (x0 - noise)
        loss = model.loss(images, generator=generator(0, "loss"))
        torch.testing.assert_close(loss, error.square().flatten(1).mean(1))


def test_labels_are_dropped_one_by_one() -> None:
    model = make(num_classes=3, label_dropout=0.3).train()
    seen: list[Tensor] = []
    hook = model.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    images, label = some_images(model, 2000), torch.arange(2000) % 3
    model.loss(images, label, generator=generator(0, "loss"))
    dropped = seen[0] == model.null_label
    assert float(dropped.double().mean()) == pytest.approx(0.3, abs=0.05)
    assert torch.equal(seen[0][~dropped], label[~dropped])
    runs = dropped[1:] & dropped[:-1]
    assert float(runs.double().mean()) == pytest.approx(0.09, abs=0.03)  # independently
    model.eval()
    model.loss(images, label, generator=generator(0, "loss"))
    assert torch.equal(seen[1], label)
    hook.remove()


@pytest.mark.parametrize("network", ["dit", "unet"])
def test_no_label_is_the_null_label(network: str) -> None:
    changes = {"num_classes": 3, "network": network, "model_channels": 32}
    model = make(**changes, channel_mult=(1.0, 1.0), head_channels=None)
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    t, null = torch.rand(3, dtype=torch.float64), torch.full((3,), 3)
    assert torch.equal(model.predict(x, t), model.predict(x, t, null))
    assert not torch.equal(model.predict(x, t), model.predict(x, t, torch.arange(3)))
    with pytest.raises(ValueError, match=r"0 \.\. 2, or 3 for a dropped label"):
        model.predict(x, t, null + 1)
    assert len(model.stages) > 0


def test_time_enters_the_network_scaled() -> None:
    seen: list[Tensor] = []
    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    for scale in (1000.0, 1.0):
        model = make(time_scale=scale)
        model.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
        model.predict(torch.zeros(2, 1, 4, 4, dtype=torch.float64), t)
    assert torch.equal(seen[0], 1000 * t)
    assert torch.equal(seen[1], t)


@pytest.mark.parametrize("dequantize", [False, True])
def test_grey_levels_come_back(dequantize: bool) -> None:
    model = make(dequantize=dequantize)
    images = some_images(model)
    noise = torch.rand(images.shape, dtype=torch.float64)
    x = grey.dequantize(images, noise, 8) if dequantize else grey.center(images, 8)
    assert torch.equal(model.to_grey_levels(x).long(), images)


def test_loss_is_a_function_of_its_generator() -> None:
    model = make(dequantize=True, times="stratified")
    images = some_images(model)
    first, again, other = (
        model.loss(images, generator=generator(seed, "loss")) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_singular_ends_do_not_reach_the_loss() -> None:
    """float32, every path and prediction: finite though t may round to an end."""
    for name, prediction in itertools.product(PATH_NAMES, PREDICTIONS):
        model = make(path=name, prediction=prediction, times="edm").float()
        loss = model.loss(some_images(model, 500), generator=generator(0, "loss"))
        assert bool(loss.isfinite().all()), (name, prediction)
        ends = torch.tensor(model.span)
        x = torch.randn(2, 1, 4, 4)
        assert bool(model.velocity(x, ends).isfinite().all()), (name, prediction)


def test_an_oracle_is_a_fixed_point_of_the_conversions() -> None:
    """`denoise` and `velocity` of one model agree whatever it predicts."""
    x, t = (
        torch.randn(4, 1, 2, 2, dtype=torch.float64),
        torch.tensor([0.1, 0.4, 0.7, 0.95]).double(),
    )
    reference = GaussianModel(Cosine())
    for prediction in PREDICTIONS:
        model = GaussianModel(Cosine(), prediction)
        torch.testing.assert_close(model.denoise(x, t).mean, reference.denoise(x, t).mean)
        torch.testing.assert_close(model.velocity(x, t), reference.velocity(x, t))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_shape": [0, 4, 4]}, "positive sizes"),
        ({"levels": 1}, "levels >= 2"),
        ({"label_dropout": 1.5}, r"label_dropout in \[0, 1\]"),
        ({"time_scale": 0.0}, "time_scale > 0"),
        ({"path": "curved"}, "expected 'straight' .* got 'curved'"),
        ({"sigma_min": 1.0, "path": "ot"}, r"sigma_min in \[0, 1\)"),
        ({"num_heads": None}, "num_heads for a DiT"),
        ({"patch_size": 3}, "patch size that divides"),
        ({"network": "unet", "num_heads": None, "image_shape": [1, 6, 6]}, "multiples of 8"),
    ],
)
def test_bad_configurations(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(SMALL, changes)
