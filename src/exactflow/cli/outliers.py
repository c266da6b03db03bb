"""`exactflow outliers`."""

import torch
from rich.table import Table

from exactflow.cli.arguments import Outliers
from exactflow.cli.opened import opened
from exactflow.cli.terminal import say
from exactflow.cli.trained_on import trained_on
from exactflow.core.files import write_atomically
from exactflow.data import ImageDataset
from exactflow.latent.out_of_distribution import (
    SCORES,
    auroc,
    foreign_set,
    outlier_plot,
    outlier_scores,
)
from exactflow.latent.restoration import exact_flow
from exactflow.likelihood.log_likelihood import log_likelihood
from exactflow.pictures.figures import image_table

SHOWN = 10  # images of each side in the picture of them


def run(command: Outliers) -> None:
    """Score both sets; print the area under the curve of every score, write pictures."""
    work = opened(command, exact_flow)
    model, inside = work.model, work.images("test", command.n)
    training = work.images("train", command.training)
    outside = foreign_set(
        command.outside, model.event_shape, model.levels, command.n, border=command.border
    )
    if (outside.id, outside.version) == (inside.id, inside.version):
        raise ValueError(
            f"expected a set other than the model's own, {inside.id}: --outside SOURCE"
        )
    options = {
        "seed": command.seed,
        "batch_size": command.batch_size,
        "progress": True,
    }
    other_data = trained_on(model, work.data, inside)
    typical = log_likelihood(model, training.tensors()[0], **options).bits_per_dim
    scores = [outlier_scores(model, s.tensors()[0], typical, **options) for s in (inside, outside)]
    areas = {name: auroc(scores[0][name], scores[1][name]) for name in SCORES}
    means = {name: [float(side[name].mean()) for side in scores] for name in SCORES}
    summary = {
        "model": command.model,
        "inside": inside.describe(),
        "outside": outside.describe(),
        "training": training.describe(),
        **({"trained on": other_data} if other_data else {}),
        "labels": "dropped",
        "seed": command.seed,
        "typical_bits_per_dim": typical,
        "scores": {
            name: {
                "auroc": areas[name],
                "mean_inside": means[name][0],
                "mean_outside": means[name][1],
            }
            for name in SCORES
        },
    }
    work.write(summary, outlier_plot(scores[0], scores[1], (inside.id, outside.id)))
    write_atomically(work.out / "images.png", _sheet(inside, outside))
    table = Table(title=f"{outside.id} (outside) against {inside.id} (inside)")
    for name in ("score", "AUROC", "mean inside", "mean outside"):
        table.add_column(name, justify="left" if name == "score" else "right")
    for name in SCORES:
        table.add_row(name, f"{areas[name]:.3f}", *(f"{mean:.3f}" for mean in means[name]))
    say(table)
    if other_data:
        say(f"the model was trained on {other_data}")
    say(
        f"{len(inside)} images inside, {len(outside)} outside; 0.5 is chance, less means that the "
        f"score takes them the wrong way round: {work.out}"
    )


def _sheet(inside: ImageDataset, outside: ImageDataset) -> bytes:
    """Some images of each side."""
    shown = min(SHOWN, len(inside), len(outside))
    images = torch.cat([side.tensors(slice(shown))[0] for side in (inside, outside)])
    rows = (f"inside: {inside.id}", f"outside: {outside.id}")
    return image_table(images, inside.levels, rows, [""] * shown)
