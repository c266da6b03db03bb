"""Arguments of public functions: numpy and PIL images are taken, others are refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import exactflow
from exactflow.core.doors import as_labels, require_model
from exactflow.core.grey_levels import as_tensor
from exactflow.core.model import Flow
from flows import make, perturb

SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def model() -> Flow:
    torch.manual_seed(0)
    built = exactflow.build("tarflow-tiny", num_classes=3)
    assert isinstance(built, Flow)
    return perturb(built).eval()


@pytest.fixture(scope="module")
def grey() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, *SHAPE)).astype(np.uint8)


def opened(grey: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(image.transpose(1, 2, 0)) for image in grey]


def test_a_likelihood_is_that_of_the_pixels_whatever_holds_them(
    model: Flow, grey: np.ndarray
) -> None:
    labels = [0, 2]
    expected = exactflow.log_likelihood(model, torch.from_numpy(grey), torch.tensor(labels))
    pictures = opened(grey)
    for images in (grey, grey[:, :, ::-1][:, :, ::-1], grey.astype(np.int32), pictures):
        found = exactflow.log_likelihood(model, images, labels)
        assert torch.equal(found.nats, expected.nats)
    one = exactflow.log_likelihood(model, pictures[0], np.array([0]))
    torch.testing.assert_close(one.nats, expected.nats[:1], rtol=0, atol=1e-3)
    every = exactflow.log_likelihood(model, grey, 2)  # one class for all
    torch.testing.assert_close(every.nats[1:], expected.nats[1:], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["flow-matching-tiny", "iddpm-tiny"])
def test_models_on_paths_have_the_same_door(name: str, grey: np.ndarray) -> None:
    path = exactflow.build(name)
    expected = exactflow.log_likelihood(path, torch.from_numpy(grey[:1]))
    assert torch.equal(exactflow.log_likelihood(path, opened(grey[:1])).nats, expected.nats)


@pytest.mark.parametrize("name", ["rgb", "gaussian noise"])
def test_encode_takes_arrays_of_reals_and_opened_pictures(name: str) -> None:
    flow = make(name, torch.float32)
    channels, height, width = flow.event_shape
    pixels = np.random.default_rng(1).integers(0, 256, (2, height, width, channels))
    pixels = pixels.astype(np.uint8)
    pictures = [Image.fromarray(each if channels > 1 else each[..., 0]) for each in pixels]
    x = flow.from_grey_levels(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    expected = flow.encode(x)
    for images in (x.numpy(), pictures):
        z, log_abs_det = flow.encode(images)  # pyright: ignore[reportArgumentType]
        assert torch.equal(z, expected[0])
        assert torch.equal(log_abs_det, expected[1])


@pytest.mark.parametrize("name", ["tarflow-tiny", "macow-tiny", "denseflow-tiny", "whitening-tiny"])
def test_an_empty_batch_is_named(name: str) -> None:
    flow = exactflow.build(name)
    assert isinstance(flow, Flow)
    with pytest.raises(ValueError, match="expected at least one image, got an empty batch"):
        flow.encode(torch.zeros(0, *flow.event_shape))
    with pytest.raises(ValueError, match="expected at least one image, got an empty batch"):
        exactflow.log_likelihood(flow, torch.zeros(0, *flow.event_shape, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("a.png", r"or as PIL images, got the path 'a.png': open it with PIL.Image.open"),
        (Path("a.png"), "got the path 'a.png'"),
        (["a.png"], "got list"),
        ([], "got list"),
        (None, "got NoneType"),
        (np.array(["a"]), "numpy array of numbers, .* got ndarray"),
        (Image.new("RGBA", (8, 8)), "mode RGB and of 8 x 8 pixels .*, got RGBA and 8 x 8"),
        ([Image.new("RGB", (9, 8))], "got RGB and 9 x 8"),
    ],
)
def test_what_is_no_image_is_named(images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_tensor(images, SHAPE)


def test_what_is_no_model_is_named(model: Flow) -> None:
    require_model(model)
    with pytest.raises(ValueError, match=r"got DataParallel: give the model inside it, model.mod"):
        require_model(torch.nn.DataParallel(model))
    with pytest.raises(ValueError, match=r"got OptimizedModule: .*, model\._orig_mod"):
        require_model(torch.compile(model))
    with pytest.raises(ValueError, match=r"got 'runs/x': exactflow.from_pretrained loads"):
        require_model("runs/x")
    with pytest.raises(ValueError, match="got Linear"):
        require_model(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("label", "message"),
    [(1.0, "integer classes, got torch.float32"), (True, "integer classes, got torch.bool"),
     ("cat", "integer classes, got str"), ([0, 7], r"classes 0 \.\. 2"),
     ([0], r"shape \(2,\)"), ([], "expected")],
)  # fmt: skip
def test_what_is_no_class_is_named(label: Any, message: str, model: Flow) -> None:
    with pytest.raises(ValueError, match=message):
        as_labels(model, label, 2)
