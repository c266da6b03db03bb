"""What can be typed for the verbs that prepare images. Nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

import tyro

from exactflow.cli.argument_types import Settings


@final
@dataclass(frozen=True)
class Prepare:
    """Decode a source once into a folder that `data.source=FOLDER` reads at once, or go on with it.

    KEY=VALUE words with keys data.* say what is done to the images and how they are split. Numbers,
    fingerprints and runs are those of the source itself under the same words.
    """

    source: Annotated[str, tyro.conf.Positional]
    """Folder of images, IDX, parquet, tar or batch files, one such file, URLs of tar files, or
    hub:owner/name; with --verify alone, a prepared folder."""
    out: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder to write, outside the source; the same command continues an interrupted one."""
    settings: Settings = ()
    id: str | None = None
    """Name of the set, by default the source's. imagenet64-old or imagenet64-new say which of the
    two it is, and are refused where shape, number of validation images or labels do not fit."""
    workers: int | None = None
    """Threads that decode; by default one per core."""
    verify: bool = False
    """Compare all of the prepared folder with its hashes and fingerprints, at the end or alone."""


@final
@dataclass(frozen=True)
class Index:
    """Read tar shards once and write down what they hold, so that they can be streamed.

    KEY=VALUE words with keys data.* name the cache folder that shards pass through.
    """

    source: Annotated[str, tyro.conf.Positional]
    """URLs such as 'https://host/set/train-{000..099}.tar', or a folder of tar files here."""
    settings: Settings = ()
    out: Path | None = None
    """File to write too, which is found if it lies beside the shards as index.json; for a folder
    here, FOLDER/index.json by default."""
