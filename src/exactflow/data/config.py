"""The configuration that decides which pixels are read, and the error of this package."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final, get_args

from exactflow.data.augmentation import Augmentation

Split = Literal["train", "validation", "test"]
PADDINGS = ("edge", "reflect")
SPLITS: tuple[Split, ...] = get_args(Split)
MAX_PIXELS = 89_478_485  # from here on Pillow warns: a quarter of a GiB in RGB
BUILT_IN = ("digits", "fashion-mnist")  # sources that are no path
MEMORY = "memory"  # source of images that a program passed, which cannot be opened again


@final
class DataError(ValueError):
    """Data cannot be read as asked; the message says where, what was expected, what was found."""


@final
@dataclass(frozen=True)
class DataConfig:
    """Everything that decides which pixels are read.

    A split's members are chosen in the *split order*, a permutation of the stored images seeded by
    `split_seed`; the chosen images are then read in stored order. So a test split that the source
    has stays as it is stored, whatever the seed, and a `limit` does not take the first class of a
    sorted folder only.

    >>> DataConfig("photographs/", image_size=32, flip=True).augmentation
    Augmentation(flip=True, translate=0.0, padding='edge')

    Attributes:
        source: "digits" (built in, 8x8, 17 levels), "fashion-mnist" (looked up in the usual
            places), a folder of IDX files, of images, or of image-net.org's batch files, a .parquet
            or .tar file or a folder of them, URLs of tar shards to be streamed (`streaming/`), a
            set that `exactflow prepare` wrote, or "hub:owner/name" (or "hub:/local/path") for the
            `datasets` library. For a prepared set, a default in the fields from `image_size` to
            `split_seed` means: as it was prepared.
        image_size: pixels; resize the short side to it (see `decode.py` for the filters), then cut
            the central square. None keeps every image as it is stored.
        channels: None as stored, 1 grey (ITU-R 601), 3 RGB.
        flip: random horizontal flips; like the next two in training only, applied by the loader.
        translate: random shifts of up to this many pixels, see `Augmentation`.
        padding: what fills the space of a shift, see `Augmentation`.
        bits: bits kept per channel; the pixel is `v >> (8 - bits)`, with `2**bits` levels.
        validation: path or URLs of a separate validation set. It may not lie inside the training
            folder, where it would be trained on.
        validation_fraction: fraction of the training images used for validation, if the source has
            no validation split of its own.
        test_fraction: the same for the test split; it is cut first, so that the test images do not
            depend on `validation_fraction`.
        split_seed: seed of the split order.
        limit: at most the first `limit` images of the split order, per split; a smaller limit is a
            subset of a larger one. It counts before unreadable images are skipped.
        on_error: "raise", or "skip" to leave out (and log, and count) images that cannot be read.
            Broken containers (IDX, parquet) always raise.
        max_pixels: most pixels of an image, stored or resized; a larger one is refused before it is
            read. A file may have 4 bytes for each pixel and 1 MiB more.
        cache_dir: folder for decoded large sets and downloaded shards; None means
            ~/.cache/exactflow.
        cache_gib: most GiB of downloaded shards there, of all sets together.

    Raises:
        DataError: a field is out of its range.
    """

    source: str = "digits"
    image_size: int | None = None
    channels: int | None = None
    flip: bool = False
    translate: float = 0.0
    padding: Literal["edge", "reflect"] = "edge"
    bits: int = 8
    validation: str | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    split_seed: int = 0
    limit: int | None = None
    on_error: Literal["raise", "skip"] = "raise"
    max_pixels: int = MAX_PIXELS
    cache_dir: str | None = None
    cache_gib: float = 20.0

    def __post_init__(self) -> None:
        side = math.isqrt(max(0, self.max_pixels))
        largest = f"at most {side}, since data.max_pixels is {self.max_pixels}"
        for name, holds, expected in (
            ("source", bool(self.source), "a name or a path"),
            ("image_size", self.image_size is None or self.image_size > 0, "> 0"),
            ("max_pixels", self.max_pixels > 0, "> 0"),
            ("image_size", self.image_size is None or self.image_size <= side, largest),
            ("channels", self.channels in (None, 1, 3), "None, 1 or 3"),
            ("translate", 0 <= self.translate < math.inf, ">= 0"),
            ("padding", self.padding in PADDINGS, " or ".join(PADDINGS)),
            ("bits", 1 <= self.bits <= 8, "1 to 8"),
            ("split_seed", self.split_seed >= 0, ">= 0"),
            ("limit", self.limit is None or self.limit > 0, "> 0"),
            ("cache_gib", 0 < self.cache_gib < math.inf, "> 0"),
            ("on_error", self.on_error in ("raise", "skip"), '"raise" or "skip"'),
            ("validation_fraction", 0 <= self.validation_fraction < 1, "in [0, 1)"),
            ("test_fraction", 0 <= self.test_fraction < 1, "in [0, 1)"),
        ):
            if not holds:
                found = getattr(self, name)
                raise DataError(f"DataConfig.{name}: expected {expected}, found {found!r}")

    @property
    def augmentation(self) -> Augmentation:
        """The loader's changes of training images."""
        return Augmentation(self.flip, self.translate, self.padding)


def is_remote(source: str) -> bool:
    """Whether a source is a pattern of URLs."""
    return "://" in source


def is_path(source: str) -> bool:
    """Whether a source is a file or a folder of this machine."""
    named = source in (*BUILT_IN, MEMORY) or source.startswith("hub:")
    return not named and not is_remote(source)


def located(source: str) -> str:
    """A source with relative paths of this machine made absolute."""
    if is_path(source):
        return str(Path(source).expanduser().absolute())
    local = Path(source.removeprefix("hub:")).expanduser()
    if source.startswith("hub:") and local.exists():
        return f"hub:{local.absolute()}"
    return source


def cache_folder(cache_dir: str | None) -> Path:
    """The folder that `DataConfig.cache_dir` means."""
    return Path(cache_dir or "~/.cache/exactflow").expanduser()
