"""Image sets with their identity, so that every number names the pixels it was measured on.

`load` opens a source (`sources.py`), chooses the members of a split, and decodes them once
(`store.py`). Sources are described in `DataConfig`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from exactflow.data import store
from exactflow.data.checked import CheckedImages
from exactflow.data.config import SPLITS, DataConfig, DataError, Split
from exactflow.data.decode import Preprocessing
from exactflow.data.order import epoch_order
from exactflow.data.prepared import Identity, identity_of, open_prepared, read_prepared
from exactflow.data.prepared_writer import cached
from exactflow.data.records import Source
from exactflow.data.sources import open_source
from exactflow.data.splits import split_members
from exactflow.data.streaming.streamed import StreamedImages

log = logging.getLogger(__name__)

ALL = slice(None)  # rows


@final
@dataclass(frozen=True, eq=False)
class ImageDataset:
    """One split of an image set, decoded.

    >>> dataset = load(DataConfig("digits"), "test")
    >>> len(dataset), dataset.event_shape, dataset.levels, dataset.num_classes
    (180, (1, 8, 8), 17, 10)

    Attributes:
        images: (n, C, H, W) uint8 in 0 .. levels-1, read-only. A large or prepared set lies in a
            file and is compared with its hashes as it is read; rows of a streamed one are decoded
            when they are read.
        labels: int64 (n,) in 0 .. num_classes-1, or None.
        id: name of the set.
        version: version of the stored data, equal for every copy of them.
        split: "train", "validation" or "test".
        levels: number of values a pixel can take.
        class_names: one name per label; empty if unlabelled.
        preprocessing: changes of each stored image, as text.
        preprocessing_hash: hash of these changes.
        fingerprint: sha256 (hex) of shape, levels, labels and pixels, in order; of a streamed set,
            see `StreamedImages.fingerprint`.
        skipped: names of the images left out under `on_error="skip"`.
        shards: number of images in each streamed shard, in order; None if the set is not streamed.
    """

    images: np.ndarray | CheckedImages | StreamedImages
    labels: np.ndarray | None
    id: str
    version: str
    split: Split
    levels: int
    class_names: tuple[str, ...]
    preprocessing: str
    preprocessing_hash: str
    fingerprint: str
    skipped: tuple[str, ...] = ()
    shards: tuple[int, ...] | None = None

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if unlabelled."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int | None]:
        """A copy of one image, (C, H, W) uint8, and its label."""
        label = None if self.labels is None else int(self.labels[index])
        return np.array(self.images[index]), label

    def tensors(self, rows: slice | np.ndarray = ALL) -> tuple[Tensor, Tensor | None]:
        """Copies of some images, uint8 (n, C, H, W), and their labels, int64 (n,), if there are."""
        images = torch.from_numpy(np.array(self.images[rows]))
        if self.labels is None:
            return images, None
        return images, torch.from_numpy(np.array(self.labels[rows]))

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """The order in which images are shown in an epoch of training, int64 (n,)."""
        return epoch_order(self.shards, len(self), seed, epoch)

    def describe(self) -> dict[str, Any]:
        """The identity as JSON-able values, to stand beside numbers measured on this set."""
        return {
            "id": self.id,
            "version": self.version,
            "split": self.split,
            "count": len(self),
            "shape": list(self.event_shape),
            "levels": self.levels,
            "num_classes": self.num_classes,
            "preprocessing": self.preprocessing,
            "preprocessing_hash": self.preprocessing_hash,
            "fingerprint": self.fingerprint,
            "skipped": len(self.skipped),
        }


def load(config: DataConfig, split: Split) -> ImageDataset:
    """Read one split of the set that `config` describes.

    A prepared set (`exactflow prepare`) is mapped as it was decoded, with the identity of its
    source: splits are those of the settings it was prepared with, and another setting is refused
    unless it is at its default. Only a `limit` may be smaller.

    Args:
        config: the source and the preprocessing.
        split: "train", "validation" or "test".

    Returns:
        The decoded split: in memory up to 1 GiB of pixels for the whole source, beyond that in a
        prepared set in `config.cache_dir`. A split of remote shards is streamed and never decoded
        as a whole.

    Raises:
        DataError: the source is missing or broken, an image cannot be read or has another shape
            than the first training image, or the split is empty.
        ImportError: a library of the `data` extra is missing.
    """
    if split not in SPLITS:
        raise DataError(f"split: expected one of {', '.join(SPLITS)}, found {split!r}")
    prepared = open_prepared(config.source)
    if prepared is not None:
        return _dataset(prepared.identity, split, *read_prepared(prepared, config, split))
    return load_source(open_source(config), config, split)


def load_source(source: Source, config: DataConfig, split: Split) -> ImageDataset:
    """One split of an opened source; as `load`, but `config.source` does not count."""
    selection = select(config, source, split)
    identity = identity_of(config, source, selection)
    if selection.split.shards is not None:
        images = StreamedImages(selection)
        stored = selection.split.labels
        labels = None if stored is None else stored[selection.indices]
        fingerprint = images.fingerprint(labels)
        return _dataset(identity, split, images, labels, fingerprint, shards=images.shards)
    counts = (len(part.records) for part in source.splits.values())
    images_read = sum(min(count, config.limit or count) for count in counts)
    if store.fits_memory(images_read, selection.shape):
        return _dataset(identity, split, *store.decode_to_memory(selection))
    return _dataset(identity, split, *cached(selection, identity, split, config.cache_dir))


def identify(config: DataConfig) -> tuple[str, str]:
    """Name and version of a set, as `ImageDataset` has them; nothing is decoded.

    Raises:
        DataError: the source is missing or broken.
        ImportError: a library of the `data` extra is missing.
    """
    prepared = open_prepared(config.source)
    found = open_source(config) if prepared is None else prepared.identity
    return found.id, found.version


def select(config: DataConfig, source: Source, split: Split) -> store.Selection:
    """The images to decode for a split of an opened source; the first one is decoded here.

    Raises:
        DataError: no image is left for the split, or none of the training images is readable.
    """
    home, indices = split_members(config, split, source.stored)
    preprocessing = Preprocessing(
        config.image_size, config.channels, config.bits, config.max_pixels
    )
    shape, shape_of = store.first_shape(
        source.splits["train"].records, preprocessing, config.on_error
    )
    return store.Selection(
        split=source.splits[home],
        indices=indices,
        preprocessing=preprocessing,
        shape=shape,
        shape_of=shape_of,
        levels=_levels(source, config),
        on_error=config.on_error,
    )


def _dataset(
    identity: Identity,
    split: Split,
    images: np.ndarray | CheckedImages | StreamedImages,
    labels: np.ndarray | None,
    fingerprint: str,
    skipped: tuple[str, ...] = (),
    shards: tuple[int, ...] | None = None,
) -> ImageDataset:
    if skipped:
        count = len(images) + len(skipped)
        log.warning("%s: skipped %d of %d %s images", identity.id, len(skipped), count, split)
    return ImageDataset(
        images=images,
        labels=labels,
        id=identity.id,
        version=identity.version,
        split=split,
        levels=identity.levels,
        class_names=() if labels is None else tuple(identity.class_names),
        preprocessing=identity.preprocessing,
        preprocessing_hash=identity.preprocessing_hash,
        fingerprint=fingerprint,
        skipped=skipped,
        shards=shards,
    )


def _levels(source: Source, config: DataConfig) -> int:
    if source.levels == 256:
        return 2**config.bits
    if config.bits != 8:
        raise DataError(
            f"bits: expected 8 for {source.id}, which has {source.levels} levels, "
            f"found {config.bits}"
        )
    return source.levels
