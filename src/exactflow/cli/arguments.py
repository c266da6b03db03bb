"""What can be typed. Nothing here imports torch: `--help` answers at once."""

import re
import signal
import sys
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal, final

import tyro

# KEY=VALUE words, wherever they stand on the command line: `main` takes them out and hands them on
Settings = tyro.conf.Suppress[tuple[str, ...]]
_SETTING = re.compile(r"[\w.]+=")
Solver = Literal[
    "auto",
    "sequential",
    "jacobi",
    "gauss-seidel-jacobi",
    "selective",
    "adaptive",
    "euler",
    "midpoint",
    "heun",
    "dopri5",
    "dpm++",
    "ancestral",
    "ddim",
]
Device = Literal["auto", "cpu", "cuda", "mps"]


@final
@dataclass(frozen=True)
class Train:
    """Train a preset, or resume: the same command continues an interrupted run.

    Any number of KEY=VALUE words may follow, with the keys model.*, training.*, data.* and run.*
    that `exactflow info PRESET` lists: `exactflow train tarflow-digits training.steps=500`. The
    model takes its image shape, grey levels and number of classes from the data unless given.
    """

    preset: Annotated[str | None, tyro.conf.Positional] = None
    """What to train; may also stand in the --config file."""
    settings: Settings = ()
    config: Path | None = None
    """YAML file with `preset` and the sections model, training, data, run."""
    out: Path | None = None
    """Run folder; runs/PRESET by default."""
    device: Device = "auto"


@final
@dataclass(frozen=True)
class Sample:
    """Draw images from a model; sample k belongs to seed k."""

    model: Annotated[str, tyro.conf.Positional]
    """Model folder, run folder or hub id."""
    n: int = 16
    """Number of samples."""
    label: tuple[int, ...] = ()
    """One class for all, or one for each sample."""
    seed: int = 0
    """Seed of the first sample."""
    solver: Solver = "auto"
    """Flows: sequential to adaptive; "auto" does what `exactflow plan` found best here, else it is
    sequential. Diffusion and flow matching: euler to dpm++, and for chains ancestral and ddim."""
    steps: int | None = None
    """Of a solver of diffusion and flow matching."""
    tolerance: float | None = None
    """Flows: backward error that counts as exact; by default what rounding leaves; 0 for exact
    tokens. Else of dopri5."""
    guidance: float = 0.0
    """Guidance scale w; 0 samples the model itself."""
    guidance_rule: Literal["extrapolate", "gaussian-score"] = "extrapolate"
    """TarFlow's rule, or STARFlow's."""
    guidance_schedule: Literal["linear", "constant"] = "linear"
    attention_temperature: float = 1.0
    """Of the branch guidance moves away from; guides models without labels."""
    denoise: bool | None = None
    """Score denoising; by default for models trained with Gaussian noise."""
    temperature: float = 1.0
    """Factor on the prior's standard deviation."""
    trace: bool = False
    """Also draw the way from latent to image."""
    profile: bool = False
    """Also write inversion.png: what every pass evaluated and settled."""
    on_nonfinite: Literal["raise", "omit"] = "raise"
    """A NaN or infinity: an error, or left out and counted."""
    batch_size: int = 64
    out: Path = Path("runs/samples")
    """Folder for the grid, the single images and samples.json."""
    device: Device = "auto"


@final
@dataclass(frozen=True)
class Evaluate:
    """Score held-out images: bits/dim with its standard error, its kind and its data.

    KEY=VALUE words with keys data.* change the data; by default those the model was trained on.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Model folder, run folder or hub id."""
    settings: Settings = ()
    split: Literal["train", "validation", "test"] = "test"
    k: int = 1
    """Dequantisation draws per image; 1 is the published protocol."""
    seed: int = 0
    batch_size: int = 64
    out: Path | None = None
    """JSON file for the result, with the value of every image."""
    device: Device = "auto"


@final
@dataclass(frozen=True)
class Encode:
    """Encode images, decode them again, and interpolate between their latents.

    KEY=VALUE words with keys data.* change the data; by default those the model was trained on.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Model folder, run folder or hub id."""
    settings: Settings = ()
    split: Literal["train", "validation", "test"] = "test"
    n: int = 8
    """Number of images, from the start of the split."""
    steps: int = 8
    """Images on the way from each image to the next."""
    path: Literal["linear", "spherical"] = "spherical"
    out: Path = Path("runs/encode")
    """Folder for latents.safetensors, the pictures and encode.json."""
    device: Device = "auto"


@final
@dataclass(frozen=True)
class Plan:
    """Measure how this model is inverted fastest on this machine; `sample` does so from then on.

    Solver, look-ahead, way of evaluating a token and precision are chosen for every block, and kept
    beside the model in plan.json. Nothing slower than the sequential inverse is ever chosen.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Model folder, run folder or hub id."""
    batch_size: tuple[int, ...] = (1, 16)
    """Numbers of samples decoded together; a plan serves all that are no larger."""
    tolerance: float | None = None
    """Backward error that counts as exact; by default what rounding leaves."""
    device: Device = "auto"


@final
@dataclass(frozen=True)
class Convergence:
    """Say how soon Jacobi iteration inverts each block: two metrics, and the iterations themselves.

    KEY=VALUE words with keys data.* change the data; by default those the model was trained on.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Model folder, run folder or hub id."""
    settings: Settings = ()
    split: Literal["train", "validation", "test"] = "test"
    n: int = 64
    """Number of images, from the start of the split; they are evaluated together."""
    norm: Literal["2", "1", "fro"] = "2"
    """Matrix norm of the metrics: largest singular value, largest column sum, or Frobenius."""
    seed: int = 0
    """Seed of the noise, where the model was trained with Gaussian noise."""
    out: Path = Path("runs/convergence")
    """Folder for convergence.json and convergence.png."""
    device: Device = "auto"


@final
@dataclass(frozen=True)
class Convert:
    """Read a published TarFlow, MaCow or DenseFlow file and write a model folder."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """The published file; only tensors are read."""
    out: Annotated[Path, tyro.conf.Positional]
    """Model folder to write."""
    channels: int | None = None
    """Image channels (TarFlow), where 3 or 1 do not fit uniquely."""
    height: int | None = None
    """Image height in pixels; TarFlow: where images are not square."""
    width: int | None = None
    """Image width in pixels (MaCow, DenseFlow), where images are not square."""
    levels: int | None = None
    """Grey levels (MaCow): 256 for 8 bits, 32 for 5."""
    noise_std: float | None = None
    """Training noise (TarFlow), where the file name does not tell; 0 for uniform."""


@final
@dataclass(frozen=True)
class Info:
    """List the presets, or say everything about a preset or a model."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Preset, model folder, run folder or hub id; none lists all presets."""


@final
@dataclass(frozen=True)
class Demo:
    """Train, score and sample a small TarFlow on built-in images, and write a report.

    KEY=VALUE words change settings, as for train.
    """

    settings: Settings = ()
    out: Path = Path("runs/demo")
    """Run folder."""


Command = Train | Sample | Plan | Evaluate | Encode | Convergence | Convert | Info | Demo

# verb -> (what it takes, where it is carried out)
_VERBS = {
    "train": (Train, "exactflow.cli.train"),
    "sample": (Sample, "exactflow.cli.sample"),
    "plan": (Plan, "exactflow.cli.plan"),
    "evaluate": (Evaluate, "exactflow.cli.evaluate"),
    "encode": (Encode, "exactflow.cli.encode"),
    "convergence": (Convergence, "exactflow.cli.convergence"),
    "convert": (Convert, "exactflow.cli.convert"),
    "info": (Info, "exactflow.cli.info"),
    "demo": (Demo, "exactflow.cli.demo"),
}


def main() -> None:
    """Run one command; exits with 0, 1 (an error, in one message), 2 (usage) or 128 + signal."""
    words = sys.argv[1:]
    settings = tuple(word for word in words if _SETTING.match(word))
    command = tyro.extras.subcommand_cli_from_dict(
        {verb: kind for verb, (kind, _) in _VERBS.items()},
        prog="exactflow",
        description="Image models with a likelihood you can trust.",
        args=[word for word in words if word not in settings],
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if settings:
        if not isinstance(command, Train | Evaluate | Encode | Convergence | Demo):
            print(f"error: this command takes no settings, got {settings[0]}", file=sys.stderr)
            sys.exit(2)
        command = replace(command, settings=settings)
    module = next(home for kind, home in _VERBS.values() if isinstance(command, kind))
    try:
        import_module(module).run(command)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, ArithmeticError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
