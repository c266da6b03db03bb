"""The diffusion transformer: published counts, identity at the start, laws of its inputs."""

import pytest
import torch

from exactflow.core.config import override
from exactflow.nn.dit import DiT, DiTConfig, grid_embedding

SMALL = DiTConfig((2, 4, 6), 3, patch_size=2, width=16, depth=2, num_heads=2, num_classes=3)


@pytest.mark.parametrize(
    ("patch_size", "depth", "width", "heads", "count"),
    [
        (2, 28, 1152, 16, 674_834_720),  # XL/2
        (2, 24, 1024, 16, 457_840_672),  # L/2
        (2, 12, 768, 12, 130_315_808),  # B/2
        (4, 12, 768, 12, 130_426_496),  # B/4
        (2, 12, 384, 6, 32_865_056),  # S/2
    ],
)
def test_published_parameter_counts(
    patch_size: int, depth: int, width: int, heads: int, count: int
) -> None:
    config = DiTConfig((4, 32, 32), 8, patch_size, width, depth, heads, num_classes=1000)
    with torch.device("meta"):
        assert sum(p.numel() for p in DiT(config).parameters()) == count


def randomized(config: DiTConfig) -> DiT:
    torch.manual_seed(0)
    network = DiT(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.double().eval()


def test_output_and_dropped_labels() -> None:
    network = randomized(SMALL)
    x, t = torch.randn(3, 2, 4, 6, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    label = torch.tensor([0, 2, 3])
    out = network(x, t, label)
    assert out.shape == (3, 3, 4, 6)
    dropped = network(x, t)
    torch.testing.assert_close(out[2], dropped[2])
    assert not torch.allclose(out[:2], dropped[:2])
    torch.testing.assert_close(network(x[1:2], t[1:2], label[1:2]), out[1:2])


def test_initial_network() -> None:
    network = DiT(SMALL)
    x, t = torch.randn(3, 2, 4, 6), torch.rand(3)
    assert not network(x, t).any()
    tokens = torch.randn(3, 6, 16)
    for block in network.blocks:
        assert torch.equal(block(tokens, torch.randn(3, 16)), tokens), "blocks start as identity"


def test_patches_are_put_back_where_they_were() -> None:
    """With the identity as the network, the output is the input."""
    network = DiT(override(SMALL, {"out_channels": 2, "width": 8}))
    x = torch.randn(2, 2, 4, 6)
    with torch.no_grad():
        network.patch.weight.copy_(torch.eye(8))
        network.output.weight.copy_(torch.eye(8))
        network.get_buffer("position").zero_()
        patches = network.patch(torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).mT)
        mean, std = patches.mean(-1, keepdim=True), patches.std(-1, correction=0, keepdim=True)
        normed = (patches - mean) / (std.square() + 1e-6).sqrt()
        wanted = torch.nn.functional.pixel_shuffle(normed.mT.unflatten(2, (2, 3)), 2)
        torch.testing.assert_close(network(x, torch.rand(2)), wanted)


def test_positions_differ_by_row_and_by_column() -> None:
    table = grid_embedding(3, 5, 16).view(3, 5, 16)
    column, row = table.split(8, dim=-1)
    assert torch.equal(column, column[:1].expand(3, -1, -1))
    assert torch.equal(row, row[:, :1].expand(-1, 5, -1))
    assert len(table.flatten(0, 1).unique(dim=0)) == 15
    torch.testing.assert_close(row[2, 0, 1], torch.tensor(2 / 10, dtype=torch.float64).sin())


def test_gradients_reach_every_parameter() -> None:
    network = randomized(SMALL)
    x, t = torch.randn(4, 2, 4, 6, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    network(x, t, torch.tensor([0, 1, 2, 3])).square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"\(batch, 2, 4, 6\), got \(1, 2, 6, 4\)"):
        DiT(SMALL)(torch.zeros(1, 2, 6, 4), torch.zeros(1))
    for change, message in [
        ({"patch_size": 3}, "divides height and width"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"dropout": 1.0}, "dropout"),
        ({"depth": 0}, "positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            override(SMALL, change)
