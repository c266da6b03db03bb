"""Features of images, in which distances between sets of images are taken.

A distance over other features than the published Inception's is never called FID: it carries the
name of its extractor, and that the beginning of its weights' hash.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.core.grey_levels import center, check_images
from exactflow.core.progress import shown_progress
from exactflow.data.checked import CheckedImages
from exactflow.data.datasets import ImageDataset
from exactflow.data.streaming.streamed import StreamedImages
from exactflow.metrics.feature_classifier import HIDDEN, prepared, trained_classifier, weights_of
from exactflow.metrics.inception import (
    FEATURES,
    IMAGE_SIZE,
    PUBLIC_SHA256,
    Inception,
    read_inception,
)

Images = (
    UInt8[Tensor, "n channels height width"]
    | UInt8[np.ndarray, "n channels height width"]
    | CheckedImages
    | StreamedImages
)


class FeatureExtractor(ABC):
    """A fixed map from images to vectors."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is, with the beginning of its weights' SHA-256 where it has weights."""

    @property
    @abstractmethod
    def dims(self) -> int:
        """Number of features."""

    @property
    @abstractmethod
    def distance_name(self) -> str:
        """What the Frechet distance of these features is called."""

    @abstractmethod
    def features(
        self, images: UInt8[Tensor, "n channels height width"], levels: int
    ) -> Float[Tensor, "n dims"]:
        """Features of images of grey levels 0 .. levels-1, float32 on the CPU.

        Raises:
            ValueError: images of a size or number of channels that it does not take.
        """


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
    parts = feature_batches(extractor, images, levels, batch_size=batch_size, progress=progress)
    return torch.cat(list(parts))


def feature_batches(
    extractor: FeatureExtractor,
    images: Images,
    levels: int,
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> Iterator[Float[Tensor, "batch dims"]]:
    """Those of `extract` a batch at a time, for sets whose features do not fit into memory."""
    if len(images) == 0 or batch_size < 1:
        raise ValueError(f"expected images and batch_size >= 1, got {len(images)} and {batch_size}")
    with shown_progress(len(images), extractor.name, quiet=not progress) as advance:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            if isinstance(batch, np.ndarray):
                batch = torch.from_numpy(np.array(batch))  # a copy: data sets are read-only
            _, channels, height, width = batch.shape
            check_images(batch, (channels, height, width), levels)
            yield extractor.features(batch, levels)
            advance(len(batch))


def inception(
    path_or_url: str | Path,
    sha256: str | None = None,
    device: torch.device | str = "cpu",
    *,
    cache_dir: Path | None = None,
) -> FeatureExtractor:
    """The 2048 features of the Inception network with the weights of a file; see `read_inception`.

    With the public weights (`inception.PUBLIC_FILE`) distances are called FID.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another hash, or no weights of this network.
    """
    network, digest = read_inception(path_or_url, sha256, cache_dir=cache_dir)
    return _InceptionFeatures(network.to(device), digest, torch.device(device))


def pixels(dims: int = 64) -> FeatureExtractor:
    """The lowest frequencies of the image itself: no weights, no labels, no training.

    Differences of such features have the norm of the difference of the low-passed images, with
    grey levels in [-1, 1]. They see shape, light and colour, and no more.
    """
    if dims < 1:
        raise ValueError(f"expected at least one feature, got {dims}")
    return _LowFrequencies(dims)


def classifier(
    dataset: ImageDataset, cache_dir: Path, seed: int = 0, *, progress: bool = False
) -> "ClassifierFeatures":
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
    return ClassifierFeatures(network, dataset.id)


@final
class _InceptionFeatures(FeatureExtractor):
    """Images resized as by the public PyTorch port of the FID.

    That is bilinear interpolation between pixel centres without a low-pass filter, of reals, to
    299 x 299 in [-1, 1]. The original TensorFlow graph samples from the pixels' corners, others
    filter or round: their numbers differ.
    """

    def __init__(self, network: Inception, sha256: str, device: torch.device) -> None:
        self._network, self._sha256, self._device = network, sha256, device

    @property
    def name(self) -> str:
        return f"inception-{self._sha256[:8]}"

    @property
    def dims(self) -> int:
        return FEATURES

    @property
    def distance_name(self) -> str:
        return "FID" if self._sha256 == PUBLIC_SHA256 else f"FD-{self.name}"

    @torch.no_grad()
    def features(
        self, images: UInt8[Tensor, "n channels height width"], levels: int
    ) -> Float[Tensor, "n dims"]:
        if images.shape[1] not in (1, 3):
            raise ValueError(f"expected grey or RGB images, got {images.shape[1]} channels")
        x = center(images.to(self._device), levels)
        x = F.interpolate(x, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
        return self._network(x.expand(-1, 3, -1, -1)).cpu()


@final
class _LowFrequencies(FeatureExtractor):
    """The lowest frequencies of an orthonormal cosine transform over channels, rows, columns."""

    def __init__(self, dims: int) -> None:
        self._dims = dims

    @property
    def name(self) -> str:
        return f"dct-{self._dims}"

    @property
    def dims(self) -> int:
        return self._dims

    @property
    def distance_name(self) -> str:
        return f"FD-{self.name}"

    def features(
        self, images: UInt8[Tensor, "n channels height width"], levels: int
    ) -> Float[Tensor, "n dims"]:
        shape = tuple(images.shape[1:])
        if int(np.prod(shape)) < self._dims:
            raise ValueError(f"expected images of at least {self._dims} values, got {shape}")
        # Along the channels of RGB: the sum, red minus blue, and green minus the others.
        colours, rows, columns = (_cosines(size) for size in shape)
        x = center(images, levels)
        x = torch.einsum("nchw,ac,ih,jw->naij", x, colours, rows, columns)
        return x.flatten(1)[:, _lowest(shape, self._dims)]


def _cosines(size: int) -> Float[Tensor, "size size"]:
    """The orthonormal cosine basis (DCT-II), lowest frequency first."""
    angle = torch.arange(size)[:, None] * (torch.arange(size) + 0.5) * (torch.pi / size)
    basis = angle.cos() * (2 / size) ** 0.5
    basis[0] /= 2**0.5
    return basis


def _lowest(shape: tuple[int, ...], dims: int) -> Tensor:
    """Where the lowest frequencies are in the flattened transform; the eye sees colour coarsely."""
    colour, row, column = (np.arange(size) for size in shape)
    order = 2 * colour[:, None, None] + row[:, None] + column
    return torch.from_numpy(np.argsort(order, axis=None, kind="stable")[:dims])


@final
class ClassifierFeatures(FeatureExtractor):
    """The last hidden layer of a classifier of the images under study.

    Args:
        network: ends in the layer of classes, which is left out.
        dataset_id: what it was trained on.
    """

    def __init__(self, network: nn.Sequential, dataset_id: str) -> None:
        self._network = network
        known_as = re.sub(r"[^A-Za-z0-9.]+", "-", dataset_id).strip("-")
        self._name = f"cnn-{known_as}-{hashlib.sha256(weights_of(network)).hexdigest()[:8]}"

    @property
    def name(self) -> str:
        return self._name

    @property
    def dims(self) -> int:
        return HIDDEN

    @property
    def distance_name(self) -> str:
        return f"FD-{self.name}"

    @torch.no_grad()
    def features(
        self, images: UInt8[Tensor, "n channels height width"], levels: int
    ) -> Float[Tensor, "n dims"]:
        channels = self._network[0].in_channels
        if images.shape[1] != channels:
            raise ValueError(f"expected images of {channels} channels, got {tuple(images.shape)}")
        return self._network[:-1](prepared(images, levels))

    @torch.no_grad()
    def accuracy(self, dataset: ImageDataset) -> float:
        """Part of a labelled set that it classifies rightly."""
        if dataset.labels is None:
            raise ValueError(f"expected labelled images, {dataset.id} has no labels")
        hidden = extract(self, dataset.images, dataset.levels)
        return float((self._network[-1](hidden).argmax(1).numpy() == dataset.labels).mean())
