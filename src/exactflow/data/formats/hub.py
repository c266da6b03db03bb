"""Sets of the Hugging Face hub, or folders in its formats, through the `datasets` library.

Always map-style: a streamed and shuffled set cannot be resumed exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, final

import numpy as np

from exactflow.data.config import DataError, Split
from exactflow.data.decode import Payload
from exactflow.data.formats.label_columns import (
    LabelPart,
    find_label_column,
    read_part,
    with_labels,
)
from exactflow.data.records import Records, Source
from exactflow.data.splits import SPLIT_WORDS, named_split

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_ROWS_PER_READ = 256


def open_hub(name: str, cache_dir: str | None) -> Source:
    """Open "owner/name" of the hub, or a local path that `datasets` can load.

    The splits that are called train, validation and test are used (or by the next word for them
    in `splits.py`), others are ignored; where none is called train, those whose names say so.

    Args:
        name: repository id or path, without the "hub:".
        cache_dir: where `datasets` keeps its files; None means its own default.

    Raises:
        DataError: it cannot be loaded, or has no training split or no single image column.
        ImportError: `datasets` is missing; the message names the extra.
    """
    tables = _load(name, cache_dir)
    found = _splits(list(map(str, tables)), name)
    if "train" not in found:
        raise DataError(f"hub:{name}: expected a train split, found {', '.join(map(str, tables))}")
    image, label = _find_columns(tables[found["train"]], name)
    parts: dict[Split, list[LabelPart]] = {
        split: [_labels(tables[key], label, f"hub:{name} ({split})")]
        for split, key in found.items()
        if label is not None and label in tables[key].column_names
    }
    undecoded = _datasets().Image(decode=False)
    records: dict[Split, HubRecords] = {
        split: HubRecords(tables[key].cast_column(image, undecoded), image, f"hub:{name}")
        for split, key in found.items()
    }
    splits, class_names = with_labels(records, parts)
    local = Path(name).expanduser().exists()
    return Source(
        id=Path(name).name if local else name,
        version=str(tables[found["train"]].info.version or "0.0.0"),
        stamp=_stamp(tables),
        class_names=class_names,
        splits=splits,
    )


@final
@dataclass(frozen=True, eq=False)
class HubRecords(Records):
    """The rows of a map-style `datasets.Dataset` whose images are left undecoded."""

    table: Dataset
    column: str
    source: str

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        return f"{self.source}[row {index}]"

    def read(self, indices: np.ndarray) -> Iterator[Payload]:
        for start in range(0, len(indices), _ROWS_PER_READ):
            rows = self.table[indices[start : start + _ROWS_PER_READ].tolist()]
            for value in rows[self.column]:
                yield _payload(value)


def _splits(keys: list[str], name: str) -> dict[Split, str]:
    """Name of each split's table: a split word, or, if none is called train, one that has it."""
    found: dict[Split, str] = {}
    called = {key.lower(): key for key in keys}
    for word, split in SPLIT_WORDS.items():
        if word in called:
            found.setdefault(split, called[word])
    if "train" in found:
        return found
    found = {}
    for key in keys:
        split = named_split(key)
        if split is not None and split in found:
            raise DataError(
                f"hub:{name}: expected one {split} split, found {found[split]} and {key}"
            )
        if split is not None:
            found[split] = key
    return found


def _payload(value: dict[str, bytes | str | None] | None) -> Payload:
    """The bytes, or the file where a table holds just its path."""
    if value is None:
        return None
    encoded, path = value["bytes"], value["path"]
    if isinstance(encoded, bytes):
        return encoded
    return Path(path) if isinstance(path, str) else None


def _load(name: str, cache_dir: str | None) -> DatasetDict:
    datasets = _datasets()
    folder = Path(name).expanduser()
    cache = None if cache_dir is None else str(Path(cache_dir).expanduser() / "datasets")
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            tables = datasets.load_from_disk(str(folder))  # written by save_to_disk
        else:
            tables = datasets.load_dataset(
                str(folder) if folder.exists() else name, cache_dir=cache
            )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"hub:{name}: expected a loadable data set, found: {error}") from error
    if isinstance(tables, datasets.DatasetDict):
        return tables
    return datasets.DatasetDict({"train": tables})


def _find_columns(table: Dataset, name: str) -> tuple[str, str | None]:
    """The names of the image column and of the label column, if any."""
    datasets = _datasets()
    images = [key for key, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if len(images) != 1:
        raise DataError(
            f"hub:{name}: expected one column of images, found {', '.join(images) or 'none'} "
            f"among {', '.join(table.column_names)}"
        )
    types = {field.name: field.type for field in table.features.arrow_schema}
    del types[images[0]]
    return images[0], find_label_column(types, f"hub:{name}")


def _labels(table: Dataset, label: str, where: str) -> LabelPart:
    """The labels of a table, with the class names that it has itself."""
    feature = table.features[label]
    names = tuple(feature.names) if isinstance(feature, _datasets().ClassLabel) else ()
    column = table.select_columns(label).with_format("arrow")[:][label]
    return read_part(column, label, names, where)


def _stamp(tables: DatasetDict) -> str:
    """Hash of names, sizes and times of the Arrow files that hold the tables."""
    stamp = hashlib.sha256()
    for files in tables.cache_files.values():
        for entry in files:
            status = Path(entry["filename"]).stat()
            stamp.update(f"{entry['filename']}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return stamp.hexdigest()


def _datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("hub: sources need datasets: pip install 'exactflow[data]'") from error
    return datasets
