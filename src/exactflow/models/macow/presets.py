"""MaCow presets: names, few fields, the training recipe, and what is known of the result.

Published runs use Adam (here AdamW without weight decay), clip and average nothing, and multiply
the learning rate by 0.999997 at every step after the warm-up. They stop at a rate of 1e-5, 1.535
million steps after it, or at the last of so many epochs: those on CIFAR-10, whose 10,000 epochs
end at a rate of 5.4e-5, are the only ones where the epochs end first. Variational runs on LSUN and
CelebA average ln q over 3 and 2 draws for each image; here every step has one draw. Steps with a
gradient that is not finite were skipped; here they are an error.

The published checkpoints were selected on the test set; ours are not.
"""

import math
from collections.abc import Mapping
from typing import Any

from exactflow.core.model import Preset
from exactflow.models.macow.model import MaCowConfig
from exactflow.models.macow.parts import Steps

_PAPER = "arXiv 1902.04208"
_OLD = 'validation images of the 2016 "small" set'
_NO_NUMBER = f"{_PAPER}, no number confirmed for LSUN; checkpoint selected on the test set"
_PEAK, _LOWEST, _FACTOR = 1e-3, 1e-5, 0.999997
_WARMUP = 500
_TO_THE_END: Mapping[str, Any] = {  # until the rate has fallen to the lowest
    "steps": _WARMUP + math.ceil(math.log(_LOWEST / _PEAK) / math.log(_FACTOR)),
    "warmup_steps": _WARMUP,
}
_CIFAR: Steps = ((4,), (12, 12), (12, 12), (12,))
_MIDDLE: Steps = ((4,), (16, 16), (16, 16), (12, 12), (12,))
_LSUN: Steps = ((4,), (32, 32), (32, 32), (16, 16), (12, 12), (6,))
_CELEBA: Steps = ((4,), (24, 24), (16, 16), (16, 16), (8, 8), (4, 4), (2,))


def _config(
    size: int, steps: Steps, width: int, bits: int, images: int, variational: bool, **fields: Any
) -> MaCowConfig:
    """A configuration of the paper; the coarsest level always has 512 hidden channels."""
    hidden = (24, *[width] * (len(steps) - 2), 512)
    if size > 32:
        fields |= {
            "kernel": (2, 5),
            "dequantizer_steps": ((6,), (6,), (4,)) if bits == 8 else ((2,), (4,), (4,)),
            "dequantizer_hidden": (24, 256, 256),
        }
    kind = "variational" if variational else "uniform"
    return MaCowConfig(
        (3, size, size),
        steps,
        hidden,
        dequantization=kind,
        levels=2**bits,
        initial_images=images,
        **fields,
    )


def _published(
    config: MaCowConfig,
    published: str,
    run: Mapping[str, Any],
    batch_size: int = 512,
    accumulate: int = 1,
    data: Mapping[str, Any] | None = None,
) -> Preset:
    """A run of the paper. `run`: its length and its warm-up."""
    return Preset(
        config,
        training={
            "batch_size": batch_size,
            "accumulate": accumulate,
            "learning_rate": _PEAK,
            "decay": "exponential",
            "decay_factor": _FACTOR,
            "min_learning_rate": _LOWEST,
            "betas": (0.9, 0.999),
            "weight_decay": 0.0,
            "clip_norm": None,
            **run,
        },
        data={
            "image_size": config.image_shape[1],
            "channels": 3,
            "bits": round(math.log2(config.levels)),
            **(data or {}),
        },
        published=published,
    )


def _told(score: str, data: str, variational: bool) -> str:
    """What the paper says of a model, the kind of the number, and how the model was picked."""
    kind = "variational dequantisation, ELBO or IWBO of unresolved k"
    if not variational:
        kind = "uniform dequantisation"
    return f"{score} on {data} ({kind}), {_PAPER}; checkpoint selected on the test set"


def _both(name: str, uniform: Preset, variational: Preset) -> dict[str, Preset]:
    return {f"macow-{name}-uniform": uniform, f"macow-{name}-variational": variational}


def _cifar10(variational: bool, score: str) -> Preset:
    return _published(
        _config(32, _CIFAR, 512, 8, 2048, variational),
        _told(score, "CIFAR-10 test", variational),
        {"epochs": 10_000.0, "warmup_steps": 50},
        data={
            "source": "hub:uoft-cs/cifar10",
            "flip": True,
            "translate": 4.5,
            "padding": "reflect",
        },
    )


def _imagenet64(variational: bool, score: str) -> Preset:
    config = _config(64, _MIDDLE, 512, 8, 1024, variational)
    return _published(config, _told(score, f"ImageNet 64x64, {_OLD}", variational), _TO_THE_END)


def _lsun64(variational: bool) -> Preset:
    config = _config(64, _MIDDLE, 512, 5, 512, variational)
    return _published(config, _NO_NUMBER, _TO_THE_END, 160, 16)


def _lsun128(variational: bool) -> Preset:
    shifts = {"additive": True, "additive_prior": True}
    config = _config(128, _LSUN, 256, 5, 512, variational, **shifts)
    return _published(config, _NO_NUMBER, _TO_THE_END, 160, 16)


def _celeba256(variational: bool, score: str) -> Preset:
    config = _config(256, _CELEBA, 256, 5, 32, variational, additive=True)
    told = _told(score, "CelebA-HQ 256x256, 5 bits", variational)
    return _published(config, told, _TO_THE_END, 40, 10)


# Of all our own: scales of 0.5 at least, so that no step of the inverse grows more than twofold.
# Unbounded, briefly trained ones overflowed at latents that no image has (302 of 512 samples).
_BOUNDED: dict[str, Any] = {"soft_clip": 2.0}
_SMALL = {
    "epochs": 20.0,
    "batch_size": 64,
    "warmup_steps": 200,
    "learning_rate": 2e-3,
    "weight_decay": 0.0,
    "clip_norm": 10.0,
    "ema_decay": 0.998,
}
PRESETS: dict[str, Preset] = {
    # Small ones of our own, for a CPU.
    "macow-tiny": Preset(
        MaCowConfig((3, 8, 8), ((1,), (1, 1), (1,)), (16, 16, 16), initial_images=64, **_BOUNDED),
        training={"steps": 100, "warmup_steps": 10, "learning_rate": 2e-3, "batch_size": 64},
        data={"source": "digits"},
    ),
    "macow-digits": Preset(
        MaCowConfig((1, 8, 8), ((2,), (2, 2), (2,)), (32, 48, 48), levels=17, **_BOUNDED),
        training={
            "steps": 1000,
            "warmup_steps": 50,
            "learning_rate": 2e-3,
            "weight_decay": 0.0,
            "ema_decay": 0.998,
        },
        data={"source": "digits"},
    ),
    # About a million parameters, as the other families have them, for comparisons on a CPU.
    "macow-fashion-mnist-1m": Preset(
        MaCowConfig((1, 28, 28), ((1,), (2, 2), (6,)), (32, 64, 320), **_BOUNDED),
        training={**_SMALL, "betas": (0.9, 0.999)},
        data={"source": "fashion-mnist"},
    ),
    "macow-cifar10-1m": Preset(
        MaCowConfig((3, 32, 32), ((1,), (2, 2), (3,)), (24, 64, 208), **_BOUNDED),
        training={**_SMALL, "betas": (0.9, 0.999)},
        data={"source": "hub:uoft-cs/cifar10", "flip": True},
    ),
    # The paper's.
    **_both(
        "cifar10",
        _cifar10(False, "3.28 bits/dim (unverified)"),
        _cifar10(True, "3.16 bits/dim"),
    ),
    **_both("imagenet64", _imagenet64(False, "3.75 bits/dim"), _imagenet64(True, "3.69 bits/dim")),
    **_both("lsun64", _lsun64(False), _lsun64(True)),
    **_both("lsun128", _lsun128(False), _lsun128(True)),
    **_both("celeba256", _celeba256(False, "0.95 bits/dim"), _celeba256(True, "0.67 bits/dim")),
}
