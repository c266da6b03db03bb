"""Samples of a model: sample k belongs to seed k, and carries its cost and its certificate."""

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from exactflow.core.doors import LabelsLike, as_labels, require_model
from exactflow.core.model import GenerativeModel, evaluating
from exactflow.core.progress import shown_progress
from exactflow.nn import compiled
from exactflow.parallel.process_group import Processes, current
from exactflow.sampling.denoiser import ClassifierGuidance
from exactflow.sampling.guidance import Guidance
from exactflow.sampling.request import DrawnBatch, Request, Sampler, SamplingOptions
from exactflow.sampling.samples import Samples, together
from exactflow.sampling.solvers import AnySolver, sampling_of, solver_for


def sample(
    model: GenerativeModel,
    n: int,
    label: LabelsLike | None = None,
    seed: int = 0,
    solver: str | AnySolver = "auto",
    guidance: float | Guidance | ClassifierGuidance = 0.0,
    *,
    batch_size: int = 64,
    options: SamplingOptions | None = None,
) -> Samples:
    """Draw `n` samples; sample k is a function of seed + k, whatever `n` and `batch_size`.

    Processes that work together share the samples, and all have them in the end. Nothing is
    measured or written.

    Args:
        model: a flow, or a model on a path.
        n: number of samples.
        label: one class for all, or n classes; None samples without a label. With a classifier's
            guidance, the class to guide to, which an unconditional model is not told.
        seed: first seed.
        solver: a name of `solvers.SOLVERS`, or a solver with its options, such as Heun(steps=20);
            of a flow also one for each block in generation order. "auto": what the model is usually
            sampled with; of a flow, what the plan beside it says, else token by token.
        guidance: of a flow, the scale of the published rule with its linear ramp, or a `Guidance`;
            on a path, the scale of classifier-free guidance, or a `ClassifierGuidance`.
        batch_size: samples drawn together.
        options: what is seldom asked for; None: nothing.

    Raises:
        NonFiniteError: names the seed whose sample is not finite, and of a flow block and token.
        ValueError: for labels or guidance the model cannot take, and for an option that has no
            meaning for this model and solver.
    """
    require_model(model)
    if n < 1 or batch_size < 1:
        raise ValueError(f"expected n >= 1 and batch_size >= 1, got {n}, {batch_size}")
    checked = model.num_classes > 0 or not isinstance(guidance, ClassifierGuidance)
    labels = as_labels(model, label, n, checked=checked)
    kind = sampling_of(model)
    if isinstance(solver, str):
        solver = solver_for(model, solver)
    elif not isinstance(solver, kind.solvers):
        raise ValueError(f"expected solver auto | {' | '.join(kind.names)}, got {solver}")
    options = options or SamplingOptions()
    request = Request(model, n, labels, seed, solver, guidance, batch_size, options)
    group = current()
    if group.count == 1:
        return _drawn(request)
    shared = min(n, group.count)
    shares = [Processes(rank, shared).rows(n) for rank in range(shared)]
    shown = options.progress and group.is_main
    return together(group.spread(shares, lambda rows: _drawn(request.part(rows, shown))))


def _drawn(request: Request) -> Samples:
    """All batches of a request, one after the other."""
    began, loading = time.perf_counter(), compiled.seconds_loading()
    model, options, parts = request.model, request.options, request.batches
    with evaluating(model):
        sampler = sampling_of(model).sampler(model, request)
        total, quiet = len(parts) * sampler.steps, not options.progress
        with shown_progress(total, "sampling", unit="steps", quiet=quiet) as advance:
            batches = [sampler.draw(rows, advance) for rows in parts]
    loading = compiled.seconds_loading() - loading
    return _gathered(request, sampler, batches, began + loading, loading)


def _gathered(
    request: Request, sampler: Sampler, batches: Sequence[DrawnBatch], began: float, loading: float
) -> Samples:
    """The batches together, without the samples that failed."""
    options, seeds = request.options, request.seeds(range(request.n))
    failures = {seed: where for batch in batches for seed, where in batch.failures.items()}
    kept = [row for row, seed in enumerate(seeds) if seed not in failures]
    steps = torch.cat([batch.images for batch in batches], dim=1)[:, kept]
    certificate = torch.cat([batch.certificate for batch in batches])[kept]
    blocks = list(zip(*(batch.records for batch in batches), strict=True))
    return Samples(
        x=steps[-1],
        images=sampler.grey_levels(steps[-1]),
        seeds=tuple(seeds[row] for row in kept),
        label=None if request.label is None else request.label[kept],
        evaluations=sum(batch.evaluations for batch in batches),
        iterations=tuple(max(record.evaluations for record in block) for block in blocks),
        seconds=time.perf_counter() - began,
        certificate=certificate,
        repairs=tuple(sum(int(r.repaired.sum()) for r in block) for block in blocks),
        beyond_tolerance=_beyond([seeds[row] for row in kept], certificate, sampler.limit),
        failures=failures,
        trace=steps if options.trace else None,
        passes=tuple(r.passes for r in batches[0].records) if options.profile else None,
        loading=loading,
    )


def _beyond(seeds: Sequence[int], certificate: Tensor, limit: float) -> tuple[int, ...]:
    """Seeds whose certificate exceeds the limit, or is not a number where there is a limit."""
    if math.isinf(limit):
        return ()
    far = (~(certificate <= limit)).tolist()
    return tuple(seed for seed, beyond in zip(seeds, far, strict=True) if beyond)
