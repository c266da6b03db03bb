"""What processes make of moving buffers side by side is what one makes of them in turn."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exactflow import registry
from exactflow.core.random import generator
from exactflow.diffusion.step_importance import HISTORY, StepImportance
from exactflow.flows.tarflow import TarFlow, TarFlowConfig
from exactflow.nn.dense import DeferredBatchNorm
from exactflow.nn.running import RunningBuffers


def batch_norm() -> DeferredBatchNorm:
    return DeferredBatchNorm(3).double()


def move_batch_norm(part: DeferredBatchNorm, number: int) -> None:
    source = generator(0, "part", number)
    part(torch.randn(4, 3, 2, 2, generator=source, dtype=torch.float64) + number)
    part.take_up()


def flow() -> TarFlow:
    config = TarFlowConfig(
        image_shape=(1, 4, 4),
        patch_size=2,
        width=64,
        blocks=2,
        layers_per_block=1,
        volume_preserving=True,
        noise_std=0.1,
    )
    return TarFlow(config).double()


def move_flow(model: TarFlow, number: int) -> None:
    source = generator(0, "part", number)
    images = torch.randint(0, model.levels, (4, 1, 4, 4), generator=source)
    model.loss(images, generator=source)


def importance() -> StepImportance:
    return StepImportance(5)


def move_importance(part: StepImportance, number: int) -> None:
    source = generator(0, "part", number)
    count = (1, 7, 90)[number % 3]  # few, some, and more of each step than are remembered
    step = torch.randint(0, 5, (count,), generator=source)
    part.record(step, torch.rand(count, generator=source) + number)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("make", "move"),
    [(batch_norm, move_batch_norm), (flow, move_flow), (importance, move_importance)],
    ids=["batch norm", "variance", "importance"],
)
def test_processes_side_by_side_are_one_in_turn(
    make: Callable[[], Any], move: Callable[[Any, int], None], processes: int, parts: int
) -> None:
    module = make().train()
    for number in range(100, 104):  # a past
        move(module, number)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    alone, others = copy.deepcopy(module), []
    for process in range(processes):
        other = copy.deepcopy(module)
        for number in range(process * parts, (process + 1) * parts):
            move(alone, number)
            move(other, number)
        others.append(dict(other.named_buffers()))
    assert any(not torch.equal(before[n], b) for n, b in alone.named_buffers())
    module.combine(before, others, parts)
    for name, expected in alone.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), expected, rtol=1e-12, atol=1e-12)


def test_more_losses_than_are_remembered_leave_the_last() -> None:
    module = importance()
    move_importance(module, 2)
    assert int(module.get_buffer("seen").max()) > HISTORY


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """The module of every buffer."""
    return {
        f"{prefix}.{name}".lstrip("."): module
        for prefix, module in model.named_modules()
        for name, _ in module.named_buffers(recurse=False)
    }


@pytest.mark.parametrize("name", [n for n in registry.names() if n.endswith("-tiny")])
def test_every_buffer_that_training_moves_can_be_combined(name: str) -> None:
    model = registry.build(name).train()
    source = generator(0, "images")
    images = torch.randint(0, model.levels, (4, *model.event_shape), generator=source)
    before: dict[str, Tensor] = {n: b.clone() for n, b in model.named_buffers()}
    label = torch.zeros(4, dtype=torch.int64) if model.num_classes else None
    model.loss(images, label, generator=source)
    moved = {n for n, b in model.named_buffers() if not torch.equal(b, before[n])}
    assert all(isinstance(owners(model)[n], RunningBuffers) for n in moved), moved
