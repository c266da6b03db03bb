"""HDiT: published outputs and counts, attention against its dense form, laws of the model."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from exactflow.core.config import checked, override
from exactflow.core.grey_levels import center
from exactflow.models.hdit.attention import (
    block_sparse,
    neighborhood_attention,
    shifted_window_attention,
    token_positions,
)
from exactflow.models.hdit.model import HDiT, HDiTConfig
from exactflow.models.hdit.published import from_published
from exactflow.models.registry import FAMILIES
from flows import blueprint
from originals import close, recorded

PRESETS = FAMILIES["hdit"].presets

CASES = ["hdit_neighborhood_global", "hdit_shifted_window_cond"]
COUNTS = {
    "hdit-imagenet128-ablation": 117_003_805,
    "hdit-ffhq1024": 85_079_300,
    "hdit-imagenet256": 557_416_522,
    "hdit-imagenet256-unconditional": 557_160_266,
    "hdit-imagenet256-4-small": 138_694_322,
    "hdit-imagenet256-4-medium": 301_836_142,
    "hdit-imagenet256-8-large": 546_861_489,
    "hdit-imagenet256-16-large": 507_245_696,
    "hdit-flowers256": 22_361_274,
    "hdit-flowers256-shifted-window": 22_361_274,
    "hdit-cifar10-21m": 20_981_809,
    "hdit-mnist-9m": 9_187_360,
}
SMALL = HDiTConfig(
    (1, 8, 8), 1, (1, 1), (16, 32), ("neighborhood", "global"), head_dim=8, kernel_size=3,
    mapping_depth=1, mapping_width=32, num_classes=3, low_resolution=8,
)  # fmt: skip


def hints(settings: dict[str, Any]) -> dict[str, Any]:
    """What the golden weights do not contain."""
    attention = [level["self_attn"] for level in settings["levels"]]
    sizes = {k: v for kind in attention for k, v in kind.items() if k.endswith("_size")}
    side = settings["image_size"]
    return {
        "image_shape": [settings["in_channels"], side, side],
        "attention": [kind["type"] for kind in attention],
        "low_resolution": side,
        "sigma_data": settings["sigma_data"],
        "weighting": settings["weighting"],
        **sizes,
    }


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[HDiT, dict[str, Tensor]]:
    settings, state, expected = recorded("hdit", request.param, "pth")
    model = from_published(state, hints=hints(settings))
    assert model.num_parameters == settings["parameters"]
    return model, expected


def randomized(config: HDiTConfig) -> HDiT:
    """A model whose zero-initialised weights are nonzero."""
    torch.manual_seed(0)
    model = HDiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def test_output_of_the_network(case: tuple[HDiT, dict[str, Tensor]]) -> None:
    model, e = case
    close(model.network(e["x"], e["sigma"].log(), e.get("y"), e["aug_cond"]), e["network_output"])


def test_denoised_images(case: tuple[HDiT, dict[str, Tensor]]) -> None:
    model, e = case
    t = model.path.time_of(-2 * e["sigma"].double().log())
    x_t = e["x"] * e["sigma"].view(-1, 1, 1, 1) * model.path.at(t).alpha.view(-1, 1, 1, 1)
    close(model.denoise(x_t.float(), t, e.get("y")).mean, e["denoised"])


def test_loss(case: tuple[HDiT, dict[str, Tensor]]) -> None:
    model, e = case
    x0 = e["x"].clamp(-1, 1)
    close(model.denoising_loss(x0, e["noise"], e["sigma"].log(), e.get("y")), e["loss"])


@pytest.mark.parametrize("preset", COUNTS)
def test_published_parameter_counts(preset: str) -> None:
    assert blueprint(preset).num_parameters == COUNTS[preset]


def test_every_published_preset_is_counted() -> None:
    assert {name for name, preset in PRESETS.items() if preset.published} == COUNTS.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_configurations_survive_json(preset: str) -> None:
    config = PRESETS[preset].config
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    assert HDiTConfig(**checked(HDiTConfig, fields)) == config


@pytest.mark.parametrize("config", [SMALL, PRESETS["hdit-digits"].config], ids=["small", "digits"])
def test_bfloat16_by_autocast(config: HDiTConfig) -> None:
    model = randomized(config).float()
    images = torch.randint(0, config.levels, (4, *config.image_shape), dtype=torch.uint8)
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model.loss(images, generator=torch.Generator()))
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0.01)
    losses[1].sum().backward()


def dense_neighborhood(q: Tensor, k: Tensor, v: Tensor, kernel: int) -> Tensor:
    height, width = q.shape[2:4]
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    first = (place - kernel // 2).clamp(min=0)
    first = torch.minimum(first, torch.tensor([height, width]) - kernel)
    offset = place[None] - first[:, None]
    seen = ((offset >= 0) & (offset < kernel)).all(-1)
    assert bool((seen.sum(1) == kernel**2).all())
    flat = [part.flatten(2, 3) for part in (q, k, v)]
    return F.scaled_dot_product_attention(*flat, seen, scale=1.0).view_as(q)


@pytest.mark.parametrize(
    ("height", "width", "kernel"),
    [(7, 7, 7), (9, 13, 3), (8, 8, 7), (17, 11, 5), (5, 30, 5), (16, 24, 7), (3, 3, 1)],
)
def test_neighborhood_attention_is_its_dense_form(height: int, width: int, kernel: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, height, width, 16, dtype=torch.float64, requires_grad=True)
    wanted = dense_neighborhood(q, k, v, kernel)
    got = neighborhood_attention(q, k, v, kernel)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    weight = torch.randn_like(got)
    rates = [torch.autograd.grad((weight * y).sum(), (q, k, v)) for y in (got, wanted)]
    for a, b in zip(*rates, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    if height == width == kernel:
        torch.testing.assert_close(
            got,
            F.scaled_dot_product_attention(
                *(part.flatten(2, 3) for part in (q, k, v)), scale=1.0
            ).view_as(q),
            rtol=0,
            atol=1e-12,
        )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("height", "width", "kernel"), [(7, 7, 7), (9, 13, 3), (16, 24, 7)])
def test_block_mask_is_the_neighborhood(height: int, width: int, kernel: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, height, width, 16)
    got = block_sparse(flex_attention, q, k, v, kernel)
    torch.testing.assert_close(got, dense_neighborhood(q, k, v, kernel), rtol=0, atol=1e-5)


def test_neighborhood_attention_needs_room() -> None:
    q = torch.zeros(1, 1, 6, 9, 8)
    with pytest.raises(ValueError, match=r"at least 7 x 7 tokens .*got 6 x 9"):
        neighborhood_attention(q, q, q, 7)


def test_shifted_windows_do_not_look_across_the_border() -> None:
    """The keys of a token are in its window of the shifted grid, on its side of the border."""
    height, width, window, shift = 8, 12, 4, 2
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, height, width, 8, dtype=torch.float64)
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    # Token r stands at r + shift; those beyond the border come in again at the other end.
    block = (place + shift).div(window, rounding_mode="floor")
    seen = (block[:, None] == block[None]).all(-1)
    flat = [part.flatten(2, 3) for part in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*flat, seen, scale=1.0).view_as(q)
    got = shifted_window_attention(q, k, v, window, shift)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"multiples of 5 tokens.*got 8 x 12"):
        shifted_window_attention(q, k, v, 5, 0)


def test_positions_keep_the_aspect() -> None:
    place = token_positions(4, 8, torch.zeros(1, dtype=torch.float64))
    assert float(place[..., 1].max()) == 7 / 8
    assert float(place[..., 0].max()) == 3 / 8
    coarse = token_positions(2, 4, place)
    mean = place.unflatten(1, (4, 2)).unflatten(0, (2, 2)).mean((1, 3))
    torch.testing.assert_close(coarse, mean, rtol=0, atol=1e-15)


def test_v_is_what_the_preconditioning_says() -> None:
    """`predict` is the v that belongs to c_skip x + c_out F, on the whole range of noise."""
    model = randomized(SMALL)
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    torch.manual_seed(1)
    x_t, label = torch.randn(7, 1, 8, 8, dtype=torch.float64), torch.arange(7) % 4
    point = model.path.at(t)
    alpha, sigma = (f.view(-1, 1, 1, 1) for f in (point.alpha, point.sigma))
    s, d = sigma / alpha, model.config.sigma_data
    x = x_t / alpha
    output = model.network(x / (s**2 + d**2).sqrt(), s.flatten().log(), label)
    denoised = d**2 / (s**2 + d**2) * x + s * d / (s**2 + d**2).sqrt() * output
    wanted = (alpha * x_t - denoised) / sigma
    got = model.predict(x_t, t, label)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.denoise(x_t, t, label).mean, denoised, rtol=1e-9, atol=1e-9)


def test_without_noise_the_image_stays() -> None:
    model = randomized(override(SMALL, {"sigma_min": 1e-8}))
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64) * 2 - 1
    back = model.denoise(x, torch.ones(2, dtype=torch.float64)).mean
    torch.testing.assert_close(back, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("weighting", "on_data"),
    [
        ("soft-min-snr", lambda s: 1 / (s**2 + 0.25)),
        ("min-snr", lambda s: (1 / s**2).clamp(max=5)),
        ("snr", lambda s: 1 / s**2),
        ("karras", lambda s: (s**2 + 0.25) / (0.5 * s) ** 2),
    ],
)
def test_loss_is_the_weighted_error_of_the_data(weighting: str, on_data: Any) -> None:
    model = randomized(override(SMALL, {"weighting": weighting}))
    sigma = torch.tensor([0.02, 0.3, 0.7, 5.0], dtype=torch.float64)
    torch.manual_seed(1)
    x0, noise = torch.randn(2, 4, 1, 8, 8, dtype=torch.float64)
    t = model.path.time_of(-2 * sigma.log())
    point = model.path.at(t)
    x_t = point.alpha.view(-1, 1, 1, 1) * x0 + point.sigma.view(-1, 1, 1, 1) * noise
    error = (model.denoise(x_t, t).mean - x0).square().flatten(1).mean(1)
    got = model.denoising_loss(x0, noise, sigma.log())
    torch.testing.assert_close(got, error * on_data(sigma), rtol=1e-8, atol=0)


def test_training_noise_is_stratified_and_follows_the_path() -> None:
    """One noise level in each of `batch` equal intervals of time, cut at the path's ends."""
    model, batch, seen = randomized(SMALL), 64, []
    hook = model.network.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    model.loss(torch.zeros(batch, 1, 8, 8, dtype=torch.uint8), generator=torch.Generator())
    hook.remove()
    times = model.path.time_of(-2 * seen[0]).sort().values
    assert (times * batch).floor().tolist() == list(range(batch))
    assert math.isclose(
        float(model.path.at(torch.zeros(1)).log_snr.div(-2).exp()), 1e3, rel_tol=1e-3
    )


def test_loss_is_a_function_of_the_generator() -> None:
    model = randomized(SMALL)
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    label = torch.arange(5) % 3
    first, again, other = (
        model.loss(images, label, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    assert first.shape == (5,)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_labels_are_dropped_one_by_one_in_training_only() -> None:
    model, seen = randomized(override(SMALL, {"label_dropout": 0.5})), []
    model.network.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    images = torch.zeros(200, 1, 8, 8, dtype=torch.uint8)
    label = torch.zeros(200, dtype=torch.int64)
    model.loss(images, label)
    model.train().loss(images, label, generator=torch.Generator())
    model.loss(images)
    kept, dropped, absent = seen
    assert torch.equal(kept, label)
    assert 60 < int((dropped == model.null_label).sum()) < 140
    assert bool((absent == model.null_label).all())


def test_the_initial_network_says_zero_and_learns() -> None:
    model = HDiT(SMALL)
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    x = center(images, 256)
    assert not model.network(x, torch.zeros(4), torch.zeros(4, dtype=torch.int64)).any()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(6):  # zero-initialised maps pass gradients on one after the other
        optimizer.zero_grad()
        model.loss(images, torch.zeros(4, dtype=torch.int64)).sum().backward()
        optimizer.step()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_stages_are_all_layers() -> None:
    config = override(SMALL, {"depths": (2, 3)})
    assert len(HDiT(config).stages) == 2 + 3 + 2


def test_published_training_checkpoint() -> None:
    """The averaged weights and the run's configuration, without hints; Fourier buffers loaded."""
    settings, state, _ = recorded("hdit", CASES[0], "pth")
    model = {
        "type": "image_transformer_v2",
        "input_channels": 3,
        "input_size": [16, 16],
        "patch_size": [2, 2],
        "depths": [1, 2],
        "widths": [64, 96],
        "self_attns": [level["self_attn"] for level in settings["levels"]],
        "loss_weighting": "soft-min-snr",
        "dropout_rate": [0.0, 0.1],
        "sigma_data": 0.5,
    }
    loaded = from_published(state, {"model": model})
    assert loaded.config.dropout == (0.0, 0.1)
    assert loaded.config.kernel_size == 3
    assert loaded.config.patch_size == 2
    assert torch.equal(loaded.network.time_emb.weight, state["time_emb.weight"])
    assert torch.equal(loaded.network.aug_emb.weight, state["aug_emb.weight"])
    half = {name: value.half() for name, value in state.items()}
    slim = from_published(half, {"model": model})
    assert slim.dtype == torch.float32
    assert torch.equal(slim.network.time_emb.weight, half["time_emb.weight"].float())


def test_published_files_that_cannot_be_read() -> None:
    settings, state, _ = recorded("hdit", CASES[0], "pth")
    told = hints(settings)
    with pytest.raises(ValueError, match="does not tell attention"):
        from_published(state, hints={"image_shape": [3, 16, 16]})
    with pytest.raises(ValueError, match=r"depths: the weights say \(1, 2\), not \(1, 3\)"):
        from_published(state, hints={**told, "depths": [1, 3]})
    with pytest.raises(ValueError, match=r"image_transformer_v2.*got 'image_v1'"):
        from_published(state, {"model": {"type": "image_v1"}})
    incomplete = {k: v for k, v in state.items() if k != "splits.0.fac"}
    with pytest.raises(ValueError, match=r"splits\.0\.fac"):
        from_published(incomplete, hints=told)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (16,)}, "2 levels"),
        ({"kernel_size": 9}, "kernel_size of at most 8"),
        ({"kernel_size": 4}, "odd kernel_size"),
        ({"image_shape": (1, 9, 8)}, "multiples of 2"),
        ({"attention": ("shifted-window", "global"), "window_size": 3}, "window_size that divides"),
        ({"head_dim": 12}, "multiple of 8"),
        ({"low_resolution": 0}, "positive size, low"),
        ({"sigma_min": 0.0}, "sigma_min"),
        ({"weighting": "p2"}, "weighting"),
        ({"attention": ("global", "dilated")}, "attention"),
        ({"label_dropout": 2.0}, "label_dropout"),
        ({"dropout": (0.0, 1.0)}, "dropout"),
    ],
)
def test_bad_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(SMALL, change)
