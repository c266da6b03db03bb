"""A folder of limited size with whole copies of remote shards, shared by any number of processes.

    SHA256.tar              a whole shard, under the hash of its content; the time of its last use
                            is the file's modification time
    KEY-SIZE.partial        one that is being fetched, or was; SIZE bytes are set aside for it
    .lock                   held while room is made

Who fetches a shard holds an exclusive lock on its partial file, who reads one a shared lock on the
file, and only files without a lock are removed: least recently used first, before anything is
written that would not fit. What a killed process leaves is taken up by the next one that wants it,
or removed for want of room. The folder should be on a disk of this machine.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, final

from exactflow.data import locks, remote
from exactflow.data.config import DataError
from exactflow.data.locks import lock, unlock

PATIENCE = 600.0  # seconds to wait for room while others hold all of it
_PAUSE = 0.05  # seconds


@final
@dataclass(frozen=True)
class RemoteShard:
    """A shard that lies elsewhere.

    Attributes:
        url: where.
        size: in bytes.
        sha256: of its content, in hex; None before it is indexed.
    """

    url: str
    size: int
    sha256: str | None


@final
class ShardCache:
    """See above.

    Args:
        folder: made if missing.
        limit: bytes; nothing is written that makes all files together larger.

    Raises:
        DataError: this system cannot lock files.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        if not locks.AVAILABLE:
            raise DataError(
                "streaming: expected a system that can lock files, such as Linux or macOS, found "
                f"{sys.platform}; copies of the shards on this disk can be read"
            )
        self.folder, self.limit = folder, limit

    @contextmanager
    def open(self, shard: RemoteShard) -> Iterator[BinaryIO]:
        """A whole shard with the content that was indexed, fetched if need be; it stays until then.

        Raises:
            DataError: it cannot be fetched, is another one than was indexed, or there is no room.
        """
        stream = None
        while stream is None:
            stream = self._present(shard) or self._fetched(shard, wait=True)
        try:
            yield stream
        finally:
            _let_go(stream)

    def fetch(self, shard: RemoteShard) -> None:
        """Have it here for whoever opens it, unless another process is fetching it right now.

        Raises:
            DataError: as in `open`.
        """
        stream = self._present(shard) or self._fetched(shard, wait=False)
        if stream is not None:
            _let_go(stream)

    def _file(self, sha256: str | None) -> Path:
        return self.folder / f"{sha256}.tar"

    def _present(self, shard: RemoteShard) -> BinaryIO | None:
        """The shard with a shared lock, if it is here."""
        file = self._file(shard.sha256)
        with suppress(FileNotFoundError):
            while self._present_size(shard) == shard.size:
                stream = file.open("rb")
                lock(stream, exclusive=False)
                if _is_at(stream, file):  # it was not removed before the lock was ours
                    os.utime(file)
                    return stream
                _let_go(stream)
        return None

    def _fetched(self, shard: RemoteShard, *, wait: bool) -> BinaryIO | None:
        """The shard with a shared lock, fetched now; None if another process did, or does."""
        if shard.size > self.limit:
            raise DataError(
                f"{shard.url}: expected at most {self.limit:,} bytes, which data.cache_gib leaves "
                f"room for, found {shard.size:,}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        key = hashlib.sha256(f"{shard.url}\0{shard.size}\0{shard.sha256}".encode()).hexdigest()
        partial = self.folder / f"{key[:32]}-{shard.size}.partial"
        stream = self._begun(partial, shard, wait)
        if stream is None:
            return None
        try:
            if _is_at(stream, partial):  # else whoever had it is through with it
                file = self._completed(stream, shard)
                with self._alone():
                    partial.replace(file)
                lock(stream, exclusive=False)
                if _is_at(stream, file):  # else it was removed for want of room
                    stream.seek(0)
                    return stream
        except BaseException:
            with suppress(OSError):  # what could not be written may still be in its buffer
                _let_go(stream)
            raise
        _let_go(stream)
        return None

    def _begun(self, partial: Path, shard: RemoteShard, wait: bool) -> BinaryIO | None:
        """The partial file with an exclusive lock and room for the rest; None as above."""
        deadline = time.monotonic() + PATIENCE
        while True:
            with self._alone():
                stream = self._room_for(partial, shard)
                if stream is not None and lock(stream, exclusive=True, wait=False):
                    return stream
            if stream is not None:
                if wait and lock(stream, exclusive=True):
                    return stream
                _let_go(stream)
                return None
            if not wait or self._present_size(shard) == shard.size:
                return None
            if time.monotonic() > deadline:
                raise DataError(
                    f"{shard.url}: expected {shard.size:,} bytes of room in {self.folder}, found "
                    f"{self.limit:,} in use for {PATIENCE:.0f} s; raise data.cache_gib"
                )
            time.sleep(_PAUSE)

    def _room_for(self, partial: Path, shard: RemoteShard) -> BinaryIO | None:
        """The partial file, which has its room; None if there is none, or the shard is here."""
        with suppress(FileNotFoundError):
            return partial.open("r+b")
        if self._present_size(shard) != shard.size and self._make_room(shard.size):
            return partial.open("x+b")
        return None

    def _present_size(self, shard: RemoteShard) -> int | None:
        with suppress(FileNotFoundError):
            return self._file(shard.sha256).stat().st_size
        return None

    def _completed(self, stream: BinaryIO, shard: RemoteShard) -> Path:
        """Fetch what is missing and compare the hash; what the file will be called."""
        if shard.sha256 is None:
            stream.truncate(0)  # nobody knows what this was a piece of
        continued = stream.seek(0, os.SEEK_END) > 0
        remote.download(shard.url, stream, shard.size)
        found = sha256_of(stream)
        if continued and found != shard.sha256:
            stream.truncate(0)  # the piece that was left may be of another one
            remote.download(shard.url, stream, shard.size)
            found = sha256_of(stream)
        if shard.sha256 not in (None, found):
            stream.truncate(0)
            raise DataError(
                f"{shard.url}: expected the content that was indexed, SHA-256 {shard.sha256}, "
                f"found {found}; if it was replaced, `exactflow index` takes note of it"
            )
        os.fsync(stream.fileno())
        return self._file(found)

    def _make_room(self, size: int) -> bool:
        """Remove files without a lock until so many bytes more would fit; whether they do."""
        held = {file: found for file in self.folder.iterdir() if (found := _held(file)) is not None}
        total = sum(taken for taken, _ in held.values())
        for file, (taken, _) in sorted(held.items(), key=lambda item: item[1][1]):
            if total + size <= self.limit:
                break
            if _removed(file):
                total -= taken
        return total + size <= self.limit

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (self.folder / ".lock").open("w") as stream:
            lock(stream, exclusive=True)
            try:
                yield
            finally:
                unlock(stream)


def _held(file: Path) -> tuple[int, int] | None:
    """Bytes that a file takes or will take, and when it was last used; None for other files."""
    with suppress(FileNotFoundError, ValueError):
        status = file.stat()
        if file.suffix == ".tar":
            return status.st_size, status.st_mtime_ns
        if file.suffix == ".partial":
            return int(file.stem.rpartition("-")[2]), status.st_mtime_ns
    return None


def _removed(file: Path) -> bool:
    """Remove a file unless somebody holds it."""
    try:
        with file.open("r+b") as stream:
            if not lock(stream, exclusive=True, wait=False):
                return False
            file.unlink()
            unlock(stream)
    except FileNotFoundError:
        pass  # it is no more
    except PermissionError:  # Windows: somebody has it open
        return False
    return True


def _let_go(stream: BinaryIO) -> None:
    unlock(stream)
    stream.close()


def _is_at(stream: BinaryIO, file: Path) -> bool:
    """Whether this very file is what lies there."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except FileNotFoundError:
        return False


def sha256_of(stream: BinaryIO) -> str:
    """Of the whole content of a file, in hex."""
    digest = hashlib.sha256()
    stream.seek(0)
    while chunk := stream.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()
