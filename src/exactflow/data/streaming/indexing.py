"""Indexes of streamed shards: made once, one shard at a time, and found again.

An index lies in the cache folder, under a hash of the shards' URLs, or beside the shards as
`index.json`, which is read if the cache folder has none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import final
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from exactflow.core.files import write_atomically
from exactflow.core.progress import shown_progress
from exactflow.data.config import DataConfig, DataError, Split, cache_folder, is_remote
from exactflow.data.files import sha256_of
from exactflow.data.formats import tar_index
from exactflow.data.formats.shards import shard_groups
from exactflow.data.formats.tar_index import TarIndex
from exactflow.data.journal import read_journal
from exactflow.data.splits import by_split, is_only_a_split
from exactflow.data.streaming import remote
from exactflow.data.streaming.shard_cache import RemoteShard, ShardCache

INDEX_FILE = "index.json"
LARGEST_INDEX = 2**28  # bytes that are taken from a server; one of a million images has 60 MB

_AT_ONCE = 4  # shards that are fetched or walked
_Walk = Callable[[str], TarIndex]  # from the name of a shard


@final
@dataclass(frozen=True)
class RemoteSet:
    """Shards below one URL.

    Attributes:
        root: the URL of their folder, which ends in a slash.
        names: of the shards below it, sorted as they are read; empty means all in the index.
    """

    root: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, pattern: str) -> RemoteSet:
        """The shards that a pattern means: tar files, a folder, or its index; or a DataError."""
        urls = remote.expand(pattern)
        if len(urls) == 1 and urls[0].endswith(f"/{INDEX_FILE}"):
            return cls(urls[0].removesuffix(INDEX_FILE), ())
        if len(urls) == 1 and not PurePosixPath(urlsplit(urls[0]).path).suffix:
            return cls(f"{urls[0].rstrip('/')}/", ())
        for url in urls:
            if not url.endswith(".tar"):
                raise DataError(
                    f"{pattern}: expected URLs of .tar files, of a folder with an {INDEX_FILE}, or "
                    f"of that file, found {url}"
                )
        folders = {url.rpartition("/")[0] for url in urls}
        root = min(folders)
        while not all(f"{folder}/".startswith(f"{root}/") for folder in folders):
            root = root.rpartition("/")[0]
            if root.endswith(":/"):
                raise DataError(f"{pattern}: expected shards of one host, found several")
        return cls(f"{root}/", tuple(sorted(url.removeprefix(f"{root}/") for url in urls)))

    @property
    def title(self) -> str:
        """Name of the set: of its folder, or of the one above if the folder's is a split's name."""
        parts = urlsplit(self.root)
        names = [part for part in (parts.netloc, *parts.path.split("/")) if part] or ["shards"]
        above = len(names) > 1 and is_only_a_split(names[-1])
        return names[-2] if above else names[-1]

    def url(self, name: str) -> str:
        """Of a shard."""
        return self.root + name

    def by_split(self, shards: Sequence[TarIndex]) -> dict[Split, list[TarIndex]]:
        """The shards by the split that their folder and name say; see `splits.by_split`."""
        shard_at = {self.url(shard.name): shard for shard in shards}
        names = {
            url: "/".join(PurePosixPath(shard.name).parts[-2:]) for url, shard in shard_at.items()
        }
        groups = by_split(names, self.root, "shards")
        return {split: [shard_at[url] for url in urls] for split, urls in groups.items()}


def find_index(pattern: str, cache_dir: str | None) -> tuple[RemoteSet, tuple[TarIndex, ...]]:
    """The shards that a pattern means, and their indexes, from the cache folder or beside them.

    Raises:
        DataError: the index is missing or damaged, or lacks a shard.
    """
    found = RemoteSet.of(pattern)
    kept = _index_path(found, cache_dir)
    shards = tar_index.read_kept(kept)
    if shards is not None:
        return found, shards
    beside = found.url(INDEX_FILE)
    content = remote.read(beside, LARGEST_INDEX)
    if content is None:
        raise DataError(
            f"{pattern}: expected an index of the shards, found neither {beside} nor {kept}; "
            f"it is made once: exactflow index '{pattern}'"
        )
    indexed = {shard.name: shard for shard in tar_index.read_index(content, beside)}
    for name in found.names:
        if name not in indexed:
            raise DataError(f"{beside}: expected the shard {name}, found {len(indexed)} others")
    shards = tuple(indexed[name] for name in found.names or sorted(indexed))
    for shard in shards:
        if shard.sha256 is None:
            raise DataError(f"{beside}: expected the SHA-256 of {shard.name}, found none")
    if not shards:
        raise DataError(f"{beside}: expected shards, found none")
    _write(kept, tar_index.write_index(shards))
    return found, shards


def index_shards(
    source: str,
    out: Path | None = None,
    *,
    cache_dir: str | None = None,
    cache_gib: float = DataConfig.cache_gib,
    progress: bool = False,
) -> tuple[tuple[TarIndex, ...], Path]:
    """Read every shard of a set once, and write their index.

    Remote shards go through the cache folder, a few at a time. The next call continues an
    interrupted one; after a finished one it reads all shards again, since they may have changed.

    Args:
        source: URLs of tar files in a pattern, or a folder of tar files on this machine.
        out: another file for the index; by default, `index.json` in a folder of this machine,
            which can then be uploaded as it is, and none for URLs.
        cache_dir: as in `DataConfig`.
        cache_gib: as in `DataConfig`.
        progress: whether to show progress on stderr.

    Returns:
        The index and the file that it is in.

    Raises:
        DataError: a shard is missing, damaged or cut short, or another process is indexing them.
    """
    if is_remote(source):
        found = RemoteSet.of(source)
        if not found.names:
            raise DataError(f"{source}: expected URLs that name every .tar file, found a folder")
        cache = ShardCache(cache_folder(cache_dir) / "shards", round(cache_gib * 2**30))
        kept = _index_path(found, cache_dir)
        shards = _indexed(
            found.names, lambda name: _fetched(found.url(name), name, cache), kept, progress
        )
        files = [kept] if out is None else [kept, out]
    else:
        path = Path(source).expanduser()
        root = path if path.is_dir() else path.parent
        files = [file for group in shard_groups(path).values() for file in group]
        names = sorted(file.relative_to(root).as_posix() for file in files)
        if not names:
            raise DataError(f"{source}: expected .tar files, found none")
        key = _index_path(RemoteSet(f"{root.resolve()}/", tuple(names)), cache_dir)
        shards = _indexed(
            names, lambda name: tar_index.index_file(root / name, name), key, progress
        )
        files = [out or root / INDEX_FILE]
    for file in files:
        _write(file, tar_index.write_index(shards))
    return shards, files[-1]


def _indexed(names: Sequence[str], walk: _Walk, kept: Path, progress: bool) -> tuple[TarIndex, ...]:
    """The index of every shard; a journal keeps finished ones until all are."""
    file = kept.with_suffix(".journal")
    with _locked(file):
        entries = read_journal(file, lambda fields: tar_index.from_fields(fields, str(file)))
        done = {shard.name: shard for shard in entries}
        left = [name for name in names if name not in done]
        threads = ThreadPoolExecutor(_AT_ONCE)
        before = len(names) - len(left)
        with (
            file.open("ab") as journal,
            shown_progress(
                len(names), "indexing", unit="shards", done=before, quiet=not progress
            ) as advance,
        ):
            try:
                for name, shard in zip(left, threads.map(walk, left), strict=True):
                    journal.write(tar_index.to_line(shard).encode() + b"\n")
                    journal.flush()
                    done[name] = shard
                    advance(1)
            finally:
                threads.shutdown(wait=False, cancel_futures=True)
        file.unlink()
    return tuple(done[name] for name in names)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Lock a journal against other processes, with a file beside it that stays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(file.with_suffix(".lock"), blocking=False):
            yield
    except Timeout:
        raise DataError(f"{file}: another process is indexing these shards") from None


def _fetched(url: str, name: str, cache: ShardCache) -> TarIndex:
    size = remote.size_of(url)
    with cache.open(RemoteShard(url, size, None)) as stream:
        sha256 = sha256_of(stream)
        return tar_index.index_tar(stream, name, size, sha256, url)


def _index_path(found: RemoteSet, cache_dir: str | None) -> Path:
    """The file in the cache folder for the index of these shards."""
    key = hashlib.sha256(json.dumps([found.root, *found.names]).encode()).hexdigest()
    return cache_folder(cache_dir) / "indexes" / f"{key}.json"


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content)
