"""Laws of every flow, over the named constructors of `flows.py` and the tiny presets."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exactflow.core.model import log_density
from exactflow.models import registry
from exactflow.models.tarflow.model import TarFlow, TarFlowConfig
from flows import (
    CONFIGS,
    NAMES,
    TINY,
    blocks,
    make,
    perturb,
    some_grey_levels,
    some_images,
    some_labels,
)


@pytest.mark.parametrize("name", NAMES)
def test_log_abs_det_is_the_jacobians(name: str) -> None:
    model = make(name)
    labels = some_labels(model)
    for row, image in enumerate(some_images(model)):
        label = None if labels is None else labels[row : row + 1]
        z, log_abs_det = model.encode(image[None], label)

        def flat(x: torch.Tensor, label: torch.Tensor | None = label) -> torch.Tensor:
            return model.encode(x.view(1, *model.event_shape), label)[0].flatten()

        jacobian = torch.autograd.functional.jacobian(flat, image.flatten())
        assert jacobian.shape == (z.numel(), image.numel())
        torch.testing.assert_close(
            torch.linalg.slogdet(jacobian).logabsdet, log_abs_det[0], rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("name", NAMES)
def test_parameters_of_a_token_do_not_see_it_or_what_follows(name: str) -> None:
    model = make(name)
    label = some_labels(model, 1)
    for block in blocks(model):
        x = torch.randn(1, *model.prior.shape, dtype=torch.float64)

        def parameters(u: torch.Tensor, block=block, label=label) -> torch.Tensor:
            return block.conditioner(u, label)

        jacobian = torch.autograd.functional.jacobian(parameters, x)
        seen = jacobian.abs().amax((0, 2, 3, 5))  # (token whose parameters, token read)
        assert seen.shape == (block.num_tokens, block.num_tokens)
        assert torch.equal(seen.triu(), torch.zeros_like(seen)), "must be exactly zero"
        below = seen.tril(-1)
        expected = torch.ones_like(seen).tril(-1)
        assert torch.equal(below > 0, expected > 0), "every earlier token must be felt"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_decode_inverts_encode(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = make(name, dtype)
    x, label = some_images(model), some_labels(model)
    before = x.clone()
    z, _ = model.encode(x, label)
    kept = z.clone()
    back = model.decode(z, label)
    assert back.dtype == dtype
    torch.testing.assert_close(back, x, rtol=0, atol=tolerance)
    assert torch.equal(x, before), "encode must not change its input"
    assert torch.equal(z, kept), "decode must not change its input"
    z2, _ = model.encode(back, label)
    torch.testing.assert_close(z2, kept, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_cached_parameters_equal_uncached_ones(name: str, window: int) -> None:
    model = make(name)
    label = some_labels(model)
    for block in blocks(model):
        x = torch.randn(3, *model.prior.shape, dtype=torch.float64)
        expected = block.conditioner(x, label)
        cache = block.new_cache(x)
        for start in range(0, block.num_tokens, window):
            stop = min(start + window, block.num_tokens)
            seen = x[:, :stop].clone()
            seen[:, -1] = float("nan")  # the last token must not be read
            got = block.conditioner(seen, label, cache, start)
            torch.testing.assert_close(got, expected[:, start:stop], rtol=0, atol=1e-12)


def test_a_cache_window_may_be_evaluated_again() -> None:
    """As in a parallel inverse: iterate a window, then continue from its last values."""
    model = make("rgb")
    block = blocks(model)[0]
    x = torch.randn(2, *model.prior.shape, dtype=torch.float64)
    expected = block.conditioner(x)
    cache = block.new_cache(x)
    block.conditioner(torch.randn_like(x), None, cache, 0)
    block.conditioner(x[:, :3], None, cache, 0)
    got = block.conditioner(x, None, cache, 3)
    torch.testing.assert_close(got, expected[:, 3:], rtol=0, atol=1e-12)


@given(
    channels=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patch=st.integers(1, 3),
    batch=st.integers(1, 3),
    volume_preserving=st.booleans(),
)
def test_any_shape_round_trips(
    channels: int, rows: int, columns: int, patch: int, batch: int, volume_preserving: bool
) -> None:
    config = TarFlowConfig(
        (channels, rows * patch, columns * patch),
        patch_size=patch,
        width=64,
        blocks=2,
        layers_per_block=1,
        volume_preserving=volume_preserving,
    )
    model = perturb(TarFlow(config)).double()
    x = some_images(model, batch)
    assert torch.equal(model.unpatchify(model.patchify(x)), x)
    z, log_abs_det = model.encode(x)
    assert z.shape == (batch, rows * columns, channels * patch**2)
    assert log_abs_det.shape == (batch,)
    torch.testing.assert_close(model.decode(z), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "one token"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = make(name).train()
    generator = torch.Generator().manual_seed(0)
    labels = some_labels(model, 8)
    model.loss(some_grey_levels(model, 8), labels, generator=generator).mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert bool(parameter.grad.abs().max() > 0), parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_minus_log_density_per_dimension(name: str) -> None:
    model = make(name)
    images, labels = some_grey_levels(model), some_labels(model)
    loss = model.loss(images, labels, generator=torch.Generator().manual_seed(3))
    x = model.add_noise(images, torch.Generator().manual_seed(3))
    torch.testing.assert_close(loss, -log_density(model, x, labels) / model.dims)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_alone_in_its_batch(name: str) -> None:
    model = make(name)
    x, label = some_images(model), some_labels(model)
    z, log_abs_det = model.encode(x, label)
    for row in range(len(x)):
        alone = None if label is None else label[row : row + 1]
        z_alone, log_alone = model.encode(x[row : row + 1], alone)
        torch.testing.assert_close(z_alone[0], z[row], rtol=0, atol=1e-12)
        torch.testing.assert_close(log_alone[0], log_abs_det[row], rtol=0, atol=1e-12)


def test_volume_preserving_has_no_volume_and_a_learned_prior() -> None:
    model = make("volume preserving")
    _, log_abs_det = model.encode(some_images(model))
    assert torch.equal(log_abs_det, torch.zeros_like(log_abs_det))
    before = model.prior.variance.clone()
    model.loss(some_grey_levels(model))
    assert torch.equal(model.prior.variance, before), "evaluation leaves the prior alone"
    images = some_grey_levels(model, 64)
    generator = torch.Generator().manual_seed(0)
    z, _ = model.encode(model.add_noise(images, torch.Generator().manual_seed(0)))
    model.train().loss(images, generator=generator)
    torch.testing.assert_close(model.prior.variance, 0.9 * before + 0.1 * z.square().mean(0))


def test_priors_density_integrates_to_one() -> None:
    model = make("volume preserving")
    variance = torch.full((1, 1), 0.3, dtype=torch.float64)
    prior = type(model.prior)(variance)
    z = torch.linspace(-12, 12, 20001, dtype=torch.float64).view(-1, 1, 1)
    mass = torch.trapezoid(prior.log_prob(z).exp(), z.flatten())
    assert math.isclose(float(mass), 1, abs_tol=1e-10)
    noise = torch.randn(100_000, 1, 1, dtype=torch.float64)
    assert math.isclose(float(prior.from_noise(noise).var()), 0.3, rel_tol=0.03)


def test_dropped_label_is_the_mean_embedding_in_both_directions() -> None:
    model = make("conditional")
    averaged = copy.deepcopy(model)
    with torch.no_grad():
        for block in averaged.blocks:
            block.class_embedding.copy_(block.class_embedding.mean(0).expand(3, -1))
    x = some_images(model)
    null = torch.full((3,), model.null_label)
    z, log_abs_det = model.encode(x, null)
    for label in (None, torch.tensor([0, 1, 2])):
        other = model if label is None else averaged
        z2, log2 = other.encode(x, label)
        torch.testing.assert_close(z2, z, rtol=0, atol=1e-12)
        torch.testing.assert_close(log2, log_abs_det, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.decode(z, null), model.decode(z), rtol=0, atol=1e-12)
    assert not torch.allclose(model.encode(x, torch.tensor([0, 1, 2]))[0], z)


def test_label_dropout_in_training_only() -> None:
    config = TarFlowConfig((1, 4, 4), 2, num_classes=3, label_dropout=1.0, width=64, blocks=2)
    model = perturb(TarFlow(config)).double()
    images, labels = some_grey_levels(model), torch.tensor([0, 1, 2])

    def loss(label: torch.Tensor | None) -> torch.Tensor:
        return model.loss(images, label, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(loss(labels), loss(None), rtol=0, atol=1e-12)
    assert not torch.allclose(model.eval().loss(images, labels), loss(None))


@pytest.mark.parametrize("name", TINY)
def test_tiny_presets_learn_within_seconds(name: str) -> None:
    torch.manual_seed(0)
    model = registry.build(name)
    generator = torch.Generator().manual_seed(0)
    images = torch.full((16, *model.event_shape), 3, dtype=torch.uint8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        loss = model.loss(images, generator=generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5


def test_labels_for_an_unconditional_model_are_an_error() -> None:
    model = make("rgb")
    with pytest.raises(ValueError, match="unconditional"):
        model.encode(some_images(model), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 3}, "divides height and width"),
        ({"width": 100}, "multiple of head_dim"),
        ({"blocks": 0}, "at least one block"),
        ({"levels": 1}, "levels >= 2"),
        ({"label_dropout": 1.5}, "label_dropout"),
        ({"noise_std": -0.1}, "noise_std"),
    ],
)
def test_configurations_that_cannot_be_built(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TarFlowConfig(**fields)


def test_bfloat16_autocast_keeps_log_determinants_in_float32() -> None:
    model = perturb(TarFlow(CONFIGS["two heads, deep"]), 0.05)
    x = some_images(model)
    log_abs_det = model.encode(x)[1]
    with torch.autocast("cpu", torch.bfloat16):
        z16, log16 = model.encode(x)
        back = model.decode(z16)
    assert z16.dtype == log16.dtype == back.dtype == torch.float32
    torch.testing.assert_close(log16, log_abs_det, rtol=0.05, atol=0.1)
    torch.testing.assert_close(back, x, rtol=0, atol=0.05)


def test_weights_in_bfloat16_work() -> None:
    model = perturb(TarFlow(CONFIGS["two heads, deep"]), 0.05).bfloat16()
    x = torch.rand(2, *model.event_shape) * 2 - 1
    z, log_abs_det = model.encode(x)
    assert z.dtype == log_abs_det.dtype == torch.float32
    torch.testing.assert_close(model.decode(z), x, rtol=0, atol=0.05)


def test_training_attention_takes_no_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense mask would exclude flash kernels, so training only says "causal"."""
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def recording(query, key, value, attn_mask=None, **options) -> torch.Tensor:
        seen.append((attn_mask, options.get("is_causal")))
        return original(query, key, value, attn_mask, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", recording)
    model = make("two heads, deep").train()
    model.loss(some_grey_levels(model)).mean().backward()
    assert seen == [(None, True)] * (3 * 2)
