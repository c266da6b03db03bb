"""A folder of limited size with whole copies of remote shards, shared by any number of processes.

    SHA256.tar              a whole shard, named by the hash of its content; its modification time
                            is the time of its last use
    SHA256.NUMBER.pin       locked by a reader of the shard, which is not removed meanwhile
    KEY-SIZE.partial        a shard that is being fetched, or was; SIZE bytes are reserved for it
    KEY-SIZE.claim          locked by the process that fetches it
    .lock                   locked while any of these files is made, renamed or removed

Only files that no process reads or fetches are removed: least recently used first, before a file is
written that would not fit. Locks end with their process, however it ends: the partial file of a
killed process is continued by the next one that needs it, or removed to make room. The folder
should be on a disk of this machine.
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

PATIENCE = 600.0  # seconds to wait for room while all files are in use
_PAUSE = 0.05  # seconds between two attempts to make room
_POLL = 0.002  # seconds between two attempts to lock a file


@final
@dataclass(frozen=True)
class RemoteShard:
    """A shard on a server.

    Attributes:
        url: its address.
        size: in bytes.
        sha256: of its content, in hex; None before it is indexed.
    """

    url: str
    size: int
    sha256: str | None


@final
class ShardCache:
    """The cache described above.

    Args:
        folder: made if missing.
        limit: most bytes of all files together.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    @contextmanager
    def open(self, shard: RemoteShard) -> Iterator[BufferedReader]:
        """Download a shard unless it is cached; it stays in the cache while it is open.

        Raises:
            DataError: it cannot be fetched, has other content than was indexed, or there is no
                room for it.
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
        """Download a shard unless it is cached, or being fetched; errors as of `open`."""
        pin = self._present(shard) or self._fetched(shard, wait=False)
        if pin is not None:
            pin.release()

    def _file(self, sha256: str | None) -> Path:
        return self.folder / f"{sha256}.tar"

    def _present(self, shard: RemoteShard) -> _Pin | None:
        """A pin on the shard, if it is cached."""
        if not self._is_present(shard):
            return None
        with self._folder_lock():
            if not self._is_present(shard):  # it was removed meanwhile
                return None
            file = self._file(shard.sha256)
            os.utime(file)
            return _Pin.of(file)

    def _fetched(self, shard: RemoteShard, *, wait: bool) -> _Pin | None:
        """A pin on the shard after fetching it; None if another process fetched it, or does."""
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
            with self._folder_lock():
                partial.replace(file)
                _claim_file(partial).unlink()
                return _Pin.of(file)

    def _claimed(self, partial: Path, shard: RemoteShard, wait: bool) -> FileLock | None:
        """The locked claim on the partial file, for which room is reserved; None as above."""
        claim = _lock(_claim_file(partial))
        deadline = time.monotonic() + PATIENCE
        while True:
            with self._folder_lock():
                if self._is_present(shard):
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
                with claim:  # the process that held it has finished, or was killed
                    return None
            if time.monotonic() > deadline:
                raise DataError(
                    f"{shard.url}: expected {shard.size:,} bytes of room in {self.folder}, found "
                    f"{self.limit:,} in use for {PATIENCE:.0f} s; raise data.cache_gib"
                )
            time.sleep(_PAUSE)

    def _is_present(self, shard: RemoteShard) -> bool:
        with suppress(FileNotFoundError):
            return self._file(shard.sha256).stat().st_size == shard.size
        return False

    def _completed(self, stream: BufferedRandom, shard: RemoteShard) -> Path:
        """Fetch the missing bytes and compare the hash; returns the final path."""
        if shard.sha256 is None:
            stream.truncate(0)  # the rest may be of other content
        continued = stream.seek(0, os.SEEK_END) > 0
        remote.download(shard.url, stream, shard.size)
        found = sha256_of(stream)
        if continued and found != shard.sha256:
            stream.truncate(0)  # the bytes that were there may be of other content
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
        """Remove unused files until `size` more bytes fit; returns whether they do."""
        found = {file: use for file in self.folder.iterdir() if (use := _size_and_use(file))}
        total = sum(taken for taken, _ in found.values())
        for file, (taken, _) in sorted(found.items(), key=lambda item: item[1][1]):
            if total + size <= self.limit:
                break
            if _remove_unused(file):
                total -= taken
        return total + size <= self.limit

    def _folder_lock(self) -> FileLock:
        return _lock(self.folder / ".lock")


@final
@dataclass(frozen=True)
class _Pin:
    """Keeps a shard in the cache until it is released."""

    file: Path
    lock: FileLock

    @classmethod
    def of(cls, file: Path) -> _Pin:
        """A pin on a file; the caller holds the folder's lock."""
        lock = _lock(file.with_suffix(f".{uuid4().hex}.pin"))
        lock.acquire()
        return cls(file, lock)

    def release(self) -> None:
        """Let the file be removed."""
        self.lock.release()
        with suppress(OSError):  # another process may have removed it to make room
            Path(self.lock.lock_file).unlink()


def _lock(file: Path) -> FileLock:
    """A lock that any thread may release, since readers can be closed in another thread."""
    return FileLock(file, poll_interval=_POLL, thread_local=False)


def _claim_file(partial: Path) -> Path:
    return partial.with_suffix(".claim")


def _size_and_use(file: Path) -> tuple[int, int] | None:
    """Final bytes of a shard's file and its time of last use; None for other files."""
    with suppress(FileNotFoundError, ValueError):
        status = file.stat()
        if file.suffix == ".tar":
            return status.st_size, status.st_mtime_ns
        if file.suffix == ".partial":
            return int(file.stem.rpartition("-")[2]), status.st_mtime_ns
    return None


def _remove_unused(file: Path) -> bool:
    """Remove a file unless a process reads or fetches it; returns whether it is gone."""
    is_whole = file.suffix == ".tar"
    for mark in file.parent.glob(f"{file.stem}.*.pin") if is_whole else [_claim_file(file)]:
        try:
            with _lock(mark).acquire(blocking=False):
                mark.unlink(missing_ok=True)  # its process was killed
        except Timeout:
            return False
    with suppress(PermissionError):  # Windows: another process has it open
        file.unlink(missing_ok=True)
    return not file.exists()
