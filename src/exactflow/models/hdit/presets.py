"""HDiT presets: names, levels, the training recipe, and what is known of the result.

The paper prints a mapping width of 768 for all models; only the ablation's parameters agree with
it, those of all others with 256. Published models were augmented with some probability, where the
comment says so; here images are at most mirrored, and the augmentation input stays 0.
"""

from typing import Any

from exactflow.core.model import Preset
from exactflow.models.hdit.model import HDiTConfig
from exactflow.models.hdit.network import AttentionKind

_PAPER = "arXiv 2401.11605"
_DEMO = "demonstration of github.com/crowsonkb/k-diffusion, without a number"


def _config(
    image_size: int,
    patch_size: int,
    depths: tuple[int, ...],
    widths: tuple[int, ...],
    num_classes: int = 0,
    global_levels: int = 1,
    dropout: tuple[float, ...] | None = None,
    mapping: tuple[int, int] = (2, 256),  # depth, width
    outer: AttentionKind = "neighborhood",
) -> HDiTConfig:
    """RGB images; attention is global at the innermost levels only."""
    local = len(depths) - global_levels
    return HDiTConfig(
        image_shape=(3, image_size, image_size),
        patch_size=patch_size,
        depths=depths,
        widths=widths,
        attention=(outer,) * local + ("global",) * global_levels,
        dropout=dropout,
        num_classes=num_classes,
        mapping_depth=mapping[0],
        mapping_width=mapping[1],
    )


def _recipe(steps: int, batch_size: int, weight_decay: float, ema_power: float) -> dict[str, Any]:
    """AdamW at a constant rate; decay on matrices, the mapping network at a third of the rate."""
    return {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": 5e-4,
        "min_learning_rate": 5e-4,
        "warmup_steps": 0,
        "betas": (0.9, 0.95),
        "weight_decay": weight_decay,
        "clip_norm": 1.0,
        "ema_decay": 0.9999,
        "ema_warmup": "power",
        "ema_power": ema_power,
        "precision": "bfloat16",
    }


def _published(config: HDiTConfig, steps: int, published: str) -> Preset:
    """A model of the paper: batch 256, weight decay 1e-2, EMA of power 3/4."""
    data = {"image_size": config.image_shape[1], "channels": 3}
    return Preset(config, _recipe(steps, 256, 1e-2, 0.75), data, f"{published}, {_PAPER}")


def _demo(config: HDiTConfig, weight_decay: float, ema_power: float, **data: Any) -> Preset:
    """A demonstration, without a given length or batch size."""
    recipe = _recipe(100_000, 64, weight_decay, ema_power)
    return Preset(config, recipe, {"image_size": config.image_shape[1], **data}, _DEMO)


def _small(steps: int, learning_rate: float, ema_decay: float) -> dict[str, Any]:
    """A short run on a CPU."""
    return {
        "steps": steps,
        "warmup_steps": min(100, steps // 10),
        "learning_rate": learning_rate,
        "weight_decay": 1e-2,
        "ema_decay": ema_decay,
    }


_LARGE = (2, 2, 16), (384, 768, 1536)
_FLOWERS = (2, 2, 4), (128, 256, 512)

PRESETS: dict[str, Preset] = {
    # Small ones of our own, for a CPU.
    "hdit-tiny": Preset(
        HDiTConfig(
            (3, 8, 8),
            1,
            (1, 1),
            (16, 32),
            ("neighborhood", "global"),
            head_dim=8,
            kernel_size=3,
            mapping_depth=1,
            mapping_width=32,
            low_resolution=8,
        ),
        training={**_small(100, 2e-3, 0.9), "batch_size": 64},
        data={"source": "digits"},
    ),
    "hdit-digits": Preset(
        HDiTConfig(
            (1, 8, 8),
            1,
            (1, 2),
            (32, 64),
            ("neighborhood", "global"),
            head_dim=16,
            kernel_size=3,
            mapping_depth=1,
            mapping_width=64,
            num_classes=10,
            low_resolution=8,
            levels=17,
        ),
        training={**_small(1500, 2e-3, 0.99), "batch_size": 64},
        data={"source": "digits"},
    ),
    "hdit-fashion-mnist": Preset(
        HDiTConfig(
            (1, 28, 28),
            2,
            (2, 2),
            (64, 128),
            ("neighborhood", "global"),
            head_dim=32,
            mapping_depth=1,
            mapping_width=128,
            low_resolution=28,
        ),
        training={**_small(4000, 1e-3, 0.999), "batch_size": 64},
        data={"source": "fashion-mnist"},
    ),
    "hdit-cifar10": Preset(
        HDiTConfig(
            (3, 32, 32),
            2,
            (2, 2),
            (64, 128),
            ("neighborhood", "global"),
            head_dim=32,
            mapping_depth=1,
            mapping_width=128,
        ),
        training={**_small(8000, 1e-3, 0.999), "batch_size": 64},
        data={"source": "hub:uoft-cs/cifar10", "flip": True},
    ),
    # The paper's.
    "hdit-imagenet128-ablation": _published(
        _config(128, 4, (2, 11), (384, 768), 1000, mapping=(1, 768)),
        400_000,
        "FID 27.74 unguided (GEGLU, RoPE and soft-min-SNR)",
    ),
    "hdit-ffhq1024": _published(  # augmented with probability 0.12
        _config(
            1024,
            4,
            (2,) * 5,
            (128, 256, 384, 768, 1024),
            global_levels=2,
            dropout=(0.0, 0.0, 0.0, 0.0, 0.1),
        ),
        1_000_000,
        "FID 5.23 of 50 000 samples, noise levels 640 .. 0.01",
    ),
    "hdit-imagenet256": _published(  # then 50 K steps at 512, 100 K at 1024, 50 K at 2048 pixels
        _config(256, 4, *_LARGE, 1000), 2_000_000, "FID 6.92, guided 3.21 at w of about 1.3"
    ),
    "hdit-imagenet256-unconditional": _published(_config(256, 4, *_LARGE), 2_000_000, "size only"),
    "hdit-imagenet256-4-small": _published(
        _config(256, 4, (2, 2, 8), (256, 512, 1024), 1000), 400_000, "size only (scaling sweep)"
    ),
    "hdit-imagenet256-4-medium": _published(
        _config(256, 4, (2, 2, 12), (320, 640, 1280), 1000), 400_000, "size only (scaling sweep)"
    ),
    "hdit-imagenet256-8-large": _published(  # this learning rate was too high for large models
        _config(256, 8, (2, 16), (768, 1536), 1000), 400_000, "size only (scaling sweep)"
    ),
    "hdit-imagenet256-16-large": _published(
        _config(256, 16, (16,), (1536,), 1000), 400_000, "size only (scaling sweep)"
    ),
    # Demonstrations; length and batch size are ours.
    "hdit-flowers256": _demo(
        _config(256, 4, *_FLOWERS, dropout=(0.1,) * 3),
        1e-3,
        0.75,
        source="hub:nelorth/oxford-flowers",
        channels=3,
    ),
    "hdit-flowers256-shifted-window": _demo(
        _config(256, 4, *_FLOWERS, dropout=(0.1,) * 3, outer="shifted-window"),
        1e-3,
        0.75,
        source="hub:nelorth/oxford-flowers",
        channels=3,
    ),
    "hdit-cifar10-21m": _demo(  # augmented with probability 0.12
        _config(32, 2, (2, 4), (256, 512), 10, dropout=(0.05, 0.05)),
        1e-4,
        2 / 3,
        source="hub:uoft-cs/cifar10",
        channels=3,
    ),
    "hdit-mnist-9m": _demo(  # augmented with probability 0.12
        HDiTConfig(
            (1, 28, 28),
            4,
            (8,),
            (256,),
            ("global",),
            dropout=(0.05,),
            num_classes=10,
            sigma_data=0.6162,
        ),
        1e-4,
        2 / 3,
        source="hub:ylecun/mnist",
        channels=1,
    ),
}
