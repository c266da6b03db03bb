"""Inpainting and denoising with the exact density of a flow and its gradient.

Missing pixels are drawn from p(missing | known) by the Metropolis-adjusted Langevin algorithm
(Roberts and Tweedie, Bernoulli 2, 1996). It needs ln p up to a constant and its gradient, which an
exact flow has; its acceptance step makes the stationary law exact for every step size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float, Int, Integer, UInt8
from torch import Tensor

from exactflow.core import grey_levels as grey
from exactflow.core.doors import as_flow
from exactflow.core.model import Flow, GenerativeModel, NonFiniteError, evaluating, log_density
from exactflow.core.progress import tracked
from exactflow.core.randomness import generator, normal_rows, uniform_rows
from exactflow.data.batches import batches
from exactflow.sampling.denoise import score_denoise

Region = Literal["bottom", "right", "center", "scattered"]
ACCEPTANCE = 0.574  # the target: the fastest rate (Roberts and Rosenthal, JRSS B 60, 1998)
DECAY = 0.6  # the log step size moves by step^-DECAY (acceptance - its target): Robbins-Monro
START = 0.5  # factor on the latents that chains begin from; at 1 the model's scales may overflow
FIRST_STEP = 1e-3  # squared length of a step per dimension, in [-1, 1] units
PEAK = 2.0  # the range of pixels in [-1, 1], for the signal-to-noise ratio


@final
@dataclass(frozen=True)
class Inpainting:
    """Images with their missing pixels drawn.

    Attributes:
        images: grey levels; those of known pixels are the given ones. Draw d of image i is row
            d * n + i, here and below.
        log_density: ln p of the state, in nats w.r.t. [-1, 1], after every step.
        acceptance: share of proposals accepted in the second half of the steps.
        step_size: squared length of a step per dimension, as adapted in the first half.
    """

    images: UInt8[Tensor, "rows channels height width"]
    log_density: Float[Tensor, "steps rows"]
    acceptance: Float[Tensor, " rows"]
    step_size: Float[Tensor, " rows"]


@final
@dataclass(frozen=True)
class Denoising:
    """Images with noise added and removed again, all in [-1, 1] units and not clipped.

    Attributes:
        clean: the images themselves.
        noisy: with Gaussian noise of standard deviation `noise_std`.
        denoised: the posterior mean that the model gives for them.
    """

    clean: Float[Tensor, "n channels height width"]
    noisy: Float[Tensor, "n channels height width"]
    denoised: Float[Tensor, "n channels height width"]
    noise_std: float

    def describe(self) -> dict[str, Any]:
        """Mean peak signal-to-noise ratios in dB, with the noisy images also clipped to [-1, 1]."""
        before, after = psnr(self.noisy, self.clean), psnr(self.denoised, self.clean)
        return {
            "images": len(self.clean),
            "noise_std": self.noise_std,
            "psnr_noisy": float(before.mean()),
            "psnr_noisy_clipped": float(psnr(self.noisy.clamp(-1, 1), self.clean).mean()),
            "psnr_denoised": float(after.mean()),
            "psnr_denoised_clipped": float(psnr(self.denoised.clamp(-1, 1), self.clean).mean()),
            "images_improved": int((after > before).sum()),
        }


def psnr(
    x: Float[Tensor, "n channels height width"], clean: Float[Tensor, "n channels height width"]
) -> Float[Tensor, " n"]:
    """Peak signal-to-noise ratio of each image in dB, for pixels in [-1, 1]."""
    return 10 * (PEAK**2 / (x - clean).square().flatten(1).mean(1)).log10()


def log_density_gradient(
    model: GenerativeModel,
    x: Float[Tensor, "batch channels height width"],
    label: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch channels height width"]]:
    """ln p(x | label) in nats and d/dx of it, for x in [-1, 1], by automatic differentiation.

    Raises:
        ValueError: for a model that is no exact flow, with its kind.
    """
    flow = exact_flow(model)
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        nats = log_density(flow, x, label)
        (gradient,) = torch.autograd.grad(nats.sum(), x)
    return nats.detach(), gradient


def exact_flow(model: GenerativeModel) -> Flow:
    """The model, if it is a flow with an exact density. Raises ValueError otherwise."""
    return as_flow(model, exact=True)


def missing_region(
    shape: tuple[int, int, int], region: Region, seed: int = 0
) -> Bool[Tensor, "channels height width"]:
    """Which pixels are missing: the bottom or right half, the central square of half the side, or
    every second pixel on average, scattered by the seed.
    """
    _, height, width = shape
    missing = torch.zeros(height, width, dtype=torch.bool)
    if region == "bottom":
        missing[height // 2 :] = True
    elif region == "right":
        missing[:, width // 2 :] = True
    elif region == "center":
        top, left = -(-height // 4), -(-width // 4)
        missing[top : height - top, left : width - left] = True
    elif region == "scattered":
        missing = torch.rand(height, width, generator=generator(seed, "missing pixels")) < 0.5
    else:
        raise ValueError(f"expected region bottom | right | center | scattered, got {region!r}")
    return missing.expand(shape).contiguous()


def inpaint(
    model: GenerativeModel,
    images: Integer[Tensor, "n channels height width"],
    missing: Bool[Tensor, "channels height width"],
    label: Int[Tensor, " n"] | None = None,
    *,
    draws: int = 1,
    steps: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> Inpainting:
    """Draw missing pixels from p(missing | known) by adjusted Langevin steps.

    Known pixels get uniform or Gaussian noise as in training, once, and stay fixed. Missing ones
    begin as those of a sample from scaled-down latents; in the second half of the steps the
    conditional density is the stationary law of the chain. A proposal without a finite density is
    never accepted. Images of a model trained with Gaussian noise are denoised at the end.

    Args:
        model: an exact flow.
        images: grey levels; those at missing pixels are not read.
        missing: pixels to draw, the same of every image.
        label: class of each image; None for a dropped label.
        draws: completions of every image, each a chain of its own.
        steps: each one evaluation of the gradient. In the first half the step size follows its
            acceptance; in the second half it is constant.
        seed: the noise of a draw is a function of (seed, image, draw).
        progress: show a bar over steps.

    Raises:
        ValueError: no exact flow, nothing or everything missing, no draw, or too few steps.
        NonFiniteError: the first state of an image has no finite density or gradient.
    """
    flow = exact_flow(model)
    if draws < 1 or steps < 2:
        raise ValueError(f"expected draws >= 1 and steps >= 2, got {draws} and {steps}")
    if tuple(missing.shape) != flow.event_shape or not bool(missing.any()) or bool(missing.all()):
        raise ValueError(
            f"expected a mask {flow.event_shape} with missing and known pixels, "
            f"got {tuple(missing.shape)} with {int(missing.sum())} missing"
        )
    order = [(index, draw) for draw in range(draws) for index in range(len(images))]
    sources = [generator(seed, "inpainting", *name) for name in order]
    images = images.repeat(draws, 1, 1, 1)
    label = None if label is None else label.to(flow.device).repeat(draws)
    missing = missing.to(flow.device)
    with evaluating(flow):
        first = _begin(flow, images, missing, label, sources)
        chain = _Chain(flow, first, missing, label, sources)
        trace, half = [], steps // 2
        for step in tracked(range(steps), steps, "inpainting", shown=progress, unit="steps"):
            trace.append(chain.step(adapt=step < half))
        x = chain.x
        if flow.noise_std > 0:
            x = score_denoise(flow, x, label)
    given = images.to(flow.device, torch.uint8)
    drawn = torch.where(missing, flow.to_grey_levels(x), given)
    accepted, sizes = chain.accepted / (steps - half), chain.log_step.exp()
    return Inpainting(drawn.cpu(), torch.stack(trace).cpu(), accepted.cpu(), sizes.cpu())


def denoise(
    model: GenerativeModel,
    images: Integer[Tensor, "n channels height width"],
    label: Int[Tensor, " n"] | None = None,
    *,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Denoising:
    """Add the noise that a model was trained with, and remove it by the score of its density.

    Args:
        model: an exact flow trained with Gaussian noise.
        images: grey levels.
        label: class of each image; None for a dropped label.
        seed: image i's noise is a function of (seed, i), whatever the batch size.
        batch_size: images denoised together.
        progress: show a bar over batches.

    Raises:
        ValueError: no exact flow, or one trained with dequantisation noise (`score_denoise`).
    """
    flow = exact_flow(model)
    grey.check_images(images, flow.event_shape, flow.levels)
    sources = [generator(seed, "noise to remove", index) for index in range(len(images))]
    clean = flow.from_grey_levels(images)
    noisy = clean + flow.noise_std * normal_rows(flow.event_shape, sources).to(clean)
    parts = []
    with evaluating(flow):
        for rows in batches(len(images), batch_size, "denoising", progress):
            part = None if label is None else label[rows].to(flow.device)
            parts.append(score_denoise(flow, noisy[rows].to(flow.device), part).cpu())
    return Denoising(clean, noisy, torch.cat(parts), flow.noise_std)


def _begin(
    flow: Flow,
    images: Tensor,
    missing: Tensor,
    label: Tensor | None,
    sources: Sequence[torch.Generator],
) -> Float[Tensor, "n channels height width"]:
    """The first states: known pixels as in training, missing ones as in a sample of the model."""
    known = images.to(flow.device).masked_fill(missing, 0)  # missing pixels may be anything
    grey.check_images(known, flow.event_shape, flow.levels)
    dtype = flow.wide_dtype
    noise = normal_rows(flow.event_shape, sources).to(flow.device, dtype)
    if flow.noise_std > 0:
        x = grey.center(known, flow.levels, dtype) + flow.noise_std * noise
    else:
        uniform = uniform_rows(flow.event_shape, sources).to(flow.device, dtype)
        x = grey.dequantize(known, uniform, flow.levels)
    latent = normal_rows(flow.prior.shape, sources).to(flow.device, dtype)
    drawn = flow.decode(START * flow.prior.from_noise(latent), label)
    return torch.where(missing, drawn, x)


@final
class _Chain:
    """One Markov chain for each image, with a step size of its own."""

    def __init__(
        self,
        flow: Flow,
        x: Tensor,
        missing: Tensor,
        label: Tensor | None,
        sources: Sequence[torch.Generator],
    ) -> None:
        self.flow, self.x, self.missing, self.label, self.sources = flow, x, missing, label, sources
        self.nats, self.gradient = self._evaluate(x)
        finite = self.nats.isfinite() & self.gradient.flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            index = int((~finite).nonzero()[0, 0])
            raise NonFiniteError(
                f"image {index}, its missing pixels from a sample, has log-density "
                f"{float(self.nats[index])} ({int((~finite).sum())} of {len(x)} images have no "
                "finite density or gradient): the model's scales overflow there"
            )
        self.log_step = torch.full_like(self.nats, math.log(FIRST_STEP))
        self.adapted = 0  # steps so far that adapted the step size
        self.accepted = torch.zeros_like(self.nats)

    def step(self, adapt: bool) -> Float[Tensor, " n"]:
        """Propose a step, accept it or not; return ln p of the state afterwards."""
        size = self.log_step.exp().view(-1, 1, 1, 1)
        drift = 0.5 * size
        noise = normal_rows(self.flow.event_shape, self.sources).to(self.x)
        there = self.x + (drift * self.gradient + size.sqrt() * noise) * self.missing
        nats, gradient = self._evaluate(there)
        # ln q(here | there) - ln q(there | here) of the two Gaussian proposals
        back = (self.x - there - drift * gradient) * self.missing
        forth = noise * self.missing
        odds = 0.5 * (forth.square() - back.square() / size).flatten(1).sum(1)
        log_ratio = nats - self.nats + odds
        chance = torch.where(nats.isfinite(), log_ratio.clamp(max=0).exp(), 0.0).nan_to_num(0.0)
        uniform = uniform_rows((1,), self.sources)[:, 0].to(chance)
        accept = uniform < chance
        rows = accept.view(-1, 1, 1, 1)
        self.x = torch.where(rows, there, self.x)
        self.gradient = torch.where(rows, gradient, self.gradient)
        self.nats = torch.where(accept, nats, self.nats)
        if adapt:
            self.adapted += 1
            self.log_step = self.log_step + self.adapted**-DECAY * (chance - ACCEPTANCE)
        else:
            self.accepted += accept
        return self.nats

    def _evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        nats, gradient = log_density_gradient(self.flow, x, self.label)
        return nats, gradient * self.missing
