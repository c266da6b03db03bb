"""The training loop: one function of (model, data, configuration), whatever happens in between.

A step is a transaction: batch and noise are functions of the seed and the step's number, and
weights move only once loss and gradient are known to be finite.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from exactflow.core.model import DataInitialized, GenerativeModel, NonFiniteError
from exactflow.core.random import derive_seed, generator
from exactflow.data.augmentation import NO_AUGMENTATION, Augmentation
from exactflow.data.datasets import ImageDataset
from exactflow.data.loader import Batch, training_batches
from exactflow.training import checkpoint as disk
from exactflow.training.diagnosis import diagnose, save_batch
from exactflow.training.distributed import (
    Clock,
    Display,
    Interrupted,
    ProcessGroup,
    StopRequest,
    stop_requests,
)
from exactflow.training.optim import MovingAverage, TrainConfig, make_optimizer, recomputed
from exactflow.training.reversible import reversible


@final
@dataclass(frozen=True)
class Progress:
    """What a callback is told.

    Attributes:
        step: optimizer steps done.
        images_seen: step times batch size.
        seconds: wall-clock time of the run so far, in all its sessions.
        step_seconds: the part of it that optimizer steps took, without callbacks and files.
        model: in eval mode, with the averaged weights where there is an average. It must be left
            as it is found.
    """

    step: int
    images_seen: int
    seconds: float
    step_seconds: float
    model: GenerativeModel


@final
@dataclass(frozen=True)
class FitResult:
    """How a run ended; attributes as in `Progress`.

    Attributes:
        checkpoint: folder of the last checkpoint.
        metrics: last line of the log.
    """

    step: int
    images_seen: int
    seconds: float
    step_seconds: float
    checkpoint: Path
    metrics: Mapping[str, Any]


Callback = Callable[[Progress], Mapping[str, float]]
_Part = tuple[Tensor, Tensor | None]  # images and labels of a micro-batch


def fit(
    model: GenerativeModel,
    dataset: ImageDataset,
    config: TrainConfig,
    run_dir: str | Path,
    *,
    augmentation: Augmentation = NO_AUGMENTATION,
    every: Mapping[int, Callback] | None = None,
    tensorboard: bool = False,
    progress: bool = True,
) -> FitResult:
    """Train `model` where it is (device, dtype), or resume its training in `run_dir`.

    Afterwards the model is in eval mode and has the averaged weights where there is an average.

    Args:
        model: trained in place.
        dataset: images and labels; labels are ignored by an unconditional model.
        config: how to train.
        run_dir: folder of checkpoints and log. One that holds a checkpoint of the same run is
            resumed, and a finished run returns at once.
        augmentation: random changes of training images.
        every: callbacks by the number of steps between calls; each is also called at the end.
            The numbers that they return are logged.
        tensorboard: log to `run_dir/tensorboard` too.
        progress: show progress on stderr.

    Raises:
        ValueError: model, data and configuration do not fit together, or `run_dir` holds a
            checkpoint of another run.
        NonFiniteError: the loss or a gradient is not finite; the step was not applied.
        Interrupted: SIGTERM or SIGINT came; the state is saved.
        OSError: a file could not be written.
    """
    group = ProcessGroup.from_environment()
    check_compatible(model, dataset)
    run = _Run(model, dataset, config, Path(run_dir), augmentation, every or {}, group)
    cuda = [model.device] if model.device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(recomputed(model.stages, config.activation_checkpointing))
        stack.enter_context(reversible(model, config.reversible))
        log = stack.enter_context(closing(disk.MetricsLog(run.dir, run.state.step, tensorboard)))
        display = Display(run.schedule.total, run.state.step, progress and group.is_main)
        stack.enter_context(closing(display))
        stop = stack.enter_context(stop_requests())
        return run.to_end(log, display, stop)


def check_compatible(model: GenerativeModel, dataset: ImageDataset) -> None:
    """Raise ValueError unless `model` can be trained on `dataset`."""
    if dataset.event_shape != model.event_shape:
        raise ValueError(
            f"the model is made for images of shape {model.event_shape} (channels, height, width), "
            f"the data have {dataset.event_shape}"
        )
    if dataset.levels != model.levels:
        raise ValueError(
            f"the model is made for {model.levels} grey levels, the data have {dataset.levels}"
        )
    if model.num_classes and dataset.labels is None:
        raise ValueError(f"the model has {model.num_classes} classes, the data have no labels")
    if model.num_classes and dataset.num_classes != model.num_classes:
        raise ValueError(
            f"the model has {model.num_classes} classes, the data have {dataset.num_classes}"
        )


@final
class _Run:
    """The state of one call of `fit`, restored from the newest checkpoint, and the loop over it."""

    def __init__(
        self,
        model: GenerativeModel,
        dataset: ImageDataset,
        config: TrainConfig,
        run_dir: Path,
        augmentation: Augmentation,
        every: Mapping[int, Callback],
        group: ProcessGroup,
    ) -> None:
        if any(interval < 1 for interval in every):
            raise ValueError(f"expected callbacks every 1 step or more, got {sorted(every)}")
        self.model, self.dataset, self.config, self.group = model, dataset, config, group
        self.dir, self.augmentation, self.every = run_dir, augmentation, every
        self.schedule = config.schedule(len(dataset))
        self.optimizer = make_optimizer(model, config)
        self.average = None
        if config.ema_decay:
            warmup = (config.ema_warmup, config.ema_power)
            self.average = MovingAverage(model, config.ema_decay, *warmup)
        self.identity = disk.identity(model, dataset, config, augmentation)
        self.checkpoints = disk.Checkpoints(run_dir / "checkpoints", config.keep_checkpoints)
        self.checkpoint = self.checkpoints.newest()
        self.state = disk.RunState()
        if self.checkpoint is not None:
            self._restore(self.checkpoint)
        self.clock = Clock(self.state.seconds, self.state.step_seconds)

    def to_end(self, log: disk.MetricsLog, display: Display, stop: StopRequest) -> FitResult:
        """Take the steps that are left."""
        batches = self._prepare() if self.state.step < self.schedule.total else iter(())
        if log.last_step == self.state.step:
            self.state = self.state.logged()
        self._report(log)  # what an interruption left unsaid
        while self.state.step < self.schedule.total and stop.signum is None:
            with self.clock.step():
                loss = self._advance(next(batches))
            display.update(self.state.step, loss, self._images_per_second())
            if self._is_due(self.config.checkpoint_every):
                self._save(log)
            if stop.signum is None:
                self._report(log)  # after saving: callbacks may take long
        if stop.signum is not None:
            if self.checkpoint is None or self.checkpoint.state.step < self.state.step:
                self._save(log)
            raise Interrupted(self.state.step, stop.signum)
        if self.average is not None:
            self.average.apply()
        self.model.eval()
        assert self.checkpoint is not None  # the last step always has one
        last = self.checkpoint.state
        times = (last.seconds, last.step_seconds)
        return FitResult(last.step, last.images, *times, self.checkpoint.folder, log.last)

    def _prepare(self) -> Iterator[Batch]:
        """The batches that are left, for a model ready to take them."""
        self._initialize()
        self.model.train()
        if self.config.compile:
            for stage in self.model.stages:
                stage.compile()
        return training_batches(
            self.dataset,
            self.config.batch_size,
            seed=self.config.seed,
            start=self.state.step,
            augmentation=self.augmentation,
            num_workers=self.config.num_workers,
            rank=self.group.rank,
            world_size=self.group.world_size,
        )

    def _initialize(self) -> None:
        """Parameters that are read off data, before the first step."""
        if self.state.step or not isinstance(self.model, DataInitialized):
            return
        count = min(self.model.initial_images, len(self.dataset))
        name = ("initialization", count)
        order = generator(self.config.seed, *name)
        rows = torch.randperm(len(self.dataset), generator=order)[:count].sort().values
        images = torch.as_tensor(self.dataset.images[rows.numpy()]).to(self.model.device)
        noise = generator(self.config.seed, *name, device=self.model.device)
        self.model.initialize(images, generator=noise)
        if self.average is not None:
            self.average.restart()

    def _advance(self, batch: Batch) -> float:
        """One optimizer step; its loss, the mean over the batch."""
        step = self.state.step + 1
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        parts = self._split(batch)
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for index in range(len(parts)):
            loss = self._loss(step, index, parts[index])
            (loss / len(parts)).backward()
            losses.append(loss.detach())
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        # The one synchronisation of a step: weights may not move before both are known to be
        # finite, and the processor must not run ahead of that.
        mean = self.group.all_reduce_mean(torch.stack(losses).mean())
        mean, size = torch.stack([mean, norm.to(mean)]).tolist()
        if not (math.isfinite(mean) and math.isfinite(size)):
            raise self._failure(step, batch, parts, buffers, f"loss {mean}, gradient norm {size}")
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * self.schedule.learning_rate(step)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(step - 1)
        self.state = replace(
            self.state,
            step=step,
            images=step * self.config.batch_size,
            loss_sum=self.state.loss_sum + mean,
            grad_norm_sum=self.state.grad_norm_sum + size,
        )
        return mean

    def _split(self, batch: Batch) -> list[_Part]:
        """The micro-batches of a step, on the model's device; no labels for a model without."""
        device, count = self.model.device, self.config.accumulate
        images = batch.images.to(device, non_blocking=True).chunk(count)
        if self.model.num_classes == 0 or batch.labels is None:
            return [(part, None) for part in images]
        labels = batch.labels.to(device, non_blocking=True).chunk(count)
        return list(zip(images, labels, strict=True))

    def _loss(self, step: int, index: int, part: _Part) -> Tensor:
        """Mean loss of a micro-batch; all its noise, dropout too, is a function of its name."""
        name = ("training", step, index, self.group.rank)
        torch.manual_seed(derive_seed(self.config.seed, *name, "global"))
        device, images, label = self.model.device, *part
        noise = generator(self.config.seed, *name, device=device)
        reduced = self.config.precision == "bfloat16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=reduced):
            return self.model.loss(images, label, generator=noise).mean()

    def _failure(
        self, step: int, batch: Batch, parts: list[_Part], buffers: list[Tensor], found: str
    ) -> NonFiniteError:
        """What to raise for a step that is not finite, with the model as it was before it."""
        path = self.dir / f"nonfinite_step_{step:06d}.pt"
        save_batch(path, batch.images, batch.labels, step, self.config.seed)
        _restore_buffers(self.model, buffers)
        report = diagnose(
            self.model, lambda index: self._loss(step, index, parts[index]), len(parts)
        )
        _restore_buffers(self.model, buffers)
        return NonFiniteError(
            f"step {step} is not finite ({found}) and was not applied. {report}\n"
            f"The batch is kept in {path}."
        )

    def _is_due(self, interval: int) -> bool:
        """Whether something happens now that happens every `interval` steps and at the end."""
        return self.state.step % interval == 0 or self.state.step == self.schedule.total

    def _report(self, log: disk.MetricsLog) -> None:
        """Callbacks and a line of the log, if either is due and this step has no line yet."""
        state, config = self.state, self.config
        calls = [call for interval, call in sorted(self.every.items()) if self._is_due(interval)]
        steps = state.step - state.logged_step
        if steps == 0 or not (calls or self._is_due(config.log_every)):
            return
        line = {
            "step": state.step,
            "images": state.images,
            "epoch": state.step / (len(self.dataset) // config.batch_size),
            "loss": state.loss_sum / steps,
            "grad_norm": state.grad_norm_sum / steps,
            "learning_rate": self.schedule.learning_rate(state.step),
            "images_per_second": self._images_per_second(),
            "seconds": self.clock.seconds,
            "step_seconds": self.clock.step_seconds,
        }
        for call in calls:
            metrics = self._measure(call)
            taken = metrics.keys() & line.keys()
            if taken:
                raise ValueError(f"two metrics are called {', '.join(sorted(taken))}")
            line |= {name: float(value) for name, value in metrics.items()}
        log.write(line)
        self.state = state.logged()
        self.clock.lap()

    def _measure(self, call: Callback) -> Mapping[str, float]:
        """What a callback finds out about the averaged model, in eval mode."""
        clock, state = self.clock, self.state
        told = Progress(state.step, state.images, clock.seconds, clock.step_seconds, self.model)
        self.model.eval()
        try:
            with nullcontext() if self.average is None else self.average.applied():
                return call(told)
        finally:
            self.model.train()

    def _images_per_second(self) -> float:
        return self.clock.steps_per_second * self.config.batch_size

    def _save(self, log: disk.MetricsLog) -> None:
        log.sync()
        files = {
            disk.MODEL_FILE: lambda: disk.tensor_bytes(self.model.state_dict()),
            disk.OPTIMIZER_FILE: lambda: disk.optimizer_bytes(self.optimizer.state_dict()),
        }
        average = self.average
        if average is not None:
            files[disk.EMA_FILE] = lambda: disk.tensor_bytes(average.state_dict())
        times = {"seconds": self.clock.seconds, "step_seconds": self.clock.step_seconds}
        state = replace(self.state, **times)
        self.checkpoint = self.checkpoints.save(state, self.identity, files)
        self.group.barrier()

    def _restore(self, found: disk.Checkpoint) -> None:
        found.require(self.identity)
        self.state = found.state
        self.model.load_state_dict(found.tensors(disk.MODEL_FILE))
        self.optimizer.load_state_dict(found.optimizer())
        if self.average is not None:
            self.average.load_state_dict(found.tensors(disk.EMA_FILE))


@torch.no_grad()
def _restore_buffers(model: GenerativeModel, buffers: list[Tensor]) -> None:
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
