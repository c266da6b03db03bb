"""Labels: which column of a table holds them, and which class each label of a source means."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, final

import numpy as np

from exactflow.data.config import DataError, Split
from exactflow.data.records import (
    Records,
    StoredSplit,
    bounded_labels,
    numbered_up_to,
    translated,
    withheld,
)

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

LABEL_COLUMNS = ("label", "labels", "class")
LONGEST_CLASS_NAME = 64  # characters; a longer text is a caption


@final
@dataclass(frozen=True)
class LabelPart:
    """The labels of a split, or of one file or table of it.

    Attributes:
        where: name of the file or table, for errors.
        values: the label of each row: integers, or indices into `names`.
        names: the classes that the file names; empty where its labels are numbers only.
        by_name: whether the labels themselves are names.
        name_of: name of a row, for errors; None: made from `where`.
    """

    where: str
    values: np.ndarray
    names: tuple[str, ...]
    by_name: bool
    name_of: Callable[[int], str] | None = None


def find_label_column(types: Mapping[str, pa.DataType], where: str) -> str | None:
    """The column of labels, if any: one of integers, else one of strings or booleans.

    Args:
        types: types of all columns but that of the images.
        where: name of the file, for errors and for the warning about ignored columns.

    Raises:
        DataError: there are several, or one of another type.
    """
    named = [n for n in types if n in LABEL_COLUMNS and not holds_images(types[n])]  # no masks
    integers = [name for name in named if _kind(types[name]) == "integers"]
    labels = integers or [name for name in named if _kind(types[name]) == "names"]
    if len(labels) > 1:
        raise DataError(f"{where}: expected one label column, found {', '.join(labels)}")
    if named and not labels:
        raise _wrong_type(named[0], types[named[0]], where)
    others = [name for name in types if "label" in name.lower() or name in named]
    others = [name for name in others if name not in labels]
    if others:
        log.warning(
            "%s: left out the columns %s; labels are read from %s",
            where,
            ", ".join(others),
            labels[0] if labels else f"a column called {', '.join(LABEL_COLUMNS)}: it has none",
        )
    return labels[0] if labels else None


def read_part(
    column: pa.ChunkedArray, name: str, class_names: tuple[str, ...], where: str
) -> LabelPart:
    """The labels in a column.

    Args:
        column: the stored column.
        name: its name.
        class_names: names of integer labels, if the file has them.
        where: name of the file, for errors.

    Raises:
        DataError: a label is missing or of another type, or a text cannot be a class name.
    """
    import pyarrow as pa

    if column.null_count:
        raise DataError(f"{where}: expected a label per row, found empty ones")
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_integer(column.type):
        return LabelPart(where, column.to_numpy(), class_names, by_name=False)
    if _kind(column.type) != "names":
        raise _wrong_type(name, column.type, where)
    encoded = column.cast(pa.large_string()).combine_chunks().dictionary_encode()
    names = tuple(encoded.dictionary.to_pylist())
    for text in names:
        if not 0 < len(text) <= LONGEST_CLASS_NAME or "\n" in text:
            raise DataError(
                f"{where}: expected class names of a line of at most {LONGEST_CLASS_NAME} "
                f"characters in the column {name}, found {text[:LONGEST_CLASS_NAME]!r}"
            )
    return LabelPart(where, encoded.indices.to_numpy(), names, by_name=True)


def with_labels(
    records: Mapping[Split, Records], parts: Mapping[Split, Sequence[LabelPart]]
) -> tuple[dict[Split, StoredSplit], tuple[str, ...]]:
    """Stored splits whose labels are indices into the same class names, and these names.

    Every file's labels are read by the names in that file. The classes are those of the training
    split: its names in alphabetical order where labels are names, the names that its first file
    lists where they are integers, numbers where it lists none.

    Args:
        records: the images of every split.
        parts: the labels of every labelled split.

    Raises:
        DataError: some labels are names and others integers, or a label is of no such class.
    """
    if not parts:
        return {split: StoredSplit(images, None) for split, images in records.items()}, ()
    first = parts.get("train", next(iter(parts.values())))[0]
    for part in (part for found in parts.values() for part in found):
        if part.by_name != first.by_name:
            raise DataError(
                f"{part.where}: expected labels of the kind of those in {first.where}, "
                f"found {'names' if part.by_name else 'numbers'}"
            )
    known = {
        split: _integers(found)
        for split, found in parts.items()
        if not withheld([part.values for part in found], found[0].where)
    }
    if first.by_name:
        names = tuple(sorted({name for part in parts.get("train", ()) for name in part.names}))
    else:
        values = [part.values for found in known.values() for part in found]
        names = first.names or numbered_up_to(values)
    labels = {  # a file without names has numbers of the classes
        split: np.concatenate(
            [translated(p.values, p.names or names, names, p.where) for p in found]
        )
        for split, found in known.items()
    }
    splits: dict[Split, StoredSplit] = {
        split: StoredSplit(images, labels.get(split)) for split, images in records.items()
    }
    return splits, names if labels else ()


def _integers(parts: Sequence[LabelPart]) -> list[LabelPart]:
    """The parts of a split with int64 labels."""
    images = sum(len(part.values) for part in parts)
    labels = [bounded_labels(p.values, images, p.name_of or partial(_row, p.where)) for p in parts]
    return [replace(part, values=values) for part, values in zip(parts, labels, strict=True)]


def _row(where: str, row: int) -> str:
    return f"{where}[row {row}]"


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold encoded images."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _kind(kind: pa.DataType) -> Literal["integers", "names"] | None:
    """What labels of this type are."""
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_integer(kind):
        return "integers"
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean)
    return "names" if any(is_text(kind) for is_text in texts) else None


def _wrong_type(name: str, kind: pa.DataType, where: str) -> DataError:
    return DataError(
        f"{where}: expected integers, strings or booleans in the label column {name}, found {kind}"
    )
