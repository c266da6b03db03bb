"""Laws of hostile servers: each ends in one message, soon, and in little memory.

Nothing here measures time: on a slow machine the results are the same.
"""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count, repeat
from pathlib import Path

import pytest

from exactflow.data import DataConfig, DataError, index_shards, load
from exactflow.data.streaming import indexing, remote

OK = b"HTTP/1.1 200 OK\r\n"
ENDLESS = 10**9  # pieces


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short limits, for servers that never answer properly."""
    monkeypatch.setattr(remote, "TIMEOUT", 0.1)


@contextmanager
def answering(pieces: Callable[[], Iterator[bytes]], pause: float = 0.0) -> Iterator[str]:
    """A server that answers every request with the same pieces, with a pause before each."""
    ended = threading.Event()

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(60)
            connection.recv(2**16)
            for piece in pieces():
                connection.sendall(piece)
                if ended.wait(pause):
                    return

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            if ended.is_set():
                connection.close()
                return
            others.append(threading.Thread(target=answer, args=(connection,)))
            others[-1].start()

    others: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=accept)
        thread.start()
        port = listening.getsockname()[1]
        try:
            yield f"http://127.0.0.1:{port}/set"
        finally:
            ended.set()
            socket.create_connection(("127.0.0.1", port)).close()
            for each in [thread, *others]:
                each.join()


def endless(head: bytes, piece: bytes) -> Callable[[], Iterator[bytes]]:
    def pieces() -> Iterator[bytes]:
        yield head
        yield from repeat(piece, ENDLESS)

    return pieces


def fetch(url: str, size: int, folder: Path) -> None:
    with (folder / "part").open("w+b") as stream:
        remote.download(f"{url}/0.tar", stream, size)


HEADS = {
    "100-continue for ever": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a head that drips": endless(OK, b"X"),
    "no head": endless(b"", b""),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_does_not_come_is_given_up(kind: str, tmp_path: Path, hasty: None) -> None:
    with answering(HEADS[kind], pause=0.01) as url:
        message = r"expected to read it, found 2 times in a row: .*Timeout"
        for action in (
            lambda: remote.size_of(f"{url}/0.tar"),
            lambda: remote.read(f"{url}/index.json", 1000),
            lambda: fetch(url, 10_000, tmp_path),
        ):
            with pytest.raises(DataError, match=message):
                action()


@pytest.mark.parametrize("pause", [0.01, 30.0], ids=["drips", "stalls"])
def test_a_body_that_hardly_comes_is_given_up(pause: float, tmp_path: Path, hasty: None) -> None:
    head = OK + b"Content-Length: 100000\r\n\r\n"
    with answering(endless(head + b"xx", b"x"), pause) as url:
        message = r"expected to read it, found 2 times in a row: .*Timeout"
        with pytest.raises(DataError, match=message):
            fetch(url, 100_000, tmp_path)
        with pytest.raises(DataError, match=message):
            remote.read(f"{url}/index.json", 100_000)


def test_nothing_is_read_beyond_the_known_size(tmp_path: Path) -> None:
    with answering(endless(OK + b"\r\n", bytes(2**16))) as url:
        with pytest.raises(DataError, match="expected 100,000 bytes, as when it was indexed"):
            fetch(url, 100_000, tmp_path)
        assert (tmp_path / "part").stat().st_size <= 100_000


def test_an_index_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "LARGEST_INDEX", 2**20)
    config = {"cache_dir": str(tmp_path)}
    for head in (OK + b"\r\n", OK + b"Content-Length: 9999999999999999\r\n\r\n"):
        message = r"index\.json: expected at most 1,048,576 bytes"
        with (
            answering(endless(head, bytes(2**16))) as url,
            pytest.raises(DataError, match=message),
        ):
            load(DataConfig(f"{url}/{{0..1}}.tar", **config), "train")


def test_a_redirection_is_followed_and_its_body_left_unread(tmp_path: Path) -> None:
    numbers = count()

    def pieces() -> Iterator[bytes]:
        if next(numbers) % 2:
            yield OK + b"Content-Length: 3\r\n\r\nabc"
            return
        yield b"HTTP/1.1 302 Found\r\nLocation: other\r\n\r\n"
        yield from repeat(bytes(2**16), ENDLESS)

    with answering(pieces) as url:
        fetch(url, 3, tmp_path)
        assert remote.size_of(f"{url}/0.tar") == 3
    assert (tmp_path / "part").read_bytes() == b"abc"


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: 1.tar\r\n\r\n", "infinite loop"),
        (
            b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
            "Redirection to url",
        ),
        (b"HTTP/1.1 206 Partial\r\n\r\n", "does not begin at byte 0"),
        (b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 5-9/10\r\n\r\n", "not begin at byte 0"),
    ],
)
def test_answers_without_sense_are_named(head: bytes, message: str, tmp_path: Path) -> None:
    with answering(lambda: iter([head])) as url, pytest.raises(DataError, match=message):
        fetch(url, 3, tmp_path)


def test_a_size_without_sense_is_none() -> None:
    for length in (b"x", b"-3", b"9" * 5000):
        head = OK + b"Content-Length: " + length + b"\r\n\r\n"
        with (
            answering(lambda head=head: iter([head])) as url,
            pytest.raises(DataError, match="the server does not say it"),
        ):
            remote.size_of(f"{url}/0.tar")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("http://h/{0..999999}{0..999999}.tar", "expected at most 1,000,000 files"),
        ("http://h/" + "{a,b}" * 5000 + ".tar", "expected at most 1,000,000 files"),
        ("http://h/{x{a,b" * 40 + "{0..99999}" + "}}" * 40 + ".tar", "expected"),
        ("http://h/" + "{a," * 100_000 + ".tar", "expected braces in pairs"),
        ("http://h/{0.." + "9" * 5000 + "}.tar", r"expected \{000\.\.099\}"),
    ],
)
def test_patterns_are_counted_before_they_are_written_down(
    pattern: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        index_shards(pattern, cache_dir=str(tmp_path))


def test_nested_choices_are_added_and_not_multiplied() -> None:
    wide = "h://x/{" + ",".join(f"{name}-{{000..999}}" for name in "abcdefghij") + "}.tar"
    urls = remote.expand(wide)
    assert len(urls) == 10_000
    assert (urls[0], urls[-1]) == ("h://x/a-000.tar", "h://x/j-999.tar")
