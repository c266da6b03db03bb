"""A folder of limited size with whole copies of remote shards, shared by any number of processes.

    SHA256.tar              a whole shard, under the hash of its content; the time of its last use
                            is the file's modification time
    SHA256.NUMBER.pin       locked by who reads the shard, which stays so long
    KEY-SIZE.partial        one that is being fetched, or was; SIZE bytes are set aside for it
    KEY-SIZE.claim          locked by who fetches it
    .lock                   held while any of them is begun, renamed or removed

Only files that nobody reads or fetches are removed: least recently used first, before anything is
written that would not fit. Locks go with their process, however it ends: what a killed one leaves
is taken up by the next that wants it, or removed for want of room. The folder should be on a disk
of this machine.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import final
from uuid import uuid4

from filelock import FileLock, Timeout

from exactflow.data.config import DataError
from exactflow.data.files import sha256_of
from exactflow.data.streaming import remote

PATIENCE = 600.0  # seconds to wait for room while others hold all of it
_PAUSE = 0.05  # seconds between two looks for room
_POLL = 0.002  # seconds between two looks whether a lock is free, of those that are held shortly


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
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    @contextmanager
    def open(self, shard: RemoteShard) -> Iterator[BufferedReader]:
        """A whole shard with the content that was indexed, fetched if need be; it stays until then.

        Raises:
            DataError: it cannot be fetched, is another one than was indexed, or there is no room.
        """
        pin = None
        while pin is None:
            pin = self._present(shard) or self._fetched(shard, wait=True)
        try:
            with pin.file.open("rb") as stream:
                yield stream
        finally:
            pin.release()

    def fetch(self, shard: RemoteShard) -> None:
        """Download a shard unless it is here, or another process is fetching it right now.

        Raises:
            DataError: as in `open`.
        """
        pin = self._present(shard) or self._fetched(shard, wait=False)
        if pin is not None:
            pin.release()

    def _file(self, sha256: str | None) -> Path:
        return self.folder / f"{sha256}.tar"

    def _present(self, shard: RemoteShard) -> _Pin | None:
        """The shard, if it is here."""
        if self._present_size(shard) != shard.size:
            return None
        with self._alone():
            if self._present_size(shard) != shard.size:  # it was removed meanwhile
                return None
            file = self._file(shard.sha256)
            os.utime(file)
            return _Pin.of(file)

    def _fetched(self, shard: RemoteShard, *, wait: bool) -> _Pin | None:
        """The shard, fetched now; None if another process did, or does."""
        if shard.size > self.limit:
            raise DataError(
                f"{shard.url}: expected at most {self.limit:,} bytes, which data.cache_gib leaves "
                f"room for, found {shard.size:,}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        key = hashlib.sha256(f"{shard.url}\0{shard.size}\0{shard.sha256}".encode()).hexdigest()
        partial = self.folder / f"{key[:32]}-{shard.size}.partial"
        claim = self._claimed(partial, shard, wait)
        if claim is None:
            return None
        with claim:
            stream = partial.open("r+b")
            try:
                file = self._completed(stream, shard)
            finally:
                with suppress(OSError):  # what could not be written may still be in its buffer
                    stream.close()
            with self._alone():
                partial.replace(file)
                _claim_file(partial).unlink()
                return _Pin.of(file)

    def _claimed(self, partial: Path, shard: RemoteShard, wait: bool) -> FileLock | None:
        """A held claim on the partial file, which has room for the rest; None as above."""
        claim = _lock(_claim_file(partial))
        deadline = time.monotonic() + PATIENCE
        while True:
            with self._alone():
                if self._present_size(shard) == shard.size:
                    return None
                has_room = partial.exists() or self._make_room(shard.size)
                if has_room:
                    with suppress(Timeout):
                        claim.acquire(blocking=False)
                        partial.touch()
                        return claim
            if not wait:
                return None
            if has_room:
                with claim:  # who had it is through with it, or was killed
                    return None
            if time.monotonic() > deadline:
                raise DataError(
                    f"{shard.url}: expected {shard.size:,} bytes of room in {self.folder}, found "
                    f"{self.limit:,} in use for {PATIENCE:.0f} s; raise data.cache_gib"
                )
            time.sleep(_PAUSE)

    def _present_size(self, shard: RemoteShard) -> int | None:
        with suppress(FileNotFoundError):
            return self._file(shard.sha256).stat().st_size
        return None

    def _completed(self, stream: BufferedRandom, shard: RemoteShard) -> Path:
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

    def _alone(self) -> FileLock:
        return _lock(self.folder / ".lock")


@final
@dataclass(frozen=True)
class _Pin:
    """Keeps a shard here until it is released."""

    file: Path
    lock: FileLock

    @classmethod
    def of(cls, file: Path) -> _Pin:
        """A pin on a file; no other process removes files meanwhile."""
        lock = _lock(file.with_suffix(f".{uuid4().hex}.pin"))
        lock.acquire()
        return cls(file, lock)

    def release(self) -> None:
        """Let the file be removed."""
        self.lock.release()
        with suppress(OSError):  # who makes room may have removed it
            Path(self.lock.lock_file).unlink()


def _lock(file: Path) -> FileLock:
    """A lock that any thread may release, as readers that are abandoned do."""
    return FileLock(file, poll_interval=_POLL, thread_local=False)


def _claim_file(partial: Path) -> Path:
    return partial.with_suffix(".claim")


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
    is_whole = file.suffix == ".tar"
    for held in file.parent.glob(f"{file.stem}.*.pin") if is_whole else [_claim_file(file)]:
        try:
            with _lock(held).acquire(blocking=False):
                held.unlink(missing_ok=True)  # who had it was killed
        except Timeout:
            return False
    with suppress(PermissionError):  # Windows: somebody else has it open
        file.unlink(missing_ok=True)
    return not file.exists()
