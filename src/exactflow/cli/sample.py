"""`exactflow sample`."""

import json
import sys
from pathlib import Path

from rich.console import Console

from exactflow.cli.arguments import Sample
from exactflow.cli.settings import load_model
from exactflow.core.model import GenerativeModel
from exactflow.core.processes import current
from exactflow.core.serialization import write_atomically
from exactflow.evaluation import pictures
from exactflow.evaluation.profiles import inversion_plot
from exactflow.sampling.guidance import Guidance
from exactflow.sampling.sample import Samples, sample


def run(command: Sample) -> None:
    """Draw samples and write them with their cost."""
    model = load_model(command.model, command.device)
    if len(command.label) not in (0, 1, command.n):
        raise ValueError(
            f"expected no label, one, or {command.n} (one per sample), got {len(command.label)}"
        )
    drawn = sample(
        model,
        command.n,
        command.label[0] if len(command.label) == 1 else command.label or None,
        command.seed,
        command.solver,
        _guidance(command),
        steps=command.steps,
        tolerance=command.tolerance,
        denoise=command.denoise,
        temperature=command.temperature,
        batch_size=command.batch_size,
        trace=command.trace,
        profile=command.profile,
        on_nonfinite=command.on_nonfinite,
        progress=sys.stderr.isatty(),
    )
    console = Console()
    for seed, where in drawn.failures.items():
        console.print(f"left out: the sample with seed {seed} became non-finite in {where}")
    if not drawn.seeds:
        raise ArithmeticError(f"none of {command.n} samples is finite")
    current().on_main(lambda: _write(command, model, drawn))
    console.print(_summary(drawn, command.out))


def _write(command: Sample, model: GenerativeModel, drawn: Samples) -> None:
    """Pictures and cost."""
    out = command.out
    pictures.save(pictures.grid(drawn.images, model.levels), out / "samples.png")
    for seed, image in zip(drawn.seeds, drawn.images, strict=True):
        pictures.save(pictures.single(image, model.levels), out / f"seed_{seed:06d}.png")
    if drawn.trace is not None:
        pictures.save(pictures.trajectory_grid(drawn.trace[:, :8]), out / "trace.png")
    if drawn.passes is not None:
        write_atomically(out / "inversion.png", inversion_plot(drawn.passes))
    cost = {
        "seeds": drawn.seeds,
        "label": None if drawn.label is None else drawn.label.tolist(),
        "evaluations": drawn.evaluations,
        "iterations": drawn.iterations,
        "seconds": drawn.seconds,
        "loading": drawn.loading,
        "certificate": drawn.certificate.tolist() if drawn.iterations else None,
        "repairs": drawn.repairs,
        "failures": drawn.failures,
    }
    write_atomically(out / "samples.json", (json.dumps(cost, indent=2) + "\n").encode())


def _summary(drawn: Samples, out: Path) -> str:
    return (
        f"{len(drawn.seeds)} samples in {drawn.seconds:.2f} s, "
        + (f"{drawn.loading:.2f} s of loading compiled steps before, " if drawn.loading else "")
        + (
            f"{drawn.evaluations} evaluations, "
            f"largest round-trip residual {float(drawn.certificate.max()):.1e}"
            if drawn.iterations
            else f"{drawn.evaluations or 1} passes"
        )
        + (f", {sum(drawn.repairs)} repairs" if any(drawn.repairs) else "")
        + f": {out / 'samples.png'}"
    )


def _guidance(command: Sample) -> Guidance:
    return Guidance(
        command.guidance,
        command.guidance_rule,
        command.guidance_schedule,
        command.attention_temperature,
    )
