"""Samples of models on a path: noise, followed by a solver to the data."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import final

import torch
from torch import Tensor

from exactflow.paths.path_model import PathModel
from exactflow.sampling.denoiser import ClassifierGuidance, Denoiser
from exactflow.sampling.guidance import Guidance
from exactflow.sampling.noise import Noise
from exactflow.sampling.nonfinite import Watch
from exactflow.sampling.path_solvers import ChainSolver, states, steps_of
from exactflow.sampling.request import DrawnBatch, Request, Sampler


@final
class PathSampler(Sampler):
    """See `Sampler`. Raises ValueError for guidance and options that such a model does not have."""

    limit = math.inf

    def __init__(self, model: PathModel, request: Request) -> None:
        self.model, self.request, self.solver = model, request, request.solver
        self.grey_levels = model.to_grey_levels
        request.options.refuse("denoise", "trace", "profile", "temperature")
        self.guidance = _guidance(request)
        self.steps = steps_of(self.solver, model)
        low = request.options.low
        if low is not None and len(low) != request.n:
            raise ValueError(f"expected {request.n} small images, got {len(low)}")
        beside = low is not None or isinstance(self.guidance, ClassifierGuidance)
        if beside and not isinstance(self.solver, ChainSolver):
            raise ValueError(
                "small images and a classifier's guidance are for the steps of a chain: expected "
                f"the solver ancestral or ddim, got {self.solver}"
            )

    @torch.no_grad()
    def draw(self, rows: range, advance: Callable[[int], None]) -> DrawnBatch:
        model, request = self.model, self.request
        seeds, options = request.seeds(rows), request.options
        low = options.low
        low = None if low is None else low[rows.start : rows.stop].to(model.device)
        denoiser = Denoiser(model, request.labels(rows), self.guidance, low)
        watch = Watch(seeds, options.on_nonfinite)
        noise = Noise(model, model.event_shape, seeds)
        way = states(self.solver, denoiser, noise, options.on_nonfinite)
        (x,) = deque(_reported(way, advance), maxlen=1)
        watch(x, "the image")
        nothing = torch.full((len(x),), torch.nan, device=x.device)
        return DrawnBatch(x[None], denoiser.evaluations, watch.failures, nothing)


def _reported(way: Iterator[Tensor], advance: Callable[[int], None]) -> Iterator[Tensor]:
    for x in way:
        advance(1)
        yield x


def _guidance(request: Request) -> float | ClassifierGuidance:
    """The scale, or a classifier's guidance. Raises ValueError for a flow's rule or schedule."""
    guidance = request.guidance
    if isinstance(guidance, Guidance):
        for name in ("rule", "schedule", "temperature"):
            given = getattr(guidance, name)
            if given != getattr(Guidance(guidance.scale), name):
                raise ValueError(
                    f"the guidance {name} {given!r} has no meaning for this model: a model on a "
                    "path is guided by a scale alone, or by a classifier"
                )
        guidance = guidance.scale
    scale = guidance.scale if isinstance(guidance, ClassifierGuidance) else guidance
    if not 0 <= scale < math.inf:
        raise ValueError(f"expected a finite guidance scale >= 0, got {scale}")
    if request.label is None and (scale or isinstance(guidance, ClassifierGuidance)):
        raise ValueError("guidance needs labels to guide to")
    return guidance
