"""Preset, data and folder to a trained model: for Python, command line, demo and comparison."""

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from exactflow.core.density_flow import FittedFlow
from exactflow.core.devices import pick_device
from exactflow.core.model import GenerativeModel
from exactflow.core.process_group import current
from exactflow.core.random import generator
from exactflow.core.serialization import GUIDANCE
from exactflow.data.datasets import ImageDataset, load
from exactflow.likelihood.log_likelihood import log_likelihood
from exactflow.metrics.bits_per_dim import Evaluation, evaluate, with_labels
from exactflow.pictures import grids as pictures
from exactflow.sampling.request import SamplingOptions
from exactflow.sampling.sample import sample
from exactflow.training.compatible import check_compatible
from exactflow.training.fitting import fit_closed_form
from exactflow.training.folder import check_apart
from exactflow.training.log import LOG_FILE
from exactflow.training.progress import Callback, FitResult, Progress
from exactflow.training.settings import CONFIG_FILE, Settings
from exactflow.training.trainer import fit

LOSS_BATCH = 250

log = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class Run:
    """A training in a folder: `fit`, or resume, then `save` the model there.

    Attributes:
        settings: everything that decides it.
        model: to be trained, where it is.
        training: the images.
        folder: gets checkpoints, config.yaml, metrics.jsonl and model/.
    """

    settings: Settings
    model: GenerativeModel
    training: ImageDataset
    folder: Path

    def fit(self, every: Mapping[int, Callback], progress: bool = True) -> FitResult:
        """Train the model in place, by gradients or in closed form; errors as of `fit`.

        Args:
            every: callbacks by the number of steps between calls.
            progress: show progress on stderr.
        """
        settings = self.settings
        options: dict[str, Any] = {
            "augmentation": settings.data.augmentation,
            "every": every,
            "tensorboard": settings.run.tensorboard,
            "record": {CONFIG_FILE: settings.text().encode()},
            "progress": progress,
        }
        model, where = self.model, (self.training, settings.training, self.folder)
        if isinstance(model, FittedFlow):
            return fit_closed_form(model, *where, **options)
        return fit(model, *where, **options)

    def save(self, result: FitResult, **facts: Any) -> None:
        """Write the model folder.

        Args:
            result: of `fit`.
            facts: of the model's card, beside its data, cost and guidance; what is measured of the
                `cost` stands beside what is known of it.
        """
        count = current().count
        cost = {
            "steps": result.step,
            "images_seen": result.images_seen,
            "seconds": round(result.seconds, 1),
            "device": str(self.model.device),
            "threads": torch.get_num_threads(),
            **({"processes": count} if count > 1 else {}),
            "torch": torch.__version__,
            **facts.pop("cost", {}),
        }
        card = {"training data": self.training.describe(), **facts, "cost": cost}
        card[GUIDANCE] = self.settings.guidance
        current().on_main(lambda: self.model.save_pretrained(self.folder / "model", card=card))


@final
@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        model: in eval mode, with the averaged weights where there is an average.
        folder: of the run, which has the model too.
        settings: everything that decided it.
        training: the images it was trained on.
        result: steps, images and seconds.
        validation: score of the validation images; None where that takes longer than to train.
    """

    model: GenerativeModel
    folder: Path
    settings: Settings
    training: ImageDataset
    result: FitResult
    validation: Evaluation | None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of the log, as records: `pandas.DataFrame(trained.history)`."""
        return read_metrics(self.folder)

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The last line of the log."""
        return self.result.metrics


def execute(settings: Settings, folder: Path, device: str = "auto") -> Trained:
    """Train, score the validation split, save the model; or resume it in `folder`.

    Raises:
        ValueError: settings, data and folder do not fit together.
        Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    check_apart(folder, settings.data)
    group = current()
    training = group.main_first(lambda: load(settings.data, "train"))
    validation = group.main_first(lambda: load(settings.data, "validation"))
    remark = settings.unused_classes(training)
    if remark:
        log.warning("%s", remark)
    settings = settings.fitted(training)
    model = settings.build().to(pick_device(device))
    check_compatible(model, training)  # first, and not what follows from it
    run, watch = Run(settings, model, training, folder), _Watch(settings, model, validation, folder)
    result = run.fit(watch.calls(settings))
    evaluation = None
    scores: dict[str, Any] = dict(watch.loss(model))
    if not model.iterative:
        evaluation = evaluate(model, validation, progress=sys.stderr.isatty())
        scores = evaluation.describe()
        del scores["data"]
    run.save(result, validation={**scores, "fingerprint": validation.fingerprint})
    return Trained(model, folder, settings, training, result, evaluation)


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

    def calls(self, settings: Settings) -> dict[int, Callback]:
        """What is done every so many steps."""
        scoring, drawing = settings.run.evaluate_every, settings.run.sample_every
        if scoring == drawing:
            return {scoring: self.both}
        return {drawing: self.draw, scoring: self.score}

    def score(self, progress: Progress) -> Mapping[str, float]:
        """Likelihood of validation images, or the loss where that takes a chain or an equation."""
        if progress.model.iterative:
            return self.loss(progress.model)
        likelihood = log_likelihood(progress.model, self.images, self.labels)
        if not likelihood.is_code_length:
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
            solver=model.quick_solver,
            options=SamplingOptions(on_nonfinite="omit"),
        )
        if drawn.failures:
            log.warning(
                "step %d: %d of %d samples are not finite, and are left out of the grid",
                *(progress.step, len(drawn.failures), self.samples),
            )
        if len(drawn.seeds):
            sheet = pictures.grid(drawn.images, model.levels)
            path = self.folder / "samples" / f"step_{progress.step:08d}.png"
            current().on_main(lambda: pictures.save(sheet, path))
        return {"nonfinite_samples": float(len(drawn.failures))}

    def both(self, progress: Progress) -> Mapping[str, float]:
        """`score` and `draw`."""
        return {**self.score(progress), **self.draw(progress)}
