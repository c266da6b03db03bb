"""Types that the arguments of several verbs share."""

from typing import Literal

import tyro

# KEY=VALUE words, wherever they stand on the command line: `main` takes them out and hands them on
Settings = tyro.conf.Suppress[tuple[str, ...]]
Device = Literal["auto", "cpu", "cuda", "mps"]
