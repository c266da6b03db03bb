"""Sources in memory: arrays, tensors, and data sets of other libraries."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from exactflow.data.config import MEMORY, DataConfig, DataError, Split
from exactflow.data.datasets import ImageDataset, load, load_source
from exactflow.data.records import Source, StoredSplit, bounded_labels, numbered_up_to, withheld
from exactflow.data.sources import ArrayRecords

FORMS = (
    "expected a source's name, a DataConfig, an array (N, H, W[, C]), a tensor (N, C, H, W), these "
    "with labels as a pair, a torch Dataset of (image, label), or a Hugging Face dataset with a "
    "column 'image'"
)
_IMAGE_COLUMNS, _LABEL_COLUMNS = ("image", "img"), ("label", "labels")


def load_data(
    data: Any, split: Split | None = None, *, levels: int = 256, **reading: Any
) -> ImageDataset:
    """Images of a named source, or from memory, as an `ImageDataset`.

    >>> len(load_data(np.zeros((5, 8, 8), dtype=np.uint8)))
    5

    Args:
        data: name of a source or a `DataConfig`; an array (N, H, W) or (N, H, W, C), a tensor
            (N, C, H, W), or a pair of one of these and its labels; a torch `Dataset` of
            (image, label); or a Hugging Face dataset with columns `image` and `label`. Images are
            uint8, or floats in [0, 1], which are rounded to grey levels. An `ImageDataset` is
            returned unchanged.
        split: by default "train" of a source, and all images from memory.
        levels: number of grey levels of images in memory, 0 .. levels-1.
        reading: fields of `DataConfig`: image_size, limit, validation_fraction, ...

    Raises:
        DataError: `data` is none of these, or an image or a label is not as expected.
    """
    if isinstance(data, ImageDataset):
        return data
    if isinstance(data, str | DataConfig):
        config = DataConfig(data, **reading) if isinstance(data, str) else data
        return load(config, split or "train")
    if split is None:
        reading = {"validation_fraction": 0.0, "test_fraction": 0.0, **reading}
    return load_source(open_memory(data, levels), DataConfig(MEMORY, **reading), split or "train")


def open_memory(data: Any, levels: int = 256) -> Source:
    """Images in memory as a source with one stored split; errors as of `load_data`."""
    images, labels, names = _parts(data, levels)
    if labels is not None and len(labels) != len(images):
        raise DataError(
            f"expected a label for each of {len(images):,} images, got {len(labels):,} labels"
        )
    found = None if labels is None else _integers(labels)
    if found is not None and not names:
        names = numbered_up_to([found])
    if found is not None and len(found) and int(found.max()) >= len(names):
        raise DataError(f"expected labels below {len(names)}, got {int(found.max())}")
    digest = hashlib.sha256(f"{images.shape} {levels} {names}".encode())
    digest.update(np.ascontiguousarray(images).data)
    digest.update(b"" if found is None else found.tobytes())
    version = digest.hexdigest()[:16]
    split = StoredSplit(ArrayRecords(images, "image"), found)
    return Source(MEMORY, version, version, names, {"train": split}, levels)


def _parts(data: Any, levels: int) -> tuple[np.ndarray, Any, tuple[str, ...]]:
    """Grey levels (n, H, W) or (n, H, W, 3), labels or None, and names of classes."""
    if isinstance(data, np.ndarray | Tensor):
        return _grey_levels(data, levels), None, ()
    if isinstance(data, tuple | list):
        if len(data) != 2:
            raise DataError(f"{FORMS}; got {len(data)} parts")
        return _grey_levels(data[0], levels), data[1], ()
    if getattr(data, "column_names", None) is not None:
        return _table(data, levels)
    if isinstance(data, Dataset) and getattr(data, "__len__", None) is not None:
        return _items(data, levels)
    raise DataError(f"{FORMS}; got {type(data).__name__}")


def _table(data: Any, levels: int) -> tuple[np.ndarray, Any, tuple[str, ...]]:
    """As `_parts`, of a Hugging Face dataset."""
    columns = data.column_names
    image = next((name for name in _IMAGE_COLUMNS if name in columns), None)
    label = next((name for name in _LABEL_COLUMNS if name in columns), None)
    if image is None:
        raise DataError(f"expected a column 'image', got {', '.join(map(str, columns))}")
    labels = None if label is None else list(data[label])
    names = getattr(data.features.get(label), "names", None) or ()
    return _stacked(data[image], levels), labels, tuple(names)


def _items(data: Any, levels: int) -> tuple[np.ndarray, Any, tuple[str, ...]]:
    """As `_parts`, of a torch `Dataset` of (image, label) or of images."""
    items = [data[index] for index in range(len(data))]
    if not all(isinstance(item, tuple | list) for item in items):
        return _stacked(items, levels), None, ()
    names = tuple(map(str, getattr(data, "classes", ())))
    labels = [int(label) for _, label in items]
    return _stacked([image for image, _ in items], levels), labels, names


def _stacked(items: Any, levels: int) -> np.ndarray:
    """Separate images of one shape as one array."""
    one = [_grey_levels(_pixels(item)[None], levels) for item in items]
    if not one:
        raise DataError("expected images, got none")
    shapes = {image.shape[1:] for image in one}
    if len(shapes) > 1:
        raise DataError(f"expected images of one shape, got {', '.join(map(str, sorted(shapes)))}")
    return np.concatenate(one)


def _pixels(item: Any) -> np.ndarray | Tensor:
    """One image, (H, W) or (H, W, C) as an array, (C, H, W) as a tensor."""
    if isinstance(item, Image.Image):
        return np.asarray(item if item.mode in ("L", "RGB") else item.convert("RGB"))
    if not isinstance(item, np.ndarray | Tensor):
        raise DataError(f"expected images, arrays or tensors, got {type(item).__name__}")
    return item


def _grey_levels(images: Any, levels: int) -> np.ndarray:
    """uint8 (n, H, W) or (n, H, W, 3)."""
    form = "(N, H, W), (N, H, W, C) or as a tensor (N, C, H, W), with 1 or 3 channels"
    if not isinstance(images, np.ndarray | Tensor):
        raise DataError(f"{FORMS}; got images of type {type(images).__name__}")
    shape = tuple(images.shape)
    if isinstance(images, Tensor):
        images = images.detach().cpu()
        images = (images.permute(0, 2, 3, 1) if images.ndim == 4 else images).numpy()
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if not (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)) or not images.size:
        raise DataError(f"expected images {form}, got {shape}")
    if np.issubdtype(images.dtype, np.floating):
        low, high = float(images.min()), float(images.max())
        if not (low >= 0 and high <= 1):
            raise DataError(f"expected floating images in [0, 1], got {low:g} to {high:g}")
        return np.rint(images * (levels - 1)).astype(np.uint8)
    if images.dtype != np.uint8:
        raise DataError(f"expected images of uint8, or floats in [0, 1], got {images.dtype}")
    if int(images.max()) >= levels:
        raise DataError(f"expected grey levels below {levels}, got {int(images.max())}")
    return images


def _integers(labels: Any) -> np.ndarray | None:
    """Labels as int64 (n,); None where they are withheld."""
    found = np.asarray(labels)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise DataError(f"expected integer labels (N,), got {found.dtype} {found.shape}")
    if withheld([found], "labels"):
        return None
    return bounded_labels(found, len(found), lambda row: f"labels[row {row}]")
