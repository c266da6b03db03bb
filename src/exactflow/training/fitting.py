"""Closed-form fits in a run folder: what `fit` is to models that are trained, without steps.

The folder looks like any other run's (checkpoint, metrics.jsonl), and the same command on a
finished one returns at once.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from exactflow.core.density_flow import FittedFlow
from exactflow.core.main_guard import require_main_guard
from exactflow.core.progress import tracked
from exactflow.core.randomness import generator
from exactflow.data.augmentation import NO_AUGMENTATION, Augmentation
from exactflow.data.datasets import ImageDataset
from exactflow.data.loader import evaluation_batches
from exactflow.parallel.process_group import joined
from exactflow.training import checkpoint as disk
from exactflow.training.compatible import check_compatible
from exactflow.training.folder import held, write_record
from exactflow.training.log import MetricsLog
from exactflow.training.optim import TrainConfig
from exactflow.training.progress import Callback, FitResult, Progress
from exactflow.training.reversible import check_reversible

LOSS_IMAGES = 1000  # training images whose loss the log has


def fit_closed_form(
    model: FittedFlow,
    dataset: ImageDataset,
    config: TrainConfig,
    run_dir: str | Path,
    *,
    augmentation: Augmentation = NO_AUGMENTATION,
    every: Mapping[int, Callback] | None = None,
    tensorboard: bool = False,
    record: Mapping[str, bytes] | None = None,
    progress: bool = True,
) -> FitResult:
    """Fit `model` where it is; afterwards it is in eval mode. Counts as one step.

    Of several processes the main one does it.

    Args:
        model: fitted in place.
        dataset: images; labels are not used.
        config: batch size, which changes nothing but memory, and seed.
        run_dir: folder of checkpoint and log. One that holds the same fit is read, not fitted.
        augmentation: with flips, every image counts twice, as it is and mirrored.
        every: callbacks, all called once, at the end; their numbers are logged.
        tensorboard: log to `run_dir/tensorboard` too.
        record: files of `run_dir` that describe the run, by name; a refused run writes none.
        progress: show progress on stderr.

    Raises:
        ValueError: model, data and configuration do not fit together, or `run_dir` holds another
            run, or another process trains in it.
        OSError: a file could not be written.
        RuntimeError: as of `fit`.
    """
    require_main_guard()
    check_compatible(model, dataset)
    if config.reversible:
        check_reversible(model)
    if config.start is not None:
        raise ValueError(
            f"a fit in closed form starts from no weights: expected start=None, got {config.start}"
        )
    if augmentation.translate:
        raise ValueError(
            "a fit in closed form takes flips but no shifts: expected translate=0, "
            f"got {augmentation.translate}"
        )
    folder = Path(run_dir)
    identity = disk.identity(model, dataset, config, augmentation)
    checkpoints = disk.Checkpoints(folder / "checkpoints", config.keep_checkpoints)

    def fitted() -> disk.Checkpoint:
        state = _fit(model, dataset, config, augmentation.flip, progress)
        weights = {disk.MODEL_FILE: lambda: disk.tensor_bytes(model.state_dict())}
        return checkpoints.save(state, identity, weights)

    with ExitStack() as stack:
        group = stack.enter_context(joined())
        group.on_main(lambda: stack.enter_context(held(folder)))
        found = group.on_main(checkpoints.newest) or group.on_main(fitted)
        found.require(identity, disk.defaults(model, config))
        group.on_main(lambda: write_record(folder, record or {}))
        model.load_state_dict(found.weights(model))
        model.eval()
        state = found.state
        times = (state.seconds, state.step_seconds)
        with closing(MetricsLog(folder, state.step, tensorboard, group)) as log:
            if log.last_step < state.step:
                loss = _loss(model, dataset, config.seed)
                log.write(_line(model, state, loss, folder, (every or {}).values()))
            return FitResult(state.step, state.images, *times, found.folder, log.last)


def _fit(
    model: FittedFlow, dataset: ImageDataset, config: TrainConfig, flip: bool, progress: bool
) -> disk.RunState:
    """Fit the model; where the run stands afterwards."""
    began = time.perf_counter()
    passes = GreyLevelPasses(dataset, config.batch_size, flip, progress)
    home = model.device
    model.to("cpu" if home.type == "mps" else home)  # MPS has no float64
    model.fit(passes, seed=config.seed, report=_say if progress else None)
    model.to(home)
    seconds = time.perf_counter() - began
    return disk.RunState(1, passes.images, seconds, step_seconds=seconds)


def _line(
    model: FittedFlow,
    state: disk.RunState,
    loss: float,
    folder: Path,
    callbacks: Iterable[Callback],
) -> dict[str, float]:
    """The log's line, with the numbers that the callbacks return."""
    line = {"step": state.step, "images": state.images, "seconds": state.seconds}
    line |= {"step_seconds": state.step_seconds, "loss": loss}
    times = (state.seconds, state.step_seconds)
    told = Progress(state.step, state.images, *times, model, folder, _ended_already)
    for call in callbacks:
        line |= {name: float(value) for name, value in (call(told) or {}).items()}
    return line


@final
class GreyLevelPasses:
    """The images of a set, batch by batch, as often as one asks.

    Args:
        dataset: where they are.
        batch_size: images at a time.
        flip: also give every batch mirrored.
        progress: show a bar for every pass.
    """

    def __init__(
        self, dataset: ImageDataset, batch_size: int, flip: bool = False, progress: bool = False
    ) -> None:
        self._dataset, self._batch_size, self._flip = dataset, batch_size, flip
        self._progress = progress
        self.images = 0  # given so far

    def __iter__(self) -> Iterator[Tensor]:
        count = -(-len(self._dataset) // self._batch_size)
        batches = evaluation_batches(self._dataset, self._batch_size)
        for batch in tracked(batches, count, "reading", shown=self._progress):
            for images in [batch.images, batch.images.flip(-1)][: 2 if self._flip else 1]:
                self.images += len(images)
                yield images


@torch.no_grad()
def _loss(model: FittedFlow, dataset: ImageDataset, seed: int) -> float:
    """Mean loss of training images, evenly spread."""
    every = -(-len(dataset) // LOSS_IMAGES)
    images = torch.tensor(dataset.images[::every], device=model.device)
    noise = generator(seed, "fitted loss", device=model.device)
    return float(model.loss(images, generator=noise).double().mean())


def _ended_already() -> None:
    """What a callback may ask for: there is one step only."""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
