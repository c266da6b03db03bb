"""Folders of images: each file is read once, none is left out, errors name the cause."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exactflow.data import DataConfig, DataError, load, prepare
from exactflow.data.formats import folders as folders_module
from test_data import idx, pixels, png, whole, write, write_classes, write_parquet
from test_prepare import samples, tar


@pytest.mark.parametrize(
    "links",
    [
        {"a/up": ".."},  # the root again, inside its own class
        {"a/x": "..", "b/y": ".."},  # each leads through the other, without end
        {"a/self": "."},
        {"c": "a"},  # a class under two names
        {"a/deep/er": "../../b"},
    ],
    ids=str,
)
def test_a_link_to_a_folder_that_is_read_already_is_refused(
    tmp_path: Path, links: dict[str, str]
) -> None:
    write_classes(tmp_path / "set", pixels(6, 4, 4))
    for place, target in links.items():
        (tmp_path / "set" / place).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / place).symlink_to(target)
    config = DataConfig(str(tmp_path / "set"), on_error="skip")
    with pytest.raises(DataError, match=r"expected each folder once, found .* again, a link"):
        load(config, "train")
    with pytest.raises(DataError, match="expected each folder once"):
        prepare(config, tmp_path / "out")


def test_links_to_other_folders_are_followed(tmp_path: Path) -> None:
    images = write_classes(tmp_path / "elsewhere", pixels(6, 4, 4))
    (tmp_path / "set").mkdir()
    for name in "ab":
        (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere" / name)
    np.testing.assert_array_equal(whole(tmp_path / "set").images[:, 0], images)


@pytest.mark.parametrize("place", ["", "a", "a/deep"])
def test_a_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classes(tmp_path, pixels(4, 4, 4))
    write(tmp_path / "a" / "deep" / "x.png", png(pixels(4, 4)))
    scandir = os.scandir

    def refuse(folder: Any) -> Any:  # root may list everything, so rights do not show it
        if Path(folder) == tmp_path / place:
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    assert len(whole(tmp_path)) == 5
    monkeypatch.setattr(folders_module.os, "scandir", refuse)
    with pytest.raises(DataError, match=f"{tmp_path / place}: expected a folder to read, found:"):
        whole(tmp_path, on_error="skip")


def test_links_that_lead_nowhere_are_images_that_cannot_be_read(tmp_path: Path) -> None:
    images = write_classes(tmp_path, pixels(4, 4, 4))
    before = whole(tmp_path).version
    lost, ring = tmp_path / "a" / "lost.png", tmp_path / "b" / "ring.png"
    lost.symlink_to(tmp_path / "nowhere.png")
    ring.symlink_to(ring)
    with pytest.raises(DataError, match=r"lost\.png: expected a complete image, found: .*No such"):
        whole(tmp_path)
    found = whole(tmp_path, on_error="skip")
    np.testing.assert_array_equal(found.images[:, 0], images)
    assert found.skipped == (str(lost), str(ring))
    assert found.version != before


def test_what_archives_of_macos_add_is_left_alone(tmp_path: Path) -> None:
    images = pixels(2, 4, 4)
    for folder in ("flat", "tables", "shards"):
        write(tmp_path / folder / "__MACOSX" / "._0.png", b"\0\5\x16\7")
    for i, image in enumerate(images):
        write(tmp_path / "flat" / f"{i}.png", png(image))
    write_parquet(tmp_path / "tables" / "x.parquet", [png(image) for image in images], None)
    tar(tmp_path / "shards" / "x.tar", samples(images))
    for folder, suffix in (("flat", "png"), ("tables", "parquet"), ("shards", "tar")):
        write(tmp_path / folder / f"._x.{suffix}", b"\0\5\x16\7")
        np.testing.assert_array_equal(whole(tmp_path / folder).images[:, 0], images)


def test_names_need_not_be_text(tmp_path: Path) -> None:
    place = os.fsdecode(bytes(tmp_path) + b"/sch\xf6n")
    Path(place).mkdir()
    write_classes(Path(place), pixels(4, 4, 4))
    Path(place, "b").rename(Path(place, os.fsdecode(b"caf\xe9")))
    Path(place, "a", "000.png").rename(Path(place, "a", os.fsdecode(b"\xe4.png")))
    found = whole(place)
    assert (found.id, found.class_names) == (r"sch\xf6n", ("a", r"caf\xe9"))
    np.testing.assert_array_equal(found.labels, [0, 0, 1, 1])
    (prepared,) = prepare(
        DataConfig(place, validation_fraction=0, test_fraction=0), tmp_path / "out"
    ).values()
    assert prepared.class_names == found.class_names


def test_versions_of_names_that_are_text_stay(tmp_path: Path) -> None:
    write(tmp_path / "a" / "ä.pgm", b"P5 4 4 255\n" + bytes(16))
    assert whole(tmp_path).version == "files-7594f18aaf01"


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("data/train-0.parquet", "parquet files"),
        ("MNIST/raw/train-images-idx3-ubyte", "IDX files"),
        ("train/0.parquet", "parquet files"),
        ("set/imagenet/train_data_batch_1", "batch files"),
        ("set/shards/0.tar", "tar files"),
    ],
)
def test_a_source_further_down_is_pointed_to(tmp_path: Path, place: str, kind: str) -> None:
    write(tmp_path / place, idx(pixels(2, 4, 4)))
    found = (tmp_path / place).parent
    with pytest.raises(DataError, match=f"found none; there are {kind} in {found}: name that"):
        whole(tmp_path)


def test_a_link_does_not_bring_validation_images_into_training(tmp_path: Path) -> None:
    write_classes(tmp_path / "held", pixels(4, 4, 4))
    write_classes(tmp_path / "set", pixels(4, 4, 4))
    config = DataConfig(str(tmp_path / "set"), validation=str(tmp_path / "held"))
    assert len(load(config, "validation")) == 4
    (tmp_path / "set" / "a" / "more").symlink_to(tmp_path / "held" / "a")
    with pytest.raises(DataError, match=r"training data, found .*held/a, which is also .*a/more"):
        load(config, "validation")


@pytest.mark.parametrize("name", ["x.parquet", "x.tar", "train/x.tar"])
def test_pipes_devices_and_folders_are_no_tables_and_no_shards(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    for make, kind in (
        (os.mkfifo, "a pipe, a socket or a device"),
        (lambda path: os.symlink("/dev/zero", path), "a pipe, a socket or a device"),
        (lambda path: os.symlink("nowhere", path), "a link that leads nowhere"),
    ):
        make(tmp_path / name)
        with pytest.raises(DataError, match=f"{name}: expected a file, found {kind}"):
            whole(tmp_path)
        (tmp_path / name).unlink()
