"""What a training step holds in memory, found out on the meta device: without weights or images.

The step is taken as the trainer takes it, the model's own loss and its backward pass, on tensors
that have shapes and no contents, and every storage is counted for as long as it lives. Where an
accelerator runs other kernels than the meta device does (fused attention, autocast), they stand in
with what they keep.
"""

import math
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from exactflow.core.model import GenerativeModel
from exactflow.training.meta import Kernels, Ledger, without_values
from exactflow.training.optim import TrainConfig, make_optimizer, recomputed


@final
@dataclass(frozen=True)
class StepMemory:
    """Bytes on one device at the peak of a training step.

    Not counted: what kernels need inside, what an allocator loses to fragments, the device's own
    context, and the batches that a loader prepares.

    Attributes:
        weights: parameters, or this device's part of them, and buffers with the trainer's copy of
            them.
        gradients: of these parameters; they are part of `working`.
        optimizer: its state.
        average: of the moving average.
        buckets: in which gradients are sent to other devices, where each has all weights.
        gathered: weights and gradients of the stages that are in one piece at the peak, where
            each device has a part of them.
        activations: what the forward pass leaves behind for the backward pass.
        working: at the peak, all that forward and backward pass hold: `activations`, and the
            gradients and temporaries beside them.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    buckets: int
    gathered: int
    activations: int
    working: int

    @property
    def state(self) -> int:
        """What is there in every step, however few images are in it."""
        return self.weights + self.optimizer + self.average + self.buckets + self.gathered

    @property
    def total(self) -> int:
        """The peak."""
        return self.state + self.working


def step_memory(
    model: GenerativeModel,
    config: TrainConfig,
    *,
    devices: int = 1,
    shards: int = 1,
    accelerator: bool = True,
) -> StepMemory:
    """Memory of a training step on each of `devices`.

    Args:
        model: on the meta device; left without gradients.
        config: of the training.
        devices: processes that share the batch.
        shards: devices that every parameter is split over, along its first dimension; a part of
            1 / shards, rounded up, is on each with its gradient, average and state of the
            optimizer. 1: every device has all of them.
        accelerator: whether kernels are those of an accelerator; else those of a CPU.

    Raises:
        ValueError: a model that is elsewhere, or takes no training steps; a batch or devices that
            do not fall into equal parts.
    """
    share, parts = config.micro_batch(devices), config.accumulate
    if shards < 1 or devices % shards:
        raise ValueError(f"expected shards that divide {devices} devices, got {shards}")
    if config.unsplit and shards > 1:
        raise ValueError(
            f"{config.unsplit} needs all parameters on every device: expected 1 shard, got {shards}"
        )
    if model.closed_form:
        raise ValueError(f"a model of kind {model.kind!r} is fitted in closed form, without steps")
    if model.device.type != "meta":
        raise ValueError(f"expected a model on the meta device, got one on {model.device}")
    weights, buffers = list(model.parameters()), list(model.buffers())
    ledger, kernels = Ledger([*weights, *buffers]), Kernels(weights, accelerator)
    scattered: dict[Tensor, Tensor] = {}  # a device's parts of gradients, by the weight
    activations, training = 0, model.training
    model.train()
    with ExitStack() as stack:
        stack.enter_context(without_values())
        stack.enter_context(ledger)
        if shards > 1:
            scatter = partial(_scatter, shards=shards, parts=scattered)
            for weight in weights:
                hook = weight.register_post_accumulate_grad_hook(scatter)
                stack.callback(hook.remove)
        # The backward pass runs outside of the kernels' mode, what it evaluates again inside.
        modes = kernels.while_recomputing
        stack.enter_context(recomputed(model.stages, config.activation_checkpointing, modes))
        for _ in range(min(parts, 2)):  # the second meets the gradients of the first
            before = ledger.live
            with kernels.active():
                loss = _loss(model, share, config.precision == "bfloat16")
            activations = max(activations, ledger.live - before)
            loss.backward()
            del loss
    for weight in scattered:
        weight.grad = torch.empty_like(weight)  # which an optimizer wants to see
    gradients = sum(_part_bytes(w, shards) for w in weights if w.grad is not None)
    state, temporaries = _optimizer_bytes(model, config, shards, accelerator)
    kept = sum(_part_bytes(weight, shards) for weight in weights)
    memory = StepMemory(
        weights=kept + 2 * sum(buffer.nbytes for buffer in buffers),
        gradients=gradients,
        optimizer=state,
        average=kept if config.ema_decay else 0,
        buckets=gradients if devices > shards == 1 else 0,
        gathered=_gathered(model) if shards > 1 else 0,
        activations=activations,
        working=max(ledger.peak, gradients + temporaries),
    )
    model.zero_grad(set_to_none=True)
    model.train(training)
    return memory


def _loss(model: GenerativeModel, count: int, reduced: bool) -> Tensor:
    """Mean loss of images without contents, as the trainer takes it."""
    images = torch.zeros((count, *model.event_shape), dtype=torch.uint8, device="meta")
    label = torch.zeros(count, dtype=torch.int64, device="meta") if model.num_classes else None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=reduced):  # tells Kernels
        return model.loss(images, label).mean()


def _part_shape(tensor: Tensor, shards: int) -> tuple[int, ...]:
    """Of the first of equal parts along the first dimension, the last of which may be smaller."""
    if tensor.dim() == 0:
        return ()
    return (-(-tensor.shape[0] // shards), *tensor.shape[1:])


def _part_bytes(tensor: Tensor, shards: int) -> int:
    return math.prod(_part_shape(tensor, shards)) * tensor.element_size()


def _scatter(weight: Tensor, *, shards: int, parts: dict[Tensor, Tensor]) -> None:
    """Keep this device's part of a gradient, as soon as all of it is there."""
    assert weight.grad is not None
    if weight not in parts:
        parts[weight] = weight.grad.new_empty(_part_shape(weight, shards))
    weight.grad = None


def _gathered(model: GenerativeModel) -> int:
    """Bytes of weights and gradients that are in one piece where devices have parts of them.

    Those of two stages, the largest at worst: while one is computed another is fetched or sent; and
    those that are in no stage.
    """
    stages = [list(stage.parameters()) for stage in model.stages]
    inside = {weight for stage in stages for weight in stage}
    rest = sum(weight.nbytes for weight in model.parameters() if weight not in inside)
    largest = max(sum(weight.nbytes for weight in stage) for stage in stages)
    return 2 * (2 * largest + rest)


def _optimizer_bytes(
    model: GenerativeModel, config: TrainConfig, shards: int, accelerator: bool
) -> tuple[int, int]:
    """Bytes of the optimizer's state, and of what its step needs beside state and gradients.

    It is shown one gradient of each shape; the others are dropped.
    """
    moved = [weight for weight in model.parameters() if weight.grad is not None]
    count = Counter(weight.shape for weight in moved)
    some = {weight.shape: weight for weight in moved}
    for weight in moved:
        if some[weight.shape] is not weight:
            weight.grad = None
    optimizer = make_optimizer(model, config)
    fused = config.optimizer == "adamw"
    for group in optimizer.param_groups:  # the meta device is given neither kind by default
        group["foreach"] = accelerator and not fused
    optimizer.step()
    state = [
        count[weight.shape] * (value.nbytes if value.dim() == 0 else _part_bytes(value, shards))
        for weight in some.values()
        for value in optimizer.state[weight].values()
        if isinstance(value, Tensor)
    ]
    if fused:
        return sum(state), 0
    with Ledger() as ledger:
        optimizer.step()
    if not accelerator:  # one weight after the other
        return sum(state), ledger.peak
    shown = sum(weight.nbytes for weight in some.values())
    return sum(state), ledger.peak * sum(weight.nbytes for weight in moved) // (shards * shown)
