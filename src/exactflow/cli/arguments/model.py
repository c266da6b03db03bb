"""What can be typed for the verbs that make models and describe them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, final

import tyro

from exactflow.cli.arguments.shared import Device, Many, Maybe, OfModel, OfRun, TakesSettings

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
    "edm",
    "ancestral",
    "ddim",
]


@final
@dataclass(frozen=True, kw_only=True)
class Train(OfRun):
    """Train a preset, or resume an interrupted training.

    The same command resumes. The model takes its image shape and grey levels from the data unless
    they are set, and a conditional preset its number of classes; model.num_classes=2 makes another
    preset conditional on the 2 classes of the data.
    """

    preset: tyro.conf.Positional[Maybe[str]] = None
    """What to train; may also stand in the --config file."""
    out: Maybe[Path] = None
    """Run folder; runs/PRESET by default."""
    start: Maybe[str] = None
    """Model folder, run folder or shipped model whose weights come first. Short for
    training.start."""
    device: Device = "auto"
    """Where to compute; auto is the accelerator, if there is one."""
    parallel: Maybe[Literal["auto", "ddp", "fsdp", "hsdp"]] = None
    """Under torchrun: a whole model in each process (ddp), one split over all (fsdp) or over those
    of a node (hsdp); auto splits what is too large. Short for training.parallel."""


@final
@dataclass(frozen=True, kw_only=True)
class Sample(OfModel):
    """Draw images from a model; sample k belongs to seed k."""

    n: Annotated[int, tyro.conf.arg(aliases=["--count"])] = 16
    """Number of samples; torchrun needs --count, since it takes --n for its own."""
    label: Many[str] = ()
    """One class for all or one per sample, by name or number; "null" is the dropped label."""
    seed: int = 0
    """Seed of the first sample."""
    solver: Solver = "auto"
    """Flows: sequential to adaptive; "auto" does what `exactflow plan` found best here, else it is
    sequential. Diffusion and flow matching: euler to edm, and for chains ancestral and ddim."""
    steps: Maybe[int] = None
    """Of a solver of diffusion and flow matching."""
    tolerance: Maybe[float] = None
    """Flows: backward error that counts as exact; by default what rounding leaves; 0 for exact
    tokens. Else of dopri5."""
    eta: Maybe[float] = None
    """Of ddim: 0 for none of the chain's noise, the default, to 1 for all of it."""
    guidance: float = 0.0
    """Guidance scale w; 0 samples the model itself."""
    guidance_rule: Literal["extrapolate", "gaussian-score"] = "extrapolate"
    """TarFlow's rule, or STARFlow's."""
    guidance_schedule: Literal["linear", "constant"] = "linear"
    """Guidance scale over the tokens of a flow."""
    classifier: Maybe[Path] = None
    """Published classifier of noisy images (ADM's .pt) that guides a chain, by --guidance as its
    scale."""
    low: Maybe[Path] = None
    """Of an upsampler: folder that `exactflow sample` wrote, whose samples of the same seeds are
    enlarged."""
    attention_temperature: float = 1.0
    """Of the branch that guidance moves away from; guides models without labels."""
    denoise: Maybe[bool] = None
    """Score denoising; by default for models trained with Gaussian noise."""
    temperature: float = 1.0
    """Factor on the prior's standard deviation."""
    trace: bool = False
    """Also draw the way from latent to image."""
    profile: bool = False
    """Also write inversion.png: what every pass evaluated and settled."""
    on_nonfinite: Literal["raise", "omit"] = "raise"
    """Samples with a NaN or infinity are left out and named; raise makes the exit status 1."""
    batch_size: int = 64
    """Samples drawn together."""
    out: Maybe[Path] = None
    """Folder to write; by default `sampled` in the model's run folder, of the last call only."""


@final
@dataclass(frozen=True, kw_only=True)
class Plan(OfModel):
    """Measure how a flow is inverted fastest on this machine, for `sample` to use.

    Solver, look-ahead, way of evaluating a token and precision are chosen for every block, and kept
    beside the model in plan.json. Nothing slower than the sequential inverse is ever chosen.
    """

    batch_size: tuple[int, ...] = (1, 16)
    """Numbers of samples decoded together; a plan serves all that are no larger."""
    tolerance: Maybe[float] = None
    """Backward error that counts as exact; by default what rounding leaves."""


@final
@dataclass(frozen=True, kw_only=True)
class Info(OfRun):
    """List presets and models, or describe one: its fields, or its card.

    Of a preset, every field that can be set is shown with its value.
    """

    name: tyro.conf.Positional[Maybe[str]] = None
    """Preset, run folder, model folder, hub id, or model of the package; none lists them."""


@final
@dataclass(frozen=True, kw_only=True)
class Cost(OfRun):
    """Count the work and memory of a training before it is started."""

    preset: tyro.conf.Positional[Maybe[str]] = None
    """What would be trained; may also stand in the --config file."""
    batch: Maybe[int] = None
    """Images of an optimizer step over all devices; by default the preset's."""
    gpus: int = 1
    """Devices that share each batch."""
    shards: int = 1
    """Devices that each parameter is split over; a divisor of --gpus, 1 is not split."""
    memory: Maybe[float] = None
    """GiB of a device: whether a step fits, and what would make it fit."""
    images: Maybe[int] = None
    """Images of an epoch, where they are not those of the built-in digits."""
    images_per_second: Maybe[float] = None
    """A rate that you measured, of all devices together: the days at this rate."""
    tflops: Maybe[float] = None
    """A rate as 1e12 FLOPs of the model that each device does in a second: the days at it."""
    measure: bool = False
    """Take some training steps on random images here: the days at the rate of these."""
    device: Device = "auto"
    """Where --measure takes them."""


@final
@dataclass(frozen=True, kw_only=True)
class Convert(TakesSettings):
    """Read a published checkpoint and write a model folder.

    TarFlow, MaCow, DenseFlow, iDDPM and ADM (OpenAI's .pt), HDiT (k-diffusion's .pth and
    .safetensors). What the file does not tell is given by a preset, or one by one: by the options
    below, and for iDDPM, ADM and HDiT by settings model.*.
    """

    sections: ClassVar[tuple[str, ...]] = ("model",)
    checkpoint: tyro.conf.Positional[Path]
    """The published file; only tensors are read."""
    out: tyro.conf.Positional[Path]
    """Model folder to write."""
    preset: Maybe[str] = None
    """Which model this is, such as adm-imagenet64; an error if the weights are of another."""
    channels: Maybe[int] = None
    """Image channels, where neither 3 nor 1 fits the weights uniquely."""
    height: Maybe[int] = None
    """Image height in pixels, which weights do not tell; TarFlow: where images are not square."""
    width: Maybe[int] = None
    """Image width in pixels, where images are not square (TarFlow: give the height alone)."""
    levels: Maybe[int] = None
    """Grey levels: 256 for 8 bits, 32 for 5; MaCow needs it."""
    noise_std: Maybe[float] = None
    """Training noise (TarFlow), where the file name does not tell; 0 for uniform."""
