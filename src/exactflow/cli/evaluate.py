"""`exactflow evaluate`."""

import time

import torch
from rich.table import Table

from exactflow.cli.arguments import Evaluate
from exactflow.cli.settings import data_of, load_model
from exactflow.cli.terminal import say
from exactflow.cli.train import baseline_rows, likelihood_row
from exactflow.cli.trained_on import trained_on
from exactflow.cli.words import parse_words
from exactflow.core.files import finite, write_json
from exactflow.core.model import GenerativeModel
from exactflow.data import DataConfig, ImageDataset, load
from exactflow.metrics.baselines import Baseline, baselines, training_images
from exactflow.metrics.bits_per_dim import evaluate
from exactflow.models.pretrained import recorded_data
from exactflow.parallel.process_group import current


def run(command: Evaluate) -> None:
    """Score a split and print the number with everything it depends on, beside the baselines'."""
    model = load_model(command.model, command.device)
    data = data_of(model, command.model, command.settings)
    dataset = load(data, command.split)
    other_data = _trained_on(command, model, data, dataset)
    evaluation = evaluate(
        model,
        dataset,
        k=command.k,
        seed=command.seed,
        batch_size=command.batch_size,
        progress=True,
    )
    result = evaluation.describe()
    floor, remark = {}, "none: noisy densities have no bits/dim"
    if evaluation.likelihood.is_code_length:
        floor, remark = _floor(command, data, dataset, model.device)
    table = Table(title=f"{command.model} on {dataset.id}, {command.split}")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row(*likelihood_row(evaluation, command.split))
    for row in baseline_rows(floor):
        table.add_row(*row)
    table.add_row("baselines", remark)
    for name in ("kind", "k", "levels", "dequantization", "images"):
        table.add_row(name, str(result[name]))
    table.add_row("images/s", f"{result['images_per_second']:.1f}")
    table.add_row("data version", dataset.version)
    if other_data:
        table.add_row("trained on", other_data)
    table.add_row("preprocessing", dataset.preprocessing)
    table.add_row("fingerprint", dataset.fingerprint[:16])
    say(table)
    if command.out is not None:
        command.out.parent.mkdir(parents=True, exist_ok=True)
        result["baselines"] = {name: each.describe() for name, each in floor.items()}
        result |= {"trained on": other_data} if other_data else {}
        per_image = {"nats_per_image": evaluation.likelihood.nats.tolist()}
        out, content = command.out, finite({"model": command.model, **result, **per_image})
        current().on_main(lambda: write_json(out, content))


def _trained_on(
    command: Evaluate, model: GenerativeModel, data: DataConfig, dataset: ImageDataset
) -> str:
    """What the model was trained on, where that is not what it is scored on; else nothing.

    Raises:
        ValueError: that is another version of the data, and nobody asked for these by name.
    """
    other_data = trained_on(model, data, dataset)
    named = "source" in parse_words(command.settings, ("data",)).get("data", {})
    if named or recorded_data(model).get("version", dataset.version) == dataset.version:
        return other_data
    raise ValueError(
        f"{command.model} was trained on {other_data}: expected that, found {dataset.id}, version "
        f"{dataset.version}; name data.source to score another set all the same"
    )


def _floor(
    command: Evaluate, data: DataConfig, held_out: ImageDataset, device: torch.device
) -> tuple[dict[str, Baseline], str]:
    """The baselines on the same images and noise, and what they were fitted to or why not."""
    began = time.perf_counter()
    try:
        training = training_images(data, held_out)
    except (ValueError, OSError, ImportError) as error:
        return {}, f"none: no training split to fit to ({error})"
    found = baselines(
        training, held_out, seed=command.seed, k=command.k, device=device, progress=True
    )
    seconds = time.perf_counter() - began
    return found, f"fitted to {len(training):,} training images, dequantized, {seconds:.1f} s"
