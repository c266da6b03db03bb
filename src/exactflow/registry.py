"""Every family and every preset, by name. Adding a model is one entry here."""

import dataclasses
from collections.abc import Mapping
from typing import Any, final

from exactflow.core.config import checked, override, suggestion
from exactflow.core.model import GenerativeModel, Preset
from exactflow.core.model_size import built
from exactflow.diffusion import discrete, discrete_presets, hdit, hdit_presets
from exactflow.flows import (
    denseflow,
    denseflow_presets,
    gaussianisation,
    macow,
    macow_presets,
    tarflow,
    tarflow_presets,
    whitening,
)
from exactflow.paths import flow_matching, flow_matching_presets


@final
@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of model: its class, its configuration and its presets."""

    model: type[GenerativeModel]
    config: type
    presets: Mapping[str, Preset]


FAMILIES: dict[str, Family] = {
    "tarflow": Family(tarflow.TarFlow, tarflow.TarFlowConfig, tarflow_presets.PRESETS),
    "macow": Family(macow.MaCow, macow.MaCowConfig, macow_presets.PRESETS),
    "denseflow": Family(denseflow.DenseFlow, denseflow.DenseFlowConfig, denseflow_presets.PRESETS),
    "whitening": Family(whitening.Whitening, whitening.WhiteningConfig, whitening.PRESETS),
    "gaussianisation": Family(
        gaussianisation.Gaussianisation,
        gaussianisation.GaussianisationConfig,
        gaussianisation.PRESETS,
    ),
    "flow-matching": Family(
        flow_matching.FlowMatching,
        flow_matching.FlowMatchingConfig,
        flow_matching_presets.PRESETS,
    ),
    "diffusion": Family(
        discrete.DiscreteDiffusion, discrete.DiscreteDiffusionConfig, discrete_presets.PRESETS
    ),
    "hdit": Family(hdit.HDiT, hdit.HDiTConfig, hdit_presets.PRESETS),
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
    config = override(family.presets[name].config, overrides)
    return _built(family, config)


def from_config(kind: str, fields: Mapping[str, Any]) -> GenerativeModel:
    """A freshly initialised model of family `kind` from its configuration's fields."""
    if kind not in FAMILIES:
        raise ValueError(f"unknown kind of model {kind!r}{suggestion(kind, FAMILIES)}")
    family = FAMILIES[kind]
    return _built(family, family.config(**checked(family.config, fields)))


def family_of(name: str) -> Family:
    """The family that preset `name` belongs to. Raises ValueError with the nearest names."""
    for family in FAMILIES.values():
        if name in family.presets:
            return family
    raise ValueError(f"unknown preset {name!r}{suggestion(name, names())}")


def _built(family: Family, config: Any) -> GenerativeModel:
    return built(lambda: family.model(config), family.model.kind)
