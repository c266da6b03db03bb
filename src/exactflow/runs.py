"""Preset, data and folder to a trained model: for Python, command line, demo and comparison."""

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch

from exactflow.core.config import override
from exactflow.core.density_flow import FittedFlow
from exactflow.core.devices import pick_device
from exactflow.core.model import GenerativeModel
from exactflow.core.randomness import generator
from exactflow.core.serialization import GUIDANCE
from exactflow.data.config import MEMORY, DataConfig
from exactflow.data.datasets import ImageDataset, load, load_source
from exactflow.data.memory import open_memory
from exactflow.likelihood.log_likelihood import log_likelihood
from exactflow.metrics.bits_per_dim import Evaluation, evaluate, with_labels
from exactflow.models import registry
from exactflow.parallel.process_group import current
from exactflow.pictures import grids as pictures
from exactflow.sampling.request import SamplingOptions
from exactflow.sampling.sample import sample
from exactflow.training.compatible import check_compatible
from exactflow.training.fitting import fit_closed_form
from exactflow.training.folder import RunFolder, check_apart
from exactflow.training.log import LOG_FILE
from exactflow.training.optim import TrainConfig
from exactflow.training.progress import Callback, FitResult, Progress, with_metrics
from exactflow.training.settings import CONFIG_FILE, RunConfig, Settings, named_changes, settings_of
from exactflow.training.trainer import fit

LOSS_BATCH = 250
_SIGNS = {"bits_per_dim": 1, "validation_loss": 1, "noisy_nats_per_dim": -1}  # -1: higher is better

Splits = tuple[ImageDataset, ImageDataset]  # for training, and held out

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
            "progress": progress,
        }
        place = RunFolder(self.folder, {CONFIG_FILE: settings.text().encode()})
        model, where = self.model, (self.training, settings.training, place)
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


def train(
    preset_or_model: str | GenerativeModel,
    data: Any,
    out: str | Path,
    *,
    start: str | Path | None = None,
    every: Mapping[int, Callback] | None = None,
    device: str = "auto",
    **settings: Any,
) -> Trained:
    """Train a preset, or a model of one's own, in a folder; the same call resumes it.

    Args:
        preset_or_model: name of a preset; or a model, trained in place.
        data: what `load_data` takes, of which validation images are cut off as
            `data.validation_fraction` says; or two `ImageDataset`, for training and validation.
        out: folder of the run.
        start: model whose weights the training starts from: model folder, run folder, or name of a
            shipped one. The optimizer starts anew.
        every: callbacks by the number of steps between calls, beside those of the run itself.
        device: where to train; "auto" is the accelerator, if any.
        settings: what `exactflow train` takes, by `**{"model.width": 64}` or, where only one
            section has the field, `width=64`.

    Raises:
        ValueError: a setting, the data or the weights to start from do not fit.
        Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    if start is not None:
        settings["training.start"] = str(start)
    own = isinstance(preset_or_model, GenerativeModel)
    config = preset_or_model.config if own else registry.preset(preset_or_model).config
    changes = named_changes(config, settings)
    source: Any = data if isinstance(data, str | DataConfig) else MEMORY
    if isinstance(source, DataConfig):
        changes["data"] = {**asdict(source), **changes["data"]}
    else:
        changes["data"] = {"source": source, **changes["data"]}
    if source == MEMORY:
        changes["data"] = {"test_fraction": 0.0, **changes["data"]}
    if own:
        if changes["model"]:
            raise ValueError(f"expected no settings of a given model, got {list(changes['model'])}")
        given = {"training": TrainConfig(), "data": DataConfig(), "run": RunConfig()}
        made = {name: override(value, changes[name]) for name, value in given.items()}
        chosen = Settings("", config, **made)
    else:
        chosen = settings_of(preset_or_model, changes)
    splits = None if source != MEMORY else _in_memory(data, chosen.data)
    model = preset_or_model if own else None
    return execute(chosen, Path(out), device, model=model, splits=splits, every=every)


def _in_memory(data: Any, config: DataConfig) -> Splits:
    if isinstance(data, tuple | list) and len(data) == 2:
        training, validation = data
        if isinstance(training, ImageDataset) and isinstance(validation, ImageDataset):
            return training, validation
    source = open_memory(data)
    return load_source(source, config, "train"), load_source(source, config, "validation")


def execute(
    settings: Settings,
    folder: Path,
    device: str = "auto",
    *,
    model: GenerativeModel | None = None,
    splits: Splits | None = None,
    every: Mapping[int, Callback] | None = None,
) -> Trained:
    """Train, score the validation split, save the model; or resume it in `folder`.

    Args:
        settings: everything that decides the run.
        folder: of the run.
        device: where to train.
        model: to be trained in place; by default as the settings say.
        splits: images for training and validation; by default as the settings say.
        every: further callbacks.

    Raises:
        ValueError: settings, data and folder do not fit together.
        Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    check_apart(folder, settings.data)
    group = current()
    training, validation = splits or (
        group.main_first(lambda: load(settings.data, "train")),
        group.main_first(lambda: load(settings.data, "validation")),
    )
    if model is None:
        remark = settings.unused_classes(training)
        if remark:
            log.warning("%s", remark)
        settings = settings.fitted(training)
        model = settings.build()
    model = model.to(pick_device(device))
    check_compatible(model, training)  # first, and not what follows from it
    run, looks = Run(settings, model, training, folder), settings.run
    score = ValidationScore(model, validation, looks.evaluation_images)
    scoring = EarlyStopping(score, looks.patience) if looks.patience else score
    drawing = _Grids(looks.samples, folder)
    own = [{looks.evaluate_every: scoring}, {looks.sample_every: drawing}]
    result = run.fit(_together(*own, every or {}))
    evaluation = None
    if model.iterative:
        scores = dict(score.loss(model))
    else:
        evaluation = evaluate(model, validation, progress=sys.stderr.isatty())
        scores = evaluation.describe()
        del scores["data"]
    run.save(result, validation={**scores, "fingerprint": validation.fingerprint})
    return Trained(model, folder, settings, training, result, evaluation)


def _together(*given: Mapping[int, Callback]) -> dict[int, Callback]:
    """Callbacks of one interval as one."""
    found: dict[int, list[Callback]] = {}
    for calls in given:
        for interval, call in calls.items():
            found.setdefault(interval, []).append(call)

    def joined(calls: list[Callback]) -> Callback:
        def call(progress: Progress) -> Mapping[str, float]:
            line: dict[str, float] = {}
            for each in calls:
                line = with_metrics(line, each(progress))
            return line

        return call

    return {interval: joined(calls) for interval, calls in found.items()}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


@final
@dataclass(frozen=True)
class EarlyStopping:
    """Callback of `fit`: end the run once held-out bits/dim have stopped falling.

    The model that remains is that of the last step. What earlier calls found is read from the run's
    log, so that a resumed run ends at the same step.

    Attributes:
        score: callback that finds bits/dim, or what is said of models that have none; see
            `ValidationScore`.
        patience: so many calls in a row without a new lowest value end the run.
    """

    score: Callback
    patience: int = 5

    def __post_init__(self) -> None:
        """Raise ValueError for a patience below one."""
        if self.patience < 1:
            raise ValueError(f"expected a patience of at least 1, got {self.patience}")

    def __call__(self, progress: Progress) -> Mapping[str, float]:
        scores = self.score(progress) or {}
        name = next((name for name in _SIGNS if name in scores), None)
        if name is None:
            raise ValueError(f"expected one of {', '.join(_SIGNS)} to stop by, got {list(scores)}")
        lines = read_metrics(progress.folder) if progress.step > 1 else []
        before = [line[name] for line in lines if name in line and line["step"] < progress.step]
        values = [_SIGNS[name] * float(value) for value in (*before, scores[name])]
        best = values.index(min(values))
        if len(values) - 1 - best >= self.patience:
            progress.end()
        return scores


@final
class ValidationScore:
    """Callback of `fit` that finds bits/dim of held-out images.

    Of a model that is scored by a chain or an equation it finds the loss instead.

    Args:
        model: that is trained.
        dataset: held-out images, of which the first are scored.
        images: how many at most.
    """

    def __init__(self, model: GenerativeModel, dataset: ImageDataset, images: int = 1000) -> None:
        self.images, self.labels = with_labels(model, dataset, slice(min(images, len(dataset))))

    def __call__(self, progress: Progress) -> Mapping[str, float]:
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


@final
@dataclass(frozen=True)
class _Grids:
    """Callback of `fit` that draws a grid of samples; the same seeds every time."""

    samples: int
    folder: Path

    def __call__(self, progress: Progress) -> Mapping[str, float]:
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
