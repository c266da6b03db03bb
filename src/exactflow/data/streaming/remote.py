"""Remote files: which URLs a pattern means, and their bytes, asked for again after failures.

http(s) is read with the standard library and file:// from this disk; any other scheme (s3, gs, ...)
with fsspec, whose errors name the package that it needs.

Time and memory are limited whatever a server does. An answer that has not begun after TIMEOUT
seconds, or brings fewer than LEAST bytes in that time, is abandoned, and the rest is asked for
again; after ATTEMPTS answers in a row with fewer than LEAST new bytes, the file is. Nothing is kept
beyond the size that the caller knows, or allows.
"""

from __future__ import annotations

import http.client
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

from exactflow.data.config import DataError
from exactflow.data.streaming import http_client
from exactflow.data.streaming.http_client import Answer

log = logging.getLogger(__name__)

ATTEMPTS = 6  # in a row that bring too little
FIRST_PAUSE = 0.5  # seconds between them; each is twice the last
TIMEOUT = 15.0  # seconds; see above
LEAST = 2**16  # bytes; see above
_CHUNK = 2**20

_TOKEN = re.compile(r"\{[0-9]{1,18}\.\.[0-9]{1,18}\}|[{},]|[^{},]+")
_RANGE = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")
_MOST_FILES = 1_000_000

_TEMPORARY = (OSError, http.client.HTTPException)  # errors after which another attempt may succeed
_PERMANENT = (FileNotFoundError, PermissionError)

_Value = TypeVar("_Value")


def expand(pattern: str) -> tuple[str, ...]:
    """The URLs that a pattern means: {000..099} is a range, {a,b} a choice; braces may be nested.

    Raises:
        DataError: braces that are neither, or not in pairs; or more than a million files, which
            are counted before they are made.
    """
    read = [[""]]  # texts outside of braces, then within each that is open, since its last comma
    choices: list[list[str]] = []  # texts of each open brace, up to its last comma
    for token in _TOKEN.findall(pattern):
        if token == "{":
            read.append([""])
            choices.append([])
        elif token == "," and choices:
            _require_few(len(choices[-1]) + len(read[-1]), pattern)
            choices[-1] += read[-1]
            read[-1] = [""]
        elif token == "}":
            if not choices:
                raise DataError(f"{pattern}: expected braces in pairs")
            if not choices[-1]:
                raise DataError(f"{pattern}: expected {{000..099}} or {{a,b}} in braces")
            last = choices.pop() + read.pop()
            read[-1] = _joined(read[-1], last, pattern)
        else:
            bounds = _RANGE.fullmatch(token)
            read[-1] = _joined(read[-1], _numbers(bounds, pattern) if bounds else [token], pattern)
    if choices:
        raise DataError(f"{pattern}: expected braces in pairs")
    return tuple(dict.fromkeys(read[0]))


def _numbers(found: re.Match[str], pattern: str) -> list[str]:
    """The numbers of a range, with as many digits as its first one at least."""
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + _MOST_FILES:
        raise DataError(f"{pattern}: expected a range that rises, found {found[0]}")
    return [f"{number:0{len(found[1])}}" for number in range(first, last + 1)]


def _joined(heads: list[str], tails: list[str], pattern: str) -> list[str]:
    _require_few(len(heads) * len(tails), pattern)
    return [head + tail for head in heads for tail in tails]


def _require_few(count: int, pattern: str) -> None:
    if count > _MOST_FILES:
        raise DataError(f"{pattern}: expected at most {_MOST_FILES:,} files, found more")


def size_of(url: str) -> int:
    """Number of bytes of a file. Raises a DataError if it is missing or the size is unknown."""

    def ask() -> int | None:
        with _open(url, 0) as answer:
            return answer.total

    size = _retried(url, ask)
    if size is None:
        raise DataError(f"{url}: expected its size in bytes, found that the server does not say it")
    return size


def read(url: str, limit: int) -> bytes | None:
    """The content of a file of at most `limit` bytes; None if it is missing.

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
        except _PERMANENT:  # some servers answer "forbidden" for a missing file
            return None
        if answer.total is not None and len(content) != answer.total:
            raise ConnectionError(f"the end after {len(content):,} of {answer.total:,} bytes")
        return bytes(content)

    return _retried(url, ask)


def _require_within(limit: int, found: int, url: str) -> None:
    if found > limit:
        raise DataError(f"{url}: expected at most {limit:,} bytes, found {found:,} or more")


def download(url: str, stream: BinaryIO, size: int) -> None:
    """Append the missing bytes of a remote file of `size` bytes to an open one.

    After a broken connection the download continues where it stopped, if the server can do that.

    Raises:
        DataError: the file is missing or of another size, cannot be reached, or not be written.
    """
    enough = min(LEAST, size // 4 + 1)
    _retried(url, lambda: _append(url, stream, size), lambda: stream.tell(), enough)


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


def _chunks(answer: Answer) -> Iterator[bytes]:
    """The pieces of an answer. Raises TimeoutError where TIMEOUT seconds bring too few bytes."""
    count, waited = 0, 0.0  # since LEAST bytes were complete, the caller's time apart
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
    size_found = "more" if found is None else f"{found:,}"
    return DataError(
        f"{url}: expected {size:,} bytes, as when it was indexed, found {size_found}; if it was "
        f"replaced, `exactflow index` takes note of it"
    )


def _retried(
    url: str,
    action: Callable[[], _Value],
    progress: Callable[[], int] = lambda: 0,
    enough: int = LEAST,
) -> _Value:
    """The result of an action over a network, tried again after pauses, each twice the last.

    Args:
        url: for errors.
        action: what to do.
        progress: number of bytes that are here; `enough` new ones reset the count of failures.
        enough: see above.

    Raises:
        DataError: the file is missing, or ATTEMPTS attempts in a row failed.
    """
    failures, furthest = 0, progress()
    while True:
        try:
            return action()
        except _PERMANENT as error:
            raise DataError(f"{url}: expected a file, found: {error}") from error
        except _TEMPORARY as error:
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
def _open(url: str, start: int) -> Iterator[Answer]:
    """A file from `start` on, or from its beginning where the server cannot do better.

    Raises:
        FileNotFoundError, PermissionError: the file is missing, or access is refused.
        OSError, HTTPException: anything else.
    """
    scheme = urlsplit(url).scheme
    if scheme in ("http", "https"):
        with http_client.opened(url, start, TIMEOUT) as answer:
            yield answer
        return
    if scheme == "file":
        path = Path(url2pathname(urlsplit(url).path))
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError("no regular file")
        with path.open("rb") as stream:
            stream.seek(start)
            yield Answer(stream.read, start, path.stat().st_size)
        return
    with _fsspec_errors():
        import fsspec.core

        try:
            system, path = fsspec.core.url_to_fs(url)
        except ValueError as error:
            raise DataError(f"{url}: expected a known kind of URL, found: {error}") from error
        with system.open(path, "rb") as stream:
            stream.seek(start)
            yield Answer(stream.read, start, system.size(path))


@contextmanager
def _fsspec_errors() -> Iterator[None]:
    """Turn the errors of fsspec's back ends, which have no common base, into OSError."""
    try:
        yield
    except (OSError, ImportError, DataError):
        raise
    except Exception as error:
        raise OSError(repr(error)) from error
