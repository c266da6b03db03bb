"""Grey levels and reals: the one file that knows how integers 0 .. levels-1 map to [-1, 1].

Two maps are in use, and they are different numbers (specification, sections 4 and 5):

* *dequantised* (likelihood): ``x = 2 (v + u) / levels - 1`` with u in [0, 1); a grey level is an
  interval of width 2 / levels, so densities convert to bits without a remainder;
* *centred* (noise-trained models): ``x = 2 v / (levels - 1) - 1``; the extreme levels are -1 and 1.
"""

import math
import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Integer
from PIL import Image
from torch import Tensor

PHOTOGRAPHIC_LEVELS = 256  # eight bits: of image files, unless a data set says otherwise
MODES = {1: "L", 3: "RGB"}  # of Pillow, by the number of channels
Number = TypeVar("Number", float, np.ndarray, Tensor)
# images as users have them: a batch as an array, or opened files
ImagesLike = Tensor | np.ndarray | Image.Image | Sequence[Image.Image]


def as_tensor(images: object, event_shape: tuple[int, int, int]) -> Tensor:
    """A batch of images as a tensor, from a tensor, a numpy array, or one or more PIL images.

    Arrays keep their values and types; PIL images become 8-bit integers.

    Raises:
        ValueError: for anything else, as a path, and for a PIL image of another mode or size.
    """
    if isinstance(images, Tensor):
        return images
    if isinstance(images, np.ndarray) and images.dtype.kind in "iufb":
        return torch.from_numpy(images.copy())
    several = [images] if isinstance(images, Image.Image) else images
    if isinstance(several, list | tuple) and several:
        opened = [image for image in several if isinstance(image, Image.Image)]
        if len(opened) == len(several):
            return torch.stack([_of_pil(image, event_shape) for image in opened])
    got = type(images).__name__
    if isinstance(images, str | os.PathLike):
        got = f"the path {os.fspath(images)!r}: open it with PIL.Image.open"
    raise ValueError(
        "expected images as a tensor or a numpy array of numbers, of shape "
        f"(batch, {', '.join(map(str, event_shape))}), or as PIL images, got {got}"
    )


def _of_pil(image: Image.Image, event_shape: tuple[int, int, int]) -> Tensor:
    channels, height, width = event_shape
    mode = MODES.get(channels)
    if image.mode != mode or image.size != (width, height):
        raise ValueError(
            f"expected PIL images of mode {mode} and of {width} x {height} pixels for this model, "
            f"got {image.mode} and {image.size[0]} x {image.size[1]}"
        )
    return torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1)


def with_a_door(encode: Callable[..., Any]) -> Callable[..., Any]:
    """A flow's `encode` that takes `ImagesLike` too, and refuses an empty batch."""

    @wraps(encode)
    def at_the_door(flow: Any, x: ImagesLike, *rest: Any, **named: Any) -> Any:
        given = as_tensor(x, flow.event_shape)
        if not isinstance(x, Tensor):
            given = given.to(flow.device)
            given = given if isinstance(x, np.ndarray) else flow.from_grey_levels(given)
        if not len(given):
            raise ValueError("expected at least one image, got an empty batch")
        return encode(flow, given, *rest, **named)

    return at_the_door


def check_images(images: Tensor, event_shape: tuple[int, int, int], levels: int) -> None:
    """Raise ValueError unless `images` are integers 0 .. levels-1 of shape (B, *event_shape)."""
    if images.is_floating_point() or images.is_complex() or images.dtype == torch.bool:
        raise ValueError(
            f"expected integer images 0 .. {levels - 1} as they come from the data, "
            f"got {images.dtype}"
        )
    if images.dim() != 4 or tuple(images.shape[1:]) != event_shape:
        raise ValueError(
            f"expected images of shape (batch, {', '.join(map(str, event_shape))}), "
            f"got {tuple(images.shape)}"
        )
    if images.numel() == 0:
        raise ValueError("expected at least one image, got an empty batch")
    if images.dtype == torch.uint8 and levels >= PHOTOGRAPHIC_LEVELS:
        return  # the type guarantees it: spares CUDA a synchronisation per step
    low, high = int(images.min()), int(images.max())
    if low < 0 or high >= levels:
        raise ValueError(f"expected grey levels 0 .. {levels - 1}, got {low} .. {high}")


def dequantize(
    images: Integer[Tensor, "*shape"], noise: Float[Tensor, "*shape"], levels: int
) -> Float[Tensor, "*shape"]:
    """x = 2 (v + u) / levels - 1 in [-1, 1), u = `noise` in [0, 1); dtype of `noise`."""
    return (images.to(noise.dtype) + noise) * (2.0 / levels) - 1.0


def center(
    images: Integer[Tensor, "*shape"], levels: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*shape"]:
    """x = 2 v / (levels - 1) - 1 in [-1, 1]."""
    return images.to(dtype) * (2.0 / (levels - 1)) - 1.0


def quantize_dequantized(x: Float[Tensor, "*shape"], levels: int) -> Integer[Tensor, "*shape"]:
    """The grey level whose interval holds x (inverse of `dequantize` for every u)."""
    return ((x + 1.0) * (levels / 2)).floor().clamp(0, levels - 1).to(torch.uint8)


def quantize_centered(x: Float[Tensor, "*shape"], levels: int) -> Integer[Tensor, "*shape"]:
    """The nearest grey level (inverse of `center`)."""
    return ((x + 1.0) * ((levels - 1) / 2)).round().clamp(0, levels - 1).to(torch.uint8)


def display(images: Integer[Tensor, "*shape"], levels: int) -> Integer[Tensor, "*shape"]:
    """Grey levels 0 .. levels-1 scaled to the 8 bits of image files and screens."""
    top = PHOTOGRAPHIC_LEVELS - 1
    return (images.to(torch.float32) * (top / (levels - 1))).round().to(torch.uint8)


def bits_per_dim(nats: Number, dims: int) -> Number:
    """Bits per dimension of log-probabilities in nats."""
    return -nats / (dims * math.log(2))


def nats_per_level_interval(levels: int) -> float:
    """ln(levels / 2): minus the log-width of one grey level in [-1, 1], per dimension."""
    return math.log(levels / 2)
