"""The settings of a run: the recipe of a preset, or of a model of one's own, and its changes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, final

import torch
import yaml

from exactflow.core.config import SECTIONS, TYPED, override, suggestion
from exactflow.core.model import GenerativeModel
from exactflow.core.randomness import derive_seed
from exactflow.data.config import DataConfig, located
from exactflow.data.datasets import ImageDataset
from exactflow.data.prepared import open_prepared
from exactflow.models import registry
from exactflow.training.optim import TrainConfig

CONFIG_FILE = "config.yaml"  # of a run folder
MAX_GRID = 4096  # images


@final
@dataclass(frozen=True)
class RunConfig:
    """Scores and samples in the course of a run."""

    evaluate_every: int = 500  # steps between scores of held-out images
    sample_every: int = 500  # steps between sample grids
    patience: int | None = None  # scores without a new best one after which the run ends
    samples: int = 16  # images in a grid
    evaluation_images: int = 1000  # at most so many validation images are scored on the way
    tensorboard: bool = False  # also log to TensorBoard (extra `track`)

    def __post_init__(self) -> None:
        """Raise ValueError for intervals and counts below one, and for a grid that is too large."""
        for name, value in asdict(self).items():
            if name != "tensorboard" and value is not None and value < 1:
                raise ValueError(f"run.{name}: expected at least 1, got {value}")
        if self.samples > MAX_GRID:
            raise ValueError(f"run.samples: expected at most {MAX_GRID:,}, got {self.samples}")


@final
@dataclass(frozen=True)
class Settings:
    """All settings of a run; the preset is "" for a model of one's own."""

    preset: str
    model: Any
    training: TrainConfig
    data: DataConfig
    run: RunConfig
    given: frozenset[str] = frozenset()  # fields of the model that were set by name

    def describe(self) -> dict[str, Any]:
        """The sections as YAML and JSON hold them."""
        sections = {name: asdict(getattr(self, name)) for name in SECTIONS}
        sections = json.loads(json.dumps(sections))  # lists in the place of tuples
        return {"preset": self.preset, **sections} if self.preset else sections

    def text(self) -> str:
        """The content of a run's config.yaml, with absolute paths of the data.

        A path that was typed otherwise is repeated as typed in a section of its own; see
        `read_file`.
        """
        content = self.describe()
        data, prepared = content["data"], open_prepared(self.data.source)
        paths = ["source", "cache_dir"]
        if prepared is None:
            paths.append("validation")
        else:  # its images were decoded by these settings, and are compared with them later
            default = DataConfig()
            words = prepared.identity.words.items()
            data |= {name: value for name, value in words if data[name] == getattr(default, name)}
        typed = {name: data[name] for name in paths if data[name] is not None}
        data |= {name: located(path) for name, path in typed.items()}
        typed = {name: path for name, path in typed.items() if path != data[name]}
        return yaml.safe_dump({**content, **({TYPED: typed} if typed else {})}, sort_keys=False)

    def fitted(self, dataset: ImageDataset) -> "Settings":
        """The settings with the model's image shape and levels taken from the data, unless given.

        The number of classes of a conditional model is taken too.
        """
        facts = {"image_shape": dataset.event_shape, "levels": dataset.levels}
        if asdict(self.model).get("num_classes"):  # unconditional families have no such field
            facts["num_classes"] = dataset.num_classes
        facts = {name: value for name, value in facts.items() if name not in self.given}
        return replace(self, model=override(self.model, facts))

    def unused_classes(self, dataset: ImageDataset) -> str:
        """A remark that a model is trained without classes where one might expect it, or ""."""
        wanted, found = asdict(self.model).get("num_classes"), dataset.num_classes
        if wanted is None or "num_classes" in self.given or bool(wanted) == bool(found):
            return ""
        if wanted:
            return f"{dataset.id} has no labels: {self.preset} is trained without its classes"
        if found == 1:
            return ""
        return (
            f"{dataset.id} has {found} classes, {self.preset} is trained without them: "
            f"model.num_classes={found} trains it with them"
        )

    @property
    def guidance(self) -> float:
        """The preset's scale of guidance for samples; 0 without classes."""
        given = self.preset and asdict(self.model).get("num_classes")
        return registry.preset(self.preset).guidance if given else 0.0

    def build(self) -> GenerativeModel:
        """The model with its seeded initial weights."""
        kind = registry.family_of(self.preset).model.kind
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self.training.seed, "initial weights"))
            return registry.from_config(kind, asdict(self.model))


def settings_of(preset_name: str, changes: Mapping[str, Mapping[str, Any]]) -> Settings:
    """A preset's recipe with changes, by section and field.

    Raises:
        ValueError: an unknown preset, field or value, with a suggestion; no data source.
    """
    preset = registry.preset(preset_name)
    if "source" not in {**preset.data, **changes.get("data", {})}:
        raise ValueError(f"{preset_name} names no data set: give data.source=FOLDER (or another)")
    return Settings(
        preset_name,
        override(preset.config, changes.get("model", {})),
        override(override(TrainConfig(), preset.training), changes.get("training", {})),
        override(override(DataConfig(), preset.data), changes.get("data", {})),
        override(RunConfig(), changes.get("run", {})),
        frozenset(changes.get("model", {})),
    )


def named_changes(config: Any, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings by section and field.

    Args:
        config: the model's.
        given: by "SECTION.FIELD", or by the field alone where one section has it.

    Raises:
        ValueError: no section has it, with a suggestion, or several have.
    """
    kinds = zip(SECTIONS, (type(config), TrainConfig, DataConfig, RunConfig), strict=True)
    known = {section: [field.name for field in fields(kind)] for section, kind in kinds}
    changes: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, value in given.items():
        section, dot, name = key.rpartition(".")
        homes = [section] if dot else [each for each in SECTIONS if key in known[each]]
        if len(homes) != 1 or homes[0] not in known:
            choices = {name for names in known.values() for name in names}
            near = " or ".join(f"{home}.{key}" for home in homes)
            raise ValueError(
                f"{key}: expected {near}"
                if near
                else f"unknown setting {key!r}" + suggestion(name, sorted(choices))
            )
        changes[homes[0]][name] = value
    return changes
