"""Closed-form fits in a run folder: what `fit` is to models that are trained, without steps.

The folder looks like any other run's (checkpoint, metrics.jsonl), and the same command on a
finished one returns at once.
"""

import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from exactflow.core.density_flow import FittedFlow
from exactflow.core.main_guard import require_main_guard
from exactflow.core.randomness import generator
from exactflow.core.saved_run import MODEL_FILE, Checkpoint, RunState
from exactflow.data.augmentation import NO_AUGMENTATION, Augmentation
from exactflow.data.datasets import ImageDataset
from exactflow.data.passes import ImagePasses
from exactflow.parallel.process_group import joined
from exactflow.training import checkpoint as disk
from exactflow.training.compatible import check_compatible
from exactflow.training.folder import RunFolder, as_run_folder
from exactflow.training.log import MetricsLog
from exactflow.training.optim import TrainConfig
from exactflow.training.progress import Callback, FitResult, Progress, with_metrics
from exactflow.training.reversible import check_reversible

LOSS_IMAGES = 1000  # training images whose loss the log has


def fit_closed_form(
    model: FittedFlow,
    dataset: ImageDataset,
    config: TrainConfig,
    run_dir: str | Path | RunFolder,
    *,
    augmentation: Augmentation = NO_AUGMENTATION,
    every: Mapping[int, Callback] | None = None,
    tensorboard: bool = False,
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
        progress: show progress on stderr.

    Raises:
        ValueError: model, data and configuration do not fit together, or `run_dir` holds another
            run, or another process trains in it.
        OSError: a file could not be written.
        RuntimeError: as of `fit`.
    """
    require_main_guard()
    check_compatible(model, dataset)
    _check_options(model, config, augmentation)
    place = as_run_folder(run_dir)
    identity = disk.identity(model, dataset, config, augmentation)
    checkpoints = disk.Checkpoints(place.path / "checkpoints", config.keep_checkpoints)

    def fitted() -> Checkpoint:
        state = _fit(model, dataset, config, augmentation.flip, progress)
        weights = {MODEL_FILE: lambda: disk.tensor_bytes(model.state_dict())}
        return checkpoints.save(state, identity, weights)

    with ExitStack() as stack:
        group = stack.enter_context(joined())
        group.on_main(lambda: stack.enter_context(place.locked()))
        found = group.on_main(checkpoints.newest) or group.on_main(fitted)
        found.require(identity, disk.defaults(model, config))
        group.on_main(place.write_record)
        model.load_state_dict(found.weights(model))
        model.eval()
        state = found.state
        with closing(MetricsLog(place.path, state.step, tensorboard, group)) as log:
            if log.last_step < state.step:
                loss = _loss(model, dataset, config.seed)
                log.write(_line(model, state, loss, place.path, (every or {}).values()))
            times = (state.seconds, state.step_seconds)
            return FitResult(state.step, state.images, *times, found.folder, log.last)


def _check_options(model: FittedFlow, config: TrainConfig, augmentation: Augmentation) -> None:
    """Raise ValueError for options that only training by gradients has."""
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


def _fit(
    model: FittedFlow, dataset: ImageDataset, config: TrainConfig, flip: bool, progress: bool
) -> RunState:
    """Fit the model; return the state of the finished run."""
    began = time.perf_counter()
    passes = ImagePasses(dataset, config.batch_size, flip, progress)
    home = model.device
    model.to("cpu" if home.type == "mps" else home)  # MPS has no float64
    model.fit(passes, seed=config.seed, report=_print_to_stderr if progress else None)
    model.to(home)
    seconds = time.perf_counter() - began
    return RunState(1, passes.images, seconds, step_seconds=seconds)


def _line(
    model: FittedFlow, state: RunState, loss: float, folder: Path, callbacks: Iterable[Callback]
) -> dict[str, float]:
    """The line of the log, with the numbers that the callbacks return."""
    line = {"step": state.step, "images": state.images, "seconds": state.seconds}
    line |= {"step_seconds": state.step_seconds, "loss": loss}
    times = (state.seconds, state.step_seconds)
    # The run has ended already when a callback asks for its end.
    progress = Progress(state.step, state.images, *times, model, folder, end=lambda: None)
    for call in callbacks:
        line = with_metrics(line, call(progress))
    return line


@torch.no_grad()
def _loss(model: FittedFlow, dataset: ImageDataset, seed: int) -> float:
    """Mean loss of training images, evenly spaced."""
    every = -(-len(dataset) // LOSS_IMAGES)
    images = torch.tensor(dataset.images[::every], device=model.device)
    noise = generator(seed, "fitted loss", device=model.device)
    return float(model.loss(images, generator=noise).double().mean())


def _print_to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
