"""Laws of image-net.org's batch files: every published form is read, and no code is run."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exactflow.data import DataConfig, DataError, known, load, prepare
from exactflow.data.formats import batch_files
from test_data import pixels, whole, write
from test_prepare import small_facts

SIDE = 4
LABELS = [3, 1, 2, 3, 1, 1, 2]


def rows(count: int, seed: int = 0) -> np.ndarray:
    """Images as rows of the files: the red plane, then the green, then the blue."""
    return pixels(count, 3 * SIDE * SIDE, seed=seed)


def python2(data: np.ndarray, labels: list[int]) -> bytes:
    """The pickle that Python 2 writes of such a dict, in which strings are bytes."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = (
        b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN"
    ) + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b")
    content = data.tobytes()
    array += b"\x87R(K\x01" + number(data.shape[0]) + number(data.shape[1]) + b"\x86" + dtype
    array += b"\x89T" + struct.pack("<I", len(content)) + content + b"tb"
    listed = b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + listed + b"u."


def content_of(kind: str, data: np.ndarray, labels: list[int]) -> bytes:
    fields = {"data": data, "labels": labels, "mean": data.mean(0)}
    if kind == "python 2":
        return python2(data, labels)
    if kind == "bytes keys":
        return pickle.dumps({key.encode(): value for key, value in fields.items()}, 2)
    if kind == "lists":
        return pickle.dumps({"data": data.tolist(), "labels": labels}, 2)
    if kind == "arrays":
        scalars = list(np.array(labels))  # of NumPy's own kind
        return pickle.dumps({**fields, "labels": scalars}, 4)
    return pickle.dumps(fields, int(kind))


KINDS = ["python 2", "bytes keys", "lists", "arrays", "0", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_pickle_is_read(tmp_path: Path, kind: str) -> None:
    for number in (1, 2, 10, 3, 4, 5, 6, 7, 8, 9):  # 10 comes last
        content = content_of(kind, rows(7, number), LABELS)
        write(tmp_path / f"train_data_batch_{number}", content)
    write(tmp_path / "val_data", content_of(kind, rows(2, 11), [2, 3]))
    dataset = whole(tmp_path)
    expected = np.concatenate([rows(7, number) for number in range(1, 11)])
    np.testing.assert_array_equal(dataset.images, expected.reshape(-1, 3, SIDE, SIDE))
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [label - 1 for label in LABELS] * 10
    assert dataset.class_names == ("1", "2", "3")
    validation = load(DataConfig(str(tmp_path), test_fraction=0.0), "validation")
    np.testing.assert_array_equal(validation.images, rows(2, 11).reshape(-1, 3, SIDE, SIDE))
    assert validation.labels is not None
    assert validation.labels.tolist() == [1, 2]


def test_archives_are_read_like_pickles(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path / "p" / f"train_data_batch_{number}", python2(rows(7, number), LABELS))
        file = tmp_path / "z" / f"train_data_batch_{number}.npz"
        file.parent.mkdir(exist_ok=True)
        data = rows(7, number)
        np.savez_compressed(file, data=data, labels=np.array(LABELS), mean=data.mean(0))
    pickled, archived = whole(tmp_path / "p"), whole(tmp_path / "z")
    assert pickled.fingerprint == archived.fingerprint
    one = whole(tmp_path / "z" / "train_data_batch_2.npz")
    np.testing.assert_array_equal(one.images, archived.images[7:])
    words = {"validation": str(tmp_path / "z" / "train_data_batch_2.npz"), "test_fraction": 0.0}
    config = DataConfig(str(tmp_path / "p" / "train_data_batch_1"), **words)
    np.testing.assert_array_equal(load(config, "validation").images, one.images)
    for split, dataset in prepare(config, tmp_path / "out").items():
        np.testing.assert_array_equal(dataset.images, load(config, split).images)
    with pytest.raises(DataError, match="which would be trained on"):
        load(DataConfig(str(tmp_path / "p"), validation=str(tmp_path / "p" / "x")), "train")


def test_they_are_the_new_imagenet_and_not_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "KNOWN_SETS", small_facts())
    write(tmp_path / "set" / "train_data_batch_1", python2(rows(7), LABELS))
    config = DataConfig(str(tmp_path / "set"), test_fraction=0.0)
    write(tmp_path / "set" / "val_data", python2(rows(3), [1, 2, 3]))  # as many as the old one has
    with pytest.raises(DataError, match="id tiny-old: expected no labels in train and validation"):
        prepare(config, tmp_path / "out", id="tiny-old")
    write(tmp_path / "set" / "val_data", python2(rows(4), [1, 2, 3, 1]))
    made = prepare(config, tmp_path / "out", id="tiny-new")
    assert [dataset.id for dataset in made.values()] == ["tiny-new"] * 2


class Malice:
    """An object whose pickle runs code when it is read."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


@pytest.mark.parametrize(
    ("call", "arguments", "name"),
    [
        (os.mkdir, ("done",), "mkdir"),
        (eval, ("1",), "eval"),
        (getattr, (1, "real"), "getattr"),
        (np.load, ("x",), "load"),
    ],
)
def test_a_pickle_runs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any, arguments: Any, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    fields = {"data": rows(7), "labels": LABELS, "mean": Malice(call, *arguments)}
    file = write(tmp_path / "train_data_batch_1", pickle.dumps(fields, 2))
    with pytest.raises(DataError, match=rf"train_data_batch_1: .*\.{name}, which no array needs"):
        whole(file)
    assert [child.name for child in tmp_path.iterdir()] == [file.name]


def test_a_text_in_disguise_is_refused(tmp_path: Path) -> None:
    content = pickle.dumps({"data": rows(2), "labels": [1, 2]}, 2)
    assert b"latin1" in content
    file = write(tmp_path / "train_data_batch_1", content.replace(b"latin1", b"rot_13"))
    with pytest.raises(DataError, match="text in the encoding"):
        whole(file)


def test_archives_of_objects_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "train_data_batch_1.npz"
    np.savez(file, data=np.array([{}], dtype=object), labels=np.array([1]))
    with pytest.raises(DataError, match=r"train_data_batch_1\.npz: expected a whole batch file"):
        whole(file)


@pytest.mark.parametrize("suffix", ["", ".npz"])
def test_cut_files_are_named(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"train_data_batch_1{suffix}"
    if suffix:
        np.savez(file, data=rows(7), labels=np.array(LABELS))
    else:
        write(file, python2(rows(7), LABELS))
    content = file.read_bytes()
    for length in (0, 1, 30, len(content) // 2, len(content) - 1):
        write(file, content[:length])
        with pytest.raises(DataError, match=f"{file}: expected a whole batch file"):
            whole(file)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": rows(2)}, "expected a whole batch file, found: KeyError"),
        ([1, 2], "expected a whole batch file, found: .*a list in place of a dict"),
        ({"data": rows(2), "labels": [1]}, r"expected 2 labels, found \(1,\)"),
        ({"data": rows(2), "labels": [0, 1]}, "expected labels from 1 on, found 0 to 1"),
        (
            {"data": rows(2), "labels": [1.0, 2.0]},
            "expected whole numbers as labels, found values",
        ),
        ({"data": rows(2).astype(np.int64) * 2, "labels": [1, 2]}, "expected data from 0 to 255"),
        (
            {"data": rows(2) / 255, "labels": [1, 2]},
            "expected whole numbers as data, found values",
        ),
        (
            {"data": rows(2)[:, :-1], "labels": [1, 2]},
            r"expected data .*, found \(2, 47\)",
        ),
        ({"data": rows(2).reshape(2, 3, 4, 4), "labels": [1, 2]}, r"expected data \(N, 3 S S\)"),
        ({"data": rows(0), "labels": []}, "expected whole numbers as data, found none"),
    ],
)
def test_other_contents_are_named(tmp_path: Path, fields: Any, message: str) -> None:
    file = write(tmp_path / "train_data_batch_1", pickle.dumps(fields, 2))
    with pytest.raises(DataError, match=rf"{file}: {message}"):
        whole(file)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train_data_batch_1", "train_data_batch_3"), "to 3, found no number 2"),
        (("train_data_batch_2",), "to 2, found no number 1"),
        (("train_data_batch_1", "train_data_batch_1.npz"), "expected each batch once"),
        (("train_data_batch_1", "train_data_batch_2.npz"), "found both"),
        (("train_data_batch_1", "val_data", "val_data.npz"), "expected val_data once"),
        (("train_data_batch_1", "stray.txt"), "stray.txt: expected train_data_batch_1, "),
    ],
)
def test_folders_are_whole(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    for name in names:
        write(tmp_path / name, python2(rows(2), [1, 2]))
    with pytest.raises(DataError, match=message):
        whole(tmp_path)


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "train_data_batch_1", python2(rows(7), LABELS))
    records = batch_files.open_batch_files(tmp_path).splits["train"].records
    assert records.name(3) == f"{file}[row 3]"
    write(file, python2(rows(2), [1, 2]))
    with pytest.raises(DataError, match=f"{file}: expected 7 images, found 2"):
        list(records.read(np.arange(7)))
