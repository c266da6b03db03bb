"""Arguments that several verbs have."""

from abc import ABC
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

import tyro

T = TypeVar("T")
Maybe = Annotated[T | None, tyro.conf.arg(help_behavior_hint="")]  # without "(default: None)"
Many = Annotated[tuple[T, ...], tyro.conf.arg(help_behavior_hint="")]
Source = Annotated[str, tyro.conf.arg(metavar="SOURCE")]
Device = Literal["auto", "cpu", "cuda", "mps"]
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, kw_only=True)
class TakesSettings(ABC):  # noqa: B024 - of fields alone
    """Arguments of a verb that takes words SECTION.FIELD=VALUE, wherever they stand.

    Attributes:
        sections: the sections that these words may name.
    """

    sections: ClassVar[tuple[str, ...]] = ("data",)
    settings: tyro.conf.Suppress[tuple[str, ...]] = ()


@dataclass(frozen=True, kw_only=True)
class OfRun(TakesSettings, ABC):
    """Arguments of a verb that takes everything that decides a training."""

    sections: ClassVar[tuple[str, ...]] = ("model", "training", "data", "run")
    config: Maybe[Path] = None
    """YAML file with a preset and the sections model, training, data and run."""


@dataclass(frozen=True, kw_only=True)
class OfModel(ABC):
    """Arguments of a verb that loads a model."""

    model: tyro.conf.Positional[str]
    """Run folder, model folder, hub id, or name of a model that comes with the package."""
    device: Device = "auto"
    """Where to compute; auto is the accelerator, if there is one."""


@dataclass(frozen=True, kw_only=True)
class OfImages(OfModel, TakesSettings, ABC):
    """Arguments of a verb that loads a model, reads images and writes a folder."""

    out: Maybe[Path] = None
    """Folder to write; by default one of the verb's name in the model's run folder."""
