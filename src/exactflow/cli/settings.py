"""Settings of a run: a preset, a YAML file and KEY=VALUE words, resolved in that order."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
import yaml
from torch import Tensor

from exactflow.cli.words import SECTIONS, TYPED, merge, parse_words, read_file
from exactflow.core.config import checked, override
from exactflow.core.model import Flow, GenerativeModel
from exactflow.core.random import derive_seed
from exactflow.data import DataConfig, DataError, ImageDataset, Split, load
from exactflow.data.classes import class_number, numbered
from exactflow.data.config import located
from exactflow.data.datasets import identify
from exactflow.data.prepared import open_prepared
from exactflow.metrics.bits_per_dim import with_labels
from exactflow.models import registry
from exactflow.models.pretrained import from_pretrained, recorded_data, recorded_reading
from exactflow.training import TrainConfig

CONFIG_FILE = "config.yaml"  # of a run folder
MAX_GRID = 4096  # images
NULL_LABEL = "null"  # how the dropped label is called, unless a class is


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
        """Raise ValueError for intervals and counts below one, and a grid nobody can look at."""
        for name, value in asdict(self).items():
            if name != "tensorboard" and value < 1:
                raise ValueError(f"run.{name}: expected at least 1, got {value}")
        if self.samples > MAX_GRID:
            raise ValueError(f"run.samples: expected at most {MAX_GRID:,}, got {self.samples}")


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

    def text(self) -> str:
        """The content of a run's config.yaml: paths of the data as they are found from anywhere.

        What was typed, where that differs, stands in a section of its own; see `read_file`.
        """
        content = self.describe()
        data, prepared = content["data"], open_prepared(self.data.source)
        paths = ["source", "cache_dir"]
        if prepared is None:
            paths.append("validation")
        else:  # how its source was read; compared with these words as they stand
            default = DataConfig()
            words = prepared.identity.words.items()
            data |= {name: value for name, value in words if data[name] == getattr(default, name)}
        typed = {name: data[name] for name in paths if data[name] is not None}
        data |= {name: located(path) for name, path in typed.items()}
        typed = {name: path for name, path in typed.items() if path != data[name]}
        return yaml.safe_dump({**content, **({TYPED: typed} if typed else {})}, sort_keys=False)

    def fitted(self, dataset: ImageDataset) -> "Settings":
        """With the model's image shape and levels taken from the data unless given.

        So is the number of classes of a conditional model; another stays one without.
        """
        facts = {"image_shape": dataset.event_shape, "levels": dataset.levels}
        if asdict(self.model).get("num_classes"):  # unconditional families have no such field
            facts["num_classes"] = dataset.num_classes
        facts = {name: value for name, value in facts.items() if name not in self.given}
        return replace(self, model=override(self.model, facts))

    def unused_classes(self, dataset: ImageDataset) -> str:
        """Why a model is not trained with classes, where one might expect it; else nothing."""
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
        """The scale that samples of the model are meant to be drawn with; 0 without classes."""
        given = asdict(self.model).get("num_classes")
        return registry.preset(self.preset).guidance if given else 0.0

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
    preset_name = str(preset_name)  # plain text, not what a file's reader marked as typed
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


def data_of(model: GenerativeModel, words: Sequence[str]) -> DataConfig:
    """The data a saved model was trained on, with changes: as its run or else its card says.

    The same set under another name is read as it was for the training, but for what is changed; of
    another set nothing of that reading applies.

    Raises:
        ValueError: the model does not say, and no data.source is given.
    """
    changes = parse_words(words, ("data",)).get("data", {})
    home = model.home
    assert home is not None  # it was loaded
    # A run, its model, or one of its checkpoints.
    run = home.parent.parent if home.parent.name == "checkpoints" else home.parent
    files = [folder / CONFIG_FILE for folder in (home, run)]
    file = next((file for file in files if file.is_file()), None)
    recorded = recorded_reading(model) if file is None else read_file(file).get("data", {})
    if "source" not in {**recorded, **changes}:
        known = recorded_data(model)
        if "id" in known:
            told = f"was trained on {known['id']} (version {known.get('version')})"
        else:
            told = "does not say what it was trained on"
        raise ValueError(f"{home} {told}: give data.source=...")
    data = _made(DataConfig, {**recorded, **changes})
    if "source" in changes and recorded:
        then = _made(DataConfig, recorded)
        now = replace(then, source=data.source, validation=data.validation)
        same = "source" in recorded and located(now.source) == located(then.source)
        if not same and not _is_known(model, now):
            return _made(DataConfig, changes)
    return data


def _is_known(model: GenerativeModel, data: DataConfig) -> bool:
    """Whether a model was trained on this set, whatever it is called here."""
    card = recorded_data(model)
    if not card:
        return False
    try:
        id, version = identify(data)
        if version != card["version"] or id == card["id"]:
            return version == card["version"]
        # a copy under another name, or files that only look like it
        return load(data, "train").fingerprint == card["fingerprint"]
    except (DataError, OSError, ImportError):
        return False


def some(data: DataConfig, split: Split, most: int) -> ImageDataset:
    """At most so many images of a split."""
    limit = most if data.limit is None else min(data.limit, most)
    return load(replace(data, limit=limit), split)


def first_images(
    model: GenerativeModel, dataset: ImageDataset, count: int
) -> tuple[Tensor, Tensor | None]:
    """The first images of a set, and their classes where both model and data have any."""
    rows = slice(count)
    if dataset.labels is None:
        return dataset.tensors(rows)
    images, label = with_labels(model, dataset, rows)
    return images, None if label is None else label.to(model.device)


def labels_named(model: GenerativeModel, words: Sequence[str]) -> list[int]:
    """Classes of a model by their names or numbers. Raises ValueError for a word that is none."""
    if words and not model.num_classes:
        raise ValueError(f"expected no label for a model without classes, got {words[0]!r}")
    names = model.class_names or numbered(model.num_classes)
    null = {} if NULL_LABEL in names else {NULL_LABEL: model.null_label}
    return [
        null[word] if word in null else class_number(word, names, "the model") for word in words
    ]


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


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
