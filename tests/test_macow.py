"""MaCow: the published program's numbers, and the laws of its parts."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from exactflow.core import grey_levels as grey
from exactflow.core.config import override
from exactflow.core.model import autoregressive_parts, log_density
from exactflow.core.randomness import generator, normal_rows
from exactflow.core.transform import AutoregressiveTransform, Decoding, Solver
from exactflow.data.config import DataConfig
from exactflow.models.convert import convert
from exactflow.models.macow import published as macow_published
from exactflow.models.macow.masked_convolution import (
    ContextEncoder,
    CouplingNetwork,
    WeightNormConv,
)
from exactflow.models.macow.model import MaCow, MaCowConfig
from exactflow.models.macow.parts import GlowStep, Level, Step, StepPlan, Unit
from exactflow.models.macow.published import from_published
from exactflow.models.macow.transforms import (
    ActNorm,
    Coupling,
    MaskedConvolution,
    Orientation,
    squeeze,
    unsqueeze,
)
from exactflow.models.registry import FAMILIES
from exactflow.models.transforms import InvertibleConvolution
from exactflow.nn.data_dependent import DataDependent, initializing
from exactflow.sampling.flow_solvers import Adaptive, GaussSeidelJacobi, Jacobi, Sequential
from exactflow.sampling.inversion import Inversion
from exactflow.sampling.request import SamplingOptions
from exactflow.sampling.sample import sample
from exactflow.training.optim import TrainConfig
from flows import blueprint, count, some_grey_levels, some_images
from macow_export import published_name, to_published
from originals import recorded

PRESETS = FAMILIES["macow"].presets

IMAGES, LOG_DETS, BITS = 1e-4, 2e-3, 1e-5  # tolerances that come with the recorded numbers
CASES = ["uniform", "additive", "variational"]
ORIENTATIONS = ["A", "B", "C", "D"]
CONFIGS = {
    "three levels": MaCowConfig((3, 8, 8), ((1,), (1, 1), (1,)), (8, 8, 8)),
    "odd, one level": MaCowConfig((3, 5, 7), ((1,),), (8,)),
    "one channel, odd": MaCowConfig((1, 3, 5), ((2,),), (8,)),
    "one channel, two levels": MaCowConfig((1, 6, 2), ((1,), (1,)), (8, 8), kernel=(3, 5)),
    "additive": MaCowConfig(
        (1, 4, 8), ((1,), (1,), (1,)), (8, 8, 8), additive=True, additive_prior=True, factor=2
    ),
    "affine prior": MaCowConfig((1, 4, 4), ((1,), (1, 1), (1,)), (8, 8, 8), additive=True),
    "variational": MaCowConfig(
        (1, 4, 4),
        ((1,), (1,)),
        (8, 8),
        dequantization="variational",
        dequantizer_steps=((1,), (1,), (1,)),
        dequantizer_hidden=(8, 8, 8),
        levels=4,
    ),
}


def case(name: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Settings, weights and numbers of one run of the published program."""
    return recorded("flows", f"macow_{name}")


def published(name: str) -> tuple[MaCow, dict[str, torch.Tensor], int]:
    """The model of a case, the recorded numbers, and the draws per image."""
    settings, state, expected = case(name)
    shape = (3, settings["height"], settings["width"])
    model = from_published(state, shape[1:], 2 ** settings["n_bits"])
    assert model.num_parameters == settings["parameters"]
    return model, expected, settings.get("noise_samples_per_image", 1)


def grey_levels(model: MaCow, expected: dict[str, torch.Tensor], draws: int = 1) -> torch.Tensor:
    """The 8-bit images of a case at the model's bits, repeated for every draw."""
    bits = 8 - round(math.log2(model.levels))
    return (expected["image"] >> bits).repeat_interleave(draws, 0)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got, expected.reshape(got.shape), rtol=0, atol=tolerance)


def make(config: MaCowConfig, scale: float = 0.1, seed: int = 0) -> MaCow:
    """An initialised model in float64 with all weights changed."""
    torch.manual_seed(seed)
    model = MaCow(config)
    model.initialize(some_grey_levels(model, 32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model.double().eval()


def masked_convolution(
    orientation: Orientation, size: tuple[int, int] = (5, 5)
) -> MaskedConvolution:
    """A masked convolution with changed weights, in float64."""
    torch.manual_seed(3)
    conv = MaskedConvolution(2, size, (2, 3), orientation)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return conv.double()


def masked_convolutions(module: torch.nn.Module) -> list[MaskedConvolution]:
    return [part for part in module.modules() if isinstance(part, MaskedConvolution)]


# The published program.


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_published_dequantisation_latents_and_likelihood(name: str) -> None:
    model, expected, draws = published(name)
    noise = expected["noise"].reshape(-1, *model.event_shape)
    images = grey_levels(model, expected, draws)
    x, log_q = model.dequantize(images, noise)
    close(x, expected["x"], IMAGES)
    close(log_q, expected["log_q"], LOG_DETS)
    z, log_abs_det = model.encode(expected["x"].flatten(0, 1))
    close(z, expected["z"], IMAGES)
    close(log_abs_det, expected["log_det"], LOG_DETS)
    log_prob = model.prior.log_prob(z) + log_abs_det
    close(log_prob, expected["log_prob"], LOG_DETS)
    ratio = (log_prob - log_q).view(-1, draws)
    constant = model.dims * grey.nats_per_level_interval(model.levels)
    nats = {
        "mean": constant - ratio.mean(1),
        "importance_weighted": constant + math.log(draws) - ratio.logsumexp(1),
    }
    for kind, value in nats.items():
        close(value, expected[f"nll_{kind}"], LOG_DETS)
        bits = value / (model.dims * math.log(2))
        close(bits, expected[f"bits_per_dim_{kind}"], BITS)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_published_log_determinants_of_every_part(name: str) -> None:
    model, expected, draws = published(name)
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for ours, module in model.named_modules():
        if isinstance(module, Level | Step | Unit | GlowStep):
            there = published_name(f"{ours}.", model.config).rstrip(".")
            there = there.replace("levels", "blocks")
            module.register_forward_hook(lambda _, __, out, key=there: found.update({key: out}))
    noise = expected["noise"].reshape(-1, *model.event_shape)
    model.dequantize(grey_levels(model, expected, draws), noise)
    model.encode(expected["x"].flatten(0, 1))
    checked = 0
    for key, value in expected.items():
        prefix, _, part = key.partition("log_det.")
        if not part or ".conv" in part or prefix not in ("", "dequantiser."):
            continue
        root = "dequant_flow" if prefix else "flow"
        close(found[f"{root}.{part}"][1], value, LOG_DETS)
        checked += 1
    assert checked == (29 if name == "variational" else 21)
    for level in range(3):
        close(found[f"flow.blocks.{level}"][0], expected[f"output.blocks.{level}"], IMAGES)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_published_decoding(name: str) -> None:
    model, expected, _ = published(name)
    x = model.decode(expected["decode.z"])
    close(x, expected["decode.x"], IMAGES)
    close(-model.encode(x)[1], expected["decode.log_det"], LOG_DETS)
    step = 256 // model.levels  # what lies above the range the program makes 255 at any depth
    assert torch.equal(model.to_grey_levels(x), expected["decode.image"] // step)
    close(model.decode(expected["z"][:, 0]), expected["roundtrip.x"], IMAGES)


@torch.no_grad()
def test_published_context() -> None:
    model, expected, draws = published("variational")
    assert model.dequantizer is not None
    images = grey_levels(model, expected, draws)
    close(model._noiseless(images, torch.float32)[::draws], expected["preprocessed"], 1e-6)
    context = model.dequantizer.encoder(model._noiseless(images, torch.float32))
    close(context, expected["dequantiser.context"], IMAGES)


@pytest.mark.parametrize("name", CASES)
def test_published_state_there_and_back(name: str) -> None:
    settings, state, _ = case(name)
    model = from_published(state, (16, 16), 2 ** settings["n_bits"])
    assert model.config.additive is (not settings["config"]["flow"]["scale"])
    assert not model.config.additive_prior
    back = to_published(model)
    assert back.keys() == state.keys()
    for key, value in state.items():
        atol = 1e-5 if key.endswith("weight_inv") else 0
        torch.testing.assert_close(back[key], value, rtol=0, atol=atol)
    new = {
        key.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): value
        for key, value in state.items()
    }
    again = from_published(new, (16, 16), 2 ** settings["n_bits"])
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_incomplete_state_dicts_are_refused(tmp_path: Path) -> None:
    torch.save({macow_published.MARK: torch.zeros(1)}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"dict of MaCow: it has no 'flow\.blocks\.0\.steps\.0"):
        convert(tmp_path / "part.pt", height=8, levels=256)
    _, state, _ = case("variational")
    incomplete = {key: value for key, value in state.items() if "resnet0" not in key}
    with pytest.raises(ValueError, match="complete"):
        from_published(incomplete, (16, 16), 256)


@torch.no_grad()
@pytest.mark.parametrize("name", ["init", "init_variational"])
def test_published_initialisation(name: str) -> None:
    model, expected, _ = published(name)
    x = expected["x"]
    if model.dequantizer is not None:
        with initializing(model.dequantizer):
            model.dequantizer(x, expected["noise"])
    with initializing(model.flow):
        z, log_abs_det = model.flow(x)
    close(z, expected["z"], IMAGES)
    close(log_abs_det, expected["log_det"], LOG_DETS)
    state = to_published(model)
    after = [key for key in expected if key.startswith("after.")]
    assert len(after) > 100
    for key in after:
        close(state[key.removeprefix("after.")], expected[key], IMAGES)


@torch.no_grad()
def test_published_masked_convolutions() -> None:
    settings, state, expected = case("masked_convs")
    for name, variant in settings["variants"].items():
        order, kernel = variant["order"], variant["kernel_size"]
        kernel = tuple(kernel if order in "AB" else kernel[::-1])
        conv = MaskedConvolution(
            variant["in_channels"],
            (5, 7),
            kernel,
            order,
            additive=not variant["scale"],
            context=variant["s_channels"],
        )
        assert sum(p.numel() for p in conv.parameters()) == variant["parameters"]
        number = 1 + ORIENTATIONS.index(order)
        place = f"flow.blocks.0.steps.0.units.0.conv{number}."
        ours = {}
        for key, value in state.items():
            if key.startswith(f"{name}."):
                there = place + key.removeprefix(f"{name}.")
                here = macow_published._rename(there).rpartition("network.")[2]
                ours[f"network.{here}"] = value
        conv.load_state_dict(ours)
        context = expected.get(f"{name}.context")
        z, log_abs_det = conv.encode(expected[f"{name}.input"], context)
        close(z, expected[f"{name}.output"], 1e-5)
        close(log_abs_det, expected[f"{name}.log_det"], 1e-4)
        if context is None:
            y = expected[f"{name}.inverse_input"]
            x = conv.restore(conv.inverse(conv.arrange(y)))
            close(x, expected[f"{name}.inverse_output"], 1e-5)
        row, column = variant["position_probed"]
        with torch.enable_grad():
            x = expected[f"{name}.input"].requires_grad_()
            out = conv.encode(x, context)[0][:, :, row, column]
            (gradient,) = torch.autograd.grad(out.square().sum(), x)
        assert torch.equal(gradient.abs().amax((0, 1)) > 0, expected[f"{name}.depends_on"])


def test_published_squeeze() -> None:
    _, _, expected = case("squeeze")
    assert torch.equal(squeeze(expected["x"]), expected["z"])
    assert torch.equal(unsqueeze(expected["inverse.z"]), expected["inverse.x"])
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).float()
    z = squeeze(x)
    assert torch.equal(unsqueeze(z), x)
    for c in range(3):
        for dy in range(2):
            for dx in range(2):
                assert torch.equal(z[:, (2 * dy + dx) * 3 + c], x[:, c, dy::2, dx::2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "total", "flow", "encoder"),
    [
        ("cifar10-uniform", 37_197_547, 37_197_547, 0),
        ("cifar10-variational", 38_403_423, 37_197_547, 214_088),
        ("imagenet64-uniform", 117_244_127, 117_244_127, 0),
        ("imagenet64-variational", 123_100_393, 117_244_127, 657_544),
        ("lsun64-uniform", 117_244_127, 117_244_127, 0),
        ("celeba256-uniform", 171_945_151, 171_945_151, 0),
        ("celeba256-variational", 177_288_157, 171_945_151, 657_544),
        ("lsun128-uniform", 166_570_083, 166_570_083, 0),
        ("lsun128-variational", 171_913_089, 166_570_083, 657_544),
    ],
)
def test_published_parameter_counts(preset: str, total: int, flow: int, encoder: int) -> None:
    model = blueprint(f"macow-{preset}")
    assert isinstance(model, MaCow)
    assert model.num_parameters == total
    assert count(model.flow) == flow
    assert encoder == (0 if model.dequantizer is None else count(model.dequantizer.encoder))


def test_parameter_counts_of_parts() -> None:
    model = blueprint("macow-cifar10-uniform")
    assert isinstance(model, MaCow)
    with torch.device("meta"):
        blocks = [count(level) for level in model.flow.levels]
        assert blocks == [16_684, 9_428_967, 13_432_536, 14_319_360]
        kinds = {
            MaskedConvolution: (10_672_128, 512),
            Coupling: (26_469_544, 68),
            InvertibleConvolution: (42_309, 68),
            ActNorm: (13_566, 324),
        }
        for kind, expected in kinds.items():
            parts = [m for m in model.modules() if isinstance(m, kind)]
            assert (sum(map(count, parts)), len(parts)) == expected
        widths = {3: 324, 12: 4_752, 48: 74_304, 96: 296_064, 100: 160_800, 192: 591_360}
        widths[300] = 1_231_024
        for channels, parameters in widths.items():
            assert count(MaskedConvolution(channels, (4, 4), (2, 3), "A")) == parameters
        plan = StepPlan((8, 8), 512, (2, 3), False, 0)
        step = Step(plan, 12)
        assert [count(unit) for unit in step.units] == [19_056, 19_056]
        assert (count(step.glow), count(step)) == (347_328, 385_440)
        assert count(GlowStep(plan, 12, 4, False)) == 333_492


# Laws.


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_log_abs_det_is_the_jacobians(name: str) -> None:
    model = make(CONFIGS[name])
    for image in some_images(model, 2, seed=2):
        _, log_abs_det = model.encode(image[None])

        def flat(x: torch.Tensor) -> torch.Tensor:
            return model.encode(x.view(1, *model.event_shape))[0].flatten()

        jacobian = torch.autograd.functional.jacobian(flat, image.flatten())
        close(torch.linalg.slogdet(jacobian).logabsdet, log_abs_det[0], 1e-9)


def test_dequantisers_density_is_the_jacobians() -> None:
    model = make(CONFIGS["variational"])
    images = some_grey_levels(model, 1)
    noise = torch.randn(1, *model.event_shape, dtype=torch.float64)
    x, log_q = model.dequantize(images, noise)
    u = (x + 1) * (model.levels / 2) - images
    assert bool(((u > 0) & (u < 1)).all())

    def flat(noise: torch.Tensor) -> torch.Tensor:
        x, _ = model.dequantize(images, noise.view(1, *model.event_shape))
        return (x * (model.levels / 2)).flatten()

    jacobian = torch.autograd.functional.jacobian(flat, noise.flatten())
    expected = model.prior.log_prob(noise) - torch.linalg.slogdet(jacobian).logabsdet
    close(log_q, expected, 1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_exact_in_float64(name: str) -> None:
    model = make(CONFIGS[name])
    x = some_images(model, seed=2)
    z, _ = model.encode(x)
    kept = z.clone()
    steps = list(model.trajectory(z))
    assert all(step.shape == x.shape for step in steps)
    assert torch.equal(steps[0], kept)
    close(steps[-1], x, 1e-10)
    assert torch.equal(z, kept)
    assert len(steps) == 1 + len(model.config.steps)


@pytest.mark.slow
def test_round_trip_of_a_deep_model() -> None:
    """No constant is added to a scale, so no error compounds over a hundred ActNorms."""
    config = MaCowConfig((3, 16, 16), ((4,), (6, 6), (6,)), (8, 16, 16))
    model = make(config, 0.02)
    assert sum(isinstance(m, ActNorm) for m in model.modules()) > 100
    x = some_images(model, seed=2)
    close(model.decode(model.encode(x)[0]), x, 1e-10)
    model = model.float()
    x = x.float()
    close(model.decode(model.encode(x)[0]), x, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_parameters_see_the_lines_before_and_nothing_else(orientation: Orientation) -> None:
    """Output (2, 2) on 5 x 5 with kernel 2 x 3 depends on exactly what it may."""
    conv = masked_convolution(orientation)
    allowed = torch.zeros(5, 5, dtype=torch.bool)
    allowed[2, 2] = True
    near, across = {"A": (0, 2), "B": (3, 5), "C": (0, 2), "D": (3, 5)}[orientation], (1, 4)
    (rows, columns) = (near, across) if orientation in "AB" else (across, near)
    allowed[slice(*rows), slice(*columns)] = True
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    with torch.enable_grad():
        x.requires_grad_()
        out = conv.encode(x)[0]
        for channel in range(2):
            (gradient,) = torch.autograd.grad(out[0, channel, 2, 2], x, retain_graph=True)
            seen = gradient[0] != 0
            assert not bool(seen[:, ~allowed].any()), "must be exactly zero"
            own = allowed.clone()
            own[2, 2] = False
            assert bool(seen[:, own].all()), "both channels of every place before"
            assert seen[:, 2, 2].tolist() == [channel == 0, channel == 1]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_parameters_of_tokens_are_strictly_triangular(orientation: Orientation) -> None:
    conv = masked_convolution(orientation, (4, 6))
    x = conv.arrange(torch.randn(1, 2, 4, 6, dtype=torch.float64))
    jacobian = torch.autograd.functional.jacobian(conv.conditioner, x)
    seen = jacobian.abs().amax((0, 2, 3, 5))
    band = torch.ones_like(seen).tril(-1).triu(-2)
    assert torch.equal(seen > 0, band > 0)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_cached_parameters_equal_uncached_ones(orientation: Orientation, window: int) -> None:
    conv = masked_convolution(orientation, (5, 7))
    x = conv.arrange(torch.randn(3, 2, 5, 7, dtype=torch.float64))
    expected = conv.conditioner(x)
    cache = conv.new_cache(x)
    for start in range(0, conv.num_tokens, window):
        stop = min(start + window, conv.num_tokens)
        seen = x[:, :stop].clone()
        seen[:, -1] = float("nan")  # the last token must not be read
        got = conv.conditioner(seen, None, cache, start)
        close(got, expected[:, start:stop], 1e-13)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_an_image_and_its_tokens_are_mapped_alike(orientation: Orientation) -> None:
    conv = masked_convolution(orientation, (4, 3))
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64)
    tokens = conv.arrange(x)
    assert tokens.shape[:2] == (2, conv.num_tokens)
    assert torch.equal(conv.restore(tokens), x)
    z, log_abs_det = conv(tokens)
    image, same = conv.encode(x)
    close(conv.restore(z), image, 1e-13)
    close(same, log_abs_det, 1e-12)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 1)])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_fewer_lines_than_the_kernel_has(orientation: Orientation, size: tuple[int, int]) -> None:
    conv = masked_convolution(orientation, size)
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    z, _ = conv.encode(x)
    close(conv.restore(conv.inverse(conv.arrange(z))), x, 1e-11)


SOLVERS = [Sequential(), Jacobi(), Jacobi(start="zeros"), GaussSeidelJacobi(2), Adaptive()]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_solvers_invert_a_model(solver: Solver) -> None:
    model = make(CONFIGS["three levels"])
    x = some_images(model, seed=2)
    z, _ = model.encode(x)
    inversion = Inversion(solver, range(len(x)))
    close(model.decode(z, solver=inversion), x, 1e-9)
    parts = masked_convolutions(model.flow)
    assert len(inversion.records) == len(parts)
    assert not any(bool(record.repaired.any()) for record in inversion.records)
    close(model.decode(z), model.decode(z, solver=solver), 1e-9)


@pytest.mark.parametrize("config", ["three levels", "additive", "variational"])
@pytest.mark.parametrize(
    "name", ["auto", "sequential", "jacobi", "gauss-seidel-jacobi", "selective", "adaptive"]
)
def test_samples_are_the_same_whichever_solver_draws_them(name: str, config: str) -> None:
    model = make(CONFIGS[config])
    drawn = sample(model, 3, seed=5, solver=name, batch_size=2, options=SamplingOptions(trace=True))
    latents = [normal_rows(model.event_shape, [generator(seed, "sample")]) for seed in (5, 6, 7)]
    close(drawn.x, model.decode(torch.cat(latents).double()), 1e-9)
    parts = masked_convolutions(model.flow)
    assert len(drawn.iterations) == len(drawn.repairs) == len(parts)
    assert float(drawn.certificate.max()) < 1e-10
    assert drawn.trace is not None
    assert drawn.trace.shape == (1 + len(model.config.steps), 3, *model.event_shape)
    if name == "sequential":  # what a token's parameters depend on is none of the first's
        assert drawn.iterations == tuple(part.num_tokens - 1 for part in parts[::-1])


def test_generation_order_is_the_encoders_backwards() -> None:
    model = make(CONFIGS["variational"])
    asked = []

    def solver(
        transform: AutoregressiveTransform, z: torch.Tensor, label: torch.Tensor | None
    ) -> torch.Tensor:
        asked.append(transform)
        return transform.inverse(z, label)

    model.decode(torch.randn(1, *model.event_shape, dtype=torch.float64), solver=solver)
    assert asked == masked_convolutions(model.flow)[::-1]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_as_many_jacobi_iterations_as_lines_are_exact(orientation: Orientation) -> None:
    conv = masked_convolution(orientation, (6, 7))
    tokens = conv.arrange(torch.randn(2, 2, 6, 7, dtype=torch.float64))
    z, _ = conv(tokens)
    lines = conv.num_tokens
    close(Jacobi(iterations=lines, tolerance=0.0)(conv, z, None), tokens, 1e-12)
    short = Jacobi(iterations=lines - 1, tolerance=0.0)(conv, z, None)
    close(short[:, :-1], tokens[:, :-1], 1e-12)
    assert not torch.allclose(short[:, -1], tokens[:, -1], rtol=0, atol=1e-12)


def test_jacobi_takes_fewer_passes_than_there_are_lines() -> None:
    torch.manual_seed(0)
    conv = MaskedConvolution(3, (32, 32), (2, 3), "A").double()
    tokens = torch.randn(2, 32, 3 * 32, dtype=torch.float64)
    z, _ = conv(tokens)
    inversion = Inversion(Jacobi(), range(2))
    close(inversion(conv, z, None), tokens, 1e-9)
    assert inversion.records[0].evaluations < 32


def test_reduced_precision_decoding_and_steps_there_are_none_of() -> None:
    conv = masked_convolution("B").float()
    x = conv.arrange(torch.randn(2, 2, 5, 5))
    z, _ = conv(x)
    near = conv.inverse(z, decoding=Decoding(dtype=torch.bfloat16))
    assert near.dtype == torch.float32
    close(near, x, 0.2)
    assert not torch.equal(near, conv.inverse(z))
    with pytest.raises(ValueError, match="compiled"):
        conv.inverse(z, decoding=Decoding(step="compiled"))


@pytest.mark.parametrize("additive", [False, True])
def test_coupling_with_context(additive: bool) -> None:
    torch.manual_seed(0)
    network = CouplingNetwork(3 + 2, 8, 2 if additive else 4)
    coupling = Coupling(network, 3, additive).double()
    x, context = torch.randn(2, 5, 4, 3).double(), torch.randn(2, 2, 4, 3).double()
    z, log_abs_det = coupling(x, context=context)
    assert torch.equal(z[:, :3], x[:, :3])
    assert bool((log_abs_det == 0).all()) is additive
    close(coupling.inverse(z, context=context), x, 1e-12)
    assert not torch.allclose(coupling(x, context=-context)[0], z)


# Initialisation.


@torch.no_grad()
def test_initialisation_standardises_every_part() -> None:
    torch.manual_seed(0)
    model = MaCow(CONFIGS["variational"])
    outputs: dict[str, torch.Tensor] = {}
    model.initialize(some_grey_levels(model, 256), generator=torch.Generator().manual_seed(5))

    def keep(_: torch.nn.Module, __: object, out: Any, name: str) -> None:
        outputs[name] = out[0] if isinstance(out, tuple) else out

    for name, part in model.named_modules():
        if isinstance(part, DataDependent):
            part.register_forward_hook(partial(keep, name=name))
    generator = torch.Generator().manual_seed(5)
    images = some_grey_levels(model, 256)
    uniform = torch.rand(images.shape, generator=generator)
    normal = torch.randn(images.shape, generator=generator)
    model.dequantize(images, normal)
    _, log_abs_det = model.flow(grey.dequantize(images, uniform, model.levels))
    assert bool(log_abs_det.isfinite().all())
    constant = {  # nothing reaches these but the zeros beside the image
        f"{name}.network.conv"
        for name, part in model.named_modules()
        if isinstance(part, MaskedConvolution) and part.num_tokens == 1
    }
    assert constant
    for name, out in outputs.items():
        part = model.get_submodule(name)
        if isinstance(part, WeightNormConv) and part.last:
            assert float(out.abs().max()) == 0, name
            continue
        std, mean = torch.std_mean(out.transpose(0, 1).flatten(1), 1)
        close(mean, torch.zeros_like(mean), 1e-4)
        close(std, torch.full_like(std, float(name not in constant)), 1e-3)
    ln_s = F.logsigmoid(torch.tensor(2.0))
    conv = next(m for m in model.flow.modules() if isinstance(m, MaskedConvolution))
    _, change = conv.encode(grey.dequantize(images, uniform, model.levels))
    close(change, ln_s.expand(256) * model.dims, 1e-4)
    assert math.isclose(float(ln_s), -0.1269, abs_tol=1e-4)


def test_initialisation_happens_once_and_stays_with_the_weights() -> None:
    torch.manual_seed(0)
    model = MaCow(CONFIGS["one channel, odd"])
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    model.initialize(some_grey_levels(model, 16))
    first = {k: v.clone() for k, v in model.state_dict().items()}
    assert any(not torch.equal(fresh[k], v) for k, v in first.items())
    model.initialize(some_grey_levels(model, 8))
    other = MaCow(model.config)
    other.load_state_dict(first)
    other.initialize(some_grey_levels(model, 8))
    for key, value in first.items():
        assert torch.equal(model.state_dict()[key], value)
        assert torch.equal(other.state_dict()[key], value)


def test_images_that_agree_everywhere_can_be_initialised_on() -> None:
    model = MaCow(CONFIGS["three levels"])
    images = torch.full((16, *model.event_shape), 3, dtype=torch.uint8)
    model.initialize(images)
    assert bool(model.loss(images).isfinite().all())


# The model.


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_is_minus_the_bound_per_dimension(name: str) -> None:
    model = make(CONFIGS[name])
    images = some_grey_levels(model, 3)
    loss = model.loss(images, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    draw = torch.rand if model.dequantizer is None else torch.randn
    noise = draw(images.shape, generator=generator, dtype=torch.float64)
    x, log_q = model.dequantize(images, noise)
    close(loss, (log_q - log_density(model, x)) / model.dims, 1e-12)
    close(model.add_noise(images, torch.Generator().manual_seed(3)), x, 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = make(CONFIGS[name]).train()
    model.loss(some_grey_levels(model, 8)).mean().backward()
    unseen = {  # a single line depends on no other
        f"{name}.network.conv.{weight}"
        for name, part in model.named_modules()
        if isinstance(part, MaskedConvolution) and part.num_tokens == 1
        for weight in ("direction", "gain")
    }
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        felt = bool(parameter.grad.abs().max() > 0)
        assert felt is (parameter_name not in unseen), parameter_name


@torch.no_grad()
def test_importance_weights_have_the_right_mean() -> None:
    """Variational dequantisation changes the variance of the estimate, not its mean."""
    config = replace(
        CONFIGS["variational"],
        image_shape=(1, 2, 2),
        dequantizer_steps=((1,),),
        dequantizer_hidden=(8,),
    )
    model = make(config, 0.05)
    assert model.dequantizer is not None
    last = model.dequantizer.get_submodule("flow.levels.0.runs.0.0.glow.actnorm")
    assert isinstance(last, ActNorm)
    last.log_scale.add_(0.6)  # u from edge to edge of its interval: weights are bounded then
    count = 8_000
    images = some_grey_levels(model, 1).expand(count, -1, -1, -1)
    x, log_q = model.dequantize(images, torch.randn(count, 1, 2, 2).double())
    uniform = grey.dequantize(images, torch.rand(count, 1, 2, 2).double(), model.levels)
    learned, plain = (log_density(model, x) - log_q).exp(), log_density(model, uniform).exp()
    error = math.sqrt(float(learned.var() + plain.var()) / count)
    assert error < 0.05 * float(plain.mean())
    assert abs(float(learned.mean() - plain.mean())) < 4 * error


@pytest.mark.slow
@torch.no_grad()
def test_density_has_mass_one() -> None:
    """The share of samples in the data cube is the integral of the density over it."""
    model = make(MaCowConfig((2, 2, 2), ((1,), (1,)), (8, 8)), 0.1)
    size = 16_000
    samples = model.decode(torch.randn(size, 2, 2, 2, dtype=torch.float64))
    inside = (samples.abs() <= 1).flatten(1).all(1).double()
    x = torch.rand(size, 2, 2, 2, dtype=torch.float64) * 2 - 1
    density = log_density(model, x).exp() * 2**8
    error = math.sqrt(float(inside.var() + density.var()) / size)
    assert error < 0.05
    assert abs(float(inside.mean() - density.mean())) < 4 * error


def test_reduced_precision_keeps_log_determinants_in_float32() -> None:
    model = make(CONFIGS["three levels"], 0.02).float()
    x = some_images(model, seed=2)
    _, log_abs_det = model.encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        z16, log16 = model.encode(x)
        back = model.decode(z16)
    assert z16.dtype == log16.dtype == back.dtype == torch.float32
    torch.testing.assert_close(log16, log_abs_det, rtol=0.05, atol=2.0)
    close(back, x, 0.1)
    model = model.bfloat16()
    z, log_abs_det = model.encode(x)
    assert z.dtype == log_abs_det.dtype == torch.float32
    close(model.decode(z), x, 0.1)


@pytest.mark.slow
def test_a_tiny_preset_learns() -> None:
    torch.manual_seed(0)
    model = MaCow(PRESETS["macow-tiny"].config)
    source = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 150, 64).view(1, 1, 8, 8).expand(32, 3, 8, 8)
    noise = torch.rand(32, 3, 8, 8, generator=source)
    images = (ramp + 100 * noise.cumsum(3) / 8).to(torch.uint8)
    model.initialize(images, generator=source)
    optimizer = torch.optim.Adam(model.parameters())
    losses = []
    for step in range(24):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 10)
        loss = model.loss(images, generator=source).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    x = model.add_noise(images, source)
    with torch.no_grad():
        close(model.decode(model.encode(x)[0]), x, 1e-3)


def test_published_recipes() -> None:
    """Adam; times 0.999997 a step from 1e-3 to 1e-5, or to the last epoch if that is earlier."""
    published = {name: p for name, p in PRESETS.items() if p.published}
    assert len(published) == 10
    for name, preset in published.items():
        assert DataConfig(**preset.data).image_size == preset.config.image_shape[1]
        assert 2 ** DataConfig(**preset.data).bits == preset.config.levels
        assert "selected on the test set" in preset.published
        config = TrainConfig(**preset.training)
        assert (config.optimizer, config.weight_decay, config.clip_norm) == ("adamw", 0.0, None)
        images = 50_000 if "cifar10" in name else 1_281_149
        schedule = config.schedule(images)
        rates = [schedule.learning_rate(schedule.warmup + 1 + t) for t in (0, 1, 1000)]
        assert rates == pytest.approx([1e-3, 1e-3 * 0.999997, 1e-3 * 0.999997**1000])
        last = schedule.learning_rate(schedule.total)
        assert last == pytest.approx(5.45e-5 if "cifar10" in name else 1e-5, rel=1e-3)
        assert "epochs" in preset.training or schedule.total == 1_535_555


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": ()}, "at least one level"),
        ({"steps": ((1,), (0,)), "hidden": (8, 8)}, "1 each"),
        ({"steps": ((1, 1), (1,)), "hidden": (8, 8)}, "first and last"),
        ({"hidden": (8, 8)}, "hidden with 4"),
        ({"kernel": (2, 4)}, "odd number of columns"),
        ({"image_shape": (3, 20, 32)}, "multiples of 8"),
        ({"steps": ((1,), (1, 1, 1, 1), (1,)), "hidden": (8, 8, 8)}, "fewer than factor=4"),
        ({"factor": 5}, "it divides"),
        ({"factor": 1}, "factors >= 2"),
        ({"levels": 1}, "levels >= 2"),
        ({"dequantization": "gaussian"}, "'variational'"),
        ({"dequantization": "variational", "dequantizer_hidden": (8,)}, "dequantizer_hidden"),
    ],
)
def test_configurations_that_cannot_be_built(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(MaCowConfig(), fields)


def test_wrong_inputs_are_errors() -> None:
    model = make(CONFIGS["three levels"])
    with pytest.raises(ValueError, match="floating-point images"):
        model.encode(torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="floating-point latents"):
        model.decode(torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="unconditional"):
        model.encode(some_images(model, seed=2), torch.tensor([0, 1, 2]))


def test_a_dequantiser_is_not_asked_to_be_inverted() -> None:
    model = make(CONFIGS["variational"])
    inverted = masked_convolutions(model.flow)
    assert len(autoregressive_parts(model)) == len(inverted) < len(masked_convolutions(model))


def test_encoder_keeps_the_size() -> None:
    encoder = ContextEncoder(1, 2, 5, planes=4)
    assert encoder(torch.randn(2, 1, 8, 12)).shape == (2, 5, 8, 12)
