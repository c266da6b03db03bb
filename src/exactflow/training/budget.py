"""The number of optimizer steps that fit a budget of time or of work."""

import dataclasses
import re
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from typing import final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from exactflow.core.model import GenerativeModel
from exactflow.data.augmentation import NO_AUGMENTATION, Augmentation
from exactflow.data.datasets import ImageDataset
from exactflow.parallel.process_group import current
from exactflow.training.fake import fake_copy, loss_of_zeros
from exactflow.training.optim import TrainConfig
from exactflow.training.progress import Progress
from exactflow.training.trainer import fit

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_MARK = 5  # steps of a calibration's warm-up, and between its readings of the clock
_CALIBRATED = 25  # the step at which it ends


@final
@dataclass(frozen=True)
class Budget:
    """The largest cost of a training: seconds of wall-clock, or FLOPs; the other is None.

    Attributes:
        seconds: of taking steps; neither calibration nor what callbacks do counts.
        flops: of all training steps, counted as `training_flops` does.

    >>> Budget.parse("5m")
    Budget(seconds=300.0, flops=None)
    """

    seconds: float | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError unless exactly one is given, and positive."""
        given = [value for value in (self.seconds, self.flops) if value is not None]
        if len(given) != 1 or not 0 < given[0] < float("inf"):
            raise ValueError(
                f"expected a positive number of seconds or of FLOPs, got {self.seconds} and "
                f"{self.flops}"
            )

    @staticmethod
    def parse(text: str) -> "Budget":
        """`90s`, `5m`, `2h` or `1e15flop`. Raises ValueError for anything else."""
        match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)(s|m|h|flop)", text.strip().lower())
        try:
            number = float(match[1]) if match else 0.0
        except ValueError:
            number = 0.0
        if match is None or number <= 0:
            raise ValueError(f"expected a budget such as 90s, 5m, 2h or 1e15flop, got {text!r}")
        unit = match[2]
        return Budget(flops=number) if unit == "flop" else Budget(seconds=number * _UNITS[unit])

    def __str__(self) -> str:
        return f"{self.flops:.3g} FLOP" if self.seconds is None else f"{self.seconds:.4g} s"


def training_flops(model: GenerativeModel) -> float:
    """FLOPs of one image in a training step: its loss and the gradients of all parameters.

    Two for each multiply-add of matrix products, convolutions and attention; a causal mask saves
    nothing here, and sums, norms and activations count nothing (PyTorch's `FlopCounterMode`).
    It takes no memory: on the meta device the count is the same.
    """
    count = 2  # per image: nothing of it is shared by a batch
    counter = FlopCounterMode(display=False)
    # Only the plain kernel of attention is made of operations that the counter knows.
    with fake_copy(model) as (copy, _), sdpa_kernel(SDPBackend.MATH), counter:
        loss_of_zeros(copy.eval(), count).sum().backward()
    return counter.get_total_flops() / count


def steps_within(
    budget: Budget,
    model: GenerativeModel,
    dataset: ImageDataset,
    config: TrainConfig,
    *,
    augmentation: Augmentation = NO_AUGMENTATION,
) -> int:
    """Optimizer steps that fit the budget, at least one.

    A budget of time is divided by the seconds of a step, measured on a copy of the model: the
    schedule of learning rates needs the number of steps before the first. So the run takes a little
    more or less than its budget.
    """
    if budget.flops is not None:
        return max(1, int(budget.flops / (training_flops(model) * config.batch_size)))
    assert budget.seconds is not None
    seconds = seconds_per_step(model, dataset, config, augmentation)
    return max(1, round(budget.seconds / current().gather(seconds)[0]))


def seconds_per_step(
    model: GenerativeModel, dataset: ImageDataset, config: TrainConfig, augmentation: Augmentation
) -> float:
    """Seconds of a step after the first few, on this machine now."""
    total = _CALIBRATED + 1  # the last one writes files
    short = dataclasses.replace(
        config,
        steps=total,
        fine_tuning_epochs=0.0,
        warmup_steps=total // 2,
        checkpoint_every=total,
        log_every=total,
    )
    marks: dict[int, float] = {}

    def note(progress: Progress) -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        marks[progress.step] = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        every = {_MARK: note}
        copy = deepcopy(model)
        fit(copy, dataset, short, folder, augmentation=augmentation, every=every, progress=False)
    return (marks[_CALIBRATED] - marks[_MARK]) / (_CALIBRATED - _MARK)
