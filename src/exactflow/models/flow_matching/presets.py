"""Flow-matching presets: the published configurations, and small ones of our own."""

from collections.abc import Mapping
from typing import Any

from exactflow.core.model import Preset
from exactflow.models.flow_matching.model import FlowMatchingConfig

_CONSTANT = {"decay": "exponential", "decay_factor": 1.0}  # after the warm-up
_ADAM = {"betas": (0.9, 0.999), "weight_decay": 0.0, "clip_norm": None}


def _paper(
    size: int,
    width: int,
    batch_size: int,
    network: Mapping[str, Any],
    training: Mapping[str, Any],
    published: str,
    counts: tuple[int, int],
) -> Preset:
    """A model of the paper's table: optimal transport path, no labels, no dropout.

    Args:
        size: side of the images.
        width: model_channels of the U-Net.
        batch_size: images per step.
        network: other fields of the U-Net.
        training: other fields of the training.
        published: result.
        counts: parameters if it resamples by residual blocks, as here, and if by convolutions.
    """
    config = FlowMatchingConfig(
        image_shape=(3, size, size),
        path="ot",
        model_channels=width,
        head_channels=64,
        resample="resblock",
        **network,
    )
    known = (
        f"{published}, arXiv 2210.02747, which does not say how it resamples: "
        f"{counts[0]:,} parameters by residual blocks (this preset), "
        f"{counts[1]:,} by convolutions (resample='conv')"
    )
    return Preset(
        config,
        training={**_ADAM, "batch_size": batch_size, **training},
        data={"image_size": size, "channels": 3},
        published=known,
    )


def _meta_blurred(size: int, published: str) -> Preset:
    """Conditional ImageNet with blurred faces, in the shape of ADM's 64 x 64 model."""
    config = FlowMatchingConfig(
        image_shape=(3, size, size),
        num_classes=1000,
        time_scale=1.0,
        model_channels=192,
        channel_mult=(1.0, 2.0, 3.0, 4.0),
        num_res_blocks=3,
        attention_factors=(2, 4, 8),
        head_channels=64,
        attention_order="new",
        dropout=0.1,
    )
    training = {
        "batch_size": 2048,
        "epochs": 900.0,
        "warmup_epochs": 0.0,
        "learning_rate": 1e-4,
        "min_learning_rate": 1e-8,
        "decay": "linear",
        "weight_decay": 0.01,
        "clip_norm": None,
    }
    data = {"image_size": size, "channels": 3, "flip": True}
    return Preset(config, training=training, data=data, published=published)


_META = "example of facebookresearch/flow_matching 1.0.10"
_BLURRED = f"ImageNet with blurred faces, {_META}; label dropout and law of t unverified"
_UNET: dict[str, Any] = {  # of less than a million parameters
    "dequantize": True,
    "times": "stratified",
    "model_channels": 32,
    "channel_mult": (1.0, 1.0, 2.0),
    "num_res_blocks": 1,
    "attention_factors": (4,),
    "head_channels": 32,
    "resample": "conv",
}
_SMALL = {
    "epochs": 20.0,
    "batch_size": 64,
    "warmup_steps": 200,
    "learning_rate": 2e-3,
    "ema_decay": 0.999,
}
PRESETS: dict[str, Preset] = {
    # Small ones of our own, for a CPU.
    "flow-matching-tiny": Preset(
        FlowMatchingConfig(
            image_shape=(3, 8, 8), network="dit", width=64, depth=2, num_heads=2, times="stratified"
        ),
        training={"steps": 100, "warmup_steps": 10, "learning_rate": 2e-3, "batch_size": 64},
        data={"source": "digits"},
    ),
    "flow-matching-digits": Preset(
        FlowMatchingConfig(
            image_shape=(1, 8, 8),
            levels=17,
            dequantize=True,
            times="stratified",
            model_channels=32,
            channel_mult=(1.0, 2.0),
            num_res_blocks=1,
            attention_factors=(2,),
            head_channels=32,
            resample="conv",
        ),
        training={
            "steps": 1000,
            "warmup_steps": 100,
            "learning_rate": 2e-3,
            "weight_decay": 0.01,
            "ema_decay": 0.998,
        },
        data={"source": "digits"},
    ),
    "flow-matching-fashion-mnist": Preset(
        FlowMatchingConfig((1, 28, 28), **_UNET),
        training=_SMALL,
        data={"source": "fashion-mnist"},
    ),
    "flow-matching-fashion-mnist-samples": Preset(
        FlowMatchingConfig((1, 28, 28), num_classes=10, **_UNET),
        training=_SMALL,
        data={"source": "fashion-mnist"},
        guidance=1.0,
    ),
    "flow-matching-cifar10": Preset(
        FlowMatchingConfig((3, 32, 32), **_UNET),
        training=_SMALL,
        data={"source": "hub:uoft-cs/cifar10", "flip": True},
    ),
    # The paper's, arXiv 2210.02747, appendix E.
    "flow-matching-paper-cifar10": _paper(
        size=32,
        width=256,
        batch_size=256,
        network={
            "channel_mult": (1.0, 2.0, 2.0, 2.0),
            "num_res_blocks": 2,
            "attention_factors": (2,),
        },
        training={
            "steps": 391_000,
            "learning_rate": 5e-4,
            "warmup_steps": 45_000,
            "min_learning_rate": 1e-8,
            "decay": "linear",
        },
        published="2.99 bits/dim (K = 50; 3.11 at K = 1), FID 6.35 at 142 evaluations",
        counts=(171_268_099, 153_094_915),
    ),
    "flow-matching-paper-imagenet32": _paper(
        size=32,
        width=256,
        batch_size=1024,
        network={
            "channel_mult": (1.0, 2.0, 2.0, 2.0),
            "num_res_blocks": 3,
            "attention_factors": (2, 4),
        },
        training={
            "steps": 250_000,
            "learning_rate": 1e-4,
            "warmup_steps": 20_000,
            "min_learning_rate": 1e-8,
            "decay": "linear",
        },
        published="3.53 bits/dim (K = 15; 3.62 at K = 1), FID 5.02 at 122 evaluations, new set",
        counts=(228_149_507, 209_976_323),
    ),
    "flow-matching-paper-imagenet64": _paper(
        size=64,
        width=192,
        batch_size=2048,
        network={
            "channel_mult": (1.0, 2.0, 3.0, 4.0),
            "num_res_blocks": 3,
            "attention_factors": (2, 4, 8),
        },
        training={
            "steps": 157_000,
            "learning_rate": 1e-4,
            "warmup_steps": 0,
            "precision": "bfloat16",  # the paper: float16
            **_CONSTANT,
        },
        published="3.31 bits/dim (K = 10; 3.35 at K = 1), FID 14.45 at 138 evaluations, new set",
        counts=(295_131_267, 276_421_059),
    ),
    "flow-matching-paper-imagenet128": _paper(
        size=128,
        width=256,
        batch_size=1536,
        network={
            "channel_mult": (1.0, 1.0, 2.0, 3.0, 4.0),
            "num_res_blocks": 3,
            "attention_factors": (4, 8, 16),
        },
        training={
            "steps": 500_000,
            "learning_rate": 1e-4,
            "warmup_steps": 20_000,
            "min_learning_rate": 1e-8,
            "decay": "linear",
            "precision": "bfloat16",  # the paper: float16
        },
        published="2.90 bits/dim, FID 20.9",
        counts=(542_804_483, 507_319_043),
    ),
    # Meta's example and torchcfm's.
    "flow-matching-meta-cifar10": Preset(
        FlowMatchingConfig(
            image_shape=(3, 32, 32),
            times="edm",
            time_scale=1.0,
            model_channels=128,
            channel_mult=(2.0, 2.0, 2.0),
            num_res_blocks=4,
            attention_factors=(2,),
            num_heads=1,
            head_channels=None,
            attention_order="new",
            resample="plain",
            dropout=0.3,
        ),
        training={
            "batch_size": 512,
            "epochs": 1800.0,
            "warmup_epochs": 0.0,
            "learning_rate": 1e-4,
            "weight_decay": 0.01,
            "clip_norm": None,
            "ema_decay": 0.999,
            **_CONSTANT,
        },
        data={"source": "hub:uoft-cs/cifar10", "flip": True},
        published=f"FID 2.07 with 50 steps of Heun on EDM's times, {_META}",
    ),
    "flow-matching-meta-imagenet32": _meta_blurred(32, f"FID 1.14, {_BLURRED}"),
    "flow-matching-meta-imagenet64": _meta_blurred(64, f"FID 1.64, {_BLURRED}"),
    "flow-matching-torchcfm-cifar10": Preset(
        FlowMatchingConfig(
            image_shape=(3, 32, 32),
            time_scale=1.0,
            model_channels=128,
            channel_mult=(1.0, 2.0, 2.0, 2.0),
            num_res_blocks=2,
            attention_factors=(2,),
            num_heads=4,
            head_channels=None,
            scale_shift=False,
            resample="conv",
            dropout=0.1,
        ),
        training={
            **_ADAM,
            "batch_size": 128,
            "steps": 400_000,
            "learning_rate": 2e-4,
            "warmup_steps": 5_000,
            "clip_norm": 1.0,
            "ema_decay": 0.9999,
            **_CONSTANT,
        },
        data={"source": "hub:uoft-cs/cifar10", "flip": True},
        published=(
            "FID about 3.5, torchcfm 1.0.7; dropout and training settings unverified, the number "
            "of parameters is its"
        ),
    ),
}
