"""What can be typed. Nothing here imports torch: `--help` answers at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, final

import tyro

from exactflow.cli.argument_types import Device, Settings
from exactflow.cli.data_arguments import Index, Prepare
from exactflow.cli.latent_arguments import Attributes, Classify, Denoise, Inpaint, Outliers

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


@final
@dataclass(frozen=True)
class Train:
    """Train a preset, or resume: the same command continues an interrupted run.

    Any number of KEY=VALUE words may follow, with the keys model.*, training.*, data.* and run.*
    that `exactflow info PRESET` lists: `exactflow train tarflow-digits training.steps=500`. The
    model takes its image shape and grey levels from the data unless given, and a conditional preset
    its number of classes; model.num_classes=2 trains another one with the 2 classes of the data.
    """

    preset: Annotated[str | None, tyro.conf.Positional] = None
    """What to train; may also stand in the --config file."""
    settings: Settings = ()
    config: Path | None = None
    """YAML file with `preset` and the sections model, training, data, run."""
    out: Path | None = None
    """Run folder; runs/PRESET by default."""
    device: Device = "auto"
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] | None = None
    """Under torchrun, how processes share the model: whole in each (ddp), split over all (fsdp) or
    over those of a node (hsdp); auto splits what is too large. Short for training.parallel."""


@final
@dataclass(frozen=True)
class Sample:
    """Draw images from a model; sample k belongs to seed k."""

    model: Annotated[str, tyro.conf.Positional]
    """Shipped model, model folder, run folder or hub id."""
    n: Annotated[int, tyro.conf.arg(aliases=["--count"])] = 16
    """Number of samples; --count under torchrun, which would take --n for an option of its own."""
    label: tuple[str, ...] = ()
    """One class for all, or one for each sample: by name, or by number where classes are not called
    by numbers; "null" is the dropped label of a model with classes."""
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
    eta: float | None = None
    """Of ddim: 0 for none of the chain's noise, the default, to 1 for all of it."""
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
    """Samples with a NaN or infinity are left out and named; with "raise" the exit status is 1."""
    batch_size: int = 64
    out: Path | None = None
    """Folder for the grid, the single images and samples.json; by default `sampled` in the model's
    own run folder, which has the samples of the last call. Elsewhere, files of other seeds are
    refused."""
    device: Device = "auto"


@final
@dataclass(frozen=True)
class Evaluate:
    """Score held-out images: bits/dim with its standard error, its kind and its data.

    KEY=VALUE words with keys data.* change the data; by default those the model was trained on.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Shipped model, model folder, run folder or hub id."""
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
class Compare:
    """Compare models of any kind on the same images, and write one report.

    Presets are trained first, all under the same budget. What the folder holds of the same models,
    data and protocol is not measured again: a killed comparison goes on where it was. KEY=VALUE
    words with keys data.* and protocol.* change the data and how much is measured.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Presets, shipped models, run folders, model folders or hub ids."""
    settings: Settings = ()
    data: str = "digits"
    """Source of the images, as in data.source."""
    budget: str = "5m"
    """Of each training: 90s, 5m or 2h of optimizer steps, or work such as 1e15flop."""
    inception: str | None = None
    """Path or https:// address of the public Inception weights, for FID; an address ends in the
    beginning of the file's SHA-256. Else the features are those of a small classifier of this data
    set, or without labels its low frequencies."""
    out: Path = Path("runs/compare")
    """Folder for the report, the runs and all measurements."""
    device: Device = "auto"


@final
@dataclass(frozen=True)
class Encode:
    """Encode images, decode them again, and interpolate between their latents.

    KEY=VALUE words with keys data.* change the data; by default those the model was trained on.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Shipped model, model folder, run folder or hub id."""
    settings: Settings = ()
    split: Literal["train", "validation", "test"] = "test"
    n: int = 8
    """Number of images, from the start of the split."""
    steps: int = 8
    """Images on the way from each image to the next."""
    path: Literal["linear", "spherical"] = "spherical"
    out: Path | None = None
    """Folder for latents.safetensors, the pictures and encode.json; by default `encode` in the
    model's own run folder."""
    device: Device = "auto"


@final
@dataclass(frozen=True)
class Plan:
    """Measure how this model is inverted fastest on this machine; `sample` does so from then on.

    Solver, look-ahead, way of evaluating a token and precision are chosen for every block, and kept
    beside the model in plan.json. Nothing slower than the sequential inverse is ever chosen.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Shipped model, model folder, run folder or hub id."""
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
    """Shipped model, model folder, run folder or hub id."""
    settings: Settings = ()
    split: Literal["train", "validation", "test"] = "test"
    n: int = 64
    """Number of images, from the start of the split; they are evaluated together."""
    norm: Literal["2", "1", "fro"] = "2"
    """Matrix norm of the metrics: largest singular value, largest column sum, or Frobenius."""
    seed: int = 0
    """Seed of the noise, where the model was trained with Gaussian noise."""
    out: Path | None = None
    """Folder for convergence.json and convergence.png; by default `convergence` in the model's own
    run folder."""
    device: Device = "auto"


@final
@dataclass(frozen=True)
class Convert:
    """Read a published file and write a model folder.

    TarFlow, MaCow, DenseFlow, iDDPM and ADM (OpenAI's .pt), HDiT (k-diffusion's .pth and
    .safetensors). What the file does not tell is said by a preset, or one by one: by the options
    below, and for iDDPM, ADM and HDiT by KEY=VALUE words with keys model.*, as of train.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """The published file; only tensors are read."""
    out: Annotated[Path, tyro.conf.Positional]
    """Model folder to write."""
    settings: Settings = ()
    preset: str | None = None
    """Which model this is, such as adm-imagenet64: gives all that the file does not tell, and an
    error if its weights are not those of this model."""
    channels: int | None = None
    """Image channels, where neither 3 nor 1 fits the weights uniquely."""
    height: int | None = None
    """Image height in pixels, which weights do not tell; TarFlow: where images are not square."""
    width: int | None = None
    """Image width in pixels, where images are not square (TarFlow: give the height alone)."""
    levels: int | None = None
    """Grey levels: 256 for 8 bits, 32 for 5; MaCow needs it."""
    noise_std: float | None = None
    """Training noise (TarFlow), where the file name does not tell; 0 for uniform."""


@final
@dataclass(frozen=True)
class Info:
    """List the presets and the models of this package, or describe one of them or a saved model.

    Of a preset, every field that can be set and its value; KEY=VALUE words change it, as for train.
    """

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Preset, shipped model, model folder, run folder or hub id; none lists presets and these."""
    settings: Settings = ()
    config: Path | None = None
    """YAML file, as of train."""


@final
@dataclass(frozen=True)
class Cost:
    """Count the work and memory of a training before it is started, and the days at a given rate.

    KEY=VALUE words change settings, as for train.
    """

    preset: Annotated[str | None, tyro.conf.Positional] = None
    """What would be trained; may also stand in the --config file."""
    settings: Settings = ()
    config: Path | None = None
    """YAML file, as of train."""
    batch: int | None = None
    """Images of an optimizer step over all devices; by default the preset's."""
    gpus: int = 1
    """Devices that share each batch."""
    shards: int = 1
    """Devices that each parameter is split over; a divisor of --gpus, 1 is not split."""
    memory: float | None = None
    """GiB of a device: says whether a step fits, and what would make it fit."""
    images: int | None = None
    """Images of an epoch, where they are not those of the built-in digits."""
    images_per_second: float | None = None
    """A rate of all devices together that you measured: says how many days it takes."""
    tflops: float | None = None
    """The same, as 1e12 FLOPs of the model that each device does in a second."""
    measure: bool = False
    """The same, from some training steps taken here and now on random images."""
    device: Device = "auto"
    """Where --measure takes them."""


@final
@dataclass(frozen=True)
class Results:
    """Published numbers of a data set, beside your own; ranked only where they are comparable.

    Numbers are grouped by data version and kind, and † marks what cannot be compared with the main
    group: with your run's if there is one, else with the largest.
    """

    dataset: Annotated[str | None, tyro.conf.Positional] = None
    """Such as imagenet64; none lists the data sets."""
    metric: Literal["bits/dim", "fid"] | None = None
    """Only this one."""
    runs: tuple[Path, ...] = ()
    """Results of your own: JSON files of `evaluate --out`, or folders that hold them."""
    group: str | None = None
    """Label of the main group, as the table prints it: "new, ODE(1)"."""
    out: Path | None = None
    """Also write the table, to a .md or a .json file."""


@final
@dataclass(frozen=True)
class Demo:
    """Train, score and sample a small TarFlow on built-in images, and write a report.

    KEY=VALUE words change settings, as for train.
    """

    settings: Settings = ()
    out: Path = Path("runs/demo")
    """Run folder."""


# verb -> (what it takes, where it is carried out)
_VERBS = {
    "train": (Train, "exactflow.cli.train"),
    "prepare": (Prepare, "exactflow.cli.prepare"),
    "index": (Index, "exactflow.cli.index"),
    "sample": (Sample, "exactflow.cli.sample"),
    "plan": (Plan, "exactflow.cli.plan"),
    "evaluate": (Evaluate, "exactflow.cli.evaluate"),
    "compare": (Compare, "exactflow.cli.compare"),
    "encode": (Encode, "exactflow.cli.encode"),
    "convergence": (Convergence, "exactflow.cli.convergence"),
    "attributes": (Attributes, "exactflow.cli.attributes"),
    "classify": (Classify, "exactflow.cli.classify"),
    "outliers": (Outliers, "exactflow.cli.outliers"),
    "inpaint": (Inpaint, "exactflow.cli.inpaint"),
    "denoise": (Denoise, "exactflow.cli.denoise"),
    "convert": (Convert, "exactflow.cli.convert"),
    "info": (Info, "exactflow.cli.info"),
    "cost": (Cost, "exactflow.cli.cost"),
    "results": (Results, "exactflow.cli.results"),
    "demo": (Demo, "exactflow.cli.demo"),
}

SHARED = (Train, Sample, Evaluate, Compare)  # what the processes of torchrun can work on together
