"""Published checkpoints, read into models of this library.

Only tensors are read (`weights_only=True`, or safetensors). What names and shapes of the tensors
tell is taken from them; what they are silent about must be said, by hints or by a preset.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch

from exactflow.core.config import override
from exactflow.core.model import GenerativeModel
from exactflow.models import registry
from exactflow.models.denseflow import published as denseflow_published
from exactflow.models.diffusion import published as discrete_published
from exactflow.models.foreign import ForeignFile, read_tensors
from exactflow.models.hdit import published as hdit_published
from exactflow.models.macow import published as macow_published
from exactflow.models.tarflow import published as tarflow_published

Hints = Mapping[str, Any]


def convert(checkpoint: str | Path, *, preset: str | None = None, **hints: Any) -> GenerativeModel:
    """The model in a published file, in evaluation mode.

    Read are TarFlow, MaCow and DenseFlow, the U-Nets of iDDPM and ADM (OpenAI's state dicts), and
    HDiT (k-diffusion's training checkpoints, their slim safetensors, and bare weights).

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
            name does not tell. iDDPM, ADM and HDiT take fields of their configurations besides,
            see `discrete_published.HINTS` and `hdit_published.HINTS`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: anything that is not such a checkpoint; a hint that is missing, or has no
            meaning for this one; a preset of another model; with what was expected.
    """
    file = read_tensors(Path(checkpoint))
    family = _family_of(file)
    given = {name: value for name, value in hints.items() if value is not None}
    for name in given:
        if name not in (*family.needs, *family.takes):
            raise ValueError(
                f"{file.path}: {name} means nothing for {family.name}, which takes "
                f"{', '.join((*family.needs, *family.takes))}"
            )
    missing = [name for name in family.needs if name not in given and preset is None]
    if missing:
        raise ValueError(
            f"{file.path}: the weights of {family.name} do not tell {missing[0]}: give it, "
            f"on the command line --{missing[0]}"
        )
    if preset is None:
        return _read(file, family, given)
    config = registry.preset(preset).config
    if registry.family_of(preset) is not registry.FAMILIES[family.kind]:
        raise ValueError(f"{file.path} holds {family.name}, not {preset}")
    told = _told(config, (*family.needs, *family.takes))
    if "height" in given:  # another size, whole
        told.pop("width", None)
    model = _read(file, family, {**told, **given}, f" is not {preset}")
    return _as_preset(file, model, preset, given)


@final
@dataclasses.dataclass(frozen=True)
class _Family:
    """How the published files of one kind of model are known and read."""

    kind: str  # in the registry
    name: str  # in messages
    mark: str  # a key that no other family has
    read: Callable[[ForeignFile, Hints], GenerativeModel]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


def _tarflow(file: ForeignFile, hints: Hints) -> GenerativeModel:
    return tarflow_published.from_published(file.weights, file.path.stem, **hints)


def _macow(file: ForeignFile, hints: Hints) -> GenerativeModel:
    return macow_published.from_published(file.weights, _size(hints), hints["levels"])


def _denseflow(file: ForeignFile, hints: Hints) -> GenerativeModel:
    return denseflow_published.from_published(file.weights, _size(hints))


def _diffusion(file: ForeignFile, hints: Hints) -> GenerativeModel:
    if discrete_published.CLASSIFIER_MARK in file.weights:
        raise ValueError(
            "a classifier of noisy images is no generative model: it guides one, and "
            "exactflow.models.diffusion.openai.classifier_of reads it"
        )
    size = _size(hints) if "height" in hints else None
    return discrete_published.from_published(
        file.weights, _without_size(hints), size=size, channels=hints.get("channels")
    )


def _hdit(file: ForeignFile, hints: Hints) -> GenerativeModel:
    fields = _without_size(hints)
    if file.config is None or hints.keys() & _SIZE:
        channels = hints.get("channels") or hdit_published.image_channels(file.weights)
        fields["image_shape"] = (channels, *_size(hints))
    config = {} if file.config is None else {"config": file.config}
    return hdit_published.from_published({"model": file.weights, **config}, hints=fields)


_SIZE = ("channels", "height", "width")
_FAMILIES = (
    _Family(
        "tarflow",
        "TarFlow",
        tarflow_published.MARK,
        _tarflow,
        takes=("channels", "height", "noise_std"),
    ),
    _Family("macow", "MaCow", macow_published.MARK, _macow, ("height", "levels"), takes=("width",)),
    _Family(
        "denseflow", "DenseFlow", denseflow_published.MARK, _denseflow, ("height",), ("width",)
    ),
    _Family(
        "diffusion",
        "iDDPM/ADM",
        discrete_published.MARK,
        _diffusion,
        takes=(*_SIZE, *discrete_published.HINTS),
    ),
    _Family("hdit", "HDiT", hdit_published.MARK, _hdit, takes=(*_SIZE, *hdit_published.HINTS)),
)


def _family_of(file: ForeignFile) -> _Family:
    for family in _FAMILIES:
        if family.mark in file.weights:
            return family
    names = [family.name for family in _FAMILIES]
    raise ValueError(
        f"{file.path} is no published checkpoint of {', '.join(names[:-1])} or {names[-1]} "
        f"(its first keys: {list(file.weights)[:3]})"
    )


def _read(file: ForeignFile, family: _Family, hints: Hints, verdict: str = "") -> GenerativeModel:
    """The model by the reader of its family; errors begin with the file and a verdict on it."""
    try:
        return family.read(file, hints)
    except KeyError as error:
        raise ValueError(
            f"{file.path} is not a complete state dict of {family.name}: it has no {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{file.path}{verdict}: {error}") from error


def _size(hints: Hints) -> tuple[int, int]:
    """Height and width."""
    if "height" not in hints:
        raise ValueError("the file does not tell height: give it, on the command line --height")
    return hints["height"], hints.get("width", hints["height"])


def _without_size(hints: Hints) -> dict[str, Any]:
    return {name: value for name, value in hints.items() if name not in _SIZE}


def _told(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """What a preset's configuration says of these hints."""
    size = dict(zip(_SIZE, config.image_shape, strict=True))
    said = {**dataclasses.asdict(config), **size}
    return {name: said[name] for name in names if said[name] is not None}


def _as_preset(
    file: ForeignFile, model: GenerativeModel, preset: str, given: Hints
) -> GenerativeModel:
    """The model under the preset's whole configuration, of which its file tells only a part.

    Raises:
        ValueError: its tensors are not those of the preset.
    """
    read = model.config
    changes = {"image_shape": read.image_shape, **_without_size(given)}
    config = override(registry.preset(preset).config, changes)
    with torch.device("meta"):
        exact = registry.FAMILIES[model.kind].model(config)
    found, expected = (
        {name: tuple(value.shape) for name, value in m.state_dict().items()} for m in (model, exact)
    )
    if found != expected:
        fields = [field.name for field in dataclasses.fields(config)]
        values = {name: (getattr(read, name), getattr(config, name)) for name in fields}
        unlike = [f"{n} is {a}, not {b}" for n, (a, b) in values.items() if b not in (None, a)]
        raise ValueError(f"{file.path} is not {preset}, by its weights: {'; '.join(unlike)}")
    exact.load_state_dict(model.state_dict(), assign=True)
    return exact.requires_grad_(True).eval()
