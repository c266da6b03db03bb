"""`exactflow encode`."""

import torch
from safetensors.torch import save

from exactflow.cli.arguments import Encode
from exactflow.cli.places import check_apart, own_folder
from exactflow.cli.settings import data_of, first_images, load_flow
from exactflow.cli.terminal import say
from exactflow.core.serialization import finite, write_atomically, write_json
from exactflow.data import load
from exactflow.latent.interpolation import interpolate, reconstruct
from exactflow.metrics.bits_per_dim import check_fits
from exactflow.pictures import grids as pictures


def run(command: Encode) -> None:
    """Write latents, reconstructions with their error, and interpolations."""
    model = load_flow(command.model, command.device)
    data = data_of(model, command.settings)
    out = command.out or own_folder(command.model, "encode")
    check_apart(out, data)
    dataset = load(data, command.split)
    check_fits(model, dataset)
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
    summary = {
        "data": dataset.describe(),
        "images": len(images),
        "max_error": result.error.tolist(),
        "wrong_grey_levels": wrong,
        "log_abs_det": result.log_abs_det.tolist(),
    }
    write_json(out / "encode.json", finite(summary))
    say(
        f"{len(images)} images encoded and decoded: largest error "
        f"{float(result.error.max()):.1e} in [-1, 1], {wrong} grey levels differ: {out}"
    )
