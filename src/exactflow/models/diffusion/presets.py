"""Presets of iDDPM and ADM: the published models with their training recipes, and small ones.

Recipes: Adam (no weight decay) at a constant rate, no clipping, an average of weights (0.9999)
from the initial ones on. ADM was trained in half precision with loss scaling; here it is bfloat16.

Which ImageNet: the unconditional 64-pixel models saw the 2016 download of PixelRNN; all conditional
models saw ILSVRC2012, halved by boxes, then bicubic, cut to the centre. Their pixels differ, so
that numbers on one do not compare with numbers on the other.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from exactflow.core.model import Preset
from exactflow.models.diffusion.model import DiscreteDiffusionConfig, Objective

_IDDPM = "arXiv 2102.09672"
_ADM = "arXiv 2105.05233"
_NO_DATA: Mapping[str, Any] = MappingProxyType({})
_SMALL = {"betas": (0.9, 0.99), "weight_decay": 0.0, "ema_decay": 0.999}  # for our own, below


def _recipe(steps: int, batch_size: int, learning_rate: float, **more: Any) -> dict[str, Any]:
    """How all published models were trained."""
    return {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "warmup_steps": 0,
        "decay": "exponential",
        "decay_factor": 1.0,
        "betas": (0.9, 0.999),
        "weight_decay": 0.0,
        "clip_norm": None,
        "ema_decay": 0.9999,
        "ema_warmup": "none",
        **more,
    }


def _iddpm(
    size: int,
    objective: Objective,
    recipe: dict[str, Any],
    published: str,
    *,
    data: Mapping[str, Any] = _NO_DATA,
    **fields: Any,
) -> Preset:
    """Attention at 16 and 8 pixels, 4 heads, 4000 cosine steps, unless `fields` say otherwise."""
    config = {
        "channel_mult": (1, 2, 2, 2) if size == 32 else (1, 2, 3, 4),
        "attention_factors": (size // 16, size // 8),
        "objective": objective,
        "timestep_law": "importance" if objective == "vlb" else "uniform",
        **fields,
    }
    return Preset(
        DiscreteDiffusionConfig((3, size, size), **config),
        training=recipe,
        data={"image_size": size, "channels": 3, **data},
        published=f"{published}, {_IDDPM}",
    )


_CIFAR = {"source": "hub:uoft-cs/cifar10"}
_RAW: dict[str, Any] = {"rescale_timesteps": False, "rescale_learned_sigmas": False}
_LINEAR: dict[str, Any] = {"diffusion_steps": 1000, "schedule": "linear"}
_WIDE = (1, 1, 2, 2, 4, 4)  # channels at 256 pixels

_IDDPM_PRESETS: dict[str, Preset] = {
    "iddpm-imagenet64-hybrid": _iddpm(
        64,
        "hybrid",
        _recipe(1_500_000, 128, 1e-4),
        "3.57 bits/dim, FID 19.2 (3.62 and 28.0 after 200 K steps), unconditional ImageNet 64x64 "
        "of 2016",
    ),
    "iddpm-imagenet64-vlb": _iddpm(
        64,
        "vlb",
        _recipe(1_500_000, 128, 1e-4),
        "3.53 bits/dim (3.54 in later papers), FID 40.1, unconditional ImageNet 64x64 of 2016",
    ),
    "iddpm-imagenet64-simple": _iddpm(
        64,
        "simple",
        _recipe(200_000, 128, 1e-4),
        "3.99 bits/dim, FID 32.5 after 200 K steps, unconditional ImageNet 64x64 of 2016",
        learn_sigma=False,
        **_LINEAR,
    ),
    "iddpm-imagenet64-conditional": _iddpm(
        64,
        "hybrid",
        _recipe(250_000, 2048, 3e-4),
        "FID 2.92 in 250 steps, ImageNet 64x64 of ILSVRC2012",
        model_channels=192,
        num_classes=1000,
        **_RAW,
    ),
    "iddpm-cifar10-hybrid": _iddpm(
        32,
        "hybrid",
        _recipe(500_000, 128, 1e-4),
        "3.17 bits/dim, FID 3.19, CIFAR-10; these flags gave others FID 6.7 where the published "
        "weights give 3.7 (openai/improved-diffusion, issue 19)",
        data=_CIFAR,
        dropout=0.3,
    ),
    "iddpm-cifar10-vlb": _iddpm(
        32,
        "vlb",
        _recipe(500_000, 128, 1e-4),
        "2.94 bits/dim, FID 11.47, CIFAR-10",
        data=_CIFAR,
        dropout=0.3,
    ),
    "iddpm-imagenet64-to-256": _iddpm(
        256,
        "hybrid",
        _recipe(500_000, 256, 3e-4),
        "upsampler without a number of its own, ImageNet 256x256 of ILSVRC2012",
        model_channels=192,
        num_res_blocks=2,
        channel_mult=_WIDE,
        low_size=64,
        num_classes=1000,
        schedule="linear",
        **_RAW,
    ),
    "iddpm-lsun-bedroom256": _iddpm(
        256,
        "hybrid",
        _recipe(1_200_000, 128, 1e-4),
        "LSUN bedroom 256x256, weights without a number in the paper; another run had rate 2e-5",
        num_res_blocks=2,
        channel_mult=_WIDE,
        attention_factors=(16,),
        num_heads=1,
        scale_shift=False,
        **_RAW,
        **_LINEAR,
    ),
}


def _adm(
    size: int,
    channel_mult: tuple[float, ...],
    recipe: dict[str, Any],
    published: str,
    **fields: Any,
) -> Preset:
    """Attention at 32, 16 and 8 pixels, heads of 64, 1000 linear steps, unless `fields` differ."""
    config = {
        "model_channels": 256,
        "num_res_blocks": 2,
        "attention_factors": (size // 32, size // 16, size // 8),
        "num_heads": None,
        "head_channels": 64,
        "resample": "resblock",
        "num_classes": 1000,
        **_LINEAR,
        **_RAW,
        **fields,
    }
    return Preset(
        DiscreteDiffusionConfig((3, size, size), channel_mult=channel_mult, **config),
        training=recipe | {"precision": "bfloat16"},
        data={"image_size": size, "channels": 3, "flip": True},
        published=f"{published}, {_ADM}",
    )


def _lsun(name: str, fid: float) -> Preset:
    return _adm(
        256,
        _WIDE,
        _recipe(500_000, 256, 1e-4),
        f"FID {fid} in 1000 steps, LSUN {name} 256x256 (200 K to 500 K steps, by the set)",
        num_classes=0,
        dropout=0.1,
    )


_ADM_PRESETS: dict[str, Preset] = {
    "adm-imagenet64": _adm(
        64,
        (1, 2, 3, 4),
        _recipe(540_000, 2048, 3e-4),
        "FID 2.07 in 250 steps without guidance (2.61 without dropout), ImageNet 64x64 of "
        "ILSVRC2012; classifier scale 1.0",
        model_channels=192,
        num_res_blocks=3,
        attention_order="new",
        schedule="cosine",
        dropout=0.1,
    ),
    "adm-imagenet128": _adm(
        128,
        (1, 1, 2, 3, 4),
        _recipe(4_360_000, 256, 1e-4),
        "FID 5.91 in 250 steps, 2.97 with classifier scale 0.5 (5.98 in 25 DDIM steps with 1.25), "
        "ImageNet 128x128",
        num_heads=4,
        head_channels=None,
    ),
    "adm-imagenet256": _adm(
        256,
        _WIDE,
        _recipe(1_980_000, 256, 1e-4),
        "FID 10.94 in 250 steps, 4.59 with classifier scale 1.0 (5.44 in 25 DDIM steps with 2.5), "
        "ImageNet 256x256",
    ),
    "adm-imagenet256-unconditional": _adm(
        256,
        _WIDE,
        _recipe(1_980_000, 256, 1e-4),
        "guided with classifier scale 10, ImageNet 256x256",
        num_classes=0,
    ),
    "adm-imagenet512": _adm(
        512,
        (0.5, 1, 1, 2, 2, 4, 4),
        _recipe(1_940_000, 256, 1e-4),
        "FID 23.24 in 250 steps, 7.72 with classifier scale 4.0 (8.41 in 25 DDIM steps with 9.0), "
        "ImageNet 512x512",
    ),
    "adm-lsun-bedroom256": _lsun("bedroom", 1.90),
    "adm-lsun-cat256": _lsun("cat", 5.57),
    "adm-lsun-horse256": _lsun("horse", 2.57),
    "adm-imagenet64-to-256": _adm(
        256,
        _WIDE,
        _recipe(500_000, 256, 1e-4),
        "upsampler: FID 3.94 on guided 64x64 samples, ImageNet 256x256",
        model_channels=192,
        low_size=64,
        num_heads=4,
        head_channels=None,
    ),
    "adm-imagenet128-to-512": _adm(
        512,
        _WIDE,
        _recipe(1_050_000, 256, 1e-4),
        "upsampler: FID 3.85 on guided 128x128 samples, ImageNet 512x512",
        model_channels=192,
        low_size=128,
        attention_factors=(16, 32),
    ),
}

PRESETS: dict[str, Preset] = {
    # Small ones of our own, for a CPU.
    "iddpm-tiny": Preset(
        DiscreteDiffusionConfig(
            (3, 8, 8),
            model_channels=32,
            channel_mult=(1, 1),
            num_res_blocks=1,
            attention_factors=(2,),
            num_heads=2,
            diffusion_steps=20,
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
    "iddpm-digits": Preset(
        DiscreteDiffusionConfig(
            (1, 8, 8),
            levels=17,
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_factors=(2,),
            num_heads=2,
            diffusion_steps=250,
        ),
        training={
            "steps": 1600,
            "batch_size": 64,
            "warmup_steps": 100,
            "learning_rate": 2e-3,
            **_SMALL,
        },
        data={"source": "digits"},
    ),
    "iddpm-fashion-mnist": Preset(
        DiscreteDiffusionConfig(
            (1, 28, 28),
            model_channels=32,
            channel_mult=(1, 2, 2),
            num_res_blocks=1,
            attention_factors=(4,),
            num_heads=4,
            diffusion_steps=1000,
        ),
        training={
            "epochs": 20.0,
            "batch_size": 64,
            "warmup_steps": 200,
            "learning_rate": 2e-3,
            **_SMALL,
        },
        data={"source": "fashion-mnist"},
    ),
    "iddpm-cifar10": Preset(
        DiscreteDiffusionConfig(
            (3, 32, 32),
            model_channels=32,
            channel_mult=(1, 2, 2),
            num_res_blocks=1,
            attention_factors=(4,),
            num_heads=4,
            diffusion_steps=1000,
        ),
        training={
            "epochs": 20.0,
            "batch_size": 64,
            "warmup_steps": 200,
            "learning_rate": 2e-3,
            **_SMALL,
        },
        data={"source": "hub:uoft-cs/cifar10", "flip": True},
    ),
    **_IDDPM_PRESETS,
    **_ADM_PRESETS,
}
