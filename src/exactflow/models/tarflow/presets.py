"""TarFlow presets: names, few fields, the training recipe, and what is known of the result."""

from typing import Any

from exactflow.core.model import Preset
from exactflow.models.tarflow.model import TarFlowConfig


def _published(
    image_size: int,
    patch_size: int,
    width: int,
    sigma: float,
    epochs: float,
    batch_size: int,
    published: str,
    num_classes: int = 0,
) -> Preset:
    """A model of the paper: eight blocks of eight layers, no EMA, no clipping."""
    return Preset(
        TarFlowConfig(
            image_shape=(3, image_size, image_size),
            patch_size=patch_size,
            width=width,
            num_classes=num_classes,
            noise_std=sigma,
        ),
        training={
            "epochs": epochs,
            "batch_size": batch_size,
            "clip_norm": None,
            "precision": "bfloat16" if sigma else "float32",
        },
        data={"image_size": image_size, "channels": 3, "flip": True},
        published=published,
    )


_PAPER = "arXiv 2412.06329"
# Of all our own: the published exponential scale overflows on single images after short training,
# and where a latent is drawn that no image has; STARFlow's does not.
_BOUNDED: dict[str, Any] = {"scale": "softplus", "soft_clip": 4.0, "final_norm": True}
# One layer in each block, as small models want it, and a start token, as all but affine maps do.
_SHALLOW: dict[str, Any] = {**_BOUNDED, "layers_per_block": 1, "start_token": True}
# A mixture of logistics for every number, for which the paper has one Gaussian. Of fewer channels,
# since the output map is larger: about as many parameters as with an affine map.
_MIXTURE: dict[str, Any] = {**_SHALLOW, "conditional": ("affine", "mixture")}
_COLOUR: dict[str, Any] = {
    **_MIXTURE,
    "conditional": ("channels", "affine", "mixture"),
    "mixing": True,
}
_SMALL = {
    "epochs": 20.0,
    "batch_size": 32,
    "warmup_steps": 200,
    "learning_rate": 3e-3,
    "weight_decay": 0.01,
    "ema_decay": 0.998,
}
_LARGER = {
    "epochs": 20.0,
    "batch_size": 64,
    "warmup_steps": 200,
    "optimizer": "muon",
    "learning_rate": 2e-3,
    "ema_decay": 0.999,
}
PRESETS: dict[str, Preset] = {
    # Small ones of our own, for a CPU.
    "tarflow-tiny": Preset(
        TarFlowConfig((3, 8, 8), 2, width=64, blocks=2, layers_per_block=1, **_BOUNDED),
        training={"steps": 100, "warmup_steps": 10, "learning_rate": 2e-3, "batch_size": 64},
        data={"source": "digits"},
    ),
    "tarflow-digits": Preset(
        TarFlowConfig((1, 8, 8), 2, 64, blocks=4, levels=17, components=4, **_MIXTURE),
        training={
            "steps": 1600,
            "batch_size": 64,
            "warmup_steps": 100,
            "optimizer": "muon",
            "learning_rate": 3e-3,
            "weight_decay": 0.01,
            "ema_decay": 0.998,
        },
        data={"source": "digits"},
    ),
    "tarflow-fashion-mnist": Preset(
        TarFlowConfig((1, 28, 28), 4, 128, 4, components=6, **{**_MIXTURE, "layers_per_block": 3}),
        training=_LARGER,
        data={"source": "fashion-mnist"},
    ),
    "tarflow-cifar10": Preset(
        TarFlowConfig((3, 32, 32), 4, 192, 4, components=4, **{**_COLOUR, "layers_per_block": 4}),
        training=_LARGER,
        data={"source": "hub:uoft-cs/cifar10", "flip": True},
    ),
    # About a million parameters, as the other families have them, for comparisons on a CPU.
    "tarflow-fashion-mnist-1m": Preset(
        TarFlowConfig((1, 28, 28), 4, 112, 5, components=6, **_MIXTURE, head_dim=56),
        training={**_SMALL, "optimizer": "muon"},
        data={"source": "fashion-mnist"},
    ),
    "tarflow-fashion-mnist-1m-samples": Preset(
        TarFlowConfig(
            (1, 28, 28),
            4,
            120,
            blocks=5,
            head_dim=40,
            num_classes=10,
            noise_std=0.1,
            conditional=("affine", "triangular"),
            **_SHALLOW,
        ),
        training={**_SMALL, "optimizer": "muon"},
        data={"source": "fashion-mnist"},
        guidance=1.5,
    ),
    "tarflow-fashion-mnist-1m-affine": Preset(
        TarFlowConfig((1, 28, 28), 4, width=128, blocks=5, layers_per_block=1, **_BOUNDED),
        training={**_SMALL, "learning_rate": 1e-3},
        data={"source": "fashion-mnist"},
    ),
    "tarflow-cifar10-1m": Preset(
        TarFlowConfig(
            (3, 32, 32),
            4,
            112,
            blocks=4,
            head_dim=56,
            components=3,
            **_COLOUR,
        ),
        training={**_SMALL, "optimizer": "muon"},
        data={"source": "hub:uoft-cs/cifar10", "flip": True},
    ),
    "tarflow-cifar10-1m-affine": Preset(
        TarFlowConfig((3, 32, 32), 4, width=128, blocks=4, layers_per_block=1, **_BOUNDED),
        training=_SMALL,
        data={"source": "hub:uoft-cs/cifar10", "flip": True},
    ),
    # The paper's, named [P-Ch-T-K-sigma]; likelihood recipe (uniform noise, float32) first.
    "tarflow-imagenet64-2-768-8-8-uniform": _published(
        64, 2, 768, 0.0, 100, 256, f"2.99 bits/dim, ImageNet 64x64 of unresolved version, {_PAPER}"
    ),
    "tarflow-imagenet64-2-768-8-8-0.05-unconditional": _published(
        64, 2, 768, 0.05, 200, 256, f"FID 18.42 unconditional, {_PAPER}"
    ),
    "tarflow-imagenet64-2-768-8-8-0.05": _published(
        64, 2, 768, 0.05, 200, 256, f"FID 2.90 at guidance 2.3, {_PAPER}", 1000
    ),
    "tarflow-imagenet64-2-1024-8-8-0.05": _published(
        64, 2, 1024, 0.05, 200, 256, f"FID 2.66 (unverified width), {_PAPER}", 1000
    ),
    "tarflow-imagenet64-4-1024-8-8-0.05": _published(
        64, 4, 1024, 0.05, 300, 480, f"FID 3.99 at guidance 1.7, {_PAPER}", 1000
    ),
    "tarflow-imagenet128-4-1024-8-8-0.15": _published(
        128, 4, 1024, 0.15, 320, 768, f"FID 5.03, {_PAPER}", 1000
    ),
    "tarflow-afhq256-8-768-8-8-0.07": _published(
        256, 8, 768, 0.07, 4000, 256, "FID 15.42, official weights measured by arXiv 2505.24791", 3
    ),
    "tarflow-mnist-4-128-4-4-0.10": Preset(
        TarFlowConfig((1, 28, 28), 4, 128, 4, 4, num_classes=10, noise_std=0.1),
        training={"epochs": 100.0, "batch_size": 256, "learning_rate": 2e-3, "clip_norm": None},
        published=f"demonstration without a number, {_PAPER}",
    ),
}
