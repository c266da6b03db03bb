"""What can be typed for the verbs that compare and study models."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, final

import tyro

from exactflow.cli.arguments.shared import (
    Device,
    Many,
    Maybe,
    OfImages,
    Source,
    Split,
    TakesSettings,
)


@final
@dataclass(frozen=True, kw_only=True)
class Compare(TakesSettings):
    """Train models under one budget, measure them on the same images, write a report.

    Models that are trained already are only measured. The same command continues an interrupted
    one: what the folder holds of the same models, data and protocol is not measured again.
    """

    sections: ClassVar[tuple[str, ...]] = ("data", "protocol")
    models: tyro.conf.Positional[Many[str]]
    """Presets, run folders, model folders, hub ids, or models that come with the package."""
    data: Source = "digits"
    """Source of the images, as in data.source."""
    budget: str = "5m"
    """Of each training: 90s, 5m or 2h of optimizer steps, or work such as 1e15flop."""
    inception: Maybe[str] = None
    """Path or URL of the public Inception weights, for FID; a URL ends in #SHA-256's beginning."""
    out: Path = Path("runs/compare")
    """Folder for the report, the runs and all measurements."""
    device: Device = "auto"
    """Where to compute; auto is the accelerator, if there is one."""


@final
@dataclass(frozen=True, kw_only=True)
class Convergence(OfImages):
    """Measure how soon Jacobi iteration inverts each block of a flow.

    Two published metrics of the block's Jacobian, beside the iterations themselves.
    """

    split: Split = "test"
    """Where the images come from."""
    n: int = 64
    """Number of images, from the start of the split; they are evaluated together."""
    norm: Literal["2", "1", "fro"] = "2"
    """Matrix norm: largest singular value, largest column sum, or Frobenius."""
    seed: int = 0
    """Seed of the noise, where the model was trained with Gaussian noise."""


@final
@dataclass(frozen=True, kw_only=True)
class Results:
    """Show published numbers of a data set, beside your own.

    Numbers are grouped by version of the data and kind of likelihood, and ranked inside a group
    only. † marks what does not compare with the main group: your run's, else the largest.
    """

    dataset: tyro.conf.Positional[Maybe[str]] = None
    """Such as imagenet64; none lists the data sets."""
    metric: Maybe[Literal["bits/dim", "fid"]] = None
    """Only this one."""
    runs: Many[Path] = ()
    """Results of your own: JSON files of `evaluate --out`, or folders that hold them."""
    group: Maybe[str] = None
    """Label of the main group, as the table prints it: "new, ODE(1)"."""
    out: Maybe[Path] = None
    """Also write the table, to a .md or a .json file."""


@final
@dataclass(frozen=True, kw_only=True)
class Demo(TakesSettings):
    """Train, score and sample a small TarFlow on built-in images, write a report."""

    sections: ClassVar[tuple[str, ...]] = ("model", "training", "data", "run")
    out: Path = Path("runs/demo")
    """Run folder."""
