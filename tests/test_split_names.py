"""Names that say a split are read by one rule or refused, never guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from exactflow.data import DataConfig, DataError, Split, load
from exactflow.data.splits import named_split
from exactflow.data.streaming.indexing import index_shards
from test_data import SPLITS, idx, pixels, png, whole, write, write_classes, write_parquet
from test_prepare import samples, tar

IMAGES = pixels(9, 4, 4)
PARTS = {"train": IMAGES[:5], "validation": IMAGES[5:7], "test": IMAGES[7:]}

# Names of splits in use: training, validation, test.
NAMES = {
    "first": ("train-0", "val-0", "test-0"),
    "last": ("photos-train-0000", "photos-validation-00", "photos-eval-0"),
    "digits": ("train2017", "val2017", "test2017"),
    "underscores": ("my_train_000", "my_dev_000", "my_test_000"),
    "capitals": ("TrainImages", "ValidImages", "TestImages"),
    "loud": ("TRAINING", "VALIDATION", "TESTING"),
    "sizes": ("train_64x64", "valid_64x64", "test_64x64"),
    "sets": ("trainset", "devset", "testset"),
}


def write_folder(place: Path, images: np.ndarray) -> None:
    for i, image in enumerate(images):
        write(place / f"{i}.png", png(image))


def write_tar(place: Path, images: np.ndarray) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    tar(place.with_name(place.name + ".tar"), samples(images))


def write_deep_tar(place: Path, images: np.ndarray) -> None:
    tar(place / "0.tar", samples(images))


def write_table(place: Path, images: np.ndarray) -> None:
    write_parquet(place.with_name(place.name + ".parquet"), [png(i) for i in images], None)


def write_numbers(place: Path, images: np.ndarray) -> None:
    write(place.with_name(f"{place.name}-images-idx3-ubyte"), idx(images))


WRITERS: dict[str, Callable[[Path, np.ndarray], None]] = {
    "folders": write_folder,
    "tar files": write_tar,
    "folders of tar files": write_deep_tar,
    "parquet": write_table,
    "IDX": write_numbers,
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_every_source_reads_what_names_say(
    tmp_path: Path, kind: str, names: tuple[str, ...]
) -> None:
    for name, images in zip(names, PARTS.values(), strict=True):
        WRITERS[kind](tmp_path / name, images)
    for split in SPLITS:
        np.testing.assert_array_equal(
            load(DataConfig(str(tmp_path)), split).images[:, 0], PARTS[split]
        )


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("photos-train-0", "other"), "other|no name"),
        (("a-train", "b-training"), "one word for the train split, found train and training"),
        (("train_0", "train_test"), "one split at most, found train and test"),
    ],
)
def test_what_is_not_clear_is_refused(
    tmp_path: Path, kind: str, names: tuple[str, ...], message: str
) -> None:
    if kind == "folders of tar files" and names[1] == "other":
        message = "split folders of tar files only, found other"
    for name, images in zip(names, PARTS.values(), strict=False):
        WRITERS[kind](tmp_path / name, images)
    with pytest.raises(DataError, match=message):
        whole(tmp_path)


@pytest.mark.parametrize("kind", ["tar files", "parquet"])
def test_files_of_another_split_are_for_validation_only(tmp_path: Path, kind: str) -> None:
    for i, name in enumerate(("a-val-0", "a-val-1")):
        WRITERS[kind](tmp_path / "held" / name, IMAGES[i : i + 1])
    with pytest.raises(DataError, match="files of the training split too, found validation only"):
        whole(tmp_path / "held")
    WRITERS[kind](tmp_path / "all" / "a-0", IMAGES[2:])
    config = DataConfig(str(tmp_path / "all"), validation=str(tmp_path / "held"), test_fraction=0)
    assert [len(load(config, split)) for split in SPLITS[:2]] == [7, 2]


def test_streamed_shards_are_split_like_those_here(tmp_path: Path) -> None:
    for name, images in zip(NAMES["last"], PARTS.values(), strict=True):
        write_tar(tmp_path / "set" / name, images)
    source = f"file://{tmp_path}/set/{{{','.join(NAMES['last'])}}}.tar"
    index_shards(source, cache_dir=str(tmp_path / "cache"))
    for split in SPLITS:
        found = load(DataConfig(source, cache_dir=str(tmp_path / "cache")), split)
        np.testing.assert_array_equal(found.images[:][:, 0], PARTS[split])


def test_hub_splits_are_named_by_the_same_words(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    def save(place: str, *names: str) -> str:
        tables = {
            name: datasets.Dataset.from_dict(
                {"image": [{"bytes": png(i), "path": None} for i in images]},
                features=datasets.Features({"image": datasets.Image()}),
            )
            for name, images in zip(names, PARTS.values(), strict=False)
        }
        datasets.DatasetDict(tables).save_to_disk(str(tmp_path / place))
        return f"hub:{tmp_path / place}"

    near = save("near", "train_0", "dev_0", "test_0")
    for split in SPLITS:
        np.testing.assert_array_equal(load(DataConfig(near), split).images[:, 0], PARTS[split])
    # A split called train is the training split, whatever other splits there are.
    plain = save("plain", "train", "train_small")
    np.testing.assert_array_equal(whole(plain).images[:, 0], PARTS["train"])
    with pytest.raises(DataError, match="expected one train split, found train_a and train_b"):
        whole(save("two", "train_a", "train_b"))


def test_images_that_say_several_splits_are_not_one_set(tmp_path: Path) -> None:
    write_folder(tmp_path / "flat", IMAGES[:2])
    for name in ("train_0.png", "test_0.png"):
        write(tmp_path / "mixed" / name, png(IMAGES[0]))
    with pytest.raises(DataError, match=r"test_0.png \(test\) and train_0.png \(train\)"):
        whole(tmp_path / "mixed")
    inside = {f"{name}/0.png": png(IMAGES[0]) for name in ("train", "val")}
    with pytest.raises(DataError, match=r"train/0.png \(train\) and val/0.png \(validation\)"):
        whole(tar(tmp_path / "one.tar", inside))
    write(tmp_path / "flat" / "test.png", png(IMAGES[0]))  # a picture of a test
    assert len(whole(tmp_path / "flat")) == 3


def test_classes_may_have_such_words_inside_a_split_folder(tmp_path: Path) -> None:
    write_classes(tmp_path / "train" / "cat", IMAGES[:2])
    write_classes(tmp_path / "train" / "bullet_train", IMAGES[2:4])
    assert whole(tmp_path).class_names == ("bullet_train", "cat")
    (tmp_path / "train").rename(tmp_path / "classes")
    with pytest.raises(DataError, match="go into the folder of their split"):
        whole(tmp_path / "classes")


def test_other_words_say_nothing() -> None:
    for name in (
        "latest",
        "trainer",
        "devanagari",
        "contest-0",
        "strain_1",
        "evaluating",
        "trains",
    ):
        assert named_split(name) is None
    expected: dict[str, Split] = {"x.train.0": "train", "ILSVRC2012_val_01": "validation"}
    for name, split in expected.items():
        assert named_split(name) == split


def test_labels_of_another_kind_are_not_left_out(tmp_path: Path) -> None:
    write_numbers(tmp_path / "qmnist-train", IMAGES)
    write(tmp_path / "qmnist-train-labels-idx2-int", b"")
    with pytest.raises(
        DataError, match="idx2-int: expected the labels of qmnist-train-images-idx3"
    ):
        whole(tmp_path)
