"""Image sets with their identity: what is measured on them can say on which pixels.

`load` opens a source (`sources.py`), chooses the members of a split, and decodes them once
(`store.py`). Sources are described in `DataConfig`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from exactflow.data import store
from exactflow.data.config import SPLITS, DataConfig, DataError, Split
from exactflow.data.decode import Preprocessing
from exactflow.data.order import permutation
from exactflow.data.records import Source
from exactflow.data.sources import open_source

log = logging.getLogger(__name__)

__all__ = ["DataConfig", "DataError", "ImageDataset", "Split", "load", "split_members"]


@final
@dataclass(frozen=True, eq=False)
class ImageDataset:
    """One split of an image set, decoded.

    Attributes:
        images: (n, C, H, W) uint8 in 0 .. levels-1; read-only, possibly a memory map.
        labels: int64 (n,) in 0 .. num_classes-1, or None.
        id: name of the set.
        version: version of the stored data, the same for every copy of them.
        split: "train", "validation" or "test".
        levels: number of values a pixel can take.
        class_names: one name per label; empty if unlabelled.
        preprocessing: what was done to each stored image, for people.
        preprocessing_hash: the same for machines.
        fingerprint: sha256 (hex) of shape, levels, labels and pixels, in order.
        skipped: names of the images left out under `on_error="skip"`.
    """

    images: np.ndarray
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

    def describe(self) -> dict[str, Any]:
        """The identity as JSON-able values, for whoever prints a number measured on this set."""
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

    def __getstate__(self) -> dict[str, Any]:
        # NumPy would pickle the contents of a memory map: a copy of the set for every worker.
        state = dict(self.__dict__)
        if isinstance(self.images, np.memmap):
            state["images"] = (str(self.images.filename), self.images.shape)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        images = state["images"]
        if isinstance(images, tuple):
            file, shape = images
            images = np.memmap(file, np.uint8, "r", shape=shape)
        self.__dict__.update(state, images=images)


def load(config: DataConfig, split: Split) -> ImageDataset:
    """Read one split of the set that `config` describes.

    Args:
        config: where the images are and what is done to them.
        split: "train", "validation" or "test".

    Returns:
        The decoded split: in memory up to 1 GiB of pixels for the whole source, beyond that as a
        memory map of a file in `config.cache_dir`.

    Raises:
        DataError: the source is missing or broken, an image cannot be read or has another shape
            than the first training image, or the split is empty.
        ImportError: a library of the `data` extra is missing.
    """
    if split not in SPLITS:
        raise DataError(f"split: expected one of {', '.join(SPLITS)}, found {split!r}")
    source = open_source(config)
    counts: dict[Split, int] = {name: len(stored.records) for name, stored in source.splits.items()}
    home, indices = split_members(config, split, counts)
    preprocessing = Preprocessing(config.image_size, config.channels, config.bits)
    shape, shape_of = store.first_shape(
        source.splits["train"].records, preprocessing, config.on_error
    )
    selection = store.Selection(
        split=source.splits[home],
        indices=indices,
        preprocessing=preprocessing,
        shape=shape,
        shape_of=shape_of,
        levels=_levels(source, config),
        on_error=config.on_error,
    )
    images_read = sum(min(count, config.limit or count) for count in counts.values())
    if images_read * int(np.prod(shape)) <= store.RAM_LIMIT_BYTES:
        decoded = store.decode_to_memory(selection)
    else:
        folder = Path(config.cache_dir or "~/.cache/exactflow").expanduser()
        decoded = store.decode_to_file(selection, source.stamp, folder)
    if decoded.skipped:
        log.warning(
            "%s: skipped %d of %d %s images", source.id, len(decoded.skipped), len(indices), split
        )
    return ImageDataset(
        images=decoded.images,
        labels=decoded.labels,
        id=source.id,
        version=source.version,
        split=split,
        levels=selection.levels,
        class_names=() if decoded.labels is None else source.class_names,
        preprocessing=preprocessing.text,
        preprocessing_hash=preprocessing.hash,
        fingerprint=decoded.fingerprint,
        skipped=decoded.skipped,
    )


def split_members(
    config: DataConfig, split: Split, counts: Mapping[Split, int]
) -> tuple[Split, np.ndarray]:
    """Which stored images make up a split.

    What the source does not store is cut from its training split, in the split order: test first,
    then validation, the rest is for training.

    Args:
        config: its fractions, seed and limit are used.
        split: the split asked for.
        counts: number of images in each stored split; "train" is always there.

    Returns:
        The stored split and the indices in it, ascending, int64.

    Raises:
        DataError: no image is left for the split.
    """
    home: Split = split if split in counts else "train"
    order = permutation(counts[home], "split", config.split_seed)
    if home == "train":
        cut_test = 0 if "test" in counts else round(config.test_fraction * len(order))
        cut_both = cut_test
        if "validation" not in counts:
            cut_both += round(config.validation_fraction * len(order))
        bounds = {
            "test": slice(0, cut_test),
            "validation": slice(cut_test, cut_both),
            "train": slice(cut_both, None),
        }
        order = order[bounds[split]]
    if not len(order):
        raise DataError(
            f"{config.source}: expected images for the {split} split, found none: "
            f"{counts[home]} stored in {home}, test_fraction {config.test_fraction}, "
            f"validation_fraction {config.validation_fraction}"
        )
    return home, np.sort(order[: config.limit])


def _levels(source: Source, config: DataConfig) -> int:
    if source.levels == 256:
        return 2**config.bits
    if config.bits != 8:
        raise DataError(
            f"bits: expected 8 for {source.id}, which has {source.levels} levels, "
            f"found {config.bits}"
        )
    return source.levels
