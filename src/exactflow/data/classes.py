"""Classes by name: which class of a model a label of the data means, or a word."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from exactflow.core.model import GenerativeModel

if TYPE_CHECKING:
    from exactflow.data.datasets import ImageDataset

SHOWN = 10  # names in an error


def numbered(count: int) -> tuple[str, ...]:
    """The names "0", "1", ... of classes that have no other."""
    return tuple(str(number) for number in range(count))


def class_number(word: str, names: Sequence[str], of: str) -> int:
    """The class of that name; or of that number, unless classes are called by numbers.

    Args:
        word: name or number.
        names: of the classes 0, 1, ...
        of: whose classes these are, for errors.

    Raises:
        ValueError: there is none, with the nearest name.
    """
    if word in names:
        return names.index(word)
    if word.isdecimal() and int(word) < len(names) and not any(n.isdecimal() for n in names):
        return int(word)
    near = difflib.get_close_matches(word, names, n=1)
    known = f"did you mean {near[0]!r}?" if near else f"expected one of {listed(names)}"
    raise ValueError(f"{of} has no class {word!r}: {known}")


def classes_in(model: GenerativeModel, dataset: ImageDataset) -> np.ndarray:
    """The number in a conditional model of every class of a set, by its name.

    Where one of the two names no classes, numbers are numbers of the model's classes.

    Returns:
        int64 (dataset.num_classes,), to be indexed with the set's labels.

    Raises:
        ValueError: the set has no labels, or a class that the model has not.
    """
    if dataset.labels is None:
        raise ValueError(
            f"a model of {model.num_classes} classes needs labels, the {dataset.split} split of "
            f"{dataset.id} has none"
        )
    known, found, count = model.class_names, dataset.class_names, len(dataset.class_names)
    unnamed = found == numbered(count) and not any(name.isdecimal() for name in known)
    if unnamed or not known:
        if count > model.num_classes or (count < model.num_classes and not unnamed):
            raise ValueError(
                f"the model has {model.num_classes} classes, {dataset.id} has {count}: "
                f"{listed(found)}"
            )
        return np.arange(count)
    foreign = [name for name in found if name not in known]
    if foreign:
        raise ValueError(
            f"expected the classes of the model, {listed(known)}; {dataset.id} also has "
            f"{listed(foreign)}"
        )
    number_of = {name: number for number, name in enumerate(known)}
    return np.array([number_of[name] for name in found], dtype=np.int64)


def listed(names: Sequence[str]) -> str:
    """Names for people, not all of very many."""
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown}, ... ({len(names):,} in all)"
