"""`exactflow train`."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from exactflow.cli.arguments import Train
from exactflow.cli.settings import resolve
from exactflow.cli.terminal import note, say
from exactflow.metrics.baselines import Baseline
from exactflow.metrics.bits_per_dim import Evaluation
from exactflow.runs import Trained, execute
from exactflow.training import Interrupted
from exactflow.training.settings import Settings


def run(command: Train) -> None:
    """Train, score the validation split, save the model."""
    settings = resolve(command.preset, command.settings, command.config)
    short = {"parallel": command.parallel, "start": command.start}
    given = {name: value for name, value in short.items() if value is not None}
    settings = replace(settings, training=replace(settings.training, **given))
    folder = command.out or Path("runs") / settings.preset
    show(train(settings, folder, command.device))


def train(settings: Settings, folder: Path, device: str) -> Trained:
    """`execute`, but a signal ends the process with a line."""
    try:
        return execute(settings, folder, device)
    except Interrupted as stop:
        note(str(stop))
        sys.exit(stop.exit_code)


def show(trained: Trained) -> None:
    """The closing table."""
    table = Table(title=f"{trained.settings.preset} on {trained.training.id}")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("parameters", f"{trained.model.num_parameters:,}")
    table.add_row("images seen", f"{trained.result.images_seen:,}")
    table.add_row("training seconds", f"{trained.result.seconds:.1f}")
    if trained.validation is None:
        table.add_row("validation bits/dim", f"exactflow evaluate {trained.folder}")
    else:
        table.add_row(*likelihood_row(trained.validation, "validation"))
        table.add_row("kind", trained.validation.likelihood.kind)
    table.add_row("model", str(trained.folder / "model"))
    say(table)


def likelihood_row(evaluation: Evaluation, split: str) -> tuple[str, str]:
    """Name and value of a likelihood: bits/dim, or why there is none."""
    likelihood = evaluation.likelihood
    if not likelihood.is_code_length:
        value = f"{likelihood.nats_per_dim:.4f} (no bits/dim: trained with Gaussian noise)"
        return f"{split} density of noisy images, nats/dim", value
    error = f" ± {likelihood.standard_error:.4f}" if len(likelihood.nats) > 1 else ""
    return f"{split} bits/dim", f"{likelihood.bits_per_dim:.4f}{error}"


def baseline_rows(found: Mapping[str, Baseline]) -> Iterator[tuple[str, str]]:
    """Names and bits/dim of the baselines, on the same images and noise as the model."""
    for name, baseline in found.items():
        likelihood = baseline.likelihood
        error = f" ± {likelihood.standard_error:.4f}" if len(likelihood.nats) > 1 else ""
        yield f"baseline: {name}", f"{likelihood.bits_per_dim:.4f}{error}"
