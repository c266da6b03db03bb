"""Parquet files with a column of encoded images, as the Hugging Face hub stores them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, final

import numpy as np

from exactflow.data.config import DataError, Split
from exactflow.data.decode import Payload
from exactflow.data.formats.label_columns import (
    LabelPart,
    find_label_column,
    holds_images,
    read_part,
    with_labels,
)
from exactflow.data.records import (
    RowRecords,
    Source,
    files_by_split,
    local_source,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

_IMAGE_COLUMNS = ("image", "img")  # preferred where several columns hold bytes
_ROWS_PER_READ = 1024


def open_parquet(path: Path) -> Source:
    """Open one parquet file, or a folder of them.

    Files of a folder whose names say train, validation and test (`splits.py`) are its splits;
    otherwise all files together, in the order of their names, are the training split.

    Raises:
        DataError: a file is broken, or there is not exactly one column of images.
        ImportError: pyarrow is missing; the message names the extra.
    """
    groups = files_by_split(path, ".parquet")
    image, label = _find_columns(groups["train"][0])
    records: dict[Split, ParquetRecords] = {}
    parts: dict[Split, list[LabelPart]] = {}
    for split, files in groups.items():
        records[split], parts[split] = _open_split(files, image, label)
    splits, class_names = with_labels(records, {} if label is None else parts)
    files = [file for group in groups.values() for file in group]
    return local_source(path, files, class_names, splits)


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
        with _opened(file) as parquet:
            start = 0
            for group in range(parquet.num_row_groups):
                stop = start + parquet.metadata.row_group(group).num_rows
                wanted = rows[(rows >= start) & (rows < stop)]
                if len(wanted):
                    yield from self._read_group(parquet, group, wanted - start)
                start = stop

    def _read_group(self, parquet: ParquetFile, group: int, rows: np.ndarray) -> Iterator[Payload]:
        start = 0
        batches = parquet.iter_batches(_ROWS_PER_READ, row_groups=[group], columns=[self.column])
        for batch in batches:
            wanted = rows[(rows >= start) & (rows < start + len(batch))] - start
            start += len(batch)
            for value in batch.column(0).take(_pyarrow().array(wanted)).to_pylist():
                yield value["bytes"] if isinstance(value, dict) else value


def _open_split(
    files: Sequence[Path], image: str, label: str | None
) -> tuple[ParquetRecords, list[LabelPart]]:
    """The images in a column of some files, and their labels in another one, if any."""
    counts: list[int] = []
    labels: list[LabelPart] = []
    for file in files:
        with _opened(file) as parquet:
            schema = parquet.schema_arrow
            for name in (image, label):
                if name is not None and name not in schema.names:
                    found = ", ".join(schema.names)
                    raise DataError(f"{file}: expected the column {name}, found {found}")
            counts.append(parquet.metadata.num_rows)
            if label is not None:
                column = parquet.read([label]).column(0)
                labels.append(
                    read_part(column, label, _class_names(schema, label, file), str(file))
                )
    return ParquetRecords(tuple(files), tuple(counts), image), labels


@contextmanager
def _opened(file: Path) -> Iterator[ParquetFile]:
    """An open file. Raises DataError if it is broken, also where it is read."""
    pa = _pyarrow()
    try:
        with pa.parquet.ParquetFile(file) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: expected a complete parquet file, found: {error}") from error


def _find_columns(file: Path) -> tuple[str, str | None]:
    """The columns of the images and of the labels, if any."""
    with _opened(file) as parquet:
        schema = parquet.schema_arrow
    candidates = [field.name for field in schema if holds_images(field.type)]
    preferred = [name for name in candidates if name in _IMAGE_COLUMNS] or candidates
    if len(preferred) != 1:
        raise DataError(
            f"{file}: expected one column of images (binary, or struct with bytes), "
            f"found {', '.join(preferred) or 'none'} among {', '.join(schema.names)}"
        )
    others = {field.name: field.type for field in schema if field.name != preferred[0]}
    return preferred[0], find_label_column(others, str(file))


def _class_names(schema: pa.Schema, label: str, file: Path) -> tuple[str, ...]:
    """The class names that the `datasets` library writes into a file's metadata, if any.

    Raises a DataError for another layout than it writes.
    """
    metadata = (schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return ()
    where = f"{file}: expected metadata as the datasets library writes them"
    try:
        found: Any = json.loads(metadata)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}, found: {error}") from error
    for key in ("info", "features", label, "names"):
        if not isinstance(found, dict):
            raise DataError(f"{where}, found {found!r:.60} in place of what holds {key!r}")
        found = found.get(key)
        if found is None:
            return ()
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise DataError(f"{where}, found {found!r:.60} in place of class names")
    return tuple(found)


def _pyarrow() -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("parquet files need pyarrow: pip install 'exactflow[data]'") from error
    return pyarrow
