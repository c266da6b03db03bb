"""Costs predicted without memory, compared with those of real steps."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import exactflow
from exactflow.core.config import override
from exactflow.core.density_flow import FittedFlow
from exactflow.core.model import DataInitialized, GenerativeModel
from exactflow.models import registry
from exactflow.training import TrainConfig
from exactflow.training.budget import training_flops
from exactflow.training.cost import fewest_shards, measured_rate, remedies, training_cost
from exactflow.training.fake import Ledger
from exactflow.training.optim import MovingAverage, make_optimizer, recomputed
from exactflow.training.step_memory import (
    StepMemory,
    step_memory,
)

SMALL = [
    "tarflow-digits",
    "macow-tiny",
    "flow-matching-digits",
    "hdit-tiny",
    "iddpm-tiny",
    "denseflow-tiny",
]
TOLERANCE = 0.15


def on_meta(name: str, **overrides: Any) -> GenerativeModel:
    with torch.device("meta"):
        return registry.build(name, **overrides)


def recipe(name: str, **changes: Any) -> TrainConfig:
    return override(TrainConfig(), {**registry.preset(name).training, **changes})


@contextmanager
def counting_saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that is saved for the backward pass, weights excluded."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


def real_step(name: str, config: TrainConfig) -> tuple[int, int, int, int]:
    """Saved activations, and peak beyond weights, optimizer and average, of a real step."""
    model = exactflow.build(name).train()
    images = torch.randint(model.levels, (config.batch_size, *model.event_shape)).to(torch.uint8)
    if isinstance(model, DataInitialized):
        model.initialize(images)
    label = torch.zeros(len(images), dtype=torch.int64) if model.num_classes else None
    ledger = Ledger([*model.parameters(), *model.buffers(), images])
    with recomputed(model.stages, config.activation_checkpointing), ledger:
        with counting_saved(model) as saved:
            loss = model.loss(images, label).mean()
        total = sum(saved.values())
        loss.backward()
    optimizer = make_optimizer(model, config)
    optimizer.step()
    values = [v for state in optimizer.state.values() for v in state.values()]
    average = 0
    if config.ema_decay:
        held = MovingAverage(model, config.ema_decay).state_dict()
        average = sum(held[key].nbytes for key, _ in model.named_parameters())
    return total, ledger.peak, sum(v.nbytes for v in values if isinstance(v, Tensor)), average


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_memory_is_that_of_a_real_step(name: str, checkpointing: bool) -> None:
    config = recipe(name, batch_size=32, activation_checkpointing=checkpointing)
    predicted = step_memory(on_meta(name), config, accelerator=False)
    saved, peak, optimizer, average = real_step(name, config)
    assert predicted.activations == pytest.approx(saved, rel=TOLERANCE)
    assert predicted.working == pytest.approx(peak, rel=TOLERANCE)
    assert (predicted.optimizer, predicted.average) == (optimizer, average)


def test_a_wrong_prediction_would_be_seen() -> None:
    kept, again = (
        step_memory(on_meta("tarflow-digits"), recipe("tarflow-digits", **words), accelerator=False)
        for words in ({}, {"activation_checkpointing": True})
    )
    assert again.activations < (1 - 2 * TOLERANCE) * kept.activations
    assert again.working < (1 - 2 * TOLERANCE) * kept.working


@pytest.mark.parametrize("name", SMALL)
def test_activations_grow_with_the_images_and_nothing_else_does(name: str) -> None:
    few, many = (step_memory(on_meta(name), recipe(name, batch_size=n)) for n in (16, 48))
    assert few.state == many.state
    assert 2 < many.activations / few.activations <= 3.01


def test_attention_is_not_kept_as_a_matrix() -> None:
    """Twice the tokens: twice the memory, not four times."""
    small, large = (
        step_memory(
            on_meta("tarflow-tiny", image_shape=(3, side, 64)),
            recipe("tarflow-tiny", batch_size=2),
        ).activations
        for side in (64, 128)
    )
    assert large / small == pytest.approx(2, rel=0.05)


def test_reduced_precision_halves_what_layers_keep() -> None:
    config = recipe("tarflow-mnist-4-128-4-4-0.10", batch_size=64)
    full, half = (
        step_memory(on_meta("tarflow-mnist-4-128-4-4-0.10"), replace(config, precision=precision))
        for precision in ("float32", "bfloat16")
    )
    assert 0.5 < half.activations / full.activations < 0.8
    assert half.state == full.state


def test_devices_and_micro_batches_share_the_batch() -> None:
    name = "tarflow-digits"
    config = recipe(name, batch_size=64)
    alone, four = (step_memory(on_meta(name), config, devices=n) for n in (1, 4))
    parts = step_memory(on_meta(name), replace(config, accumulate=4))
    mixed = step_memory(on_meta(name), replace(config, accumulate=2), devices=2)
    assert mixed.activations == four.activations
    assert four.activations == pytest.approx(parts.activations, rel=0.01)
    assert four.activations < 0.3 * alone.activations
    assert (alone.buckets, parts.buckets, four.buckets) == (0, 0, four.gradients)
    assert parts.working > four.working  # the gradients of the part before are there


@pytest.fixture
def four_processes() -> Iterator[None]:
    """Pretend to be the first of four processes; nothing that is sent is received."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("four_processes")
@pytest.mark.parametrize("name", ["tarflow-digits", "hdit-tiny", "iddpm-tiny"])
def test_shards_are_those_of_pytorch(name: str) -> None:
    """Parts of sizes that four does not divide are rounded up."""
    config = recipe(name, ema_decay=0.99, batch_size=64, optimizer="adamw")
    predicted = step_memory(on_meta(name), config, devices=4, shards=4)
    model = exactflow.build(name)
    for part in (*model.stages, model):
        fully_shard(part)
    optimizer, held = make_optimizer(model, config), 0
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        held += parameter.to_local().nbytes
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [
        (value.to_local() if isinstance(value, DTensor) else value).nbytes
        for values in optimizer.state.values()
        for value in values.values()
    ]
    assert predicted.weights == held + 2 * sum(buffer.nbytes for buffer in model.buffers())
    assert predicted.gradients == predicted.average == held
    assert predicted.optimizer == sum(state)


def test_split_parameters_leave_one_stage_in_one_piece() -> None:
    name = "tarflow-digits"
    model, config = on_meta(name, width=256), recipe(name, batch_size=64, optimizer="adamw")
    whole, split = (step_memory(model, config, devices=4, shards=n) for n in (1, 4))
    stage = max(sum(p.nbytes for p in block.parameters()) for block in model.stages)
    outside = 4 * model.num_parameters - sum(
        p.nbytes for block in model.stages for p in block.parameters()
    )
    assert whole.gathered == split.buckets == 0
    assert split.gathered == 2 * (2 * stage + outside)
    assert split.weights == pytest.approx(whole.weights / 4, rel=0.02)
    assert split.activations == whole.activations
    assert split.working < whole.working
    with pytest.raises(ValueError, match="optimizer=muon needs all parameters on every device"):
        step_memory(model, recipe(name, batch_size=64, optimizer="muon"), devices=4, shards=4)
    for shards in (0, 3, 8):
        with pytest.raises(ValueError, match="shards that divide 4 devices"):
            step_memory(model, config, devices=4, shards=shards)


def test_the_fewest_shards_that_fit() -> None:
    name = "tarflow-digits"
    model, config = on_meta(name, width=256), recipe(name, batch_size=8, optimizer="adamw")
    totals = {n: step_memory(model, config, devices=8, shards=n).total for n in (1, 2, 4, 8)}
    assert totals[1] > totals[4] > totals[8]
    found = fewest_shards(model, config, totals[4], devices=8)
    assert found is not None
    assert (found[0], found[1].total) == (4, totals[4])
    assert fewest_shards(model, config, totals[8] - 1, devices=8) is None


def test_state_follows_the_optimizer() -> None:
    name = "tarflow-digits"
    model = on_meta(name)
    weights = sum(p.nbytes for p in model.parameters())
    for optimizer in ("adamw", "adamax"):
        memory = step_memory(model, recipe(name, optimizer=optimizer, ema_decay=0.0))
        assert memory.optimizer == pytest.approx(2 * weights, rel=1e-3)
        assert memory.average == 0
        assert memory.gradients == weights
        assert memory.total == memory.state + memory.working
    assert step_memory(model, recipe(name, ema_decay=0.9)).average == weights


def test_the_model_is_left_as_it_was() -> None:
    model = on_meta("iddpm-tiny").eval()
    step_memory(model, recipe("iddpm-tiny"))
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_work_is_counted_alike_without_memory(name: str) -> None:
    assert training_flops(on_meta(name)) == training_flops(exactflow.build(name)) > 0


def test_a_billion_weights_need_no_memory() -> None:
    model = on_meta("tarflow-imagenet64-2-1024-8-8-0.05", layers_per_block=10)
    config = recipe("tarflow-imagenet64-2-1024-8-8-0.05")
    cost = training_cost(model, config, devices=8, epoch=1_281_167)
    assert cost.parameters > 1e9
    tokens = 1024
    assert cost.flops_per_image == pytest.approx(6 * cost.parameters * tokens, rel=0.15)
    assert cost.images == cost.steps * 256 == 200 * (1_281_167 // 256) * 256
    assert cost.memory.state >= 4 * 4 * cost.parameters  # weights, two moments, buckets
    assert cost.flops == cost.images * cost.flops_per_image


def test_days_follow_from_a_rate_and_from_nothing_else() -> None:
    config = recipe("tarflow-digits", steps=100, batch_size=64)
    cost = training_cost(on_meta("tarflow-digits"), config)
    assert cost.images == 6400
    assert cost.days(64.0) == pytest.approx(100 / 86_400)
    assert cost.rate_at(cost.flops_per_image) == 1.0
    for rate in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive rate"):
            cost.days(rate)
    unknown = training_cost(on_meta("tarflow-digits"), replace(config, steps=None))
    assert unknown.images is unknown.flops is unknown.days(1.0) is None


def test_the_remedies_fit_and_are_the_smallest() -> None:
    name = "tarflow-tiny"
    config = recipe(name, batch_size=16)
    model = on_meta(name)
    whole, half = (
        step_memory(model, config).total,
        step_memory(model, replace(config, accumulate=2)),
    )
    assert next(changed for changed, _ in remedies(model, config, whole)) == config
    limit = half.total
    kept, again = remedies(model, config, limit)
    assert (kept[0].accumulate, kept[0].activation_checkpointing) == (2, False)
    assert again[0].activation_checkpointing
    assert kept[1].total <= limit
    assert again[1].total <= limit
    assert list(remedies(model, config, 1000)) == []


def test_a_rate_is_measured() -> None:
    model = exactflow.build("tarflow-tiny")
    config = recipe("tarflow-tiny", batch_size=16, accumulate=4)
    assert measured_rate(model, config, devices=2) > 0


def test_what_cannot_be_predicted_is_refused() -> None:
    config = recipe("tarflow-tiny")
    with pytest.raises(ValueError, match="7 processes"):
        step_memory(on_meta("tarflow-tiny"), config, devices=7)
    with pytest.raises(ValueError, match="at least a batch"):
        training_cost(on_meta("tarflow-tiny"), config, epoch=3)
    fitted = [name for name in registry.names() if issubclass(kind(name), FittedFlow)]
    with pytest.raises(ValueError, match="closed form"):
        step_memory(on_meta(fitted[0]), config)


def kind(name: str) -> type[GenerativeModel]:
    return registry.family_of(name).model


def test_the_ledger_counts_from_first_to_last_use() -> None:
    there = torch.zeros(10)
    with Ledger([there]) as ledger:
        view = there[:5]
        a = torch.zeros(100)
        b = a.view(10, 10).t()
        assert ledger.live == 400
        del a
        assert ledger.live == 400
        c = b + 1
        assert ledger.live == 800
        del b, c
        there.add_(1)
        assert (ledger.live, ledger.peak) == (0, 800)
    assert len(view) == 5


def test_all_of_it_adds_up() -> None:
    memory = StepMemory(1, 2, 4, 8, 16, 32, 64, 128)
    assert memory.state == 1 + 4 + 8 + 16 + 32
    assert memory.total == memory.state + 128
