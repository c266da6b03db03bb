"""Laws of every model on a path, over one tiny preset of each family in the registry."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import exactflow
from exactflow.core.model import NonFiniteError
from exactflow.data.datasets import ImageDataset
from exactflow.models import registry
from exactflow.paths.chain_model import ChainModel
from exactflow.paths.ode import Dopri5, Euler, Heun
from exactflow.paths.path_model import PathModel
from exactflow.sampling.request import SamplingOptions
from exactflow.sampling.solvers import solver_for
from exactflow.training import TrainConfig, fit

TINY = {
    "flow-matching-tiny": {},
    "iddpm-tiny": {"diffusion_steps": 20},
    "hdit-tiny": {},
    "maskdit-tiny": {},
}
SHAPE, LEVELS = (1, 8, 8), 17


def make(name: str, dtype: torch.dtype = torch.float64, **fields: Any) -> PathModel:
    """A small model of the family whose last map is not zero, in evaluation mode."""
    torch.manual_seed(0)
    model = registry.build(name, image_shape=SHAPE, levels=LEVELS, **TINY[name], **fields)
    assert isinstance(model, PathModel)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def data(count: int = 32) -> ImageDataset:
    images = np.random.default_rng(0).integers(0, LEVELS, size=(count, *SHAPE), dtype=np.uint8)
    return ImageDataset(images, None, "paths", "1", "train", LEVELS, (), "", "", "")


def solvers(model: PathModel) -> list[str]:
    chain = ["ancestral", "ddim"] if isinstance(model, ChainModel) else []
    return ["auto", "euler", "midpoint", "heun", "dpm++", "edm", *chain]


def test_every_family_on_a_path_is_here() -> None:
    kinds = {n for n, family in registry.FAMILIES.items() if issubclass(family.model, PathModel)}
    assert {registry.build(name).kind for name in TINY} == kinds


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_sample_k_belongs_to_seed_k_whatever_the_solver(name: str) -> None:
    model = make(name)
    for solver in solvers(model):
        chosen = solver_for(model, solver, steps=6)
        drawn = exactflow.sample(model, 3, seed=4, solver=chosen, batch_size=2)
        assert drawn.x.shape == (3, *SHAPE)
        assert int(drawn.images.max()) < LEVELS
        each = 11 if solver == "edm" else {"midpoint": 2, "heun": 2}.get(solver, 1) * 6
        passes = 2 * each  # two batches
        if solver != "auto":
            assert drawn.evaluations == passes
        assert bool(drawn.certificate.isnan().all())
        alone = exactflow.sample(model, 1, seed=6, solver=chosen)
        torch.testing.assert_close(alone.x[0], drawn.x[2], rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_an_adaptive_solver_agrees_with_fine_steps(name: str) -> None:
    model = make(name)
    fine = exactflow.sample(model, 2, solver=Heun(60))
    adaptive = exactflow.sample(model, 2, solver=Dopri5(1e-4))
    difference = (fine.x - adaptive.x).abs().max()
    assert float(difference) < 0.1 * float(adaptive.x.abs().max())


@pytest.mark.parametrize("name", TINY)
def test_guidance_of_zero_changes_nothing_and_more_does(name: str) -> None:
    fields = {"num_classes": 3, "label_dropout": 0.1}
    model = make(name, **fields)
    labels = torch.tensor([0, 2])
    plain = exactflow.sample(model, 2, labels, solver=Euler(5))
    zero = exactflow.sample(model, 2, labels, solver=Euler(5), guidance=0.0)
    more = exactflow.sample(model, 2, labels, solver=Euler(5), guidance=2.0)
    assert torch.equal(plain.x, zero.x)
    assert not torch.allclose(plain.x, more.x)
    assert more.evaluations == 2 * plain.evaluations
    with pytest.raises(ValueError, match="guidance needs labels"):
        exactflow.sample(model, 2, guidance=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flow-matching-tiny", "iddpm-tiny"])
def test_a_score_names_its_kind_and_depends_on_image_and_seed_alone(name: str) -> None:
    model = make(name)
    images = torch.from_numpy(data(3).images)
    whole = exactflow.log_likelihood(model, images, seed=2, batch_size=3)
    single = exactflow.log_likelihood(model, images, seed=2, batch_size=1)
    part = exactflow.log_likelihood(model, images[1:], seed=2, first=1)
    chain = isinstance(model, ChainModel)
    assert whole.kind == ("bound" if chain else "estimate")
    assert whole.dequantization == ("none" if chain else "uniform")
    assert "steps" in whole.details
    assert chain or whole.details["solver"] == "dopri5"
    torch.testing.assert_close(single.nats, whole.nats, rtol=0, atol=1e-8)
    torch.testing.assert_close(part.nats, whole.nats[1:], rtol=0, atol=1e-8)
    if chain:
        with pytest.raises(ValueError, match="expected k=1"):
            exactflow.log_likelihood(model, images, k=2)


@pytest.mark.parametrize("name", TINY)
def test_a_saved_model_samples_alike(name: str, tmp_path: Path) -> None:
    model = make(name, torch.float32)
    model.save_pretrained(tmp_path)
    again = exactflow.from_pretrained(tmp_path)
    assert again.config == model.config
    expected = exactflow.sample(model, 2, solver=Euler(4)).x
    assert torch.equal(exactflow.sample(again, 2, solver=Euler(4)).x, expected)


@pytest.mark.parametrize("name", TINY)
def test_training_resumes_bitwise(name: str, tmp_path: Path) -> None:
    config = TrainConfig(
        batch_size=8,
        epochs=1.5,
        decay="exponential",
        learning_rate=1e-3,
        warmup_steps=0,
        ema_decay=0.9,
        checkpoint_every=3,
    )

    def run(folder: str, stopped: bool = False) -> dict[str, torch.Tensor]:
        def stop(progress: object) -> dict[str, float]:
            raise KeyboardInterrupt

        model = make(name, torch.float32)
        if stopped:
            with pytest.raises(KeyboardInterrupt):
                fit(model, data(), config, tmp_path / folder, progress=False, every={3: stop})
        else:
            fit(model, data(), config, tmp_path / folder, progress=False)
        return model.state_dict()

    whole = run("whole")
    run("parts", stopped=True)
    parts = run("parts")
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


@pytest.mark.parametrize("name", TINY)
def test_what_a_model_cannot_do_is_said(name: str) -> None:
    model = make(name)
    with pytest.raises(ValueError, match="expected solver auto"):
        exactflow.sample(model, 1, solver="jacobi")
    with pytest.raises(ValueError, match="trace has no meaning"):
        exactflow.sample(model, 1, options=SamplingOptions(trace=True))
    flow = registry.build("tarflow-tiny")
    with pytest.raises(ValueError, match="steps has no meaning"):
        solver_for(flow, steps=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="seed 7"):
        exactflow.sample(model, 1, seed=7, solver=Euler(2))


def test_parameter_rules_decide_rate_and_decay() -> None:
    """HDiT's mapping network learns at a third of the rate, and only matrices decay."""
    from exactflow.training.optim import make_optimizer

    model = make("hdit-tiny")
    optimizer = make_optimizer(model, TrainConfig(learning_rate=3e-3, weight_decay=0.1))
    by_parameter = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    found = {name: by_parameter[id(p)] for name, p in model.named_parameters()}
    assert len(found) == len(by_parameter)
    mapping = [name for name in found if ".mapping." in name]
    assert mapping
    assert all(found[name][0] == pytest.approx(1e-3) for name in mapping)
    assert all(found[name][1] == 0 for name in found if name.endswith(("scale", "fac")))
    matrices = [name for name in found if name.endswith("qkv_proj.weight")]
    assert matrices
    assert all(found[name] == (3e-3, 0.1) for name in matrices)
