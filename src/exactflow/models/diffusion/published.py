"""The models that OpenAI published with iDDPM and ADM: U-Net from the file, chain from hints.

A file holds the network alone (see `openai`). What it leaves open changes every output, the dropout
and the objective of further training aside: so nothing of it is guessed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from exactflow.core.config import checked
from exactflow.models.diffusion.model import DiscreteDiffusion, DiscreteDiffusionConfig
from exactflow.models.diffusion.openai import recorded, unet_of
from exactflow.models.diffusion.step_importance import StepImportance
from exactflow.models.foreign import SIZE, ForeignFile, Hints, PublishedFiles, size_in, without_size
from exactflow.models.presets import read_presets

MARK = "input_blocks.0.0.weight"  # the stem, of U-Nets and of classifiers
CLASSIFIER_MARK = "out.2.positional_embedding"
_HEADS = ("num_heads", "head_channels")
_UNRECORDED = {  # what the files do not hold -> what the published models have
    "height": "32 for CIFAR-10, else the side that the model's name tells",
    "num_heads or head_channels": "iDDPM: num_heads=4, LSUN 1; ADM: head_channels=64, the 128-pixel"
    " model and the 64 -> 256 upsampler num_heads=4",
    "attention_order": "'legacy', ADM's 64-pixel model 'new'",
    "dropout": "0.0, iDDPM on CIFAR-10 0.3, ADM's 64-pixel and LSUN models 0.1",
    "schedule": "'cosine' for iDDPM on CIFAR-10 and ImageNet 64 and ADM's 64-pixel model, else"
    " 'linear'",
    "diffusion_steps": "iDDPM: 4000, LSUN 1000; ADM: 1000",
    "rescale_timesteps": "True for iDDPM's unconditional ImageNet 64 and CIFAR-10 models, else"
    " False",
    "low_size": "64 for 64 -> 256, 128 for 128 -> 512 (upsamplers only)",
}
HINTS = (  # fields of `DiscreteDiffusionConfig` that no file holds
    *_HEADS,
    "attention_order",
    "dropout",
    "schedule",
    "diffusion_steps",
    "rescale_timesteps",
    "low_size",
    "levels",
    "label_dropout",
    "fixed_variance",
    "rescale_learned_sigmas",
    "objective",
    "timestep_law",
)


def from_published(
    state: Mapping[str, Tensor],
    hints: Mapping[str, Any],
    *,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
) -> DiscreteDiffusion:
    """The model of a published state dict, in evaluation mode, float32.

    Args:
        state: as published.
        hints: fields among `HINTS`. Needed are those of `_UNRECORDED`, of the heads one, and
            `low_size` for upsamplers alone. The others are as the configuration has them, but
            `rescale_learned_sigmas` follows `rescale_timesteps`, as in all published models.
        size: height and width; the weights fit many, the model was trained at one.
        channels: of the images, where neither 3 nor 1 fits.

    Raises:
        ValueError: hints are missing (all are named, with what the published models have), or the
            state is no such U-Net's.
    """
    said = checked(DiscreteDiffusionConfig, hints)
    read = recorded(state)
    channels = _image_channels(read["in_channels"], read["out_channels"], channels)
    upsampler = read["in_channels"] == 2 * channels
    if said.get("low_size") and not upsampler:
        raise ValueError("low_size means nothing here: the network sees no second image")
    given = {name for name, value in said.items() if value is not None} - {"low_size"}
    given |= {"height"} if size else set()
    given |= {"low_size"} if said.get("low_size") or not upsampler else set()
    _check_complete(given, read)
    assert size is not None
    network = unet_of(
        {name: value.float() for name, value in state.items()},
        num_heads=said.get("num_heads"),
        head_channels=said.get("head_channels"),
        attention_order=said["attention_order"],
        dropout=said["dropout"],
    )
    learned = read["out_channels"] == 2 * channels
    fields = dataclasses.asdict(network.config)
    del fields["in_channels"], fields["out_channels"]
    fields["num_classes"] -= int(said.get("label_dropout", 0) > 0)  # the null class
    defaults = {
        "objective": "hybrid" if learned else "simple",
        "rescale_learned_sigmas": said["rescale_timesteps"],
    }
    shape = {"image_shape": (channels, *size), "learn_sigma": learned}
    fields = checked(DiscreteDiffusionConfig, {**defaults, **said, **fields, **shape})
    config = DiscreteDiffusionConfig(**fields)
    with torch.device("meta"):
        model = DiscreteDiffusion(config)
    model.network = network
    if model.importance is not None:  # of losses yet to be seen
        model.importance = StepImportance(config.diffusion_steps)
    return model.eval()


def _image_channels(entering: int, leaving: int, channels: int | None) -> int:
    """Channels of the images, of which a network may see two and give two of each."""
    if channels is None:
        channels = next((c for c in (3, 1) if {entering, leaving} <= {c, 2 * c}), None)
    if channels is None or not {entering, leaving} <= {channels, 2 * channels}:
        raise ValueError(
            f"{entering} channels in and {leaving} out are not those of images of "
            f"{channels or '3 or 1'}: give channels"
        )
    return channels


def _check_complete(given: set[str], read: Mapping[str, Any]) -> None:
    """Raise ValueError, with presets that fit the weights, where settings are missing."""
    if given.intersection(_HEADS):
        given = given | {" or ".join(_HEADS)}
    missing = {name: known for name, known in _UNRECORDED.items() if name not in given}
    if not missing:
        return
    fitting = [
        name
        for name, preset in read_presets("diffusion", DiscreteDiffusionConfig).items()
        if preset.published and read.items() <= dataclasses.asdict(preset.config.unet).items()
    ]
    raise ValueError(
        f"the weights do not tell {', '.join(missing)}: give these (on the command line --height "
        "and model.NAME=VALUE), or by --preset the model that it is: of the published, "
        f"{' or '.join(fitting) or 'none'} has such weights. The published models have:"
        + "".join(f"\n  {name}: {known}" for name, known in missing.items())
    )


def _read(file: ForeignFile, hints: Hints) -> DiscreteDiffusion:
    if CLASSIFIER_MARK in file.weights:
        raise ValueError(
            "a classifier of noisy images is no generative model: it guides one, by "
            "exactflow.load_classifier, or exactflow sample --classifier"
        )
    size = size_in(hints) if "height" in hints else None
    channels = hints.get("channels")
    return from_published(file.weights, without_size(hints), size=size, channels=channels)


FILES = PublishedFiles("iDDPM/ADM", MARK, _read, takes=(*SIZE, *HINTS))
