"""MaskDiT: numbers of the original, published counts, laws of masking."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import exactflow
from exactflow.models.maskdit.model import MaskDiT, MaskDiTConfig
from exactflow.paths.ode import edm_levels
from exactflow.sampling.denoiser import Denoiser
from exactflow.sampling.solvers import EDMSolver
from originals import golden_folder, recorded

CASES = ["latent_cond", "rgb_uncond_patch4"]
TOLERANCE = 1e-5  # of the larger of 1 and the largest value
TINY = MaskDiTConfig((2, 4, 6), 2, 16, 1, 2, 8, 1, 2, num_classes=3)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Any, MaskDiT, Any]:
    """Settings, model in float64 and numbers of the original."""
    settings, _, expected = recorded("maskdit", request.param)
    model = exactflow.convert(
        golden_folder("maskdit", request.param) / f"{request.param}.pt",
        num_heads=settings["heads"],
        decoder_heads=settings["decoder_heads"],
    )
    assert isinstance(model, MaskDiT)
    changes = {name: settings[name] for name in ("mask_ratio", "sigma_data")}
    config = replace(model.config, reconstruction=settings["mae_loss_coef"], **changes)
    ours = MaskDiT(config)
    ours.load_state_dict(model.state_dict())
    expected = {n: v.double() if v.is_floating_point() else v for n, v in expected.items()}
    return settings, ours.double().eval(), expected


def close(found: Tensor, expected: Tensor) -> None:
    worst = float((found - expected).abs().max())
    assert worst <= TOLERANCE * max(1.0, float(expected.abs().max())), worst


def denoised(model: MaskDiT, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
    """D at x0 + sigma eps, through the path."""
    time = model.path.time_of(-2 * sigma.log())
    alpha = model.path.at(time).alpha.view(-1, 1, 1, 1)
    return model.denoise(alpha * x, time, label).mean


@torch.no_grad()
def test_what_the_original_denoises(case: tuple[Any, MaskDiT, Any]) -> None:
    _, model, expected = case
    x, sigma, label = expected["x"], expected["sigma"], expected.get("y")
    close(denoised(model, x, sigma, label), expected["denoised"])
    condition = model.network.condition(sigma.log() / 4, label)
    close(condition, expected["conditioning"])
    if label is None:
        return
    close(denoised(model, x, sigma, None), expected["denoised_no_label"])
    dropped = expected["y_first_dropped"].where(expected["y_first_dropped"] >= 0, model.null_label)
    close(denoised(model, x, sigma, dropped), expected["denoised_first_dropped"])


@torch.no_grad()
def test_the_masked_parts_and_losses_of_the_original(case: tuple[Any, MaskDiT, Any]) -> None:
    settings, model, expected = case
    network, label, sigma = model.network, expected.get("y"), expected["sigma"]
    kept = expected["mask_noise"].argsort(dim=1)[:, : model.config.kept]
    assert torch.equal(kept, expected["ids_keep"])
    scaled = expected["x"] / (sigma**2 + settings["sigma_data"] ** 2).sqrt().view(-1, 1, 1, 1)
    condition = network.condition(sigma.log() / 4, label)
    tokens = network.encode(scaled, condition, kept)
    close(tokens, expected["masked.encoder_output"])
    close(network.join(tokens, condition, kept), expected["masked.decoder_input"])
    given = expected["x0"], expected["noise"], sigma.log(), label
    close(model.denoising_loss(*given, kept=kept), expected["masked.loss"])
    close(model.denoising_loss(*given), expected["unmasked.loss"])


@torch.no_grad()
def test_samples_of_the_original(case: tuple[Any, MaskDiT, Any]) -> None:
    settings, model, expected = case
    steps, rho = settings["sampler_steps"], settings["sampler_rho"]
    bounds = settings["sampler_sigma_max"], settings["sampler_sigma_min"]
    levels = edm_levels(steps, *bounds, rho).tolist()
    start, label = levels[0] * expected["latents"], expected.get("y")
    found = EDMSolver(steps).solve(Denoiser(model, label), start, levels)
    close(found, expected["heun.sample"])
    if label is not None:
        guided = Denoiser(model, label, settings["guidance"] - 1)
        close(EDMSolver(steps).solve(guided, start, levels), expected["heun_guided.sample"])
        assert guided.evaluations == 2 * (2 * steps - 1)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "count", "frozen"),
    [
        (1152, 28, 16, 730_115_216, 730_541_200),  # XL/2
        (1280, 32, 16, 1_009_543_440, 1_010_002_192),  # H/2
        (1024, 24, 16, 509_783_056, 510_176_272),  # L/2
        (768, 12, 12, 175_581_968, 175_909_648),  # B/2
        (384, 12, 6, 68_116_880, 68_346_256),  # S/2
    ],
)
def test_published_parameter_counts(
    width: int, depth: int, heads: int, count: int, frozen: int
) -> None:
    config = MaskDiTConfig(width=width, depth=depth, num_heads=heads, num_classes=1000)
    with torch.device("meta"):
        model = MaskDiT(config)
    assert model.num_parameters == count
    assert sum(value.numel() for value in model.state_dict().values()) == frozen


def randomized(config: MaskDiTConfig = TINY) -> MaskDiT:
    torch.manual_seed(0)
    model = MaskDiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double()


def given(model: MaskDiT) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x0, noise = torch.randn(2, 3, *model.event_shape, dtype=torch.float64)
    return x0, noise, torch.randn(3, dtype=torch.float64)


def test_the_order_of_the_kept_tokens_does_not_matter() -> None:
    model = randomized()
    kept = torch.tensor([[0, 2, 5], [4, 1, 3], [5, 0, 1]])
    plain = model.denoising_loss(*given(model), kept=kept)
    torch.testing.assert_close(model.denoising_loss(*given(model), kept=kept.flip(1)), plain)


def test_all_tokens_kept_is_no_mask() -> None:
    """But for the reconstruction, which has nothing to reconstruct."""
    model = randomized(replace(TINY, reconstruction=0.0))
    label = torch.tensor([0, 3, 1])
    every = torch.arange(6).expand(3, -1)
    x0, noise, log_sigma = given(model)
    x = x0 + log_sigma.exp().view(-1, 1, 1, 1) * noise
    seen = model._evaluate(x, log_sigma, label, every)
    torch.testing.assert_close(seen, model._evaluate(x, log_sigma, label))


def test_each_part_of_the_loss_reads_its_own_patches() -> None:
    model, kept = randomized(), torch.tensor([[0, 2, 5]] * 3)
    x0, noise, log_sigma = given(model)
    other = x0.clone()
    changed = model.network.patches(other)
    changed[:, 1] += torch.arange(8.0)  # removed: neither seen nor a target of the first part
    moved = model.network.image(changed)
    only = MaskDiT(replace(TINY, reconstruction=0.0)).double()
    only.load_state_dict(model.state_dict())
    before, after = (only.denoising_loss(x, noise, log_sigma, kept=kept) for x in (x0, moved))
    torch.testing.assert_close(after, before)
    before, after = (model.denoising_loss(x, noise, log_sigma, kept=kept) for x in (x0, moved))
    assert float((after - before).detach().abs().min()) > 1e-4


def test_only_training_masks() -> None:
    model, images = randomized(), torch.randint(0, 256, (4, 2, 4, 6), dtype=torch.uint8)

    def loss() -> Tensor:
        return model.loss(images, generator=torch.Generator().manual_seed(0))

    masked = loss()
    model.eval()
    assert not torch.allclose(loss(), masked)
    plain = MaskDiT(replace(TINY, mask_ratio=0.0)).double()
    plain.load_state_dict(model.state_dict())
    unmasked = plain.train().loss(images, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loss(), unmasked)


def test_no_noise_is_denoised_to_itself() -> None:
    model = randomized().eval()
    x0, _, _ = given(model)
    sigma = torch.full((3,), 1.001e-3, dtype=torch.float64)
    torch.testing.assert_close(denoised(model, x0, sigma, None), x0, atol=0.02, rtol=0)


def test_the_solver_is_of_second_order() -> None:
    model = randomized().eval()
    x = torch.randn(2, *model.event_shape, dtype=torch.float64)
    ends = []
    for steps in (8, 16, 32, 256):
        levels = edm_levels(steps, 10.0, 1.0).tolist()
        denoiser = Denoiser(model)
        ends.append(EDMSolver(steps).solve(denoiser, x, levels))
        assert denoiser.evaluations == 2 * steps - 1
    errors = [float((end - ends[-1]).abs().max()) for end in ends[:-1]]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 4}, "patch_size that divides"),
        ({"width": 18}, "multiple of both the heads and 4"),
        ({"decoder_heads": 3}, "multiple of both the heads and 4"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"mask_ratio": 0.9}, "keeps a token"),
        ({"reconstruction": -0.1}, "reconstruction"),
        ({"image_shape": (1, 4, 6), "patch_size": 1}, "patches of two numbers and more"),
        ({"label_dropout": 1.5}, "label_dropout"),
    ],
)
def test_what_cannot_be_built(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **fields)


def test_files_of_the_trainer(tmp_path: Path) -> None:
    """With the words of a command line beside the weights, and names of a compiled network."""
    folder = golden_folder("maskdit", "rgb_uncond_patch4")
    weights = torch.load(folder / "rgb_uncond_patch4.pt", weights_only=True)
    renamed = {f"_orig_mod.{name}": value for name, value in weights.items()}
    content = {"model": {}, "ema": renamed, "opt": {}, "args": argparse.Namespace(seed=1)}
    torch.save(content, tmp_path / "trained.pt")
    hints = {"num_heads": 2, "decoder_heads": 3}
    one, two = (
        exactflow.convert(path, **hints)
        for path in (tmp_path / "trained.pt", folder / "rgb_uncond_patch4.pt")
    )
    assert one.config == two.config
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
    with pytest.raises(ValueError, match="do not tell num_heads: give it"):
        exactflow.convert(tmp_path / "trained.pt")
    with pytest.raises(ValueError, match="multiple of both the heads"):
        exactflow.convert(tmp_path / "trained.pt", num_heads=5, decoder_heads=3)
    torch.save({n: v for n, v in weights.items() if "fc1" not in n}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="not a complete MaskDiT checkpoint"):
        exactflow.convert(tmp_path / "part.pt", **hints)
