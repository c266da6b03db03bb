"""The published model: counts, key names, and the outputs of the original implementation."""

import pytest
import torch

import exactflow
from exactflow.models import registry
from exactflow.models.tarflow.model import TarFlow, TarFlowConfig
from exactflow.sampling.flow_solvers import Sequential
from exactflow.sampling.guidance import Guidance
from exactflow.sampling.inversion import Inversion
from originals import close, golden_folder, recorded

CASES = ["uncond", "cond", "vp"]


def case(name: str):
    settings, _, expected = recorded("tarflow", name)
    checkpoint = golden_folder("tarflow", name) / settings["checkpoint"]
    model = exactflow.convert(checkpoint, noise_std=0.07)
    assert isinstance(model, TarFlow)
    labels = expected.get("y")
    return settings, expected, model, labels


@pytest.mark.parametrize("name", CASES)
def test_latents_log_determinants_loss_and_gradient(name: str) -> None:
    _, expected, model, labels = case(name)
    x = expected["x"].requires_grad_()
    z, log_abs_det = model.encode(x, labels)
    close(z, expected["z"])
    close(log_abs_det / model.dims, expected["mean_logdet"])
    loss = 0.5 * z.square().mean() - (log_abs_det / model.dims).mean()
    close(loss[None], expected["loss"])
    (gradient,) = torch.autograd.grad(loss, x)
    close(gradient, expected["input_grad"])


@pytest.mark.parametrize("name", CASES)
def test_output_of_every_block(name: str) -> None:
    _, expected, model, labels = case(name)
    tokens = model.patchify(expected["x"])
    for index, block in enumerate(model.blocks):
        tokens = block.arrange(block(block.arrange(tokens), labels)[0])
        close(tokens, expected[f"block_output.{index}"])


@pytest.mark.parametrize("name", CASES)
def test_samples(name: str) -> None:
    _, expected, model, labels = case(name)
    close(model.decode(model.prior.from_noise(expected["noise"]), labels), expected["sample"])


@pytest.mark.parametrize("name", ["uncond", "cond"])
def test_guided_samples(name: str) -> None:
    settings, expected, model, labels = case(name)
    guidance = Guidance(
        settings["guidance"],
        schedule="linear" if settings["annealed_guidance"] else "constant",
        temperature=settings["attn_temp"],
    )
    noise = expected["noise"]
    null = model.null_label if model.num_classes else None
    solver = Inversion(Sequential(), range(len(noise)), guidance=guidance, null_label=null)
    close(model.decode(noise, labels, solver=solver), expected["sample_guided"])


def test_dropped_labels() -> None:
    _, expected, model, _ = case("cond")
    labels = expected["y_first_dropped"]
    labels = labels.where(labels >= 0, torch.tensor(model.null_label))
    z, log_abs_det = model.encode(expected["x"], labels)
    close(z, expected["z_first_dropped"])
    close(log_abs_det / model.dims, expected["mean_logdet_first_dropped"])


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("tarflow-imagenet64-2-768-8-8-uniform", 460_142_784),
        ("tarflow-imagenet64-2-768-8-8-0.05-unconditional", 460_142_784),
        ("tarflow-imagenet64-2-768-8-8-0.05", 466_286_784),
        ("tarflow-imagenet64-2-1024-8-8-0.05", 823_042_240),
        ("tarflow-imagenet64-4-1024-8-8-0.05", 817_636_096),
        ("tarflow-imagenet128-4-1024-8-8-0.15", 823_927_552),
        ("tarflow-afhq256-8-768-8-8-0.07", 463_481_856),
        ("tarflow-mnist-4-128-4-4-0.10", 3_227_776),
    ],
)
def test_published_parameter_counts(preset: str, count: int) -> None:
    with torch.device("meta"):
        assert registry.build(preset).num_parameters == count


@pytest.mark.parametrize(("classes", "count"), [(10, 28_896_912), (100, 29_035_152)])
def test_cifar_parameter_counts(classes: int, count: int) -> None:
    config = TarFlowConfig((3, 32, 32), 2, 256, 6, 6, num_classes=classes)
    with torch.device("meta"):
        assert TarFlow(config).num_parameters == count


@torch.no_grad()
def test_initialisation() -> None:
    torch.manual_seed(0)
    config = TarFlowConfig((3, 32, 32), 4, 256, 2, 1, num_classes=10)
    model = TarFlow(config)
    for block in model.blocks:
        assert float(block.output.weight.detach().abs().max()) == 0
        bias = block.output.bias.abs()
        assert 0.5 / 16 < float(bias.max()) <= 1 / 16, "uniform on +- 1 / sqrt(width)"
        assert abs(float(block.position.std()) - 0.01) < 1e-3
        assert abs(float(block.class_embedding.std()) - 0.01) < 1e-3
    x = torch.rand(2, 3, 32, 32)
    z, _ = model.encode(x)
    assert torch.equal(z[:, -1], model.patchify(x)[:, -1]) is False
    block = model.blocks[0]
    first = block(model.patchify(x))[0]
    assert torch.equal(first[:, 0], model.patchify(x)[:, 0]), "token 0 passes unchanged"


def test_patches_are_channel_major() -> None:
    model = TarFlow(TarFlowConfig((2, 4, 6), 2, 64, 1, 1))
    x = torch.arange(2 * 4 * 6, dtype=torch.float32).view(1, 2, 4, 6)
    tokens = model.patchify(x)
    assert tokens.shape == (1, 6, 8)
    for c in range(2):
        for dy in range(2):
            for dx in range(2):
                assert tokens[0, 4, c * 4 + dy * 2 + dx] == x[0, c, 2 + dy, 2 + dx]
