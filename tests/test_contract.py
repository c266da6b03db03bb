"""Laws of every family, over one tiny preset of each in the registry."""

from pathlib import Path

import numpy as np
import pytest
import torch

import exactflow
from exactflow.core.density_flow import FittedFlow
from exactflow.core.model import DataInitialized, Flow, NonFiniteError
from exactflow.data.datasets import ImageDataset
from exactflow.models import registry
from exactflow.training import TrainConfig, fit
from exactflow.training.fitting import fit_closed_form
from flows import blueprint, perturb, some_grey_levels, some_images, some_labels

FAMILIES = [
    f"{n}-tiny" for n, family in registry.FAMILIES.items() if issubclass(family.model, Flow)
]
SHAPE = (1, 4, 4)
# where the tiny preset needs larger images than these, what makes it fit
SMALLER = {
    "tarflow-tiny": {"patch_size": 2, "width": 64, "blocks": 2, "layers_per_block": 1},
    "macow-tiny": {"steps": [[1], [1]], "hidden": [8, 8]},
    "denseflow-tiny": {"units": [2], "modules": [2], "widths": [8]},
}
EXACT = [n for n in FAMILIES if registry.family_of(n).model.exact]
TRAINED = [n for n in FAMILIES if not registry.family_of(n).model.closed_form]
LEVELS = 8


def data(count: int = 64, name: str = "contract") -> ImageDataset:
    """Images with some structure: dark on the left, noise everywhere."""
    noise = np.random.default_rng(0).integers(0, 4, size=(count, *SHAPE))
    ramp = np.arange(SHAPE[-1])
    return ImageDataset(
        (noise + ramp).astype(np.uint8), None, name, "1", "train", LEVELS, (), "", "", ""
    )


def make(name: str, dtype: torch.dtype = torch.float64, levels: int = LEVELS) -> Flow:
    """A small model of the family, away from its initial values, in evaluation mode."""
    torch.manual_seed(0)
    model = registry.build(name, image_shape=SHAPE, levels=levels, **SMALLER.get(name, {}))
    assert isinstance(model, Flow)
    model = model.to(dtype)
    images = torch.from_numpy(data().images) % levels
    if isinstance(model, FittedFlow):
        model.fit([images], seed=0)
        return model.eval()
    if isinstance(model, DataInitialized):
        model.initialize(images, generator=torch.Generator().manual_seed(0))
    return perturb(model, 0.1).to(dtype).eval()


@pytest.mark.parametrize("name", EXACT)
def test_log_abs_det_is_the_jacobians(name: str) -> None:
    model = make(name)
    for image in some_images(model, 2):
        z, log_abs_det = model.encode(image[None])

        def flat(x: torch.Tensor) -> torch.Tensor:
            return model.encode(x.view(1, *model.event_shape))[0].flatten()

        jacobian = torch.autograd.functional.jacobian(flat, image.flatten())
        assert jacobian.shape == (z.numel(), image.numel())
        found = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(found, log_abs_det[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_decode_inverts_encode(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = make(name, dtype)
    x = some_images(model)
    z, _ = model.encode(x)
    assert tuple(z.shape[1:]) == model.prior.shape
    torch.testing.assert_close(model.decode(z), x, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_score_depends_on_its_image_and_seed_alone(name: str) -> None:
    model = make(name)
    images = some_grey_levels(model, 7)
    whole = exactflow.log_likelihood(model, images, seed=3, k=2)
    for batch_size in (1, 4):
        again = exactflow.log_likelihood(model, images, seed=3, k=2, batch_size=batch_size)
        torch.testing.assert_close(again.nats, whole.nats, rtol=0, atol=1e-9)
    changed = images.clone()
    changed[1:] = changed[1:].flip(0)
    alone = exactflow.log_likelihood(model, changed, seed=3, k=2).nats[0]
    torch.testing.assert_close(alone, whole.nats[0], rtol=0, atol=1e-9)
    model.train()  # scores are those of evaluation mode all the same, and leave the mode alone
    training = exactflow.log_likelihood(model, images, seed=3, k=2)
    assert torch.equal(training.nats, whole.nats)
    assert model.training
    expected = "dequantized" if model.exact else "bound"
    assert whole.kind == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_more_draws_tighten_the_bound(name: str) -> None:
    """E[ln mean of k weights] rises with k (Burda et al., arXiv 1509.00519, theorem 1)."""
    model = make(name, levels=2)  # wide intervals: the noise inside them matters
    images = torch.from_numpy(data(8).images) % 2

    def mean(k: int) -> float:  # of as many draws for every k
        scores = [exactflow.log_likelihood(model, images, k=k, seed=s) for s in range(64 // k)]
        return float(torch.stack([score.nats for score in scores]).mean())

    found = [mean(k) for k in (1, 8, 64)]
    assert found[0] < found[1] < found[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_bound_is_below_the_probability_of_everything(name: str) -> None:
    """Probabilities of all images of two pixels sum to at most 1, and to nearly that with k."""
    fields = {"image_shape": (1, 2, 2), "levels": 2, **SMALLER.get(name, {})}
    fields |= {"tarflow-tiny": {"patch_size": 1}, "denseflow-tiny": {"landmarks": 1}}.get(name, {})
    torch.manual_seed(1)
    model = registry.build(name, **fields)
    assert isinstance(model, Flow)
    model = model.double()
    grid = torch.tensor(
        [[a, b, c, d] for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)]
    )
    images = grid.view(16, 1, 2, 2).to(torch.uint8)
    if isinstance(model, FittedFlow):
        model.fit([images], seed=0)
    elif isinstance(model, DataInitialized):
        model.initialize(images, generator=torch.Generator().manual_seed(0))
    total = float(exactflow.log_likelihood(model, images, k=300).nats.exp().sum())
    outside = exactflow.sample(model, 1500, seed=5, batch_size=1500).x
    inside = float((outside.abs() <= 1).all(-1).all(-1).all(-1).double().mean())
    # the mass of the model inside the cube, estimated in two ways
    assert abs(total - inside) < 0.05 + 4 * (inside * (1 - inside) / 1500) ** 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_sample_k_belongs_to_seed_k(name: str) -> None:
    model = make(name)
    drawn = exactflow.sample(model, 5, seed=10, batch_size=2)
    assert drawn.x.shape == (5, *SHAPE)
    assert drawn.images.dtype == torch.uint8
    alone = exactflow.sample(model, 1, seed=13)
    torch.testing.assert_close(alone.x[0], drawn.x[3], rtol=0, atol=1e-9)
    if drawn.iterations:
        assert float(drawn.certificate.max()) < 1e-9
    else:
        assert bool(drawn.certificate.isnan().all())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_scores_and_samples_alike(name: str, tmp_path: Path) -> None:
    model = make(name, torch.float32)
    model.save_pretrained(tmp_path / name)
    again = exactflow.from_pretrained(tmp_path / name)
    assert type(again) is type(model)
    assert again.config == model.config
    assert isinstance(again, Flow)
    images = some_grey_levels(model)
    expected = exactflow.log_likelihood(model, images).nats
    assert torch.equal(exactflow.log_likelihood(again, images).nats, expected)
    assert torch.equal(exactflow.sample(again, 2).x, exactflow.sample(model, 2).x)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("recompute", [False, True])
def test_training_resumes_bitwise(name: str, recompute: bool, tmp_path: Path) -> None:
    def run(folder: str, steps: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = registry.build(name, image_shape=SHAPE, levels=LEVELS, **SMALLER.get(name, {}))
        config = TrainConfig(
            batch_size=16,
            epochs=1.5,
            decay="exponential",  # whose rate does not depend on the length of the run
            learning_rate=1e-2,
            warmup_steps=0,
            ema_decay=0.9,
            checkpoint_every=3,
            activation_checkpointing=recompute,
        )
        assert config.schedule(64).total == 6
        if steps < 6:
            with pytest.raises(KeyboardInterrupt):
                fit(model, data(), config, tmp_path / folder, progress=False, every={3: stop})
        else:
            fit(model, data(), config, tmp_path / folder, progress=False)
        return model.state_dict()

    def stop(progress: object) -> dict[str, float]:
        raise KeyboardInterrupt

    whole = run("whole", 6)
    run("parts", 3)
    parts = run("parts", 6)
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_training_lowers_the_loss(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = registry.build(name, image_shape=SHAPE, levels=LEVELS, **SMALLER.get(name, {}))
    assert isinstance(model, Flow)
    images = torch.from_numpy(data(128).images)
    if isinstance(model, DataInitialized):
        model.initialize(images[:64], generator=torch.Generator().manual_seed(0))
    before = exactflow.log_likelihood(model, images).bits_per_dim
    config = TrainConfig(batch_size=32, steps=30, learning_rate=5e-3, warmup_steps=5)
    fit(model, data(128), config, tmp_path, progress=False)
    after = exactflow.log_likelihood(model, images).bits_per_dim
    assert after < before - 0.1


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in TRAINED])
def test_a_fit_is_a_run_that_returns_at_once(name: str, tmp_path: Path) -> None:
    states = []
    for _ in range(2):
        model = registry.build(name, image_shape=SHAPE, levels=LEVELS)
        assert isinstance(model, FittedFlow)
        result = fit_closed_form(model, data(256), TrainConfig(), tmp_path, progress=False)
        assert result.step == 1
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("name", FAMILIES)
def test_overflow_is_an_error_and_no_number(name: str) -> None:
    model = make(name, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        exactflow.log_likelihood(model, some_grey_levels(model))
    with pytest.raises(NonFiniteError):
        exactflow.sample(model, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_preset_of_the_family_builds_without_memory(name: str) -> None:
    family = registry.family_of(name)
    for preset in family.presets:
        assert blueprint(preset).num_parameters > 0
        config = registry.preset(preset)
        TrainConfig(**config.training)


def test_labels_are_refused_by_unconditional_families() -> None:
    for name in FAMILIES:
        model = make(name)
        if model.num_classes == 0:
            with pytest.raises(ValueError, match="unconditional"):
                model.encode(some_images(model, 2), torch.zeros(2, dtype=torch.int64))
        assert some_labels(model, 2) is None or model.num_classes


def test_convergence_of_parts_that_encode_in_their_own_way() -> None:
    """MaCow's lines: each iteration settles one more at least, as for any autoregressive part."""
    from exactflow.sampling.convergence import convergence

    model = make("macow-tiny")
    blocks = convergence(model, some_images(model))
    assert len(blocks) == len(exactflow.sample(model, 1).iterations)
    for block in blocks:
        assert block.jacobi.finished
        assert block.jacobi.iterations <= SHAPE[1]  # as many as there are lines, at most
