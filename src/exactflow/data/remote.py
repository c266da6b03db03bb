"""Files that lie elsewhere: which ones a pattern means, and their bytes, however often it takes.

http(s) is spoken by the standard library; file:// is a path; any other scheme (s3, gs, ...) is
fsspec's, which says which package it needs. Nothing here knows what a shard is.
"""

from __future__ import annotations

import http.client
import logging
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar, final
from urllib.parse import urlsplit

from exactflow.data.config import DataError

log = logging.getLogger(__name__)

ATTEMPTS = 6  # in a row without a new byte
FIRST_PAUSE = 0.5  # seconds; each is twice the last
TIMEOUT = 60.0  # seconds without a byte
_CHUNK = 2**20

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_FILES = 1_000_000

# What a network does that may pass; a file that is not there will not come.
_PASSING = (OSError, http.client.HTTPException)
_LASTING = (FileNotFoundError, PermissionError)

_Value = TypeVar("_Value")


def expand(pattern: str) -> tuple[str, ...]:
    """The URLs that a pattern means: {000..099} is a range, {a,b} a choice; braces may be nested.

    Raises:
        DataError: braces that are neither.
    """
    found = _BRACES.search(pattern)
    if found is None:
        if "{" in pattern or "}" in pattern:
            raise DataError(f"{pattern}: expected braces in pairs")
        return (pattern,)
    inside = found[1]
    bounds = _RANGE.fullmatch(inside)
    if bounds:
        first, last = int(bounds[1]), int(bounds[2])
        if not first <= last < first + _MOST_FILES:
            raise DataError(f"{pattern}: expected a range that rises, found {{{inside}}}")
        choices = [f"{number:0{len(bounds[1])}}" for number in range(first, last + 1)]
    elif "," in inside:
        choices = inside.split(",")
    else:
        raise DataError(f"{pattern}: expected {{000..099}} or {{a,b}}, found {{{inside}}}")
    before, after = pattern[: found.start()], pattern[found.end() :]
    urls = (url for choice in choices for url in expand(f"{before}{choice}{after}"))
    return tuple(dict.fromkeys(urls))


def size_of(url: str) -> int:
    """Bytes of a file.

    Raises:
        DataError: it is missing, cannot be reached, or nobody says how long it is.
    """

    def ask() -> int | None:
        with _open(url, 0) as answer:
            return answer.total

    size = _patiently(url, ask)
    if size is None:
        raise DataError(f"{url}: expected its size in bytes, found that the server does not say it")
    return size


def read(url: str) -> bytes | None:
    """The content of a small file; None if it is not there.

    Raises:
        DataError: it cannot be reached.
    """

    def ask() -> bytes | None:
        try:
            with _open(url, 0) as answer:
                content = answer.stream.read()
        except _LASTING:  # servers forbid what is not there, too
            return None
        if answer.total is not None and len(content) != answer.total:
            raise ConnectionError(f"the end after {len(content):,} of {answer.total:,} bytes")
        return content

    return _patiently(url, ask)


def download(url: str, stream: BinaryIO, size: int) -> None:
    """Append to an open file what it lacks of a remote one of `size` bytes.

    A connection that breaks is taken up again where it broke, if the server can do that.

    Raises:
        DataError: the file is missing or of another size, cannot be reached, or not be written.
    """
    _patiently(url, lambda: _append(url, stream, size), lambda: stream.tell())


@final
@dataclass(frozen=True)
class _Answer:
    """What is read from `start` on, of a file of `total` bytes (None: unknown)."""

    stream: "_Readable"
    start: int
    total: int | None


class _Readable(Protocol):
    """What bytes are read from."""

    def read(self, size: int = -1, /) -> bytes:
        """At most so many bytes; none at the end."""
        ...


def _append(url: str, stream: BinaryIO, size: int) -> None:
    have = stream.seek(0, 2)
    if have == size:
        return
    with _open(url, have if have < size else 0) as answer:
        if answer.total not in (None, size):
            raise _changed(url, size, answer.total)
        have = stream.seek(answer.start)
        stream.truncate()
        while chunk := answer.stream.read(min(_CHUNK, size - have + 1)):
            have += len(chunk)
            if have > size:
                raise _changed(url, size, None)
            _write(url, stream, chunk)
    if have < size:
        raise ConnectionError(f"the end after {have:,} of {size:,} bytes")


def _write(url: str, stream: BinaryIO, chunk: bytes) -> None:
    try:
        stream.write(chunk)
        stream.flush()
    except OSError as error:
        raise DataError(
            f"{url}: expected room for it in {Path(stream.name).parent}, found: {error.strerror}; "
            f"lower data.cache_gib, or set data.cache_dir to another disk"
        ) from error


def _changed(url: str, size: int, found: int | None) -> DataError:
    told = "more" if found is None else f"{found:,}"
    return DataError(
        f"{url}: expected {size:,} bytes, as when it was indexed, found {told}; if it was "
        f"replaced, `exactflow index` takes note of it"
    )


def _patiently(
    url: str, action: Callable[[], _Value], progress: Callable[[], int] = lambda: 0
) -> _Value:
    """Do something over a network, again and again with longer pauses while it makes no progress.

    Raises:
        DataError: it fails for good.
    """
    failures, furthest = 0, progress()
    while True:
        try:
            return action()
        except _LASTING as error:
            raise DataError(f"{url}: expected a file, found: {error}") from error
        except _PASSING as error:
            if progress() > furthest:
                failures, furthest = 0, progress()
            failures += 1
            if failures == ATTEMPTS:
                raise DataError(
                    f"{url}: expected to read it, found {failures} times in a row: {error!r}"
                ) from error
            log.info("%s: %r, attempt %d follows", url, error, failures + 1)
            time.sleep(FIRST_PAUSE * 2 ** (failures - 1))


@contextmanager
def _open(url: str, start: int) -> Iterator[_Answer]:
    """A file from `start` on, or from its beginning where the server cannot do better.

    Raises:
        FileNotFoundError, PermissionError: it is not there, or not for us.
        OSError, HTTPException: anything else.
    """
    scheme = urlsplit(url).scheme
    if scheme in ("http", "https"):
        with _open_http(url, start) as answer:
            yield answer
        return
    if scheme == "file":
        path = Path(urllib.request.url2pathname(urlsplit(url).path))
        with path.open("rb") as stream:
            stream.seek(start)
            yield _Answer(stream, start, path.stat().st_size)
        return
    with _explained():
        import fsspec.core

        try:
            system, path = fsspec.core.url_to_fs(url)
        except ValueError as error:
            raise DataError(f"{url}: expected a known kind of URL, found: {error}") from error
        with system.open(path, "rb") as stream:
            stream.seek(start)
            yield _Answer(stream, start, system.size(path))


@contextmanager
def _open_http(url: str, start: int) -> Iterator[_Answer]:
    headers = {"Accept-Encoding": "identity", "User-Agent": "exactflow"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=TIMEOUT
        ) as answer:
            if answer.status == 206:
                span, _, total = answer.headers["Content-Range"].partition("/")
                begin = int(span.removeprefix("bytes ").partition("-")[0])
                yield _Answer(answer, begin, int(total) if total.isdecimal() else None)
            else:
                length = answer.headers["Content-Length"]
                yield _Answer(answer, 0, None if length is None else int(length))
    except urllib.error.HTTPError as error:
        if start and error.code == 416:  # it is shorter than that
            with _open_http(url, 0) as answer:
                yield answer
            return
        if error.code in (404, 410):
            raise FileNotFoundError(f"HTTP status {error.code}") from error
        if error.code in (401, 403):
            raise PermissionError(f"HTTP status {error.code}") from error
        raise


@contextmanager
def _explained() -> Iterator[None]:
    """The errors of fsspec's back ends, which have no common base, as OSError."""
    try:
        yield
    except (OSError, ImportError, DataError):
        raise
    except Exception as error:
        raise OSError(repr(error)) from error
