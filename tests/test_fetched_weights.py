"""Laws of downloaded weights: over https only, and only with the expected hash."""

import hashlib
import io
import urllib.request
from collections.abc import Callable
from http.client import HTTPResponse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exactflow.data.streaming import http_client, remote
from exactflow.metrics import inception
from exactflow.metrics.inception import PUBLIC_FILE, read_inception


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that were read; each returns b"weights"."""
    urls: list[str] = []

    def read(url: str, limit: int) -> bytes:
        urls.append(url)
        return b"weights"

    monkeypatch.setattr(remote, "read", read)
    return urls


def test_addresses_in_plain_text_are_refused(asked: list[str], tmp_path: Path) -> None:
    for url in (f"http://host/{PUBLIC_FILE}", f"HTTP://host/{PUBLIC_FILE}"):
        with pytest.raises(ValueError, match=r"expected Inception weights from https://, got"):
            read_inception(url, cache_dir=tmp_path)
    assert asked == []


def test_a_hash_is_asked_for_before_anything_is_fetched(asked: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected to know the file's SHA-256 before it is fetc"):
        read_inception("https://host/weights.pth", cache_dir=tmp_path)
    assert asked == []
    digest = hashlib.sha256(b"weights").hexdigest()
    known: list[Callable[[], object]] = [
        lambda: read_inception("https://host/weights.pth", digest, cache_dir=tmp_path),
        lambda: read_inception(f"https://host/weights-{digest[:8]}.pth", cache_dir=tmp_path),
    ]
    for read in known:
        with pytest.raises(ValueError, match="not a whole PyTorch file of plain tensors"):
            read()
    with pytest.raises(ValueError, match="SHA-256 begins with 6726825d, got"):
        read_inception(f"https://host/{PUBLIC_FILE}", cache_dir=tmp_path)
    assert len(asked) == 3
    assert len(list(tmp_path.iterdir())) == 2  # what has another hash is not kept


def test_a_file_beyond_the_limit_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception, "LARGEST_FILE", 10)
    (tmp_path / "x.pth").write_bytes(bytes(11))
    with pytest.raises(ValueError, match="expected Inception weights of at most 10 bytes"):
        read_inception(tmp_path / "x.pth")
    with pytest.raises(ValueError, match="expected at most 10 bytes, found 11 or more"):
        read_inception((tmp_path / "x.pth").as_uri(), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("first", "target", "refused"),
    [
        ("https://a/x", "http://a/x", True),
        ("https://a/x", "file:///x", True),
        ("http://a/x", "ftp://a/x", True),
        ("https://a/x", "https://b/y", False),
        ("https://a/x", "/y", False),
        ("http://a/x", "https://a/x", False),
    ],
)
def test_a_redirection_does_not_leave_https(
    first: str, target: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = f"HTTP/1.1 302 Found\r\nLocation: {target}\r\n\r\n".encode()
    connection: Any = SimpleNamespace(makefile=lambda mode: io.BytesIO(head))
    asked: list[str] = []

    def answer(self: object, kind: object, request: urllib.request.Request) -> HTTPResponse:
        asked.append(request.full_url)
        if len(asked) > 1:
            raise FileNotFoundError("the end")
        redirecting: Any = HTTPResponse(connection)
        redirecting.begin()
        redirecting.msg = redirecting.reason  # as urllib does
        return redirecting

    monkeypatch.setattr(http_client._HttpHandler, "_answer", answer)
    with (
        pytest.raises(OSError, match="edirection to" if refused else "the end"),
        http_client.opened(first, 0, 60.0),
    ):
        pass
    assert len(asked) == (1 if refused else 2)
