"""The expected time of a protocol for a model, from a few of its steps."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from exactflow.comparison.protocol import CHUNK, Protocol, draw, sampling_plans, scored, subset
from exactflow.core.model import GenerativeModel
from exactflow.data.datasets import ImageDataset

FEW = 2  # steps of a solver, or evaluations of a bound, that are timed


def expected_seconds(
    model: GenerativeModel, held_out: ImageDataset, protocol: Protocol, guidance: float = 0.0
) -> float:
    """Approximate seconds of scoring images and drawing samples, from one chunk of each.

    The features of images and samples are not counted: they take the same time for every model.

    Args:
        model: trained or not, on the device to be measured on.
        held_out: images to score.
        protocol: of the comparison.
        guidance: scale that samples are drawn with.
    """
    images, label = subset(held_out, CHUNK, model)
    few = replace(protocol, bound_evaluations=FEW, ode_steps=FEW)
    each = _seconds(lambda: scored(model, images, label, few), model) / len(images)
    count = min(protocol.scored_images(model), len(held_out))
    total = each * count * _longer(model, protocol)
    plans = sampling_plans(model, protocol)  # of one solver, with more or fewer steps
    (solver, steps), counts = plans[0], (protocol.samples, *[protocol.few_samples] * len(plans[1:]))
    few_steps = (solver, steps and FEW)
    each = _seconds(lambda: draw(model, range(CHUNK), few_steps, guidance), model) / CHUNK
    passes = (count * (steps or FEW) / FEW for (_, steps), count in zip(plans, counts, strict=True))
    return total + each * sum(passes)


def _longer(model: GenerativeModel, protocol: Protocol) -> float:
    """Ratio of the evaluations of a score in the protocol to those that are timed."""
    if not model.iterative:
        return 1.0
    estimate = model.likelihood_kind == "estimate"
    return (protocol.ode_steps if estimate else protocol.bound_evaluations) / FEW


def _seconds(work: Callable[[], Any], model: GenerativeModel) -> float:
    """Seconds of the second call; the first one may compile and allocate."""
    work()
    began = time.perf_counter()
    work()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - began
