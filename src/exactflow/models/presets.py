"""Presets, as a family's `presets.yaml` lists them: data, not program."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from exactflow.core.model import Preset

SHARED = "shared"  # key of what presets have in common, which is none itself


@cache
def read_presets(folder: str, config: type) -> Mapping[str, Preset]:
    """The presets of a family, by name.

    Args:
        folder: of the family, beside this file.
        config: the class of its configuration.
    """
    text = (Path(__file__).parent / folder / "presets.yaml").read_text(encoding="utf-8")
    found = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the C one is faster
    return {
        name: Preset(**{**_frozen(fields), "config": config(**_frozen(fields["config"]))})
        for name, fields in found.items()
        if name != SHARED
    }


def _frozen(value: Any) -> Any:
    """The value with tuples for lists, which YAML has for both."""
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
