"""Samples of a model: sample k belongs to seed k, and carries its cost and its certificate."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from exactflow.core.doors import LabelsLike, as_labels, require_model
from exactflow.core.model import Flow, GenerativeModel, autoregressive_parts, evaluating
from exactflow.core.process_group import Processes, current
from exactflow.core.progress import tracked
from exactflow.core.random import generator, normal_rows
from exactflow.core.transform import Solver
from exactflow.nn import compiled
from exactflow.paths.path_model import PathModel
from exactflow.sampling.autoregressive import named_solvers
from exactflow.sampling.certificate import Certificate, tolerance_of
from exactflow.sampling.denoise import score_denoise
from exactflow.sampling.guidance import Guidance
from exactflow.sampling.inversion import Inversion
from exactflow.sampling.path_samples import sample_path
from exactflow.sampling.planner import number_of_blocks, planned_solvers
from exactflow.sampling.samples import Samples, together


def sample(
    model: GenerativeModel,
    n: int,
    label: LabelsLike | None = None,
    seed: int = 0,
    solver: str | Solver | Sequence[Solver] = "auto",
    guidance: float | Guidance = 0.0,
    *,
    steps: int | None = None,
    tolerance: float | None = None,
    denoise: bool | None = None,
    temperature: float = 1.0,
    batch_size: int = 64,
    trace: bool = False,
    profile: bool = False,
    on_nonfinite: Literal["raise", "omit"] = "raise",
    progress: bool = False,
) -> Samples:
    """Draw `n` samples; sample k is a function of seed + k, whatever `n` and `batch_size`.

    Processes that work together share the samples, and all have them in the end.

    Args:
        model: a flow, or a model on a path.
        n: number of samples.
        label: one class for all, or n classes; None samples without a label.
        seed: first seed.
        solver: of a flow, "sequential", "jacobi", "gauss-seidel-jacobi", "selective",
            "adaptive"; "auto", what the plan beside the model says, else sequential; or a solver,
            for all blocks or one for each in generation order. On a path: see `sample_path`.
        guidance: scale of the published rule with its linear ramp, or a `Guidance`; on a path, of
            classifier-free guidance.
        steps: of a solver on a path; None: its usual number.
        tolerance: of a flow, backward error that counts as exact, of a block for solvers and
            repairs, of the whole for `Samples.beyond_tolerance`; None: what rounding leaves of the
            network's dtype; 0: named solvers compute every token from its final prefix. On a path,
            of "dopri5".
        denoise: one step of score denoising; None: for models trained with Gaussian noise.
        temperature: factor on the prior's standard deviation.
        batch_size: samples decoded together.
        trace: keep the images between blocks.
        profile: keep a record of every pass.
        on_nonfinite: what a NaN or an infinity does: an error, or left out and reported.
        progress: show a bar over batches.

    Raises:
        NonFiniteError: names the block, token and seed.
        ValueError: for labels or guidance the model cannot take, and for an option that has no
            meaning for this model and solver.
    """
    require_model(model)
    if n < 1 or batch_size < 1 or not temperature >= 0:
        raise ValueError(
            f"expected n >= 1, batch_size >= 1 and temperature >= 0, "
            f"got {n}, {batch_size}, {temperature}"
        )
    if on_nonfinite not in ("raise", "omit"):
        raise ValueError(f"expected on_nonfinite 'raise' or 'omit', got {on_nonfinite!r}")
    labels = as_labels(model, label, n)
    group = current()
    if group.count > 1:

        def draw(rows: range) -> Samples:
            return sample(
                model,
                len(rows),
                None if labels is None else labels[rows.start : rows.stop],
                seed + rows.start,
                solver,
                guidance,
                steps=steps,
                tolerance=tolerance,
                denoise=denoise,
                temperature=temperature,
                batch_size=batch_size,
                trace=trace,
                profile=profile,
                on_nonfinite=on_nonfinite,
                progress=progress and group.is_main,
            )

        shared = min(n, group.count)
        shares = [Processes(rank, shared).rows(n) for rank in range(shared)]
        return together(group.spread(shares, draw))
    began, loading = time.perf_counter(), compiled.seconds_loading()
    if isinstance(model, PathModel):
        _refuse(denoise=denoise, trace=trace, profile=profile, temperature=temperature != 1)
        if not isinstance(solver, str):
            raise ValueError(f"a model on a path takes the name of a solver, got {solver!r}")
        return sample_path(
            model,
            n,
            labels,
            seed,
            solver,
            _scale(guidance),
            steps=steps,
            tolerance=tolerance,
            batch_size=batch_size,
            on_nonfinite=on_nonfinite,
            progress=progress,
        )
    if not isinstance(model, Flow):
        raise ValueError(f"expected a flow or a model on a path, got {model.kind!r}")
    _refuse(steps=steps is not None)
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"expected a finite tolerance >= 0, got {tolerance}")
    rule = _guidance(model, guidance, labels)
    if isinstance(solver, str):
        rows = min(n, batch_size) * (1 if rule is None else 2)
        solvers = _named(model, solver, rows, tolerance, -(-n // batch_size))
    else:
        solvers = solver
    denoise = model.noise_std > 0 if denoise is None else denoise

    batches = []
    starts = range(0, n, batch_size)
    parts = autoregressive_parts(model)
    null_label = model.null_label if model.num_classes else None
    with evaluating(model):
        certificate = Certificate(model, rule, null_label) if parts else None
        for first in tracked(starts, len(starts), "sampling", shown=progress):
            seeds = range(seed + first, seed + min(first + batch_size, n))
            inversion = Inversion(
                solvers,
                seeds,
                guidance=rule,
                null_label=null_label,
                on_nonfinite=on_nonfinite,
                tolerance=tolerance or None,  # 0 is more than any certificate can say
                observe=profile and first == 0,
            )
            chunk = None if labels is None else labels[first : first + len(seeds)]
            z = _latents(model, seeds, temperature)
            images = list(model.trajectory(z, chunk, solver=inversion))
            inversion.watch(images[-1], "the image")
            residual = torch.full((len(z),), torch.nan, device=z.device)
            if certificate is not None:
                residual = certificate(images[-1], z, chunk)
            if not trace:
                images = images[-1:]
            if denoise:
                images.append(score_denoise(model, images[-1], chunk))
                inversion.watch(images[-1], "score denoising")
            batches.append((inversion, residual, torch.stack(images)))
    loading = compiled.seconds_loading() - loading
    limit = tolerance_of(parts[0], tolerance or None) if parts else math.inf
    drawn = _gather(model, batches, labels, limit, trace, profile, began)
    return replace(drawn, seconds=drawn.seconds - loading, loading=loading)


def _refuse(**options: object) -> None:
    """Raise ValueError for the first option that is set."""
    for name, value in options.items():
        if value:
            raise ValueError(f"{name} has no meaning for this model")


def _scale(guidance: float | Guidance) -> float:
    """Of classifier-free guidance, which has nothing else to choose."""
    if not isinstance(guidance, Guidance):
        return float(guidance)
    for name in ("rule", "schedule", "temperature"):
        given = getattr(guidance, name)
        if given != getattr(Guidance(guidance.scale), name):
            raise ValueError(
                f"the guidance {name} {given!r} has no meaning for this model: a model on a path "
                "is guided by a scale alone"
            )
    return guidance.scale


def _named(
    model: Flow, name: str, rows: int, tolerance: float | None, batches: int
) -> Solver | Sequence[Solver]:
    """The solvers of that name, the plan's for "auto"."""
    if name == "auto":
        return planned_solvers(model, rows, tolerance, batches)
    return named_solvers(name, number_of_blocks(model), tolerance)


def _latents(model: Flow, seeds: Sequence[int], temperature: float) -> Tensor:
    """The latent of every seed."""
    noise = normal_rows(model.prior.shape, [generator(seed, "sample") for seed in seeds])
    noise = noise.to(torch.promote_types(model.dtype, torch.float32)).to(model.device)
    return model.prior.from_noise(noise * temperature)  # about the prior's mean


def _gather(
    model: Flow,
    batches: list[tuple[Inversion, Tensor, Tensor]],
    labels: Tensor | None,
    limit: float,
    trace: bool,
    profile: bool,
    began: float,
) -> Samples:
    """Put the batches together, without the samples that failed."""
    inversions = [inversion for inversion, _, _ in batches]
    seeds = [seed for inversion in inversions for seed in inversion.seeds]
    failures = {seed: where for i in inversions for seed, where in i.failures.items()}
    kept = [row for row, seed in enumerate(seeds) if seed not in failures]
    steps = torch.cat([images for _, _, images in batches], dim=1)[:, kept]
    records = [inversion.records for inversion in inversions]
    certificate = torch.cat([residual for _, residual, _ in batches])[kept]
    beyond = (~(certificate <= limit)).tolist() if math.isfinite(limit) else [False] * len(kept)
    return Samples(
        x=steps[-1],
        images=model.to_grey_levels(steps[-1]),
        seeds=tuple(seeds[row] for row in kept),
        label=None if labels is None else labels[kept],
        evaluations=sum(sum(r.evaluations for r in rs) if rs else 1 for rs in records),
        iterations=tuple(max(r.evaluations for r in block) for block in zip(*records, strict=True)),
        seconds=time.perf_counter() - began,
        certificate=certificate,
        beyond_tolerance=tuple(seeds[row] for row, far in zip(kept, beyond, strict=True) if far),
        repairs=tuple(
            sum(int(r.repaired.sum()) for r in block) for block in zip(*records, strict=True)
        ),
        failures=failures,
        trace=steps if trace else None,
        passes=tuple(r.passes for r in records[0]) if profile else None,
    )


def _guidance(model: Flow, guidance: float | Guidance, labels: Tensor | None) -> Guidance | None:
    """The rule, or None where it would change nothing. Raises ValueError where it cannot act."""
    rule = guidance if isinstance(guidance, Guidance) else Guidance(scale=float(guidance))
    if rule.scale == 0:
        return None
    if labels is None and rule.temperature == 1:
        raise ValueError(
            "guidance without labels needs an attention temperature other than 1 for the branch "
            "it moves away from: Guidance(scale=..., temperature=0.3)"
        )
    return rule
