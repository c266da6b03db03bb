"""`exactflow prepare`."""

import sys
import time
from pathlib import Path

from rich.table import Table

from exactflow.cli.arguments import Prepare
from exactflow.cli.terminal import note, say
from exactflow.cli.words import parse_words
from exactflow.core.config import override
from exactflow.data import DataConfig, prepare, verify

OF_TRAINING = ("flip", "translate", "padding")


def run(command: Prepare) -> None:
    """Decode every split, and say what is there now; or check what was decoded before."""
    if command.out is None:
        if not command.verify:
            raise ValueError(f"expected a folder to write beside the source {command.source}")
        _verify(Path(command.source))
        return
    words = parse_words(command.settings, ("data",)).get("data", {})
    if "source" in words:
        raise ValueError(f"the source is {command.source}: expected no data.source beside it")
    for name in OF_TRAINING:
        if name in words:
            raise ValueError(f"data.{name} is a word of training: images are prepared without it")
    began = time.monotonic()
    try:
        splits = prepare(
            override(DataConfig(command.source), words),
            command.out,
            id=command.id,
            workers=command.workers,
            progress=True,
        )
    except KeyboardInterrupt:
        note("interrupted; the same command continues")
        sys.exit(130)
    if command.verify:
        _verify(command.out)
    some = splits["train"]
    table = Table(title=f"{some.id}, {some.version}, in {command.out}")
    for name in ("split", "images", "skipped", "shape", "levels", "classes", "fingerprint"):
        table.add_column(name, justify="left" if name in ("split", "fingerprint") else "right")
    for split, dataset in splits.items():
        shape = "x".join(map(str, dataset.event_shape))
        counts = f"{len(dataset):,}", f"{len(dataset.skipped):,}"
        facts = shape, str(dataset.levels), str(dataset.num_classes), dataset.fingerprint[:16]
        table.add_row(split, *counts, *facts)
    say(table)
    say(f"{time.monotonic() - began:.1f} s; read it with data.source={command.out}")


def _verify(folder: Path) -> None:
    prepared = verify(folder)
    count = sum(facts.count for facts in prepared.splits.values())
    say(f"{folder}: all {count:,} images are those that were prepared")
