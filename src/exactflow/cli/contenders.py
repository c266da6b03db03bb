"""Who takes part in a comparison: saved models, and presets trained under a budget."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import torch

from exactflow.cli.settings import load_model, resolve
from exactflow.cli.terminal import note
from exactflow.comparison.expected_time import expected_seconds
from exactflow.comparison.protocol import Contender, Failure, Protocol, scored, subset
from exactflow.core.config import override
from exactflow.core.model import GenerativeModel, NonFiniteError
from exactflow.data import DataConfig, ImageDataset
from exactflow.data.model_classes import classes_in
from exactflow.metrics.bits_per_dim import check_fits
from exactflow.metrics.memo import Memo
from exactflow.metrics.memory import PeakMemory
from exactflow.models import registry, shipped
from exactflow.models.pretrained import recorded_data, recorded_guidance
from exactflow.parallel.process_group import ALONE, current
from exactflow.runs import Run, read_metrics
from exactflow.training import Progress, TrainConfig
from exactflow.training.budget import Budget, steps_within, training_flops
from exactflow.training.log import LOG_FILE
from exactflow.training.settings import Settings

WATCHED = Protocol(images=250, estimate_images=32, bound_evaluations=10, ode_steps=10)
FIRST_IMAGES = 4096  # seen before held-out images are first scored; then at every doubling
WARMUP_PART = 10  # the learning rate rises in a tenth of a budget's steps


@final
class Contenders:
    """The models of a comparison, one after the other: presets are trained when they are due.

    Args:
        names: presets, shipped models, run folders, model folders or hub ids.
        data: where the images are.
        training: the training split, for presets.
        held_out: scored in the course of a training.
        budget: of each training.
        folder: with a run folder for each preset, which is resumed where it stands.
        device: where models are trained and measured.

    Raises:
        ValueError: a name that is neither, two models of one name, or a model that does not fit
            the images or was trained on others.
    """

    def __init__(
        self,
        names: Sequence[str],
        data: DataConfig,
        training: ImageDataset,
        held_out: ImageDataset,
        budget: Budget,
        folder: Path,
        device: torch.device,
    ) -> None:
        self._data, self._training, self._held_out = data, training, held_out
        self._budget, self._folder, self._device = budget, folder, device
        self._names = {_plain_name(name): name for name in names}
        if len(self._names) < len(names):
            raise ValueError(f"expected a name for each model, got {', '.join(names)}")
        for name in names:  # now, and not after hours of the others' training
            if name in registry.names():
                with torch.device("meta"):
                    model = self._settings(name).build()
                check_fits(model, training)
            else:
                model = self._loaded(name)
            if model.num_classes:
                classes_in(model, held_out)

    def __iter__(self) -> Iterator[Contender | Failure]:
        """Each one, trained; or why its training failed.

        Raises:
            Interrupted: SIGTERM or SIGINT came; the state is saved.
        """
        for number, (shown, name) in enumerate(self._names.items(), 1):
            note(f"{shown} ({number} of {len(self._names)})")
            try:
                yield self._trained(name) if name in registry.names() else self._saved(shown, name)
            except NonFiniteError as error:
                yield Failure(shown, f"in training, {error}")

    def announce(self, protocol: Protocol) -> None:
        """Say what will be done, and how long it takes: in the worst case, of all of it anew."""
        trained = [name for name in self._names.values() if name in registry.names()]
        parts = []
        if trained:
            parts.append(f"train {', '.join(trained)} for {self._budget} each")
        parts.append(f"measure {len(self._names)} by {protocol.images:,} images at most")
        measuring = [self._expected(name, protocol) for name in self._names.values()]
        known = sum(seconds for seconds in measuring if seconds is not None)
        unknown = measuring.count(None)
        note(f"to do: {', then '.join(parts)} and {protocol.samples:,} samples of each")
        trainings = self._budget.seconds
        if trainings is not None:
            known += trainings * len(trained)
        note(
            f"expected: about {_minutes(known)} at most"
            + (" and the trainings" if trained and trainings is None else "")
            + (f" and {unknown} models whose first samples are not finite" if unknown else "")
            + "; what was measured before is not measured again, and Ctrl-C loses nothing"
        )

    def _expected(self, name: str, protocol: Protocol) -> float | None:
        """Seconds that one model is measured, trained or not; None if it cannot be told."""
        if name in registry.names():
            settings = self._settings(name)
            model, guidance = settings.build().to(self._device).eval(), settings.guidance
            if model.closed_form:  # which has no density before it is fitted
                return 0.0
        else:
            model = self._loaded(name)
            guidance = recorded_guidance(model)
        try:
            return expected_seconds(model, self._held_out, protocol, guidance)
        except NonFiniteError:
            return None

    def _loaded(self, name: str) -> GenerativeModel:
        """The saved model, if it was not trained on another version of the data."""
        if not (Path(name).exists() or "/" in name or name in shipped.NAMES):
            registry.preset(name)  # raises, with the nearest names
        model = load_model(name, self._device.type)
        check_fits(model, self._training)
        recorded = recorded_data(model)
        ours = self._training.describe()
        for key in ("version", "preprocessing_hash") if recorded else ():
            if recorded[key] != ours[key]:
                raise ValueError(
                    f"{name} was trained on {_identity_of(recorded)}: expected "
                    f"{_identity_of(ours)}, as it is compared here"
                )
        return model

    def _saved(self, shown: str, name: str) -> Contender:
        """With what its card and its run folder tell of its training."""
        model = self._loaded(name)
        facts: dict[str, Any] = {}
        data = recorded_data(model)
        if data and data["fingerprint"] != self._training.fingerprint:
            facts["other_images"] = f"{data['count']:,}, fingerprint {data['fingerprint'][:12]}"
        run = Path(name)
        if (run / LOG_FILE).is_file():
            last = read_metrics(run)[-1]
            facts |= {"images_seen": last["images"], "seconds": last["seconds"]}
            facts["step_seconds"] = last.get("step_seconds")
            facts |= _work(model, last["images"])
        return Contender(shown, model, facts, guidance=recorded_guidance(model))

    def _trained(self, name: str) -> Contender:
        folder, settings = self._folder / name, self._settings(name)
        model = settings.build().to(self._device)
        peak = PeakMemory(self._device)
        memo = Memo(folder, self._identity(settings))
        every = {1: _Watch(self._held_out, 1, 1)}
        if not model.closed_form:
            settings = replace(settings, training=self._recipe(settings, model, memo))
            config = settings.training
            assert config.steps is not None
            interval = max(1, FIRST_IMAGES // config.batch_size)
            every = {interval: _Watch(self._held_out, interval, config.steps)}
        run = Run(settings, model, self._training, folder)
        result = run.fit(every, sys.stderr.isatty())
        memory = memo.keep("training-memory", {}, lambda: {"bytes": peak.bytes()})
        facts = {
            "steps": result.step,
            "batch_size": settings.training.batch_size,
            "images_seen": result.images_seen,
            "seconds": result.seconds,
            "step_seconds": result.step_seconds,
            "peak_memory": memory["bytes"],
        }
        run.save(result, cost=facts)
        lines = [line for line in read_metrics(folder) if "bits_per_dim" in line]
        curve = [{n: line[n] for n in ("step_seconds", "images", "bits_per_dim")} for line in lines]
        facts |= _work(model, result.images_seen)
        return Contender(name, model, facts, curve, settings.guidance)

    def _recipe(self, settings: Settings, model: GenerativeModel, memo: Memo) -> TrainConfig:
        """The preset's, as long as the budget lasts."""
        config, augmentation = settings.training, settings.data.augmentation

        def measure() -> dict[str, int]:
            found = steps_within(
                self._budget, model, self._training, config, augmentation=augmentation
            )
            return {"steps": found}

        steps = memo.keep("budget", {}, measure, together=True)["steps"]
        changes = {"steps": steps, "warmup_steps": steps // WARMUP_PART, "fine_tuning_epochs": 0.0}
        return override(config, changes)

    def _settings(self, name: str) -> Settings:
        """The preset's recipe on the data of the comparison."""
        settings = resolve(name, (f"data.source={self._data.source}",), None)
        augmentation = {n: getattr(settings.data, n) for n in ("flip", "translate", "padding")}
        return replace(settings, data=replace(self._data, **augmentation)).fitted(self._training)

    def _identity(self, settings: Settings) -> dict[str, Any]:
        """What the number of steps of a budget depends on."""
        return {
            "budget": str(self._budget),
            "recipe": asdict(settings.training),
            "images": self._training.fingerprint,
            "device": self._device.type,
            "threads": torch.get_num_threads(),
            **({} if current() == ALONE else {"processes": current().count}),
        }


@final
@dataclass(frozen=True)
class _Watch:
    """Callback of `fit`, every `interval` steps: held-out bits/dim at 1, 2, 4, ... and the end."""

    held_out: ImageDataset
    interval: int
    total: int

    def __call__(self, progress: Progress) -> Mapping[str, float]:
        calls, rest = divmod(progress.step, self.interval)
        doubled = rest == 0 and calls.bit_count() == 1
        if not (doubled or progress.step == self.total):
            return {}
        model = progress.model
        images, label = subset(self.held_out, WATCHED.scored_images(model), model)
        found = scored(model, images, label, WATCHED)
        return {"bits_per_dim": found.bits_per_dim} if found.is_code_length else {}


def _work(model: GenerativeModel, images: int) -> dict[str, float]:
    """FLOPs of an image trained on, and of all of them."""
    if model.closed_form:  # closed form: no gradient, hardly any work
        return {}
    each = training_flops(model)
    return {"flops_per_image": each, "flops": each * images}


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def _identity_of(data: Mapping[str, Any]) -> str:
    return f"{data['id']}, version {data['version']} ({data['preprocessing']})"


def _plain_name(place: str) -> str:
    """A preset's name, a run folder's or a hub id's last part."""
    path = Path(place)
    return (path.parent if path.name == "model" else path).name
