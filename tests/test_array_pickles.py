"""Pickles that would grow in memory are measured before anything is made."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exactflow.data import DataError, files
from exactflow.data.formats import array_pickles
from test_batch_files import LABELS, Malice, rows
from test_data import whole, write

NAME = "train_data_batch_1"
RECONSTRUCT = np.ndarray((0,)).__reduce__()[0]


def refused(tmp_path: Path, content: bytes, message: str, name: str = NAME) -> None:
    with pytest.raises(DataError, match=rf"{name}: {message}"):
        whole(write(tmp_path / name, content))


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        (bytes, (10**10,), "expected a whole batch file, found: TypeError"),
        (np.ndarray, ((10**6, 10**6), "u1", b"1", 0, (0, 0)), "expected a whole batch file"),
        (RECONSTRUCT, (np.ndarray, (10**10,), b"b"), "expected .*without values"),
        (RECONSTRUCT, (np.ndarray, (10**3, 10**7), b"b"), "expected .*without values"),
    ],
)
def test_no_call_makes_values_that_the_file_does_not_hold(
    tmp_path: Path, call: Any, arguments: Any, message: str
) -> None:
    refused(tmp_path, pickle.dumps({"data": Malice(call, *arguments), "labels": [1]}, 2), message)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([[1] * 10**4] * 10**4, "expected .*more than [0-9]* numbers in a file of"),
        ([[[1]]], "expected .*a list in place of a number"),
        (["1" * 48], "expected .*a str in place of a number"),
        ("1" * 48, "expected .*a str in place of an array"),
    ],
)
def test_lists_hold_as_many_numbers_as_the_file_has_bytes(
    tmp_path: Path, data: Any, message: str
) -> None:
    refused(tmp_path, pickle.dumps({"data": data, "labels": [1]}, 2), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02" + b"]" * 3000, "expected .*more than 104[0-9] operations"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "expected .*memory for 2147483647 values after 2 oper"),
        (b"}p2147483647\n.", "expected .*memory for 2147483647 values"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.", "expected .*no end"),
        (b"\x80\x02\xff.", "expected .*operation.*xff"),
        (b"cnumpy\ndtype", "expected .*no end"),
    ],
    ids=["lists", "memory", "old memory", "length", "operation", "cut"],
)
def test_operations_are_counted_before_they_are_run(
    tmp_path: Path, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_pickles, "_MOST_OPERATIONS", 1000)
    monkeypatch.setattr(array_pickles, "_ArraysOnly", None)
    refused(tmp_path, content, message)


def test_archives_do_not_grow_a_hundred_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_SMALL", 10**5)
    file = tmp_path / f"{NAME}.npz"
    np.savez_compressed(file, data=np.zeros((2000, 192), np.uint8), labels=np.ones(2000, int))
    with pytest.raises(DataError, match=r"npz: expected a compressed file that grows 100 times"):
        whole(file)
    np.savez(file, data=np.zeros((2000, 192), np.uint8), labels=np.ones(2000, int))
    assert len(whole(file)) == 2000


@pytest.mark.parametrize("suffix", ["", ".npz"])
def test_pipes_and_devices_are_refused(tmp_path: Path, suffix: str) -> None:
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        make(tmp_path / f"{NAME}{suffix}")
        with pytest.raises(DataError, match="a pipe, a socket or a device in place of a file"):
            whole(tmp_path)
        (tmp_path / f"{NAME}{suffix}").unlink()


def test_small_files_are_what_they_were(tmp_path: Path) -> None:
    fields = {"data": rows(7), "labels": LABELS, "mean": np.zeros(48), "none": b""}
    for protocol in range(6):
        file = write(tmp_path / NAME, pickle.dumps(fields, protocol))
        np.testing.assert_array_equal(whole(file).images.reshape(7, -1), rows(7))
