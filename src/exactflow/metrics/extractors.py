"""Features of images, in which distances between sets of images are taken.

Only distances over the features of the published Inception are called FID. Any other carries the
name of its extractor, which has the beginning of its weights' hash.
"""

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from exactflow.core.grey_levels import center, check_images
from exactflow.core.progress import shown_progress
from exactflow.data.checked import CheckedImages
from exactflow.data.datasets import ImageDataset
from exactflow.data.streaming.streamed import StreamedImages
from exactflow.metrics.feature_classifier import HIDDEN, prepared, trained_classifier, weights_of
from exactflow.metrics.inception import FEATURES, IMAGE_SIZE, PUBLIC_SHA256, read_inception

Images = (
    UInt8[Tensor, "n channels height width"]
    | UInt8[np.ndarray, "n channels height width"]
    | CheckedImages
    | StreamedImages
)


@final
@dataclass(frozen=True)
class FeatureExtractor:
    """A fixed map from images to vectors.

    Attributes:
        name: of the map, with the beginning of its weights' SHA-256 where it has weights.
        dims: number of features.
        features: maps images of grey levels 0 .. levels-1, uint8 (n, C, H, W), and `levels` to
            their features, float32 (n, dims) on the CPU. Raises ValueError for images of a size or
            number of channels that it does not take.
        is_fid: whether the Frechet distance of these features is the published FID.
    """

    name: str
    dims: int
    features: Callable[[Tensor, int], Tensor]
    is_fid: bool = False

    @property
    def distance_name(self) -> str:
        """Name of the Frechet distance of these features."""
        return "FID" if self.is_fid else f"FD-{self.name}"


def extract(
    extractor: FeatureExtractor,
    images: Images,
    levels: int,
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> Float[Tensor, "n dims"]:
    """Features of many images, float32; each depends on its image alone, up to rounding.

    Args:
        extractor: the map.
        images: grey levels 0 .. levels-1; an array may be a memory map, or streamed.
        levels: number of grey levels.
        batch_size: images at a time.
        progress: show a bar with images per second and the time left.

    Raises:
        ValueError: no images, other grey levels, or images that the extractor does not take.
    """
    if len(images) == 0 or batch_size < 1:
        raise ValueError(f"expected images and batch_size >= 1, got {len(images)} and {batch_size}")
    parts = []
    with shown_progress(len(images), extractor.name, quiet=not progress) as advance:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            if isinstance(batch, np.ndarray):
                batch = torch.from_numpy(np.array(batch))  # a copy: data sets are read-only
            _, channels, height, width = batch.shape
            check_images(batch, (channels, height, width), levels)
            parts.append(extractor.features(batch, levels))
            advance(len(batch))
    return torch.cat(parts)


def inception(
    path_or_url: str | Path,
    sha256: str | None = None,
    device: torch.device | str = "cpu",
    *,
    cache_dir: Path | None = None,
) -> FeatureExtractor:
    """The 2048 features of the Inception network with the weights of a file; see `read_inception`.

    With the public weights (`inception.PUBLIC_FILE`) distances are called FID. Images are resized
    as by the public PyTorch port of the FID: bilinear interpolation between pixel centres without a
    low-pass filter, of reals, to 299 x 299 in [-1, 1]. The original TensorFlow graph samples from
    the pixels' corners, others filter or round: their numbers differ.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another hash, or no weights of this network.
    """
    network, digest = read_inception(path_or_url, sha256, cache_dir=cache_dir)
    network.to(device)

    @torch.no_grad()
    def features(images: Tensor, levels: int) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise ValueError(f"expected grey or RGB images, got {images.shape[1]} channels")
        x = center(images.to(device), levels)
        x = F.interpolate(x, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
        return network(x.expand(-1, 3, -1, -1)).cpu()

    is_fid = digest == PUBLIC_SHA256
    return FeatureExtractor(f"inception-{digest[:8]}", FEATURES, features, is_fid)


def pixels(dims: int = 64) -> FeatureExtractor:
    """The lowest frequencies of the image itself: no weights, no labels, no training.

    They are those of an orthonormal cosine transform over channels, rows and columns. Differences
    of such features have the norm of the difference of the low-passed images, with grey levels in
    [-1, 1]. They see shape, light and colour, and no more.
    """
    if dims < 1:
        raise ValueError(f"expected at least one feature, got {dims}")

    def features(images: Tensor, levels: int) -> Tensor:
        shape = tuple(images.shape[1:])
        if math.prod(shape) < dims:
            raise ValueError(f"expected images of at least {dims} values, got {shape}")
        # Along the channels of RGB: the sum, red minus blue, and green minus the others.
        colours, rows, columns = (_cosines(size) for size in shape)
        x = center(images, levels)
        x = torch.einsum("nchw,ac,ih,jw->naij", x, colours, rows, columns)
        return x.flatten(1)[:, _lowest(shape, dims)]

    return FeatureExtractor(f"dct-{dims}", dims, features)


def classifier(
    dataset: ImageDataset, cache_dir: Path, seed: int = 0, *, progress: bool = False
) -> FeatureExtractor:
    """The last hidden layer of a small classifier of `dataset`, trained once, kept in `cache_dir`.

    On one machine and number of threads the weights are a function of data and seed. Elsewhere
    they may differ in their last digits, and then so does the name. Images of more than 32 pixels
    a side are averaged down to that.

    Args:
        dataset: a labelled training split.
        cache_dir: folder of weights; made where it is missing.
        seed: of the initial weights and the order of images.
        progress: show a bar over steps.

    Raises:
        ValueError: images without labels, of another split or too small, or a damaged file in
            `cache_dir`.
    """
    network = trained_classifier(dataset, cache_dir, seed, progress=progress)
    channels = dataset.event_shape[0]
    known_as = re.sub(r"[^A-Za-z0-9.]+", "-", dataset.id).strip("-")
    digest = hashlib.sha256(weights_of(network)).hexdigest()

    @torch.no_grad()
    def features(images: Tensor, levels: int) -> Tensor:
        if images.shape[1] != channels:
            raise ValueError(f"expected images of {channels} channels, got {tuple(images.shape)}")
        return network[:-1](prepared(images, levels))

    return FeatureExtractor(f"cnn-{known_as}-{digest[:8]}", HIDDEN, features)


def _cosines(size: int) -> Float[Tensor, "size size"]:
    """The orthonormal cosine basis (DCT-II), lowest frequency first."""
    angle = torch.arange(size)[:, None] * (torch.arange(size) + 0.5) * (torch.pi / size)
    basis = angle.cos() * (2 / size) ** 0.5
    basis[0] /= 2**0.5
    return basis


def _lowest(shape: tuple[int, ...], dims: int) -> Tensor:
    """Indices of the lowest frequencies in the flattened transform; those of colour count twice."""
    colour, row, column = (np.arange(size) for size in shape)
    order = 2 * colour[:, None, None] + row[:, None] + column
    return torch.from_numpy(np.argsort(order, axis=None, kind="stable")[:dims])
