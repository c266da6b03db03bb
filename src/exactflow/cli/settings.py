"""Settings of a run: a preset, a YAML file and KEY=VALUE words, resolved in that order."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from exactflow.cli.words import merge, parse_words, read_file
from exactflow.core.config import override
from exactflow.core.devices import pick_device
from exactflow.core.doors import as_flow
from exactflow.core.model import Flow, GenerativeModel
from exactflow.core.saved_run import CHECKPOINTS_FOLDER
from exactflow.data import DataConfig, DataError, ImageDataset, Split, load
from exactflow.data.classes import class_number, numbered
from exactflow.data.config import located
from exactflow.data.datasets import identify
from exactflow.metrics.bits_per_dim import with_labels
from exactflow.models import registry
from exactflow.models.pretrained import (
    from_pretrained,
    recorded_data,
    recorded_reading,
    shipped_model,
)
from exactflow.training.settings import CONFIG_FILE, Settings, settings_of

NULL_LABEL = "null"  # how the dropped label is called, unless a class is


def resolve(
    preset_name: str | None, words: Sequence[str], file: Path | None, *, reads_data: bool = True
) -> Settings:
    """Preset, then file, then words.

    Raises:
        ValueError: what is unknown, with a suggestion; no data source, for one who `reads_data`.
            For others it is then called FOLDER.
    """
    changes = read_file(file) if file else {}
    in_file = changes.pop("preset", None)
    preset_name = preset_name or in_file
    if not isinstance(preset_name, str):
        raise ValueError(f"expected a preset: {', '.join(registry.names())}")
    preset_name = str(preset_name)  # plain text, not what a file's reader marked as typed
    preset = registry.preset(preset_name)
    merge(changes, parse_words(words))
    if not reads_data and "source" not in {**preset.data, **changes.get("data", {})}:
        merge(changes, {"data": {"source": "FOLDER"}})
    return settings_of(preset_name, changes)


def data_of(model: GenerativeModel, location: str | Path, words: Sequence[str]) -> DataConfig:
    """The data a saved model was trained on, with changes: as its run or else its card says.

    The same set under another name is read as it was for the training, but for what is changed; of
    another set nothing of that reading applies.

    Args:
        model: as it was loaded.
        location: where it was loaded from.
        words: `data.FIELD=VALUE`, the changes.

    Raises:
        ValueError: the model does not say, and no data.source is given.
    """
    changes = parse_words(words, ("data",)).get("data", {})
    place, file = Path(location).absolute(), None
    if place.is_dir() and shipped_model(location) is None:
        # A run, its model, its checkpoints or one of them.
        run = place.parent.parent if place.parent.name == CHECKPOINTS_FOLDER else place.parent
        files = [folder / CONFIG_FILE for folder in (place, run)]
        file = next((file for file in files if file.is_file()), None)
    recorded = recorded_reading(model) if file is None else read_file(file).get("data", {})
    if "source" not in {**recorded, **changes}:
        known = recorded_data(model)
        if "id" in known:
            told = f"was trained on {known['id']} (version {known.get('version')})"
        else:
            told = "does not say what it was trained on"
        raise ValueError(f"{location} {told}: give data.source=...")
    data = override(DataConfig(), {**recorded, **changes})
    if "source" in changes and recorded:
        then = override(DataConfig(), recorded)
        now = replace(then, source=data.source, validation=data.validation)
        same = "source" in recorded and located(now.source) == located(then.source)
        if not same and not _is_known(model, now):
            return override(DataConfig(), changes)
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
