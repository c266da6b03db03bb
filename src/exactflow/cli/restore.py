"""`exactflow restore`."""

import math
from typing import Any

import torch
from torch import Tensor

from exactflow.cli.latent_arguments import Restore
from exactflow.cli.places import check_apart, own_folder
from exactflow.cli.settings import data_of, first_images, load_model
from exactflow.cli.terminal import say
from exactflow.core.model import Flow
from exactflow.core.serialization import finite, write_atomically, write_json
from exactflow.data import load
from exactflow.latent.restoration import PEAK, denoise, exact_flow, inpaint, missing_region
from exactflow.metrics.bits_per_dim import check_fits
from exactflow.pictures.figures import image_table


def run(command: Restore) -> None:
    """Take something away from held-out images, give it back, write a picture and numbers."""
    if command.n < 1:
        raise ValueError(f"expected n >= 1, got {command.n}")
    model = exact_flow(load_model(command.model, command.device))
    data = data_of(model, command.settings)
    out = command.out or own_folder(command.model, "restore")
    check_apart(out, data)
    dataset = load(data, command.split)
    check_fits(model, dataset)
    images, label = first_images(model, dataset, command.n)
    restored = _inpaint if command.task == "inpaint" else _denoise
    numbers, picture, sentence = restored(command, model, images, label)
    summary = {
        "model": command.model,
        "data": dataset.describe(),
        "task": command.task,
        "labels": "none" if label is None else "true classes",
        "seed": command.seed,
        **finite(numbers),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{command.task}.json", summary)
    write_atomically(out / f"{command.task}.png", picture)
    say(f"{sentence}: {out / command.task}.png")


def _inpaint(
    command: Restore, model: Flow, images: Tensor, label: Tensor | None
) -> tuple[dict[str, Any], bytes, str]:
    """Several completions of each image, and the mean of them against the truth."""
    missing = missing_region(model.event_shape, command.missing, command.seed)
    n, draws = len(images), command.draws
    drawn = inpaint(
        model,
        images,
        missing,
        label,
        draws=draws,
        steps=command.steps,
        seed=command.seed,
        progress=True,
    )
    x = model.from_grey_levels(drawn.images).view(draws, n, *model.event_shape)
    truth = model.from_grey_levels(images)
    reach = float((drawn.step_size * (command.steps - command.steps // 2)).sqrt().mean())
    flat = truth[:, ~missing].mean(1).view(-1, 1, 1, 1).expand_as(truth)
    numbers = {
        "missing": command.missing,
        "missing_pixels": int(missing.sum()),
        "draws": draws,
        "steps": command.steps,
        "acceptance": drawn.acceptance.tolist(),
        "step_size": drawn.step_size.tolist(),
        "reach": reach,
        "log_density": drawn.log_density[-1].tolist(),
        "psnr_of_missing_pixels": {
            "a draw": _missing_psnr(x, truth, missing),
            "mean of the draws": _missing_psnr(x.mean(0), truth, missing),
            "mean of the known pixels": _missing_psnr(flat, truth, missing),
        },
    }
    grey = torch.full_like(images, (model.levels - 1) // 2)
    rows = [images, torch.where(missing, grey, images), *drawn.images.split(n)]
    names = ["image", "known", *(f"draw {index}" for index in range(1, draws + 1))]
    title = "missing pixels drawn from p(missing | known), adjusted Langevin steps"
    picture = image_table(torch.cat(rows), model.levels, names, [""] * n, title)
    found = numbers["psnr_of_missing_pixels"]
    sentence = (
        f"{draws} draws for each of {n} images, {float(drawn.acceptance.mean()):.0%} accepted, "
        f"a random walk of {reach:.2g} in [-1, 1]; "
        f"missing pixels: {_decibels(found['a draw'])} a draw, "
        f"{_decibels(found['mean of the draws'])} their mean, "
        f"{_decibels(found['mean of the known pixels'])} the mean known pixel"
    )
    return numbers, picture, sentence


def _denoise(
    command: Restore, model: Flow, images: Tensor, label: Tensor | None
) -> tuple[dict[str, Any], bytes, str]:
    """Noise added and removed."""
    result = denoise(
        model,
        images,
        label,
        seed=command.seed,
        batch_size=command.batch_size,
        progress=True,
    )
    numbers = result.describe()
    shown = [model.to_grey_levels(x) for x in (result.noisy, result.denoised)]
    names = [
        "image",
        f"noisy, {numbers['psnr_noisy']:.1f} dB",
        f"denoised, {numbers['psnr_denoised']:.1f} dB",
    ]
    title = f"y + σ² ∇ ln p(y), one step, σ = {model.noise_std:g}; mean PSNR"
    sheet = torch.cat([images, *shown])
    picture = image_table(sheet, model.levels, names, [""] * len(images), title)
    sentence = (
        f"{len(images)} images from {numbers['psnr_noisy']:.2f} dB "
        f"({numbers['psnr_noisy_clipped']:.2f} clipped) to {numbers['psnr_denoised']:.2f} dB "
        f"({numbers['psnr_denoised_clipped']:.2f} clipped)"
    )
    return numbers, picture, sentence


def _missing_psnr(x: Tensor, truth: Tensor, missing: Tensor) -> float | None:
    """Peak signal-to-noise ratio in dB of the missing pixels of all images; None without error."""
    error = float((x - truth)[..., missing].square().mean())
    return 10 * math.log10(PEAK**2 / error) if error else None


def _decibels(value: float | None) -> str:
    return "no error" if value is None else f"{value:.2f} dB"
