"""`exactflow attributes`."""

import numpy as np
import torch
from torch import Tensor

from exactflow.cli.arguments import Attributes
from exactflow.cli.opened import opened
from exactflow.cli.terminal import say
from exactflow.core.doors import as_flow
from exactflow.data import ImageDataset
from exactflow.data.classes import class_number
from exactflow.latent.latent_space import (
    attribute_direction,
    encode_images,
    move,
    reconstruction_error,
)
from exactflow.pictures.figures import image_table


def run(command: Attributes) -> None:
    """Learn the direction from training images, move held-out ones, write pictures and numbers."""
    work = opened(command, as_flow)
    model, held_out = work.model, work.images(command.split)
    training = work.images("train", command.learn_from)
    (_, classes), (known, labels) = _labelled(held_out), _labelled(training)
    attribute = class_number(command.attribute, held_out.class_names, held_out.id)
    others = np.flatnonzero(classes.numpy() != attribute)[: command.n]
    images, _ = held_out.tensors(others)
    if not len(images):
        raise ValueError(f"expected images without {command.attribute!r} to change, found none")

    size = command.batch_size
    latents = encode_images(model, known, batch_size=size, progress=True)
    has = labels == attribute
    direction = attribute_direction(latents, has)
    edit = move(model, encode_images(model, images), direction, command.strengths)
    error = reconstruction_error(model, images, batch_size=size, progress=True)

    names = [held_out.class_names[c] for c in classes[others].tolist()]
    drawn = model.to_grey_levels(edit.x).transpose(0, 1)  # by image, then by strength
    sheet = torch.cat([images[:, None], drawn], dim=1).flatten(0, 1)
    title = (
        f"{held_out.id}: z + s (mean z of “{held_out.class_names[attribute]}” - mean of the rest)"
    )
    columns = ["image", *(f"s = {s:g}" for s in command.strengths)]
    summary = {
        "model": command.model,
        "data": held_out.describe(),
        "direction_from": {"data": training.describe(), "with_attribute": int(has.sum())},
        "attribute": held_out.class_names[attribute],
        "images": others.tolist(),
        "direction_norm": float(direction.norm()),
        "mean_latent_norm": float(latents.flatten(1).norm(dim=1).mean()),
        "strengths": list(command.strengths),
        "certificate": edit.certificate.amax(1).tolist(),
        "reconstruction": error.describe(),
    }
    work.write(summary, image_table(sheet, model.levels, names, columns, title))
    say(
        f"{len(images)} images moved towards {held_out.class_names[attribute]!r}, a direction of "
        f"length {summary['direction_norm']:.2f} from {len(training)} training images; "
        f"decode(encode(x)) is off by {float(error.largest.max()):.1e} at most, "
        f"{int(error.wrong.sum())} grey levels differ: {work.out}"
    )


def _labelled(dataset: ImageDataset) -> tuple[Tensor, Tensor]:
    images, labels = dataset.tensors()
    if labels is None:
        raise ValueError(f"an attribute is a class of the data: {dataset.id} has no labels")
    return images, labels
