"""What can be typed for the verbs that prepare images."""

from dataclasses import dataclass
from pathlib import Path
from typing import final

import tyro

from exactflow.cli.arguments.shared import Maybe, TakesSettings


@final
@dataclass(frozen=True, kw_only=True)
class Prepare(TakesSettings):
    """Decode a source of images once, into a folder that trainings read.

    The same command continues an interrupted one. Afterwards data.source=OUT reads the folder;
    numbers, fingerprints and runs are those of the source itself with the same settings.
    """

    source: tyro.conf.Positional[str]
    """Images, IDX, parquet, tar or batch files, URLs of tar files, hub:owner/name."""
    out: tyro.conf.Positional[Maybe[Path]] = None
    """Folder to write, outside the source. Without it, --verify checks the folder SOURCE."""
    id: Maybe[str] = None
    """Name of the set; by default the source's. A published set's name is checked against it."""
    workers: Maybe[int] = None
    """Threads that decode; by default one per core."""
    verify: bool = False
    """Read the prepared folder again and compare it with its hashes and fingerprints."""


@final
@dataclass(frozen=True, kw_only=True)
class Index(TakesSettings):
    """Read tar shards once and write an index, so that they can be streamed.

    The settings data.cache_dir and data.cache_gib bound the disk that shards take meanwhile.
    """

    source: tyro.conf.Positional[str]
    """URLs such as 'https://host/set/train-{000..099}.tar', or a folder of tar files."""
    out: Maybe[Path] = None
    """File to write; by default FOLDER/index.json. It is found if it lies beside the shards."""
