"""Laws of sampling: seeds, guidance, certificates, denoising, non-finite samples."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from exactflow.core.model import Flow, NonFiniteError
from exactflow.core.randomness import normal_rows
from exactflow.core.transform import AutoregressiveTransform
from exactflow.latent.interpolation import interpolate, reconstruct
from exactflow.models.tarflow.model import TarFlow, TarFlowConfig
from exactflow.sampling.denoise import score_denoise
from exactflow.sampling.flow_solvers import Sequential
from exactflow.sampling.guidance import Guidance, GuidedTransform
from exactflow.sampling.inversion import Inversion
from exactflow.sampling.request import SamplingOptions
from exactflow.sampling.sample import sample
from flows import CONFIGS, NAMES, make, perturb, some_grey_levels, some_labels


def only_block(model: Flow, index: int = 0) -> AutoregressiveTransform:
    block = model.stages[index]
    assert isinstance(block, AutoregressiveTransform)
    return block


@pytest.mark.parametrize("name", ["conditional", "gaussian noise", "volume preserving"])
def test_sample_k_belongs_to_seed_k(name: str) -> None:
    model = make(name)
    labels = [0, 2, 1, 1, 0] if model.num_classes else None
    together = sample(model, 5, labels, seed=3)
    assert together.seeds == (3, 4, 5, 6, 7)
    for batch_size in (1, 2, 3):
        apart = sample(model, 5, labels, seed=3, batch_size=batch_size)
        torch.testing.assert_close(apart.x, together.x, rtol=0, atol=1e-10)
    alone = sample(model, 1, None if labels is None else labels[3], seed=6)
    torch.testing.assert_close(alone.x[0], together.x[3], rtol=0, atol=1e-10)
    assert not torch.allclose(together.x[0], together.x[1])


def test_default_and_named_solvers_agree_and_unknown_ones_are_refused() -> None:
    model = make("rgb")
    torch.testing.assert_close(sample(model, 2).x, sample(model, 2, solver="sequential").x)
    torch.testing.assert_close(sample(model, 2).x, sample(model, 2, solver=Sequential()).x)


@pytest.mark.parametrize("name", NAMES)
def test_samples_encode_to_the_latents_drawn(name: str) -> None:
    model = make(name)
    labels = some_labels(model, 4)
    drawn = sample(model, 4, labels, options=SamplingOptions(denoise=False, trace=True))
    assert drawn.trace is not None
    assert drawn.trace.shape == (len(model.stages) + 1, 4, *model.event_shape)
    z, _ = model.encode(drawn.x, labels)
    latent = model.encode(drawn.trace[-1], labels)[0]
    torch.testing.assert_close(z, latent, rtol=0, atol=1e-12)
    # the first picture of the trace is the latent itself
    assert isinstance(model, TarFlow)
    torch.testing.assert_close(model.patchify(drawn.trace[0]), z, rtol=0, atol=1e-9)
    assert bool((drawn.certificate < 1e-9).all())
    assert drawn.images.dtype == torch.uint8
    tokens = model.prior.shape[0]
    passes = tokens - (not model.config.start_token)
    assert drawn.iterations == (passes,) * len(model.stages)
    assert drawn.evaluations == passes * len(model.stages)


def test_guidance_zero_is_bitwise_the_plain_sampler() -> None:
    model = make("conditional")
    plain = sample(model, 3, 1)
    assert torch.equal(sample(model, 3, 1, guidance=0.0).x, plain.x)
    assert torch.equal(sample(model, 3, 1, guidance=Guidance(0.0, "gaussian-score")).x, plain.x)


@pytest.mark.parametrize("rule", ["extrapolate", "gaussian-score"])
@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_guided_sampling_equals_two_separate_branches(rule: str, schedule: str) -> None:
    """The definition, one token at a time, without caches and without a common batch."""
    model = make("conditional")
    guidance = Guidance(1.5, rule, schedule)
    label = torch.tensor([0, 2])
    null = torch.full_like(label, model.null_label)
    block = only_block(model, 1)
    guided = GuidedTransform(block, guidance, model.null_label)
    v = torch.randn(2, *model.prior.shape, dtype=torch.float64)
    u = torch.zeros_like(v)
    last = block.num_tokens - 1
    for t in range(block.num_tokens):
        a_c, m_c = block.conditioner(u, label)[:, t].chunk(2, -1)
        a_u, m_u = block.conditioner(u, null)[:, t].chunk(2, -1)
        w = 1.5 * t / last if schedule == "linear" else 1.5
        if rule == "extrapolate":
            m, a = m_c + w * (m_c - m_u), a_c + w * (a_c - a_u)
        else:
            s = torch.clamp((a_c - a_u).exp(), max=1) ** 2
            a = (a_c.exp() / (1 + w - w * s).sqrt()).log()
            m = ((1 + w) * m_c - w * s * m_u) / (1 + w - w * s)
        u[:, t] = v[:, t] * a.exp() + m
    torch.testing.assert_close(guided.inverse(v, label), u, rtol=0, atol=1e-10)
    torch.testing.assert_close(guided(u, label)[0], v, rtol=0, atol=1e-10)


def test_gaussian_score_guidance_is_the_normalised_product() -> None:
    """p_c^(1+w) / p_u^w of two Gaussians with sigma_c <= sigma_u, completed by hand."""
    w = 0.7
    guided = GuidedTransform(only_block(make("rgb")), Guidance(w, "gaussian-score", "constant"), 0)
    m_c, m_u = torch.tensor([[[0.3, -1.0]]]), torch.tensor([[[0.9, 0.5]]])
    s_c, s_u = torch.tensor([[[0.5, 1.0]]]), torch.tensor([[[1.5, 1.0]]])
    theta, theta_u = torch.cat([s_c.log(), m_c], -1), torch.cat([s_u.log(), m_u], -1)
    log_scale, shift = guided._combine(theta, theta_u, 0).chunk(2, -1)
    precision = (1 + w) / s_c**2 - w / s_u**2
    mean = ((1 + w) * m_c / s_c**2 - w * m_u / s_u**2) / precision
    torch.testing.assert_close(log_scale.exp(), precision.rsqrt())
    torch.testing.assert_close(shift, mean)


def test_unconditional_guidance_by_attention_temperature() -> None:
    model = make("two heads, deep")
    plain = sample(model, 2, seed=1)
    guided = sample(model, 2, seed=1, guidance=Guidance(0.5, temperature=0.3))
    assert not torch.allclose(plain.x, guided.x)
    assert float(guided.certificate.max()) < 1e-9
    block = only_block(model)
    x = torch.randn(2, *model.prior.shape, dtype=torch.float64)
    hot = block.conditioner(x, temperature=torch.tensor([1.0, 0.5], dtype=torch.float64))
    cold = block.conditioner(x)
    torch.testing.assert_close(hot[0], cold[0])
    assert not torch.allclose(hot[1], cold[1])


def test_temperature_of_attention_divides_the_logits() -> None:
    """Half the temperature is twice the query: scale the query rows of every qkv map instead."""
    model = make("rgb")
    x = torch.randn(1, *model.prior.shape, dtype=torch.float64)
    block = only_block(model)
    got = block.conditioner(x, temperature=torch.tensor([0.5], dtype=torch.float64))
    with torch.no_grad():
        for layer in block.layers:
            width = layer.qkv.weight.shape[1]
            layer.qkv.weight[:width] *= 2
            layer.qkv.bias[:width] *= 2
    torch.testing.assert_close(got, block.conditioner(x), rtol=0, atol=1e-12)


def test_score_denoising_of_a_gaussian_is_its_closed_form() -> None:
    """A flow with constant scale and shift is a Gaussian: E[x | y] shrinks y to the mean."""
    config = TarFlowConfig((1, 2, 2), 1, 64, blocks=1, layers_per_block=1, noise_std=0.4)
    model = TarFlow(config).double()
    scale, mean = 0.8, 0.25
    with torch.no_grad():
        block = model.blocks[0]
        block.output.bias.copy_(torch.tensor([math.log(scale), mean], dtype=torch.float64))
    y = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    variance = torch.full_like(y, scale**2)
    center = torch.full_like(y, mean)
    variance[..., 0, 0], center[..., 0, 0] = 1.0, 0.0  # token 0 keeps the prior
    expected = y + 0.4**2 * (center - y) / variance
    before = y.clone()
    torch.testing.assert_close(score_denoise(model, y), expected, rtol=0, atol=1e-12)
    assert torch.equal(y, before)


def test_noise_trained_models_denoise_by_default() -> None:
    model = make("gaussian noise")
    noisy = sample(model, 2, options=SamplingOptions(denoise=False))
    clean = sample(model, 2)
    torch.testing.assert_close(clean.x, score_denoise(model, noisy.x))
    traced = sample(model, 2, options=SamplingOptions(trace=True))
    assert traced.trace is not None
    assert len(traced.trace) == len(model.stages) + 2
    torch.testing.assert_close(traced.trace[-1], clean.x)


def exploding() -> TarFlow:
    """Finite forward, infinite inverse: one block's scale is e^1000 on tokens 1 and later."""
    model = perturb(TarFlow(CONFIGS["rgb"]))
    dims = model.prior.shape[1]
    with torch.no_grad():
        model.blocks[0].output.bias[:dims] = 1000.0
    return model


def test_a_non_finite_sample_is_an_error_that_names_block_token_and_seed() -> None:
    with pytest.raises(NonFiniteError, match=r"seed 5 .*block 2 in generation order, token 1"):
        sample(exploding(), 2, seed=5)


def test_non_finite_samples_are_left_out_and_counted_on_request() -> None:
    drawn = sample(exploding(), 3, options=SamplingOptions(on_nonfinite="omit"))
    assert drawn.seeds == ()
    assert drawn.failures.keys() == {0, 1, 2}
    assert drawn.x.shape == (0, 3, 4, 4)


@pytest.mark.parametrize("solver", ["sequential", "adaptive", "jacobi"])
def test_a_failing_sample_does_not_disturb_the_others(
    monkeypatch: pytest.MonkeyPatch, solver: str
) -> None:
    model = make("rgb")
    good = sample(model, 3)
    drawn_from = normal_rows

    def broken(shape: Sequence[int], sources: Sequence[torch.Generator]) -> Tensor:
        rows = drawn_from(shape, sources)
        rows[1, 2] = float("nan")
        return rows

    monkeypatch.setattr("exactflow.sampling.noise.normal_rows", broken)
    drawn = sample(model, 3, solver=solver, options=SamplingOptions(on_nonfinite="omit"))
    assert drawn.seeds == (0, 2)
    assert drawn.failures == {1: "block 1 in generation order, token 1"}
    torch.testing.assert_close(drawn.x, good.x[[0, 2]], rtol=0, atol=1e-10)
    assert drawn.certificate.shape == (2,)


def test_evaluations_are_the_transforms_own_count() -> None:
    model = make("rgb")
    calls = []
    block = only_block(model)
    original = type(block).conditioner

    def counting(self, *args, **kwargs):  # the model's own method, counted from outside
        calls.append(1)
        return original(self, *args, **kwargs)

    inversion = Inversion(Sequential(), [0])
    z = torch.randn(1, *model.prior.shape, dtype=torch.float64)
    try:
        type(block).conditioner = counting
        inversion(block, z, None)
    finally:
        type(block).conditioner = original
    tokens = block.num_tokens
    # the first token needs no network
    assert inversion.records[0].evaluations == tokens - 1 == len(calls) - 1
    assert inversion.records[0].tokens == tokens - 1


@pytest.mark.parametrize("path", ["linear", "spherical"])
def test_interpolation_ends_at_its_ends(path: str) -> None:
    model = make("conditional")
    images, labels = some_grey_levels(model, 2), torch.tensor([0, 1])
    other = some_grey_levels(model, 2, seed=9)
    steps = interpolate(model, images, other, 5, labels, path=path)
    assert steps.shape == (5, 2, *model.event_shape)
    assert torch.equal(model.to_grey_levels(steps[0]), images)
    assert torch.equal(model.to_grey_levels(steps[-1]), other)
    still = interpolate(model, images, images, 3, labels, path=path)
    assert torch.equal(model.to_grey_levels(still[1]), images), "parallel latents: no circle"


@pytest.mark.parametrize("name", ["rgb", "conditional", "gaussian noise", "starflow"])
def test_reconstruction_gives_back_every_grey_level(name: str) -> None:
    model = make(name, torch.float32)
    images, labels = some_grey_levels(model), some_labels(model)
    images[0], images[1] = 0, model.levels - 1  # the extremes
    result = reconstruct(model, images, labels)
    assert torch.equal(model.to_grey_levels(result.x), images)
    assert float(result.error.max()) < 1e-4
    _, log_abs_det = model.encode(model.from_grey_levels(images), labels)
    torch.testing.assert_close(result.log_abs_det, log_abs_det)


def test_labels_may_be_one_class_a_list_or_a_tensor() -> None:
    model = make("conditional")
    expected = sample(model, 3, 2).x
    for label in ([2, 2, 2], torch.tensor([2, 2, 2]), torch.tensor(2, dtype=torch.int32)):
        assert torch.equal(sample(model, 3, label).x, expected)
    drawn = sample(model, 3, [0, 1, 2])
    assert drawn.label is not None
    assert drawn.label.tolist() == [0, 1, 2]
