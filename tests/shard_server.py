"""An HTTP server of shards in memory that can be made to fail.

    python shard_server.py CACHE_DIR URL LIMIT BATCHES [FIRST]

reads so many training batches as another process and prints their hash.
"""

import hashlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from typing import Any

from exactflow.data import DataConfig, ImageDataset, load, order, training_batches
from exactflow.data.streaming import remote

BEGINNING = 0  # a request without a range


class Shards:
    """The files that are served, and the faults of serving them.

    Attributes:
        files: contents by name.
        ranges: whether a file can be asked for from a byte on.
        cuts: names of which so many next answers stop half way.
        status: names of which the next answers are nothing but a number.
        pause: seconds between pieces of an answer.
        asked: (name, first byte) of every request.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.ranges, self.pause = files, True, 0.0
        self.cuts: Counter[str] = Counter()
        self.status: dict[str, list[int]] = {}
        self.asked: list[tuple[str, int]] = []
        self.url = ""

    def times(self, name: str) -> int:
        return sum(asked == name for asked, _ in self.asked)


@contextmanager
def served(files: dict[str, bytes]) -> Iterator[Shards]:
    shards = Shards(files)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/set/")
            wanted = self.headers.get("Range", f"bytes={BEGINNING}-")
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if shards.ranges else 0
            shards.asked.append((name, start))
            codes = shards.status.get(name, [])
            content = shards.files.get(name)
            if content is None or codes:
                self.send_error(codes.pop(0) if codes else 404)
                return
            if start >= len(content) > 0:
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            if start:
                span = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.send_header("Content-Range", span)
            part = content[start:]
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if shards.cuts[name]:
                shards.cuts[name] -= 1
                part = part[: len(part) // 2]
            try:
                for first in range(0, len(part), 1000):
                    self.wfile.write(part[first : first + 1000])
                    time.sleep(shards.pause)
            except (BrokenPipeError, ConnectionResetError):
                pass

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    shards.url = f"http://127.0.0.1:{server.server_address[1]}/set"
    try:
        yield shards
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def few_mixed() -> None:
    """Shuffle groups of two shards instead of thousands of images."""
    order.MIXED_SHARDS, order.MIXED_IMAGES = 2, 0


def digest(dataset: ImageDataset, batches: int, **options: Any) -> str:
    """Hash of training batches."""
    found = hashlib.sha256()
    for batch in islice(training_batches(dataset, 7, seed=3, **options), batches):
        assert batch.labels is not None
        for part in (batch.images, batch.labels, batch.indices):
            found.update(part.numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    few_mixed()
    remote._CHUNK = 1000
    cache_dir, url, limit, count, *first = sys.argv[1:]
    config = DataConfig(
        url, test_fraction=0.0, validation_fraction=0.0, cache_dir=cache_dir, cache_gib=float(limit)
    )
    start = int(first[0]) if first else 0
    print(digest(load(config, "train"), int(count), start=start))
