"""Bits per dimension of a model on a data set, with the kind of likelihood and the data's name."""

import time
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from exactflow.core.model import GenerativeModel
from exactflow.data.config import DataConfig, Split
from exactflow.data.datasets import ALL, ImageDataset
from exactflow.data.memory import load_data
from exactflow.data.model_classes import classes_in
from exactflow.likelihood.log_likelihood import log_likelihood
from exactflow.likelihood.value import LogLikelihood


@final
@dataclass(frozen=True)
class Evaluation:
    """A likelihood on a data set, with the data's identity and the cost.

    Attributes:
        likelihood: per image, with its kind.
        data: `ImageDataset.describe()`.
        seconds: wall-clock of scoring.
        parameters: of the model.
    """

    likelihood: LogLikelihood
    data: dict[str, Any]
    seconds: float
    parameters: int

    def describe(self) -> dict[str, Any]:
        """Everything but the per-image values, JSON-able; no bits/dim where there is none."""
        likelihood = self.likelihood
        code = likelihood.is_code_length
        error = likelihood.standard_error if code and len(likelihood.nats) > 1 else None
        return {
            "kind": likelihood.kind,
            "bits_per_dim": likelihood.bits_per_dim if code else None,
            "standard_error": error,
            "nats_per_dim": likelihood.nats_per_dim,
            "k": likelihood.k,
            "levels": likelihood.levels,
            "dequantization": _noise_of(likelihood),
            **({"details": dict(likelihood.details)} if likelihood.details else {}),
            "images": len(likelihood.nats),
            "images_per_second": len(likelihood.nats) / self.seconds,
            "seconds": self.seconds,
            "parameters": self.parameters,
            "data": self.data,
        }


def _noise_of(likelihood: LogLikelihood) -> str:
    if not likelihood.is_code_length:
        return "gaussian noise: density of noisy images"
    if likelihood.off_its_data:
        return f"{likelihood.dequantization}; the model was trained on centred images"
    return likelihood.dequantization


def evaluate(
    model: GenerativeModel,
    data: Any,
    *,
    split: Split = "test",
    k: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Evaluation:
    """Score a data set; labels are used where the model is conditional.

    Args:
        model: any.
        data: what `load_data` takes.
        split: of a named source; of images in memory all are scored.
        k: dequantisation draws per image.
        seed: of them.
        batch_size: images scored together.
        progress: show a bar.

    Raises:
        ValueError: shape or grey levels of data and model differ.
    """
    dataset = load_data(data, split if isinstance(data, str | DataConfig) else None)
    check_fits(model, dataset)
    images, label = with_labels(model, dataset)
    began = time.perf_counter()
    options = {"batch_size": batch_size, "progress": progress}
    likelihood = log_likelihood(model, images, label, k, seed, **options)
    seconds = time.perf_counter() - began
    likelihood = replace(likelihood, data=dataset.fingerprint)
    return Evaluation(likelihood, dataset.describe(), seconds, model.num_parameters)


def with_labels(
    model: GenerativeModel, dataset: ImageDataset, rows: slice | np.ndarray = ALL
) -> tuple[Tensor, Tensor | None]:
    """Some images of a set, and where the model is conditional their classes in it, by name.

    Raises:
        ValueError: a conditional model, and images without labels or of a class it has not.
    """
    classes = torch.from_numpy(classes_in(model, dataset)) if model.num_classes else None
    images, label = dataset.tensors(rows)
    return images, None if classes is None or label is None else classes[label]


def check_fits(model: GenerativeModel, dataset: ImageDataset) -> None:
    """Raise ValueError unless shape and grey levels of data and model are the same."""
    if dataset.event_shape != model.event_shape or dataset.levels != model.levels:
        raise ValueError(
            f"the model takes images {model.event_shape} with {model.levels} levels, "
            f"{dataset.id} has {dataset.event_shape} with {dataset.levels}"
        )
