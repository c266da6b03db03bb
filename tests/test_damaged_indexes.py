"""Laws of indexes of images and labels: read once, by a schema, or refused."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exactflow.data import DataConfig, DataError, load
from exactflow.data.formats import shards, tar_index
from exactflow.data.formats.tar_index import index_tar, read_index
from test_data import pixels, png
from test_prepare import tar

END = bytes(1024)


def header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    """A tar header whose size may differ from what follows."""
    info = tarfile.TarInfo(name.decode("latin-1"))
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT, "latin-1")


def indexed(content: bytes, tmp_path: Path) -> tar_index.TarIndex:
    (tmp_path / "0.tar").write_bytes(content)
    with (tmp_path / "0.tar").open("rb") as stream:  # a file allocates all bytes asked for
        return index_tar(stream, "0.tar", len(content), None, "0.tar")


HUGE = 2**50
TARS = {
    "a header of long values": header(b"x", HUGE, tarfile.XHDTYPE) + END,
    "a long name": header(b"x", HUGE, tarfile.GNUTYPE_LONGNAME) + END,
    "a negative header": header(b"x", -1024, tarfile.XHDTYPE) + END,
    "headers of headers": (
        header(b"x", 16, tarfile.XHDTYPE) + b"16 comment=aaaa\n".ljust(512, b"\0")
    )
    * 2000
    + END,
}


@pytest.mark.parametrize("kind", TARS)
def test_headers_without_sense_are_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^0\.tar: expected a whole tar file, found after its beg"):
        indexed(TARS[kind], tmp_path)


def test_sizes_are_compared_before_anything_is_read(tmp_path: Path) -> None:
    def sparse(name: str, size: int) -> None:
        with (tmp_path / "0.tar").open("wb") as stream:
            for member, length in (("a.png", 512), (name, size)):
                stream.write(header(member.encode(), length))
                stream.seek(length + -length % 512, 1)
            stream.write(END)

    for name, limit in (("a.json", "1,048,576"), ("b.png", "268,435,456")):
        sparse(name, 2**35)
        message = rf"0\.tar\[{name}\]: expected at most {limit} bytes, found 34,359,738,368"
        with pytest.raises(DataError, match=message):
            load(DataConfig(str(tmp_path / "0.tar")), "train")


LABELS = {
    "nested": b"[" * 100_000,
    "nested in a field": b'{"label":' * 50_000,
    "an integer of 60 digits": b"9" * 60,
    "an integer of 4000 digits": b"9" * 4000,
    "2**63": str(2**63).encode(),
    "an object": b'{"label": {"label": 1}}',
    "a list": b'{"label": [1]}',
    "no number": b"NaN",
    "a fraction": b"1.5",
    "true": b"true",
    "half a character": rb'"\ud800"',
    "two lines": rb'"a\nb"',
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_other_types_are_named(kind: str, tmp_path: Path) -> None:
    members = {"a.png": png(pixels(4, 4)), "a.json": LABELS[kind]}
    tar(tmp_path / "0.tar", members)
    with pytest.raises(DataError, match=r"0\.tar\[a\.json\]: expected (a class label|an integer)"):
        load(DataConfig(str(tmp_path / "0.tar")), "train")


def test_names_that_are_not_utf8_are_names(tmp_path: Path) -> None:
    content = png(pixels(4, 4))
    body = content.ljust(-(-len(content) // 512) * 512, b"\0")
    (tmp_path / "0.tar").write_bytes(
        b"".join(header(name, len(content)) + body for name in (b"\xe4.png", b"\xf6.png")) + END
    )
    config = DataConfig(str(tmp_path / "0.tar"), test_fraction=0.0, validation_fraction=0.0)
    assert len(load(config, "train")) == 2
    index = indexed((tmp_path / "0.tar").read_bytes(), tmp_path)
    (again,) = read_index(tar_index.write_index([index]), "index.json")
    assert again.members == index.members
    assert shards._version([again]) == shards._version([index])


SHARD = {
    "name": "0.tar",
    "size": 2000,
    "sha256": None,
    "members": ["a.png"],
    "offsets": [512],
    "sizes": [100],
    "labels": None,
    "ignored": {},
}
FIELDS = {
    "name": [3, None, ["0.tar"]],
    "size": ["2000", 2000.0, True, -1, 2**63, None],
    "sha256": [5, "../../x", "a" * 65],
    "members": ["a", [3], {"a.png": 1}, [], None],
    "offsets": [[0.5], [True], ["512"], [-1], [2**63 - 1], [2**70], [[512]], 512, [512, 513]],
    "sizes": [[0.5], [-1], [2001], [2**70], []],
    "labels": [[{}], [1.5], [True], [2**63], ["a" * 65], [["cat"]], [], 3],
    "ignored": [[3], 3],
}


@pytest.mark.parametrize("field", FIELDS)
def test_fields_of_an_index_have_their_types(field: str) -> None:
    def content(value: Any) -> bytes:
        return json.dumps({"format": 1, "shards": [{**SHARD, field: value}]}).encode()

    assert len(read_index(content(SHARD[field]), "index.json")) == 1
    for value in FIELDS[field]:
        with pytest.raises(DataError, match=r"^index\.json: expected an index of tar shards"):
            read_index(content(value), "index.json")


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"format":1,"shards":' + b"[" * 100_000, b"\xff", b"3", b"null", b"[[]]"],
)
def test_what_is_no_index_is_named(content: bytes) -> None:
    with pytest.raises(DataError, match=r"^index\.json: expected an index"):
        read_index(content, "index.json")


def test_an_image_beyond_the_limit_is_in_no_index() -> None:
    large = {**SHARD, "size": 2**40, "sizes": [2**30]}
    with pytest.raises(DataError, match="an image of more than 268,435,456 bytes"):
        read_index(json.dumps({"format": 1, "shards": [large]}).encode(), "index.json")


def of_features(features: Any) -> bytes:
    return json.dumps({"info": {"features": features}}).encode()


@pytest.mark.parametrize(
    "metadata",
    [
        b"[" * 100_000,
        b"\xff",
        b"3",
        b'{"info": [1]}',
        of_features([1]),
        of_features({"label": "cat"}),
        of_features({"label": {"names": "cat"}}),
        of_features({"label": {"names": [0, 1]}}),
        of_features({"label": {"names": {"0": "cat"}}}),
    ],
)
def test_metadata_of_other_types_are_named(metadata: bytes, tmp_path: Path) -> None:
    written(tmp_path / "x.parquet", metadata)
    with pytest.raises(DataError, match=r"x\.parquet: expected metadata as the datasets library"):
        load(DataConfig(str(tmp_path / "x.parquet")), "train")


def test_metadata_without_names_number_the_classes(tmp_path: Path) -> None:
    config = DataConfig(str(tmp_path / "x.parquet"), test_fraction=0.0, validation_fraction=0.0)
    names: Callable[[], tuple[str, ...]] = lambda: load(config, "train").class_names  # noqa: E731
    for metadata in (b"{}", b'{"info": null}', of_features({"label": {"dtype": "int64"}})):
        written(tmp_path / "x.parquet", metadata)
        assert names() == ("0", "1")
    written(tmp_path / "x.parquet", of_features({"label": {"names": ["cat", "dog"]}}))
    assert names() == ("cat", "dog")


def written(file: Path, metadata: bytes) -> None:
    """Two labelled images."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"image": [png(pixels(4, 4, seed=n)) for n in (0, 1)], "label": [0, 1]})
    parquet.write_table(table.replace_schema_metadata({b"huggingface": metadata}), file)


def test_one_flipped_bit_of_an_index_is_found() -> None:
    shard = tar_index.from_fields({**SHARD, "labels": [1]}, "x")
    content = tar_index.write_index([shard])
    assert read_index(content, "x")[0].labels == (1,)
    for byte in range(len(content) - 1):  # the last one is a line's end
        damaged = bytearray(content)
        damaged[byte] ^= 2
        with pytest.raises(DataError):
            read_index(bytes(damaged), "index.json")
    without = json.loads(content)
    del without["sha256"]  # as earlier versions wrote it
    assert read_index(json.dumps(without).encode(), "x")[0].labels == (1,)


def test_a_damaged_index_of_the_cache_folder_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shards, "KEEP_INDEX_FROM", 1)
    tar(tmp_path / "set" / "0.tar", {"a.png": png(pixels(4, 4)), "b.png": png(pixels(4, 4))})
    whole = {"test_fraction": 0.0, "validation_fraction": 0.0, "cache_dir": str(tmp_path / "cache")}
    first = load(DataConfig(str(tmp_path / "set"), **whole), "train")
    (kept,) = (tmp_path / "cache" / "indexes").iterdir()
    intact = kept.read_bytes()
    for content in (intact[:-9], b"[" * 10_000, intact.replace(b'"a.png"', b'"c.png"')):
        kept.write_bytes(content)
        assert load(DataConfig(str(tmp_path / "set"), **whole), "train").version == first.version
        assert "it is left aside" in caplog.text
        assert kept.read_bytes() == intact
        caplog.clear()
