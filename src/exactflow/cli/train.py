"""`exactflow train`."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from rich.table import Table

from exactflow.cli.arguments import Train
from exactflow.cli.places import check_apart
from exactflow.cli.settings import CONFIG_FILE, Settings, pick_device, resolve
from exactflow.cli.terminal import note, say
from exactflow.core.model import FittedFlow, GenerativeModel
from exactflow.core.process_group import current
from exactflow.core.random import generator
from exactflow.core.serialization import GUIDANCE
from exactflow.data import ImageDataset, load
from exactflow.likelihood.log_likelihood import log_likelihood
from exactflow.metrics.baselines import Baseline
from exactflow.metrics.bits_per_dim import Evaluation, evaluate, with_labels
from exactflow.paths.chain_model import ChainModel
from exactflow.paths.path_model import PathModel
from exactflow.pictures import grids as pictures
from exactflow.sampling.sample import sample
from exactflow.training import FitResult, Interrupted, Progress, fit
from exactflow.training.compatible import check_compatible
from exactflow.training.fitting import fit_closed_form
from exactflow.training.log import LOG_FILE

LOSS_BATCH = 250


@final
@dataclass(frozen=True)
class Trained:
    """A finished run."""

    settings: Settings
    model: GenerativeModel
    training: ImageDataset
    result: FitResult
    validation: Evaluation | None  # None: to score such a model takes longer than to train it


def run(command: Train) -> None:
    """Train, score the validation split, save the model."""
    settings = resolve(command.preset, command.settings, command.config)
    if command.parallel is not None:
        settings = replace(settings, training=replace(settings.training, parallel=command.parallel))
    folder = command.out or Path("runs") / settings.preset
    trained = train(settings, folder, command.device)
    show(trained, folder)


def train(settings: Settings, folder: Path, device: str) -> Trained:
    """Carry out or resume a run in `folder`; leaves it with model/, config.yaml, metrics.jsonl."""
    check_apart(folder, settings.data)
    group = current()
    training = group.main_first(lambda: load(settings.data, "train"))
    validation = group.main_first(lambda: load(settings.data, "validation"))
    remark = settings.unused_classes(training)
    if remark:
        note(remark)
    settings = settings.fitted(training)
    model = settings.build().to(pick_device(device))
    check_compatible(model, training)  # first, and not what follows from it
    watch = _Watch(settings, model, validation, folder)
    run_config = settings.run
    every = {run_config.sample_every: watch.draw}
    if run_config.evaluate_every == run_config.sample_every:
        every[run_config.sample_every] = watch.both
    else:
        every[run_config.evaluate_every] = watch.score
    options: dict[str, Any] = {
        "augmentation": settings.data.augmentation,
        "every": every,
        "tensorboard": run_config.tensorboard,
        "record": {CONFIG_FILE: settings.text().encode()},
    }
    try:
        if isinstance(model, FittedFlow):
            result = fit_closed_form(model, training, settings.training, folder, **options)
        else:
            result = fit(model, training, settings.training, folder, **options)
    except Interrupted as stop:
        note(str(stop))
        sys.exit(stop.exit_code)
    evaluation = None
    scores: dict[str, Any] = dict(watch.loss(model))
    if not isinstance(model, PathModel):
        evaluation = evaluate(model, validation, progress=sys.stderr.isatty())
        scores = evaluation.describe()
        del scores["data"]
    card = {
        "training data": training.describe(),
        "validation": {**scores, "fingerprint": validation.fingerprint},
        "cost": {
            "steps": result.step,
            "images_seen": result.images_seen,
            "seconds": round(result.seconds, 1),
            "device": str(model.device),
            "threads": torch.get_num_threads(),
            **({"processes": group.count} if group.count > 1 else {}),
            "torch": torch.__version__,
        },
        GUIDANCE: settings.guidance,
    }
    group.on_main(lambda: model.save_pretrained(folder / "model", card=card))
    return Trained(settings, model, training, result, evaluation)


def show(trained: Trained, folder: Path) -> None:
    """The closing table."""
    table = Table(title=f"{trained.settings.preset} on {trained.training.id}")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("parameters", f"{trained.model.num_parameters:,}")
    table.add_row("images seen", f"{trained.result.images_seen:,}")
    table.add_row("training seconds", f"{trained.result.seconds:.1f}")
    if trained.validation is None:
        table.add_row("validation bits/dim", f"exactflow evaluate {folder}")
    else:
        table.add_row(*likelihood_row(trained.validation, "validation"))
        table.add_row("kind", trained.validation.likelihood.kind)
    table.add_row("model", str(folder / "model"))
    say(table)


def likelihood_row(evaluation: Evaluation, split: str) -> tuple[str, str]:
    """Name and value of a likelihood: bits/dim, or why there is none."""
    likelihood = evaluation.likelihood
    if likelihood.kind == "noisy-density":
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


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


@final
class _Watch:
    """What a run looks at on its way: held-out bits/dim and sample grids."""

    def __init__(
        self, settings: Settings, model: GenerativeModel, validation: ImageDataset, folder: Path
    ) -> None:
        count = min(settings.run.evaluation_images, len(validation))
        self.images, self.labels = with_labels(model, validation, slice(count))
        self.samples = settings.run.samples
        self.folder = folder

    def score(self, progress: Progress) -> Mapping[str, float]:
        """Likelihood of validation images, or the loss where that takes a chain or an equation."""
        if isinstance(progress.model, PathModel):
            return self.loss(progress.model)
        likelihood = log_likelihood(progress.model, self.images, self.labels)
        if likelihood.kind == "noisy-density":
            return {"noisy_nats_per_dim": likelihood.nats_per_dim}
        return {
            "bits_per_dim": likelihood.bits_per_dim,
            "standard_error": likelihood.standard_error,
        }

    @torch.no_grad()
    def loss(self, model: GenerativeModel) -> Mapping[str, float]:
        """Mean training loss of validation images, with the same noise every time."""
        noise = generator(0, "validation loss", device=model.device)
        losses = []
        for first in range(0, len(self.images), LOSS_BATCH):
            rows = slice(first, first + LOSS_BATCH)
            label = None if self.labels is None else self.labels[rows].to(model.device)
            losses.append(model.loss(self.images[rows].to(model.device), label, generator=noise))
        return {"validation_loss": float(torch.cat(losses).double().mean())}

    def draw(self, progress: Progress) -> Mapping[str, float]:
        """A grid of samples; the same seeds every time."""
        model, classes = progress.model, progress.model.num_classes
        label = torch.arange(self.samples) % classes if classes else None
        drawn = sample(
            model,
            self.samples,
            label,
            solver="ddim" if isinstance(model, ChainModel) else "auto",  # soon done
            on_nonfinite="omit",
        )
        if drawn.failures:
            note(
                f"step {progress.step}: {len(drawn.failures)} of {self.samples} samples are not "
                "finite, and are left out of the grid"
            )
        if len(drawn.seeds):
            sheet = pictures.grid(drawn.images, model.levels)
            path = self.folder / "samples" / f"step_{progress.step:08d}.png"
            current().on_main(lambda: pictures.save(sheet, path))
        return {"nonfinite_samples": float(len(drawn.failures))}

    def both(self, progress: Progress) -> Mapping[str, float]:
        """`score` and `draw`."""
        return {**self.score(progress), **self.draw(progress)}
