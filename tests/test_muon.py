"""Muon: orthogonal steps for matrices, AdamW for the rest, and a run that resumes."""

import pytest
import torch

from exactflow.models import registry
from exactflow.models.tarflow.model import TarFlow, TarFlowConfig
from exactflow.training.muon import Muon, orthogonalize
from exactflow.training.optim import TrainConfig, make_optimizer


@pytest.mark.parametrize("size", [(8, 8), (24, 8), (8, 24)])
def test_orthogonalized_matrices_keep_their_directions(size: tuple[int, int]) -> None:
    """Singular vectors stay, singular values come close to one."""
    torch.manual_seed(0)
    matrix = torch.randn(3, *size, dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    core = u.mT @ orthogonalize(matrix) @ v.mT
    values = core.diagonal(dim1=1, dim2=2)
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.3
    torch.testing.assert_close(core, torch.diag_embed(values), rtol=0, atol=1e-9)


def test_stacked_matrices_are_made_orthogonal_one_by_one() -> None:
    torch.manual_seed(0)
    stacked = torch.nn.Parameter(torch.zeros(12, 4, dtype=torch.float64))
    stacked.grad = torch.randn(12, 4, dtype=torch.float64)
    group = {"params": [stacked], "lr": 1.0, "weight_decay": 0.0, "matrices": 3}
    Muon([group], (0.9, 0.95)).step()
    expected = -orthogonalize(stacked.grad.unflatten(0, (3, 4))).flatten(0, 1)
    torch.testing.assert_close(stacked.detach(), expected)


def test_the_rest_moves_as_adamw_moves_it() -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(2))
    group = {"lr": 0.1, "weight_decay": 0.2}
    mine = Muon([{"params": [ours], **group, "matrices": 0}], (0.9, 0.95))
    reference = torch.optim.AdamW([{"params": [theirs], **group}], betas=(0.9, 0.95))
    for _ in range(5):
        ours.grad = torch.randn(5, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_matrices_of_layers_and_nothing_else_are_muons() -> None:
    model = registry.build("tarflow-tiny")
    config = TrainConfig(optimizer="muon", learning_rate=1e-3, muon_learning_rate=0.01)
    optimizer = make_optimizer(model, config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    matrices = {names[p] for g in optimizer.param_groups if g["matrices"] for p in g["params"]}
    expected = {
        f"blocks.{block}.layers.0.{part}.weight"
        for block in range(2)
        for part in ("qkv", "proj", "expand", "contract")
    }
    assert matrices == expected
    assert {g["lr"] for g in optimizer.param_groups if g["matrices"]} == {0.01}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(names)


def test_a_state_that_is_loaded_goes_on_as_before() -> None:
    def steps(model: TarFlow, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(seed)
            images = torch.randint(0, 256, (4, 1, 4, 4), generator=generator)
            model.loss(images, generator=generator).mean().backward()
            optimizer.step()

    torch.manual_seed(0)
    config = TarFlowConfig((1, 4, 4), 2, 64, blocks=2, layers_per_block=1)
    whole, part = TarFlow(config), TarFlow(config)
    part.load_state_dict(whole.state_dict())
    recipe = TrainConfig(optimizer="muon", learning_rate=1e-2)
    first = make_optimizer(whole, recipe)
    steps(whole, first, range(6))
    before = make_optimizer(part, recipe)
    steps(part, before, range(3))
    after = make_optimizer(part, recipe)
    after.load_state_dict(before.state_dict())
    steps(part, after, range(3, 6))
    for (name, a), b in zip(whole.named_parameters(), part.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_model_that_does_not_say_which_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"which of its weights are matrices.*macow does not"):
        make_optimizer(registry.build("macow-tiny"), TrainConfig(optimizer="muon"))
