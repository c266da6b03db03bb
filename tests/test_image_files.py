"""Format, depth, frames and size of an image file are checked before it is decoded."""

from __future__ import annotations

import gzip
import io
import logging
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exactflow.data import DataConfig, DataError, index_shards, load, prepare
from exactflow.data.decode import Preprocessing, decode_image
from test_data import idx, pixels, png, whole, write, write_classes
from test_prepare import tar

GREY, COLOUR = pixels(4, 4), pixels(4, 4, 3)
DEEP = np.uint32(257)


def saved(image: np.ndarray, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **options)  # pyright: ignore[reportArgumentType]
    return stream.getvalue()


def decoded(data: bytes, **rules: int) -> np.ndarray:
    return decode_image(data, "x", Preprocessing(**rules))


def tiff(planes: np.ndarray, bits: int, *, together: bool = False) -> bytes:
    """A TIFF of (C, H, W) samples, in a strip for each plane or with the samples of a pixel."""
    channels, height, width = planes.shape
    parts = [planes.transpose(1, 2, 0)] if together else list(planes)
    strips = [part.astype(f"<u{bits // 8}").tobytes() for part in parts]
    begin = 8 + sum(map(len, strips))
    starts = np.cumsum([8, *map(len, strips)])[:-1].tolist()
    tags = [
        (256, 4, [width]),
        (257, 4, [height]),
        (258, 3, [bits] * channels),
        (259, 3, [1]),
        (262, 3, [2 if channels == 3 else 1]),
        (273, 4, starts),
        (277, 3, [channels]),
        (278, 4, [height]),
        (279, 4, [len(strip) for strip in strips]),
        (284, 3, [1 if together else 2]),
    ]
    extra = b""
    entries = b""
    for tag, kind, values in tags:
        value = struct.pack(f"<{len(values)}{'HI'[kind - 3]}", *values)
        if len(value) > 4:
            place = begin + 2 + 12 * len(tags) + 4 + len(extra)
            extra, value = extra + value, struct.pack("<I", place)
        entries += struct.pack("<HHI", tag, kind, len(values)) + value.ljust(4, b"\0")
    directory = struct.pack("<H", len(tags)) + entries + bytes(4) + extra
    return b"II*\0" + struct.pack("<I", begin) + b"".join(strips) + directory


def bmp_565(colours: np.ndarray) -> bytes:
    """A BMP of 16 bits for a pixel: five of red, six of green, five of blue."""
    red, green, blue = (colours.astype(int) >> (3, 2, 3)).transpose(2, 0, 1)
    rows = (red << 11 | green << 5 | blue).astype("<u2")[::-1].tobytes()
    height, width = colours.shape[:2]
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 16, 3, len(rows), 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    return b"BM" + struct.pack("<IHHI", 66 + len(rows), 0, 0, 66) + header + masks + rows


@pytest.mark.parametrize(
    ("data", "bits"),
    [
        (b"P6 2 2 1023\n" + bytes(24), 10),
        (b"P6 2 2 65535\n" + bytes(24), 16),
        (b"P6 2 2 256\n" + bytes(24), 9),
        (b"P5 2 2 4095\n" + bytes(8), 12),
        (b"P5 2 2 65535\n" + bytes(8), 16),
        (b"P3 2 2 1023\n" + b"1023 " * 12, 10),
        (b"P2 2 2 1023\n" + b"1023 " * 4, 10),
        (tiff(pixels(3, 4, 4) * DEEP, 16), 16),
        (tiff(pixels(3, 4, 4) * DEEP, 16, together=True), 16),
        (tiff(pixels(1, 4, 4) * DEEP, 16), 16),
        (tiff(pixels(1, 4, 4) * DEEP, 32), 32),
        (saved(GREY.astype(np.uint16), "png"), 16),
    ],
    ids=lambda value: f"{value[:6]!r}" if isinstance(value, bytes) else str(value),
)
def test_more_than_eight_bits_are_never_read_as_eight(data: bytes, bits: int) -> None:
    with pytest.raises(DataError, match=f"x: expected 8 bits per channel, found {bits} bits"):
        decoded(data)


def test_eight_bits_and_fewer_are_read(tmp_path: Path) -> None:
    planes = pixels(3, 4, 4)
    np.testing.assert_array_equal(decoded(tiff(planes, 8)), planes)
    np.testing.assert_array_equal(decoded(tiff(planes, 8, together=True)), planes)
    np.testing.assert_array_equal(decoded(b"P6 4 4 255\n" + COLOUR.tobytes())[0], COLOUR[..., 0])
    np.testing.assert_array_equal(decoded(b"P5 2 1 15\n\x0f\x00"), [[[255, 0]]])
    np.testing.assert_array_equal(decoded(b"P2 2 1 3\n1 3"), [[[85, 255]]])
    wide = decoded(bmp_565(COLOUR)).astype(int)
    assert np.abs(wide - COLOUR.transpose(2, 0, 1)).max() <= 8
    for kind in ("bmp", "gif", "png", "ppm", "tiff", "webp"):
        data = saved(GREY, kind, **({"lossless": True} if kind == "webp" else {}))
        np.testing.assert_array_equal(decoded(data, channels=1)[0], GREY)
    assert decoded(saved(COLOUR, "jpeg")).shape == (3, 4, 4)


# Formats


@pytest.mark.parametrize("kind", ["eps", "pdf", "ico", "tga", "pcx", "sgi", "jpeg2000"])
def test_other_formats_are_not_opened_whatever_their_name(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "x.png", saved(COLOUR, kind))
    with pytest.raises(DataError, match=r"x\.png: expected .* in BMP, GIF, JPEG, PNG, PPM, TIFF"):
        whole(tmp_path)


def test_nothing_is_started_for_postscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", start)
    forever = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n{} loop\n%%EOF\n"
    write(tmp_path / "x.png", forever)
    with pytest.raises(DataError, match="expected a complete image in"):
        whole(tmp_path)


# Several frames


def frames(kind: str) -> bytes:
    pages = [Image.fromarray(pixels(4, 4, seed=seed)) for seed in range(3)]
    stream = io.BytesIO()
    lossless = {"lossless": True} if kind == "webp" else {}
    pages[0].save(stream, kind, save_all=True, append_images=pages[1:], **lossless)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_animations_are_counted(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        write(tmp_path / "set" / f"{name}.{kind}", frames(kind))
    write(tmp_path / "set" / f"c.{kind}", saved(GREY, kind))
    said = f"2 images are animations, of which the first frame is read, {tmp_path}/set/a.{kind}"
    words = {"channels": 1, "validation_fraction": 0.0, "test_fraction": 0.0}
    with caplog.at_level(logging.WARNING):
        found = whole(tmp_path / "set", channels=1)
    assert said in caplog.text
    np.testing.assert_array_equal(found.images[0, 0], pixels(4, 4, seed=0))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        prepare(DataConfig(str(tmp_path / "set"), **words), tmp_path / "out")
    assert said in caplog.text


def test_animations_of_a_stream_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tar(tmp_path / "0.tar", {f"{i}.gif": frames("gif") for i in range(4)})
    config = DataConfig(f"file://{tmp_path}/{{0..0}}.tar", cache_dir=str(tmp_path / "cache"))
    words = {"channels": 1, "validation_fraction": 0.0, "test_fraction": 0.0}
    index_shards(config.source, cache_dir=config.cache_dir)
    images = load(replace(config, **words), "train").images
    with caplog.at_level(logging.WARNING):
        for row in range(4):
            np.testing.assert_array_equal(images[row][0], pixels(4, 4))
    assert caplog.text.count("images are animations") == 1


def test_pages_of_a_tiff_are_refused_and_smaller_copies_are_not() -> None:
    with pytest.raises(DataError, match="expected a TIFF of one page, found several"):
        decoded(frames("tiff"))
    copy = bytearray(frames("tiff"))
    first = int.from_bytes(copy[4:8], "little")
    entries = int.from_bytes(copy[first : first + 2], "little")
    second = int.from_bytes(copy[first + 2 + 12 * entries :][:4], "little")
    # The second directory becomes the last, tagged as a smaller copy instead of by its compression.
    entries = int.from_bytes(copy[second : second + 2], "little")
    places = range(second + 2, second + 2 + 12 * entries, 12)
    (place,) = (place for place in places if copy[place : place + 2] == struct.pack("<H", 259))
    copy[place : place + 12] = struct.pack("<HHII", 254, 4, 1, 1)
    copy[places.stop : places.stop + 4] = bytes(4)
    np.testing.assert_array_equal(decoded(bytes(copy))[0], pixels(4, 4, seed=0))


# Sizes


def png_header(width: int, height: int) -> bytes:
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", b"")]
    chunks = (
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    "data",
    [
        png_header(170_000_000, 1),
        png_header(2**31 - 1, 2**31 - 1),
        b"P5 100000 100000 255\n",
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\2",
    ],
    ids=["long", "large", "ppm", "gif"],
)
def test_more_pixels_than_the_limit_are_refused_before_they_are_read(data: bytes) -> None:
    with pytest.raises(DataError, match=r"expected at most 89478485 pixels \(data\.max_pixels\)"):
        decoded(data)


def test_the_limit_is_of_stored_and_of_resized_images_and_can_be_raised(tmp_path: Path) -> None:
    image = pixels(1, 60)
    write(tmp_path / "x.png", png(image))
    with pytest.raises(DataError, match=r"most 59 pixels \(data\.max_pixels\), found 60 x 1"):
        whole(tmp_path, max_pixels=59)
    np.testing.assert_array_equal(whole(tmp_path, max_pixels=60).images[0, 0], image)
    with pytest.raises(DataError, match=r"short side resized to 4: .* found 240 x 4"):
        whole(tmp_path, max_pixels=959, image_size=4)
    assert whole(tmp_path, max_pixels=960, image_size=4).event_shape == (1, 4, 4)
    with pytest.raises(DataError, match="image_size: expected at most 9459, since"):
        DataConfig(image_size=30000)
    assert DataConfig(image_size=30000, max_pixels=10**9).image_size == 30000


def test_raised_limits_go_beyond_those_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    np.testing.assert_array_equal(decoded(png(GREY))[0], GREY)
    assert decoded(png(pixels(9, 12)), image_size=6).shape == (1, 6, 6)


def test_a_prepared_set_keeps_images_beyond_the_limit(tmp_path: Path) -> None:
    write_classes(tmp_path / "set", pixels(4, 6, 6))
    words = {"validation_fraction": 0.0, "test_fraction": 0.0}
    prepare(DataConfig(str(tmp_path / "set"), max_pixels=36, **words), tmp_path / "out")
    assert len(whole(tmp_path / "out", max_pixels=9)) == 4
    assert len(whole(tmp_path / "out", max_pixels=9, limit=2)) == 2


def test_files_of_no_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "x.png", png(GREY))
    os.truncate(file, 2**32)  # sparse
    with pytest.raises(DataError, match=r"x\.png: .* since data\.max_pixels is .* 4294967296"):
        whole(tmp_path)
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        file.unlink()
        make(file)
        with pytest.raises(DataError, match=r"x\.png: .* a pipe, a socket or a device in place"):
            whole(tmp_path)
        with pytest.raises(DataError, match="expected at least one readable image"):
            whole(tmp_path, on_error="skip")


# IDX files


def header(*shape: int) -> bytes:
    return struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (header(1, 2**31, 2**31), None, "at most .* pixels|expected .* values"),
        (gzip.compress(header(1, 2**20, 2**20)), None, r"at most 89478485 pixels|grows 100 times"),
        (gzip.compress(header(6_000_000, 28, 28)), None, "grows 100 times at most, found .* 4704"),
        (gzip.compress(idx(pixels(2, 4, 4)) + bytes(10**7)), None, "found more"),
        (idx(pixels(2, 4, 4)), header(2**32 - 1), "expected 4294967295 values .* found 0"),
        (idx(pixels(2, 4, 4)), gzip.compress(header(2**32 - 1)), "grows 100 times at most"),
        (idx(pixels(2, 4, 4)), gzip.compress(header(2) + bytes(10**7)), "found more"),
        (gzip.compress(idx(pixels(2, 4, 4))[:-1]), None, "found fewer"),
    ],
    ids=[
        *("side", "packed side", "packed count", "packed tail"),
        *("labels", "packed labels", "label tail", "short"),
    ],
)
def test_idx_files_that_grow_are_refused(
    tmp_path: Path, images: bytes, labels: bytes | None, message: str
) -> None:
    write(tmp_path / IMAGES, images)
    if labels is not None:
        write(tmp_path / LABELS, labels)
    with pytest.raises(DataError, match=message):
        whole(tmp_path)


def test_sparse_and_endless_idx_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / IMAGES, idx(pixels(2, 4, 4)))
    os.truncate(write(tmp_path / LABELS, header(2**32 - 1)), 8 + 2**32 - 1)
    with pytest.raises(DataError, match=r"expected 2 labels.* found 4294967295"):
        whole(tmp_path)
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        (tmp_path / LABELS).unlink()
        make(tmp_path / LABELS)
        with pytest.raises(DataError, match=f"{LABELS}: .* a pipe, a socket or a device"):
            whole(tmp_path)
    (tmp_path / LABELS).unlink()
    os.truncate(write(tmp_path / IMAGES, header(1, 2**16, 2**16)), 16 + 2**32)
    with pytest.raises(DataError, match="at most 89478485 pixels"):
        whole(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged tags
def test_decoders_raise_nothing_of_their_own() -> None:
    generator = np.random.default_rng(0)
    errors = 0
    for kind in ("bmp", "gif", "jpeg", "png", "ppm", "tiff", "webp"):
        good = saved(pixels(8, 8, 3), kind)
        for _ in range(60):
            bad = bytearray(good)
            bad[generator.integers(len(bad))] = generator.integers(256)
            try:
                decoded(bytes(bad), max_pixels=10**6)
            except DataError:
                errors += 1
    assert errors > 40  # what is no error is another image
