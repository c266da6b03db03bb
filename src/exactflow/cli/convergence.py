"""`exactflow convergence`."""

from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table

from exactflow.cli.arguments import Convergence
from exactflow.cli.opened import opened
from exactflow.cli.settings import first_images
from exactflow.cli.terminal import say
from exactflow.core.doors import as_flow
from exactflow.core.randomness import generator, normal_rows
from exactflow.pictures.profiles import convergence_plot
from exactflow.sampling.convergence import TOLERANCE, BlockConvergence, convergence, crm_percent


def run(command: Convergence) -> None:
    """Print a row for every block in generation order; write the numbers and a picture."""
    work = opened(command, as_flow)
    model, dataset = work.model, work.images(command.split)
    images, label = first_images(model, dataset, command.n)
    x = model.from_grey_levels(images.to(model.device))
    if model.noise_std > 0:
        sources = [generator(command.seed, "convergence", index) for index in range(len(x))]
        x = x + model.noise_std * normal_rows(model.event_shape, sources).to(x)
    blocks = convergence(model, x, label, norm=command.norm)
    say(_table(blocks))
    summary = {
        "model": command.model,
        "data": dataset.describe(),
        "images": len(x),
        "noise_std": model.noise_std,
        "seed": command.seed,
        "norm": command.norm,
        "tolerance": TOLERANCE,
        "blocks": [
            {**asdict(block), "crm": block.crm, "crm_percent": share}
            for block, share in zip(blocks, crm_percent(blocks), strict=True)
        ],
    }
    work.write(summary, convergence_plot(blocks))
    noise = f", with Gaussian noise {model.noise_std:g}, as in training" if model.noise_std else ""
    say(f"{len(x)} images of {dataset.id}, {command.split}{noise}: {work.out}")


def _table(blocks: Sequence[BlockConvergence]) -> Table:
    table = Table(title="blocks in generation order")
    for name in ("block", "IGM latent", "IGM zeros", "better", "CRM", "CRM %", "iterations"):
        table.add_column(name, justify="right")
    for index, (block, share) in enumerate(zip(blocks, crm_percent(blocks), strict=True), 1):
        table.add_row(
            str(index),
            f"{block.igm_latent:.4g}",
            f"{block.igm_zeros:.4g}",
            "latent" if block.igm_latent <= block.igm_zeros else "zeros",
            "-" if block.crm is None else f"{block.crm:.4g}",
            "-" if share is None else f"{share:.1f}",
            str(block.jacobi.iterations) if block.jacobi.finished else "not settled",
        )
    return table
