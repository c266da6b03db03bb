"""Laws of reversible training: the plain loss to the bit, the plain gradients up to rounding, and
memory that does not grow with the number of blocks.
"""

import json
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from exactflow.core.composition import Composition, ReversibleTransform
from exactflow.core.density_flow import FittedFlow
from exactflow.core.model import DataInitialized, Flow, GenerativeModel, NonFiniteError
from exactflow.data.datasets import ImageDataset
from exactflow.models import registry
from exactflow.models.denseflow.network import DeferredBatchNorm
from exactflow.models.transforms import AffineCoupling
from exactflow.training import TrainConfig, fit
from exactflow.training.fitting import fit_closed_form
from exactflow.training.optim import recomputed
from exactflow.training.reversible import reversible
from flows import perturb, some_grey_levels, some_labels

NETWORKS = {"dense_depth": 1, "dense_growth": 4, "dequantizer_width": 8, "dequantizer_depth": 1}
NETWORKS |= {"dequantizer_growth": 4, "context_growth": 4, "initial_images": 16}
TARFLOW = {"width": 64, "blocks": 3, "layers_per_block": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "denseflow": (
        "denseflow-tiny",
        {"units": (2, 1), "modules": (3, 2), "widths": (8, 8), "dequantizer_steps": 2, **NETWORKS},
    ),
    "denseflow, odd channels": (
        "denseflow-tiny",
        {"image_shape": (1, 4, 12), "units": (3, 2), "modules": (1, 2), "widths": (4, 5)}
        | {"growth": 1, "landmarks": 3, "dequantizer_steps": 0, **NETWORKS},
    ),
    "macow": ("macow-tiny", {}),
    "macow, one channel, odd": (
        "macow-tiny",
        {"image_shape": (1, 3, 5), "steps": ((2,),), "hidden": (8,)},
    ),
    "macow, additive": (
        "macow-tiny",
        {"image_shape": (1, 4, 8), "steps": ((1,), (1,), (1,)), "hidden": (8, 8, 8), "factor": 2}
        | {"additive": True, "additive_prior": True},
    ),
    "macow, variational": (
        "macow-tiny",
        {"image_shape": (1, 4, 4), "steps": ((1,), (1,)), "hidden": (8, 8)}
        | {"dequantization": "variational", "dequantizer_hidden": (8, 8)},
    ),
    "tarflow, with labels": (
        "tarflow-tiny",
        {"image_shape": (1, 3, 6), "patch_size": 3, "num_classes": 3, "label_dropout": 0.5}
        | TARFLOW,
    ),
    "tarflow, volume preserving": (
        "tarflow-tiny",
        {"image_shape": (2, 4, 4), "patch_size": 2, "volume_preserving": True, **TARFLOW},
    ),
}
SHAPE, LEVELS = (1, 4, 4), 8
SMALL = {  # models for `data`
    "denseflow": MODELS["denseflow"][1] | {"units": (2,), "modules": (2,), "widths": (8,)},
    "macow": {"steps": ((1,), (1,)), "hidden": (8, 8)},
    "tarflow": {"patch_size": 2, **TARFLOW},
}
CONFIG = TrainConfig(
    batch_size=16, accumulate=2, steps=5, learning_rate=5e-3, warmup_steps=0, ema_decay=0.9
)


def make(name: str, dtype: torch.dtype = torch.float64) -> Flow:
    """The model with changed weights, in training mode."""
    preset, overrides = MODELS[name]
    torch.manual_seed(0)
    model = registry.build(preset, **overrides)
    assert isinstance(model, Flow)
    if isinstance(model, DataInitialized):
        images = some_grey_levels(model, 32)
        model.initialize(images, generator=torch.Generator().manual_seed(0))
    return perturb(model, 0.1).to(dtype).train()


def small(family: str) -> GenerativeModel:
    torch.manual_seed(0)
    return registry.build(f"{family}-tiny", image_shape=SHAPE, levels=LEVELS, **SMALL[family])


def data(count: int = 64) -> ImageDataset:
    noise = np.random.default_rng(0).integers(0, 4, size=(count, *SHAPE))
    images = (noise + np.arange(SHAPE[-1])).astype(np.uint8)
    return ImageDataset(images, None, "ramps", "1", "train", LEVELS, (), "", "", "")


def loss_of(model: Flow, count: int = 3) -> Tensor:
    images, label = some_grey_levels(model, count), some_labels(model, count)
    return model.loss(images, label, generator=torch.Generator().manual_seed(0))


def gradients(model: GenerativeModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def both(model: Flow, count: int = 3, dtype: torch.dtype | None = None) -> Iterator[tuple]:
    """Loss, gradients and state after a pass, plain and reversible, from the same state."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for active in (False, True):
        model.load_state_dict(before)
        model.zero_grad()
        with reversible(model, active):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = loss_of(model, count)
            loss.mean().backward()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        yield loss.detach(), gradients(model), state


def relative(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Norm of the difference over the norm of the expected values."""
    assert found.keys() == expected.keys()
    total = sum(float(value.double().square().sum()) for value in expected.values())
    error = sum(float((found[k] - expected[k]).double().square().sum()) for k in expected)
    assert total > 0
    return math.sqrt(error / total)


# Gradients


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_loss_is_the_plain_one_and_so_are_gradients(
    name: str, count: int, dtype: torch.dtype, tolerance: float
) -> None:
    (loss, grads, state), (same_loss, found, same_state) = both(make(name, dtype), count)
    assert torch.equal(same_loss, loss)
    assert bool(loss.isfinite().all())
    assert relative(found, grads) <= tolerance
    for key, value in state.items():  # running statistics moved, and once
        assert torch.equal(same_state[key], value), key


@pytest.mark.parametrize("name", ["denseflow", "macow, variational", "tarflow, with labels"])
def test_under_autocast_gradients_differ_by_less_than_its_rounding(name: str) -> None:
    model = make(name, torch.float32)
    (_, exact, _), _ = both(model)
    (loss, grads, _), (same_loss, found, _) = both(model, dtype=torch.bfloat16)
    assert torch.equal(same_loss, loss)
    assert relative(found, grads) <= 0.5 * relative(grads, exact)


def test_autocast_around_the_backward_pass_changes_nothing() -> None:
    """Parts are evaluated again in the same way, and no cast is kept from the forward pass."""
    model = make("denseflow", torch.float32)
    found = []
    for inside in (False, True):
        model.zero_grad()
        with reversible(model, True), torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model).mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append(gradients(model))
    assert len(found[0]) == len(list(model.parameters()))
    assert relative(found[1], found[0]) == 0


@pytest.mark.parametrize("name", ["denseflow", "macow"])
def test_gradients_reach_the_images_through_frozen_weights(name: str) -> None:
    model = make(name).requires_grad_(False)
    x = torch.rand(2, *model.event_shape, dtype=torch.float64, requires_grad=True)
    found = []
    for active in (False, True):
        with reversible(model, active):
            z, log_abs_det = model.encode(x)
            found.append(torch.autograd.grad((z.square().sum() + log_abs_det.sum()), x)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)
    next(p for name, p in model.named_parameters() if "network" in name).requires_grad_()
    (_, grads, _), (_, same, _) = both(model)
    assert len(grads) == 1
    assert relative(same, grads) <= 1e-10


def test_there_are_no_second_derivatives() -> None:
    model = make("denseflow")
    with reversible(model, True):
        parameters = list(model.blocks.parameters())
        with pytest.raises(NotImplementedError, match="second derivatives"):
            torch.autograd.grad(loss_of(model).mean(), parameters, create_graph=True)


# Parts


def retraceable(model: Flow) -> list[tuple[ReversibleTransform, Tensor, Tensor | None]]:
    """Every reversible transform of the model, with its input and context."""
    heard: list[tuple[ReversibleTransform, Tensor, Tensor | None]] = []

    def hear(part: nn.Module, given: tuple, named: dict, _: object) -> None:
        assert isinstance(part, ReversibleTransform)
        heard.append((part, given[0].detach(), named.get("context")))

    hooks = [
        part.register_forward_hook(hear, with_kwargs=True)
        for part in model.modules()
        if isinstance(part, ReversibleTransform)
    ]
    with torch.no_grad():
        loss_of(model)
    for hook in hooks:
        hook.remove()
    return heard


@pytest.mark.parametrize("name", [name for name in MODELS if "tarflow" not in name])
def test_retracing_gives_input_and_output(name: str) -> None:
    found = retraceable(make(name))
    assert len(found) >= 4
    for part, x, context in found:
        z, log_abs_det = part(x, context=context)
        counted: list[int] = []
        hooks = []
        if isinstance(part, AffineCoupling):
            hooks = [part.network.register_forward_hook(lambda *_: counted.append(1))]  # noqa: B023
        traced = part.retrace(z.detach(), context)
        assert len(counted) == len(hooks), "a network is evaluated once"
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(traced.x, x, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(traced.z, z, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(traced.log_abs_det, log_abs_det, rtol=1e-10, atol=1e-10)
        assert all(leaf.is_leaf and leaf.requires_grad for leaf in traced.inputs)


@pytest.mark.parametrize("name", MODELS)
def test_reversible_parts_draw_no_random_numbers(name: str) -> None:
    model = make(name)
    before = torch.get_rng_state()
    loss_of(model)  # whose noise has a generator of its own
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["denseflow", "macow, variational"])
def test_the_model_is_left_as_it_was_and_nothing_happens_without_gradients(name: str) -> None:
    model = make(name)
    compositions = [part for part in model.modules() if isinstance(part, Composition)]
    expected = loss_of(model)
    with reversible(model, True), torch.no_grad():
        assert all("through" in vars(part) for part in compositions)
        assert torch.equal(loss_of(model), expected)
    assert not any({"through", "forward"} & vars(part).keys() for part in model.modules())
    with pytest.raises(RuntimeError, match="out of luck"), reversible(model, True):
        raise RuntimeError("out of luck")
    assert not any({"through", "forward"} & vars(part).keys() for part in model.modules())


# Memory


class Ledger(TorchDispatchMode):
    """Bytes of live tensors made inside, now and at most, without those of `there`."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in there}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes():
                self._enter(tensor.untyped_storage())
        return made

    def _enter(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self._known:
            self._known.add(address)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._leave, address, size)

    def _leave(self, address: int, size: int) -> None:
        self._known.remove(address)
        self.live -= size


@contextmanager
def way(model: Flow, name: str) -> Iterator[None]:
    with recomputed(model.stages, name == "checkpointed"), reversible(model, name == "reversible"):
        yield


def memory(model: Flow, name: str, count: int = 64) -> tuple[int, int]:
    """Bytes kept for the backward pass, and the most that are alive at a time."""
    images = some_grey_levels(model, count)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    there = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    with way(model, name), Ledger(there) as ledger:
        loss = model.loss(images, generator=torch.Generator().manual_seed(0)).mean()
        kept = ledger.live
        loss.backward()
    return kept, ledger.peak


def deep_denseflow(modules: int) -> Flow:
    overrides = MODELS["denseflow"][1] | {"units": (2,), "modules": (modules,), "widths": (8,)}
    model = registry.build("denseflow-tiny", **overrides)
    assert isinstance(model, Flow)
    return model


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_a_run() -> None:
    short, long = deep_denseflow(2), deep_denseflow(8)
    for name, growth in {"plain": 2.5, "checkpointed": 1.3}.items():
        assert memory(long, name)[0] > growth * memory(short, name)[0]
    (kept, peak), (kept_long, peak_long) = (memory(m, "reversible") for m in (short, long))
    assert kept_long == kept
    assert peak_long == pytest.approx(peak, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["denseflow", "macow", "macow, variational"])
def test_reversible_training_needs_the_least_memory(name: str) -> None:
    model = make(name, torch.float32)
    peaks = [memory(model, way)[1] for way in ("plain", "checkpointed", "reversible")]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[2] < 0.6 * peaks[0]


def test_without_reversible_parts_it_is_activation_checkpointing() -> None:
    model = make("tarflow, volume preserving", torch.float32)
    assert memory(model, "reversible") == memory(model, "checkpointed")


# Training


def run(folder: Path, family: str, **fields: Any) -> GenerativeModel:
    model = small(family)
    every = {fields.pop("stop"): stop} if "stop" in fields else {}
    fit(model, data(), replace(CONFIG, **fields), folder, progress=False, every=every)
    return model


def stop(progress: object) -> dict[str, float]:
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("family", SMALL)
def test_a_run_is_the_plain_one_and_resumes_to_the_bit(family: str, tmp_path: Path) -> None:
    run(tmp_path / "plain", family, log_every=1)
    whole = run(tmp_path / "whole", family, log_every=1, reversible=True)
    plain, ours = (
        [json.loads(line)["loss"] for line in (tmp_path / f / "metrics.jsonl").open()]
        for f in ("plain", "whole")
    )
    assert ours[0] == plain[0]
    assert ours == pytest.approx(plain, rel=1e-5)
    halves = {"reversible": True, "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", family, stop=2, **halves)
    if family == "macow":  # rounding is part of what decides the weights
        with pytest.raises(ValueError, match=r"training.reversible: True in the checkpoint, False"):
            run(tmp_path / "parts", family)
    parts = run(tmp_path / "parts", family, **halves)
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value), name


def test_statistics_count_every_micro_batch_once(tmp_path: Path) -> None:
    model = run(tmp_path, "denseflow", reversible=True)
    norms = [part for part in model.modules() if isinstance(part, DeferredBatchNorm)]
    assert {int(part.num_batches_tracked) for part in norms} == {5 * CONFIG.accumulate}


@pytest.mark.parametrize("family", ["denseflow", "macow"])
def test_what_is_not_finite_is_found_in_its_stage(family: str, tmp_path: Path) -> None:
    model = small(family)
    assert isinstance(model, DataInitialized)
    model.initialize(torch.from_numpy(data().images), generator=torch.Generator().manual_seed(0))
    stage = model.stages[-1]
    with torch.no_grad():
        next(stage.parameters()).fill_(math.inf)
    name = rf"stage {len(model.stages) - 1} \({type(stage).__name__}\)"
    with pytest.raises(NonFiniteError, match=rf"first output that is not finite is that of {name}"):
        fit(model, data(), replace(CONFIG, reversible=True), tmp_path, progress=False)


# Refusals


@pytest.mark.parametrize("other", ["activation_checkpointing", "compile"])
def test_ways_that_exclude_each_other_are_refused(other: str) -> None:
    with pytest.raises(ValueError, match=r"TrainConfig\.reversible: expected False with"):
        TrainConfig(reversible=True, **{other: True})


def test_what_is_no_flow_is_refused(tmp_path: Path) -> None:
    config = replace(CONFIG, reversible=True)
    model = registry.build("flow-matching-tiny", image_shape=SHAPE, levels=LEVELS)
    with pytest.raises(ValueError, match="expected a flow that is trained by gradients, got FlowM"):
        fit(model, data(), config, tmp_path, progress=False)
    fitted = registry.build("whitening-tiny", image_shape=SHAPE, levels=LEVELS)
    assert isinstance(fitted, FittedFlow)
    with pytest.raises(ValueError, match="expected a flow that is trained by gradients, got White"):
        fit_closed_form(fitted, data(), config, tmp_path, progress=False)
    assert not list(tmp_path.rglob("*.safetensors"))
