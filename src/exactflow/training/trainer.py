"""The training loop: the weights are a function of (model, data, configuration), whatever stops it.

A step is a transaction: batch and noise are functions of the seed and the step's number, and
weights move only once loss and gradient are known to be finite in all processes.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from exactflow.core.main_guard import require_main_guard
from exactflow.core.model import GenerativeModel, NonFiniteError
from exactflow.core.progress import Advance, shown_progress
from exactflow.core.randomness import derive_seed, generator
from exactflow.core.saved_run import RunState
from exactflow.data.augmentation import NO_AUGMENTATION, Augmentation
from exactflow.data.datasets import ImageDataset
from exactflow.data.loader import Batch, Share, training_batches
from exactflow.parallel.process_group import Processes, joined
from exactflow.parallel.shared_batch import shared_by
from exactflow.training import checkpoint as disk
from exactflow.training.compatible import check_compatible
from exactflow.training.diagnosis import diagnose, save_batch
from exactflow.training.distributed import DataParallel
from exactflow.training.folder import RunFolder, as_run_folder
from exactflow.training.log import MetricsLog
from exactflow.training.optim import MovingAverage, TrainConfig, make_optimizer, recomputed
from exactflow.training.progress import Callback, FitResult, Progress, with_metrics
from exactflow.training.reversible import reversible
from exactflow.training.saving import Saver
from exactflow.training.session import Clock, Interrupted, StopRequest, stop_requests
from exactflow.training.start import data_dependent_weights, start_weights
from exactflow.training.tensors import RunTensors

UNEXPLAINED = (
    "Run once more, every micro-batch is finite by itself: the sum of the gradients overflows, "
    "or compiled and plain evaluation differ."
)
ENDED = "ended"  # in the last line of a run that a callback ended
_Part = tuple[Tensor, Tensor | None]  # images and labels of a micro-batch


def fit(
    model: GenerativeModel,
    dataset: ImageDataset,
    config: TrainConfig,
    run_dir: str | Path | RunFolder,
    *,
    augmentation: Augmentation = NO_AUGMENTATION,
    every: Mapping[int, Callback] | None = None,
    tensorboard: bool = False,
    progress: bool = True,
) -> FitResult:
    """Train `model` where it is (device, dtype), or resume its training in `run_dir`.

    Afterwards the model is in eval mode and has the averaged weights where there is an average.
    Under torchrun all processes train it together; weights, log and losses do not depend on how
    many there are, but for rounding and dropout. Callbacks are called in every process.

    Args:
        model: trained in place.
        dataset: images and labels; labels are ignored by an unconditional model.
        config: how to train.
        run_dir: folder of checkpoints and log. One that holds a checkpoint of the same run is
            resumed; a finished run returns at once, or takes the further steps that are asked for.
        augmentation: random changes of training images.
        every: callbacks by the number of steps between calls; each is also called at the end.
            The numbers that they return are logged.
        tensorboard: log to `run_dir/tensorboard` too.
        progress: show progress on stderr.

    Raises:
        ValueError: model, data and configuration do not fit together, or `run_dir` holds a
            checkpoint of another run, or another process trains in it.
        NonFiniteError: the loss or a gradient is not finite; the step was not applied.
        ProcessLostError: another process, or one that loads images, ended.
        Interrupted: SIGTERM or SIGINT came; the state is saved.
        OSError: a file could not be written.
        RuntimeError: a helper imports the script, see `core/main_guard.py`.
    """
    require_main_guard()
    check_compatible(model, dataset)
    model.class_names = dataset.class_names if model.num_classes else ()
    place = as_run_folder(run_dir)
    cuda = [model.device] if model.device.type == "cuda" else []
    with ExitStack() as stack:
        group = stack.enter_context(joined())
        stack.enter_context(group.explained_loss())
        group.on_main(lambda: stack.enter_context(place.locked()))
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        run = _Run(model, dataset, config, place.path, augmentation, every or {}, group)
        group.on_main(place.write_record)
        stack.enter_context(closing(run.saver))
        return run.finish(tensorboard, progress)


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
        group: Processes,
    ) -> None:
        if any(interval < 1 for interval in every):
            raise ValueError(f"expected callbacks every 1 step or more, got {sorted(every)}")
        self.dataset, self.config, self.group = dataset, config, group
        self.dir, self.augmentation, self.every = run_dir, augmentation, every
        self.schedule = config.schedule(len(dataset))
        self.identity = disk.identity(model, dataset, config, augmentation)
        checkpoints = disk.Checkpoints(run_dir / "checkpoints", config.keep_checkpoints)
        found = group.on_main(checkpoints.newest)
        if found is None:
            if config.start is None:
                data_dependent_weights(model, dataset, config.seed)
            else:
                start_weights(model, config.start)
        else:
            asked = disk.grown(found, self.identity, self.schedule.total, len(dataset))
            found.require(asked, disk.defaults(model, config))
        self.parallel = DataParallel(model, config, group)
        self.model = self.parallel.trained
        self.optimizer = make_optimizer(self.model, config)
        self.average = None
        if config.ema_decay:
            warmup = (config.ema_warmup, config.ema_power)
            self.average = MovingAverage(self.model, config.ema_decay, *warmup)
        tensors = RunTensors(self.model, self.optimizer, self.average, self.parallel.is_split)
        self.saver = Saver(checkpoints, tensors, self.parallel.is_split, group)
        self.state = RunState()
        self.logged = None if found is None else found.log
        if found is not None:
            tensors.restore(found)
            self.state, self.saver.last = found.state, found
        self.clock = Clock(self.state.seconds, self.state.step_seconds)
        self.signum: int | None = None  # of the signal to stop, once all processes know of it
        self.ended = False  # by a callback, before the last step

    def finish(self, tensorboard: bool, progress: bool) -> FitResult:
        """Take the remaining steps; arguments as of `fit`."""
        total, done, group = self.schedule.total, self.state.step, self.group
        with ExitStack() as stack:
            stages = self.model.stages
            stack.enter_context(recomputed(stages, self.config.activation_checkpointing))
            stack.enter_context(reversible(self.model, self.config.reversible))
            log = MetricsLog(self.dir, done, tensorboard, group, self.logged)
            stack.enter_context(closing(log))
            quiet = not (progress and group.is_main)
            shown = shown_progress(total, "training", unit="steps", done=done, quiet=quiet)
            advance = stack.enter_context(shown)
            stop = stack.enter_context(stop_requests())
            with self.saver.naming_last_checkpoint():
                return self._take_steps(log, advance, stop)

    def _take_steps(self, log: MetricsLog, advance: Advance, stop: StopRequest) -> FitResult:
        batches = self._prepare() if self.state.step < self.schedule.total else iter(())
        if log.last_step == self.state.step:
            self.state = self.state.logged()
            # The line was written after the checkpoint.
            done, self.ended = self.state.step_seconds, bool(log.last.get(ENDED))
            self.clock = Clock(max(self.state.seconds, float(log.last.get("seconds", 0.0))), done)
        self._report(log)  # an interruption may have come between checkpoint and line
        self._read_signal(stop)
        while self.state.step < self.schedule.total and not (self.signum or self.ended):
            with self.clock.step():
                loss = self._step(next(batches), stop)
            self._read_signal(stop)
            advance(1, f"loss {loss:.4f}, {self._images_per_second():.1f} images/s")
            if self._is_due(self.config.checkpoint_every):
                self._save(log)
            if self.signum is None:
                self._report(log)  # after saving: callbacks may take long
                self._read_signal(stop)
        if self.saver.saved_step < self.state.step:
            self._save(log)
        self.saver.settle()
        self.parallel.finish(None if self.signum else self.average)
        if self.signum is not None:
            raise Interrupted(self.state.step, self.signum)
        self.parallel.home.eval()
        assert self.saver.last is not None  # the last step always has one
        last = self.saver.last.state
        self.group.barrier()  # the log has its last line
        times = (last.seconds, last.step_seconds)
        return FitResult(last.step, last.images, *times, self.saver.last.folder, log.last)

    def _prepare(self) -> Iterator[Batch]:
        """Put the model into training mode, compile its stages, and return the next batches."""
        self.model.train()
        if self.config.compile:
            for stage in self.model.stages:
                stage.compile()
        ours = (self.group.rank, self.group.count)
        return self._batches(self.state.step, *ours, num_workers=self.config.num_workers)

    def _batches(self, start: int, rank: int, count: int, num_workers: int = 0) -> Iterator[Batch]:
        """The rows that process `rank` of `count` has of each batch from step `start` on."""
        return training_batches(
            self.dataset,
            self.config.batch_size,
            seed=self.config.seed,
            start=start,
            augmentation=self.augmentation,
            num_workers=num_workers,
            share=Share(rank, count, self.config.accumulate),
        )

    def _step(self, batch: Batch, stop: StopRequest) -> float:
        """Take one optimizer step; return its loss, the mean over the batch."""
        step = self.state.step + 1
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        parts = self._split(batch)
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for index in range(len(parts)):
            with self.parallel.micro_batch(last=index == len(parts) - 1):
                loss = self._loss(self.parallel.loss, step, index, parts[index])
                (loss / len(parts)).backward()
            losses.append(loss.detach())
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        norm = self.parallel.whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        # The one synchronisation of a step: weights may not move before both are known to be
        # finite, and the processor must not run ahead of that.
        mean, size = torch.stack([torch.stack(losses).mean(), norm.to(losses[0])]).tolist()
        mean, size = self._reduce_step_status(mean, size, stop)
        if not (math.isfinite(mean) and math.isfinite(size)):
            raise self._failure(step, parts, buffers, f"loss {mean}, gradient norm {size}")
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

    def _reduce_step_status(
        self, loss: float, norm: float, stop: StopRequest
    ) -> tuple[float, float]:
        """The mean loss and the largest gradient norm of all processes.

        Signals to stop and the state of checkpoint files are exchanged in the same message: all
        processes stop after the same step, and give the same checkpoint its name.
        """
        if self.group.count == 1:
            return loss, norm
        written = self.saver.has_written
        row = [loss, norm, float(stop.signum or 0), float(written)]
        rows = self.group.gather_rows(torch.tensor(row, dtype=torch.float64))
        signals = [int(signum) for signum in rows[:, 2].tolist() if signum]
        self.signum = signals[0] if signals else None
        if bool(rows[:, 3].all()):
            self.saver.settle()
        return float(rows[:, 0].mean()), float(rows[:, 1].max())

    def _read_signal(self, stop: StopRequest) -> None:
        """Note a signal to stop; several processes exchange theirs with the next step's status."""
        if self.group.count == 1:
            self.signum = stop.signum

    def _split(self, batch: Batch) -> list[_Part]:
        """The micro-batches of a step, on the model's device; no labels without classes."""
        device, count = self.model.device, self.config.accumulate
        images = batch.images.to(device, non_blocking=True).chunk(count)
        if self.model.num_classes == 0 or batch.labels is None:
            return [(part, None) for part in images]
        labels = batch.labels.to(device, non_blocking=True).chunk(count)
        return list(zip(images, labels, strict=True))

    def _loss(self, evaluate: Callable[..., Tensor], step: int, index: int, part: _Part) -> Tensor:
        """Mean loss of a micro-batch; all its noise is a function of (seed, step, index).

        That is the same in all processes, each of which takes its own rows of it; only the masks of
        dropout also depend on the rank.
        """
        name = ("training", step, index)
        torch.manual_seed(derive_seed(self.config.seed, *name, self.group.rank, "global"))
        device, images, label = self.model.device, *part
        noise = generator(self.config.seed, *name, 0, device=device)
        reduced = self.config.precision == "bfloat16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=reduced):
            return evaluate(images, label, noise).mean()

    def _failure(
        self, step: int, parts: list[_Part], buffers: list[Tensor], found: str
    ) -> NonFiniteError:
        """The error to raise for a step that is not finite; the model is as it was before it."""
        path = self.dir / f"nonfinite_step_{step:06d}.pt"
        kept = self.group.on_main(lambda: self._keep_batch(path, step))
        _restore_buffers(self.model, buffers)
        self.parallel.finish(None)
        model = self.parallel.home.train()

        def again(index: int) -> Tensor:
            return self._loss(model, step, index, parts[index])

        with shared_by(self.group.rank, self.group.count):
            findings = self.group.gather(diagnose(model, again, len(parts)))
        _restore_buffers(model, buffers)
        which = next((rank for rank, text in enumerate(findings) if text is not None), None)
        report = UNEXPLAINED if which is None else str(findings[which])
        if which is not None and self.group.count > 1:
            report = f"In process {which} of {self.group.count}: {report}"
        return NonFiniteError(
            f"step {step} is not finite ({found}) and was not applied. {report}\nThe batch {kept}."
        )

    def _keep_batch(self, path: Path, step: int) -> str:
        """Write the batch of all processes; return where it is, or why it could not be written."""
        batch = next(self._batches(step - 1, 0, 1))
        try:
            save_batch(path, batch.images, batch.labels, step, self.config.seed)
        except OSError as error:
            return f"is not kept: {error}"
        return f"is kept in {path}"

    def _is_due(self, interval: int) -> bool:
        """Whether this step is a multiple of `interval`, or the last."""
        return self.state.step % interval == 0 or self.state.step == self.schedule.total

    def _report(self, log: MetricsLog) -> None:
        """Call callbacks and write a log line, if either is due and this step has no line yet."""
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
            line = with_metrics(line, self._measure(call))
        if calls and any(self.group.gather(self.ended)):
            self.ended, line[ENDED] = True, 1.0
        log.write(line)
        self.state = state.logged()
        self.clock.lap()

    def _measure(self, call: Callback) -> Mapping[str, float] | None:
        """Call a callback with the averaged model, in eval mode."""
        clock, state = self.clock, self.state
        with self.parallel.averaged(self.average) as model:
            model.eval()
            try:
                times = (clock.seconds, clock.step_seconds)
                return call(Progress(state.step, state.images, *times, model, self.dir, self._end))
            finally:
                model.train()

    def _end(self) -> None:
        self.ended = True

    def _images_per_second(self) -> float:
        return self.clock.steps_per_second * self.config.batch_size

    def _save(self, log: MetricsLog) -> None:
        log.sync()
        times = {"seconds": self.clock.seconds, "step_seconds": self.clock.step_seconds}
        self.saver.save(replace(self.state, **times), self.identity, log.state)


@torch.no_grad()
def _restore_buffers(model: GenerativeModel, buffers: list[Tensor]) -> None:
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
