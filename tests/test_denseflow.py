"""DenseFlow: the numbers of the original, its counts, and the laws of an augmented flow."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from exactflow.core import grey_levels as grey
from exactflow.core.config import override
from exactflow.core.model import log_density
from exactflow.core.randomness import generator, normal_rows
from exactflow.models.convert import convert
from exactflow.models.denseflow.model import DenseFlow, DenseFlowConfig
from exactflow.models.denseflow.network import (
    DeferredBatchNorm,
    DenseCouplingNetwork,
    NystromAttention,
    pseudo_inverse,
)
from exactflow.models.denseflow.parts import (
    ChannelNorm,
    CouplingDequantizer,
    DenseCoupling,
    standard_normal_log_prob,
)
from exactflow.models.denseflow.published import MARK, from_published, renamed
from exactflow.models.registry import FAMILIES
from exactflow.nn.data_dependent import initializing
from exactflow.training.optim import TrainConfig, recomputed
from flows import blueprint, count, some_grey_levels
from originals import recorded

PRESETS = FAMILIES["denseflow"].presets

LATENT, NATS = 1e-4, 2e-3  # the tolerances that the reference numbers name
PUBLISHED = [name for name in PRESETS if "74-10" in name]

NETWORKS = {"dense_depth": 2, "dense_growth": 4, "dequantizer_steps": 2, "dequantizer_width": 6}
NETWORKS |= {"dequantizer_depth": 1, "dequantizer_growth": 4, "context_growth": 3}
CONFIGS = {
    "tiny": PRESETS["denseflow-tiny"].config,
    "three blocks": DenseFlowConfig((1, 16, 16), (2, 3, 1), (1, 1, 2), (4, 4, 6), 2, **NETWORKS),
    "odd channels": DenseFlowConfig((1, 4, 8), (3, 2), (2, 1), (4, 5), 1, landmarks=2, **NETWORKS),
    "corrected": DenseFlowConfig((2, 4, 4), (2,), (2,), (4,), 3, attention="corrected", **NETWORKS),
}


def perturb(model: DenseFlow, scale: float = 0.1) -> DenseFlow:
    """Change every weight and running statistic; evaluation mode."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter))
        for part in model.modules():
            if isinstance(part, DeferredBatchNorm):
                noise = torch.rand(len(part.running_var), generator=source, dtype=torch.float64)
                part.running_mean.copy_(noise - 0.5)
                part.running_var.copy_(noise + 0.5)
            if isinstance(part, ChannelNorm):
                part.initialized.fill_(1)
    return model.eval()


def make(name: str = "tiny", dtype: torch.dtype = torch.float64, scale: float = 0.1) -> DenseFlow:
    torch.manual_seed(0)
    return perturb(DenseFlow(CONFIGS[name]), scale).to(dtype)


def some_noise(model: DenseFlow, count: int = 3, seed: int = 2) -> Tensor:
    return normal_rows(model.noise_shape, [generator(seed, i) for i in range(count)])


def draw(model: DenseFlow, count: int, source: torch.Generator) -> Tensor:
    """Noise for `bound`, of the model's type."""
    return torch.randn(count, *model.noise_shape, generator=source, dtype=model.dtype)


def inputs(model: DenseFlow, count: int = 3) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] and noise for the injected channels."""
    source = torch.Generator().manual_seed(3)
    x = torch.rand(count, *model.event_shape, generator=source, dtype=torch.float64) * 2 - 1
    e = torch.randn(count, model.injected_dims, generator=source, dtype=torch.float64)
    return x.to(model.dtype), e.to(model.dtype)


def train(model: DenseFlow, batch: Callable[[int], Tensor], steps: int) -> list[float]:
    """Losses of so many steps of Adam, in the mode that the model is in."""
    source = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        loss = model.loss(batch(step), generator=source).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def jacobian_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    jacobian = torch.autograd.functional.jacobian(function, x, vectorize=True)
    assert isinstance(jacobian, Tensor)
    return jacobian


# The original's numbers


def case(name: str) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    return recorded("flows", f"denseflow_{name}")


def close(got: Tensor, expected: Tensor, tolerance: float = LATENT) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def whole() -> tuple[DenseFlow, dict[str, Tensor]]:
    settings, state, expected = case("whole")
    assert MARK in state
    model = from_published(state, tuple(settings["data_shape"][1:]))
    assert model.num_parameters == settings["parameters"] == 9_690_456
    count = sum(p.numel() for p in model.dequantizer.parameters())
    assert count == settings["parameters_of_dequantiser"]
    return model.eval(), expected


def flat(expected: dict[str, Tensor], prefix: str) -> Tensor:
    parts: list[Tensor] = []
    while (key := f"{prefix}{len(parts)}") in expected:
        parts.append(expected[key].flatten(1))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def test_golden_bound_and_latent() -> None:
    model, expected = whole()
    images, noise = expected["x"].to(torch.uint8), flat(expected, "noise.")
    x, log_q = model.dequantize(images, noise[:, : model.dims])
    close((x + 1) / 2, expected["transforms.0.output"])
    close(-model.dims * math.log(model.levels) - log_q, expected["transforms.0.log_det"], NATS)
    z, _ = model.encode(x, None, noise[:, model.dims :])
    close(z, torch.cat([expected["dropped.0"].flatten(1), expected["z"].flatten(1)], dim=1))
    base = model.prior.log_prob(z) - standard_normal_log_prob(expected["dropped.0"])
    close(base, expected["base_log_prob"], NATS)
    bound = model.draw(images, None, noise=noise)
    close(bound, expected["log_prob_bound"], NATS)
    close(-bound / (model.dims * math.log(2)), expected["bits_per_dim"], 1e-5)
    close((model.decode(z) + 1) / 2, expected["roundtrip.continuous"])
    assert torch.equal(model.to_grey_levels(model.decode(z)), images)


@torch.no_grad()
def test_golden_parts_of_the_blocks() -> None:
    model, expected = whole()
    x = expected["transforms.1.output"]
    for index, block in enumerate(model.blocks):
        name = f"transforms.{3 + 2 * index}"
        h = F.pixel_unshuffle(x, 2)
        if index:
            h, dropped = h.chunk(2, dim=1)
            close(dropped, expected["dropped.0"])
            change = standard_normal_log_prob(dropped)
            close(change, expected[f"transforms.{2 + 2 * index}.log_det"], NATS)
        close(h, expected[f"transforms.{2 + 2 * index}.output"])
        noise = [expected["noise.1"]][: len(block.noise_networks)]
        x, change = block(h, noise)
        close(x, expected[f"{name}.output"])
        for e in noise:
            layer = f"noise_layer.{name}.noise_params.0"
            first = expected[f"output.{name}.blocks.0"]
            injected, log_det = block.inject(0, [h], e)
            close(injected, expected[f"{layer}.injected"])
            close(log_det - standard_normal_log_prob(e), expected[f"{layer}.log_term"], NATS)
            change = change - standard_normal_log_prob(e)
            h = torch.cat([first, injected], dim=1) if index == 0 else h
        close(change, expected[f"{name}.log_det"], NATS)
        entering = h  # of the last unit
        for number, module in enumerate(block.units[-1].parts):
            entering, change = module(entering)
            unit = len(block.units) - 1
            close(change, expected[f"log_det.{name}.blocks.{unit}.transforms.{number}"], NATS)


@torch.no_grad()
def test_golden_inverse() -> None:
    model, expected = whole()
    z = torch.cat([expected["inverse.noise.0"].flatten(1), expected["inverse.z"].flatten(1)], 1)
    x = model.decode(z)
    close((x + 1) / 2, expected["inverse.continuous"])
    assert torch.equal(model.to_grey_levels(x), expected["inverse.image"].to(torch.uint8))


@torch.no_grad()
def test_golden_start_from_data() -> None:
    """The published program initialises the norms in its first training pass."""
    model, expected = whole()
    norms = [part for part in model.modules() if isinstance(part, ChannelNorm)]
    assert all(float(part.initialized) == 1 for part in norms)
    for part in norms:
        part.initialized.zero_()
    images, noise = expected["init.x"].to(torch.uint8), flat(expected, "init.noise.")
    with initializing(model.train()):
        bound = model.draw(images, None, noise=noise)
    close(bound, expected["init.log_prob_bound"], NATS)
    after = {key[5:]: value for key, value in expected.items() if key.startswith("init.transforms")}
    state = model.state_dict()
    assert len(after) == 2 * 6 + 2 * 6
    for key, value in renamed(after).items():
        close(state[key], value, 1e-5)
    assert all(float(part.initialized) == 1 for part in norms)


@torch.no_grad()
def test_golden_coupling() -> None:
    settings, state, expected = case("coupling")
    prefix = "transforms.3.blocks.0.transforms.0.transforms.2."
    network = DenseCouplingNetwork(6, 12, settings["mid_chnls"], DenseFlowConfig())
    coupling = DenseCoupling(12, network).eval()
    ours = renamed({prefix + key: value for key, value in state.items()})
    coupling.load_state_dict(
        {k.removeprefix("blocks.0.units.0.0.coupling."): ours[k] for k in ours}
    )
    assert sum(p.numel() for p in coupling.parameters()) == settings["parameters"]
    close(network.attention.qkv(expected["attention.input"]), expected["attention.qkv"])
    close(network.attention(expected["attention.input"]), expected["attention.output"])
    close(pseudo_inverse(expected["attention.kernel2"]), expected["attention.kernel2_inverse"])
    close(network.dense(expected["dense.input"]), expected["dense.output"])
    close(network(expected["network.input"]), expected["network.output"])
    z, log_det = coupling(expected["x"])
    close(z, expected["z"])
    close(log_det, expected["log_det"], NATS)
    close(coupling.inverse(expected["inverse.z"]), expected["inverse.x"])


@torch.no_grad()
def test_golden_dequantiser() -> None:
    settings, state, expected = case("dequantiser")
    model = CouplingDequantizer(DenseFlowConfig()).eval()
    ours = renamed({f"transforms.0.{key}": value for key, value in state.items()})
    ours.pop("transforms.0.ldj_per_dim", None)
    model.load_state_dict({k.removeprefix("dequantizer."): v for k, v in ours.items()})
    assert sum(p.numel() for p in model.parameters()) == settings["parameters"]
    clean = grey.center(expected["x"].to(torch.uint8), 256)
    close(model.context.first(clean), expected["context_first_block"])
    close(model.context(clean), expected["context"])
    u, log_q = model(clean, expected["noise.0"])
    close(u, expected["u"])
    close(log_q, expected["log_q"], NATS)


def test_golden_squeeze() -> None:
    """The same squeeze as in the whole model, see `test_golden_parts_of_the_blocks`."""
    _, _, expected = case("squeeze")
    assert torch.equal(F.pixel_unshuffle(expected["x"], 2), expected["z"])
    assert torch.equal(F.pixel_shuffle(expected["inverse.z"], 2), expected["inverse.x"])


def test_an_incomplete_state_dict_is_refused(tmp_path: Path) -> None:
    _, state, _ = case("whole")
    del state["transforms.0.encoder.context_init.2.weight"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"dict of DenseFlow: it has no .*context_init\.2\.weight"):
        convert(tmp_path / "part.pt", height=16)


# Counts


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_counts(preset: str) -> None:
    model = blueprint(preset)
    assert model.num_parameters == 130_647_294
    assert len(list(model.parameters())) == 3_423
    constants = 6  # of the published state dict: they are in the configuration here
    assert len(model.state_dict()) == 3_725 - constants
    assert sum(b.numel() for b in model.buffers()) == 14_362 - constants
    assert count(model.dequantizer) == 2_395_784
    assert count(model.dequantizer.context) == 157_552
    assert [count(block) for block in model.blocks] == [48_061_410, 46_453_404, 33_736_080]
    first = model.blocks[0]
    units = [7_849_420, 7_854_870, 7_861_320, 7_868_770, 7_877_220, 7_886_670]
    assert [count(unit) for unit in first.units] == units
    assert [count(n) for n in first.noise_networks] == [6_212, 22_772, 80_060, 225_596, 528_500]
    side = model.event_shape[1] // 32
    assert model.prior.shape == model.noise_shape == (17_792 * side**2,)


def test_effective_learning_rates() -> None:
    preset = PRESETS["denseflow-74-10-cifar10"]
    schedule = override(TrainConfig(), preset.training).schedule(50_000)
    assert schedule.total == 420 * 781
    steps = (1, 2501, 5001, 400 * 781, 400 * 781 + 1, 420 * 781)
    rates = [schedule.learning_rate(step) for step in steps]
    assert rates == pytest.approx([0.0, 5e-4, 1e-3, 1e-3, 2e-5, 2e-5], rel=1e-12)


# Laws


@pytest.mark.parametrize("name", CONFIGS)
def test_log_det_is_that_of_the_map_of_image_and_noise(name: str) -> None:
    model = make(name)
    x, e = inputs(model)
    _, log_abs_det = model.encode(x, None, e)
    for row in range(len(x) if name != "three blocks" else 1):

        def joint(v: Tensor) -> Tensor:
            image = v[: model.dims].view(1, *model.event_shape)
            return model.encode(image, None, v[model.dims :][None])[0].flatten()

        jacobian = jacobian_of(joint, torch.cat([x[row].flatten(), e[row]]))
        assert jacobian.shape[0] == jacobian.shape[1] == model.prior.shape[0]
        close(torch.linalg.slogdet(jacobian).logabsdet, log_abs_det[row], 1e-9)


@pytest.mark.parametrize("name", ["odd channels", "corrected"])
def test_in_training_the_log_det_of_the_whole_batch_is_exact(name: str) -> None:
    """Batch normalisation couples the samples: the joint Jacobian's log-det is still the sum."""
    model = make(name).train()
    x, e = inputs(model, 2)
    _, log_abs_det = model.encode(x, None, e)

    def joint(v: Tensor) -> Tensor:
        rows = v.view(2, -1)
        image = rows[:, : model.dims].unflatten(1, model.event_shape)
        return model.encode(image, None, rows[:, model.dims :])[0].flatten()

    v = torch.cat([x.flatten(1), e], dim=1).flatten()
    jacobian = jacobian_of(joint, v)
    half = len(v) // 2
    assert float(jacobian[:half, half:].abs().max()) > 1e-6, "the samples feel each other"
    close(torch.linalg.slogdet(jacobian).logabsdet, log_abs_det.sum(), 1e-9)


def test_log_q_is_the_density_of_the_dequantisation_noise() -> None:
    model = make("odd channels")
    images, noise = some_grey_levels(model), some_noise(model)[:, : model.dims]
    _, log_q = model.dequantize(images, noise)
    for row in range(len(images)):

        def u(e: Tensor, row: int = row) -> Tensor:
            x, _ = model.dequantize(images[row : row + 1], e[None])
            return (x + 1).flatten() * model.levels / 2

        jacobian = jacobian_of(u, noise[row])
        expected = standard_normal_log_prob(noise[row : row + 1])[0]
        close(log_q[row], expected - torch.linalg.slogdet(jacobian).logabsdet, 1e-9)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_decode_inverts_encode(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = make(name, dtype)
    x, e = inputs(model)
    z, _ = model.encode(x, None, e)
    *_, last = states = list(model.trajectory(z))
    close(last, x, tolerance)
    assert len(states) == len(model.blocks) + 1
    assert {s.shape for s in states} == {x.shape}
    images = some_grey_levels(model)
    drawn, _ = model.dequantize(images, some_noise(model).to(dtype)[:, : model.dims])
    assert torch.equal(model.to_grey_levels(drawn), images)


def test_noise_of_encode_defaults_to_the_mean() -> None:
    model = make()
    x, e = inputs(model)
    for got, expected in zip(model.encode(x), model.encode(x, None, 0 * e), strict=True):
        assert torch.equal(got, expected)


def test_a_new_model_only_normalises_and_mixes() -> None:
    torch.manual_seed(0)
    model = DenseFlow(CONFIGS["tiny"]).double().eval()
    x, e = inputs(model)
    z, log_abs_det = model.encode(x, None, e)
    close(log_abs_det, torch.full_like(log_abs_det, -model.dims * math.log(2)), 1e-4)  # float32 W
    close(z.square().sum(1), (x / 2).flatten(1).square().sum(1) + e.square().sum(1), 1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sample_is_alone_in_its_batch_in_evaluation(name: str) -> None:
    model = make(name)
    images, noise = some_grey_levels(model), some_noise(model)
    together = model.draw(images, None, noise=noise)
    for row in range(len(images)):
        alone = model.draw(images[row : row + 1], None, noise=noise[row : row + 1])
        close(alone[0], together[row], 1e-10)
    model.train()
    alone = model.draw(images[:1], None, noise=noise[:1])
    assert not torch.allclose(alone, model.draw(images, None, noise=noise)[:1])


@pytest.mark.slow
def test_bounds_rise_with_the_number_of_draws() -> None:
    """Independent draws for each k: ELBO < IWBO_8 < IWBO_64 by more than the noise."""
    model = make(scale=0.15)
    images = some_grey_levels(model, 2)
    bounds, errors = [], []
    with torch.no_grad():
        for k, calls in ((1, 8), (8, 16), (64, 32)):
            source = torch.Generator().manual_seed(k)
            many = images.repeat_interleave(64, 0)
            draws = [
                model.draw(many, None, noise=draw(model, len(many), source)).view(2, -1, k)
                for _ in range(calls)
            ]
            log_means = (torch.cat(draws, dim=1).logsumexp(2) - math.log(k)).mean(0)
            bounds.append(float(log_means.mean()))
            errors.append(float(log_means.std()) / math.sqrt(len(log_means)))
    for index in range(2):
        margin = 3 * math.hypot(errors[index], errors[index + 1])
        assert bounds[index + 1] - bounds[index] > margin, (bounds, errors)


@pytest.mark.slow
def test_the_mean_weight_is_the_probability_of_the_image() -> None:
    """Against the frequencies of samples: images of 2 x 2 pixels with two grey levels.

    A few steps of training first: of a random model the weights have too heavy a tail to average.
    """
    config = DenseFlowConfig((1, 2, 2), (2,), (2,), (4,), 1, landmarks=1, levels=2, **NETWORKS)
    torch.manual_seed(0)
    model = perturb(DenseFlow(config).double(), 0.1)
    every = torch.tensor([[[[i & 1, i >> 1 & 1], [i >> 2 & 1, i >> 3 & 1]]] for i in range(16)])
    source = torch.Generator().manual_seed(1)
    train(model, lambda step: every.repeat(4, 1, 1, 1), 120)
    with torch.no_grad():
        many = every.repeat(256, 1, 1, 1)
        draws = [model.draw(many, None, noise=draw(model, len(many), source)) for _ in range(8)]
        weights = torch.cat(draws).exp().view(-1, 16)
        z = torch.randn(30_000, *model.prior.shape, generator=source, dtype=torch.float64)
        x = model.decode(model.prior.from_noise(z)).flatten(1)
    inside = x[(x.abs() < 1).all(1)]
    index = ((inside > 0) * torch.tensor([1, 2, 4, 8])).sum(1)
    frequency = torch.bincount(index, minlength=16) / len(x)
    assert float(frequency.sum()) > 0.3, "there is something to compare"
    error = (weights.var(0) / len(weights) + frequency / len(x)).sqrt()
    assert float(((weights.mean(0) - frequency) / error).abs().max()) < 4
    assert float((error / frequency).median()) < 0.05, "the comparison says something"


@pytest.mark.slow
def test_noise_has_at_least_eight_bits_per_dimension() -> None:
    """Fitted to uniform bytes, scored on others, with the importance-weighted bound."""
    torch.manual_seed(0)
    model = DenseFlow(CONFIGS["tiny"])
    train(model, lambda step: some_grey_levels(model, 64, seed=step), 10)
    images = some_grey_levels(model, 64, seed=99)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        draws = [model.eval().draw(images, None, noise=draw(model, 64, source)) for _ in range(8)]
    bits = -(torch.stack(draws).logsumexp(0) - math.log(8)) / (model.dims * math.log(2))
    assert 8 <= float(bits.mean()) < 9


# Training


def test_it_is_a_bound_and_no_density() -> None:
    model = make()
    x, _ = inputs(model)
    assert model.exact is False
    with pytest.raises(ValueError, match="a bound, not a density"):
        log_density(model, x)


def test_loss_is_minus_the_bound_per_dimension() -> None:
    model = make()
    images = some_grey_levels(model)
    seed = torch.Generator().manual_seed
    bound = model.draw(images, None, noise=draw(model, 3, seed(7)))
    close(model.loss(images, generator=seed(7)), -bound / model.dims, 0)
    assert not torch.equal(model.loss(images, generator=seed(8)), -bound / model.dims)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = make(name).train()
    images = some_grey_levels(model, 8)
    model.loss(images, generator=torch.Generator().manual_seed(0)).mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert bool(parameter.grad.abs().max() > 0), parameter_name


def test_initialisation_starts_the_norms_once_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = DenseFlow(CONFIGS["tiny"]).double()
    assert model.initial_images == model.config.initial_images
    first = model.blocks[0].units[0].parts[0].norm
    images = some_grey_levels(model, model.initial_images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.initialize(images, generator=torch.Generator().manual_seed(0))
    assert model.training
    after = {name: value.clone() for name, value in model.state_dict().items()}
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    norms = {name for name, part in model.named_modules() if isinstance(part, ChannelNorm)}
    assert changed == {
        f"{n}.{part}" for n in norms for part in ("shift", "log_scale", "initialized")
    }
    noise = draw(model, len(images), torch.Generator().manual_seed(0))
    x, _ = model.dequantize(images, noise[:, : model.dims])
    z, _ = first(F.pixel_unshuffle(x / 2, 2))
    close(z.mean((0, 2, 3)), torch.zeros(12, dtype=torch.float64), 1e-9)
    close(z.std((0, 2, 3)), torch.ones(12, dtype=torch.float64), 1e-4)
    z, _ = model.encode(x, None, noise[:, model.dims :])
    assert 0.5 < float(z.detach().std()) < 1.5
    model.initialize(some_grey_levels(model, 8, seed=5))
    for name, value in model.state_dict().items():
        assert torch.equal(value, after[name]), "a second time it does nothing"


def test_initialisation_gives_the_numbers_of_the_first_training_pass() -> None:
    """As in the published program, see `test_golden_start_from_data`."""
    states = []
    for published in (True, False):
        torch.manual_seed(0)
        model = perturb(DenseFlow(CONFIGS["tiny"])).train()
        for part in model.modules():
            if isinstance(part, ChannelNorm):
                part.initialized.zero_()
        images = some_grey_levels(model, 8)
        source = torch.Generator().manual_seed(0)
        if published:
            with initializing(model):
                model.draw(images, None, noise=draw(model, 8, source))
        else:
            model.initialize(images, generator=source)
        states.append([p.detach().clone() for p in model.parameters()])
    for got, expected in zip(*states, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("initialized", [True, False])
def test_recomputed_activations_move_no_statistics_twice(initialized: bool) -> None:
    results = []
    for active in (False, True):
        torch.manual_seed(0)
        model = DenseFlow(CONFIGS["tiny"]).double()
        gradients = []
        with recomputed(model.stages, active):
            if initialized:
                model.initialize(some_grey_levels(model, 16), generator=generator(0))
            for step in range(2):
                images = some_grey_levels(model, 8, seed=step)
                model.loss(images, generator=torch.Generator().manual_seed(step)).mean().backward()
                gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((model.state_dict(), gradients))
    (plain, plain_gradients), (checkpointed, gradients) = results
    for name, value in plain.items():
        assert torch.equal(checkpointed[name], value), name
        if name.endswith("num_batches_tracked"):
            assert int(value) == 2
    assert len(gradients) == 2 * len(list(model.parameters()))
    for got, expected in zip(gradients, plain_gradients, strict=True):
        close(got, expected, 1e-12)


def test_stages_are_everything_that_costs_memory() -> None:
    """If stages are recomputed, only a few small maps of dequantiser and prior are kept."""
    model = make("three blocks")
    assert len(model.stages) == len(set(model.stages))
    inside = {id(p) for stage in model.stages for p in stage.parameters()}
    outside = {name for name, p in model.named_parameters() if id(p) not in inside}
    few = ("prior_", *(f"dequantizer.{name}" for name in ("mixes", "mean", "log_scale")))
    few += ("dequantizer.context.down.",)
    assert {name for name in outside if not name.startswith(few)} == set()
    heard: list[int] = []
    for index, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda *_, index=index: heard.append(index))
    model.loss(some_grey_levels(model))
    assert heard == list(range(len(model.stages))), "in order"


def test_statistics_are_those_of_torch() -> None:
    ours, torchs = DeferredBatchNorm(4), torch.nn.BatchNorm2d(4)
    for step in range(3):
        x = torch.randn(5, 4, 3, 2, generator=torch.Generator().manual_seed(step)) * 3 + 1
        close(ours(x), torchs(x), 1e-6)
        ours(x)  # again: nothing is counted twice
        ours.take_up()
        ours.take_up()
    for name, value in torchs.state_dict().items():
        close(ours.state_dict()[name], value, 1e-6)
    close(ours.eval()(x), torchs.eval()(x), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["denseflow-tiny", "denseflow-digits"])
@pytest.mark.parametrize("initialized", [True, False])
def test_small_presets_learn_within_seconds(preset: str, initialized: bool) -> None:
    """Each image has one grey level, so there is a dependence to be learned."""
    torch.manual_seed(0)
    model = DenseFlow(PRESETS[preset].config)
    assert model.num_parameters < 500_000
    source = torch.Generator().manual_seed(0)

    def batch(step: int) -> Tensor:
        level = torch.randint(0, model.levels, (16, 1, 1, 1), generator=source, dtype=torch.uint8)
        return level.expand(16, *model.event_shape)

    if initialized:
        model.initialize(batch(0), generator=source)
    losses = train(model, batch, 32)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - 0.3


def test_bfloat16_keeps_state_and_log_determinants_in_float32() -> None:
    model = make(dtype=torch.float32, scale=0.05)
    images, noise = some_grey_levels(model), some_noise(model).float()
    expected = model.draw(images, None, noise=noise)
    x, e = inputs(model)
    for weights in (model, make(scale=0.05).bfloat16()):
        with torch.autocast("cpu", torch.bfloat16, enabled=weights is model):
            z, log_abs_det = weights.encode(x, None, e)
            assert z.dtype == log_abs_det.dtype == torch.float32
            close(weights.decode(z), x, 0.05)
            torch.testing.assert_close(
                weights.draw(images, None, noise=noise), expected, rtol=0.02, atol=2
            )


# Attention


def test_published_attention_is_what_the_reference_page_says() -> None:
    """With loops, for an image of 2 x 4: token 0 is the first 3 E values, channel by channel."""
    torch.manual_seed(0)
    attention = NystromAttention(4, 2, 4, "published").double()
    x = torch.randn(1, 4, 2, 4, dtype=torch.float64)
    values = attention.qkv(x)[0].flatten()
    tokens = torch.stack([values[6 * t : 6 * t + 6] for t in range(8)])
    q, k, v = tokens[:, :2], tokens[:, 2:4], tokens[:, 4:]
    ql = torch.stack([(q[2 * m] + q[2 * m + 1]) / 2 for m in range(4)]) / math.sqrt(8)
    kl = torch.stack([(k[2 * m] + k[2 * m + 1]) / 2 for m in range(4)]) / math.sqrt(8)

    def over_rows(scores: Tensor) -> Tensor:
        return scores.exp() / scores.exp().sum(0, keepdim=True)

    kernel = over_rows(ql @ kl.T)
    inverse = kernel.T / (kernel.sum(0).max() * kernel.sum(1).max())
    eye = torch.eye(4, dtype=torch.float64)
    for _ in range(6):
        p = kernel @ inverse
        inverse = inverse @ (13 * eye - p @ (15 * eye - p @ (7 * eye - p))) / 4
    out = over_rows(q @ kl.T) @ inverse @ (over_rows(ql @ k.T) @ v) + v
    close(attention(x), attention.output(out.flatten().view(1, 2, 2, 4)), 1e-10)


def test_corrected_attention_is_softmax_attention_where_every_token_is_a_landmark() -> None:
    torch.manual_seed(0)
    attention = NystromAttention(4, 3, 4, "corrected").double()
    with torch.no_grad():
        attention.qkv.weight.mul_(6)  # a kernel well away from singular
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    q, k, v = attention.qkv(x).flatten(2).mT.chunk(3, dim=-1)
    kernel = (q @ k.mT / math.sqrt(3)).softmax(-1)
    first, second, third = attention.kernels(q, k)
    for got in (first, second, third):
        close(got, kernel, 1e-12)
    inverse = torch.linalg.inv(kernel)
    expected = kernel @ inverse @ kernel @ v + v
    steps = kernel @ pseudo_inverse(kernel) @ kernel @ v + v
    close(attention.attend(torch.cat([q, k, v], dim=-1)), steps, 1e-12)
    close(steps, expected, 0.3)
    shuffled = attention(x.flip(2, 3))
    close(shuffled, attention(x).flip(2, 3), 1e-9)


def test_the_variants_are_two_functions_of_the_same_weights() -> None:
    model = make()
    other = DenseFlow(replace(model.config, attention="corrected")).double().eval()
    other.load_state_dict(model.state_dict())
    x, e = inputs(model)
    assert not torch.allclose(model.encode(x, None, e)[0], other.encode(x, None, e)[0])


# What cannot be


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modules": (1, 2)}, "one entry for each block"),
        ({"units": (6, 0, 1)}, "positive sizes"),
        ({"image_shape": (3, 20, 20)}, "multiples of 8"),
        ({"image_shape": (3, 8, 8)}, r"landmarks that divide the 1 x 1 positions .* got 4"),
        ({"dense_depth": 0}, "positive sizes"),
        ({"dequantizer_width": 0}, "positive sizes"),
        ({"levels": 1}, "levels and initial_images of 2 or more, got 1 and 64"),
        ({"initial_images": 1}, "levels and initial_images of 2 or more, got 256 and 1"),
    ],
)
def test_configurations_that_cannot_be_built(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenseFlowConfig(**fields)


def test_an_unknown_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'published' \| 'corrected', got 'fixed'"):
        override(CONFIGS["tiny"], {"attention": "fixed"})


def test_errors() -> None:
    model = make()
    x, e = inputs(model)
    images = some_grey_levels(model)
    with pytest.raises(ValueError, match="unconditional"):
        model.encode(x, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="floating-point images"):
        model.encode(x[:, :1])
    with pytest.raises(ValueError, match="expected noise of shape"):
        model.encode(x, None, e[:, 1:])
    with pytest.raises(ValueError, match="expected noise of shape"):
        model.draw(images, None, noise=e)
    with pytest.raises(ValueError, match="floating-point latents"):
        model.decode(e[:, :3])
    with pytest.raises(ValueError, match="at least one image"):
        model.loss(images[:0])
    with pytest.raises(ValueError, match="two images or more to initialise on, got 1"):
        DenseFlow(model.config).initialize(images[:1])
    with pytest.raises(ValueError, match="4 landmarks needs"):
        NystromAttention(4, 2, 4, "published")(torch.zeros(1, 4, 1, 3))
