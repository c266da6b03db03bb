"""Settings of a run: a preset, a YAML file and KEY=VALUE words, resolved in that order."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
import yaml
from torch import Tensor

from exactflow import registry
from exactflow.core.config import checked, override, suggestion
from exactflow.core.model import Flow, GenerativeModel
from exactflow.core.random import derive_seed
from exactflow.data import DataConfig, ImageDataset, Split, load
from exactflow.hub.pretrained import from_pretrained
from exactflow.training import TrainConfig

SECTIONS = ("model", "training", "data", "run")


@final
@dataclass(frozen=True)
class RunConfig:
    """What a run looks at on its way."""

    evaluate_every: int = 500  # steps between scores of held-out images
    sample_every: int = 500  # steps between sample grids
    samples: int = 16  # images in a grid
    evaluation_images: int = 1000  # at most so many validation images are scored on the way
    tensorboard: bool = False  # also log to TensorBoard (extra `track`)

    def __post_init__(self) -> None:
        """Raise ValueError for intervals and counts below one."""
        for name, value in asdict(self).items():
            if name != "tensorboard" and value < 1:
                raise ValueError(f"run.{name}: expected at least 1, got {value}")


@final
@dataclass(frozen=True)
class Settings:
    """Everything that decides a run."""

    preset: str
    model: Any
    training: TrainConfig
    data: DataConfig
    run: RunConfig
    given: frozenset[str] = frozenset()  # fields of the model that were set by name

    def describe(self) -> dict[str, Any]:
        """The sections as YAML and JSON hold them."""
        sections = {name: _plain(asdict(getattr(self, name))) for name in SECTIONS}
        return {"preset": self.preset, **sections}

    def fitted(self, dataset: ImageDataset) -> "Settings":
        """With the model's image shape, levels and classes taken from the data unless given."""
        facts = {"image_shape": dataset.event_shape, "levels": dataset.levels}
        if asdict(self.model).get("num_classes"):  # unconditional families have no such field
            facts["num_classes"] = dataset.num_classes
        facts = {name: value for name, value in facts.items() if name not in self.given}
        return replace(self, model=override(self.model, facts))

    def build(self) -> GenerativeModel:
        """The model with its seeded initial weights."""
        kind = registry.family_of(self.preset).model.kind
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self.training.seed, "initial weights"))
            return registry.from_config(kind, asdict(self.model))


def resolve(
    preset_name: str | None, words: Sequence[str], file: Path | None, *, reads_data: bool = True
) -> Settings:
    """Preset, then file, then words.

    Raises:
        ValueError: what is unknown, with a suggestion; no data source, for one who `reads_data`.
            For others it is then called FOLDER.
    """
    changes = read_file(file) if file else {}
    preset_name = preset_name or changes.get("preset")
    if not isinstance(preset_name, str):
        raise ValueError(f"expected a preset: {', '.join(registry.names())}")
    preset = registry.preset(preset_name)
    merge(changes, parse_words(words))
    if "source" not in {**preset.data, **changes.get("data", {})}:
        if reads_data:
            raise ValueError(
                f"{preset_name} names no data set: give data.source=FOLDER (or another)"
            )
        merge(changes, {"data": {"source": "FOLDER"}})
    return Settings(
        preset_name,
        override(preset.config, changes.get("model", {})),
        override(_made(TrainConfig, preset.training), changes.get("training", {})),
        override(_made(DataConfig, preset.data), changes.get("data", {})),
        override(RunConfig(), changes.get("run", {})),
        frozenset(changes.get("model", {})),
    )


def read_file(path: Path) -> dict[str, Any]:
    """A YAML file's sections. Raises ValueError for anything else, naming file and key."""
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping with {', '.join(('preset', *SECTIONS))}")
    for name, section in content.items():
        if name not in ("preset", *SECTIONS):
            raise ValueError(f"{path}: unknown section {name!r}{suggestion(str(name), SECTIONS)}")
        if name != "preset" and not isinstance(section, dict):
            raise ValueError(f"{path}: expected a mapping under {name!r}, got {section!r}")
    return content


def parse_words(words: Sequence[str], sections: Sequence[str] = SECTIONS) -> dict[str, Any]:
    """`section.field=value` words; values are read as YAML. Raises ValueError for other words."""
    changes: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        section, dot, name = key.partition(".")
        if not equals or not dot or section not in sections:
            near = suggestion(section, sections)
            raise ValueError(f"expected SECTION.FIELD=VALUE, got {word!r}{near}")
        changes.setdefault(section, {})[name] = _value(text)
    return changes


def merge(base: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put the sections of `changes` over those of `base`, field by field."""
    for section, fields in changes.items():
        base[section] = {**base.get(section, {}), **fields}


def data_of(location: str, words: Sequence[str]) -> DataConfig:
    """The data a saved model was trained on, with changes.

    Raises:
        ValueError: the model does not say, and no data.source is given.
    """
    changes = parse_words(words, ("data",)).get("data", {})
    path = Path(location)
    recorded: dict[str, Any] = {}
    # A run, its model/, or one of its checkpoints.
    for file in (f / "config.yaml" for f in (path, path.parent, path.parent.parent)):
        if path.is_dir() and file.exists():
            recorded = read_file(file).get("data", {})
            break
    if "source" in changes and changes["source"] != recorded.get("source"):
        recorded = {}  # another set: nothing of the old one's reading applies
    if "source" not in {**recorded, **changes}:
        raise ValueError(f"{location} does not say what it was trained on: give data.source=...")
    return _made(DataConfig, {**recorded, **changes})


def some(data: DataConfig, split: Split, most: int) -> ImageDataset:
    """At most so many images of a split."""
    limit = most if data.limit is None else min(data.limit, most)
    return load(replace(data, limit=limit), split)


def first_images(
    model: GenerativeModel, dataset: ImageDataset, count: int
) -> tuple[Tensor, Tensor | None]:
    """The first images of a set, and their labels where model and data have classes."""
    images, label = dataset.tensors(slice(count))
    if not model.num_classes or label is None:
        return images, None
    return images, label.to(model.device)


def load_model(location: str, device: str) -> GenerativeModel:
    """A saved model on the device asked for."""
    return from_pretrained(location, device=pick_device(device))


def load_flow(location: str, device: str) -> Flow:
    """A saved flow on the device asked for."""
    return as_flow(load_model(location, device))


def as_flow(model: GenerativeModel) -> Flow:
    """The model, if it is a flow. Raises ValueError otherwise."""
    if not isinstance(model, Flow):
        raise ValueError(f"expected a flow, got a model of kind {model.kind!r}")
    return model


def pick_device(name: str) -> torch.device:
    """The device; "auto" is the accelerator, if any. Raises ValueError for one that is absent."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("expected a CUDA device, found none: --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("expected an MPS device, found none: --device cpu")
    return torch.device(name)


def _made(config: type, fields: Mapping[str, Any]) -> Any:
    return config(**checked(config, fields))


def _value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is not a YAML value: {error}") from error
    if isinstance(value, str):
        try:
            return float(value)  # YAML reads 1e-3, without a point, as text
        except ValueError:
            return value
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
