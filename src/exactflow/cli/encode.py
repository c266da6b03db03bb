"""`exactflow encode`."""

import torch
from safetensors.torch import save

from exactflow.cli.arguments import Encode
from exactflow.cli.opened import opened
from exactflow.cli.settings import first_images
from exactflow.cli.terminal import say
from exactflow.core.doors import as_flow
from exactflow.core.files import write_atomically
from exactflow.latent.interpolation import interpolate, reconstruct
from exactflow.pictures import grids as pictures


def run(command: Encode) -> None:
    """Write latents, reconstructions with their error, and interpolations."""
    work = opened(command, as_flow)
    model, out, dataset = work.model, work.out, work.images(command.split)
    images, label = first_images(model, dataset, command.n)
    result = reconstruct(model, images, label)
    out.mkdir(parents=True, exist_ok=True)
    latents = {"z": result.z.cpu().contiguous(), "log_abs_det": result.log_abs_det.cpu()}
    write_atomically(out / "latents.safetensors", save(latents))
    both = torch.cat([images, model.to_grey_levels(result.x).cpu()])
    pictures.save(pictures.grid(both, model.levels, len(images)), out / "reconstruction.png")
    wrong = int((both[: len(images)] != both[len(images) :]).sum())
    if len(images) > 1:
        between = None if label is None else label[1:]
        path = interpolate(
            model, images[:-1], images[1:], command.steps, between, path=command.path
        )
        rows = model.to_grey_levels(path).transpose(0, 1).flatten(0, 1)
        sheet = pictures.grid(rows, model.levels, columns=command.steps)
        pictures.save(sheet, out / "interpolation.png")
    work.write(
        {
            "data": dataset.describe(),
            "images": len(images),
            "max_error": result.error.tolist(),
            "wrong_grey_levels": wrong,
            "log_abs_det": result.log_abs_det.tolist(),
        }
    )
    say(
        f"{len(images)} images encoded and decoded: largest error "
        f"{float(result.error.max()):.1e} in [-1, 1], {wrong} grey levels differ: {out}"
    )
