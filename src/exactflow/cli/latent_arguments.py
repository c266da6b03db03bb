"""What can be typed for the verbs that need a density and a latent. Nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, final

import tyro

from exactflow.cli.argument_types import Device, Settings

Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]


@final
@dataclass(frozen=True)
class Attributes:
    """Move images along the direction of an attribute in the latent space of a flow.

    The direction is the mean latent of training images of a class minus that of all others; it is
    added to the latents of held-out images of the other classes. KEY=VALUE words with keys data.*
    change the data; by default those the model was trained on.
    """

    model: Model
    """Shipped model, model folder, run folder or hub id of a flow; labels are not shown to it."""
    attribute: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CLASS")]
    """Class of the data, by name or number, such as Dress or 3."""
    settings: Settings = ()
    split: Literal["train", "validation", "test"] = "test"
    """Where the images to change come from."""
    n: int = 8
    """Number of images to change: the first of the split that are of another class."""
    strengths: tuple[float, ...] = (-1.0, 0.0, 0.5, 1.0, 1.5)
    """Multiples of the direction; 0 decodes the image itself."""
    learn_from: int = 2000
    """At most so many training images give the direction."""
    batch_size: int = 64
    """Images encoded together."""
    out: Path | None = None
    """Folder for attributes.png and attributes.json; by default `attributes` in the model's own run
    folder."""
    device: Device = "auto"
    """Where to compute; "auto" is the accelerator, if any."""


@final
@dataclass(frozen=True)
class Classify:
    """Classify images by Bayes' rule from the likelihoods that a conditional model gives them.

    Every image is scored under every class, p(c | x) = p(x | c) p(c) / p(x), and one temperature,
    fitted to validation images, makes the probabilities honest. KEY=VALUE words with keys data.*
    change the data; by default those the model was trained on.
    """

    model: Model
    """Shipped model, model folder, run folder or hub id of a model trained with labels
    (model.num_classes=10)."""
    settings: Settings = ()
    split: Literal["train", "test"] = "test"
    """Which images to classify; those of the validation split give the temperature."""
    n: int = 1000
    """At most so many images of the split."""
    calibrate_on: int = 1000
    """At most so many validation images give the temperature."""
    prior: tuple[float, ...] = ()
    """Prior probability p(c) of every class, in any unit; uniform by default."""
    k: int = 1
    """Noise draws per image; more tighten the likelihoods, and cost as much more."""
    seed: int = 0
    """Names the noise, which is the same under every class."""
    batch_size: int = 64
    """Images scored together."""
    out: Path | None = None
    """Folder for classify.png (reliability, confusion) and classify.json; by default `classify` in
    the model's own run folder."""
    device: Device = "auto"
    """Where to compute; "auto" is the accelerator, if any."""


@final
@dataclass(frozen=True)
class Outliers:
    """Tell images of another set from those the model knows, and say how well each score does it.

    Scores: log-likelihood, the same corrected by complexity, typicality, gradient norm, and PNG
    size alone as a control. KEY=VALUE words with keys data.* change the data that count as inside;
    by default those the model was trained on.
    """

    model: Model
    """Shipped model, model folder, run folder or hub id of an exact flow with bits/dim."""
    settings: Settings = ()
    outside: str = "digits"
    """The other set, as in data.source: digits, fashion-mnist, hub:owner/name, or a folder of
    images or IDX files. It is brought to the model's shape and grey levels."""
    border: int = 0
    """Pixels of black around the other set's images, which shrink to fit; 4 frames digits as in
    MNIST, 20 x 20 in 28 x 28."""
    n: int = 1000
    """At most so many images of each set; those inside are of the test split."""
    training: int = 1000
    """At most so many training images say what is typical."""
    seed: int = 0
    """Names the noise."""
    batch_size: int = 64
    """Images scored together."""
    out: Path | None = None
    """Folder for outliers.png (scores, curves), images.png and outliers.json; by default `outliers`
    in the model's own run folder."""
    device: Device = "auto"
    """Where to compute; "auto" is the accelerator, if any."""


@final
@dataclass(frozen=True)
class Inpaint:
    """Draw missing pixels of images from p(missing | known), by the gradient of an exact density.

    Metropolis-adjusted Langevin steps. KEY=VALUE words with keys data.* change the data; by default
    those the model was trained on.
    """

    model: Model
    """Shipped model, model folder, run folder or hub id of an exact flow."""
    settings: Settings = ()
    split: Literal["train", "validation", "test"] = "test"
    """Where the images come from."""
    n: int = 8
    """Number of images, from the start of the split."""
    missing: Literal["bottom", "right", "center", "scattered"] = "bottom"
    """Which pixels are taken away; center is a quarter of them, the others are a half."""
    draws: int = 3
    """Completions of every image."""
    steps: int = 500
    """Langevin steps, each one gradient; the first half of them finds the step size."""
    seed: int = 0
    """Names the noise of the chains."""
    out: Path | None = None
    """Folder for inpaint.png and inpaint.json; by default `inpaint` in the model's own run
    folder."""
    device: Device = "auto"
    """Where to compute; "auto" is the accelerator, if any."""


@final
@dataclass(frozen=True)
class Denoise:
    """Add Gaussian noise to images and remove it in one step, by the gradient of an exact density.

    The model must be trained with such noise (model.noise_std=0.1). KEY=VALUE words with keys
    data.* change the data; by default those the model was trained on.
    """

    model: Model
    """Shipped model, model folder, run folder or hub id of an exact flow."""
    settings: Settings = ()
    split: Literal["train", "validation", "test"] = "test"
    """Where the images come from."""
    n: int = 8
    """Number of images, from the start of the split."""
    seed: int = 0
    """Names the noise."""
    batch_size: int = 64
    """Images denoised together."""
    out: Path | None = None
    """Folder for denoise.png and denoise.json; by default `denoise` in the model's own run
    folder."""
    device: Device = "auto"
    """Where to compute; "auto" is the accelerator, if any."""
