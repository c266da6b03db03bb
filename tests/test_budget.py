"""Budgets of training, and FLOPs counted against those of the equations."""

import math

import pytest
import torch

import exactflow
from exactflow.core.model import GenerativeModel
from exactflow.data import DataConfig, load
from exactflow.training import TrainConfig
from exactflow.training.budget import Budget, steps_within, training_flops


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", Budget(seconds=90)),
        ("5m", Budget(seconds=300)),
        ("1.5h", Budget(seconds=5400)),
        ("1e15flop", Budget(flops=1e15)),
        (" 2E3FLOP ", Budget(flops=2000)),
    ],
)
def test_budgets_are_read(text: str, expected: Budget) -> None:
    assert Budget.parse(text) == expected


@pytest.mark.parametrize("text", ["", "5", "m", "-5m", "0s", "1e400s", "5 minutes", "1..5m"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"such as 90s, 5m, 2h or 1e15flop|positive number"):
        Budget.parse(text)


def test_a_budget_is_of_one_thing() -> None:
    for fields in ({}, {"seconds": 1.0, "flops": 1.0}, {"seconds": math.inf}, {"flops": 0.0}):
        with pytest.raises(ValueError, match="positive number of seconds or of FLOPs"):
            Budget(**fields)


def test_flops_of_a_tarflow_are_those_of_its_matrices() -> None:
    """6 per weight and token, and 12 per pair of tokens and channel of each attention layer."""
    model = exactflow.build("tarflow-digits")
    config = model.config
    tokens = (config.image_shape[1] // config.patch_size) ** 2
    matrices = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "position" not in n
    )
    layers = config.blocks * config.layers_per_block
    expected = 6 * matrices * tokens + 12 * layers * tokens**2 * config.width
    # the first block's input map needs no gradient of the image
    assert training_flops(model) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", ["tarflow-tiny", "macow-tiny", "iddpm-tiny", "hdit-tiny"])
def test_counting_leaves_the_model_as_it_was(name: str) -> None:
    model = exactflow.build(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert training_flops(model) > 0
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def digits(model: GenerativeModel) -> tuple:
    dataset = load(DataConfig(), "train")
    return model, dataset, TrainConfig(batch_size=16)


def test_work_is_divided_by_that_of_a_step() -> None:
    model = exactflow.build("tarflow-digits")
    each = 16 * training_flops(model)
    assert steps_within(Budget(flops=10.5 * each), *digits(model)) == 10
    assert steps_within(Budget(flops=0.1 * each), *digits(model)) == 1


@pytest.mark.slow
def test_time_is_divided_by_that_of_a_step_and_nothing_moves() -> None:
    model = exactflow.build("macow-digits")  # its first parameters are computed from data
    before = {key: value.clone() for key, value in model.state_dict().items()}
    short, long = (steps_within(Budget(seconds=s), *digits(model)) for s in (1.0, 1e9))
    assert 1 <= short < long
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
