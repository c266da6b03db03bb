"""What can be typed for the verbs that use a density."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, final

import tyro

from exactflow.cli.arguments.shared import (
    Many,
    Maybe,
    OfImages,
    OfModel,
    Source,
    Split,
    TakesSettings,
)


@final
@dataclass(frozen=True, kw_only=True)
class Evaluate(OfModel, TakesSettings):
    """Score held-out images: bits/dim with its standard error and its kind."""

    split: Split = "test"
    """Which images are scored."""
    k: int = 1
    """Noise draws per image; 1 is the published protocol."""
    seed: int = 0
    """Seed of the noise."""
    batch_size: int = 64
    """Images scored together."""
    out: Maybe[Path] = None
    """JSON file to write, with the value of every image."""


@final
@dataclass(frozen=True, kw_only=True)
class Encode(OfImages):
    """Encode images, decode them again, and interpolate between their latents."""

    split: Split = "test"
    """Where the images come from."""
    n: int = 8
    """Number of images, from the start of the split."""
    steps: int = 8
    """Images on the way from each image to the next."""
    path: Literal["linear", "spherical"] = "spherical"
    """Course of the way between two latents."""


@final
@dataclass(frozen=True, kw_only=True)
class Attributes(OfImages):
    """Move images towards a class in the latent space of a flow.

    The direction is the mean latent of training images of the class minus that of all others. It is
    added to the latents of held-out images of the other classes. The model does not see labels.
    """

    attribute: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="CLASS")]]
    """Class of the data, by name or number, such as Dress or 3."""
    split: Split = "test"
    """Where the images to change come from."""
    n: int = 8
    """Number of images to change: the first of the split that are of another class."""
    strengths: tuple[float, ...] = (-1.0, 0.0, 0.5, 1.0, 1.5)
    """Multiples of the direction; 0 decodes the image itself."""
    learn_from: int = 2000
    """At most so many training images give the direction."""
    batch_size: int = 64
    """Images encoded together."""


@final
@dataclass(frozen=True, kw_only=True)
class Classify(OfImages):
    """Classify images by Bayes' rule from a conditional model's likelihoods.

    Every image is scored under every class, p(c | x) = p(x | c) p(c) / p(x). One temperature,
    fitted to validation images, calibrates the probabilities. The model must be trained with labels
    (model.num_classes=10).
    """

    split: Literal["train", "test"] = "test"
    """Which images are classified."""
    n: int = 1000
    """At most so many images of the split."""
    calibrate_on: int = 1000
    """At most so many validation images give the temperature."""
    prior: Many[float] = ()
    """Prior probability p(c) of every class, in any unit; uniform by default."""
    k: int = 1
    """Noise draws per image; more give tighter likelihoods, and cost as much more."""
    seed: int = 0
    """Seed of the noise, which is the same under every class."""
    batch_size: int = 64
    """Images scored together."""


@final
@dataclass(frozen=True, kw_only=True)
class Outliers(OfImages):
    """Tell images of another set from those the model knows, by five scores.

    Scores: log-likelihood, the same corrected by complexity, typicality, gradient norm, and PNG
    size alone as a control. The model must be an exact flow with bits/dim.
    """

    outside: Source = "digits"
    """The other set, as in data.source. It is brought to the model's shape and grey levels."""
    border: int = 0
    """Black pixels around the other set's images, which shrink to fit; MNIST has 4."""
    n: int = 1000
    """At most so many images of each set; the model's own are of the test split."""
    training: int = 1000
    """At most so many training images define what is typical."""
    seed: int = 0
    """Seed of the noise."""
    batch_size: int = 64
    """Images scored together."""


@final
@dataclass(frozen=True, kw_only=True)
class Inpaint(OfImages):
    """Draw missing pixels from p(missing | known), by an exact density.

    Metropolis-adjusted Langevin steps along the gradient of the density. The model must be an exact
    flow.
    """

    split: Split = "test"
    """Where the images come from."""
    n: int = 8
    """Number of images, from the start of the split."""
    missing: Literal["bottom", "right", "center", "scattered"] = "bottom"
    """Which pixels are removed: half of them, of center a quarter."""
    draws: int = 3
    """Completions of every image."""
    steps: int = 500
    """Langevin steps, each one gradient; the first half of them finds the step size."""
    seed: int = 0
    """Seed of the noise."""


@final
@dataclass(frozen=True, kw_only=True)
class Denoise(OfImages):
    """Add Gaussian noise to images and remove it in one step, by an exact density.

    The step is along the gradient of the density. The model must be an exact flow that was trained
    with Gaussian noise (model.noise_std=0.1).
    """

    split: Split = "test"
    """Where the images come from."""
    n: int = 8
    """Number of images, from the start of the split."""
    seed: int = 0
    """Seed of the noise."""
    batch_size: int = 64
    """Images denoised together."""
