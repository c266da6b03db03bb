"""One answer of an HTTP server, whose head arrives within a time limit.

`urllib` waits for every byte separately: a server that sends a byte now and then, or "100 continue"
for ever, would be waited for without end. It also reads the whole body of an answer that redirects.
"""

from __future__ import annotations

import http.client
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPMessage, HTTPResponse, HTTPSConnection
from typing import Any, final
from urllib.parse import urlsplit
from urllib.request import Request

_SPAN = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")
_NUMBER = re.compile(r"[0-9]{1,18}")


@final
@dataclass(frozen=True)
class Answer:
    """A file of `total` bytes (None: unknown), readable from byte `start` on.

    `read` returns at most that many bytes, without waiting for all of them where it can do that.
    """

    read: Callable[[int], bytes]
    start: int
    total: int | None


@contextmanager
def opened(url: str, start: int, timeout: float) -> Iterator[Answer]:
    """A file from byte `start` on, or from its beginning where the server cannot do better.

    Args:
        url: address of the file.
        start: first byte.
        timeout: most seconds for the head of an answer, and for each byte of its body.

    Raises:
        FileNotFoundError, PermissionError: the file is missing, or access is refused.
        OSError, HTTPException: anything else.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _RedirectHandler(),
        _HttpHandler(),
    ):
        opener.add_handler(handler)
    headers = {"Accept-Encoding": "identity", "User-Agent": "exactflow"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        answer = opener.open(Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if start and error.code == 416:  # the file has fewer bytes
            with opened(url, 0, timeout) as whole:
                yield whole
            return
        if error.code in (404, 410):
            raise FileNotFoundError(f"HTTP status {error.code}") from error
        if error.code in (401, 403):
            raise PermissionError(f"HTTP status {error.code}") from error
        raise
    assert isinstance(answer, HTTPResponse)  # of _HttpHandler
    with closing(answer):
        if answer.status == 206:
            span = _SPAN.fullmatch(answer.headers["Content-Range"] or "")
            if span is None or int(span[1]) != start:
                raise ConnectionError(f"a part of a file that does not begin at byte {start:,}")
            yield Answer(answer.read1, start, None if span[2] == "*" else int(span[2]))
        else:
            length = _NUMBER.fullmatch(answer.headers["Content-Length"] or "")
            yield Answer(answer.read1, 0, int(length[0]) if length else None)


@final
class _RedirectHandler(urllib.request.HTTPRedirectHandler):
    """Follows redirections without reading their bodies, and none from https to plain text."""

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        fp.close()  # urllib would read the body, which need not end
        if urlsplit(newurl).scheme not in ("https", urlsplit(req.full_url).scheme):
            raise ConnectionError(f"a redirection to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@final
class _HttpHandler(urllib.request.AbstractHTTPHandler):
    """Shuts a connection down if the head of the answer does not arrive in time."""

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def http_open(self, request: Request) -> HTTPResponse:
        """Called by urllib for http."""
        return self._answer(HTTPConnection, request)

    def https_open(self, request: Request) -> HTTPResponse:
        """Called by urllib for https."""
        return self._answer(HTTPSConnection, request)

    def _answer(self, kind: type[HTTPConnection], request: Request) -> HTTPResponse:
        made: list[HTTPConnection] = []
        answered, late = threading.Event(), threading.Event()

        def connection(host: str, /, **options: Any) -> HTTPConnection:
            made.append(kind(host, **options))
            return made[0]

        def watch() -> None:
            while not answered.wait(request.timeout):
                late.set()
                for each in made:
                    connected = each.sock
                    if connected is not None:
                        with suppress(OSError):
                            connected.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=watch, daemon=True).start()
        try:
            answer = self.do_open(connection, request)
        except (OSError, http.client.HTTPException) as error:
            if late.is_set():
                raise TimeoutError(f"no answer in {request.timeout:.0f} s") from error
            raise
        finally:
            answered.set()
        if late.is_set():  # a head that was cut off looks like a whole one
            answer.close()
            raise TimeoutError(f"no answer in {request.timeout:.0f} s")
        return answer
