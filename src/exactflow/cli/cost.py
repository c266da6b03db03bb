"""`exactflow cost`."""

import math
from collections.abc import Iterator

from rich.table import Table

from exactflow.cli.arguments import Cost
from exactflow.cli.settings import resolve
from exactflow.cli.terminal import say
from exactflow.core import building
from exactflow.core.config import override
from exactflow.core.devices import pick_device
from exactflow.core.model import GenerativeModel
from exactflow.data import load
from exactflow.models import registry
from exactflow.training import TrainConfig
from exactflow.training.cost import (
    TrainingCost,
    fewest_shards,
    measured_rate,
    remedies,
    training_cost,
)
from exactflow.training.settings import Settings

GIB = 2**30
TERA = 1e12
BUILT_IN = "digits"  # the only set that is here without looking for it
Row = tuple[str, str]


def run(command: Cost) -> None:
    """Print the cost as a table, and what to change where it does not fit."""
    for option in ("gpus", "shards", "memory", "images", "images_per_second", "tflops"):
        value = getattr(command, option)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{option.replace('_', '-')}: expected more than 0, got {value}")
    settings = resolve(command.preset, command.settings, command.config, reads_data=False)
    epoch = command.images
    if settings.data.source == BUILT_IN:
        dataset = load(settings.data, "train")
        settings, epoch = settings.fitted(dataset), epoch or len(dataset)
    model = on_meta(settings)
    changes = {} if command.batch is None else {"batch_size": command.batch}
    config = override(settings.training, changes)
    cost = training_cost(model, config, devices=command.gpus, shards=command.shards, epoch=epoch)
    rows = [*_work(cost), *_memory(cost), *_length(cost), *_time(command, settings, cost)]
    table = Table(title=f"training of {settings.preset}")
    table.add_column("what")
    table.add_column("value", justify="right")
    for row in rows:
        table.add_row(*row)
    say(table)
    if command.memory is not None:
        for line in _verdict(model, cost, command.memory):
            say(line)


def on_meta(settings: Settings) -> GenerativeModel:
    """The model without memory for its weights, however large they would be."""
    model = registry.family_of(settings.preset).model
    return building.on_meta(lambda: model(settings.model), settings.preset, building.ANY_NUMBER)


def size(count: int) -> str:
    """Bytes for people."""
    for unit, factor in (("KiB", 2**10), ("MiB", 2**20)):
        if count < 1000 * factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / GIB:.2f} GiB"


def _work(cost: TrainingCost) -> Iterator[Row]:
    config, share = cost.config, cost.config.micro_batch(cost.devices)
    yield "parameters", f"{cost.parameters:,}"
    yield "FLOPs per image, forward and backward", f"{cost.flops_per_image:.4g}"
    devices = "1 device" if cost.devices == 1 else f"{cost.devices} devices"
    count = config.accumulate
    parts = f" x {count} micro-batches" if count > 1 else ""
    yield "images per step", f"{config.batch_size} = {devices}{parts} x {share}"


def _memory(cost: TrainingCost) -> Iterator[Row]:
    config, memory = cost.config, cost.memory
    recomputed = "recomputed" if config.activation_checkpointing else "kept"
    split = f", parameters split over {cost.shards}" if cost.shards > 1 else ""
    yield f"memory of each device{split}", ""
    yield "  weights and buffers", size(memory.weights)
    yield f"  state of {config.optimizer}", size(memory.optimizer)
    if memory.average:
        yield "  moving average", size(memory.average)
    if memory.buckets:
        yield "  buckets of gradients to send", size(memory.buckets)
    if memory.gathered:
        yield "  stages in one piece at the peak", size(memory.gathered)
    yield f"  activations, {config.precision}, {recomputed}", size(memory.activations)
    beside = memory.working - memory.activations
    yield f"  beside them at the peak (gradients: {size(memory.gradients)})", size(beside)
    yield "  in all", size(memory.total)


def _length(cost: TrainingCost) -> Iterator[Row]:
    if cost.epoch is not None:
        yield "images per epoch", f"{cost.epoch:,}"
    if cost.steps is None or cost.images is None or cost.flops is None:
        yield "images in all", f"{cost.config.epochs:g} epochs: give --images of an epoch"
        return
    yield "steps", f"{cost.steps:,}"
    yield "images in all", f"{cost.images:,}"
    yield "FLOPs in all", f"{cost.flops:.3g}"


def _time(command: Cost, settings: Settings, cost: TrainingCost) -> Iterator[Row]:
    """Days, one row for each rate that was given or measured; none where there is no rate."""
    if command.images_per_second is not None:
        rate = command.images_per_second
        yield f"days at {rate:g} images/s in all, as given", _days(cost, rate)
    if command.tflops is not None:
        rate = cost.rate_at(command.tflops * TERA)
        yield f"days at {command.tflops:g} TFLOP/s a device, as given", _days(cost, rate)
    if command.measure:
        device = pick_device(command.device)
        model = settings.build().to(device)
        rate = measured_rate(model, cost.config, devices=cost.devices)
        shared = f", times {cost.devices} without waiting" if cost.devices > 1 else ""
        each = rate / cost.devices
        yield f"days at {each:.4g} images/s, measured here on {device}{shared}", _days(cost, rate)


def _days(cost: TrainingCost, rate: float) -> str:
    days = cost.days(rate)
    return "give --images" if days is None else f"{days:.3g}"


def _verdict(model: GenerativeModel, cost: TrainingCost, gibibytes: float) -> Iterator[str]:
    """Whether a step fits, and if not, what would make it fit."""
    limit, memory = round(gibibytes * GIB), cost.memory
    if memory.total <= limit:
        yield f"fits into {gibibytes:g} GiB, of which it takes {memory.total / limit:.0%}"
        return
    yield f"does not fit into {gibibytes:g} GiB: {size(memory.total - limit)} too much"
    if memory.state + memory.gradients > limit:
        needed = size(memory.state + memory.gradients)
        yield f"weights, gradients and optimizer take {needed}, whatever the batch"
    options = list(_options(model, cost, limit))
    yield from options or [f"nothing here makes it fit on {cost.devices} devices"]


def _options(model: GenerativeModel, cost: TrainingCost, limit: int) -> Iterator[str]:
    """Smaller micro-batches, or parameters split over devices; both where neither is enough."""
    memory, devices, unsplit = cost.memory, cost.devices, []
    if memory.state + memory.gradients <= limit:
        unsplit = list(remedies(model, cost.config, limit, devices=devices, shards=cost.shards))
    for config, fitting in unsplit:
        yield f"fits with {_changes(cost.config, config)}: {size(fitting.total)}"
    if cost.shards == devices or cost.config.unsplit:
        return
    split = fewest_shards(model, cost.config, limit, devices=devices)
    if split is not None:
        yield f"fits with --shards {split[0]}: {size(split[1].total)}"
    elif not unsplit:
        for config, fitting in remedies(model, cost.config, limit, devices=devices, shards=devices):
            changes = f"--shards {devices} {_changes(cost.config, config)}"
            yield f"fits with {changes}: {size(fitting.total)}"


def _changes(config: TrainConfig, changed: TrainConfig) -> str:
    words = []
    if changed.activation_checkpointing != config.activation_checkpointing:
        words.append("training.activation_checkpointing=true")
    if changed.accumulate != config.accumulate:
        words.append(f"training.accumulate={changed.accumulate}")
    return " ".join(words)
