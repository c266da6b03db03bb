"""Every family and every preset, by name. Adding a model is one entry here."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from exactflow.core.building import ANY_NUMBER, on_meta
from exactflow.core.config import made, override, suggestion
from exactflow.core.model import GenerativeModel
from exactflow.models import (
    denseflow,
    diffusion,
    flow_matching,
    gaussian,
    hdit,
    macow,
    maskdit,
    tarflow,
)
from exactflow.models.family import Family
from exactflow.models.presets import Preset

FAMILIES: dict[str, Family] = {
    family.model.kind: family
    for family in (
        tarflow.FAMILY,
        macow.FAMILY,
        denseflow.FAMILY,
        gaussian.WHITENING,
        gaussian.GAUSSIANISATION,
        flow_matching.FAMILY,
        diffusion.FAMILY,
        hdit.FAMILY,
        maskdit.FAMILY,
    )
}


def names() -> list[str]:
    """Names of all presets, family by family."""
    return [name for family in FAMILIES.values() for name in family.presets]


def preset(name: str) -> Preset:
    """The preset of that name. Raises ValueError with the nearest names."""
    return family_of(name).presets[name]


def build(name: str, **overrides: Any) -> GenerativeModel:
    """A freshly initialised model.

    Args:
        name: a preset, see `names`.
        overrides: fields of the model's configuration to change.

    Raises:
        ValueError: for an unknown preset or field, with a suggestion, or a model that is too large
            for this machine.
    """
    family = family_of(name)
    return _built(family.model, override(family.presets[name].config, overrides))


def from_config(kind: str, fields: Mapping[str, Any]) -> GenerativeModel:
    """A freshly initialised model of family `kind` from its configuration's fields.

    Raises:
        ValueError: an unknown kind; a field that is absent, unknown or of another type; a model
            that is larger than this machine's memory.
    """
    return _built(*_configured(kind, fields))


def without_numbers(
    kind: str, fields: Mapping[str, Any], most: int | None = None
) -> GenerativeModel:
    """A model as `from_config` builds it, on the meta device, where it takes no memory.

    Args:
        kind: see `from_config`.
        fields: see `from_config`.
        most: parameters that it may have; None for what fits into this machine's memory.
    """
    model, config = _configured(kind, fields)
    return on_meta(lambda: model(config), f"a model of kind {kind}", most)


def _configured(kind: str, fields: Mapping[str, Any]) -> tuple[type[GenerativeModel], Any]:
    """The class of that kind of model, and a configuration of it."""
    if kind not in FAMILIES:
        raise ValueError(f"unknown kind of model {kind!r}{suggestion(kind, FAMILIES)}")
    family = FAMILIES[kind]
    return family.model, made(family.config, fields, f"the configuration of {kind}")


def _built(model: type[GenerativeModel], config: Any) -> GenerativeModel:
    """The model. Raises ValueError before memory is taken that this machine does not have."""
    if torch.get_default_device().type == "meta":
        return on_meta(lambda: model(config), f"a model of kind {model.kind}", ANY_NUMBER)
    _check_room(model, config)
    return model(config)


@cache
def _check_room(model: type[GenerativeModel], config: Any) -> None:
    """Raise ValueError for a model larger than this machine; once for each configuration."""
    on_meta(lambda: model(config), f"a model of kind {model.kind}")


def family_of(name: str) -> Family:
    """The family that preset `name` belongs to. Raises ValueError with the nearest names."""
    for family in FAMILIES.values():
        if name in family.presets:
            return family
    raise ValueError(f"unknown preset {name!r}{suggestion(name, names())}")
