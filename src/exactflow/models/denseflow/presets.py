"""DenseFlow presets: the published models with their effective training recipes, and small ones.

The published program multiplies the learning rate by a gamma every epoch, but its warm-up rewrites
the rate at every iteration, so that each decay lasts one iteration. What it did, and what stands
here, is the *effective* recipe: warm-up over 5000 steps, constant 1e-3, then 2e-5 for the epochs
of fine-tuning. The last weights are scored, none are chosen.

ImageNet is that of image-net.org, downsampled with anti-aliasing (50,000 validation images): bits
per dimension on it do not compare with those of the 2016 set of PixelRNN, which other flows use.
"""

from typing import Any

from exactflow.core.model import Preset
from exactflow.models.denseflow.model import DenseFlowConfig

_PAPER = "arXiv 2106.04627"
_TRANSLATION = 0.04  # of the image's side, largest


def _published(
    size: int,
    batch_size: int,
    epochs: float,
    fine_tuning: float,
    published: str,
    translated: bool = True,
    **data: Any,
) -> Preset:
    """DenseFlow-74-10: 74 = 6 * 5 + 4 * 6 + 1 * 20 coupling modules; flipped, perhaps moved."""
    augmentation = {"translate": _TRANSLATION * size, "padding": "edge"} if translated else {}
    return Preset(
        DenseFlowConfig((3, size, size), initial_images=batch_size),
        training={
            "epochs": epochs + fine_tuning,
            "fine_tuning_epochs": fine_tuning,
            "batch_size": batch_size,
            "optimizer": "adamax",
            "betas": (0.9, 0.999),
            "weight_decay": 0.0,
            "clip_norm": None,
            "learning_rate": 1e-3,
            "min_learning_rate": 2e-5,
            "decay": "exponential",
            "decay_factor": 1.0,
            "warmup_steps": 5000,
            "activation_checkpointing": True,
        },
        data={"image_size": size, "channels": 3, "flip": True, **augmentation, **data},
        published=f"{published}, {_PAPER}",
    )


_SMALL = {
    "epochs": 20.0,
    "batch_size": 64,
    "warmup_steps": 200,
    "optimizer": "adamax",
    "learning_rate": 5e-3,
    "weight_decay": 0.0,
}
_SMALL_DEQUANTIZER: dict[str, Any] = {
    "dequantizer_steps": 2,
    "dequantizer_width": 24,
    "dequantizer_depth": 2,
    "dequantizer_growth": 16,
    "context_growth": 16,
}
PRESETS: dict[str, Preset] = {
    # Small ones of our own, for a CPU.
    "denseflow-tiny": Preset(
        DenseFlowConfig(
            (3, 8, 8),
            units=(2, 1),
            modules=(2, 2),
            widths=(16, 16),
            growth=2,
            dense_depth=2,
            dense_growth=16,
            dequantizer_steps=2,
            dequantizer_width=16,
            dequantizer_depth=2,
            dequantizer_growth=16,
            context_growth=8,
            initial_images=32,
        ),
        training={
            "steps": 100,
            "warmup_steps": 10,
            "learning_rate": 2e-3,
            "batch_size": 64,
            "weight_decay": 0.0,
        },
        data={"source": "digits"},
    ),
    "denseflow-digits": Preset(
        DenseFlowConfig(
            (1, 8, 8),
            units=(2, 2),
            modules=(3, 3),
            widths=(24, 24),
            growth=4,
            dense_depth=3,
            dense_growth=16,
            dequantizer_steps=2,
            dequantizer_width=16,
            dequantizer_depth=2,
            dequantizer_growth=16,
            context_growth=8,
            levels=17,
        ),
        training={
            "steps": 600,
            "warmup_steps": 60,
            "learning_rate": 3e-3,
            "batch_size": 64,
            "weight_decay": 0.0,
        },
        data={"source": "digits"},
    ),
    # About a million parameters, as the other families have them, for comparisons on a CPU.
    "denseflow-fashion-mnist-1m": Preset(
        DenseFlowConfig(
            (1, 28, 28),
            units=(2, 2),
            modules=(3, 4),
            widths=(32, 48),
            growth=8,
            dense_depth=2,
            dense_growth=32,
            landmarks=7,
            **_SMALL_DEQUANTIZER,
        ),
        training={**_SMALL, "betas": (0.9, 0.999)},
        data={"source": "fashion-mnist"},
    ),
    "denseflow-cifar10-1m": Preset(
        DenseFlowConfig(
            (3, 32, 32),
            units=(3, 2, 1),
            modules=(3, 3, 6),
            widths=(32, 32, 32),
            growth=6,
            dense_depth=2,
            dense_growth=24,
            **_SMALL_DEQUANTIZER,
        ),
        training={**_SMALL, "betas": (0.9, 0.999)},
        data={"source": "hub:uoft-cs/cifar10", "flip": True},
    ),
    # The paper's.
    "denseflow-74-10-cifar10": _published(
        32,
        64,
        400.0,
        20.0,
        "2.98 bits/dim (IWBO, k = 1000), CIFAR-10",
        source="hub:uoft-cs/cifar10",
    ),
    "denseflow-74-10-imagenet32": _published(
        32, 64, 20.0, 2.0, "3.63 bits/dim (IWBO, k = 200), ImageNet 32x32 of image-net.org"
    ),
    "denseflow-74-10-imagenet64": _published(
        64, 32, 10.0, 1.0, "3.35 bits/dim (IWBO, k = 200), ImageNet 64x64 of image-net.org"
    ),
    "denseflow-74-10-celeba64": _published(
        64,
        32,
        50.0,
        5.0,
        "1.99 bits/dim (IWBO, k = 200), CelebA cut to 148x148 at (40, 15), then 64x64",
        translated=False,
    ),
}
