"""`exactflow denoise`."""

import torch

from exactflow.cli.arguments import Denoise
from exactflow.cli.opened import opened
from exactflow.cli.settings import first_images
from exactflow.cli.terminal import say
from exactflow.latent.restoration import denoise, exact_flow
from exactflow.pictures.figures import image_table


def run(command: Denoise) -> None:
    """Add noise to held-out images, remove it, write a picture and numbers."""
    if command.n < 1:
        raise ValueError(f"expected n >= 1, got {command.n}")
    work = opened(command, exact_flow)
    model, dataset = work.model, work.images(command.split)
    images, label = first_images(model, dataset, command.n)
    result = denoise(
        model,
        images,
        label,
        seed=command.seed,
        batch_size=command.batch_size,
        progress=True,
    )
    numbers = result.describe()
    rows = torch.cat([images, *map(model.to_grey_levels, (result.noisy, result.denoised))])
    names = [
        "image",
        f"noisy, {numbers['psnr_noisy']:.1f} dB",
        f"denoised, {numbers['psnr_denoised']:.1f} dB",
    ]
    title = f"y + σ² ∇ ln p(y), one step, σ = {model.noise_std:g}; mean PSNR"
    work.write(
        {
            "model": command.model,
            "data": dataset.describe(),
            "labels": "none" if label is None else "true classes",
            "seed": command.seed,
            **numbers,
        },
        image_table(rows, model.levels, names, [""] * len(images), title),
    )
    say(
        f"{len(images)} images from {numbers['psnr_noisy']:.2f} dB "
        f"({numbers['psnr_noisy_clipped']:.2f} clipped) to {numbers['psnr_denoised']:.2f} dB "
        f"({numbers['psnr_denoised_clipped']:.2f} clipped): {work.out / 'denoise.png'}"
    )
