"""iDDPM and ADM: published numbers, counts, the training objectives, importance of steps."""

import copy
import dataclasses
import json
import math
from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor

from exactflow.core import grey_levels as grey
from exactflow.core.config import checked, override
from exactflow.likelihood.bound import chain_bound
from exactflow.likelihood.draws import Draws
from exactflow.models.diffusion.model import DiscreteDiffusion, DiscreteDiffusionConfig
from exactflow.models.diffusion.step_importance import HISTORY, UNIFORM_SHARE, StepImportance
from exactflow.models.registry import FAMILIES
from exactflow.paths.chain import MarkovChain
from exactflow.sampling.denoiser import ClassifierGuidance, Denoiser
from exactflow.sampling.path_solvers import DDIM
from exactflow.sampling.request import SamplingOptions
from exactflow.sampling.sample import sample
from flows import blueprint
from originals import TOLERANCE, close, recorded
from test_unet import published_unet

PRESETS = FAMILIES["diffusion"].presets

CASES = ["iddpm_uncond", "iddpm_cond", "adm_uncond", "adm_cond_new_attention_order"]
COUNTS = {
    "iddpm-imagenet64-hybrid": 121_063_942,
    "iddpm-imagenet64-vlb": 121_063_942,
    "iddpm-imagenet64-simple": 121_060_483,
    "iddpm-imagenet64-conditional": 273_049_350,
    "iddpm-cifar10-hybrid": 52_546_438,
    "iddpm-cifar10-vlb": 52_546_438,
    "iddpm-imagenet64-to-256": 279_792_390,
    "iddpm-lsun-bedroom256": 113_676_678,
    "adm-imagenet64": 295_904_454,
    "adm-imagenet128": 421_529_606,
    "adm-imagenet256": 553_838_086,
    "adm-imagenet256-unconditional": 552_814_086,
    "adm-imagenet512": 558_997_638,
    "adm-lsun-bedroom256": 552_814_086,
    "adm-lsun-cat256": 552_814_086,
    "adm-lsun-horse256": 552_814_086,
    "adm-imagenet64-to-256": 311_795_910,
    "adm-imagenet128-to-512": 308_835_270,
}

TINY = DiscreteDiffusionConfig(
    (1, 4, 4),
    levels=17,
    model_channels=32,
    channel_mult=(1, 1),
    num_res_blocks=1,
    attention_factors=(),
    num_heads=2,
    diffusion_steps=6,
)


def tiny(seed: int = 0, **changes: Any) -> DiscreteDiffusion:
    """A small model with all weights nonzero."""
    torch.manual_seed(seed)
    model = DiscreteDiffusion(override(TINY, changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def some_images(count: int, channels: int = 1, side: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 17, (count, channels, side, side), generator=generator)


# The original implementation.


def case(name: str) -> tuple[DiscreteDiffusion, MarkovChain, dict[str, Tensor]]:
    """A published model with random weights, its respaced chain, and the original's outputs."""
    told, state, expected = recorded("openai", name)
    network = published_unet(told, state)
    size, unet = told["image_size"], dataclasses.asdict(network.config)
    del unet["in_channels"], unet["out_channels"]
    config = DiscreteDiffusionConfig(
        (3, size, size),
        diffusion_steps=told["diffusion_steps"],
        schedule=told["noise_schedule"],
        rescale_timesteps=told["rescale_timesteps"],
        rescale_learned_sigmas=told["rescale_learned_sigmas"],
        **unet,
    )
    model = DiscreteDiffusion(config).eval()
    model.network.load_state_dict(network.state_dict())
    diffusion = {
        key.removeprefix("diffusion."): value
        for key, value in expected.items()
        if key.startswith("diffusion.")
    }
    return model, model.chain.respaced(told["timestep_respacing"]), diffusion


@pytest.mark.parametrize("name", CASES)
def test_published_chain(name: str) -> None:
    _, chain, expected = case(name)
    torch.testing.assert_close(chain.betas, expected["betas"], rtol=1e-9, atol=1e-12)
    assert torch.equal(chain.timesteps, expected["timestep_map"])


@pytest.mark.parametrize("name", CASES)
def test_published_reverse_kernel_and_bound(name: str) -> None:
    model, chain, expected = case(name)
    x0, step, label = expected["x_start"], expected["t"], expected.get("y")
    x_t = chain.diffuse(x0, step, expected["noise"])
    close(x_t, expected["x_t"])
    with torch.no_grad():
        kernel = chain.reverse_kernel(model.predict_noise, x_t, step, label, clip=True)
    # A rounding of the network's noise counts sigma / alpha times in the image.
    amplified = (1 / chain.alpha_bar[step] - 1).sqrt().clamp(min=1)[:, None, None, None]
    close(kernel.x0 / amplified, expected["pred_xstart"] / amplified)
    close(kernel.mean, expected["mean"])
    close(kernel.log_variance.expand_as(kernel.mean), expected["log_variance"])
    per_dim = 1 / (model.dims * math.log(2))
    terms = chain.bound_term(kernel, x0, x_t, step, model.levels) * per_dim
    close(terms, expected["vb_bits_per_dim"])
    prior = (chain.prior_term(x0.double()) * per_dim).float()
    torch.testing.assert_close(prior, expected["prior_bits_per_dim"], rtol=TOLERANCE, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_published_loss(name: str) -> None:
    model, chain, expected = case(name)
    arguments = expected["x_start"], expected["t"], expected["noise"], expected.get("y")
    with torch.no_grad():
        close(model.objective(chain, *arguments), expected["loss"])
        model.config = override(model.config, {"objective": "vlb"})
        scale = 1 / chain.steps
        if model.config.rescale_learned_sigmas:
            scale *= chain.steps / 1000
        vb = model.objective(chain, *arguments) * scale
        close(vb, expected["vb_loss_term"])
        close(expected["loss"] - expected["vb_loss_term"], expected["mse"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_published_ddim_sample(name: str) -> None:
    model, chain, expected = case(name)
    x, label = expected["noise"], expected.get("y")
    with torch.no_grad():
        for step in reversed(range(chain.steps)):
            x = DDIM().advance(chain, Denoiser(model, label), x, step, None)
    # The same in float64 is 2e-5 away as well: that much is the original's own rounding.
    close(x, expected["ddim_sample"], 3 * TOLERANCE)


@pytest.mark.parametrize("preset", COUNTS)
def test_published_counts(preset: str) -> None:
    assert blueprint(preset).num_parameters == COUNTS[preset]


def test_every_published_preset_is_counted() -> None:
    assert {name for name, preset in PRESETS.items() if preset.published} == COUNTS.keys()


# The objectives.


def test_configurations_survive_json() -> None:
    for preset in PRESETS.values():
        fields = json.loads(json.dumps(dataclasses.asdict(preset.config)))
        assert DiscreteDiffusionConfig(**checked(DiscreteDiffusionConfig, fields)) == preset.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "simple"}, "learn_sigma"),
        ({"learn_sigma": False}, "learn_sigma"),
        ({"objective": "both"}, "objective"),
        ({"schedule": "linear", "diffusion_steps": 10}, "more than 20"),
        ({"image_shape": (1, 5, 4)}, "multiples of 2"),
        ({"label_dropout": 0.1}, "label_dropout"),
        ({"low_size": 4}, "low_size"),
        ({"timestep_law": "loss"}, "timestep_law"),
        ({"levels": 1}, "levels"),
    ],
)
def test_configurations_that_cannot_be_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(TINY, changes)


@pytest.mark.parametrize("objective", ["simple", "hybrid", "vlb"])
def test_loss_is_the_objective_at_the_drawn_step(objective: str) -> None:
    model = tiny(objective=objective, learn_sigma=objective != "simple").eval()
    images = some_images(5)
    loss = model.loss(images, generator=torch.Generator().manual_seed(3))
    again = torch.Generator().manual_seed(3)
    step = torch.randint(6, (5,), generator=again)
    noise = torch.randn(images.shape, generator=again)
    x0 = grey.center(images, 17)
    assert torch.equal(loss, model.objective(model.chain, x0, step, noise))
    eps, _ = model.predict_noise(model.chain.diffuse(x0, step, noise), step)
    if objective == "simple":
        torch.testing.assert_close(loss, (eps - noise).square().flatten(1).mean(1))


def gradients(model: DiscreteDiffusion) -> dict[str, Tensor]:
    model.zero_grad()
    model.loss(some_images(8), generator=torch.Generator().manual_seed(0)).mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_the_bound_in_the_hybrid_objective_trains_the_variance_alone() -> None:
    hybrid, weighted = tiny(), tiny(rescale_learned_sigmas=False)
    weighted.load_state_dict(hybrid.state_dict())
    small, large = (gradients(m)["network.output.bias"] for m in (hybrid, weighted))
    assert small.shape == (2,)
    torch.testing.assert_close(small[0], large[0])  # noise: the weight of the bound is not felt
    torch.testing.assert_close(small[1] * 1000 / 6, large[1])  # variance: in proportion to it


def test_hybrid_and_vlb_are_the_bound_in_their_units() -> None:
    hybrid, bound = tiny(), tiny(objective="vlb")
    bound.load_state_dict(hybrid.state_dict())
    chain, x0, step = hybrid.chain, grey.center(some_images(6), 17), torch.arange(6)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    x_t = chain.diffuse(x0, step, noise)
    with torch.no_grad():
        eps, v = hybrid.predict_noise(x_t, step)
        nats = chain.bound_term(chain.kernel(eps, v, x_t, step, clip=False), x0, x_t, step, 17)
        bits_per_dim = nats / (16 * math.log(2))
        mse = (eps - noise).square().flatten(1).mean(1)
        torch.testing.assert_close(bound.objective(chain, x0, step, noise), 6 * bits_per_dim)
        torch.testing.assert_close(
            hybrid.objective(chain, x0, step, noise), mse + 6 / 1000 * bits_per_dim
        )


def test_a_float64_model_gives_float64() -> None:
    model = tiny().double()
    assert model.loss(some_images(2)).dtype == torch.float64
    drawn = sample(model, 2)
    assert drawn.x.dtype == torch.float64
    single = copy.deepcopy(model).float()
    torch.testing.assert_close(sample(single, 2).x.double(), drawn.x, rtol=0, atol=1e-3)


def test_the_path_asks_the_network_between_steps() -> None:
    model, x = tiny().double(), torch.ones(6, 1, 4, 4, dtype=torch.float64)
    steps = torch.arange(6)
    t = 1 - (steps.double() + 1) / 6
    torch.testing.assert_close(model.predict(x, t), model.predict_noise(x, steps)[0])
    alpha = model.path.at(t).alpha
    torch.testing.assert_close(alpha.square(), model.chain.alpha_bar)


# Labels and small images.


def test_a_conditional_model_without_a_null_class_needs_labels() -> None:
    model, images = tiny(num_classes=3), some_images(2)
    assert model.network.config.num_classes == 3
    with pytest.raises(ValueError, match=r"no null class: .* got none"):
        model.loss(images)
    with pytest.raises(ValueError, match=r"no null class: .* got 3"):
        model.loss(images, torch.tensor([0, 3]))
    assert model.loss(images, torch.tensor([0, 2])).shape == (2,)


def test_label_dropout_adds_a_null_class() -> None:
    model = tiny(num_classes=3, label_dropout=0.5)
    x, step = torch.zeros(2, 1, 4, 4), torch.tensor([1, 2])
    dropped = model.predict_noise(x, step, torch.tensor([3, 3]))[0]
    assert model.network.config.num_classes == 4
    assert torch.equal(model.predict_noise(x, step)[0], dropped)
    assert not torch.equal(model.predict_noise(x, step, torch.tensor([0, 1]))[0], dropped)
    images, label = some_images(40), torch.zeros(40, dtype=torch.int64)
    losses = [
        m.loss(images, label, generator=torch.Generator().manual_seed(0))
        for m in (model.eval(), copy.deepcopy(model).train())
    ]
    changed = float((losses[0] != losses[1]).float().mean())
    assert 0.2 < changed < 0.8


def test_an_upsampler_sees_the_small_image() -> None:
    model = tiny(low_size=2)
    assert model.loss(some_images(2)).isfinite().all()
    x, step, low = torch.zeros(2, 1, 4, 4), torch.tensor([1, 2]), torch.ones(2, 1, 2, 2)
    seen = model.predict_noise(x, step, None, low)[0]
    assert not torch.equal(seen, model.predict_noise(x, step, None, -low)[0])
    with pytest.raises(ValueError, match="small images"):
        model.predict_noise(x, step)
    with pytest.raises(ValueError, match="small images"):
        tiny().predict_noise(x, step, None, low)
    small = torch.linspace(-1, 1, 12).view(3, 1, 2, 2)
    together = sample(model, 3, batch_size=2, options=SamplingOptions(low=small))
    alone = sample(model, 1, seed=2, options=SamplingOptions(low=small[2:]))
    torch.testing.assert_close(alone.x, together.x[2:])
    with pytest.raises(ValueError, match="expected 2 small images, got 3"):
        sample(model, 2, options=SamplingOptions(low=small))
    with pytest.raises(ValueError, match="the solver ancestral or ddim, got Euler"):
        sample(model, 3, solver="euler", options=SamplingOptions(low=small))


def test_an_unconditional_model_is_guided_to_a_class_by_a_classifier() -> None:
    model = tiny(num_classes=0).double()

    def bright(x: Tensor, timestep: Tensor) -> Tensor:
        score = x.flatten(1).mean(1)
        return torch.stack([-score, score], dim=1)

    dark, light = (
        sample(model, 2, label, guidance=ClassifierGuidance(bright, 200.0)) for label in (0, 1)
    )
    assert bool((dark.x.mean((1, 2, 3)) < light.x.mean((1, 2, 3))).all())
    assert light.label is not None
    assert light.label.tolist() == [1, 1]
    with pytest.raises(ValueError, match="unconditional"):
        sample(model, 2, 1)


def test_scoring_and_sampling_do_not_depend_on_the_batch_size() -> None:
    model, images = tiny().eval(), some_images(5)
    torch.testing.assert_close(
        chain_bound(model, images, draws=Draws(batch_size=2)).terms,
        chain_bound(model, images).terms,
        rtol=1e-5,
        atol=1e-5,
    )
    torch.testing.assert_close(
        sample(model, 5, batch_size=2).x, sample(model, 5).x, rtol=1e-4, atol=1e-4
    )


# Importance of steps.


def test_importance_keeps_the_last_ten_losses_of_every_step() -> None:
    importance, expected = StepImportance(4), [deque(maxlen=HISTORY) for _ in range(4)]
    generator = torch.Generator().manual_seed(0)
    for count in (1, 7, 30, 60, 3):
        step = torch.randint(0, 4, (count,), generator=generator)
        loss = torch.rand(count, generator=generator)
        importance.record(step, loss)
        for one, value in zip(step.tolist(), loss.tolist(), strict=True):
            expected[one].append(value)
    kept = importance.get_buffer("losses").sort(1).values
    torch.testing.assert_close(kept, torch.tensor([sorted(values) for values in expected]))
    size = kept.double().square().mean(1).sqrt()
    law = (1 - UNIFORM_SHARE) * size / size.sum() + UNIFORM_SHARE / 4
    torch.testing.assert_close(importance.probabilities(), law)


def test_importance_is_uniform_until_every_step_was_seen_ten_times() -> None:
    importance = StepImportance(3)
    importance.record(torch.arange(3).repeat(HISTORY)[:-1], torch.arange(29.0))
    assert importance.probabilities().tolist() == pytest.approx([1 / 3] * 3)
    importance.record(torch.tensor([2]), torch.tensor([100.0]))
    assert float(importance.probabilities()[2]) > 0.5


def test_importance_weights_undo_the_draws() -> None:
    importance = StepImportance(3)
    importance.record(torch.arange(3).repeat(HISTORY), torch.tensor([1.0, 4.0, 9.0]).repeat(10))
    step, weight = importance.draw(60_000, torch.Generator().manual_seed(0))
    frequency = step.bincount(minlength=3) / 60_000
    law = importance.probabilities()
    torch.testing.assert_close(frequency.double(), law, rtol=0, atol=0.01)
    torch.testing.assert_close(weight, 1 / (3 * law[step]))
    value = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    assert float((weight * value[step]).mean()) == pytest.approx(float(value.mean()), rel=0.01)


def test_only_training_updates_the_importance_and_the_state_resumes_it() -> None:
    model = tiny(objective="vlb", timestep_law="importance")
    model.eval().loss(some_images(8))
    assert int(model.get_buffer("importance.seen").sum()) == 0
    model.train()
    for seed in range(12):
        model.loss(some_images(8), generator=torch.Generator().manual_seed(seed))
    assert int(model.get_buffer("importance.seen").sum()) == 96
    resumed = tiny(seed=1, objective="vlb", timestep_law="importance")
    resumed.load_state_dict(model.state_dict())
    assert resumed.importance is not None
    assert not torch.equal(resumed.importance.probabilities(), torch.full((6,), 1 / 6).double())
    losses = [
        m.loss(some_images(8), generator=torch.Generator().manual_seed(99))
        for m in (model, resumed)
    ]
    assert torch.equal(*losses)


@pytest.mark.slow
def test_training_improves_the_bound() -> None:
    torch.manual_seed(0)
    model, images = DiscreteDiffusion(TINY), torch.full((64, 1, 4, 4), 12)
    before = chain_bound(model.eval(), images).likelihood.bits_per_dim
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for seed in range(40):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        model.loss(images, generator=generator).mean().backward()
        optimizer.step()
    assert chain_bound(model.eval(), images).likelihood.bits_per_dim < before - 1
