"""The protocol by which all models of a comparison are measured, whatever their kind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from exactflow.core.model import GenerativeModel
from exactflow.data.datasets import ImageDataset
from exactflow.likelihood.draws import Draws
from exactflow.likelihood.log_likelihood import Effort, score
from exactflow.likelihood.value import LogLikelihood
from exactflow.metrics.bits_per_dim import with_labels
from exactflow.paths.ode import ODE_SOLVERS, OdeMethod
from exactflow.sampling.request import SamplingOptions
from exactflow.sampling.sample import sample
from exactflow.sampling.samples import Samples
from exactflow.sampling.solvers import solver_for

CHUNK = 64  # images scored or drawn together


@final
@dataclass(frozen=True)
class Protocol:
    """The amounts that are measured of every model.

    Attributes:
        images: held-out images that are scored, at most.
        estimate_images: the same where a differential equation is solved for each of them.
        bound_evaluations: evaluations of the network for each image of a chain's bound.
        ode_solver: solver of likelihoods that are estimates, on a fixed grid.
        ode_steps: steps of that solver.
        samples: samples of each model.
        evaluations: approximate evaluations of the network for a sample of a model on a path. The
            first number is that of the main samples, the others give a curve of quality against
            cost.
        curve_samples: samples for each other number of evaluations.
        seed: of noise and samples.
    """

    images: int = 2000
    estimate_images: int = 500
    bound_evaluations: int = 50
    ode_solver: OdeMethod = "midpoint"
    ode_steps: int = 50
    samples: int = 2000
    evaluations: tuple[int, ...] = (50, 10, 250)
    curve_samples: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for counts too small to measure anything."""
        for name in ("images", "estimate_images", "bound_evaluations", "samples", "curve_samples"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: expected at least 2, got {getattr(self, name)}")
        if not self.evaluations or min(*self.evaluations, self.ode_steps) < 1:
            raise ValueError(
                f"expected evaluations and ode_steps of at least 1, got {self.evaluations} "
                f"and {self.ode_steps}"
            )
        if self.ode_solver == "dopri5":
            raise ValueError("ode_solver: expected one of a fixed grid, got 'dopri5'")

    @property
    def effort(self) -> Effort:
        """The effort of scores that take more than one evaluation of the network."""
        return Effort(self.bound_evaluations, ODE_SOLVERS[self.ode_solver](self.ode_steps))

    @property
    def few_samples(self) -> int:
        """Number of samples at every point of the curve of quality against cost."""
        return min(self.samples, self.curve_samples)

    def scored_images(self, model: GenerativeModel) -> int:
        """Number of images that are scored, at most."""
        return self.estimate_images if model.likelihood_kind == "estimate" else self.images


@final
@dataclass(frozen=True)
class Contender:
    """A model that is compared.

    Attributes:
        name: in tables, and of the folder with its results.
        model: on the device to be measured on.
        training: images and cost of its training, JSON-able; empty where unknown.
        curve: held-out likelihood in the course of its training.
        guidance: scale of guidance that its samples are drawn with.
    """

    name: str
    model: GenerativeModel
    training: Mapping[str, Any] = field(default_factory=dict)
    curve: Sequence[Mapping[str, Any]] = ()
    guidance: float = 0.0


@final
@dataclass(frozen=True)
class Failure:
    """A model that cannot be compared, for example because its training overflowed.

    Attributes:
        name: in tables.
        reason: for people.
    """

    name: str
    reason: str


def scored(
    model: GenerativeModel,
    images: Tensor,
    label: Tensor | None,
    protocol: Protocol,
    *,
    first: int = 0,
) -> LogLikelihood:
    """Log-likelihood of images with the effort of a protocol.

    Args:
        model: any.
        images: grey levels.
        label: class of each image.
        protocol: gives seed and effort.
        first: number of the first image in its set.
    """
    draws = Draws(seed=protocol.seed, first=first, batch_size=CHUNK)
    return score(model, images, label, draws, protocol.effort)


def subset(
    dataset: ImageDataset, count: int, model: GenerativeModel
) -> tuple[Tensor, Tensor | None]:
    """At most `count` images, evenly spaced, and their labels where the model is conditional."""
    return with_labels(model, dataset, subset_rows(dataset, count))


def subset_rows(dataset: ImageDataset, count: int) -> np.ndarray:
    """Indices of at most `count` images, evenly spaced."""
    return np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)


def sampling_plans(
    model: GenerativeModel, protocol: Protocol
) -> tuple[tuple[str, int | None], ...]:
    """Solver and number of steps for each number of evaluations; one plan for a flow."""
    steps = dict.fromkeys(map(model.quick_steps, protocol.evaluations))
    return tuple((model.quick_solver, count) for count in steps)


def draw(
    model: GenerativeModel,
    rows: range,
    plan: tuple[str, int | None],
    guidance: float,
    seed: int = 0,
) -> Samples:
    """Draw the samples of these numbers in one batch; their classes alternate.

    Args:
        model: any.
        rows: sample k belongs to seed + k.
        plan: solver and its steps, of `sampling_plans`.
        guidance: scale.
        seed: of the protocol.
    """
    solver, steps = plan
    return sample(
        model,
        len(rows),
        torch.tensor(rows) % model.num_classes if model.num_classes else None,
        seed + rows.start,
        solver_for(model, solver, steps=steps),
        guidance,
        batch_size=len(rows),
        options=SamplingOptions(on_nonfinite="raise" if model.iterative else "omit"),
    )
