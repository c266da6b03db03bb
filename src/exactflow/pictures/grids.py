"""Pictures: grids of images, the way from latent to image."""

import base64
import io
import math
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from exactflow.core.files import write_atomically
from exactflow.core.grey_levels import display

MIN_SIDE = 56  # pixels: smaller images are enlarged by a whole factor, so that one sees the pixels
GAP = 2


def grid(
    images: UInt8[Tensor, "n channels height width"], levels: int, columns: int | None = None
) -> Image.Image:
    """Images of grey levels 0 .. levels-1 side by side, about as wide as high by default."""
    images = display(images.cpu(), levels)
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    factor = max(1, math.ceil(MIN_SIDE / max(height, width)))
    images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    height, width = height * factor, width * factor
    sheet = torch.zeros(
        channels, rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, dtype=torch.uint8
    )
    for index, image in enumerate(images):
        top = GAP + index // columns * (height + GAP)
        left = GAP + index % columns * (width + GAP)
        sheet[:, top : top + height, left : left + width] = image
    return _picture(sheet)


def single(image: UInt8[Tensor, "channels height width"], levels: int) -> Image.Image:
    """One image in its own size."""
    return _picture(display(image.cpu(), levels))


def trajectory_grid(trace: Float[Tensor, "steps n channels height width"]) -> Image.Image:
    """One row per sample, from latent to image; every column on its own scale.

    A latent reaches further than [-1, 1]: each column is divided by its 99th percentile, or by 1
    where that is less.
    """
    steps = len(trace)
    scale = torch.quantile(trace.abs().flatten(1), 0.99, dim=1).clamp(min=1)
    shown = (trace / scale.view(-1, 1, 1, 1, 1)).clamp(-1, 1)
    levels = 128  # steps of grey in the picture, fewer than a screen shows
    quantized = ((shown + 1) / 2 * (levels - 1)).round().to(torch.uint8)
    return grid(quantized.transpose(0, 1).flatten(0, 1), levels, columns=steps)


def png(image: Image.Image) -> bytes:
    """The image as a PNG file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png(image))


def inline(content: bytes, alt: str) -> str:
    """An HTML image that carries its own data."""
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'


def _picture(image: Tensor) -> Image.Image:
    if image.shape[0] == 1:
        return Image.fromarray(image[0].numpy())
    return Image.fromarray(image[:3].permute(1, 2, 0).contiguous().numpy())
