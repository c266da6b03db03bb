"""Laws of streamed shards: the images of a local copy, a fixed order, bounded disk space."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shard_server
from exactflow.cli import index as command
from exactflow.cli.arguments import Index
from exactflow.data import (
    DataConfig,
    DataError,
    ImageDataset,
    evaluation_batches,
    files,
    index_shards,
    load,
    order,
    prepare,
    training_batches,
)
from exactflow.data.augmentation import Augmentation
from exactflow.data.formats import shards, tar_index
from exactflow.data.loader import Share
from exactflow.data.order import epoch_order, mixed_shards, permutation
from exactflow.data.splits import split_members
from exactflow.data.streaming import remote, shard_cache
from exactflow.data.streaming.background import done_ahead
from exactflow.data.streaming.shard_cache import RemoteShard, ShardCache
from exactflow.data.streaming.streamed import StreamedImages
from exactflow.training import TrainConfig, fit, trainer
from processes import PATIENCE, Command
from processes import call as cli
from shard_server import Shards, digest, few_mixed, served
from test_cli import TINY
from test_data import SPLITS, pixels, png, same
from test_prepare import samples, tar
from test_training import assert_same_bits, final_state
from training_worker import make_toy

COUNTS = (5, 9, 4, 7, 6, 8)  # images of each shard


def write_shards(folder: Path, counts: tuple[int, ...] = COUNTS, side: int = 6) -> Path:
    """Write shards of grey images with labels."""
    images = pixels(sum(counts), side, side)
    first = 0
    for number, count in enumerate(counts):
        rows = slice(first, first + count)
        labels = [row % 3 for row in range(first, first + count)]
        tar(folder / f"{number:03}.tar", samples(images[rows], first, cls=labels))
        first += count
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.tar")
    }


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shuffle groups of two shards; do not pause between attempts."""
    monkeypatch.setattr(order, "MIXED_SHARDS", order.MIXED_SHARDS)
    monkeypatch.setattr(order, "MIXED_IMAGES", order.MIXED_IMAGES)
    few_mixed()
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)


@pytest.fixture
def server(tmp_path: Path, few: None) -> Iterator[Shards]:
    """Six shards, which also lie in tmp_path/local."""
    with served(contents(write_shards(tmp_path / "local"))) as shards:
        yield shards


def config_of(server: Shards, tmp_path: Path, **changes: Any) -> DataConfig:
    """All images are for training; an index is in the cache folder."""
    pattern = f"{server.url}/{{000..005}}.tar"
    whole = {"test_fraction": 0.0, "validation_fraction": 0.0, "cache_dir": str(tmp_path / "cache")}
    config = DataConfig(pattern, **{**whole, **changes})
    index_shards(pattern, cache_dir=config.cache_dir, cache_gib=config.cache_gib)
    return config


def gib(server: Shards, count: float) -> float:
    """GiB of this many times the largest shard."""
    return count * max(map(len, server.files.values())) / 2**30


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "shards").glob("*.tar"))


def local(tmp_path: Path, **changes: Any) -> ImageDataset:
    whole = {"test_fraction": 0.0, "validation_fraction": 0.0}
    return load(DataConfig(str(tmp_path / "local"), **{**whole, **changes}), "train")


# What is read


def test_it_is_the_local_copy(server: Shards, tmp_path: Path) -> None:
    ours, theirs = load(config_of(server, tmp_path), "train"), local(tmp_path)
    assert isinstance(ours.images, StreamedImages)
    np.testing.assert_array_equal(ours.images[:], theirs.images)
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    assert ours.shards == COUNTS
    mine, other = ours.describe(), theirs.describe()
    assert mine.pop("fingerprint") != other.pop("fingerprint")
    assert (mine.pop("id"), other.pop("id")) == ("set", "local")
    assert mine == other  # the version too
    assert ours.num_classes == 3


def test_rows_are_those_of_an_array(server: Shards, tmp_path: Path) -> None:
    ours, theirs = load(config_of(server, tmp_path), "train").images, local(tmp_path).images
    assert ours.shape == theirs.shape
    for rows in (
        0,
        -1,
        slice(3, 20, 4),
        slice(None, None, -1),
        slice(4, 4),
        np.array([38, 0, 0, 17, -2]),
        np.arange(39) % 3 == 0,
        np.empty(0, dtype=np.int64),
    ):
        np.testing.assert_array_equal(ours[rows], theirs[rows])
    for rows in (39, np.array([39])):
        with pytest.raises(IndexError):
            ours[rows]


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_other_places(tmp_path: Path, few: None, kind: str) -> None:
    folder = write_shards(tmp_path / "local")
    root = f"file://{folder}"
    if kind == "memory":
        fsspec = pytest.importorskip("fsspec")
        memory = fsspec.filesystem("memory")
        for name, content in contents(folder).items():
            memory.pipe(f"/{tmp_path.name}/{name}", content)
        root = f"memory://{tmp_path.name}"
    whole = {"test_fraction": 0.0, "validation_fraction": 0.0, "cache_dir": str(tmp_path / "cache")}
    config = DataConfig(f"{root}/{{000..005}}.tar", **whole)
    index_shards(config.source, cache_dir=config.cache_dir)
    np.testing.assert_array_equal(load(config, "train").images[:], local(tmp_path).images)
    missing = f"{root}/{{000..006}}.tar"
    with pytest.raises(DataError, match=r"006\.tar: expected a file, found"):
        index_shards(missing, cache_dir=config.cache_dir)


def test_splits_have_names_or_folders(tmp_path: Path, few: None) -> None:
    images = pixels(9, 4, 4)
    files = {
        "train-0.tar": images[:3],
        "train-1.tar": images[3:6],
        "val-0.tar": images[6:7],
        "test-0.tar": images[7:],
    }
    for name, part in files.items():
        for place in (tmp_path / "flat" / name, tmp_path / "deep" / name.replace("-", "/")):
            tar(place, samples(part, txt=["cat", "dog", "eel"][: len(part)]))
    loaded = []
    for folder, pattern in (
        ("flat", "{train-{0..1},val-0,test-0}.tar"),
        ("deep", "{train/{0..1},val/0,test/0}.tar"),
    ):
        whole = {"cache_dir": str(tmp_path / "cache")}
        config = DataConfig(f"file://{tmp_path / folder}/{pattern}", **whole)
        index_shards(config.source, cache_dir=config.cache_dir)
        for split in SPLITS:
            ours = load(config, split)
            theirs = load(DataConfig(str(tmp_path / folder)), split)
            np.testing.assert_array_equal(ours.images[:], theirs.images)
            np.testing.assert_array_equal(ours.labels, theirs.labels)
            assert (ours.version, ours.class_names) == (theirs.version, ("cat", "dog", "eel"))
            loaded.append(ours)
    assert {dataset.id for dataset in loaded} == {"flat", "deep"}
    assert len({dataset.fingerprint for dataset in loaded[:3]}) == 3


def test_a_validation_set_of_its_own(server: Shards, tmp_path: Path) -> None:
    tar(tmp_path / "held" / "val-0.tar", samples(pixels(3, 6, 6, seed=5), cls=[0, 1, 2]))
    held = f"file://{tmp_path / 'held'}/val-{{0..0}}.tar"
    config = config_of(server, tmp_path)
    index_shards(held, cache_dir=config.cache_dir)
    for source in (config.source, str(tmp_path / "local")):
        for validation in (held, str(tmp_path / "held" / "val-0.tar")):
            both = replace(config, source=source, validation=validation)
            found = load(both, "validation")
            assert isinstance(found.images, StreamedImages) is ("://" in validation)
            np.testing.assert_array_equal(found.images[:][:, 0], pixels(3, 6, 6, seed=5))
            assert len(load(both, "train")) == sum(COUNTS)
    with pytest.raises(DataError, match="validation: expected other shards"):
        load(replace(config, validation=config.source), "train")


def test_splits_and_limits_take_whole_shards(server: Shards, tmp_path: Path) -> None:
    config = config_of(server, tmp_path, test_fraction=0.3, validation_fraction=0.2)
    parts = {split: load(config, split) for split in SPLITS}
    assert [len(part.shards or ()) for part in parts.values()] == [3, 1, 2]
    everything = local(tmp_path).images.tobytes()
    rows = {split: [image.tobytes() for image in part.images[:]] for split, part in parts.items()}
    assert sorted(image for found in rows.values() for image in found) == sorted(
        everything[i : i + 36] for i in range(0, len(everything), 36)
    )
    server.asked.clear()
    small, large = (load(replace(config, limit=n), "train") for n in (3, 12))
    assert len(small) == 3
    assert {i.tobytes() for i in small.images[:]} < {i.tobytes() for i in large.images[:]}
    assert len(small.shards or ()) == 1
    assert len({small.fingerprint, large.fingerprint, parts["train"].fingerprint}) == 3
    for split, prepared in prepare(config, tmp_path / "out").items():  # the same images
        np.testing.assert_array_equal(prepared.images, parts[split].images[:])
        np.testing.assert_array_equal(prepared.labels, parts[split].labels)
        less = load(DataConfig(str(tmp_path / "out"), limit=5), split)
        np.testing.assert_array_equal(less.images, load(replace(config, limit=5), split).images[:])
    with pytest.raises(DataError, match=r"found none: 39 in 6 shards stored in train"):
        load(replace(config, test_fraction=0.0), "test")


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    fractions=st.tuples(st.floats(0.0, 0.4), st.floats(0.0, 0.4)),
    seed=st.integers(0, 9),
)
def test_cuts_of_shards_are_disjoint_and_cover(
    counts: list[int], fractions: tuple[float, float], seed: int
) -> None:
    config = DataConfig(
        validation_fraction=fractions[0], test_fraction=fractions[1], split_seed=seed
    )
    home = np.repeat(np.arange(len(counts)), counts)
    taken: list[int] = []
    for split in SPLITS:
        try:
            rows = split_members(config, split, {"train": counts})[1]
        except DataError:
            continue
        for shard in np.unique(home[rows]):
            assert (home[rows] == shard).sum() == counts[shard]
        taken += rows.tolist()
    assert sorted(taken) == list(range(sum(counts)))
    alone = [split_members(config, "train", {"train": stored})[1] for stored in (7, [1] * 7)]
    np.testing.assert_array_equal(*alone)


def test_preprocessing_is_that_of_the_copy(server: Shards, tmp_path: Path) -> None:
    words = {"image_size": 3, "channels": 3, "bits": 5}
    ours, theirs = load(config_of(server, tmp_path, **words), "train"), local(tmp_path, **words)
    np.testing.assert_array_equal(ours.images[:], theirs.images)
    assert ours.levels == theirs.levels == 32
    assert ours.preprocessing_hash == theirs.preprocessing_hash


# Indexes


def test_an_index_is_made_once(server: Shards, tmp_path: Path) -> None:
    config = replace(
        DataConfig(f"{server.url}/{{000..005}}.tar"), cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(DataError, match=r"an index of the shards, found neither http.*index\.json"):
        load(config, "train")
    indexed, file = index_shards(config.source, tmp_path / "index.json", cache_dir=config.cache_dir)
    assert [len(shard) for shard in indexed] == list(COUNTS)
    server.asked.clear()
    first = load(config, "train")
    assert server.asked == []  # nor the first shard, which was left in the cache folder
    # Beside the shards it is found by others, who need not name them.
    server.files["index.json"] = file.read_bytes()
    for number, pattern in enumerate(("/{000..005}.tar", "/", "", "/index.json")):
        other = replace(config, source=server.url + pattern, cache_dir=str(tmp_path / f"{number}"))
        again = load(other, "train")
        assert again.describe() == first.describe()
        server.asked.clear()
        load(other, "train")
        assert server.asked == []
    part = replace(config, source=f"{server.url}/{{001..002}}.tar")
    whole = {"test_fraction": 0.0, "validation_fraction": 0.0}
    assert len(load(replace(part, **whole), "train")) == sum(COUNTS[1:3])
    with pytest.raises(
        DataError, match=r"index\.json: expected the shard 006\.tar, found 6 others"
    ):
        load(replace(part, source=f"{server.url}/{{001..006}}.tar"), "train")


def test_a_folder_here_is_indexed_for_elsewhere(tmp_path: Path, few: None) -> None:
    folder = write_shards(tmp_path / "local")
    indexed, file = index_shards(str(folder), cache_dir=str(tmp_path / "cache"))
    assert file == folder / "index.json"
    there, _ = index_shards(f"file://{folder}/{{000..005}}.tar", cache_dir=str(tmp_path / "other"))
    assert tar_index.write_index(indexed) == tar_index.write_index(there) == file.read_bytes()
    assert len(local(tmp_path)) == 39  # an index in a folder of shards is in nobody's way
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"expected \.tar files, found none"):
        index_shards(str(tmp_path / "none"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="expected URLs that name every"):
        index_shards(f"file://{folder}", cache_dir=str(tmp_path / "cache"))


def test_an_interrupted_index_is_gone_on_with(server: Shards, tmp_path: Path) -> None:
    source, cache = f"{server.url}/{{000..005}}.tar", str(tmp_path / "cache")
    intact = server.files["004.tar"]
    server.files["004.tar"] = intact[:700]
    with pytest.raises(DataError, match=r"/004\.tar: expected a whole tar file, found after"):
        index_shards(source, cache_dir=cache)
    server.files["004.tar"] = intact
    (journal,) = (tmp_path / "cache" / "indexes").glob("*.journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    journal.write_bytes(b"".join(lines[:3]) + lines[3][:-20])  # as if killed while writing
    server.asked.clear()
    indexed, file = index_shards(source, cache_dir=cache)
    assert {name for name, _ in server.asked} == {"003.tar", "004.tar", "005.tar"}
    assert not journal.exists()
    other, _ = index_shards(source, cache_dir=str(tmp_path / "other"))
    assert tar_index.write_index(indexed) == tar_index.write_index(other) == file.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "expected an index of tar shards, found"),
        (b"[]", "expected an index of tar shards, found"),
        (b'{"format": 2, "shards": []}', "expected an index of format 1, found 2"),
        (b'{"format": 1, "shards": [{"name": "x"}]}', "expected an index of tar shards"),
        (b'{"format": 1, "shards": []}', "expected shards, found none"),
    ],
)
def test_damaged_indexes_are_named(
    server: Shards, tmp_path: Path, content: bytes, message: str
) -> None:
    server.files["index.json"] = content
    config = DataConfig(server.url, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=rf"{server.url}/index\.json: {message}"):
        load(config, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": None}, "expected the SHA-256 of 000.tar, found none"),
        ({"sha256": "../x"}, "no SHA-256 for 000.tar"),
        ({"sizes": [1]}, "lists of different lengths for 000.tar"),
        ({"size": 2000}, "images outside of 000.tar"),
        ({"offsets": [-1] * 5}, "images outside of 000.tar"),
    ],
)
def test_indexes_that_cannot_be_are_refused(
    server: Shards, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    _, file = index_shards(str(tmp_path / "local"), cache_dir=str(tmp_path / "cache"))
    index = json.loads(file.read_bytes())
    index["shards"][0] |= change
    del index["sha256"]  # else it says that it was changed
    server.files["index.json"] = json.dumps(index).encode()
    with pytest.raises(DataError, match=message):
        load(DataConfig(server.url, cache_dir=str(tmp_path / "cache")), "train")


def test_local_shards_are_walked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_shards(tmp_path / "local")
    cache = str(tmp_path / "cache")
    tar(folder / "006.tar", {"x.png": png(pixels(6, 6)), "x.cls": b"1", "x.npy": b""})
    local(tmp_path, cache_dir=cache)
    assert not (tmp_path / "cache").exists()  # so few are not worth a file
    monkeypatch.setattr(shards, "KEEP_INDEX_FROM", 1)
    first = local(tmp_path, cache_dir=cache)
    caplog.clear()
    with monkeypatch.context() as patch:
        patch.setattr(shards, "index_file", None)
        again = local(tmp_path, cache_dir=cache)
    assert again.describe() == first.describe()
    assert "{'npy': 1}" in caplog.text  # what is left alone is reported every time
    os.utime(folder / "003.tar", ns=(0, 0))
    tar(folder / "003.tar", samples(pixels(7, 6, 6, seed=1), cls=[0] * 7))
    assert local(tmp_path, cache_dir=cache).version != first.version
    (folder / "006.tar").write_bytes(b"cut short")
    with pytest.raises(DataError, match=r"006\.tar: expected a whole tar file"):
        local(tmp_path, cache_dir=cache)


# The order


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
def test_an_order_keeps_groups_of_shards_together(counts: list[int], seed: int, epoch: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "MIXED_IMAGES", 50)
        mixed = mixed_shards(counts)
        assert mixed >= order.MIXED_SHARDS
        found = epoch_order(counts, sum(counts), seed, epoch)
    assert sorted(found) == list(range(sum(counts)))
    home = np.repeat(np.arange(len(counts)), counts)[found]
    firsts = list(dict.fromkeys(home.tolist()))
    last_of_earlier = -1
    places = {shard: np.flatnonzero(home == shard) for shard in firsts}
    expected = permutation(len(counts), "shard", seed, epoch)
    for first in range(0, len(counts), mixed):
        group = expected[first : first + mixed].tolist()
        rows = np.concatenate([places[shard] for shard in group])
        assert rows.min() == last_of_earlier + 1
        last_of_earlier = int(rows.max())
        assert len(rows) == last_of_earlier + 1 - rows.min()
    if mixed >= len(counts):  # then it is any permutation, that of a local set
        np.testing.assert_array_equal(found, permutation(sum(counts), "epoch", seed, epoch))


def test_groups_hold_ten_thousand_images() -> None:
    assert mixed_shards([1281] * 1000) == 8
    assert mixed_shards([10_000] * 50) == order.MIXED_SHARDS
    assert mixed_shards([1] * 50) == 10_000


def test_batches_depend_on_seed_and_step_only(server: Shards, tmp_path: Path) -> None:
    config = config_of(server, tmp_path, cache_gib=gib(server, 6.1))
    change = {"augmentation": Augmentation(flip=True, translate=1.0)}
    dataset = load(config, "train")
    assert isinstance(dataset.images, StreamedImages)
    whole = list(islice(training_batches(dataset, 8, seed=1, **change), 11))
    with_workers = training_batches(dataset, 8, seed=1, num_workers=2, **change)
    assert same(whole, list(islice(with_workers, 11)))
    resumed = training_batches(dataset, 8, seed=1, start=6, **change)
    assert same(whole[6:], list(islice(resumed, 5)))
    ranks = [
        list(islice(training_batches(dataset, 8, seed=1, share=Share(r, 2), **change), 11))
        for r in (0, 1)
    ]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step].images for part in ranks]), batch.images)
        assert torch.equal(torch.cat([part[step].indices for part in ranks]), batch.indices)
    here = replace(local(tmp_path), shards=dataset.shards)
    assert same(whole, list(islice(training_batches(here, 8, seed=1, **change), 11)))
    for workers in (0, 2):
        batches = list(evaluation_batches(dataset, 8, num_workers=workers))
        assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(39))
        images = torch.cat([batch.images for batch in batches])
        np.testing.assert_array_equal(images.numpy(), here.images)


def test_a_run_resumes_to_the_same_bits(
    server: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar(tmp_path / "toy" / "0.tar", samples(pixels(9, 2, 3)))
    tar(tmp_path / "toy" / "1.tar", samples(pixels(14, 2, 3, seed=1), 9))
    tar(tmp_path / "toy" / "2.tar", samples(pixels(8, 2, 3, seed=2), 23))
    server.files |= contents(tmp_path / "toy")
    source = f"{server.url}/{{0..2}}.tar"
    whole = {"test_fraction": 0.0, "validation_fraction": 0.0, "cache_dir": str(tmp_path / "cache")}
    index_shards(source, cache_dir=whole["cache_dir"])
    dataset = load(DataConfig(source, bits=2, **whole), "train")
    plan = TrainConfig(batch_size=8, steps=12, warmup_steps=2, checkpoint_every=5)
    fit(make_toy(), dataset, plan, tmp_path / "whole", progress=False)
    intact = trainer.training_batches

    def until(*arguments: Any, **options: Any) -> Iterator[Any]:
        yield from islice(intact(*arguments, **options), 7)
        raise KeyboardInterrupt

    for file in cached(tmp_path):
        file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "training_batches", until)
        with pytest.raises(KeyboardInterrupt):
            fit(make_toy(), dataset, plan, tmp_path / "parts", progress=False)
    again = load(DataConfig(source, bits=2, **whole), "train")
    workers = replace(plan, num_workers=2)
    fit(make_toy(), again, workers, tmp_path / "parts", progress=False)
    assert_same_bits(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))


# The cache folder


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """Total sizes of the files of a folder, measured again and again.

    Files appear and vanish during a measurement, so only sizes that two looks in a row agree on
    are counted.
    """
    found, ended = [0], threading.Event()

    def look() -> dict[str, int]:
        seen = {}
        for file in folder.glob("*"):
            with contextlib.suppress(FileNotFoundError):
                seen[file.name] = file.stat().st_size
        return seen

    def watch() -> None:
        before = look()
        while not ended.is_set():
            time.sleep(0.0005)
            now = look()
            if now == before:
                found.append(sum(now.values()))
            before = now

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
        found.append(sum(look().values()))  # what is left at the end is seen for certain


def test_no_more_than_so_many_bytes_are_here(server: Shards, tmp_path: Path) -> None:
    generous = load(config_of(server, tmp_path), "train")
    expected = digest(generous, 12)
    for file in cached(tmp_path):
        file.unlink()
    few = ShardCache(tmp_path / "cache" / "shards", int(2.5 * 2**30 * gib(server, 1)))
    images = generous.images
    assert isinstance(images, StreamedImages)
    records = replace(images._selection.split.records, files=replace(images._files, cache=few))
    small = StreamedImages(
        replace(images._selection, split=replace(images._selection.split, records=records))
    )
    with watched(few.folder) as sizes:
        for workers in (0, 2):  # two processes and a thread compete for room for two shards
            found = digest(replace(generous, images=small), 12, num_workers=workers)
            assert found == expected
    assert max(sizes) <= few.limit
    assert max(sizes) > few.limit / 3
    assert max(server.times(f"{n:03}.tar") for n in range(6)) > 2  # they were fetched again


@pytest.mark.slow
def test_two_processes_share_a_folder(server: Shards, tmp_path: Path) -> None:
    config = config_of(server, tmp_path, cache_gib=gib(server, 6))
    expected = digest(load(config, "train"), 15)
    for file in cached(tmp_path):
        file.unlink()
    server.asked.clear()
    words = [str(shard_server.__file__), tmp_path / "cache", config.source, config.cache_gib, 15]
    others = [Command(*words, cwd=tmp_path) for _ in range(2)]
    with watched(tmp_path / "cache" / "shards") as sizes:
        told = [other.end().stdout.strip() for other in others]
    assert told == [expected, expected]
    assert max(sizes) <= config.cache_gib * 2**30
    assert all(server.times(f"{n:03}.tar") == 1 for n in range(6))  # once for both of them


def test_what_was_read_last_is_removed_last(server: Shards, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "shards", 2 * max(map(len, server.files.values())))
    remotes = [
        RemoteShard(f"{server.url}/{name}", len(content), None)
        for name, content in sorted(server.files.items())
    ]
    known = []
    for shard in remotes[:2]:
        with cache.open(shard) as stream:
            known.append(replace(shard, sha256=files.sha256_of(stream)))
    with cache.open(known[0]):
        pass
    with cache.open(remotes[2]):
        pass
    server.asked.clear()
    with cache.open(known[0]), cache.open(known[0]):  # any number of readers
        assert server.asked == []
        with cache.open(remotes[3]), cache.open(known[1]) if False else cache.open(known[0]):
            pass
    with cache.open(known[1]):
        assert server.times("001.tar") == 1


def test_a_shard_that_is_read_is_not_removed(
    server: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "PATIENCE", 0.1)
    sizes = {name: len(content) for name, content in server.files.items()}
    cache = ShardCache(tmp_path / "shards", max(sizes.values()))
    one = RemoteShard(f"{server.url}/000.tar", sizes["000.tar"], None)
    other = RemoteShard(f"{server.url}/001.tar", sizes["001.tar"], None)
    with cache.open(one) as stream:
        with pytest.raises(DataError, match=r"001\.tar: expected .* bytes of room in .*cache_gib"):
            cache.open(other).__enter__()
        cache.fetch(other)  # which waits for nothing
        assert server.times("001.tar") == 0
        assert stream.read() == server.files["000.tar"]
    with cache.open(other) as stream:
        assert stream.read() == server.files["001.tar"]
    large = replace(other, size=cache.limit + 1)
    with pytest.raises(DataError, match="cache_gib leaves room for"):
        cache.open(large).__enter__()


def test_a_download_that_was_killed_is_taken_up(server: Shards, tmp_path: Path) -> None:
    config = config_of(server, tmp_path)
    expected = digest(load(config, "train"), 5)
    load(config, "train").images[:]  # nothing is fetched in the background any more
    for file in cached(tmp_path):
        file.unlink()
    server.asked.clear()
    server.pause = 0.5  # of every 1000 bytes: it is not through before it is killed
    words = [str(shard_server.__file__), tmp_path / "cache", config.source, 1, 5]
    process = Command(*words, cwd=tmp_path)
    partial = (tmp_path / "cache" / "shards").glob
    process.wait_until(lambda: any(file.stat().st_size for file in partial("*.partial")))
    os.kill(process.pid, signal.SIGKILL)
    process.end()
    server.pause = 0.0
    server.asked.clear()
    assert digest(load(config, "train"), 5) == expected
    assert any(start > 0 for _, start in server.asked)
    assert not list((tmp_path / "cache" / "shards").glob("*.partial"))


def test_a_file_that_was_damaged_here_is_fetched_again(server: Shards, tmp_path: Path) -> None:
    dataset = load(config_of(server, tmp_path), "train")
    for file in cached(tmp_path):
        file.write_bytes(file.read_bytes()[:-512])
    np.testing.assert_array_equal(dataset.images[:], local(tmp_path).images)


def test_a_full_disk_is_told(server: Shards, tmp_path: Path) -> None:
    dataset = load(config_of(server, tmp_path), "train")
    for file in cached(tmp_path):
        file.unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(DataError, match=r"00\d\.tar: expected room for it in .*lower data"):
            dataset.images[:]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    np.testing.assert_array_equal(dataset.images[:], local(tmp_path).images)


# Networks and shards that fail


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_is_taken_up(server: Shards, tmp_path: Path, ranges: bool) -> None:
    dataset = load(config_of(server, tmp_path), "train")
    for file in cached(tmp_path):
        file.unlink()
    server.ranges = ranges
    for number in range(6):
        server.cuts[f"{number:03}.tar"] = 3
    server.status["002.tar"] = [503, 500, 429]
    server.asked.clear()
    np.testing.assert_array_equal(dataset.images[:], local(tmp_path).images)
    assert sum(server.cuts.values()) == 0
    assert any(start > 0 for _, start in server.asked) is ranges


def test_failures_for_good_name_the_shard(server: Shards, tmp_path: Path) -> None:
    dataset = load(config_of(server, tmp_path), "train")
    for file in cached(tmp_path):
        file.unlink()
    intact = server.files["003.tar"]
    flipped = bytearray(intact)
    flipped[len(intact) // 2] ^= 1
    for content, message in [
        (None, r"003\.tar: expected a file, found: HTTP status 404"),
        (intact + bytes(512), rf"003\.tar: expected {len(intact):,} bytes, as when it was indexed"),
        (intact[:-512], rf"003\.tar: expected {len(intact):,} bytes, as when it was indexed"),
        (bytes(flipped), r"003\.tar: expected the content that was indexed, SHA-256"),
        (b"", rf"003\.tar: expected {len(intact):,} bytes, as when it was indexed, found 0"),
    ]:
        server.files.pop("003.tar", None)
        if content is not None:
            server.files["003.tar"] = content
        with pytest.raises(DataError, match=message):
            dataset.images[:]
    server.files["003.tar"] = intact
    server.status["003.tar"] = [403]
    with pytest.raises(DataError, match=r"003\.tar: expected a file, found: HTTP status 403"):
        dataset.images[:]
    server.cuts["003.tar"] = 1000
    server.ranges = False
    with pytest.raises(DataError, match=rf"003\.tar: .* found {remote.ATTEMPTS} times in a row"):
        dataset.images[:]
    server.cuts.clear()
    np.testing.assert_array_equal(dataset.images[:], local(tmp_path).images)


def test_a_worker_names_the_shard(server: Shards, tmp_path: Path) -> None:
    dataset = load(config_of(server, tmp_path), "train")
    for file in cached(tmp_path):
        file.unlink()
    del server.files["003.tar"]
    with pytest.raises(DataError, match=r"003\.tar: expected a file, found: HTTP status 404"):
        list(islice(training_batches(dataset, 8, seed=0, num_workers=1), 6))


def test_an_unreachable_host_is_named(tmp_path: Path, few: None) -> None:
    with served({}) as gone:
        source = f"{gone.url}/{{0..1}}.tar"
    with pytest.raises(DataError, match=r"index\.json: expected to read it, found 6 times"):
        load(DataConfig(source, cache_dir=str(tmp_path)), "train")
    with pytest.raises(DataError, match=r"0\.tar: expected to read it, found 6 times"):
        index_shards(source, cache_dir=str(tmp_path))


def test_a_piece_of_another_file_is_thrown_away(server: Shards, tmp_path: Path) -> None:
    config = config_of(server, tmp_path)
    dataset = load(config, "train")
    for file in cached(tmp_path):
        file.unlink()
    intact = server.files["000.tar"]
    server.files["000.tar"] = bytes(len(intact))
    server.cuts["000.tar"] = 1000
    server.ranges = False
    with pytest.raises(DataError, match="times in a row"):
        dataset.images[0]
    server.cuts.clear()
    server.files["000.tar"], server.ranges = intact, True
    np.testing.assert_array_equal(dataset.images[:5], local(tmp_path).images[:5])


def test_what_is_broken_in_a_shard_is_named(server: Shards, tmp_path: Path) -> None:
    config = config_of(server, tmp_path)
    members = samples(pixels(3, 6, 6), cls=[0, 1, 2])
    bad = {"no image": b"no image", "another size": png(pixels(5, 6)), "grey": png(pixels(6, 6, 3))}
    for content in bad.values():
        file = tar(tmp_path / "bad" / "006.tar", {**members, "x/001.png": content})
        server.files["006.tar"] = file.read_bytes()
        more = replace(config, source=f"{server.url}/{{000..006}}.tar")
        index_shards(more.source, cache_dir=config.cache_dir)
        dataset = load(more, "train")
        with pytest.raises(DataError, match=r"/006\.tar\[x/001\.png\]: expected"):
            dataset.images[:]
    file = tar(tmp_path / "bad" / "006.tar", {**members, "x/003.txt": b"1"})
    server.files["006.tar"] = file.read_bytes()
    with pytest.raises(DataError, match=r"/006\.tar\[x/003\.txt\]: expected one image"):
        index_shards(more.source, cache_dir=config.cache_dir)


# What is refused


@pytest.mark.parametrize(
    ("pattern", "urls"),
    [
        ("h://x/{00..02}.tar", ["00", "01", "02"]),
        ("h://x/{8..11}.tar", ["8", "9", "10", "11"]),
        ("h://x/{a,b}{1..2}.tar", ["a1", "a2", "b1", "b2"]),
        ("h://x/{a-{0..1},b}.tar", ["a-0", "b", "a-1"]),
        ("h://x/a.tar", ["a"]),
    ],
)
def test_patterns(pattern: str, urls: list[str]) -> None:
    assert sorted(remote.expand(pattern)) == sorted(f"h://x/{url}.tar" for url in urls)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("file:///x/{3..1}.tar", "expected a range that rises"),
        ("file:///x/{0..99999999}.tar", "expected a range that rises"),
        ("file:///x/{a}.tar", r"expected \{000\.\.099\} or \{a,b\}"),
        ("file:///x/{a,b.tar", "expected braces in pairs"),
        ("file:///x/{0..1}.zip", r"expected URLs of \.tar files"),
        ("http://{a,b}/0.tar", "expected shards of one host"),
        ("htp://a/0.tar", "expected a known kind of URL, found: Protocol not known"),
    ],
)
def test_other_patterns_are_refused(tmp_path: Path, pattern: str, message: str) -> None:
    for action in (
        lambda: load(DataConfig(pattern, cache_dir=str(tmp_path)), "train"),
        lambda: index_shards(pattern, cache_dir=str(tmp_path)),
    ):
        with pytest.raises(DataError, match=message):
            action()


def test_what_cannot_be_streamed_is_refused(server: Shards, tmp_path: Path) -> None:
    config = config_of(server, tmp_path)
    with pytest.raises(DataError, match="expected on_error=raise, since it is streamed"):
        load(replace(config, on_error="skip"), "train")
    with pytest.raises(DataError, match=r"data\.cache_gib of at least .* holds 6 shards"):
        load(replace(config, cache_gib=gib(server, 3)), "train")
    with pytest.raises(DataError, match="cache_gib: expected > 0"):
        DataConfig(cache_gib=0.0)
    for names, message in [
        (("train-0", "other"), r"other\.tar: expected a name that says train"),
        (("val-0", "test-0"), "of the training split too, found test and validation only"),
    ]:
        for name in names:
            server.files[f"{name}.tar"] = server.files["000.tar"]
        odd = replace(config, source=f"{server.url}/{{{','.join(names)}}}.tar")
        index_shards(odd.source, cache_dir=config.cache_dir)
        with pytest.raises(DataError, match=message):
            load(odd, "train")


def test_it_can_be_sent_to_another_process(server: Shards, tmp_path: Path) -> None:
    dataset = load(config_of(server, tmp_path), "train")
    sent = pickle.loads(pickle.dumps(dataset))
    assert sent.describe() == dataset.describe()
    np.testing.assert_array_equal(sent.images[:], dataset.images[:])


def test_two_do_not_index_at_once(tmp_path: Path, few: None) -> None:
    fcntl = pytest.importorskip("fcntl")
    source = f"file://{write_shards(tmp_path / 'local')}/{{000..005}}.tar"
    _, kept = index_shards(source, cache_dir=str(tmp_path / "cache"))
    with kept.with_suffix(".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is indexing"):
            index_shards(source, cache_dir=str(tmp_path / "cache"))


def test_shards_are_fetched_before_they_are_needed(server: Shards, tmp_path: Path) -> None:
    dataset = load(config_of(server, tmp_path), "train")
    for file in cached(tmp_path):
        file.unlink()
    images = dataset.images
    assert isinstance(images, StreamedImages)
    ahead = images.read_ahead(iter([np.arange(3), np.arange(38, 39)]), lambda rows: rows)
    assert next(ahead).tolist() == [0, 1, 2]
    deadline = time.monotonic() + PATIENCE
    while len(cached(tmp_path)) < 2:  # no image was requested
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert [rows.tolist() for rows in ahead] == [[38]]


def test_a_task_that_fails_is_left_to_who_needs_it() -> None:
    done: list[int] = []
    finished = threading.Event()

    def action(task: int) -> None:
        if task == 1:
            raise DataError("no")
        done.append(task)
        if task == 2:
            finished.set()

    with done_ahead(action, 1) as want:
        for task in range(3):
            want(task)
        assert finished.wait(PATIENCE)
    assert done == [0, 2]


def test_the_commands(tmp_path: Path) -> None:
    write_shards(tmp_path / "local", (40, 40), side=8)
    source = f"file://{tmp_path}/local/{{000..001}}.tar"
    words = ["data.cache_dir=cache", "data.validation_fraction=0.5", "data.test_fraction=0"]
    done = cli("index", source, words[0], "--out", "index.json", cwd=tmp_path)
    assert "2 shards, 80 images" in done.stdout
    assert (tmp_path / "index.json").is_file()
    tiny = [*TINY[:3], "training.steps=3", "training.warmup_steps=1", "training.batch_size=16"]
    train = ["train", "tarflow-tiny", *tiny, "--out", "run", f"data.source={source}", *words]
    cli(*train, cwd=tmp_path)
    card = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["card"]
    assert card["training data"]["count"] == 40
    with pytest.raises(ValueError, match=r"data\.bits: expected data\.cache_dir"):
        command.run(Index(source=source, settings=("data.bits=5",)))
