"""Files that lie elsewhere: which ones a pattern means, and their bytes, however often it takes.

http(s) is spoken by the standard library; file:// is a path; any other scheme (s3, gs, ...) is
fsspec's, which says which package it needs. Nothing here knows what a shard is.

A server is trusted neither with time nor with memory. An answer that has not begun after TIMEOUT
seconds, or brings fewer than LEAST bytes in as many, is given up, and the rest is asked for again;
after ATTEMPTS answers in a row without as many new ones the file is given up. Nothing is kept
beyond the size that the caller knows, or allows.
"""

from __future__ import annotations

import http.client
import logging
import operator
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import BinaryIO, Never, TypeVar, final
from urllib.parse import urlsplit
from urllib.request import url2pathname

from exactflow.data.config import DataError
from exactflow.data.streaming import http_client

log = logging.getLogger(__name__)

ATTEMPTS = 6  # in a row that bring too little
FIRST_PAUSE = 0.5  # seconds between them; each is twice the last
TIMEOUT = 15.0  # seconds; see above
LEAST = 2**16  # bytes; see above
_CHUNK = 2**20

_TOKEN = re.compile(r"\{[0-9]{1,18}\.\.[0-9]{1,18}\}|[{},]|[^{},]+")
_RANGE = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")
_MOST_FILES = 1_000_000

# What a network does that may pass; a file that is not there will not come.
_PASSING = (OSError, http.client.HTTPException)
_LASTING = (FileNotFoundError, PermissionError)

_Value = TypeVar("_Value")
_Urls = TypeVar("_Urls", int, list[str])


def expand(pattern: str) -> tuple[str, ...]:
    """The URLs that a pattern means: {000..099} is a range, {a,b} a choice; braces may be nested.

    They are counted before the first one is made.

    Raises:
        DataError: braces that are neither, or more than a million files.
    """
    count = _evaluated(
        pattern, lambda text: 1, lambda first, last, width: last - first + 1, operator.mul
    )
    if count > _MOST_FILES:
        raise DataError(f"{pattern}: expected at most {_MOST_FILES:,} files, found more")
    urls = _evaluated(pattern, lambda text: [text], _numbers, _joined)
    return tuple(dict.fromkeys(urls))


def _evaluated(
    pattern: str,
    of_text: Callable[[str], _Urls],
    of_range: Callable[[int, int, int], _Urls],
    then: Callable[[_Urls, _Urls], _Urls],
) -> _Urls:
    """What a pattern stands for, or how much; choices are added up.

    Raises:
        DataError: braces that are neither a range nor a choice.
    """
    read = [of_text("")]  # outside of braces, then within each that is open, since its last comma
    choices: list[_Urls | None] = []  # of each that is open, up to its last comma
    for token in _TOKEN.findall(pattern):
        if token == "{":
            read.append(of_text(""))
            choices.append(None)
        elif token == "," and choices:
            before = choices[-1]
            choices[-1] = read[-1] if before is None else before + read[-1]
            read[-1] = of_text("")
        elif token == "}":
            before = choices.pop() if choices else _unpaired(pattern)
            if before is None:
                raise DataError(f"{pattern}: expected {{000..099}} or {{a,b}} in braces")
            last = before + read.pop()
            read[-1] = then(read[-1], last)
        else:
            bounds = _RANGE.fullmatch(token)
            part = of_range(*_bounds(bounds, pattern)) if bounds else of_text(token)
            read[-1] = then(read[-1], part)
    return _unpaired(pattern) if choices else read[0]


def _unpaired(pattern: str) -> Never:
    raise DataError(f"{pattern}: expected braces in pairs")


def _bounds(found: re.Match[str], pattern: str) -> tuple[int, int, int]:
    """First and last number of a range, and how many digits they have at least."""
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + _MOST_FILES:
        raise DataError(f"{pattern}: expected a range that rises, found {found[0]}")
    return first, last, len(found[1])


def _numbers(first: int, last: int, width: int) -> list[str]:
    return [f"{number:0{width}}" for number in range(first, last + 1)]


def _joined(heads: list[str], tails: list[str]) -> list[str]:
    return [head + tail for head, tail in product(heads, tails)]


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


def read(url: str, limit: int) -> bytes | None:
    """The content of a file of at most `limit` bytes; None if it is not there.

    Raises:
        DataError: it cannot be reached, or is larger.
    """

    def ask() -> bytes | None:
        try:
            with _open(url, 0) as answer:
                _require_within(limit, answer.total or 0, url)
                content = bytearray()
                for chunk in _chunks(answer):
                    content += chunk
                    _require_within(limit, len(content), url)
        except _LASTING:  # servers forbid what is not there, too
            return None
        if answer.total is not None and len(content) != answer.total:
            raise ConnectionError(f"the end after {len(content):,} of {answer.total:,} bytes")
        return bytes(content)

    return _patiently(url, ask)


def _require_within(limit: int, found: int, url: str) -> None:
    if found > limit:
        raise DataError(f"{url}: expected at most {limit:,} bytes, found {found:,} or more")


def download(url: str, stream: BinaryIO, size: int) -> None:
    """Append to an open file what it lacks of a remote one of `size` bytes.

    A connection that breaks is taken up again where it broke, if the server can do that.

    Raises:
        DataError: the file is missing or of another size, cannot be reached, or not be written.
    """
    enough = min(LEAST, size // 4 + 1)
    _patiently(url, lambda: _append(url, stream, size), lambda: stream.tell(), enough)


@final
@dataclass(frozen=True)
class _Answer:
    """What is read from `start` on, of a file of `total` bytes (None: unknown).

    `read` gives at most so many bytes, without waiting for all of them where it can do that.
    """

    read: Callable[[int], bytes]
    start: int
    total: int | None


def _append(url: str, stream: BinaryIO, size: int) -> None:
    have = stream.seek(0, 2)
    if have == size:
        return
    with _open(url, have if have < size else 0) as answer:
        if answer.total not in (None, size):
            raise _changed(url, size, answer.total)
        have = stream.seek(answer.start)
        stream.truncate()
        for chunk in _chunks(answer):
            have += len(chunk)
            if have > size:
                raise _changed(url, size, None)
            _write(url, stream, chunk)
    if have < size:
        raise ConnectionError(f"the end after {have:,} of {size:,} bytes")


def _chunks(answer: _Answer) -> Iterator[bytes]:
    """The pieces of an answer. Raises TimeoutError where they are too small for their time."""
    count, waited = 0, 0.0  # since LEAST bytes were there last, without what the caller does
    while True:
        began = time.monotonic()
        chunk = answer.read(_CHUNK)
        if not chunk:
            return
        count, waited = count + len(chunk), waited + time.monotonic() - began
        if count >= LEAST:
            count, waited = 0, 0.0
        elif waited > TIMEOUT:
            raise TimeoutError(f"{count:,} bytes in {waited:.0f} s")
        yield chunk


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
    url: str,
    action: Callable[[], _Value],
    progress: Callable[[], int] = lambda: 0,
    enough: int = LEAST,
) -> _Value:
    """Do something over a network, again and again with longer pauses until `enough` bytes came.

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
            if progress() >= furthest + enough:
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
        with http_client.opened(url, start, TIMEOUT) as answer:
            yield _Answer(answer.body.read1, answer.start, answer.total)
        return
    if scheme == "file":
        path = Path(url2pathname(urlsplit(url).path))
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError("no regular file")
        with path.open("rb") as stream:
            stream.seek(start)
            yield _Answer(stream.read, start, path.stat().st_size)
        return
    with _explained():
        import fsspec.core

        try:
            system, path = fsspec.core.url_to_fs(url)
        except ValueError as error:
            raise DataError(f"{url}: expected a known kind of URL, found: {error}") from error
        with system.open(path, "rb") as stream:
            stream.seek(start)
            yield _Answer(stream.read, start, system.size(path))


@contextmanager
def _explained() -> Iterator[None]:
    """The errors of fsspec's back ends, which have no common base, as OSError."""
    try:
        yield
    except (OSError, ImportError, DataError):
        raise
    except Exception as error:
        raise OSError(repr(error)) from error
