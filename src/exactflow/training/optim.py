"""Configuration of a training, its learning rates, optimizers and moving average of weights."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, final, get_args, get_origin

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from exactflow.core.model import GenerativeModel
from exactflow.training.muon import Muon

_FUSED_DEVICES = frozenset({"cpu", "cuda"})


@final
@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained; with the model, the data and the seed it determines every weight."""

    batch_size: int = 128  # images per optimizer step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches per optimizer step, to save memory; divides batch_size
    epochs: float = 100.0  # passes over the data
    steps: int | None = None  # optimizer steps; given, it replaces epochs
    optimizer: Literal["adamw", "adamax", "muon"] = (
        "adamw"  # without weight_decay Adam; muon: for layers' matrices, adamw for the rest
    )
    learning_rate: float = 1e-4  # peak, reached at the end of the warm-up
    muon_learning_rate: float = 0.02  # peak of muon's part, which rises and falls with the other
    min_learning_rate: float = 1e-6  # what the rate falls to
    decay: Literal["cosine", "linear", "exponential"] = "cosine"  # how it falls
    decay_factor: float = 1.0  # of the exponential, at every optimizer step; 1: constant
    fine_tuning_epochs: float = 0.0  # the last so many of the epochs are at min_learning_rate
    warmup_epochs: float = 1.0  # passes of linear warm-up; at most half of the run is used
    warmup_steps: int | None = None  # optimizer steps of warm-up; given, it replaces warmup_epochs
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the first and second moment
    weight_decay: float = 1e-4  # on every parameter; decoupled in AdamW
    clip_norm: float | None = 1.0  # largest norm of the gradient of all parameters; None: no limit
    ema_decay: float = 0.0  # of the moving average of weights, after its warm-up; 0: no average
    ema_warmup: Literal["ratio", "power", "none"] = (
        "ratio"  # (1 + t) / (10 + t), 1 - (1 + t)^-power
    )
    ema_power: float = 0.75  # p of the warm-up "power"
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16: by autocast, weights float32
    compile: bool = False  # torch.compile each stage of the model; needs a C++ compiler
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"  # how processes share the model
    activation_checkpointing: bool = False  # recompute stages in the backward pass, to save memory
    reversible: bool = False  # flows: recover blocks' inputs in the backward pass, to save memory
    start: str | None = None  # model folder, run folder or shipped model whose weights come first
    seed: int = 0  # of the order of the data and of all training noise
    num_workers: int = 0  # processes that prepare batches; 0: none but this one
    log_every: int = 10  # steps between lines of metrics.jsonl
    checkpoint_every: int = 500  # steps between checkpoints; the last step always has one
    keep_checkpoints: int = 2  # how many of the newest are kept

    def __post_init__(self) -> None:
        """Raise ValueError for the first field out of its range."""
        counts = ("batch_size", "log_every", "checkpoint_every", "keep_checkpoints")
        positive = ("epochs", "learning_rate", "muon_learning_rate")
        others = ("warmup_epochs", "weight_decay", "seed", "num_workers")
        choices = {f.name: get_args(f.type) for f in fields(self) if get_origin(f.type) is Literal}
        rules = {name: (getattr(self, name) >= 1, "at least 1") for name in counts}
        rules |= {n: (0 < getattr(self, n) < math.inf, "a positive number") for n in positive}
        rules |= {n: (0 <= getattr(self, n) < math.inf, "0 or more") for n in others}
        rules |= {
            "accumulate": (
                self.accumulate >= 1 and self.batch_size % self.accumulate == 0,
                f"a divisor of batch_size={self.batch_size}",
            ),
            "steps": (self.steps is None or self.steps >= 1, "None or at least 1"),
            "min_learning_rate": (
                0 <= self.min_learning_rate <= self.learning_rate,
                f"0 .. learning_rate={self.learning_rate}",
            ),
            "ema_power": (self.ema_power > 0, "a positive number"),
            "decay_factor": (0 < self.decay_factor <= 1, "in (0, 1]"),
            "fine_tuning_epochs": (
                0 <= self.fine_tuning_epochs < self.epochs
                and not (self.fine_tuning_epochs and self.steps),
                f"less than epochs={self.epochs}, and 0 where steps are given",
            ),
            "warmup_steps": (self.warmup_steps is None or self.warmup_steps >= 0, "None or >= 0"),
            "betas": (all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
            "clip_norm": (
                self.clip_norm is None or self.clip_norm > 0,
                "None or a positive number",
            ),
            "ema_decay": (0 <= self.ema_decay < 1, "in [0, 1)"),
            "reversible": (
                not (self.reversible and (self.activation_checkpointing or self.compile)),
                "False with activation_checkpointing, which it includes, or with compile",
            ),
        }
        rules |= {n: (getattr(self, n) in c, " or ".join(map(repr, c))) for n, c in choices.items()}
        for name, (holds, expected) in rules.items():
            if not holds:
                raise ValueError(
                    f"TrainConfig.{name}: expected {expected}, got {getattr(self, name)!r}"
                )

    @property
    def unsplit(self) -> str:
        """The setting, as NAME=VALUE, that needs all parameters in every process; "" if none."""
        if self.optimizer == "muon":  # works on whole matrices
            return "training.optimizer=muon"
        return "training.reversible=true" if self.reversible else ""

    def micro_batch(self, processes: int) -> int:
        """Images that each process takes at once: its part of a micro-batch.

        Raises:
            ValueError: the batch cannot be divided into equal parts.
        """
        parts = processes * self.accumulate
        if parts < 1 or self.batch_size % parts:
            raise ValueError(
                f"expected a batch size that {processes} processes times {self.accumulate} "
                f"micro-batches divide, got {self.batch_size}"
            )
        return self.batch_size // parts

    def schedule(self, num_images: int) -> "Schedule":
        """The run's length and learning rates on a data set of `num_images` images.

        Raises:
            ValueError: `warmup_steps` is not less than the run's steps.
        """
        epoch = max(num_images // self.batch_size, 1)  # as the loader counts: no smaller batch
        total = total_steps(self.steps, self.epochs, epoch)
        falling = max(1, total - round(self.fine_tuning_epochs * epoch))
        warmup = self.warmup_steps
        if warmup is None:
            warmup = min(round(self.warmup_epochs * epoch), falling // 2)
        if warmup >= falling:
            raise ValueError(
                f"TrainConfig.warmup_steps: expected less than the run's {falling} steps, "
                f"got {warmup}"
            )
        factor = self.decay_factor if self.decay == "exponential" else None
        rates = (self.learning_rate, self.min_learning_rate)
        return Schedule(total, warmup, *rates, factor, falling, self.decay == "linear")


def total_steps(steps: int | None, epochs: float, epoch: int) -> int:
    """Optimizer steps of a run: `steps` if given, else those of `epochs` of `epoch` steps each."""
    return max(1, round(epochs * epoch)) if steps is None else steps


@final
@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step.

    A linear warm-up from `low` to `peak`, then low + (peak - low) h with h = (1 + cos(pi f)) / 2,
    or 1 - f for a line, where f rises from 0 to 1. Or a warm-up from 0, then max(low, peak
    factor^n) after n steps.

    Attributes:
        total: optimizer steps of the run.
        warmup: how many of them come before the peak.
        peak: largest rate.
        low: smallest rate after the warm-up.
        factor: of the exponential, per step; None: a cosine or a line.
        falling: step at which these end, and after which the rate is `low` whatever it was.
        linear: a line instead of a cosine.

    >>> Schedule(total=100, warmup=10, peak=1e-3, low=0.0).learning_rate(11)
    0.001
    """

    total: int
    warmup: int
    peak: float
    low: float
    factor: float | None = None
    falling: int | None = None
    linear: bool = False

    def learning_rate(self, step: int) -> float:
        """The rate of optimizer step 1 .. total."""
        done, end = step - 1, self.total if self.falling is None else self.falling
        if done >= end:
            return self.low
        if done < self.warmup:
            start = self.low if self.factor is None else 0.0
            return start + (self.peak - start) * (done / self.warmup)
        if self.factor is not None:
            return max(self.peak * self.factor ** (done - self.warmup), self.low)
        fraction = (done - self.warmup) / max(end - 1 - self.warmup, 1)
        height = 1 - fraction if self.linear else 0.5 * (1 + math.cos(math.pi * fraction))
        return self.low + (self.peak - self.low) * height


def make_optimizer(model: GenerativeModel, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of all trainable parameters, fused where the device allows it.

    The "rate" of a group of parameters is the factor on its learning rate, by the model's rules.
    """
    groups: dict[tuple[float, bool, int], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rule = model.rule_of(name)
            matrices, rate = rule.matrices if config.optimizer == "muon" else 0, rule.rate
            if matrices:
                rate *= config.muon_learning_rate / config.learning_rate
            groups.setdefault((rate, rule.decay, matrices), []).append(parameter)
    described = [
        {
            "params": parameters,
            "rate": rate,
            "lr": rate * config.learning_rate,
            "weight_decay": config.weight_decay if decay else 0.0,
        }
        for (rate, decay, _), parameters in groups.items()
    ]
    if config.optimizer == "muon":
        return _muon(model, described, [matrices for _, _, matrices in groups], config)
    if config.optimizer == "adamax":
        return torch.optim.Adamax(described, config.learning_rate, config.betas)
    devices = {p.device.type for parameters in groups.values() for p in parameters}
    return torch.optim.AdamW(
        described,
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=devices <= _FUSED_DEVICES,
    )


def _muon(
    model: GenerativeModel,
    groups: list[dict[str, Any]],
    matrices: Sequence[int],
    config: TrainConfig,
) -> Muon:
    """Muon over the groups. Raises ValueError for a split model, or one without matrices."""
    from torch.distributed.tensor import DTensor  # takes a while to import

    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "optimizer 'muon' needs whole matrices: expected parallel 'ddp', got parts"
        )
    if not any(matrices):
        raise ValueError(
            "optimizer 'muon' needs a model that says which of its weights are matrices inside of "
            f"layers, as TarFlow does; {model.kind} does not: expected 'adamw' or 'adamax'"
        )
    stacked = [{**group, "matrices": m} for group, m in zip(groups, matrices, strict=True)]
    return Muon(stacked, config.betas)


@contextmanager
def recomputed(stages: Iterable[nn.Module], active: bool) -> Iterator[None]:
    """Activation checkpointing: keep only the inputs of stages, and evaluate these a second time.

    Names of parameters do not change. A stage that writes to its buffers would do so twice.

    Args:
        stages: of a model.
        active: False changes nothing.
    """
    wrapped = list(stages) if active else []
    for stage in wrapped:
        stage.forward = partial(checkpoint, stage.forward, use_reentrant=False)
    try:
        yield
    finally:
        for stage in wrapped:
            del stage.forward  # uncovers the method of the class


@final
class MovingAverage:
    """Exponential moving average of a model's parameters; buffers are always the model's own.

    average <- d average + (1 - d) weights at update t = 0, 1, ..., where d = min(decay, w(t)) and
    the warm-up w(t) is (1 + t) / (10 + t), or 1 - (1 + t)^-power, or 1 for none. It makes the
    average soon forget the initial weights.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        warmup: Literal["ratio", "power", "none"] = "ratio",
        power: float = 0.75,
    ) -> None:
        self._model = model
        self._decay, self._warmup, self._power = decay, warmup, power
        self._live = dict(model.named_parameters())
        self._average = {name: p.detach().clone() for name, p in self._live.items()}

    @property
    def values(self) -> Mapping[str, Tensor]:
        """The averages, by the names of parameters."""
        return self._average

    @torch.no_grad()
    def update(self, t: int) -> None:
        """Add the weights after optimizer step t + 1 to the average."""
        warm = {"ratio": (1 + t) / (10 + t), "power": 1 - (1 + t) ** -self._power, "none": 1.0}
        weight = 1 - min(self._decay, warm[self._warmup])
        torch._foreach_lerp_(list(self._average.values()), list(self._live.values()), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights inside, and its own back afterwards."""
        own = {name: p.detach().clone() for name, p in self._live.items()}
        self.apply()
        try:
            yield
        finally:
            self._set(own)

    def apply(self) -> None:
        """Give the model the averaged weights for good."""
        self._set(self._average)

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the averaged model, under the model's own names."""
        return {**self._model.state_dict(), **self._average}

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        torch._foreach_copy_(list(self._live.values()), [values[name] for name in self._live])
