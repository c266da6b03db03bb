"""`exactflow classify`."""

import json
import sys
import time
from dataclasses import replace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from exactflow.cli.latent_arguments import Classify
from exactflow.cli.settings import data_of, load_model
from exactflow.core.model import GenerativeModel
from exactflow.core.serialization import write_atomically
from exactflow.data import DataConfig, ImageDataset, Split, load
from exactflow.evaluation.bayes import (
    Classification,
    calibrate,
    check_conditional,
    class_log_likelihoods,
    classification_plot,
    log_posterior,
    log_prior,
)
from exactflow.evaluation.bits_per_dim import check_fits

ROWS = {
    "accuracy": "accuracy",
    "negative log-likelihood, nats": "negative_log_likelihood",
    "expected calibration error": "expected_calibration_error",
}


def run(command: Classify) -> None:
    """Fit the temperature to validation images, classify the split, write numbers and a picture."""
    model = load_model(command.model, command.device)
    check_conditional(model)
    prior = command.prior or None
    log_prior(prior, model.num_classes)  # an error before anything is scored
    data = data_of(command.model, command.settings)
    held_out = _labelled(model, data, command.split, command.n)
    validation = _labelled(model, data, "validation", command.calibrate_on)
    began = time.perf_counter()
    nats = _scores(command, model, held_out)
    seconds = time.perf_counter() - began
    seen, truth = _scores(command, model, validation), _labels(validation)
    temperature = calibrate(seen, truth, prior)
    found = {
        "uncalibrated": Classification(log_posterior(nats, prior), _labels(held_out)),
        "calibrated": Classification(log_posterior(nats, prior, temperature), _labels(held_out)),
    }
    summary = {
        "model": command.model,
        "data": held_out.describe(),
        "calibrated_on": validation.describe(),
        "k": command.k,
        "seed": command.seed,
        "prior": list(command.prior) or "uniform",
        "temperature": temperature,
        **{name: classification.describe() for name, classification in found.items()},
        "confusion": found["calibrated"].confusion.tolist(),
        "images_per_second": len(held_out) / seconds,
    }
    command.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    write_atomically(command.out / "classify.json", text.encode())
    title = f"{held_out.id}, {command.split}: {len(held_out)} images, temperature {temperature:.2f}"
    picture = classification_plot(found, held_out.class_names, title)
    write_atomically(command.out / "classify.png", picture)
    table = Table(title=title)
    for name in ("", *found):
        table.add_column(name, justify="right" if name else "left")
    for name, key in ROWS.items():
        table.add_row(name, *(f"{c.describe()[key]:.4f}" for c in found.values()))
    Console().print(table)
    Console().print(
        f"temperature from {len(validation)} validation images; "
        f"{summary['images_per_second']:.1f} images/s: {command.out}"
    )


def _scores(command: Classify, model: GenerativeModel, dataset: ImageDataset) -> Tensor:
    return class_log_likelihoods(
        model,
        torch.as_tensor(np.array(dataset.images)),
        k=command.k,
        seed=command.seed,
        batch_size=command.batch_size,
        progress=sys.stderr.isatty(),
    )


def _labelled(model: GenerativeModel, data: DataConfig, split: Split, most: int) -> ImageDataset:
    """At most so many images of a split, which fit the model and have its classes."""
    limit = most if data.limit is None else min(data.limit, most)
    dataset = load(replace(data, limit=limit), split)
    check_fits(model, dataset)
    if dataset.num_classes != model.num_classes:
        raise ValueError(
            f"the model has {model.num_classes} classes, {dataset.id} has {dataset.num_classes}"
        )
    if dataset.labels is None:
        raise ValueError(f"expected a conditional model and labels, {dataset.id} has none")
    return dataset


def _labels(dataset: ImageDataset) -> Tensor:
    return torch.as_tensor(np.array(dataset.labels))
