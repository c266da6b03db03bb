"""`exactflow demo`: the whole way, from images to a report, in minutes."""

import sys
import time
from collections.abc import Mapping

from rich.table import Table

from exactflow.cli.arguments import Demo
from exactflow.cli.settings import resolve
from exactflow.cli.terminal import say
from exactflow.cli.train import train
from exactflow.core.files import write_atomically
from exactflow.data import load
from exactflow.data.model_classes import classes_in
from exactflow.likelihood.value import LogLikelihood
from exactflow.metrics.baselines import Baseline, baselines
from exactflow.metrics.bits_per_dim import Evaluation, evaluate
from exactflow.pictures import grids as pictures
from exactflow.pictures import report
from exactflow.pictures.figures import curves
from exactflow.runs import Trained
from exactflow.sampling.request import SamplingOptions
from exactflow.sampling.sample import sample
from exactflow.sampling.samples import Samples

PRESET = "tarflow-digits"
PACE = ("run.evaluate_every=100", "run.sample_every=400")
TRACED = 8  # samples in the picture of the way from latent to image


def run(command: Demo) -> None:
    """Train, score beside the baselines, sample, write report.html."""
    began = time.perf_counter()
    settings = resolve(PRESET, (*PACE, *command.settings), None)
    held_out = load(settings.data, "test")
    model = settings.fitted(held_out).build()
    if model.num_classes:
        classes_in(model, held_out)  # an error before anything is trained
    trained = train(settings, command.out, "cpu")
    scored = evaluate(trained.model, held_out)
    floor = baselines(trained.training, held_out)
    shown = SamplingOptions(trace=True, progress=sys.stderr.isatty())
    drawn = sample(trained.model, 64, options=shown)
    rows = _rows(scored, floor)
    _write(trained, scored, floor, drawn, rows, time.perf_counter() - began)
    table = Table(title=f"bits/dim of {len(held_out)} held-out images ({held_out.id})")
    for name in ("model", "bits/dim", "kind", "parameters"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        table.add_row(*row)
    say(table)
    say(f"{time.perf_counter() - began:.0f} s in all; open {command.out / 'report.html'}")


def _rows(scored: Evaluation, floor: Mapping[str, Baseline]) -> list[list[str]]:
    rows = [
        [name, _score(b.likelihood), b.likelihood.kind, f"{b.parameters:,}"]
        for name, b in floor.items()
    ]
    likelihood = scored.likelihood
    rows.append(["TarFlow", _score(likelihood), likelihood.kind, f"{scored.parameters:,}"])
    return rows


def _score(likelihood: LogLikelihood) -> str:
    return f"{likelihood.bits_per_dim:.3f} ± {likelihood.standard_error:.3f}"


def _write(
    trained: Trained,
    scored: Evaluation,
    floor: Mapping[str, Baseline],
    drawn: Samples,
    rows: list[list[str]],
    seconds: float,
) -> None:
    assert drawn.trace is not None
    folder, levels = trained.folder, trained.model.levels
    samples = pictures.png(pictures.grid(drawn.images, levels))
    write_atomically(folder / "samples.png", samples)
    trace = pictures.png(pictures.trajectory_grid(drawn.trace[:, :TRACED]))
    real, _ = trained.training.tensors(slice(len(drawn.seeds)))
    real = pictures.png(pictures.grid(real, levels))
    lines = {name: baseline.likelihood.bits_per_dim for name, baseline in floor.items()}
    data = scored.data
    parts = [
        report.Table(
            f"Bits per dimension of {data['count']} held-out images",
            ["model", "bits/dim", "kind", "parameters"],
            rows,
            f"{data['id']} {data['version']}, {data['split']} split, {levels} grey levels, one "
            f"draw of uniform dequantisation, fingerprint {data['fingerprint'][:16]}; ± is the "
            "standard error over images. Lower is better; "
            f"{trained.settings.data.source} is a small set, so compare within this table only.",
        ),
        report.Picture("Samples", samples, "64 samples, seeds 0 to 63, none left out."),
        report.Picture("Images it was trained on", real, "The first 64 of the training split."),
        report.Picture(
            "From latent to image",
            trace,
            "One sample a row: the Gaussian latent, then the result of each block's inverse.",
        ),
        report.Picture(
            "The run",
            curves(trained.history, lines),
            "Training loss; bits/dim of validation images, averaged weights.",
        ),
        report.Table(
            "Cost",
            ["what", "value"],
            [
                ["training", f"{trained.result.seconds:.1f} s"],
                ["images seen", f"{trained.result.images_seen:,}"],
                ["scoring", f"{scored.describe()['images_per_second']:.0f} images/s"],
                ["64 samples", f"{drawn.seconds:.2f} s, {drawn.evaluations} evaluations"],
                ["largest round-trip residual", f"{float(drawn.certificate.max()):.1e}"],
                ["everything", f"{seconds:.0f} s"],
            ],
        ),
    ]
    title = f"TarFlow on {data['id']}: {trained.model.num_parameters:,} parameters"
    report.write_report(folder / "report.html", title, parts, trained.settings.describe())
