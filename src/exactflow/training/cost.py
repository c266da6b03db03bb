"""The cost of a training, known before it begins: work, memory on each device, time at a rate.

Work and memory are counted. Time follows from a measured rate alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from exactflow.core.model import GenerativeModel
from exactflow.core.randomness import derive_seed
from exactflow.data.augmentation import NO_AUGMENTATION
from exactflow.data.datasets import ImageDataset
from exactflow.training.budget import seconds_per_step, training_flops
from exactflow.training.optim import TrainConfig
from exactflow.training.step_memory import StepMemory, step_memory

SECONDS_PER_DAY = 86_400


@final
@dataclass(frozen=True)
class TrainingCost:
    """The cost of a training.

    Attributes:
        config: of the training.
        devices: that share each batch.
        shards: how many of them each parameter is split over.
        parameters: of the model.
        flops_per_image: of one image in a training step, see `training_flops`; without the second
            evaluation by activation checkpointing.
        memory: of each device.
        epoch: images of the data set; None: not known.
        steps: optimizer steps; None where the recipe counts epochs of unknown size.
    """

    config: TrainConfig
    devices: int
    shards: int
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
        """Images per second of all devices, each of which does this many FLOPs a second."""
        return self.devices * flops_per_second / self.flops_per_image


def training_cost(
    model: GenerativeModel,
    config: TrainConfig,
    *,
    devices: int = 1,
    shards: int = 1,
    epoch: int | None = None,
) -> TrainingCost:
    """The cost of training `model` by `config`.

    Args:
        model: on any device; on the meta device it needs no memory.
        config: of the training.
        devices: accelerators that share each batch, one process each.
        shards: how many of them each parameter is split over.
        epoch: images of the data set, where known.

    Raises:
        ValueError: see `step_memory`; or a data set smaller than a batch.
    """
    if epoch is not None and epoch < config.batch_size:
        raise ValueError(f"expected at least a batch of {config.batch_size} images, got {epoch}")
    memory = step_memory(model, config, devices=devices, shards=shards)
    steps = config.steps if epoch is None else config.schedule(epoch).total
    flops = training_flops(model)
    return TrainingCost(config, devices, shards, model.num_parameters, flops, memory, epoch, steps)


def remedies(
    model: GenerativeModel, config: TrainConfig, limit: int, *, devices: int = 1, shards: int = 1
) -> Iterator[tuple[TrainConfig, StepMemory]]:
    """Settings with which a step takes no more than `limit` bytes on each device.

    At most two: with activations kept and with activations recomputed, each with the fewest
    micro-batches that fit. A step that fits as it is comes back unchanged.
    """
    images = config.accumulate * config.micro_batch(devices)
    counts = [count for count in range(config.accumulate, images + 1) if images % count == 0]
    for recomputed in sorted({config.activation_checkpointing, True}):
        kept = replace(config, activation_checkpointing=recomputed)
        whole = step_memory(model, kept, devices=devices, shards=shards)
        for count in counts:
            activations = whole.activations * config.accumulate // count  # or a little more
            if whole.state + max(whole.gradients, activations) > limit:
                continue
            changed, memory = replace(kept, accumulate=count), whole
            if changed != kept:
                memory = step_memory(model, changed, devices=devices, shards=shards)
            if memory.total <= limit:
                yield changed, memory
                break


def fewest_shards(
    model: GenerativeModel, config: TrainConfig, limit: int, *, devices: int
) -> tuple[int, StepMemory] | None:
    """The smallest number of shards, a divisor of `devices`, that fits in `limit` bytes, if any."""
    whole = step_memory(model, config, devices=devices)
    for shards in range(1, devices + 1):
        least = (whole.weights + whole.optimizer + whole.average) // shards + whole.activations
        if devices % shards == 0 and least <= limit:
            memory = whole
            if shards > 1:
                memory = step_memory(model, config, devices=devices, shards=shards)
            if memory.total <= limit:
                return shards, memory
    return None


def measured_rate(model: GenerativeModel, config: TrainConfig, *, devices: int = 1) -> float:
    """Images per second in training steps taken here and now, on random images.

    One device takes its part of a batch; its rate is multiplied by `devices`, as if they did not
    wait for one another.

    Args:
        model: on the device to be measured; a copy is trained.
        config: of the training.
        devices: that share each batch.
    """
    part = config.accumulate * config.micro_batch(devices)
    alone = replace(config, batch_size=part, steps=None, epochs=1.0, fine_tuning_epochs=0.0)
    seconds = seconds_per_step(model, random_images(model, part), alone, NO_AUGMENTATION)
    return devices * part / seconds


def random_images(model: GenerativeModel, count: int) -> ImageDataset:
    """Images of independent random pixels, in the model's shape and grey levels."""
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
