"""Count the memory of a training step, without memory for its weights or images.

The step is that of the trainer (the model's loss, its backward pass, the optimizer's step), on fake
tensors (see `fake`); every storage counts for as long as it is in use. Autocast and kernels, and
the tensors that they keep for the backward pass, are those of a CPU.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from exactflow.core.model import GenerativeModel
from exactflow.training.fake import Ledger, fake_copy, loss_of_zeros, part_of
from exactflow.training.optim import TrainConfig, make_optimizer, recomputed


@final
@dataclass(frozen=True)
class StepMemory:
    """Bytes on one device at the peak of a training step.

    Not counted: memory that kernels need inside, fragments of the allocator, the device's context,
    and the batches that a loader prepares.

    Attributes:
        weights: parameters, or this device's part of them, and buffers with the trainer's copy of
            them.
        gradients: of these parameters; they are part of `working`.
        optimizer: its state.
        average: the moving average of the weights.
        buckets: in which gradients are sent to other devices, where each has all weights.
        gathered: weights and gradients of the stages that are in one piece at the peak, where
            each device has a part of them.
        activations: tensors that the forward pass keeps for the backward pass.
        working: at the peak, `activations` and the gradients and temporaries beside them.
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
        """Bytes that do not depend on the number of images."""
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
        model: on any device, such as meta; it is not changed.
        config: of the training.
        devices: processes that share the batch.
        shards: devices that every parameter is split over, along its first dimension; a part of
            1 / shards, rounded up, is on each with its gradient, average and state of the
            optimizer. 1: every device has all of them.
        accelerator: the optimizer moves all weights at once, as on a GPU; False: one by one.

    Raises:
        ValueError: a model that takes no training steps; a batch or devices that do not fall into
            equal parts.
    """
    if shards < 1 or devices % shards:
        raise ValueError(f"expected shards that divide {devices} devices, got {shards}")
    if config.unsplit and shards > 1:
        raise ValueError(
            f"{config.unsplit} needs all parameters on every device: expected 1 shard, got {shards}"
        )
    if model.closed_form:
        raise ValueError(f"a model of kind {model.kind!r} is fitted in closed form, without steps")
    with fake_copy(model, shards) as (part, ledger):
        weights = sum(weight.nbytes for weight in part.parameters())
        gradients, optimizer, temporaries = _optimizer_bytes(part, config, accelerator, ledger)
    activations, peak = _passes_bytes(model, config, config.micro_batch(devices), shards)
    return StepMemory(
        weights=weights + 2 * sum(buffer.nbytes for buffer in model.buffers()),
        gradients=gradients,
        optimizer=optimizer,
        average=weights if config.ema_decay else 0,
        buckets=gradients if devices > shards == 1 else 0,
        gathered=_gathered(model) if shards > 1 else 0,
        activations=activations,
        working=max(peak, gradients + temporaries),
    )


def _optimizer_bytes(
    part: GenerativeModel, config: TrainConfig, accelerator: bool, ledger: Ledger
) -> tuple[int, int, int]:
    """Bytes of gradients, of the optimizer's state, and of what its step needs beside them."""
    for weight in part.parameters():
        weight.grad = torch.empty_like(weight) if weight.requires_grad else None
    gradients, optimizer = ledger.live, make_optimizer(part, config)
    if config.optimizer != "adamw":  # fused everywhere
        for group in optimizer.param_groups:
            group["foreach"] = accelerator
    optimizer.step()
    values = [value for state in optimizer.state.values() for value in state.values()]
    state = sum(value.nbytes for value in values if isinstance(value, Tensor))
    return gradients, state, ledger.peak - ledger.live


def _passes_bytes(
    model: GenerativeModel, config: TrainConfig, count: int, shards: int
) -> tuple[int, int]:
    """Bytes kept after the loss of `count` images, and at the peak of both passes."""
    parts: dict[Tensor, Tensor] = {}  # this device's parts of gradients, by the weight

    def scatter(weight: Tensor) -> None:
        if weight not in parts:
            parts[weight] = part_of(weight, shards)
        weight.grad = None

    reduced = torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16")
    with fake_copy(model) as (whole, ledger):
        for weight in [weight for weight in whole.parameters() if weight.requires_grad]:
            if config.accumulate > 1:  # of the micro-batch before
                weight.grad = torch.empty_like(weight)
            if shards > 1:
                weight.register_post_accumulate_grad_hook(scatter)
                if weight.grad is not None:
                    scatter(weight)
        with recomputed(whole.train().stages, config.activation_checkpointing):
            before = ledger.live
            with reduced:
                loss = loss_of_zeros(whole, count).mean()
            activations = ledger.live - before
            loss.backward()
    return activations, ledger.peak


def _gathered(model: GenerativeModel) -> int:
    """Bytes of whole weights and gradients at the peak, where each device has parts of them.

    Those of two stages (one is computed while another is fetched or sent; at worst both are as
    large as the largest), and those outside of all stages.
    """
    stages = [list(stage.parameters()) for stage in model.stages]
    inside = {weight for stage in stages for weight in stage}
    rest = sum(weight.nbytes for weight in model.parameters() if weight not in inside)
    largest = max(sum(weight.nbytes for weight in stage) for stage in stages)
    return 2 * (2 * largest + rest)
