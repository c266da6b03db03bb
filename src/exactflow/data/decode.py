"""From one stored image to its integers: the only file that changes pixels.

Resizing uses BOX (area average, the filter of downsampled ImageNet) to shrink and BILINEAR to
enlarge. Both have non-negative weights, so a resized value is a mean of stored ones: nothing rings,
nothing is clipped, and a set with 17 levels keeps 17 levels. JPEG's fast "draft" scaling is not
used and EXIF orientation is not applied, as in the published pipelines.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from PIL import Image, ImageFile

from exactflow.data.config import DataError

# What a source hands over for one image: encoded bytes, the file that holds them, or decoded
# pixels, (H, W) or (H, W, 3) uint8. None stands for a missing value in a table.
Payload = bytes | Path | np.ndarray | None

_GREY_MODES = frozenset({"1", "L", "LA"})
_COLOUR_MODES = frozenset({"RGB", "RGBA", "P", "PA", "CMYK"})

# All that Pillow's decoders raise for broken files.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@final
@dataclass(frozen=True)
class Preprocessing:
    """What is done to every stored image; fields as in `DataConfig`."""

    image_size: int | None = None
    channels: int | None = None
    bits: int = 8

    @property
    def text(self) -> str:
        """One line for people."""
        size = "stored size"
        if self.image_size is not None:
            size = f"short side to {self.image_size} (box down, bilinear up), centre crop"
        colour = {None: "stored channels", 1: "grey", 3: "RGB"}[self.channels]
        return f"{size}; {colour}; {self.bits} bits"

    @property
    def hash(self) -> str:
        """First 16 hex digits of the sha256 of everything `text` says."""
        fields = {
            "image_size": self.image_size,
            "channels": self.channels,
            "bits": self.bits,
            "filters": "box-bilinear",
            "revision": 1,
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def decode_image(payload: Payload, name: str, preprocessing: Preprocessing) -> np.ndarray:
    """Decode and preprocess one image.

    Args:
        payload: the stored image.
        name: what to call it in an error.
        preprocessing: what to do to it.

    Returns:
        The pixels, (C, H, W) uint8, in 0 .. 2**bits - 1.

    Raises:
        DataError: it is missing, broken, not 8 bits per channel, or not fully opaque.
    """
    image = _open(payload, name)
    if preprocessing.image_size is not None:
        image = _resize_and_crop(image, preprocessing.image_size)
    if preprocessing.channels is not None:
        image = image.convert("L" if preprocessing.channels == 1 else "RGB")
    pixels = np.asarray(image)
    if preprocessing.bits < 8:
        pixels = pixels >> (8 - preprocessing.bits)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _open(payload: Payload, name: str) -> Image.Image:
    """The image in mode L or RGB."""
    if payload is None:
        raise DataError(f"{name}: expected the bytes of an image, found none")
    if isinstance(payload, np.ndarray):
        return Image.fromarray(payload)
    try:
        encoded = payload.read_bytes() if isinstance(payload, Path) else payload
        image = Image.open(io.BytesIO(encoded))
        depth_16 = _stores_16_bits(image)
        image.load()
    except _BROKEN as error:
        raise DataError(f"{name}: expected a complete image, found: {error}") from error
    if depth_16:
        raise DataError(f"{name}: expected 8 bits per channel, found 16 bits")
    return _to_grey_or_rgb(image, name)


def _stores_16_bits(image: ImageFile.ImageFile) -> bool:
    """Whether a channel has 16 bits; asked before `load`, which may drop the lower 8 in silence.

    Pillow opens 16-bit colour PNG and TIFF as plain "RGB"; only the raw mode of the tiles tells.
    """
    if image.mode.startswith("I;16"):
        return True
    arguments = [tile.args if isinstance(tile.args, tuple) else (tile.args,) for tile in image.tile]
    return any(";16" in str(raw_mode) for raw_mode, *_ in arguments)


def _to_grey_or_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode not in _GREY_MODES | _COLOUR_MODES:
        raise DataError(
            f"{name}: expected 8 bits per channel in grey, RGB, RGBA, palette or CMYK, "
            f"found mode {image.mode}"
        )
    if image.has_transparency_data:
        # Compositing would need a background colour that nobody stated; only a useless alpha goes.
        lowest = np.asarray(image.convert("RGBA"))[..., 3].min()
        if lowest != 255:
            raise DataError(f"{name}: expected a fully opaque image, found alpha down to {lowest}")
    return image.convert("L" if image.mode in _GREY_MODES else "RGB")


def _resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """The central (size, size) square of the image with its short side resized to `size`."""
    short = min(image.size)
    width, height = (max(size, round(side * size / short)) for side in image.size)
    if short != size:
        filter_ = Image.Resampling.BOX if short > size else Image.Resampling.BILINEAR
        image = image.resize((width, height), filter_)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
