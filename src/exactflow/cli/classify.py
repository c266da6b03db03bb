"""`exactflow classify`."""

import time

from rich.table import Table
from torch import Tensor

from exactflow.cli.arguments import Classify
from exactflow.cli.opened import opened
from exactflow.cli.terminal import say
from exactflow.cli.trained_on import trained_on
from exactflow.core.model import GenerativeModel
from exactflow.data import ImageDataset
from exactflow.latent.bayes import (
    Classification,
    as_conditional,
    calibrate,
    class_log_likelihoods,
    classification_plot,
    log_posterior,
    log_prior,
)
from exactflow.metrics.bits_per_dim import with_labels

ROWS = {
    "accuracy": "accuracy",
    "negative log-likelihood, nats": "negative_log_likelihood",
    "expected calibration error": "expected_calibration_error",
}


def run(command: Classify) -> None:
    """Fit the temperature to validation images, classify the split, write numbers and a picture."""
    work = opened(command, as_conditional)
    model, prior = work.model, command.prior or None
    log_prior(prior, model.num_classes)  # an error before anything is scored
    held_out = work.images(command.split, command.n)
    validation = work.images("validation", command.calibrate_on)
    (images, truth), (others, seen) = (_labelled(model, s) for s in (held_out, validation))
    other_data = trained_on(model, work.data, held_out)
    began = time.perf_counter()
    nats = _scores(command, model, images)
    seconds = time.perf_counter() - began
    temperature = calibrate(_scores(command, model, others), seen, prior)
    found = {
        "uncalibrated": Classification(log_posterior(nats, prior), truth),
        "calibrated": Classification(log_posterior(nats, prior, temperature), truth),
    }
    summary = {
        "model": command.model,
        "data": held_out.describe(),
        **({"trained on": other_data} if other_data else {}),
        "calibrated_on": validation.describe(),
        "k": command.k,
        "seed": command.seed,
        "prior": list(command.prior) or "uniform",
        "temperature": temperature,
        **{name: classification.describe() for name, classification in found.items()},
        "confusion": found["calibrated"].confusion.tolist(),
        "images_per_second": len(held_out) / seconds,
    }
    title = f"{held_out.id}, {command.split}: {len(held_out)} images, temperature {temperature:.2f}"
    picture = classification_plot(found, model.class_names or held_out.class_names, title)
    work.write(summary, picture)
    table = Table(title=title)
    for name in ("", *found):
        table.add_column(name, justify="right" if name else "left")
    for name, key in ROWS.items():
        table.add_row(name, *(f"{c.describe()[key]:.4f}" for c in found.values()))
    say(table)
    if other_data:
        say(f"the model was trained on {other_data}")
    say(
        f"temperature from {len(validation)} validation images; "
        f"{summary['images_per_second']:.1f} images/s: {work.out}"
    )


def _scores(command: Classify, model: GenerativeModel, images: Tensor) -> Tensor:
    return class_log_likelihoods(
        model,
        images,
        k=command.k,
        seed=command.seed,
        batch_size=command.batch_size,
        progress=True,
    )


def _labelled(model: GenerativeModel, dataset: ImageDataset) -> tuple[Tensor, Tensor]:
    """The images, and their labels, which are classes of the model."""
    if dataset.labels is not None and dataset.num_classes != model.num_classes:
        raise ValueError(
            f"the model has {model.num_classes} classes, {dataset.id} has {dataset.num_classes}"
        )
    images, labels = with_labels(model, dataset)
    assert labels is not None  # the model is conditional
    return images, labels
