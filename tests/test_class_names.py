"""A label means the same class wherever it is read, recorded or given."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from exactflow.data import DataConfig, DataError, Split, load

pa = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (4, 4), value).save(stream, "png")
    return stream.getvalue()


def write_parquet(
    file: Path,
    labels: Any,
    names: Sequence[str] = (),
    /,
    *,
    column: str = "label",
    values: Sequence[int] | None = None,
    **others: Any,
) -> None:
    """Images of the given grey values, by default their rows, and a column of labels."""
    import pyarrow.parquet

    array = labels if isinstance(labels, pa.Array) else pa.array(labels)
    images = [{"bytes": png(v), "path": None} for v in values or range(len(array))]
    table = pa.table({"image": images, column: array, **others})
    if names:
        feature = {"names": list(names), "_type": "ClassLabel"}
        info = json.dumps({"info": {"features": {column: feature}}})
        table = table.replace_schema_metadata({"huggingface": info})
    pyarrow.parquet.write_table(table, file)


def write_hub(file: Path, labels: Sequence[Any], names: Sequence[str] = ()) -> None:
    """The same as one split of a table that `datasets` saved."""
    kind = datasets.ClassLabel(names=list(names)) if names else None
    images = [Image.new("L", (4, 4), row) for row in range(len(labels))]
    table = datasets.Dataset.from_dict({"image": images, "label": list(labels)})
    table = table.cast_column("image", datasets.Image())
    table = table if kind is None else table.cast_column("label", kind)
    table.save_to_disk(str(file))


def classes(config: DataConfig, split: Split = "train") -> list[str]:
    """The class name of every image of a split, in the order of its grey values."""
    read = load(config, split)
    assert read.labels is not None
    order = np.argsort(np.asarray(read.images)[:, 0, 0, 0])
    return [read.class_names[label] for label in np.asarray(read.labels)[order]]


def whole(folder: Path) -> DataConfig:
    return DataConfig(str(folder), validation_fraction=0, test_fraction=0)


def test_each_parquet_file_is_read_by_its_own_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 1], ["cat", "dog"], values=[0, 1])
    write_parquet(tmp_path / "train-1.parquet", [0, 1], ["dog", "cat"], values=[2, 3])
    write_parquet(tmp_path / "test-0.parquet", [0, 0, 1], ["dog", "cat"])
    assert classes(whole(tmp_path)) == ["cat", "dog", "dog", "cat"]
    assert classes(whole(tmp_path), "test") == ["dog", "dog", "cat"]
    assert load(whole(tmp_path), "test").class_names == ("cat", "dog")


def test_each_hub_split_is_read_by_its_own_names(tmp_path: Path) -> None:
    for split, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        write_hub(tmp_path / split, [0, 0, 1], names)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    config = DataConfig(f"hub:{tmp_path}", validation_fraction=0)
    assert classes(config) == ["cat", "cat", "dog"]
    assert classes(config, "test") == ["dog", "dog", "cat"]


def test_a_class_that_training_has_not_is_refused_with_its_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [0, 1], ["cat", "dog"])
    write_parquet(tmp_path / "test.parquet", [1, 0], ["cat", "bird"])
    with pytest.raises(
        DataError, match=r"test\.parquet: expected .*found also bird; they are cat, dog"
    ):
        load(whole(tmp_path), "test")
    write_parquet(tmp_path / "test.parquet", [0, 0], ["cat", "bird"])  # named, and never used
    assert classes(whole(tmp_path), "test") == ["cat", "cat"]
    write_parquet(tmp_path / "test.parquet", [1, 0])  # no names: numbers of the classes
    assert classes(whole(tmp_path), "test") == ["dog", "cat"]
    write_parquet(tmp_path / "test.parquet", [0, 2])
    with pytest.raises(DataError, match=r"test\.parquet: expected labels 0 \.\. 1, found 2"):
        load(whole(tmp_path), "test")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["dog", "cat", "dog"], ["dog", "cat", "dog"]),
        ([True, False, True], ["true", "false", "true"]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ["b", "a", "b"]),
        (pa.array(["b", "a", "b"], pa.large_string()), ["b", "a", "b"]),
        (pa.array([3, 0, 3], pa.uint8()), ["3", "0", "3"]),
        (pa.array([3, 0, 3]).dictionary_encode(), ["3", "0", "3"]),
    ],
    ids=str,
)
def test_strings_and_booleans_name_classes(tmp_path: Path, labels: Any, names: list[str]) -> None:
    write_parquet(tmp_path / "train.parquet", labels)
    write_parquet(tmp_path / "test.parquet", labels[1:])
    assert classes(whole(tmp_path)) == names
    assert classes(whole(tmp_path), "test") == names[1:]
    if isinstance(labels, list):
        write_hub(tmp_path / "hub", labels)
        found = classes(
            DataConfig(f"hub:{tmp_path / 'hub'}", validation_fraction=0, test_fraction=0)
        )
        assert found == names


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([0.0, 1.7], "label, found double"),
        ([[0], [1]], "label, found list<.*int64>"),
        ([{"a": 1}, {"a": 2}], "label, found struct<a: int64>"),
        ([None, None], "label, found null"),
        (["a" * 65, "b"], "found 'aaa"),
        (["", "b"], "found ''"),
    ],
    ids=str,
)
def test_other_labels_are_one_error(tmp_path: Path, labels: list[Any], found: str) -> None:
    write_parquet(tmp_path / "train.parquet", labels)
    with pytest.raises(DataError, match=f"train.parquet: expected .*{found}"):
        load(whole(tmp_path), "train")
    if isinstance(labels[0], float | list | dict):
        write_hub(tmp_path / "hub", labels)
        with pytest.raises(DataError, match=f"hub:.*: expected .*{found}".replace("64>", "64.*>")):
            load(DataConfig(f"hub:{tmp_path / 'hub'}"), "train")


def test_files_of_a_set_have_labels_of_one_kind(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [0, 1])
    write_parquet(tmp_path / "test.parquet", [1.7, 0.2])
    with pytest.raises(DataError, match=r"test\.parquet: expected .* label, found double"):
        load(whole(tmp_path), "train")
    write_parquet(tmp_path / "test.parquet", ["0", "1"])
    with pytest.raises(DataError, match=r"test\.parquet: expected .*train\.parquet, found names"):
        load(whole(tmp_path), "train")


def test_columns_of_labels_that_are_left_out_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "train.parquet"
    write_parquet(file, [4, 5], column="fine_label")
    with caplog.at_level(logging.WARNING):
        assert load(whole(tmp_path), "train").labels is None
    assert "left out the columns fine_label; labels are read from a column called" in caplog.text
    caplog.clear()
    masks = [{"bytes": png(0)}] * 2
    write_parquet(file, [1, 0], label_text=["dog", "cat"], labels=masks)
    with caplog.at_level(logging.WARNING):
        assert classes(whole(tmp_path)) == ["1", "0"]
    assert "left out the columns label_text, labels; labels are read from label" in caplog.text
    write_parquet(file, [1, 0], labels=[0, 0])
    with pytest.raises(DataError, match="expected one label column, found label, labels"):
        load(whole(tmp_path), "train")


def tar_labels(folder: Path, values: Sequence[Any]) -> None:
    import tarfile

    with tarfile.open(folder / "train.tar", "w") as archive:
        for row, value in enumerate(values):
            for ending, content in (("png", png(row)), ("cls", str(value).encode())):
                info = tarfile.TarInfo(f"{row:03}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def batch_labels(folder: Path, values: Sequence[Any]) -> None:
    count = len(values)
    pixels = np.zeros((count, 48), np.uint8)
    np.savez(folder / "train_data_batch_1.npz", data=pixels, labels=np.array(values, np.uint64))


def parquet_labels(folder: Path, values: Sequence[Any]) -> None:
    write_parquet(folder / "train-0.parquet", [0])
    write_parquet(folder / "train-1.parquet", pa.array(values, pa.uint64()))


def hub_labels(folder: Path, values: Sequence[Any]) -> None:
    images = [{"bytes": png(row), "path": None} for row in range(len(values))]
    columns = pa.table({"image": images, "label": pa.array(values, pa.uint64())})
    table = datasets.Dataset(columns).cast_column("image", datasets.Image())
    table.save_to_disk(str(folder))


Writer = Callable[[Path, Sequence[Any]], None]


@pytest.mark.parametrize("value", [10**9, 2**63 - 1, 2**63, 70_000])
@pytest.mark.parametrize(
    ("write", "place"),
    [
        (tar_labels, r"train\.tar\[001\."),
        (batch_labels, r"train_data_batch_1\.npz"),
        (parquet_labels, r"train-1\.parquet\[row 1\]"),
        (hub_labels, r"hub:.*\[row 1\]"),
    ],
)
def test_labels_far_beyond_the_number_of_images_are_refused(
    tmp_path: Path, write: Writer, place: str, value: int
) -> None:
    write(tmp_path, [1, value, 2])
    source = f"hub:{tmp_path}" if write is hub_labels else str(tmp_path)
    with pytest.raises(DataError, match=rf"{place}.*{value}"):
        load(DataConfig(source), "train")
    (tmp_path / "few").mkdir()
    write(tmp_path / "few", [1, 999, 2])  # of ImageNet, say
    source = source.replace(str(tmp_path), str(tmp_path / "few"))
    assert (
        load(DataConfig(source, test_fraction=0, validation_fraction=0), "train").num_classes >= 999
    )
