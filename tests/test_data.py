"""Laws of the data: stored images are read, with their identity, in a fixed order."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import pickle
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from exactflow.data import (
    Batch,
    DataConfig,
    DataError,
    ImageDataset,
    Split,
    evaluation_batches,
    load,
    store,
    training_batches,
)
from exactflow.data.augmentation import Augmentation
from exactflow.data.checked import CheckedImages
from exactflow.data.datasets import split_members
from exactflow.data.loader import Share

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "png")
    return stream.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_idx(folder: Path, prefix: str, images: np.ndarray, labels: np.ndarray) -> None:
    write(folder / f"{prefix}-images-idx3-ubyte.gz", gzip.compress(idx(images)))
    write(folder / f"{prefix}-labels-idx1-ubyte", idx(labels.astype(np.uint8)))


def write_classes(folder: Path, images: np.ndarray, classes: str = "ab") -> np.ndarray:
    """Write image i as a file of class i % len(classes); the images in reading order."""
    for i, image in enumerate(images):
        write(folder / classes[i % len(classes)] / f"{i:03}.png", png(image))
    return np.concatenate([images[c :: len(classes)] for c in range(len(classes))])


def write_parquet(
    file: Path, images: list[bytes], labels: list[int] | None, *, plain: bool = False
) -> Path:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = pa.array(images if plain else [{"bytes": data, "path": None} for data in images])
    columns = {"image": column} if labels is None else {"image": column, "label": pa.array(labels)}
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), file, row_group_size=4)
    return file


def whole(source: Path | str, **changes: object) -> ImageDataset:
    """All training images of a source: nothing is cut off."""
    config = DataConfig(str(source), validation_fraction=0.0, test_fraction=0.0)
    return load(replace(config, **changes), "train")


# Splits


def test_digits_have_17_levels_and_splits_that_cover_them() -> None:
    parts = {split: load(DataConfig(), split) for split in SPLITS}
    everything = whole("digits")
    assert everything.event_shape == (1, 8, 8)
    assert (everything.levels, everything.images.max(), everything.num_classes) == (17, 16, 10)
    rows = np.concatenate([part.images.reshape(len(part), -1) for part in parts.values()])
    assert len(rows) == len(everything) == 1797
    np.testing.assert_array_equal(
        np.unique(rows, axis=0), np.unique(everything.images.reshape(-1, 64), axis=0)
    )
    with pytest.raises(DataError, match="expected 8 for digits"):
        load(DataConfig(bits=5), "train")


@given(
    count=st.integers(10, 200),
    validation=st.floats(0.1, 0.4),
    test=st.floats(0.1, 0.4),
    seed=st.integers(0, 9),
)
def test_cut_splits_are_disjoint_and_cover(
    count: int, validation: float, test: float, seed: int
) -> None:
    config = DataConfig(validation_fraction=validation, test_fraction=test, split_seed=seed)
    parts = [split_members(config, split, {"train": count})[1] for split in SPLITS]
    assert sorted(np.concatenate(parts)) == list(range(count))
    other = replace(config, validation_fraction=0.0)
    np.testing.assert_array_equal(split_members(other, "test", {"train": count})[1], parts[2])


def test_a_limit_is_nested_and_takes_from_every_class(tmp_path: Path) -> None:
    write_classes(tmp_path, pixels(40, 4, 4))
    small, large = whole(tmp_path, limit=10), whole(tmp_path, limit=20)
    assert (len(small), len(large)) == (10, 20)
    assert {image.tobytes() for image in small.images} < {image.tobytes() for image in large.images}
    assert small.labels is not None
    assert set(small.labels) == {0, 1}


def test_an_empty_split_is_an_error(tmp_path: Path) -> None:
    write_classes(tmp_path, pixels(4, 4, 4))
    with pytest.raises(DataError, match="expected images for the test split, found none"):
        load(DataConfig(str(tmp_path), test_fraction=0.0), "test")
    with pytest.raises(DataError, match="train split, found none"):
        load(DataConfig(str(tmp_path), test_fraction=0.5, validation_fraction=0.5), "train")


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 0},
        {"channels": 2},
        {"bits": 9},
        {"limit": 0},
        {"test_fraction": 1.0},
        {"split_seed": -1},
        {"source": ""},
    ],
)
def test_a_config_out_of_range_is_an_error(change: dict[str, object]) -> None:
    with pytest.raises(DataError, match=f"DataConfig.{next(iter(change))}: expected"):
        replace(DataConfig(), **change)


# IDX files


def test_idx_reads_what_is_stored(tmp_path: Path) -> None:
    images, labels = pixels(20, 5, 7), np.arange(20) % 3
    write_idx(tmp_path, "train", images, labels)
    write_idx(tmp_path, "t10k", images[:4], labels[:4])
    test = load(DataConfig(str(tmp_path)), "test")
    np.testing.assert_array_equal(test.images[:, 0], images[:4])
    np.testing.assert_array_equal(whole(tmp_path).labels, labels)
    assert test.class_names == ("0", "1", "2")
    train, validation = (load(DataConfig(str(tmp_path)), split) for split in SPLITS[:2])
    assert (len(train), len(validation)) == (18, 2)


def test_broken_idx_files_are_named(tmp_path: Path) -> None:
    good = idx(pixels(4, 3, 3))
    labels = tmp_path / "train-labels-idx1-ubyte"
    images = tmp_path / "train-images-idx3-ubyte"
    cases = [
        (gzip.compress(good)[:-9], "images-idx3-ubyte: expected a complete IDX file"),
        (good[:-1], "expected 36 values .* found 35"),
        (good + b"x", "found 37"),
        (idx(pixels(4, 3)), "magic number 00000803 .* found 00000802"),
        (good[:7], "header of 16 bytes, found 7"),
        (b"", "an empty file"),
        (b"\x1f\x8b" + b"\0" * 9, "expected a complete IDX file"),
    ]
    write(labels, idx(np.zeros(4, np.uint8)))
    for data, message in cases:
        write(images, data)
        with pytest.raises(DataError, match=message):
            whole(tmp_path)
    write(images, good)
    write(labels, idx(np.zeros(5, np.uint8)))
    with pytest.raises(DataError, match=f"{labels}: expected 4 labels.*found 5"):
        whole(tmp_path)


def test_fashion_mnist_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXACTFLOW_DATA", str(tmp_path))
    monkeypatch.setattr("exactflow.data.sources._DEBIAN_DATASETS", tmp_path / "debian")
    with pytest.raises(DataError, match=f"{tmp_path}/fashion-mnist, {tmp_path}/debian"):
        whole("fashion-mnist")
    write_idx(tmp_path / "debian" / "fashion-mnist", "train", pixels(3, 4, 4), np.arange(3))
    assert whole("fashion-mnist").class_names[2] == "Pullover"


# Folders of images


def test_a_folder_of_classes(tmp_path: Path) -> None:
    images = write_classes(tmp_path, pixels(7, 5, 3))
    write(tmp_path / "a" / ".hidden.png", b"")
    dataset = whole(tmp_path)
    np.testing.assert_array_equal(dataset.images[:, 0], images)
    np.testing.assert_array_equal(dataset.labels, [0, 0, 0, 0, 1, 1, 1])
    assert dataset.class_names == ("a", "b")
    assert dataset[4][1] == 1
    np.testing.assert_array_equal(dataset[4][0][0], images[4])


def test_stored_splits_and_a_flat_folder(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", pixels(6, 4, 4), "abc")
    write_classes(tmp_path / "Valid", pixels(3, 4, 4, seed=1), "c")
    write(tmp_path / "test" / "x.png", png(pixels(4, 4)))
    train, validation, test = (load(DataConfig(str(tmp_path)), split) for split in SPLITS)
    assert (len(train), len(validation), len(test)) == (6, 3, 1)
    np.testing.assert_array_equal(validation.labels, [2, 2, 2])
    assert (test.labels, test.num_classes) == (None, 0)
    write_classes(tmp_path / "Valid", pixels(1, 4, 4), "d")
    with pytest.raises(DataError, match="classes of the training split, found also d"):
        load(DataConfig(str(tmp_path)), "validation")


@pytest.mark.parametrize("name", ["val", "validation", "Test"])
def test_a_split_is_never_read_as_a_class(tmp_path: Path, name: str) -> None:
    write_classes(tmp_path, pixels(2, 4, 4))
    write_classes(tmp_path / name, pixels(2, 4, 4))
    with pytest.raises(DataError, match="would be trained on as a class"):
        whole(tmp_path)


def test_a_folder_that_is_ambiguous_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found nothing"):
        whole(tmp_path / "absent")
    with pytest.raises(DataError, match=r"expected images .* found none"):
        whole(tmp_path)
    write(tmp_path / "loose.png", png(pixels(4, 4)))
    write(tmp_path / "a" / "x.png", png(pixels(4, 4)))
    with pytest.raises(DataError, match=r"found also the image loose\.png"):
        whole(tmp_path)
    (tmp_path / "loose.png").unlink()
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="/b: expected images of this class, found none"):
        whole(tmp_path)
    (tmp_path / "b").rename(tmp_path / "train")
    with pytest.raises(DataError, match="found also a"):
        whole(tmp_path)


def test_validation_lies_outside_the_training_folder(tmp_path: Path) -> None:
    write_classes(tmp_path / "data" / "a" / "inner", pixels(4, 4, 4))
    config = DataConfig(str(tmp_path / "data"), validation=str(tmp_path / "data" / "a"))
    with pytest.raises(DataError, match="which would be trained on"):
        load(config, "train")
    (tmp_path / "link").symlink_to(tmp_path / "data" / "a")
    with pytest.raises(DataError, match="which would be trained on"):
        load(replace(config, validation=str(tmp_path / "link")), "train")
    with pytest.raises(DataError, match="does not hold the training data"):
        load(replace(config, validation=str(tmp_path)), "train")
    write(tmp_path / "held-out" / "a" / "x.png", png(pixels(4, 4)))
    config = replace(config, validation=str(tmp_path / "held-out"), test_fraction=0.0)
    assert [len(load(config, split)) for split in SPLITS[:2]] == [4, 1]


# One image


def broken_images() -> dict[str, tuple[bytes, str]]:
    deep = io.BytesIO()
    Image.fromarray(pixels(4, 4).astype(np.uint16) * 257).save(deep, "png")
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)  # 16-bit RGB, which Pillow reads as 8
    rows = zlib.compress((b"\0" + bytes(24)) * 4)
    parts = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts
    )
    clear = pixels(4, 4, 4) | 128
    clear[0, 0, 3] = 130
    return {
        "text": (b"no image", "expected a complete image"),
        "empty": (b"", "expected a complete image"),
        "truncated": (png(pixels(64, 64))[:2000], "expected a complete image"),
        "size": (png(pixels(4, 5)), r"\(1, 4, 4\) as in .*000\.png, found \(1, 4, 5\)"),
        "colour": (png(pixels(4, 4, 3)), r"found \(3, 4, 4\)"),
        "16-bit": (deep.getvalue(), "expected 8 bits per channel"),
        "16-bit-rgb": (b"\x89PNG\r\n\x1a\n" + b"".join(chunks), "found 16 bits"),
        "transparent": (png(clear), "found alpha down to 1"),
    }


@pytest.mark.parametrize("kind", list(broken_images()))
def test_broken_images_raise_or_are_skipped(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    data, message = broken_images()[kind]
    images = write_classes(tmp_path, pixels(6, 4, 4))
    bad = write(tmp_path / "a" / "001-bad.png", data)
    with pytest.raises(DataError, match=f"{bad}: .*{message}"):
        whole(tmp_path)
    with caplog.at_level(logging.WARNING):
        dataset = whole(tmp_path, on_error="skip")
    assert dataset.skipped == (str(bad),)
    assert dataset.describe()["skipped"] == 1
    assert str(bad) in caplog.text
    np.testing.assert_array_equal(dataset.images[:, 0], images)
    np.testing.assert_array_equal(dataset.labels, [0, 0, 0, 1, 1, 1])


def test_nothing_readable_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    write(tmp_path / "x.png", b"")
    with pytest.raises(DataError, match="at least one readable image"):
        whole(tmp_path, on_error="skip")


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGBA", 3), ("CMYK", 3)]
)
def test_modes_become_grey_or_rgb(tmp_path: Path, mode: str, channels: int) -> None:
    image = Image.fromarray(pixels(6, 4, 3)).convert(mode)
    image.save(tmp_path / "x.tiff")
    expected = np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(6, 4, channels)
    np.testing.assert_array_equal(whole(tmp_path).images[0], expected.transpose(2, 0, 1))
    assert whole(tmp_path, channels=1).event_shape == (1, 6, 4)
    assert whole(tmp_path, channels=3).event_shape == (3, 6, 4)


def test_halving_is_the_mean_of_the_central_square(tmp_path: Path) -> None:
    image = pixels(8, 12)
    write(tmp_path / "x.png", png(image))
    means = image[:, 2:10].reshape(4, 2, 4, 2).mean((1, 3))
    found = whole(tmp_path, image_size=4).images[0, 0]
    assert np.abs(found - means).max() <= 1  # Pillow rounds once per axis


@pytest.mark.parametrize("size", [5, 8, 13])
def test_resizing_keeps_the_range(size: int) -> None:
    dataset = whole("digits", image_size=size, limit=50)
    assert dataset.event_shape == (1, size, size)
    assert dataset.images.max() <= 16


def test_five_bits_have_32_levels(tmp_path: Path) -> None:
    write_classes(tmp_path, pixels(6, 4, 4))
    eight, five = whole(tmp_path), whole(tmp_path, bits=5)
    np.testing.assert_array_equal(five.images, eight.images >> 3)
    assert (five.levels, eight.levels) == (32, 256)
    assert five.preprocessing_hash != eight.preprocessing_hash
    assert five.fingerprint != eight.fingerprint


# Parquet and the hub


@pytest.mark.parametrize("plain", [False, True])
def test_parquet_reads_what_is_stored(tmp_path: Path, plain: bool) -> None:
    images = pixels(11, 4, 4, 3)
    encoded = [png(image) for image in images]
    file = write_parquet(tmp_path / "set.parquet", encoded, [i % 3 for i in range(11)], plain=plain)
    dataset = whole(file)
    np.testing.assert_array_equal(dataset.images, images.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(dataset.labels, np.arange(11) % 3)
    parts = [load(DataConfig(str(file), test_fraction=0.3), split) for split in SPLITS]
    assert [len(part) for part in parts] == [7, 1, 3]
    assert len({image.tobytes() for part in parts for image in part.images}) == 11


def test_a_folder_of_parquet_files_has_splits(tmp_path: Path) -> None:
    encoded = [png(image) for image in pixels(9, 4, 4)]
    write_parquet(tmp_path / "train-00000-of-00002.parquet", encoded[:5], [0, 1, 0, 1, 1])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", encoded[5:7], [2, 0])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", encoded[7:], [-1, -1])
    np.testing.assert_array_equal(whole(tmp_path).labels, [0, 1, 0, 1, 1, 2, 0])
    test = load(DataConfig(str(tmp_path)), "test")
    assert (len(test), test.labels) == (2, None)  # -1 is never a label
    write_parquet(tmp_path / "extra.parquet", encoded, None)
    with pytest.raises(DataError, match=r"extra\.parquet: expected a name that says train"):
        whole(tmp_path)


def test_broken_parquet_files_are_named(tmp_path: Path) -> None:
    encoded = [png(pixels(4, 4)), b"no image", png(pixels(4, 4))]
    file = write_parquet(tmp_path / "set.parquet", encoded, None)
    with pytest.raises(DataError, match=r"set\.parquet\[row 1\]: expected a complete image"):
        whole(file)
    dataset = whole(file, on_error="skip")
    assert (len(dataset), dataset.labels, len(dataset.skipped)) == (2, None, 1)
    write_parquet(file, encoded, [0, 1, -2])
    with pytest.raises(DataError, match="labels from 0 upwards, found -2"):
        whole(file)
    write(file, file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"set\.parquet: expected a complete parquet file"):
        whole(file)


def test_missing_libraries_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    write(tmp_path / "x.parquet", b"")
    for source in (str(tmp_path / "x.parquet"), "hub:owner/name"):
        with pytest.raises(ImportError, match=r"pip install 'exactflow\[data\]'"):
            whole(source)


def test_the_hub_equals_the_files_it_stores(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = pixels(10, 4, 4)
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])}
    table = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in images], "label": [0, 1] * 5},
        features=datasets.Features(features),
    )
    table.to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    table.save_to_disk(str(tmp_path / "disk"))
    stored = whole(tmp_path / "set")
    np.testing.assert_array_equal(stored.images[:, 0], images)
    assert stored.class_names == ("x", "y")
    for folder in ("set", "disk"):
        hub = whole(f"hub:{tmp_path / folder}", cache_dir=str(tmp_path / "cache"))
        assert (hub.fingerprint, hub.class_names) == (stored.fingerprint, stored.class_names)
    with pytest.raises(DataError, match="expected a loadable data set"):
        whole(f"hub:{tmp_path / 'cache' / 'absent'}")


# Identity


def test_the_fingerprint_is_of_pixels_labels_and_order_only(tmp_path: Path) -> None:
    images, labels = pixels(8, 4, 4), np.arange(8) % 2
    changed = images.copy()
    changed[3, 2, 1] ^= 1
    variants = {
        "base": (images, labels),
        "pixel": (changed, labels),
        "label": (images, labels[::-1]),
        "order": (images[::-1], labels),
        "shape": (images.reshape(8, 2, 8), labels),
    }
    for name, (x, y) in variants.items():
        write_idx(tmp_path / name, "train", np.ascontiguousarray(x), y)
    prints = {whole(tmp_path / name).fingerprint for name in variants}
    prints.add(whole(tmp_path / "base", limit=7).fingerprint)
    assert len(prints) == len(variants) + 1
    write_idx(tmp_path / "copy", "train", images, labels)
    base = whole(tmp_path / "base", split_seed=3)  # nothing is cut, so the seed cannot matter
    assert base.fingerprint == whole(tmp_path / "copy").fingerprint
    assert base.version == whole(tmp_path / "copy").version
    assert json.loads(json.dumps(base.describe())) == base.describe()


def test_the_memory_map_equals_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classes(tmp_path / "set", pixels(9, 4, 4))
    bad = write(tmp_path / "set" / "a" / "001-bad.png", b"")
    cache = tmp_path / "cache"
    changes = {"on_error": "skip", "cache_dir": str(cache)}
    in_memory = whole(tmp_path / "set", **changes)
    assert not cache.exists()
    monkeypatch.setattr(store, "RAM_LIMIT_BYTES", 9 * 16 - 1)
    first = whole(tmp_path / "set", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(store, "decode_blocks", None)  # the second time nothing is decoded
        second = whole(tmp_path / "set", **changes)
    for mapped in (first, second, pickle.loads(pickle.dumps(second))):
        assert isinstance(mapped.images, CheckedImages)
        np.testing.assert_array_equal(mapped.images, in_memory.images)
        np.testing.assert_array_equal(mapped.labels, in_memory.labels)
        assert mapped.describe() == in_memory.describe()
        assert mapped.skipped == (str(bad),)
        assert mapped.images.file.is_relative_to(cache)  # still a file, not a copy of it
    assert len(list(cache.rglob("*.bin"))) == 1
    os.utime(bad, ns=(0, 0))
    assert len(whole(tmp_path / "set", **changes)) == 9
    assert len(list(cache.rglob("*.bin"))) == 2  # a touched file is decoded anew
    write(bad, png(pixels(4, 4)))
    assert len(whole(tmp_path / "set", **changes)) == 10
    write(bad, b"")
    with pytest.raises(DataError):
        whole(tmp_path / "set", cache_dir=str(tmp_path / "other"))
    assert [file.name for file in (tmp_path / "other").rglob("*.*")] == ["preparing.lock"]


def test_progress_is_shown_late_and_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path, pixels(4, 4, 4))
    monkeypatch.setattr(store, "PROGRESS_AFTER_SECONDS", 0.0)
    whole(tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    whole(tmp_path)
    captured = capsys.readouterr()
    assert "decoding images" in captured.err
    assert captured.out == ""


# Real files


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "fashion-mnist").is_dir(), reason="no real data beside the project")
def test_real_fashion_mnist() -> None:
    test = load(DataConfig(str(REAL / "fashion-mnist")), "test")
    assert (len(test), test.event_shape, test.class_names[9]) == (10_000, (1, 28, 28), "Ankle boot")
    assert test.labels is not None
    assert list(test.labels[:5]) == [9, 2, 1, 1, 6]
    config = DataConfig(str(REAL / "fashion-mnist"), limit=600)
    assert [len(load(config, split)) for split in SPLITS] == [600, 600, 600]


@pytest.mark.skipif(not (REAL / "cifar10-jpeg").is_dir(), reason="no real data beside the project")
def test_real_cifar10() -> None:
    pytest.importorskip("pyarrow")
    validation = load(DataConfig(str(REAL / "cifar10-jpeg"), limit=1000), "validation")
    assert (len(validation), validation.event_shape) == (1000, (3, 32, 32))
    assert validation.class_names[:2] == ("airplane", "automobile")
    assert 110 < validation.images.mean() < 130  # CIFAR-10's mean is 121


# Batches


def toy(count: int = 22, labelled: bool = True) -> ImageDataset:
    images = pixels(count, 2, 3, 4)
    labels = np.arange(count) % 5 if labelled else None
    names = tuple("abcde") if labelled else ()
    return ImageDataset(images, labels, "toy", "1", "train", 256, names, "", "", "")


def same(left: list[Batch], right: list[Batch]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(
        torch.equal(a.images, b.images)
        and torch.equal(a.indices, b.indices)
        and a.labels is not None
        and b.labels is not None
        and torch.equal(a.labels, b.labels)
        for a, b in pairs
    )


def test_batches_are_the_same_for_any_number_of_workers() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches = [
        list(
            islice(
                training_batches(
                    toy(), 4, seed=1, augmentation=Augmentation(flip=True), num_workers=n
                ),
                12,
            )
        )
        for n in (0, 2)
    ]
    assert same(*batches)
    assert same(*(list(evaluation_batches(toy(), 5, num_workers=n)) for n in (0, 2)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_batches_of_one(world_size: int) -> None:
    one = list(islice(training_batches(toy(), 8, seed=2, augmentation=Augmentation(flip=True)), 6))
    ranks = [
        list(
            islice(
                training_batches(
                    toy(),
                    8,
                    seed=2,
                    augmentation=Augmentation(flip=True),
                    share=Share(rank, world_size),
                ),
                6,
            )
        )
        for rank in range(world_size)
    ]
    for step, batch in enumerate(one):
        parts = [batches[step] for batches in ranks]
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.indices for part in parts]), batch.indices)


@given(start=st.integers(0, 40), batch_size=st.integers(1, 22), seed=st.integers(0, 5))
def test_resume_is_one_integer(start: int, batch_size: int, seed: int) -> None:
    everything = training_batches(
        toy(), batch_size, seed=seed, augmentation=Augmentation(flip=True)
    )
    resumed = training_batches(
        toy(), batch_size, seed=seed, augmentation=Augmentation(flip=True), start=start
    )
    assert same(list(islice(everything, start, start + 5)), list(islice(resumed, 5)))


def test_an_epoch_shows_each_image_once_in_a_new_order() -> None:
    batches = list(islice(training_batches(toy(), 5, seed=0), 8))  # two epochs of 20 of 22 images
    epochs = [torch.cat([b.indices for b in batches[i : i + 4]]).tolist() for i in (0, 4)]
    assert [len(set(epoch)) for epoch in epochs] == [20, 20]
    assert epochs[0] != epochs[1]
    other = next(training_batches(toy(), 20, seed=1)).indices.tolist()
    assert other != epochs[0]
    assert epochs[0] != sorted(epochs[0])


def flipped(dataset: ImageDataset, batches: list[Batch]) -> dict[int, bool]:
    """Whether each image was mirrored; each must be as stored, or mirrored."""
    found: dict[int, bool] = {}
    for batch in batches:
        for image, index in zip(batch.images.numpy(), batch.indices.tolist(), strict=True):
            found[index] = not np.array_equal(image, dataset.images[index])
            expected = dataset.images[index][..., ::-1] if found[index] else dataset.images[index]
            np.testing.assert_array_equal(image, expected)
    return found


def test_flips_depend_on_seed_epoch_and_image_only() -> None:
    dataset = toy(200)
    by_size = [
        flipped(
            dataset,
            list(
                islice(
                    training_batches(dataset, size, seed=3, augmentation=Augmentation(flip=True)),
                    200 // size,
                )
            ),
        )
        for size in (1, 8, 100)
    ]
    assert by_size[0] == by_size[1] == by_size[2]
    assert 60 < sum(by_size[0].values()) < 140  # 100 +- 5.6 standard deviations
    next_epoch = training_batches(
        dataset, 200, seed=3, start=1, augmentation=Augmentation(flip=True)
    )
    assert flipped(dataset, [next(next_epoch)]) != by_size[0]
    assert not any(flipped(dataset, [next(training_batches(dataset, 200, seed=3))]).values())


@pytest.mark.parametrize("padding", ["edge", "reflect"])
def test_shifts_are_whole_pixels_of_the_padded_image(padding: Any) -> None:
    dataset = toy(200)
    change = Augmentation(translate=1.5, padding=padding)
    by_size = [
        {
            int(index): image
            for batch in islice(
                training_batches(dataset, size, seed=3, augmentation=change), 200 // size
            )
            for image, index in zip(batch.images.numpy(), batch.indices, strict=True)
        }
        for size in (8, 100)
    ]
    seen = []
    for index, image in by_size[0].items():
        np.testing.assert_array_equal(image, by_size[1][index])
        padded = np.pad(dataset.images[index], [(0, 0), (1, 1), (1, 1)], mode=padding)
        height, width = image.shape[1:]
        seen += [
            next(
                (down, right)
                for down in (0, 1, 2)
                for right in (0, 1, 2)
                if np.array_equal(padded[:, down : down + height, right : right + width], image)
            )
        ]
    assert len(set(seen)) == 9  # -1, 0, 1 along both axes, each with probability 1/9
    assert min(seen.count(shift) for shift in set(seen)) > 5


def test_shifts_larger_than_the_image_are_refused() -> None:
    with pytest.raises(ValueError, match="translate: expected less than the image's"):
        training_batches(toy(), 8, seed=0, augmentation=Augmentation(translate=40.0))


def test_evaluation_is_in_order_and_complete() -> None:
    dataset = toy(labelled=False)
    batches = list(evaluation_batches(dataset, 8))
    assert [len(batch.images) for batch in batches] == [8, 8, 6]
    np.testing.assert_array_equal(torch.cat([b.images for b in batches]).numpy(), dataset.images)
    assert torch.cat([b.indices for b in batches]).tolist() == list(range(22))
    assert all(batch.labels is None for batch in batches)
    assert batches[0].images.dtype == torch.uint8


def test_labels_go_with_their_images() -> None:
    dataset = toy()
    batch = next(training_batches(dataset, 16, seed=0))
    assert batch.labels is not None
    assert batch.labels.dtype == batch.indices.dtype == torch.int64
    assert batch.labels.tolist() == (batch.indices % 5).tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: training_batches(toy(), 23, seed=0), "batch_size: expected 1 .. 22"),
        (lambda: training_batches(toy(), 0, seed=0), "batch_size: expected 1 .. 22"),
        (lambda: training_batches(toy(), 6, seed=0, share=Share(0, 4)), "a divisor of 6, found 4"),
        (lambda: training_batches(toy(), 6, seed=0, share=Share(2, 2)), "expected 0 .. 1"),
        (lambda: training_batches(toy(), 6, seed=-1), "expected >= 0"),
        (lambda: evaluation_batches(toy(), 0), "expected >= 1"),
    ],
)
def test_bad_arguments_are_refused_at_once(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
