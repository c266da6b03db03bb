"""Samples of flows: latents of the prior, decoded block by block, and certified."""

import math
from collections.abc import Callable
from typing import final

import torch

from exactflow.core.model import Flow, autoregressive_parts
from exactflow.sampling.certificate import Certificate, tolerance_of
from exactflow.sampling.denoise import score_denoise
from exactflow.sampling.denoiser import ClassifierGuidance
from exactflow.sampling.flow_solvers import own_tolerance, per_block
from exactflow.sampling.guidance import Guidance
from exactflow.sampling.inversion import Inversion
from exactflow.sampling.noise import Noise
from exactflow.sampling.request import DrawnBatch, Request, Sampler


@final
class FlowSampler(Sampler):
    """See `Sampler`. Raises ValueError for guidance and options that a flow does not have."""

    steps = 1

    def __init__(self, model: Flow, request: Request) -> None:
        self.model, self.request, self.grey_levels = model, request, model.to_grey_levels
        options = request.options
        options.refuse("low")
        self.guidance = _guidance(request)
        rows = min(request.n, request.batch_size) * (1 if self.guidance is None else 2)
        self.solvers = per_block(request.solver, model, rows, len(request.batches))
        self.tolerance = own_tolerance(request.solver)
        self.denoise = model.noise_std > 0 if options.denoise is None else options.denoise
        self.null_label = model.null_label if model.num_classes else None
        parts = autoregressive_parts(model)
        self.limit = tolerance_of(parts[0], self.tolerance) if parts else math.inf
        self.certificate = Certificate(model, self.guidance, self.null_label) if parts else None

    def draw(self, rows: range, advance: Callable[[int], None]) -> DrawnBatch:
        model, options, label = self.model, self.request.options, self.request.labels(rows)
        seeds = self.request.seeds(rows)
        inversion = Inversion(
            self.solvers,
            seeds,
            guidance=self.guidance,
            null_label=self.null_label,
            on_nonfinite=options.on_nonfinite,
            tolerance=self.tolerance,
            observe=options.profile and rows.start == 0,
        )
        noise = Noise(model, model.prior.shape, seeds)()
        z = model.prior.from_noise(noise * options.temperature)
        images = list(model.trajectory(z, label, solver=inversion))
        inversion.watch(images[-1], "the image")
        residual = torch.full((len(z),), torch.nan, device=z.device)
        if self.certificate is not None:
            residual = self.certificate(images[-1], z, label)
        if self.denoise:
            images.append(score_denoise(model, images[-1], label))
            inversion.watch(images[-1], "score denoising")
        advance(1)
        records = inversion.records
        passes = sum(record.evaluations for record in records) if records else 1
        kept = torch.stack(images if options.trace else images[-1:])
        return DrawnBatch(kept, passes, inversion.watch.failures, residual, records)


def _guidance(request: Request) -> Guidance | None:
    """The rule, or None if its scale is 0. Raises ValueError for guidance without two branches."""
    guidance = request.guidance
    if isinstance(guidance, ClassifierGuidance):
        raise ValueError("a flow is not guided by a classifier: expected a scale or a Guidance")
    rule = guidance if isinstance(guidance, Guidance) else Guidance(scale=float(guidance))
    if rule.scale == 0:
        return None
    if request.label is None and rule.temperature == 1:
        raise ValueError(
            "guidance without labels needs an attention temperature other than 1 for the branch "
            "it moves away from: Guidance(scale=..., temperature=0.3)"
        )
    return rule
