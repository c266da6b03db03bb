"""No preset of our own overflows: samples are finite at any weights training may reach."""

import math

import pytest
import torch

import exactflow
from exactflow.core.density_flow import FittedFlow
from exactflow.core.model import DataInitialized, Flow, GenerativeModel
from exactflow.models import registry
from exactflow.models.macow.model import MaCowConfig
from exactflow.models.tarflow.model import TarFlowConfig
from exactflow.paths.chain_model import ChainModel
from exactflow.sampling.solvers import solver_for

SEEDS = 48
OWN = [name for name in registry.names() if not registry.preset(name).published]
SMALL = [name for name in OWN if name.endswith(("-tiny", "-digits"))]
FLOWS = [n for n in SMALL if issubclass(registry.family_of(n).model, Flow)]
PATHS = [n for n in SMALL if n.endswith("-tiny") and n not in FLOWS]


def some_data(model: GenerativeModel, count: int) -> torch.Tensor:
    """Grey levels like digits: blots on an empty ground."""
    channels, height, width = model.event_shape
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    at = torch.rand(count, 2, 1, 1, generator=generator) * height
    blot = torch.exp(-((y - at[:, 0]) ** 2 + (x - at[:, 1]) ** 2) / 4)
    images = ((model.levels - 1) * blot).round().to(torch.uint8)
    return images[:, None].expand(-1, channels, -1, -1).contiguous()


def train(model: GenerativeModel, images: torch.Tensor, steps: int, rate: float) -> None:
    """Take a few steps at a higher learning rate than the preset's."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        batch = images[torch.randint(len(images), (16,), generator=generator)]
        optimizer.zero_grad()
        model.loss(batch, generator=generator).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def largest(model: GenerativeModel) -> float:
    """Largest value of finite samples of many seeds; of flows, by the reference inverse."""
    solver = solver_for(model, "sequential") if isinstance(model, Flow) else "auto"
    if not isinstance(model, Flow | ChainModel):
        solver = solver_for(model, steps=6)
    drawn = exactflow.sample(model, SEEDS, solver=solver, batch_size=SEEDS)
    assert len(drawn.seeds) == SEEDS
    return float(drawn.x.detach().abs().max())


@pytest.mark.parametrize("name", FLOWS)
def test_every_sample_of_a_small_flow_is_finite(name: str) -> None:
    """At initial weights, after a rough training, and with arbitrary conditional scales."""
    torch.manual_seed(0)
    model = registry.build(name)
    images = some_data(model, 128)
    if isinstance(model, FittedFlow):
        model.fit([images])
        assert largest(model) < 10
        return
    if isinstance(model, DataInitialized):
        model.initialize(images, generator=torch.Generator().manual_seed(0))
    assert largest(model) < 50
    train(model, images, 12, 2e-2)
    assert math.isfinite(largest(model))
    if isinstance(model.config, TarFlowConfig | MaCowConfig):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0)
        assert math.isfinite(largest(model))


@pytest.mark.parametrize("name", PATHS)
def test_every_sample_of_a_small_model_on_a_path_is_finite(name: str) -> None:
    torch.manual_seed(0)
    model = registry.build(name)
    assert largest(model) < 50
    train(model, some_data(model, 128), 6, 1e-2)
    assert math.isfinite(largest(model))


@pytest.mark.parametrize(
    "name",
    [*registry.FAMILIES["tarflow"].presets, *registry.FAMILIES["macow"].presets],
)
def test_scales_are_bounded_in_our_own_presets_and_published_ones_are_as_published(
    name: str,
) -> None:
    """Also in presets that are too large to be sampled here."""
    config, own = registry.preset(name).config, name in OWN
    if isinstance(config, TarFlowConfig):
        bounded = config.scale, config.soft_clip, config.final_norm
        assert bounded == (("softplus", 4.0, True) if own else ("exp", 0.0, False))
    else:
        assert config.soft_clip == (2.0 if own else 0.0)


def test_a_soft_clip_bounds_what_the_inverse_of_macow_divides_by() -> None:
    """s = sigmoid(2 + c tanh(r / c)) is at least sigmoid(2 - c), whatever the network says."""
    from exactflow.models.macow.transforms import shift_and_log_scale

    raw = torch.linspace(-1e4, 1e4, 1001, dtype=torch.float64)[None, :, None]
    raw = torch.cat([raw, raw], dim=1).view(1, 2, -1)
    shift, log_scale = shift_and_log_scale(raw, additive=False, soft_clip=2.0)
    assert float(log_scale.exp().min()) == pytest.approx(0.5)
    assert float(shift.abs().max()) <= 2
    plain = shift_and_log_scale(raw, additive=False)
    assert torch.equal(plain[0], raw[:, :1])
    assert torch.equal(plain[1], torch.nn.functional.logsigmoid(raw[:, 1:] + 2))
    with pytest.raises(ValueError, match="finite soft_clip >= 0, got -1"):
        registry.build("macow-tiny", soft_clip=-1.0)
