"""Whether a model can be trained on a set of images."""

from exactflow.core.model import GenerativeModel
from exactflow.data.classes import listed
from exactflow.data.datasets import ImageDataset


def check_compatible(model: GenerativeModel, dataset: ImageDataset) -> None:
    """Raise ValueError unless `model` can be trained on `dataset`."""
    if dataset.event_shape != model.event_shape:
        raise ValueError(
            f"the model is made for images of shape {model.event_shape} (channels, height, width), "
            f"the data have {dataset.event_shape}"
        )
    if dataset.levels != model.levels:
        raise ValueError(
            f"the model is made for {model.levels} grey levels, the data have {dataset.levels}"
        )
    if not model.num_classes:
        return
    if dataset.labels is None:
        raise ValueError(f"the model has {model.num_classes} classes, the data have no labels")
    if dataset.num_classes != model.num_classes:
        raise ValueError(
            f"the model has {model.num_classes} classes, the data have {dataset.num_classes}: "
            f"{listed(dataset.class_names)}"
        )
    if model.class_names not in ((), dataset.class_names):
        raise ValueError(
            f"the model has the classes {listed(model.class_names)}, the data have "
            f"{listed(dataset.class_names)}; with model.class_names = () it takes those"
        )
