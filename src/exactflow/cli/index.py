"""`exactflow index`."""

import time

from exactflow.cli.arguments import Index
from exactflow.cli.terminal import say
from exactflow.cli.words import parse_words
from exactflow.core.config import override
from exactflow.data import DataConfig, index_shards

WORDS = ("cache_dir", "cache_gib")


def run(command: Index) -> None:
    """Index every shard, and say what there is."""
    words = parse_words(command.settings, ("data",)).get("data", {})
    for name in words:
        if name not in WORDS:
            raise ValueError(f"data.{name}: expected data.{' or data.'.join(WORDS)} only")
    config = override(DataConfig(command.source), words)
    began = time.monotonic()
    shards, file = index_shards(
        command.source,
        command.out,
        cache_dir=config.cache_dir,
        cache_gib=config.cache_gib,
        progress=True,
    )
    images, size = sum(map(len, shards)), sum(shard.size for shard in shards)
    say(f"{len(shards):,} shards, {images:,} images, {size / 2**30:.3g} GiB, in {file}")
    say(f"{time.monotonic() - began:.1f} s")
