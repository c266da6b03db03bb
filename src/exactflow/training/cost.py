"""What a training will cost before it is begun: work, memory on each device, and time at a rate.

Work and memory are counted. Time is not: it follows from a rate that somebody measured, and where
nobody did there is none.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from exactflow.core.model import GenerativeModel
from exactflow.core.random import derive_seed
from exactflow.data.augmentation import NO_AUGMENTATION
from exactflow.data.datasets import ImageDataset
from exactflow.training.budget import seconds_per_step, training_flops
from exactflow.training.optim import TrainConfig
from exactflow.training.step_memory import StepMemory, micro_batch, step_memory

SECONDS_PER_DAY = 86_400


@final
@dataclass(frozen=True)
class TrainingCost:
    """The cost of a training.

    Attributes:
        config: of the training.
        devices: that share each batch.
        parameters: of the model.
        flops_per_image: of one image in a training step, see `training_flops`. What activation
            checkpointing computes a second time is not in it.
        memory: of each device.
        epoch: images of the data set; None: not known.
        steps: optimizer steps; None where the recipe counts epochs of unknown size.
    """

    config: TrainConfig
    devices: int
    parameters: int
    flops_per_image: float
    memory: StepMemory
    epoch: int | None
    steps: int | None

    @property
    def images(self) -> int | None:
        """Images that all steps together see."""
        return None if self.steps is None else self.steps * self.config.batch_size

    @property
    def flops(self) -> float | None:
        """FLOPs of the whole training."""
        return None if self.images is None else self.images * self.flops_per_image

    def days(self, images_per_second: float) -> float | None:
        """Days at a rate of all devices together. Raises ValueError unless it is positive."""
        if not 0 < images_per_second < float("inf"):
            raise ValueError(f"expected a positive rate, got {images_per_second} images/s")
        return None if self.images is None else self.images / images_per_second / SECONDS_PER_DAY

    def rate_at(self, flops_per_second: float) -> float:
        """Images per second of devices that each do so many FLOPs of the model a second."""
        return self.devices * flops_per_second / self.flops_per_image


def training_cost(
    model: GenerativeModel, config: TrainConfig, *, devices: int = 1, epoch: int | None = None
) -> TrainingCost:
    """The cost of training `model` by `config`.

    Args:
        model: on the meta device, so that no memory is needed.
        config: of the training.
        devices: accelerators that share each batch, one process each.
        epoch: images of the data set, where known.

    Raises:
        ValueError: see `step_memory`; or a data set smaller than a batch.
    """
    if epoch is not None and epoch < config.batch_size:
        raise ValueError(f"expected at least a batch of {config.batch_size} images, got {epoch}")
    memory = step_memory(model, config, devices=devices)
    steps = config.steps if epoch is None else config.schedule(epoch).total
    return TrainingCost(
        config, devices, model.num_parameters, training_flops(model), memory, epoch, steps
    )


def remedies(
    model: GenerativeModel, config: TrainConfig, limit: int, *, devices: int = 1
) -> Iterator[tuple[TrainConfig, StepMemory]]:
    """Settings under which a step takes no more than `limit` bytes on each device.

    For activations kept and for activations recomputed, the one with the fewest micro-batches, if
    any. A step that fits as it is gives itself.
    """
    share = config.accumulate * micro_batch(config, devices)
    for recomputed in sorted({config.activation_checkpointing, True}):
        kept = replace(config, activation_checkpointing=recomputed)
        parts = [n for n in range(config.accumulate, share + 1) if share % n == 0]
        found = None
        while parts:  # memory falls as their number grows
            middle = len(parts) // 2
            changed = replace(kept, accumulate=parts[middle])
            memory = step_memory(model, changed, devices=devices)
            if memory.total <= limit:
                found, parts = (changed, memory), parts[:middle]
            else:
                parts = parts[middle + 1 :]
        if found is not None:
            yield found


def measured_rate(model: GenerativeModel, config: TrainConfig, *, devices: int = 1) -> float:
    """Images per second in training steps taken here and now, on random images.

    One device does its part of a batch. Its rate is multiplied by `devices`: what they lose in
    waiting for one another is not in it.

    Args:
        model: where it is to be measured; a copy is trained.
        config: of the training.
        devices: that share each batch.
    """
    part = config.accumulate * micro_batch(config, devices)
    alone = replace(config, batch_size=part, steps=None, epochs=1.0, fine_tuning_epochs=0.0)
    seconds = seconds_per_step(model, random_images(model, part), alone, NO_AUGMENTATION)
    return devices * part / seconds


def random_images(model: GenerativeModel, count: int) -> ImageDataset:
    """Images without sense, in the shape of those that the model is made for."""
    random = np.random.default_rng(derive_seed(0, "random images"))
    labels = random.integers(0, model.num_classes, count) if model.num_classes else None
    return ImageDataset(
        images=random.integers(0, model.levels, (count, *model.event_shape), np.uint8),
        labels=labels,
        id="random",
        version="none",
        split="train",
        levels=model.levels,
        class_names=tuple(map(str, range(model.num_classes))),
        preprocessing="none",
        preprocessing_hash="none",
        fingerprint="none",
    )
