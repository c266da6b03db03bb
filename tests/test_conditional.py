"""Conditionals: bijections with their determinants, also far out in the tails."""

import math

import pytest
import torch
from torch import Tensor

from exactflow.core.conditional import (
    Affine,
    Chain,
    Conditional,
    LogisticMixture,
    Triangular,
)
from exactflow.core.spline import Spline
from exactflow.models import registry
from exactflow.models.tarflow.model import TarFlow, TarFlowConfig
from exactflow.sampling.guidance import Guidance, GuidedTransform
from flows import make, some_grey_levels, some_images, some_labels

DIM = 4
CONDITIONALS: dict[str, Conditional] = {
    "affine": Affine(DIM),
    "affine, softplus": Affine(DIM, "softplus"),
    "triangular": Triangular(DIM),
    "triangular, two entries": Triangular(DIM, ((1, 0), (3, 1))),
    "triangular, no entries": Chain((Affine(DIM), Triangular(DIM, ()))),
    "triangular, one number": Chain((Affine(1), Triangular(1))),
    "mixture of 1": LogisticMixture(DIM, 1),
    "mixture of 4": LogisticMixture(DIM, 4),
    "mixture of 8": LogisticMixture(DIM, 8),
    "spline": Spline(DIM, 8),
    "spline of one bin": Spline(DIM, 1),
    "chain": Chain((Affine(DIM), LogisticMixture(DIM, 3), Spline(DIM, 4), Triangular(DIM))),
}


def some(conditional: Conditional, dim: int, spread: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    raw = torch.randn(5, 6, conditional.size, generator=generator, dtype=torch.float64)
    z = spread * torch.randn(5, 6, dim, generator=generator, dtype=torch.float64)
    return z, conditional.constrain(conditional.start.double() + raw)


@pytest.mark.parametrize("title", CONDITIONALS)
def test_the_log_determinant_is_the_jacobians(title: str) -> None:
    """The map is also triangular in the numbers of a token, and increasing in each."""
    conditional = CONDITIONALS[title]
    dim = 1 if "one number" in title else DIM
    x, theta = some(conditional, dim, 1.5)
    for row in range(2):
        one = x[row : row + 1, :1]
        parameters = theta[row : row + 1, :1]

        def move(u: Tensor, parameters: Tensor = parameters) -> Tensor:
            return conditional.forward(u, parameters)[0]

        jacobian = torch.autograd.functional.jacobian(move, one).view(dim, dim)
        expected = torch.linalg.slogdet(jacobian).logabsdet
        got = conditional.forward(one, parameters)[1][0]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
        assert torch.equal(jacobian.triu(1), torch.zeros_like(jacobian))
        assert bool((jacobian.diagonal() > 0).all())


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("title", CONDITIONALS)
def test_round_trips_hold_also_in_the_tails(
    title: str, dtype: torch.dtype, tolerance: float, spread: float
) -> None:
    conditional = CONDITIONALS[title]
    z, theta = (t.to(dtype) for t in some(conditional, 1 if "one number" in title else DIM, spread))
    x = conditional.inverse(z, theta)
    assert x.dtype == dtype
    back = conditional.forward(x, theta)[0]
    torch.testing.assert_close(back, z, rtol=tolerance, atol=tolerance)
    again = conditional.inverse(back, theta)
    torch.testing.assert_close(again, x, rtol=tolerance, atol=tolerance)


def test_a_mixtures_root_is_found_between_components_far_apart() -> None:
    """Narrow components with wide gaps, where Newton's method alone runs away."""
    generator = torch.Generator().manual_seed(2)
    for components in (2, 4, 8):
        mixture = LogisticMixture(16, components)
        raw = 4 * torch.randn(64, 4, mixture.size, generator=generator, dtype=torch.float64)
        theta = mixture.constrain(4 * torch.tanh(raw / 4))
        z = 3 * torch.randn(64, 4, 16, generator=generator, dtype=torch.float64)
        back = mixture.forward(mixture.inverse(z, theta), theta)[0]
        torch.testing.assert_close(back, z, rtol=0, atol=1e-9)


def test_a_root_does_not_depend_on_the_others() -> None:
    mixture = LogisticMixture(DIM, 4)
    z, theta = some(mixture, DIM, 2.0)
    together = mixture.inverse(z, theta)
    alone = torch.cat([mixture.inverse(z[i : i + 1], theta[i : i + 1]) for i in range(len(z))])
    assert torch.equal(together, alone)


def test_one_component_is_an_affine_map_and_a_density_of_logistics() -> None:
    """K = 1: z = (x - mu) / (1.7 s); and exp(log_abs_det) times the latent's law is the mixture."""
    mixture = LogisticMixture(DIM, 1)
    x, theta = some(mixture, DIM, 2.0)
    named = mixture.named(theta)
    mean, log_scale = named["mean"][..., 0, :], named["log_scale"][..., 0, :] + math.log(1.7)
    affine = torch.cat([log_scale, mean], dim=-1)
    for got, expected in zip(
        mixture.forward(x, theta), Affine(DIM).forward(x, affine), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    mixture = LogisticMixture(1, 3)
    _, theta = some(mixture, 1, 1.0)
    grid = torch.linspace(-60, 60, 20_001, dtype=torch.float64).view(-1, 1, 1)
    theta = theta[:1, :1].expand(len(grid), 1, -1)
    z, log_abs_det = mixture.forward(grid, theta)
    logistic = math.log(1.7) + 1.7 * z - 2 * torch.nn.functional.softplus(1.7 * z)
    density = torch.exp(logistic[:, 0, 0] + log_abs_det)
    assert float(torch.trapezoid(density, grid[:, 0, 0])) == pytest.approx(1, abs=1e-6)
    weights, means, scales = (t[0, 0, :, 0] for t in mixture.named(theta).values())
    place = (grid[:, 0] - means) / scales.exp()
    law = (weights.exp() / scales.exp() * torch.sigmoid(place) * torch.sigmoid(-place)).sum(1)
    torch.testing.assert_close(density, law, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("title", CONDITIONALS)
def test_the_start_is_close_to_the_identity(title: str) -> None:
    conditional = CONDITIONALS[title]
    dim = 1 if "one number" in title else DIM
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None].expand(9, 1, dim)
    theta = conditional.constrain(conditional.start.double()).expand(9, 1, -1)
    z, log_abs_det = conditional.forward(x, theta)
    torch.testing.assert_close(z, x, rtol=0, atol=1.0)
    assert float(log_abs_det.abs().max()) < dim


def test_guidance_extrapolates_parameters_and_refuses_what_means_nothing() -> None:
    model = make("mixture, triangular")
    block = model.blocks[0]
    label, null = torch.tensor([0, 2]), torch.tensor([3, 3])
    x = torch.randn(2, *model.prior.shape, dtype=torch.float64)
    guided = GuidedTransform(block, Guidance(1.5, schedule="constant"), 3)
    theta, other = block.conditioner(x, label), block.conditioner(x, null)
    got = block.conditional.named(guided.conditioner(x, label))
    ours, theirs = block.conditional.named(theta), block.conditional.named(other)
    torch.testing.assert_close(
        got["shift 1"], ours["shift 1"] + 1.5 * (ours["shift 1"] - theirs["shift 1"])
    )
    torch.testing.assert_close(
        got["mean 2"], ours["mean 2"] + 1.5 * (ours["mean 2"] - theirs["mean 2"])
    )
    assert torch.equal(got["coupling 3"], ours["coupling 3"])
    with pytest.raises(ValueError, match="'gaussian-score' multiplies Gaussians"):
        GuidedTransform(block, Guidance(1.0, "gaussian-score"), 3)


@pytest.mark.parametrize(
    "name", ["triangular", "mixture", "spline", "mixture, triangular", "mixing, channels"]
)
def test_a_network_in_bfloat16_keeps_its_arithmetic_in_float32(name: str) -> None:
    """Latents and log-determinants are float32, and close to those of a float32 network."""
    model = make(name, torch.float32)
    x, label = some_images(model), some_labels(model)
    z, log_abs_det = model.encode(x, label)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, other = model.encode(x, label)
        loss = model.loss(some_grey_levels(model), label).mean()
    loss.backward()
    assert rounded.dtype == other.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(rounded, z, rtol=0, atol=0.2)
    for block in model.blocks:  # the map itself rounds nothing to bfloat16
        tokens = torch.randn(2, *model.prior.shape)
        theta = block.conditioner(tokens, None if label is None else label[:2])
        with torch.autocast("cpu", torch.bfloat16):
            moved = block.conditional.forward(tokens, theta)[0]
        assert torch.equal(moved, block.conditional.forward(tokens, theta)[0])
    for mixing in model.mixings:
        with torch.autocast("cpu", torch.bfloat16):
            moved = mixing(tokens)[0]
        assert torch.equal(moved, mixing(tokens)[0])
    torch.testing.assert_close(other, log_abs_det, rtol=0.05, atol=0.5)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_numbers_of_a_token_are_mixed_before_each_block() -> None:
    """By a triangular matrix for each block, which the inverse undoes."""
    model = make("mixing, channels")
    mixing = model.mixings[1]
    x = torch.randn(2, *model.prior.shape, dtype=torch.float64)
    z, log_abs_det = mixing(x)
    jacobian = torch.autograd.functional.jacobian(lambda u: mixing(u)[0], x[:1, :1])
    jacobian = jacobian.view(model.config.token_dim, -1)
    assert torch.equal(jacobian.diagonal(), torch.ones(len(jacobian)).double())
    assert torch.equal(jacobian.triu(1), torch.zeros_like(jacobian))
    assert float(jacobian.tril(-1).abs().max()) > 0
    assert torch.equal(log_abs_det, torch.zeros(2).double())
    torch.testing.assert_close(mixing.inverse(z), x, rtol=0, atol=1e-12)
    assert not TarFlow(TarFlowConfig((1, 4, 4), 2, 64, 2, 1)).mixings


def test_channels_are_those_before_at_the_same_pixel() -> None:
    """Numbers of a token: channel slowest, then row, then column."""
    config = TarFlowConfig((3, 2, 4), 2, conditional=("channels",), start_token=True)
    conditional = config.make_conditional()
    assert isinstance(conditional, Triangular)
    assert conditional.entries is not None
    assert set(conditional.entries) == {
        (channel * 4 + pixel, before * 4 + pixel)
        for channel, before in [(1, 0), (2, 0), (2, 1)]
        for pixel in range(4)
    }
    with pytest.raises(ValueError, match="below the diagonal of 4 rows, got"):
        Triangular(4, ((1, 1),))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conditional": ("mixture",)}, "start_token=True"),
        ({"conditional": ()}, "affine | channels | triangular | mixture"),
        ({"conditional": ("mixture",), "components": 0, "start_token": True}, "components >= 1"),
    ],
)
def test_bad_configurations(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        TarFlow(TarFlowConfig((1, 4, 4), 2, 64, 2, 1, **fields))
    with pytest.raises(ValueError, match=r"'mixture' \| 'spline', got 'bend'"):
        registry.build("tarflow-tiny", conditional=["affine", "bend"], start_token=True)
