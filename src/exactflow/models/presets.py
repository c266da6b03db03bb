"""Presets, as a file in the family's folder lists them: data, not program."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import yaml

SHARED = "shared"  # key of what presets have in common; it is no preset itself


@final
@dataclass(frozen=True)
class Preset:
    """A named configuration: the model, how it is trained, and what is known of the result.

    Attributes:
        config: the model's frozen configuration.
        training: fields of the trainer's configuration that differ from its defaults.
        data: fields of the data configuration that differ from its defaults.
        published: what the source reports of this model, with the source; "" for our own.
        guidance: scale of guidance that its samples are meant to be drawn with.
    """

    config: Any
    training: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    data: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    published: str = ""
    guidance: float = 0.0


@cache
def read_presets(folder: str, config: type, file: str = "presets") -> Mapping[str, Preset]:
    """The presets of a family, by name.

    Args:
        folder: of the family, beside this file.
        config: the class of its configuration.
        file: in that folder, without ".yaml".
    """
    text = (Path(__file__).parent / folder / f"{file}.yaml").read_text(encoding="utf-8")
    found = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the C one is faster
    presets = {name: _frozen(fields) for name, fields in found.items() if name != SHARED}
    return {
        name: Preset(**{**fields, "config": config(**fields["config"])})
        for name, fields in presets.items()
    }


def _frozen(value: Any) -> Any:
    """The value with tuples for lists, which YAML has for both."""
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
