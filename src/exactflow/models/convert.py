"""Published checkpoints, read into models of this library.

Only tensors are read (`weights_only=True`, or safetensors). The configuration is read off their
names and shapes; what these do not tell must be given, by hints or by a preset.
"""

import dataclasses
from pathlib import Path
from typing import Any

from exactflow.core.config import override
from exactflow.core.model import GenerativeModel
from exactflow.models import registry
from exactflow.models.diffusion.classifier import ClassifierUNet
from exactflow.models.diffusion.openai import classifier_of
from exactflow.models.family import Family
from exactflow.models.foreign import (
    SIZE,
    ForeignFile,
    Hints,
    PublishedFiles,
    filled,
    read_tensors,
    without_size,
)


def convert(checkpoint: str | Path, *, preset: str | None = None, **hints: Any) -> GenerativeModel:
    """The model in a published file, in evaluation mode.

    Read are TarFlow, MaCow and DenseFlow, the U-Nets of iDDPM and ADM (OpenAI's state dicts),
    HDiT (k-diffusion's training checkpoints, their slim safetensors, and bare weights) and MaskDiT.

    Args:
        checkpoint: a file of tensors as the authors publish it. Where it holds averaged weights
            beside the last ones, these are taken.
        preset: the registered model that the file holds: it gives all hints, and is checked
            against the weights.
        hints: what the file does not tell; they come before the preset's.
            `height` and `width` in pixels: TarFlow takes `height` for images that are not square;
            MaCow, DenseFlow, iDDPM, ADM and bare HDiT weights need it, and take `width` where it
            differs. `channels`: where neither 3 nor 1 fits the weights uniquely. `levels`, of grey:
            MaCow needs it. `noise_std`: TarFlow's training noise, 0 for uniform, where the file
            name does not tell. `num_heads` and `decoder_heads`: MaskDiT needs them. iDDPM, ADM and
            HDiT take fields of their configurations besides, see `HINTS` in
            `diffusion/published.py` and `hdit/published.py`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: anything that is not such a checkpoint; a hint that is missing, or has no
            meaning for this one; a preset of another model; with what was expected.
    """
    file = read_tensors(Path(checkpoint))
    family, files = _family_of(file)
    given = {name: value for name, value in hints.items() if value is not None}
    for name in given:
        if name not in (*files.needs, *files.takes):
            raise ValueError(
                f"{file.path}: {name} means nothing for {files.name}, which takes "
                f"{', '.join((*files.needs, *files.takes))}"
            )
    missing = [name for name in files.needs if name not in given and preset is None]
    if missing:
        raise ValueError(
            f"{file.path}: the weights of {files.name} do not tell {missing[0]}: give it, "
            f"on the command line --{missing[0]}"
        )
    if preset is None:
        return _read(file, files, given)
    config = registry.preset(preset).config
    if registry.family_of(preset) is not family:
        raise ValueError(f"{file.path} holds {files.name}, not {preset}")
    told = _told(config, (*files.needs, *files.takes))
    if "height" in given:  # another size, whole
        told.pop("width", None)
    model = _read(file, files, {**told, **given}, f" is not {preset}")
    return _as_preset(file, model, preset, given)


def load_classifier(checkpoint: str | Path, *, head_channels: int = 64) -> ClassifierUNet:
    """The classifier of noisy images in a published file (ADM's, arXiv 2105.05233), to guide with.

    In evaluation mode on the CPU; `ClassifierGuidance` takes it.

    Args:
        checkpoint: OpenAI's state dict of a classifier with attention pooling.
        head_channels: width of one attention head, which the file does not tell; 64 in all that
            were published.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no such classifier.
    """
    file = read_tensors(Path(checkpoint))
    try:
        return classifier_of(file.weights, head_channels=head_channels)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def _family_of(file: ForeignFile) -> tuple[Family, PublishedFiles]:
    """The family of the model in a file, and how it is read."""
    names = []
    for family in registry.FAMILIES.values():
        if family.files is not None:
            if family.files.mark in file.weights:
                return family, family.files
            names.append(family.files.name)
    raise ValueError(
        f"{file.path} is no published checkpoint of {', '.join(names[:-1])} or {names[-1]} "
        f"(its first keys: {list(file.weights)[:3]})"
    )


def _read(
    file: ForeignFile, files: PublishedFiles, hints: Hints, verdict: str = ""
) -> GenerativeModel:
    """The model by the reader of its family; errors begin with the file and a verdict on it."""
    try:
        return files.read(file, hints)
    except KeyError as error:
        raise ValueError(
            f"{file.path} is not a complete state dict of {files.name}: it has no {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{file.path}{verdict}: {error}") from error


def _told(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """What a preset's configuration says of these hints."""
    size = dict(zip(SIZE, config.image_shape, strict=True))
    said = {**dataclasses.asdict(config), **size}
    return {name: said[name] for name in names if said[name] is not None}


def _as_preset(
    file: ForeignFile, model: GenerativeModel, preset: str, given: Hints
) -> GenerativeModel:
    """The same weights under the preset's whole configuration, of which a file tells only a part.

    Raises:
        ValueError: its tensors are not those of the preset.
    """
    read = model.config
    changes = {"image_shape": read.image_shape, **without_size(given)}
    config = override(registry.preset(preset).config, changes)
    try:
        return filled(type(model), config, model.state_dict())
    except ValueError as error:
        fields = [field.name for field in dataclasses.fields(config)]
        values = {name: (getattr(read, name), getattr(config, name)) for name in fields}
        unlike = [f"{n} is {a}, not {b}" for n, (a, b) in values.items() if b not in (None, a)]
        raise ValueError(
            f"{file.path} is not {preset}, by its weights: {'; '.join(unlike)}"
        ) from error
