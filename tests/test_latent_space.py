"""Arithmetic with latents: exact for linear flows, with a certificate for all."""

import math

import pytest
import torch
from torch import Tensor

from exactflow.core.model import NonFiniteError
from exactflow.latent.interpolation import interpolate
from exactflow.latent.latent_space import (
    attribute_direction,
    encode_images,
    move,
    reconstruction_error,
)
from exactflow.models.gaussian.whitening import Whitening, WhiteningConfig
from exactflow.pictures.figures import image_table
from flows import make, perturb, some_grey_levels, some_labels
from gaussian_flow import GaussianFlow, some_factor


def linear_flow() -> Whitening:
    model = Whitening(WhiteningConfig((1, 4, 4), levels=17)).double()
    model.fit([some_grey_levels(model, 60)])
    return model


def test_in_a_linear_flow_arithmetic_is_that_of_pixels() -> None:
    model = linear_flow()
    images = some_grey_levels(model, 12, seed=4)
    has = torch.arange(12) % 3 == 0
    x = model.from_grey_levels(images)
    shift = x[has].mean(0) - x[~has].mean(0)
    latents = encode_images(model, images)
    direction = attribute_direction(latents, has)
    edit = move(model, latents[:4], direction, (-1.0, 0.0, 2.5))
    expected = torch.stack([x[:4] + s * shift for s in (-1.0, 0.0, 2.5)])
    torch.testing.assert_close(edit.x, expected, rtol=0, atol=1e-10)
    assert edit.certificate.shape == (3, 4)
    assert float(edit.certificate.max()) < 1e-10


def test_in_a_linear_flow_the_straight_path_is_that_of_pixels() -> None:
    model = linear_flow()
    first, last = some_grey_levels(model, 2), some_grey_levels(model, 2, seed=9)
    a, b = (model.from_grey_levels(images) for images in (first, last))
    steps = interpolate(model, first, last, 5, path="linear")
    expected = torch.stack([a + w * (b - a) for w in torch.linspace(0, 1, 5, dtype=a.dtype)])
    torch.testing.assert_close(steps, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", ["linear", "spherical"])
def test_the_ends_of_a_path_are_the_decoded_latents_themselves(path: str) -> None:
    model = make("rgb")
    first, last = some_grey_levels(model, 2), some_grey_levels(model, 2, seed=9)
    steps = interpolate(model, first, last, 3, path=path)
    for end, images in ((steps[0], first), (steps[-1], last)):
        torch.testing.assert_close(end, model.from_grey_levels(images), rtol=0, atol=1e-10)


def test_the_great_circle_keeps_the_norm_that_the_chord_loses() -> None:
    model = GaussianFlow(torch.zeros(1, 1, 4, 4, dtype=torch.float64))  # x is its own latent
    first, last = torch.full((2, 1, 1, 4, 4), 255, dtype=torch.uint8).unbind()
    last = last.clone()
    last[..., :2] = 0  # orthogonal, of the same norm
    norms = {}
    for path in ("linear", "spherical"):
        x = interpolate(model, first, last, 5, path=path)
        norms[path] = x.flatten(2).norm(dim=2)[:, 0]
    torch.testing.assert_close(norms["spherical"], norms["spherical"][:1].expand(5))
    torch.testing.assert_close(norms["linear"][2], norms["linear"][0] / math.sqrt(2))


@pytest.mark.parametrize("name", ["rgb", "conditional", "gaussian noise"])
def test_no_strength_gives_the_images_back(name: str) -> None:
    model = make(name)
    images = some_grey_levels(model, 3)
    latents = encode_images(model, images, batch_size=2)
    edit = move(model, latents, torch.randn_like(latents[0]), (0.0, 0.3))
    assert torch.equal(model.to_grey_levels(edit.x[0]), images)
    assert not torch.equal(model.to_grey_levels(edit.x[1]), images)
    assert float(edit.certificate.max()) < 1e-9
    again, _ = model.encode(edit.x[1])  # what was decoded lies where it was sent
    moved = move(model, again, torch.zeros_like(again[0]), (0.0,))
    torch.testing.assert_close(moved.x[0], edit.x[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["rgb", "conditional", "starflow"])
def test_reconstruction_error_is_that_of_the_round_trip(name: str) -> None:
    model = make(name, torch.float32)
    images, labels = some_grey_levels(model, 5), some_labels(model, 5)
    found = reconstruction_error(model, images, labels, batch_size=2)
    x = model.from_grey_levels(images)
    error = (model.decode(model.encode(x, labels)[0].detach(), labels) - x).abs().flatten(1)
    assert float(found.largest.max()) < 1e-4
    torch.testing.assert_close(found.largest, error.amax(1).detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.mean, error.mean(1).detach(), rtol=0, atol=1e-6)
    assert bool((found.mean <= found.largest).all())
    assert found.wrong.tolist() == [0] * 5
    assert found.describe()["wrong_grey_levels"] == 0


def test_an_inverse_that_misses_is_seen() -> None:
    """A decoder that is off by a grey level has an error of one and every pixel wrong."""
    model = GaussianFlow(torch.zeros(1, 1, 2, 2, dtype=torch.float64), some_factor(4), levels=4)
    images = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    exact = model._mean
    encoded, _ = model.encode(model.from_grey_levels(images))
    model.encode = lambda x, label=None: (encoded, torch.zeros(2, dtype=torch.float64))
    model._mean = lambda label: exact(label) + 0.5  # the width of a grey level
    found = reconstruction_error(model, images)
    torch.testing.assert_close(found.largest, torch.full((2,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(found.mean, torch.full((2,), 0.5, dtype=torch.float64))
    assert found.wrong.tolist() == [4, 4]


def test_the_direction_of_an_attribute_is_a_difference_of_means() -> None:
    latents = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]], [[0.0, -2.0]]])
    has = torch.tensor([True, True, False])
    assert torch.equal(attribute_direction(latents, has), torch.tensor([[2.0, 5.0]]))
    for none in (torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)):
        with pytest.raises(ValueError, match="images with the attribute and images without"):
            attribute_direction(latents, none)


def test_a_move_too_far_is_an_error_that_names_image_and_strength() -> None:
    model = make("rgb")
    with torch.no_grad():
        latents = encode_images(model, some_grey_levels(model, 3))
    direction = torch.full_like(latents[0], 1e200)
    with pytest.raises(NonFiniteError, match=r"image 0 moved by strength 1e\+200 .* of 3 images"):
        move(model, latents, direction, (0.0, 1e200))


def test_what_does_not_fit_is_refused() -> None:
    model = make("rgb")
    latents = encode_images(model, some_grey_levels(model, 2))
    with pytest.raises(ValueError, match="strengths and a direction of a latent's shape"):
        move(model, latents, latents[0], ())
    with pytest.raises(ValueError, match="batch_size >= 1"):
        encode_images(model, some_grey_levels(model, 2), batch_size=0)


def table(images: Tensor) -> bytes:
    return image_table(images, 17, ["one", "two"], ["a", "b"], "title")


def test_a_table_of_images_has_one_for_every_row_and_column() -> None:
    pytest.importorskip("matplotlib")
    images = some_grey_levels(perturb(linear_flow()), 4)
    assert table(images).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"expected 2 x 2 images .* got 3"):
        table(images[:3])
