"""Checks of the arguments that all verbs share: the model, and the labels."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from exactflow.core.model import Flow, GenerativeModel

LabelsLike = int | Sequence[int] | Tensor | np.ndarray


def require_model(model: object) -> None:
    """Raise ValueError, with a hint, unless this is a model of this package."""
    if isinstance(model, GenerativeModel):
        return
    got = type(model).__name__
    if isinstance(model, str | os.PathLike):
        got = f"{os.fspath(model)!r}: exactflow.from_pretrained loads a model by folder or name"
    elif isinstance(model, nn.Module):
        for name in ("module", "_orig_mod"):  # of DataParallel and DDP; of torch.compile
            if isinstance(getattr(model, name, None), GenerativeModel):
                got += f": give the model inside it, model.{name}"
    raise ValueError(f"expected a model of exactflow, got {got}")


def as_labels(
    model: GenerativeModel, label: object, n: int, *, checked: bool = True
) -> Int[Tensor, " n"] | None:
    """Labels of n images on the model's device: of one class for all, or of n classes.

    Args:
        model: they are moved to its device.
        label: one class, or n of them.
        n: number of images.
        checked: whether they must be classes of the model; False for a classifier's classes.

    Raises:
        ValueError: they are no integers, or no classes of the model.
    """
    if label is None:
        return None
    try:
        labels = torch.as_tensor(label).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"expected integer classes, got {type(label).__name__}") from error
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"expected integer classes, got {labels.dtype}")
    labels = labels.to(torch.int64)
    labels = labels.expand(n).contiguous() if labels.dim() == 0 else labels
    if checked:
        model.check_label(labels, n)
    return labels.to(model.device)


def as_flow(model: GenerativeModel, *, exact: bool = False) -> Flow:
    """The model, if it is a flow, or an exact one. Raises ValueError otherwise."""
    if isinstance(model, Flow) and (model.exact or not exact):
        return model
    raise ValueError(
        f"expected a flow{' with an exact density' if exact else ''}, got a model of kind "
        f"{model.kind!r}, whose likelihood is of kind {model.likelihood_kind!r}"
    )
