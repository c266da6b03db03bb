"""The weights that a run has before its first step."""

import numpy as np
import torch

from exactflow.core.model import DataInitialized, GenerativeModel
from exactflow.core.randomness import generator
from exactflow.data.datasets import ImageDataset
from exactflow.models.pretrained import from_pretrained
from exactflow.parallel.process_group import current

SHOWN = 3  # tensors in an error


def start_weights(model: GenerativeModel, location: str) -> None:
    """Give the model the weights and buffers of a saved one.

    Args:
        model: changed in place.
        location: folder or name, as of `from_pretrained`.

    Raises:
        ValueError: the tensors of the two have other names or shapes.
        FileNotFoundError: there is no model.
    """
    state = current().main_first(lambda: from_pretrained(location)).state_dict()
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    differing = [
        f"{name}: {expected.get(name, 'none')} expected, {found.get(name, 'none')} there"
        for name in {**expected, **found}
        if expected.get(name) != found.get(name)
    ]
    if differing:
        more = len(differing) - SHOWN
        raise ValueError(
            f"training.start={location}: expected tensors of the shapes that the model to be "
            f"trained has, found others: {'; '.join(differing[:SHOWN])}"
            + (f"; and {more:,} more" if more > 0 else "")
        )
    model.load_state_dict(state)


def data_dependent_weights(model: GenerativeModel, dataset: ImageDataset, seed: int) -> None:
    """Initialise the parameters that are computed from training images, if there are any."""
    if not isinstance(model, DataInitialized):
        return
    count = min(model.initial_images, len(dataset))
    name = ("initialization", count)
    if dataset.shards is None:
        rows = torch.randperm(len(dataset), generator=generator(seed, *name))[:count].numpy()
    else:  # images of one group of shards, not of all that are elsewhere
        rows = dataset.epoch_order(seed, 0)[:count]
    images = torch.as_tensor(dataset.images[np.sort(rows)]).to(model.device)
    model.initialize(images, generator=generator(seed, *name, device=model.device))
