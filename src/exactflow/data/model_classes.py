"""The class of a model that each class of a data set is, by name."""

import numpy as np

from exactflow.core.model import GenerativeModel
from exactflow.data.classes import listed, numbered
from exactflow.data.datasets import ImageDataset


def classes_in(model: GenerativeModel, dataset: ImageDataset) -> np.ndarray:
    """The number in a conditional model of every class of a data set, by name.

    If either of the two has no class names, numbers are numbers of the model's classes.

    Returns:
        int64 (dataset.num_classes,), to be indexed with the set's labels.

    Raises:
        ValueError: the set has no labels, or a class that is missing in the model.
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
