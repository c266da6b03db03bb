"""Decoding and preprocessing of one stored image: the only file that changes pixels.

Resizing uses BOX (area average, the filter of downsampled ImageNet) to shrink and BILINEAR to
enlarge. Both have non-negative weights, so a resized value is a mean of stored ones: nothing rings,
nothing is clipped, and a set with 17 levels keeps 17 levels. JPEG's fast "draft" scaling is not
used and EXIF orientation is not applied, as in the published pipelines.

Only the formats of `_KINDS` are read: Pillow knows more, and passes an EPS to Ghostscript whatever
the name of its file. Depth, size and frames in a file's header are checked before its pixels are
read.
"""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from exactflow.core.files import json_hash
from exactflow.data.config import MAX_PIXELS, DataError
from exactflow.data.files import open_regular

# One stored image: encoded bytes, the file that holds them, or decoded pixels, (H, W) or
# (H, W, 3) uint8. None is a missing value in a table.
Payload = bytes | Path | np.ndarray | None

_GREY_MODES = frozenset({"1", "L", "LA"})
_COLOUR_MODES = frozenset({"RGB", "RGBA", "P", "PA", "CMYK"})

# The formats that are read, by the first bytes of a file.
_KINDS: tuple[tuple[re.Pattern[bytes], type[ImageFile.ImageFile]], ...] = (
    (re.compile(rb"BM"), BmpImageFile),
    (re.compile(rb"GIF8[79]a"), GifImageFile),
    (re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    (re.compile(rb"P[1-6]\s"), PpmImageFile),
    (re.compile(rb"(?:II|MM)(?:[*+]\0|\0[*+])"), TiffImageFile),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImageFile),
)
_NEW_SUBFILE_TYPE = 254  # of a TIFF page; bits: 1 a smaller copy of another page, 4 a mask of one
_NO_PAGE = 1 | 4


@final
@dataclass(frozen=True)
class Preprocessing:
    """How every stored image is changed; fields as in `DataConfig`.

    `max_pixels` changes no pixel, so it is in neither `text` nor `hash`.

    >>> Preprocessing(image_size=32, channels=3).text
    'short side to 32 (box down, bilinear up), centre crop; RGB; 8 bits'
    """

    image_size: int | None = None
    channels: int | None = None
    bits: int = 8
    max_pixels: int = MAX_PIXELS

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
        """First 16 hex digits of the sha256 of all settings."""
        fields = {
            "image_size": self.image_size,
            "channels": self.channels,
            "bits": self.bits,
            "filters": "box-bilinear",
            "revision": 1,
        }
        return json_hash(fields)[:16]


def decode_image(
    payload: Payload, name: str, preprocessing: Preprocessing, several: list[str] | None = None
) -> np.ndarray:
    """Decode and preprocess one image.

    Args:
        payload: the stored image.
        name: name of the image, for errors.
        preprocessing: how to change it.
        several: the name is added to it if the image has further frames, which are not read.

    Returns:
        The pixels, (C, H, W) uint8, in 0 .. 2**bits - 1.

    Raises:
        DataError: it is missing, broken, too large, not 8 bits per channel, not fully opaque, or a
            TIFF of several pages.
    """
    image, more = _open(payload, name, preprocessing.max_pixels)
    if more and several is not None:
        several.append(name)
    if preprocessing.image_size is not None:
        image = _resize(image, preprocessing.image_size, name, preprocessing.max_pixels)
    if preprocessing.channels is not None:
        image = image.convert("L" if preprocessing.channels == 1 else "RGB")
    pixels = np.asarray(image)
    if preprocessing.image_size is not None:
        pixels = _crop(pixels, preprocessing.image_size)
    if preprocessing.bits < 8:
        pixels = pixels >> (8 - preprocessing.bits)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def require_pixels(width: int, height: int, max_pixels: int, name: str) -> None:
    """Raise a DataError for an image that is too large."""
    if width * height > max_pixels:
        raise DataError(
            f"{name}: expected at most {max_pixels} pixels (data.max_pixels), "
            f"found {width} x {height}"
        )


def _open(payload: Payload, name: str, max_pixels: int) -> tuple[Image.Image, bool]:
    """The image in mode L or RGB, and whether it has further frames."""
    if payload is None:
        raise DataError(f"{name}: expected the bytes of an image, found none")
    if isinstance(payload, np.ndarray):
        require_pixels(payload.shape[1], payload.shape[0], max_pixels, name)
        return Image.fromarray(payload), False
    try:
        encoded = payload if isinstance(payload, bytes) else _read_file(payload, name, max_pixels)
        image = _image_file(encoded, name)
        require_pixels(*image.size, max_pixels, name)
        bits = _bits(image)
        if bits > 8:
            raise DataError(f"{name}: expected 8 bits per channel, found {bits} bits")
        more = _has_more_frames(image, encoded, name)
        image.load()
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise anything at all for broken files
        reason = error or type(error).__name__
        raise DataError(f"{name}: expected a complete image, found: {reason}") from error
    return _to_grey_or_rgb(image, name), more


def _read_file(file: Path, name: str, max_pixels: int) -> bytes:
    """All bytes of a file, unless they are more than the largest unpacked image has."""
    limit = 4 * max_pixels + 2**20
    with open_regular(file) as stream:
        found = os.fstat(stream.fileno()).st_size
        if found > limit:
            raise DataError(
                f"{name}: expected at most {limit} bytes, since data.max_pixels is {max_pixels}, "
                f"found {found}"
            )
        return stream.read(limit)


def _image_file(encoded: bytes, name: str) -> ImageFile.ImageFile:
    for beginning, kind in _KINDS:
        if beginning.match(encoded):
            return kind(io.BytesIO(encoded))
    raise DataError(
        f"{name}: expected a complete image in BMP, GIF, JPEG, PNG, PPM, TIFF or WebP, found a "
        f"file that begins with {encoded[:8]!r}"
    )


def _bits(image: ImageFile.ImageFile) -> int:
    """Bits of a channel in the file; `load` would silently drop all but 8."""
    if isinstance(image, TiffImageFile):
        return int(np.max(image.tag_v2.get(BITSPERSAMPLE, 1)))
    arguments = [tile.args if isinstance(tile.args, tuple) else (tile.args,) for tile in image.tile]
    if isinstance(image, PngImageFile):
        return 16 if any(";16" in str(raw_mode) for raw_mode, *_ in arguments) else 8
    if isinstance(image, PpmImageFile):  # the largest value comes last, unless it is 255 or 65535
        largest = [last for *_, last in arguments if isinstance(last, int)]
        return max(largest, default=65535 if image.mode == "I" else 255).bit_length()
    return 8


def _has_more_frames(image: ImageFile.ImageFile, encoded: bytes, name: str) -> bool:
    """Whether there are frames after the first. Raises a DataError for pages of a TIFF."""
    if isinstance(image, TiffImageFile):
        pages = TiffImageFile(io.BytesIO(encoded))
        for page in range(1, pages.n_frames):
            pages.seek(page)
            if not int(pages.tag_v2.get(_NEW_SUBFILE_TYPE, 0)) & _NO_PAGE:
                raise DataError(f"{name}: expected a TIFF of one page, found several")
        return False
    if isinstance(image, GifImageFile):
        return GifImageFile(io.BytesIO(encoded)).is_animated  # moves on in its file
    return isinstance(image, PngImageFile | WebPImageFile) and image.is_animated


def _to_grey_or_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode not in _GREY_MODES | _COLOUR_MODES:
        raise DataError(
            f"{name}: expected 8 bits per channel in grey, RGB, RGBA, palette or CMYK, "
            f"found mode {image.mode}"
        )
    if image.has_transparency_data:
        # Compositing would need a background colour, so only a fully opaque alpha is dropped.
        with_alpha = image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
        lowest = with_alpha.getchannel("A").getextrema()[0]
        if lowest != 255:
            raise DataError(f"{name}: expected a fully opaque image, found alpha down to {lowest}")
    return image.convert("L" if image.mode in _GREY_MODES else "RGB")


def _resize(image: Image.Image, size: int, name: str, max_pixels: int) -> Image.Image:
    """The image with its short side resized to `size`."""
    short = min(image.size)
    if short == size:
        return image
    width, height = (max(size, round(side * size / short)) for side in image.size)
    require_pixels(width, height, max_pixels, f"{name}, its short side resized to {size}")
    filter_ = Image.Resampling.BOX if short > size else Image.Resampling.BILINEAR
    return image.resize((width, height), filter_)


def _crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """The central (size, size) square; Pillow's own `crop` has another limit of pixels."""
    height, width = pixels.shape[:2]
    left, top = (width - size) // 2, (height - size) // 2
    return pixels[top : top + size, left : left + size]
