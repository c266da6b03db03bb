"""`exactflow classify`."""

import time

from rich.table import Table
from torch import Tensor

from exactflow.cli.latent_arguments import Classify
from exactflow.cli.places import check_apart, own_folder
from exactflow.cli.settings import data_of, load_model, some
from exactflow.cli.terminal import say
from exactflow.cli.trained_on import trained_on
from exactflow.core.model import GenerativeModel
from exactflow.core.serialization import write_atomically, write_json
from exactflow.data import ImageDataset
from exactflow.latent.bayes import (
    Classification,
    calibrate,
    check_conditional,
    class_log_likelihoods,
    classification_plot,
    log_posterior,
    log_prior,
)
from exactflow.metrics.bits_per_dim import check_fits, with_labels

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
    data = data_of(model, command.settings)
    out = command.out or own_folder(command.model, "classify")
    check_apart(out, data)
    held_out = some(data, command.split, command.n)
    validation = some(data, "validation", command.calibrate_on)
    (images, truth), (others, seen) = (_labelled(model, s) for s in (held_out, validation))
    other_data = trained_on(model, data, held_out)
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
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "classify.json", summary)
    title = f"{held_out.id}, {command.split}: {len(held_out)} images, temperature {temperature:.2f}"
    picture = classification_plot(found, model.class_names or held_out.class_names, title)
    write_atomically(out / "classify.png", picture)
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
        f"{summary['images_per_second']:.1f} images/s: {out}"
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
    """Images that fit the model, and their labels, which are its classes."""
    check_fits(model, dataset)
    if dataset.labels is not None and dataset.num_classes != model.num_classes:
        raise ValueError(
            f"the model has {model.num_classes} classes, {dataset.id} has {dataset.num_classes}"
        )
    images, labels = with_labels(model, dataset)
    assert labels is not None  # the model is conditional
    return images, labels
