"""One answer of an HTTP server, whose head comes in time or not at all.

`urllib` waits for every byte by itself: a server that sends a byte now and then, or "100 continue"
for ever, would be waited for without end. It also reads the whole body of an answer that redirects.
"""

from __future__ import annotations

import http.client
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any, final
from urllib.parse import urljoin, urlsplit

_MOST_REDIRECTS = 10
_REDIRECTS = (301, 302, 303, 307, 308)
_SPAN = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")
_NUMBER = re.compile(r"[0-9]{1,18}")


@final
@dataclass(frozen=True)
class HttpAnswer:
    """What is read from `start` on, of a file of `total` bytes (None: unknown)."""

    body: HTTPResponse
    start: int
    total: int | None


@contextmanager
def opened(url: str, start: int, timeout: float) -> Iterator[HttpAnswer]:
    """A file from byte `start` on, or from its beginning where the server cannot do better.

    Args:
        url: where.
        start: first byte.
        timeout: seconds, at most, for the head of an answer, and for each of its bytes.

    Raises:
        FileNotFoundError, PermissionError: it is not there, or not for us.
        OSError, HTTPException: anything else.
    """
    headers = {"Accept-Encoding": "identity", "User-Agent": "exactflow"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        answer = _followed(url, headers, timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if start and error.code == 416:  # it is shorter than that
            with opened(url, 0, timeout) as whole:
                yield whole
            return
        if error.code in (404, 410):
            raise FileNotFoundError(f"HTTP status {error.code}") from error
        if error.code in (401, 403):
            raise PermissionError(f"HTTP status {error.code}") from error
        raise
    with closing(answer):
        if answer.status == 206:
            span = _SPAN.fullmatch(answer.headers["Content-Range"] or "")
            if span is None or int(span[1]) != start:
                raise ConnectionError(f"a part of a file that does not begin at byte {start:,}")
            yield HttpAnswer(answer, start, None if span[2] == "*" else int(span[2]))
        else:
            length = _NUMBER.fullmatch(answer.headers["Content-Length"] or "")
            yield HttpAnswer(answer, 0, int(length[0]) if length else None)


def _followed(url: str, headers: dict[str, str], timeout: float) -> HTTPResponse:
    """The answer at the end of all redirections, whose bodies are left unread."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _HttpHandler(),
    ):
        opener.add_handler(handler)
    for _ in range(_MOST_REDIRECTS):
        try:
            answer = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
        except urllib.error.HTTPError as error:
            target = error.headers["Location"]
            if error.code not in _REDIRECTS or target is None:
                raise
            error.close()
            before, url = urlsplit(url).scheme, urljoin(url, target)
            if urlsplit(url).scheme not in ("https", before):  # neither to files nor to plain text
                raise ConnectionError(f"a redirection to {url}") from error
        else:
            assert isinstance(answer, HTTPResponse)  # of our handler
            return answer
    raise ConnectionError(f"more than {_MOST_REDIRECTS} redirections")


@final
class _HttpHandler(urllib.request.AbstractHTTPHandler):
    """Connections that are shut down unless the head of the answer is there in time."""

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def http_open(self, request: urllib.request.Request) -> HTTPResponse:
        """Called by urllib for http."""
        return self._answer(HTTPConnection, request)

    def https_open(self, request: urllib.request.Request) -> HTTPResponse:
        """Called by urllib for https."""
        return self._answer(HTTPSConnection, request)

    def _answer(self, kind: type[HTTPConnection], request: urllib.request.Request) -> HTTPResponse:
        made: list[HTTPConnection] = []
        answered, late = threading.Event(), threading.Event()

        def connection(host: str, /, **options: Any) -> HTTPConnection:
            made.append(kind(host, **options))
            return made[0]

        def watch() -> None:
            while not answered.wait(request.timeout):
                late.set()
                for each in made:
                    held = each.sock
                    if held is not None:  # else it is still being connected
                        with suppress(OSError):
                            held.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=watch, daemon=True).start()
        try:
            answer = self.do_open(connection, request)
        except (OSError, http.client.HTTPException) as error:
            if late.is_set():
                raise TimeoutError(f"no answer in {request.timeout:.0f} s") from error
            raise
        finally:
            answered.set()
        if late.is_set():  # what was cut off passes for a whole head
            answer.close()
            raise TimeoutError(f"no answer in {request.timeout:.0f} s")
        return answer
