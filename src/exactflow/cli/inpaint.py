"""`exactflow inpaint`."""

import math
from typing import Any

import torch
from torch import Tensor

from exactflow.cli.arguments import Inpaint
from exactflow.cli.opened import opened
from exactflow.cli.settings import first_images
from exactflow.cli.terminal import say
from exactflow.core.model import Flow
from exactflow.latent.restoration import (
    PEAK,
    Inpainting,
    exact_flow,
    inpaint,
    missing_region,
)
from exactflow.pictures.figures import image_table


def run(command: Inpaint) -> None:
    """Draw the missing pixels of held-out images, write a picture and numbers."""
    if command.n < 1:
        raise ValueError(f"expected n >= 1, got {command.n}")
    work = opened(command, exact_flow)
    model, dataset = work.model, work.images(command.split)
    images, label = first_images(model, dataset, command.n)
    missing = missing_region(model.event_shape, command.missing, command.seed)
    drawn = inpaint(
        model,
        images,
        missing,
        label,
        draws=command.draws,
        steps=command.steps,
        seed=command.seed,
        progress=True,
    )
    numbers = _numbers(command, model, images, missing, drawn)
    work.write(
        {
            "model": command.model,
            "data": dataset.describe(),
            "labels": "none" if label is None else "true classes",
            "seed": command.seed,
            **numbers,
        },
        _picture(model, images, missing, drawn),
    )
    found = numbers["psnr_of_missing_pixels"]
    say(
        f"{command.draws} draws for each of {len(images)} images, "
        f"{float(drawn.acceptance.mean()):.0%} accepted, "
        f"a random walk of {numbers['reach']:.2g} in [-1, 1]; "
        f"missing pixels: {_decibels(found['a draw'])} a draw, "
        f"{_decibels(found['mean of the draws'])} their mean, "
        f"{_decibels(found['mean of the known pixels'])} the mean known pixel: "
        f"{work.out / 'inpaint.png'}"
    )


def _numbers(
    command: Inpaint, model: Flow, images: Tensor, missing: Tensor, drawn: Inpainting
) -> dict[str, Any]:
    """What was drawn, and how far a draw and the mean of them are from the truth."""
    x = model.from_grey_levels(drawn.images).view(command.draws, *images.shape)
    truth = model.from_grey_levels(images)
    settled = command.steps - command.steps // 2
    flat = truth[:, ~missing].mean(1).view(-1, 1, 1, 1).expand_as(truth)
    return {
        "missing": command.missing,
        "missing_pixels": int(missing.sum()),
        "draws": command.draws,
        "steps": command.steps,
        "acceptance": drawn.acceptance.tolist(),
        "step_size": drawn.step_size.tolist(),
        "reach": float((drawn.step_size * settled).sqrt().mean()),
        "log_density": drawn.log_density[-1].tolist(),
        "psnr_of_missing_pixels": {
            "a draw": _missing_psnr(x, truth, missing),
            "mean of the draws": _missing_psnr(x.mean(0), truth, missing),
            "mean of the known pixels": _missing_psnr(flat, truth, missing),
        },
    }


def _picture(model: Flow, images: Tensor, missing: Tensor, drawn: Inpainting) -> bytes:
    """One column an image: the image, what is known of it, and every draw."""
    grey = torch.full_like(images, (model.levels - 1) // 2)
    draws = drawn.images.split(len(images))
    rows = torch.cat([images, torch.where(missing, grey, images), *draws])
    names = ["image", "known", *(f"draw {index}" for index in range(1, len(draws) + 1))]
    title = "missing pixels drawn from p(missing | known), adjusted Langevin steps"
    return image_table(rows, model.levels, names, [""] * len(images), title)


def _missing_psnr(x: Tensor, truth: Tensor, missing: Tensor) -> float | None:
    """Peak signal-to-noise ratio in dB of the missing pixels of all images; None without error."""
    error = float((x - truth)[..., missing].square().mean())
    return 10 * math.log10(PEAK**2 / error) if error else None


def _decibels(value: float | None) -> str:
    return "no error" if value is None else f"{value:.2f} dB"
