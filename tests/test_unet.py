"""The U-Nets: published counts and key sets, outputs of the originals, and laws of the network."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from exactflow.models.diffusion.classifier import ClassifierConfig, ClassifierUNet
from exactflow.models.diffusion.openai import classifier_of, to_published, unet_of
from exactflow.nn.unet import UNet, UNetConfig
from exactflow.nn.unet_parts import sinusoidal_embedding
from flows import count
from originals import close, recorded

CASES = ["iddpm_uncond", "iddpm_cond", "adm_uncond", "adm_cond_new_attention_order"]
IN64 = UNetConfig(out_channels=6)
IN256 = dataclasses.replace(
    IN64, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, attention_factors=(16, 32)
)
ADM64 = UNetConfig(
    out_channels=6,
    model_channels=192,
    attention_factors=(2, 4, 8),
    num_heads=None,
    head_channels=64,
    attention_order="new",
    resample="resblock",
    dropout=0.1,
    num_classes=1000,
)
ADM256 = dataclasses.replace(
    ADM64,
    model_channels=256,
    num_res_blocks=2,
    channel_mult=(1, 1, 2, 2, 4, 4),
    attention_factors=(8, 16, 32),
    attention_order="legacy",
)
FLOW64 = dataclasses.replace(ADM64, out_channels=3, num_classes=0)
FLOW32 = dataclasses.replace(
    FLOW64, model_channels=256, channel_mult=(1, 2, 2, 2), attention_factors=(2, 4)
)
TINY = UNetConfig(
    model_channels=64,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_factors=(2,),
    num_heads=2,
    num_classes=3,
)
TINY_CLASSIFIER = ClassifierConfig(8, 5, 1, 64, (1, 1), 1, (2,), 32)

# name: (configuration, changes, parameters, keys of the state dict where they are published)
PUBLISHED: dict[str, tuple[UNetConfig, dict[str, Any], int, int | None]] = {
    "iddpm-imagenet64": (IN64, {}, 121_063_942, 450),
    "iddpm-imagenet64-fixed-sigma": (IN64, {"out_channels": 3}, 121_060_483, None),
    "iddpm-cifar10": (
        IN64,
        {"channel_mult": (1, 2, 2, 2), "attention_factors": (2, 4), "dropout": 0.3},
        52_546_438,
        446,
    ),
    "iddpm-imagenet64-cond": (
        IN64,
        {"model_channels": 192, "num_classes": 1000},
        273_049_350,
        451,
    ),
    "iddpm-upsampler-256": (
        IN256,
        {"in_channels": 6, "model_channels": 192, "num_classes": 1000},
        279_792_390,
        457,
    ),
    "iddpm-lsun-bedroom": (
        IN256,
        {"num_heads": 1, "attention_factors": (16,), "scale_shift": False},
        113_676_678,
        426,
    ),
    "adm-64": (ADM64, {}, 295_904_454, 541),
    "adm-128": (
        ADM256,
        {
            "channel_mult": (1, 1, 2, 3, 4),
            "attention_factors": (4, 8, 16),
            "num_heads": 4,
            "head_channels": None,
        },
        421_529_606,
        493,
    ),
    "adm-256": (ADM256, {}, 553_838_086, 567),
    "adm-256-uncond": (ADM256, {"num_classes": 0}, 552_814_086, 566),
    "adm-512": (
        ADM256,
        {"channel_mult": (0.5, 1, 1, 2, 2, 4, 4), "attention_factors": (16, 32, 64)},
        558_997_638,
        645,
    ),
    "adm-lsun": (ADM256, {"num_classes": 0, "dropout": 0.1}, 552_814_086, 566),
    "adm-upsampler-256": (
        ADM256,
        {"in_channels": 6, "model_channels": 192, "num_heads": 4, "head_channels": None},
        311_795_910,
        None,
    ),
    "adm-upsampler-512": (
        ADM256,
        {"in_channels": 6, "model_channels": 192, "attention_factors": (16, 32)},
        308_835_270,
        None,
    ),
    "flow-cifar10": (
        FLOW32,
        {"num_res_blocks": 2, "attention_factors": (2,)},
        171_268_099,
        None,
    ),
    "flow-cifar10-conv": (
        FLOW32,
        {"num_res_blocks": 2, "attention_factors": (2,), "resample": "conv"},
        153_094_915,
        None,
    ),
    "flow-imagenet32": (FLOW32, {}, 228_149_507, None),
    "flow-imagenet32-conv": (FLOW32, {"resample": "conv"}, 209_976_323, None),
    "flow-imagenet64": (FLOW64, {}, 295_131_267, None),
    "flow-imagenet64-conv": (FLOW64, {"resample": "conv"}, 276_421_059, None),
    "flow-imagenet128": (
        FLOW32,
        {"channel_mult": (1, 1, 2, 3, 4), "attention_factors": (4, 8, 16)},
        542_804_483,
        None,
    ),
    "flow-imagenet128-conv": (
        FLOW32,
        {
            "channel_mult": (1, 1, 2, 3, 4),
            "attention_factors": (4, 8, 16),
            "resample": "conv",
        },
        507_319_043,
        None,
    ),
    "meta-cifar10": (
        IN64,
        {
            "out_channels": 3,
            "channel_mult": (2, 2, 2),
            "num_res_blocks": 4,
            "attention_factors": (2,),
            "num_heads": 1,
            "attention_order": "new",
            "resample": "plain",
            "dropout": 0.3,
        },
        55_676_419,
        None,
    ),
    "meta-imagenet-cond": (FLOW64, {"num_classes": 1001}, 295_900_035, None),
    "torchcfm-cifar10": (
        IN64,
        {
            "out_channels": 3,
            "channel_mult": (1, 2, 2, 2),
            "num_res_blocks": 2,
            "attention_factors": (2,),
            "scale_shift": False,
        },
        35_746_307,
        None,
    ),
}
CLASSIFIERS = [  # image size, channel multiples, blocks, attention factors, parameters, keys
    (64, (1, 2, 3, 4), 4, (2, 4, 8), 65_438_568, 307),
    (128, (1, 1, 2, 3, 4), 2, (4, 8, 16), 42_568_040, 221),
    (256, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32), 54_096_360, 249),
    (512, (0.5, 1, 1, 2, 2, 4, 4), 2, (16, 32, 64), 54_448_360, 281),
]


def on_meta(build: Callable[[Any], nn.Module], config: UNetConfig | ClassifierConfig) -> nn.Module:
    with torch.device("meta"):
        return build(config)


def hints(config: UNetConfig) -> dict[str, Any]:
    """The parts of the configuration that a state dict does not contain."""
    names = ("num_heads", "head_channels", "attention_order", "dropout")
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts_and_the_way_back(name: str) -> None:
    base, changes, parameters, keys = PUBLISHED[name]
    config = dataclasses.replace(base, **changes)
    network = on_meta(UNet, config)
    assert isinstance(network, UNet)
    assert count(network) == parameters
    state = to_published(network)
    assert keys is None or len(state) == keys
    assert unet_of(state, **hints(config)).config == config


@pytest.mark.parametrize(
    ("size", "mult", "blocks", "factors", "parameters", "keys"), CLASSIFIERS, ids=lambda x: str(x)
)
def test_published_classifiers(
    size: int,
    mult: tuple[float, ...],
    blocks: int,
    factors: tuple[int, ...],
    parameters: int,
    keys: int,
) -> None:
    config = ClassifierConfig(
        size, channel_mult=mult, num_res_blocks=blocks, attention_factors=factors
    )
    network = on_meta(ClassifierUNet, config)
    assert isinstance(network, ClassifierUNet)
    assert count(network) == parameters
    state = to_published(network)
    assert len(state) == keys
    assert classifier_of(state, head_channels=64).config == config


def published_unet(settings: dict[str, Any], state: dict[str, torch.Tensor]) -> UNet:
    head_channels = settings.get("num_head_channels")
    return unet_of(
        state,
        num_heads=None if head_channels else settings["num_heads"],
        head_channels=head_channels,
        attention_order="new" if settings.get("use_new_attention_order") else "legacy",
        dropout=0.0,
    )


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_outputs_of_the_originals(name: str) -> None:
    settings, state, expected = recorded("openai", name)
    network = published_unet(settings, state)
    assert count(network) == settings["parameters"]
    close(network(expected["x"], expected["t"], expected.get("y")), expected["out"])


@pytest.mark.parametrize("name", CASES)
def test_the_architecture_is_read_off_the_weights(name: str) -> None:
    settings, state, _ = recorded("openai", name)
    network = published_unet(settings, state)
    config, size = network.config, settings["image_size"]
    assert config.model_channels == settings["model_channels"]
    assert list(config.channel_mult) == settings["channel_mult"]
    assert config.num_res_blocks == settings["num_res_blocks"]
    assert {size // f for f in config.attention_factors} == set(settings["attention_resolutions"])
    assert config.scale_shift
    assert config.resample == ("resblock" if settings.get("resblock_updown") else "conv")
    assert config.num_classes == (settings["num_classes"] or 0)
    assert (config.in_channels, config.out_channels) == (3, 6)
    back = to_published(network)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@torch.no_grad()
def test_logits_of_the_original_classifier() -> None:
    settings, state, expected = recorded("openai", "adm_classifier")
    network = classifier_of(state, head_channels=settings["num_head_channels"])
    config = network.config
    assert config.image_size == settings["image_size"]
    assert config.num_classes == settings["num_classes"]
    assert config.num_res_blocks == settings["num_res_blocks"]
    assert list(config.channel_mult) == settings["channel_mult"]
    assert network.training is False
    close(network(expected["x"], expected["t"]), expected["logits"])
    back = to_published(network)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_foreign_states_are_refused() -> None:
    state = to_published(UNet(TINY))
    with pytest.raises(ValueError, match="of a classifier with attention pooling"):
        classifier_of(state, head_channels=32)
    with pytest.raises(ValueError, match="without 'time_embed"):
        unet_of({"conv.weight": torch.zeros(3)}, **hints(TINY))
    with pytest.raises(ValueError, match="expected 'more' of shape None"):
        unet_of({**state, "more": torch.zeros(1)}, **hints(TINY))
    short = {key: value for key, value in state.items() if key != "middle_block.1.norm.bias"}
    with pytest.raises(ValueError, match=r"'middle_block.1.norm.bias' of shape \(128,\).*None"):
        unet_of(short, **hints(TINY))
    wrong = {**state, "out.0.bias": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"'out.0.bias' of shape \(64,\).*got \(7,\)"):
        unet_of(wrong, **hints(TINY))
    with pytest.raises(ValueError, match=r"expected the state dict of a U-Net.*output_blocks"):
        unet_of(to_published(ClassifierUNet(TINY_CLASSIFIER)), **hints(TINY))


def randomized(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights that all have an effect; initially residual branches are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 4
            parameter.add_(noise.to(parameter.dtype) / fan_in**0.5)
    return network


def inputs(
    config: UNetConfig, batch: int = 2, height: int = 8, width: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.in_channels, height, width, generator=generator)
    t = torch.linspace(0.3, 700.0, batch)
    return x, t, torch.arange(batch) % config.num_classes if config.num_classes else None


@pytest.mark.parametrize("resample", ["conv", "resblock", "plain"])
@pytest.mark.parametrize("scale_shift", [True, False])
def test_gradients_reach_every_parameter(resample: str, scale_shift: bool) -> None:
    config = dataclasses.replace(TINY, resample=resample, scale_shift=scale_shift)
    network = randomized(UNet(config))
    network(*inputs(config, batch=3)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_gradients_reach_every_parameter_of_the_classifier() -> None:
    network = randomized(ClassifierUNet(TINY_CLASSIFIER))
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    network(x, torch.tensor([3.0, 500.0])).log_softmax(1)[:, 0].sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters()} | {"x": x.grad}
    assert [n for n, g in gradients.items() if g is None or g.abs().max() == 0] == []


def test_output_is_zero_at_initialisation() -> None:
    assert UNet(TINY)(*inputs(TINY)).abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("resample", ["conv", "resblock", "plain"])
def test_types_agree_and_the_result_has_the_images_type(resample: str) -> None:
    config = dataclasses.replace(TINY, resample=resample, in_channels=1, out_channels=1)
    network = randomized(UNet(config)).eval()
    x, t, label = inputs(config)
    exact = network.double()(x.double(), t.double(), label)
    assert exact.dtype == torch.float64
    close(network.float()(x, t, label).double(), exact)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(x, t, label)
    half = network.bfloat16()(x, t, label)
    assert mixed.dtype == half.dtype == torch.float32
    close(mixed.double(), exact, 0.05)
    close(half.double(), exact, 0.05)


@torch.no_grad()
def test_an_image_does_not_see_its_batch() -> None:
    network = randomized(UNet(TINY)).eval()
    x, t, label = inputs(TINY, batch=3, height=4, width=12)
    assert label is not None
    whole = network(x, t, label)
    for i in range(3):
        close(network(x[i : i + 1], t[i : i + 1], label[i : i + 1]), whole[i : i + 1])


@torch.no_grad()
def test_time_and_label_are_seen() -> None:
    network = randomized(UNet(TINY)).eval()
    x, t, label = inputs(TINY)
    assert label is not None
    expected = network(x, t, label)
    assert not torch.allclose(network(x, t + 1, label), expected)
    assert not torch.allclose(network(x, t, label + 1), expected)


def test_cosines_come_first_and_frequencies_fall_from_one() -> None:
    t = torch.tensor([0.0, 3.0], dtype=torch.float64)
    embedding = sinusoidal_embedding(t, 8)
    assert embedding[0].tolist() == [1.0] * 4 + [0.0] * 4
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    close(embedding[1], torch.cat([(3 * frequencies).cos(), (3 * frequencies).sin()]), 1e-12)


def test_images_that_cannot_be_halved_are_refused() -> None:
    network = UNet(dataclasses.replace(TINY, num_classes=0, channel_mult=(1, 1, 1)))
    with pytest.raises(ValueError, match=r"multiples of 4, got \(1, 3, 8, 6\)"):
        network(torch.zeros(1, 3, 8, 6), torch.zeros(1))
    with pytest.raises(ValueError, match=r"\(batch, 3, height, width\).*got \(1, 1, 8, 8\)"):
        network(torch.zeros(1, 1, 8, 8), torch.zeros(1))
    with pytest.raises(ValueError, match="label table"):
        network(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"expected labels 0 \.\. 2"):
        UNet(TINY)(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    with pytest.raises(ValueError, match="8 x 8 pixels"):
        ClassifierUNet(TINY_CLASSIFIER)(torch.zeros(1, 1, 4, 4), torch.zeros(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_channels": 48}, "multiples of 32"),
        ({"channel_mult": ()}, "at least one level"),
        ({"num_res_blocks": 0}, "positive sizes"),
        ({"num_classes": -1}, "positive sizes"),
        ({"attention_factors": (3,)}, r"among \[1, 2\], got \(3,\)"),
        ({"head_channels": 32}, "either num_heads or head_channels"),
        ({"num_heads": None}, "either num_heads or head_channels"),
        ({"num_heads": 3}, r"divide \[128\] channels, got num_heads=3"),
        ({"num_heads": 0}, "heads that divide"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\)"),
    ],
)
def test_configurations_that_cannot_be_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_classifiers_that_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="multiple of 2, got 5 and 7"):
        dataclasses.replace(TINY_CLASSIFIER, image_size=7)
