"""Laws of prepared sets and tar shards: the source's images, after any interruption."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import signal
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from exactflow.cli import prepare as command
from exactflow.cli.arguments import Prepare
from exactflow.core import progress
from exactflow.data import (
    DataConfig,
    DataError,
    ImageDataset,
    known,
    load,
    prepare,
    store,
    training_batches,
)
from exactflow.data.checked import CheckedImages
from processes import call as cli
from processes import run
from test_cli import FAST, TINY
from test_data import SPLITS, pixels, png, same, whole, write, write_classes, write_idx

SIZES = [(9, 7), (6, 6), (12, 5)]


def photographs(folder: Path, count: int = 40) -> Path:
    """Images of several sizes in two classes."""
    for i in range(count):
        height, width = SIZES[i % 3]
        write(folder / "ab"[i % 2] / f"{i:03}.png", png(pixels(height, width, 3, seed=i)))
    return folder


def identical(one: ImageDataset, other: ImageDataset) -> None:
    assert one.describe() == other.describe()
    assert (one.skipped, one.class_names) == (other.skipped, other.class_names)
    np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_array_equal(one.labels, other.labels)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# What a prepared set is


@pytest.mark.parametrize(
    "words",
    [
        {"image_size": 4},
        {"image_size": 5, "channels": 1, "bits": 5, "split_seed": 3},
        {"image_size": 4, "limit": 6, "validation_fraction": 0.3, "test_fraction": 0.4},
        {"image_size": 4, "test_fraction": 0.0},
    ],
)
def test_it_is_what_the_source_gives(tmp_path: Path, words: dict[str, Any]) -> None:
    config = replace(DataConfig(str(photographs(tmp_path / "set"))), **words)
    out = tmp_path / "out"
    made = prepare(config, out)
    assert set(made) == {s for s in SPLITS if s != "test" or config.test_fraction}
    for split, dataset in made.items():
        direct = load(config, split)
        identical(dataset, direct)
        assert isinstance(dataset.images, CheckedImages)
        identical(load(replace(config, source=str(out)), split), direct)
        identical(pickle.loads(pickle.dumps(dataset)), direct)
        for limit in (2, 1000):
            less = min(limit, config.limit or limit)
            smaller = load(DataConfig(str(out), limit=limit), split)
            identical(smaller, load(replace(config, limit=less), split))
    if "test" not in made:
        with pytest.raises(DataError, match="expected images for the test split, found none"):
            load(DataConfig(str(out)), "test")


def test_it_is_read_without_decoding_or_hashing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(DataConfig(str(photographs(tmp_path / "set")), image_size=4), tmp_path / "out")
    monkeypatch.setattr(store, "decode_image", None)
    monkeypatch.setattr(store, "fingerprint", None)
    for split in SPLITS:
        load(DataConfig(str(tmp_path / "out")), split)


def test_stored_splits_and_an_unlabelled_one(tmp_path: Path) -> None:
    write_classes(tmp_path / "set" / "train", pixels(12, 4, 4))
    write(tmp_path / "set" / "test" / "x.png", png(pixels(4, 4)))
    config = DataConfig(str(tmp_path / "set"))
    for split, dataset in prepare(config, tmp_path / "out").items():
        identical(dataset, load(config, split))


@pytest.mark.parametrize("source", ["digits", "idx"])
def test_other_sources(tmp_path: Path, source: str) -> None:
    write_idx(tmp_path / "idx", "train", pixels(20, 5, 7), np.arange(20) % 3)
    write_idx(tmp_path / "idx", "t10k", pixels(4, 5, 7), np.arange(4) % 3)
    config = DataConfig(source if source == "digits" else str(tmp_path / "idx"))
    for split, dataset in prepare(config, tmp_path / "out").items():
        identical(dataset, load(config, split))


def test_a_part_beyond_memory_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(str(photographs(tmp_path / "set")), image_size=4)
    prepare(config, tmp_path / "out")
    monkeypatch.setattr(store, "RAM_LIMIT_BYTES", 10)
    found = DataConfig(str(tmp_path / "out"), limit=3, cache_dir=str(tmp_path / "cache"))
    for split in SPLITS:
        dataset = load(found, split)
        assert isinstance(dataset.images, CheckedImages)
        identical(dataset, load(replace(config, limit=3, cache_dir=found.cache_dir), split))


def test_what_cannot_be_read_stays_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    photographs(tmp_path / "set")
    for name in ("a/003-bad.png", "a/020-bad.png", "b/010-bad.png"):
        write(tmp_path / "set" / name, b"")
    config = DataConfig(str(tmp_path / "set"), image_size=4, on_error="skip", test_fraction=0.3)
    with pytest.raises(DataError, match=r"bad\.png: expected a complete image"):
        prepare(replace(config, on_error="raise"), tmp_path / "raise")
    made = prepare(config, tmp_path / "out")
    assert sum(len(dataset.skipped) for dataset in made.values()) == 3
    with caplog.at_level(logging.WARNING):
        for split, dataset in made.items():
            identical(dataset, load(config, split))
            for limit in (2, 5, 9):
                identical(
                    load(DataConfig(str(tmp_path / "out"), limit=limit), split),
                    load(replace(config, limit=limit), split),
                )
    assert "skipped" in caplog.text


def test_words_that_differ_are_refused(tmp_path: Path) -> None:
    config = DataConfig(str(photographs(tmp_path / "set")), image_size=4, test_fraction=0.2)
    prepare(config, tmp_path / "out")
    found = DataConfig(str(tmp_path / "out"))
    load(replace(found, image_size=4, test_fraction=0.2, bits=8), "train")
    for name, value in {
        "image_size": 5,
        "channels": 3,
        "bits": 5,
        "test_fraction": 0.3,
        "validation_fraction": 0.2,
        "split_seed": 1,
        "validation": "elsewhere",
    }.items():
        with pytest.raises(DataError, match=f"expected {name} .* as it was prepared"):
            load(replace(found, **{name: value}), "train")
    with pytest.raises(DataError, match="prepared already"):
        prepare(found, tmp_path / "again")
    with pytest.raises(DataError, match="found a prepared set"):
        load(replace(config, validation=str(tmp_path / "out")), "train")


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(DataConfig(str(photographs(tmp_path / "set")), image_size=4), out)
    found = DataConfig(str(out))
    for file in (out / "train.bin", out / "train.labels"):
        content = file.read_bytes()
        write(file, content[:-1])
        with pytest.raises(DataError, match=rf"{file}: expected {len(content):,} bytes"):
            load(found, "train")
        file.unlink()
        with pytest.raises(DataError, match="found None"):
            load(found, "train")
        write(file, content)
    facts = json.loads((out / "prepared.json").read_text())
    for text, message in [
        ("{", "expected what `prepare` writes"),
        ("[]", "expected what `prepare` writes"),
        (json.dumps({**facts, "format": 3}), "expected format 1 or 2, found 3"),
        (json.dumps({**facts, "colour": 2}), "expected what `prepare` writes"),
    ]:
        (out / "prepared.json").write_text(text)
        with pytest.raises(DataError, match=message):
            load(found, "train")


def test_batches_of_a_prepared_set_are_those_of_the_source(tmp_path: Path) -> None:
    config = DataConfig(str(photographs(tmp_path / "set")), image_size=4)
    prepared = prepare(config, tmp_path / "out")["train"]
    batches = [
        list(islice(training_batches(dataset, 8, seed=1, num_workers=n), 9))
        for dataset, n in ((load(config, "train"), 0), (prepared, 0), (prepared, 2))
    ]
    assert same(batches[0], batches[1])
    assert same(batches[0], batches[2])


# Interruption


KILLED = """
import os, signal, sys
from pathlib import Path
from exactflow.data import DataConfig, prepare, prepared_writer, store
store._IMAGES_PER_BLOCK, store._IMAGES_PER_TASK = 4, 2
target, count, workers, source, out = sys.argv[1], *map(int, sys.argv[2:4]), *sys.argv[4:]
home = store if target == "decode_image" else prepared_writer
home = home.os if target == "fsync" else home
intact, calls = getattr(home, target), 0
def until_killed(*arguments):
    global calls
    calls += 1
    if calls == count:
        if target == "fsync":  # half of a block, or of a line, is on disk
            os.truncate(arguments[0], os.fstat(arguments[0]).st_size - 5)
        os.kill(os.getpid(), signal.SIGKILL)
    return intact(*arguments)
setattr(home, target, until_killed)
config = DataConfig(source, image_size=4, on_error="skip", test_fraction=0.3)
prepare(config, Path(out), workers=workers)
"""


def killed(target: str, count: int, workers: int, source: Path, out: Path) -> int:
    words = [target, count, workers, source, out]
    return run("-c", KILLED, *words, cwd=source).returncode


@pytest.mark.parametrize(
    ("target", "counts"),
    [
        ("decode_image", (5, 17, 30)),
        ("fsync", (1, 2, 3, 4, 7, 12, 20, 23, 26)),
        ("write_atomically", (1, 2, 4, 5)),  # before anything; between the files that come last
    ],
)
def test_a_killed_preparation_goes_on_to_the_same_bytes(
    tmp_path: Path, target: str, counts: tuple[int, ...]
) -> None:
    source = photographs(tmp_path / "set")
    write(source / "a" / "011-bad.png", b"")
    config = DataConfig(str(source), image_size=4, on_error="skip", test_fraction=0.3)
    prepare(config, tmp_path / "whole")
    for workers, count in enumerate(counts, 1):
        out = tmp_path / f"{target}-{count}"
        assert killed(target, count, workers, source, out) == -signal.SIGKILL
        if (out / "preparing.json").exists():
            with pytest.raises(DataError, match="the same command goes on"):
                load(DataConfig(str(out)), "train")
        prepare(config, out, workers=3)
        assert contents(out) == contents(tmp_path / "whole")


def test_blocks_that_were_done_are_not_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = photographs(tmp_path / "set")
    assert killed("decode_image", 26, 1, source, tmp_path / "out") == -signal.SIGKILL
    lines = (tmp_path / "out" / "train.journal").read_text().splitlines(keepends=True)
    done = sum(json.loads(line)["read"] for line in lines if line.endswith("\n"))
    assert done >= 8
    decoded: list[str] = []
    decode = store.decode_image

    def counted(payload: Any, name: str, *rest: Any) -> np.ndarray:
        decoded.append(name)
        return decode(payload, name, *rest)

    monkeypatch.setattr(store, "decode_image", counted)
    config = DataConfig(str(source), image_size=4, on_error="skip", test_fraction=0.3)
    made = prepare(config, tmp_path / "out")
    probes = len(made)  # the first image tells the shape, for each split
    assert len(decoded) == 40 - done + probes


def test_several_kills_in_a_row(tmp_path: Path) -> None:
    source = photographs(tmp_path / "set")
    for _ in range(3):
        assert killed("decode_image", 14, 2, source, tmp_path / "out") == -signal.SIGKILL
    config = DataConfig(str(source), image_size=4, on_error="skip", test_fraction=0.3)
    prepare(config, tmp_path / "whole", workers=1)
    prepare(config, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_is_not_mixed_up(tmp_path: Path) -> None:
    source = photographs(tmp_path / "set")
    config = DataConfig(str(source), image_size=4, on_error="skip", test_fraction=0.3)
    assert killed("decode_image", 14, 2, source, tmp_path / "half") == -signal.SIGKILL
    prepare(config, tmp_path / "out")
    before = contents(tmp_path / "out")
    prepare(config, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    for folder in ("half", "out"):
        for change in ({"image_size": 5}, {"limit": 3}, {"split_seed": 2}):
            with pytest.raises(DataError, match="begun with other settings"):
                prepare(replace(config, **change), tmp_path / folder)
        with pytest.raises(DataError, match="begun with other settings: id 'set'"):
            prepare(config, tmp_path / folder, id="mine")
    os.utime(source / "a" / "000.png", ns=(0, 0))
    with pytest.raises(DataError, match="the files of the source have changed"):
        prepare(config, tmp_path / "half")
    write(tmp_path / "full" / "x", b"")
    with pytest.raises(DataError, match="expected a new or an empty folder, found x in it"):
        prepare(config, tmp_path / "full")
    with pytest.raises(DataError, match="expected a folder outside the source"):
        prepare(config, source / "out")
    with pytest.raises(DataError, match="workers: expected at least 1"):
        prepare(config, tmp_path / "out", workers=0)


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    config = DataConfig(str(photographs(tmp_path / "set")), image_size=4)
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "preparing.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is preparing it"):
            prepare(config, tmp_path / "out")
    prepare(config, tmp_path / "out")


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_has_a_rate_and_the_time_left(
    terminal: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    config = DataConfig(str(photographs(tmp_path / "set")), image_size=4)
    prepare(config, tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    prepare(config, tmp_path / "out", progress=True)
    told = capsys.readouterr().err
    assert "preparing" in told
    if not terminal:
        assert "40 of 40" in told
        assert "images/s, 0:00:00 left" in told


# Names


def small_facts() -> Mapping[str, known.KnownSet]:
    shape, images = (3, 4, 4), {"old": 3, "new": 4}
    facts = known.KnownSet(shape, 256, "validation", images, frozenset({"new"}))
    return {"tiny": facts, **known.KNOWN_SETS}


@pytest.mark.parametrize(
    ("id", "held_out", "labelled", "words", "message"),
    [
        ("tiny-old", 3, False, {}, ""),
        ("tiny-new", 4, True, {}, ""),
        ("mine", 4, True, {}, ""),
        ("tiny", 4, True, {}, "expected tiny-old or tiny-new"),
        ("tiny-old", 4, False, {}, "expected 3 stored validation images, found 4"),
        ("tiny-old", 3, True, {}, "expected no labels in train and validation"),
        ("tiny-new", 4, False, {}, "expected labels in train and validation, found labels in none"),
        ("tiny-new", 4, True, {"channels": 1}, r"expected images \(3, 4, 4\), found \(1, 4, 4\)"),
        ("tiny-new", 4, True, {"bits": 5}, "expected 256 levels, found 32"),
        ("tiny-new", 4, True, {"image_size": 4}, "expected images as they are stored"),
        ("tiny-new", 4, True, {"limit": 2}, "expected all of them, without data.limit"),
        ("tiny-new", 4, True, {"on_error": "skip"}, "expected on_error=raise"),
        ("imagenet64-old", 3, False, {}, r"expected images \(3, 64, 64\)"),
    ],
)
def test_a_name_is_held_to_the_facts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    id: str,
    held_out: int,
    labelled: bool,
    words: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(known, "KNOWN_SETS", small_facts())
    for folder, count in (("train", 8), ("valid", held_out)):
        for i in range(count):
            place = tmp_path / folder / ("ab"[i % 2] if labelled else "")
            write(place / f"{i}.png", png(pixels(4, 4, 3, seed=i)))
    config = DataConfig(str(tmp_path / "train"), validation=str(tmp_path / "valid"))
    config = replace(config, **words)
    if message:
        with pytest.raises(DataError, match=message):
            prepare(config, tmp_path / "out", id=id)
        assert not (tmp_path / "out").exists()
        return
    made = prepare(config, tmp_path / "out", id=id)
    assert {dataset.id for dataset in made.values()} == {id}
    assert made["validation"].version == load(config, "validation").version


def test_the_two_imagenets_have_names_of_their_own() -> None:
    names = known.known_names()
    assert set(names) == {"cifar10"} | {
        f"imagenet{n}-{e}" for n in (32, 64) for e in ("old", "new")
    }
    for name, (facts, edition) in names.items():
        assert facts.images[edition] == {"cifar10": 10_000}.get(
            name, 49_999 if edition == "old" else 50_000
        )


# The command line


def test_the_command_and_a_run_that_goes_on_with_the_prepared_set(tmp_path: Path) -> None:
    photographs(tmp_path / "set", 60)
    words = ["data.image_size=8", "data.channels=1"]
    done = cli("prepare", "set", "out", *words, "--workers", 2, cwd=tmp_path)
    assert "read it with data.source=out" in done.stdout
    tiny = [*TINY[:3], "training.warmup_steps=2", "training.batch_size=16"]
    train = ["train", "tarflow-tiny", *tiny, "--out", "run"]
    cli(*train, "data.source=set", *words, "training.steps=4", cwd=tmp_path)
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    cli(*train, "data.source=out", "training.steps=4", cwd=tmp_path)
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before
    results = []
    for source in (["data.source=set", *words], ["data.source=out"]):
        cli("evaluate", "run", *source, "--out", "e.json", cwd=tmp_path)
        results.append(json.loads((tmp_path / "e.json").read_text()))
    for name in ("data", "bits_per_dim", "baselines", "nats_per_image"):
        assert results[0][name] == results[1][name]
    assert "trained on" not in results[0]


def test_evaluation_refuses_another_version_unless_it_is_named(tmp_path: Path) -> None:
    photographs(tmp_path / "set", 60)
    data = ["data.source=set", "data.image_size=8", "data.channels=1"]
    cli("train", "tarflow-tiny", *TINY[:3], *FAST, *data, "--out", "run", cwd=tmp_path)
    cli("evaluate", "run", cwd=tmp_path)
    write(tmp_path / "set" / "a" / "new.png", png(pixels(9, 9, 3)))
    done = cli("evaluate", "run", cwd=tmp_path, fails=True)
    assert "was trained on set, version files-" in done.stderr
    assert "Traceback" not in done.stderr
    done = cli("evaluate", "run", *data, "--out", "e.json", cwd=tmp_path)
    assert "trained on" in done.stdout
    assert json.loads((tmp_path / "e.json").read_text())["trained on"].startswith("set, version")


@pytest.mark.parametrize("word", ["data.source=x", "data.flip=true", "data.translate=2"])
def test_words_of_training_are_refused(tmp_path: Path, word: str) -> None:
    with pytest.raises(ValueError, match=r"expected no data\.source|is a word of training"):
        command.run(Prepare(source="digits", out=tmp_path / "out", settings=(word,)))
    assert not (tmp_path / "out").exists()


# Tar shards


def tar(file: Path, members: Mapping[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def samples(images: np.ndarray, first: int = 0, **labels: Any) -> dict[str, bytes]:
    """Members x/000.png, x/000.cls and so on."""
    members: dict[str, bytes] = {}
    for i, image in enumerate(images):
        members[f"x/{first + i:03}.png"] = png(image)
        for ending, values in labels.items():
            members[f"x/{first + i:03}.{ending}"] = str(values[i]).encode()
    return members


@pytest.mark.parametrize(
    "labels",
    [
        {"cls": [0, 2, 1, 0, 1, 2], "txt": ["a dog\non grass"] * 6},
        {"txt": [0, 2, 1, 0, 1, 2]},
        {"json": ["0", "2", "1", "0", "1", "2"]},
        {"json": [f'{{"label": {i}, "url": "x"}}' for i in (0, 2, 1, 0, 1, 2)]},
    ],
)
def test_shards_read_what_is_stored(tmp_path: Path, labels: dict[str, Any]) -> None:
    images, folder = pixels(6, 4, 5, 3), tmp_path / "set"
    tar(folder / "b.tar", samples(images[4:], **{k: v[4:] for k, v in labels.items()}))
    tar(folder / "a.tar", samples(images[:4], **labels))
    dataset = whole(folder)
    np.testing.assert_array_equal(dataset.images, images.transpose(0, 3, 1, 2))
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 2, 1, 0, 1, 2]
    assert dataset.class_names == ("0", "1", "2")
    np.testing.assert_array_equal(whole(folder / "a.tar").images, dataset.images[:4])
    config = DataConfig(str(folder), test_fraction=0.3)
    for split, prepared in prepare(config, tmp_path / "out").items():
        identical(prepared, load(config, split))


def test_class_names_and_no_labels(tmp_path: Path) -> None:
    images = pixels(4, 4, 4)
    tar(tmp_path / "set" / "train-0.tar", samples(images, txt=["dog", "cat", "dog", "eel"]))
    tar(tmp_path / "set" / "val-0.tar", samples(images[:2], txt=["eel", "cat"]))
    config = DataConfig(str(tmp_path / "set"), test_fraction=0.0)
    train, validation = (load(config, split) for split in SPLITS[:2])
    assert train.class_names == ("cat", "dog", "eel")
    assert train.labels is not None
    assert validation.labels is not None
    assert (train.labels.tolist(), validation.labels.tolist()) == ([1, 0, 1, 2], [2, 0])
    tar(tmp_path / "set" / "val-0.tar", samples(images[:2], txt=["eel", "bat"]))
    with pytest.raises(DataError, match="classes of the training split, found also bat"):
        load(config, "validation")
    bare = whole(tar(tmp_path / "bare.tar", samples(images, json=['{"url": "x"}'] * 4)))
    assert (bare.labels, bare.class_names) == (None, ())


def test_folders_of_shards_are_splits(tmp_path: Path) -> None:
    images = pixels(5, 4, 4)
    tar(tmp_path / "train" / "0.tar", samples(images[:3]))
    tar(tmp_path / "val" / "0.tar", samples(images[3:]))
    config = DataConfig(str(tmp_path), test_fraction=0.0)
    assert [len(load(config, split)) for split in SPLITS[:2]] == [3, 2]
    (tmp_path / "extra").mkdir()
    with pytest.raises(DataError, match="split folders of tar files only, found extra"):
        load(config, "train")
    (tmp_path / "extra").rmdir()
    tar(tmp_path / "0.tar", samples(images))
    with pytest.raises(DataError, match="found also loose tar files"):
        load(config, "train")


def test_versions_differ_where_contents_do(tmp_path: Path) -> None:
    image = pixels(1, 4, 4)
    one = whole(tar(tmp_path / "a" / "x.tar", samples(image, cls=[0])))
    other = whole(tar(tmp_path / "b" / "x.tar", samples(image, cls=[1])))
    copy = whole(tar(tmp_path / "c" / "x.tar", samples(image, cls=[0])))
    assert one.version == copy.version != other.version


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"", "b.png": b"", "a.cls": b"1"}, r"x\.tar\[a\.cls\]: .*a in two places"),
        ({"a.txt": b"1"}, r"x\.tar\[a\.txt\]: expected one image in the sample, found none"),
        ({"a.png": b"", "a.jpg": b""}, r"one image in the sample, found a\.png, a\.jpg"),
        ({"a.png": b"", "a.PNG": b""}, r"\[a\.PNG\]: expected each file of a sample once"),
        ({"a.png": b"", "a.cls": b"1", "b.png": b""}, r"\[b\.png\]: expected a label like"),
        ({"a.png": b"", "a.cls": b"1", "b.png": b"", "b.cls": b"x"}, "found 'x'"),
        ({"a.png": b"", "a.txt": b"a\nb"}, r"\[a\.txt\]: expected an integer or a class name"),
        ({"a.png": b"", "a.json": b"{"}, r"\[a\.json\]: expected a class label"),
        ({"a.png": b"", "a.cls": b"\xff"}, r"\[a\.cls\]: expected a class label"),
        ({"a.png": b"", "a.cls": b"-2"}, "labels from 0 upwards, found -2"),
        ({"a.png": b"no image"}, r"x\.tar\[a\.png\]: expected a complete image"),
        ({}, "expected images for the train split, found none"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        whole(tar(tmp_path / "x.tar", members))


def test_broken_shards_are_named(tmp_path: Path) -> None:
    file = tar(tmp_path / "x.tar", samples(pixels(3, 40, 40)))
    content = file.read_bytes()
    with tarfile.open(file) as archive:
        second, third = archive.getmembers()[1:]
    end = third.offset_data + -(-third.size // 512) * 512
    damaged = bytearray(content)
    damaged[third.offset + 150] ^= 1  # in the checksum
    for broken, message in [
        (content[:-1], ""),
        (content[: third.offset_data + 100], "after x/002.png: unexpected end of data"),
        (content[: third.offset + 100], "after x/001.png: the end of the file"),
        (content[: third.offset], "after x/001.png: the end of the file"),
        (content[: second.offset_data + 10], "after x/001.png: unexpected end of data"),
        (content[:end], "after x/002.png: the end of the file"),
        (bytes(damaged), "after x/001.png: neither a header nor the end"),
        (content + content, "after x/002.png: neither a header nor the end"),
        (b"no archive", "after its beginning"),
        (b"", "after its beginning"),
        (b"\x1f\x8b" + bytes(1000), "after its beginning"),
    ]:
        write(file, broken)
        if message:
            with pytest.raises(DataError, match=f"x.tar: expected a whole tar file, .*{message}"):
                whole(file)
        else:
            assert len(whole(file)) == 3  # its padding only


def test_links_are_refused_and_other_files_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = pixels(2, 4, 4)
    file = tar(tmp_path / "x.tar", samples(images, npy=["1", "2"]))
    with caplog.at_level(logging.WARNING):
        assert len(whole(file)) == 2
    assert "{'npy': 2}" in caplog.text
    with tarfile.open(file, "a") as archive:
        link = tarfile.TarInfo("x/009.png")
        link.type, link.linkname = tarfile.SYMTYPE, "x/000.png"
        archive.addfile(link)
    with pytest.raises(DataError, match=r"\[x/009\.png\]: expected a plain file"):
        whole(file)


def test_unreadable_members_are_skipped_and_listed(tmp_path: Path) -> None:
    members = samples(pixels(4, 4, 4), cls=[0, 1, 0, 1])
    file = tar(tmp_path / "x.tar", {**members, "x/002.png": b"no image"})
    dataset = whole(file, on_error="skip")
    assert dataset.skipped == (f"{file}[x/002.png]",)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1, 1]


def test_kinds_are_not_mixed(tmp_path: Path) -> None:
    tar(tmp_path / "x.tar", samples(pixels(2, 4, 4)))
    write(tmp_path / "loose.png", png(pixels(4, 4)))
    with pytest.raises(DataError, match=r"tar files only, found also the image loose\.png"):
        whole(tmp_path)
    (tmp_path / "loose.png").unlink()
    write(tmp_path / "x.parquet", b"")
    with pytest.raises(DataError, match="parquet files only, found also tar files"):
        whole(tmp_path)


def test_jpegs_of_a_shard_are_those_of_a_folder(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i, image in enumerate(pixels(4, 32, 48, 3)):
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "jpeg")
        members[f"n0{i % 2}_{i}.JPEG"] = stream.getvalue()
        write(tmp_path / "folder" / f"{i}.jpeg", stream.getvalue())
    shard = whole(tar(tmp_path / "x.tar", members), image_size=8)
    folder = whole(tmp_path / "folder", image_size=8)
    assert torch.equal(torch.tensor(shard.images), torch.tensor(folder.images))
    assert shard.fingerprint == folder.fingerprint
