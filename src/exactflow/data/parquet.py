"""Parquet files with a column of encoded images, as the Hugging Face hub stores them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, final

import numpy as np

from exactflow.data.config import DataError, Split
from exactflow.data.decode import Payload
from exactflow.data.records import (
    RowRecords,
    Source,
    StoredSplit,
    check_labels,
    files_by_split,
    integer_labels,
    local_id,
    numbered_class_names,
    version_and_stamp,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

LABEL_COLUMNS = ("label", "labels", "class")
_IMAGE_COLUMNS = ("image", "img")  # preferred where several columns hold bytes
_ROWS_PER_READ = 1024


def open_parquet(path: Path) -> Source:
    """Open one parquet file, or a folder of them.

    Files of a folder named train-*, validation-* (or val-*, valid-*) and test-* are its splits;
    otherwise all files together, in the order of their names, are the training split.

    Raises:
        DataError: a file is broken, or there is not exactly one column of images.
        ImportError: pyarrow is missing; the message names the extra.
    """
    root = path if path.is_dir() else path.parent
    groups = files_by_split(path, ".parquet")
    columns = _find_columns(groups["train"][0])
    splits: dict[Split, StoredSplit] = {
        split: _open_split(files, columns) for split, files in groups.items()
    }
    class_names = columns.class_names or numbered_class_names(list(splits.values()))
    for split, stored in splits.items():
        check_labels(stored.labels, class_names, f"{path} ({split})")
    version, stamp = version_and_stamp([f for files in groups.values() for f in files], root)
    labelled = any(stored.labels is not None for stored in splits.values())
    return Source(local_id(path), version, stamp, class_names if labelled else (), splits)


@final
@dataclass(frozen=True)
class Columns:
    """Where the images and the labels are; `class_names` is empty where the file names none."""

    image: str
    label: str | None
    class_names: tuple[str, ...]


@final
@dataclass(frozen=True)
class ParquetRecords(RowRecords):
    """The rows of some parquet files, one after the other.

    Attributes:
        column: name of the image column: struct{bytes, path} or plain binary.
    """

    column: str

    def read_file(self, file: Path, rows: np.ndarray) -> Iterator[Payload]:
        """See `RowRecords.read_file`; row groups without any of these are not read."""
        pa = _pyarrow()
        try:
            with pa.parquet.ParquetFile(file) as parquet:
                start = 0
                for group in range(parquet.num_row_groups):
                    stop = start + parquet.metadata.row_group(group).num_rows
                    wanted = rows[(rows >= start) & (rows < stop)]
                    if len(wanted):
                        yield from self._read_group(parquet, group, wanted - start)
                    start = stop
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: expected a complete parquet file, found: {error}") from error

    def _read_group(self, parquet: ParquetFile, group: int, rows: np.ndarray) -> Iterator[Payload]:
        start = 0
        batches = parquet.iter_batches(_ROWS_PER_READ, row_groups=[group], columns=[self.column])
        for batch in batches:
            wanted = rows[(rows >= start) & (rows < start + len(batch))] - start
            start += len(batch)
            for value in batch.column(0).take(_pyarrow().array(wanted)).to_pylist():
                yield value["bytes"] if isinstance(value, dict) else value


def _open_split(files: Sequence[Path], columns: Columns) -> StoredSplit:
    pa = _pyarrow()
    counts: list[int] = []
    labels: list[np.ndarray] = []
    for file in files:
        try:
            with pa.parquet.ParquetFile(file) as parquet:
                _require_columns(file, parquet.schema_arrow, columns)
                counts.append(parquet.metadata.num_rows)
                if columns.label is not None:
                    column = parquet.read([columns.label]).column(0)
                    if column.null_count:
                        raise DataError(f"{file}: expected a label per row, found empty ones")
                    labels.append(column.to_numpy())
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: expected a complete parquet file, found: {error}") from error
    records = ParquetRecords(tuple(files), tuple(counts), columns.image)
    if columns.label is None:
        return StoredSplit(records, None)
    return StoredSplit(records, integer_labels(np.concatenate(labels), str(files[0])))


def _find_columns(file: Path) -> Columns:
    pa = _pyarrow()
    try:
        schema = pa.parquet.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: expected a parquet file, found: {error}") from error
    candidates = [field.name for field in schema if _holds_images(field.type)]
    preferred = [name for name in candidates if name in _IMAGE_COLUMNS] or candidates
    if len(preferred) != 1:
        raise DataError(
            f"{file}: expected one column of images (binary, or struct with bytes), "
            f"found {', '.join(preferred) or 'none'} among {', '.join(schema.names)}"
        )
    integers = [f.name for f in schema if f.name in LABEL_COLUMNS and pa.types.is_integer(f.type)]
    if len(integers) > 1:
        raise DataError(f"{file}: expected one label column, found {', '.join(integers)}")
    label = integers[0] if integers else None
    return Columns(preferred[0], label, _class_names(schema, label, file))


def _require_columns(file: Path, schema: pa.Schema, columns: Columns) -> None:
    for name in (columns.image, columns.label):
        if name is not None and name not in schema.names:
            raise DataError(f"{file}: expected the column {name}, found {', '.join(schema.names)}")


def _holds_images(type_: pa.DataType) -> bool:
    types = _pyarrow().types
    if types.is_struct(type_):
        return type_.get_field_index("bytes") >= 0
    return types.is_binary(type_) or types.is_large_binary(type_)


def _class_names(schema: pa.Schema, label: str | None, file: Path) -> tuple[str, ...]:
    """The class names that `datasets` leaves in the metadata of a file, if any.

    Raises:
        DataError: they are not laid out as it does.
    """
    metadata = (schema.metadata or {}).get(b"huggingface")
    if metadata is None or label is None:
        return ()
    where = f"{file}: expected metadata as the datasets library writes them"
    try:
        found: Any = json.loads(metadata)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}, found: {error}") from error
    for key in ("info", "features", label, "names"):
        if not isinstance(found, dict):
            raise DataError(f"{where}, found {_shown(found)} in place of what holds {key!r}")
        found = found.get(key)
        if found is None:
            return ()
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise DataError(f"{where}, found {_shown(found)} in place of class names")
    return tuple(found)


def _shown(value: object) -> str:
    return repr(value)[:60]


def _pyarrow() -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("parquet files need pyarrow: pip install 'exactflow[data]'") from error
    return pyarrow
