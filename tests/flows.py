"""Models that the laws are tested on: the registry's tiny presets, and the edge cases by name."""

from functools import cache

import torch
from torch import nn

from exactflow.core.model import Flow, GenerativeModel
from exactflow.core.transform import AutoregressiveTransform
from exactflow.models import registry
from exactflow.models.tarflow.model import TarFlow, TarFlowConfig

SMALL = {"width": 64, "blocks": 2, "layers_per_block": 1}
BOUNDED = {"scale": "softplus", "soft_clip": 4.0, "final_norm": True, "start_token": True}

CONFIGS: dict[str, TarFlowConfig] = {
    "rgb": TarFlowConfig((3, 4, 4), patch_size=2, **SMALL),
    "one channel, patch 1": TarFlowConfig((1, 3, 3), patch_size=1, **SMALL),
    "not square, odd": TarFlowConfig((1, 3, 6), patch_size=3, **SMALL),
    "one token": TarFlowConfig((2, 2, 2), patch_size=2, **SMALL),
    "two tokens": TarFlowConfig((1, 2, 4), patch_size=2, **SMALL),
    "conditional": TarFlowConfig((1, 4, 4), patch_size=2, num_classes=3, **SMALL),
    "volume preserving": TarFlowConfig((1, 4, 4), patch_size=2, volume_preserving=True, **SMALL),
    "softplus": TarFlowConfig((1, 4, 4), patch_size=2, scale="softplus", **SMALL),
    "starflow": TarFlowConfig(
        (1, 4, 4), patch_size=2, scale="softplus", soft_clip=4.0, final_norm=True, **SMALL
    ),
    "two heads, deep": TarFlowConfig((1, 4, 4), 2, width=128, blocks=3, layers_per_block=2),
    "start token": TarFlowConfig((1, 4, 4), patch_size=2, start_token=True, **SMALL),
    "triangular": TarFlowConfig(
        (1, 4, 4), patch_size=2, conditional=("affine", "triangular"), start_token=True, **SMALL
    ),
    "mixture": TarFlowConfig(
        (1, 4, 4), patch_size=2, conditional=("affine", "mixture"), **BOUNDED, **SMALL
    ),
    "mixture alone, one token": TarFlowConfig(
        (1, 2, 2), patch_size=2, conditional=("mixture",), components=2, **BOUNDED, **SMALL
    ),
    "mixture, triangular": TarFlowConfig(
        (3, 2, 4),
        patch_size=2,
        conditional=("affine", "mixture", "triangular"),
        components=3,
        num_classes=3,
        **BOUNDED,
        **SMALL,
    ),
    "mixing, channels": TarFlowConfig(
        (3, 2, 4),
        patch_size=2,
        conditional=("channels", "affine", "mixture"),
        mixing=True,
        num_classes=3,
        **BOUNDED,
        **SMALL,
    ),
    "spline": TarFlowConfig(
        (1, 4, 4), patch_size=2, conditional=("affine", "spline"), **BOUNDED, **SMALL
    ),
    "gaussian noise": TarFlowConfig((1, 4, 4), patch_size=2, noise_std=0.1, **SMALL),
}


TINY = [  # other families have laws of their own, and those of test_contract.py
    name
    for name in registry.names()
    if name.endswith("-tiny") and registry.family_of(name).model is TarFlow
]
NAMES = [*TINY, *CONFIGS]


@cache
def blueprint(preset: str) -> GenerativeModel:
    """The model of a preset without memory for its weights; building a large one takes seconds."""
    with torch.device("meta"):
        return registry.build(preset)


def count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def blocks(model: Flow) -> list[AutoregressiveTransform]:
    """The autoregressive stages in order."""
    return [stage for stage in model.stages if isinstance(stage, AutoregressiveTransform)]


def perturb(model: Flow, scale: float = 0.2, seed: int = 0) -> Flow:
    """Add noise to all weights, so that every part of the model has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            width = parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 5.0
            factor = 0.15 if "output.weight" in name else scale
            parameter.add_(noise.to(parameter) * factor / width)
    return model


def make(name: str, dtype: torch.dtype = torch.float64) -> Flow:
    """The model of that name with perturbed weights, in evaluation mode."""
    torch.manual_seed(0)
    model = registry.build(name) if name in TINY else TarFlow(CONFIGS[name])
    assert isinstance(model, Flow)
    return perturb(model).to(dtype).eval()


def some_images(model: Flow, count: int = 3, seed: int = 1) -> torch.Tensor:
    """Images in [-1, 1] of the model's shape and dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, *model.event_shape, generator=generator, dtype=torch.float64) * 2 - 1
    return x.to(model.dtype)


def some_grey_levels(model: Flow, count: int = 3, seed: int = 1) -> torch.Tensor:
    """Integer images of the model's shape."""
    generator = torch.Generator().manual_seed(seed)
    size = (count, *model.event_shape)
    return torch.randint(0, model.levels, size, generator=generator, dtype=torch.uint8)


def some_labels(model: Flow, count: int = 3) -> torch.Tensor | None:
    """A label for each image, the last one dropped; None for an unconditional model."""
    if not model.num_classes:
        return None
    labels = torch.arange(count) % model.num_classes
    labels[-1] = model.null_label
    return labels
