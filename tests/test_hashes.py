"""Laws of decoded images in files: a changed bit is found when it is first read."""

import json
import logging
import os
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exactflow.cli import prepare as command
from exactflow.cli.arguments import Prepare
from exactflow.data import (
    DataConfig,
    DataError,
    ImageDataset,
    load,
    prepare,
    prepared,
    store,
    training_batches,
    verify,
)
from exactflow.data.checked import CheckedImages, hashes_of
from exactflow.metrics.extractors import extract, pixels
from test_data import SPLITS, same, whole, write_classes
from test_data import pixels as random_pixels

COUNT, SIDE = 30, 4


@pytest.fixture
def source(tmp_path: Path) -> DataConfig:
    write_classes(tmp_path / "set", random_pixels(COUNT, SIDE, SIDE))
    return DataConfig(str(tmp_path / "set"))


@pytest.fixture
def out(source: DataConfig, tmp_path: Path) -> Path:
    prepare(source, tmp_path / "out")
    return tmp_path / "out"


def flip(file: Path, byte: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1 << bit
    file.write_bytes(content)


def of_format_1(folder: Path) -> None:
    """Turn a prepared set into one that an earlier version wrote."""
    file = folder / "prepared.json"
    facts = json.loads(file.read_text())
    del facts["sha256"]
    for split, found in facts["splits"].items():
        del found["labels_sha256"]
        (folder / f"{split}.hashes").unlink()
    file.write_text(json.dumps({**facts, "format": 1}, indent=1) + "\n")
    (folder / "preparing.lock").unlink()
    prepared._warn_unhashed.cache_clear()


# Prepared sets


@pytest.mark.parametrize(("byte", "bit"), [(0, 0), (5 * SIDE * SIDE + 3, 7), (-1, 4)])
def test_one_flipped_bit_is_found_where_it_is_read(out: Path, byte: int, bit: int) -> None:
    config = DataConfig(str(out))
    count = len(load(config, "train"))
    flip(out / "train.bin", byte, bit)
    row = (byte % (count * SIDE * SIDE)) // (SIDE * SIDE)
    message = rf"train\.bin\[{row}\]: expected the image whose hash was written down"
    dataset = load(config, "train")
    others = np.delete(np.arange(count), row)
    assert len(dataset.images[others]) == count - 1
    for rows in (row, slice(row, row + 1), np.array([0, row, 1]), np.arange(count) == row):
        with pytest.raises(DataError, match=message):
            dataset.images[rows]
    reads = [
        lambda: dataset[row],
        lambda: dataset.tensors(),
        lambda: list(islice(training_batches(dataset, count, seed=0), 1)),
        lambda: extract(pixels(4), dataset.images, dataset.levels),
        lambda: np.asarray(dataset.images),
        lambda: verify(out),
    ]
    for read in reads:
        with pytest.raises(DataError, match=message):
            read()
    with pytest.raises(DataError, match=message):
        pickle.loads(pickle.dumps(dataset)).images[:]
    load(config, "validation").tensors()


@pytest.mark.parametrize("name", ["train.labels", "train.hashes", "prepared.json"])
def test_so_is_one_of_labels_hashes_and_facts(out: Path, name: str) -> None:
    verify(out)
    size = (out / name).stat().st_size
    for byte in (0, size // 3, size // 2, size - 3):
        flip(out / name, byte)
        with pytest.raises(DataError, match=r"prepared\.json|labels|\.bin\["):
            verify(out)
        flip(out / name, byte)
    verify(out)


def test_images_are_hashed_once(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load(DataConfig(str(out)), "train")
    first = dataset.images[:]
    monkeypatch.setattr("exactflow.data.checked.hashes_of", None)
    with pytest.raises(TypeError):
        load(DataConfig(str(out)), "train").images[:]
    monkeypatch.setattr("exactflow.data.checked.hashes_of", lambda images: hashes_of(images[:0]))
    np.testing.assert_array_equal(dataset.images[:], first)
    np.testing.assert_array_equal(dataset.images[::-2], first[::-2])


def test_rows_are_those_of_an_array(out: Path) -> None:
    images = load(DataConfig(str(out)), "train").images
    assert isinstance(images, CheckedImages)
    array = np.array(images)
    assert images.shape == array.shape
    for rows in (0, -1, slice(3, 9, 2), slice(4, 4), np.array([3, 0, 0, -2]), np.arange(0)):
        np.testing.assert_array_equal(images[rows], array[rows])
    for rows in (len(array), np.array([len(array)])):
        with pytest.raises(IndexError):
            images[rows]


def test_sets_without_hashes_still_load(
    out: Path, source: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    hashed = {split: load(DataConfig(str(out)), split) for split in SPLITS}
    of_format_1(out)
    with caplog.at_level(logging.WARNING):
        for split in SPLITS:
            found = load(DataConfig(str(out)), split)
            assert found.describe() == hashed[split].describe()
            np.testing.assert_array_equal(found.images, hashed[split].images)
    assert caplog.text.count("without hashes") == 1
    prepare(source, out)  # it is that set already
    verify(out)
    flip(out / "train.bin", 20)
    load(DataConfig(str(out)), "train").tensors()
    with pytest.raises(DataError, match=r"train\.bin: expected the fingerprint"):
        verify(out)


def test_what_an_earlier_version_began_is_finished(
    out: Path, source: DataConfig, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    half.mkdir()
    facts = json.loads((out / "prepared.json").read_text())
    del facts["splits"], facts["sha256"]
    (half / "preparing.json").write_text(json.dumps({**facts, "format": 1}))
    prepare(source, half)
    assert {f.name: f.read_bytes() for f in half.iterdir()} == {
        f.name: f.read_bytes() for f in out.iterdir()
    }


def test_the_command(
    tmp_path: Path, source: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command.run(Prepare(source=source.source, out=out, verify=True))
    assert "all 30 images are those that were prepared" in capsys.readouterr().out
    command.run(Prepare(source=str(out), verify=True))
    assert "all 30 images are those that were prepared" in capsys.readouterr().out
    flip(out / "test.bin", 3)
    with pytest.raises(DataError, match=r"test\.bin\[0\]"):
        command.run(Prepare(source=str(out), verify=True))
    with pytest.raises(DataError, match="expected a set that `prepare` wrote, found none"):
        command.run(Prepare(source=source.source, verify=True))
    with pytest.raises(ValueError, match="expected a folder to write beside the source"):
        command.run(Prepare(source=source.source))


def test_the_lock_stays_where_others_may_have_opened_it(out: Path, source: DataConfig) -> None:
    with (out / "preparing.lock").open("rb") as opened:  # by one who waits
        for file in out.iterdir():
            if file.name != "preparing.lock":
                file.unlink()
        prepare(source, out)
        assert os.path.samestat(os.fstat(opened.fileno()), (out / "preparing.lock").stat())


# The cache folder


@pytest.fixture
def cached(source: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(store, "RAM_LIMIT_BYTES", 0)
    read(source, tmp_path)
    return tmp_path / "cache"


def read(source: DataConfig, tmp_path: Path) -> ImageDataset:
    return whole(Path(source.source), cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000, "", "\0\0", '{"count": 30}', None])
def test_a_damaged_sidecar_is_decoded_again(
    cached: Path,
    source: DataConfig,
    tmp_path: Path,
    content: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (sidecar,) = cached.rglob("prepared.json")
    intact = sidecar.read_text()
    changed = intact.replace('"skipped": []', '"skipped": [3]')
    assert changed != intact
    sidecar.write_text(changed if content is None else content)
    found = read(source, tmp_path)
    assert "decoded again" in caplog.text
    assert sidecar.read_text() == intact
    assert len(found) == COUNT


def test_a_flipped_bit_of_the_cache_is_found(
    cached: Path, source: DataConfig, tmp_path: Path
) -> None:
    (pixels_file,) = cached.rglob("*.bin")
    intact = pixels_file.read_bytes()
    flip(pixels_file, 7 * SIDE * SIDE)
    with pytest.raises(DataError, match=r"\.bin\[7\]: expected .* remove .*, and its images are d"):
        read(source, tmp_path).tensors()
    pixels_file.unlink()
    read(source, tmp_path).tensors()
    pixels_file.write_bytes(intact[:-1])
    read(source, tmp_path).tensors()
    assert pixels_file.read_bytes() == intact


def test_an_interrupted_cache_is_gone_on_with(
    source: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(Path(source.source))
    monkeypatch.setattr(store, "RAM_LIMIT_BYTES", 0)
    monkeypatch.setattr(store, "_IMAGES_PER_BLOCK", 4)
    decode, calls = store.decode_image, 0

    def interrupted(*arguments: Any) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(store, "decode_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(source, tmp_path)
    calls = 100
    found = read(source, tmp_path)
    assert calls - 100 <= COUNT - 8 + 1  # two blocks are there; the first image tells the shape
    assert found.describe() == expected.describe()
    np.testing.assert_array_equal(found.images, expected.images)


def test_content_is_on_disk_before_its_name(
    source: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "RAM_LIMIT_BYTES", 0)
    events: list[str] = []
    sync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        events.append(f"sync {os.fstat(handle).st_size}")
        sync(handle)

    def replaced(self: Path, target: Path) -> Path:
        events.append(f"rename {self.stat().st_size}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    read(source, tmp_path)
    assert events.pop(1).startswith("rename")  # what is begun: nothing is decoded yet
    images = COUNT * SIDE * SIDE
    assert events[1].split() == ["sync", str(images)]
    for sync_event, rename in zip(events[3::2], events[4::2], strict=True):
        assert sync_event.replace("sync", "rename") == rename
    assert len(events) == 9  # labels, hashes, and the facts last


def test_batches_are_those_of_memory(
    cached: Path, source: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = read(source, tmp_path)
    monkeypatch.setattr(store, "RAM_LIMIT_BYTES", 2**30)
    here = read(source, tmp_path)
    assert isinstance(here.images, np.ndarray)
    assert here.describe() == mapped.describe()
    batches = [list(islice(training_batches(each, 7, seed=1), 9)) for each in (here, mapped)]
    assert same(*batches)
