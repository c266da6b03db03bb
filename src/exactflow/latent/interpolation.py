"""Reconstruction and interpolation in a flow's latent space."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from exactflow.core.model import Flow
from exactflow.core.transform import Solver


@final
@dataclass(frozen=True)
class Reconstruction:
    """Images that were encoded and decoded again.

    Attributes:
        z: latents.
        log_abs_det: ln |det dz/dx| in nats.
        x: decoded images in [-1, 1].
        error: max |x - original| of each image.
    """

    z: Float[Tensor, "n *latent"]
    log_abs_det: Float[Tensor, " n"]
    x: Float[Tensor, "n channels height width"]
    error: Float[Tensor, " n"]


@torch.no_grad()
def reconstruct(
    model: Flow,
    images: Integer[Tensor, "n channels height width"],
    label: Int[Tensor, " n"] | None = None,
    *,
    solver: Solver | None = None,
) -> Reconstruction:
    """Encode grey levels and decode them again; the error is rounding and nothing else."""
    x = model.from_grey_levels(images.to(model.device))
    z, log_abs_det = model.encode(x, label)
    back = model.decode(z, label, solver=solver)
    return Reconstruction(z, log_abs_det, back, (back - x).abs().flatten(1).amax(1))


@torch.no_grad()
def interpolate(
    model: Flow,
    first: Integer[Tensor, "n channels height width"],
    last: Integer[Tensor, "n channels height width"],
    steps: int = 8,
    label: Int[Tensor, " n"] | None = None,
    *,
    path: Literal["linear", "spherical"] = "spherical",
    solver: Solver | None = None,
) -> Float[Tensor, "steps n channels height width"]:
    """Images on a path between two images' latents, both ends included, in [-1, 1].

    Args:
        model: a flow.
        first: grey levels the path starts from.
        last: grey levels it ends at.
        steps: images on the path, at least 2.
        label: class for both ends.
        path: straight line, or great circle (Shoemake 1985), which keeps the norm that a
            Gaussian latent has.
        solver: see `Flow.decode`.
    """
    if steps < 2 or first.shape != last.shape:
        raise ValueError(
            f"expected steps >= 2 and two batches of one shape, got {steps}, "
            f"{tuple(first.shape)}, {tuple(last.shape)}"
        )
    if path not in ("linear", "spherical"):
        raise ValueError(f"expected path 'linear' or 'spherical', got {path!r}")
    ends = [model.from_grey_levels(images.to(model.device)) for images in (first, last)]
    a, b = (model.encode(x, label)[0] for x in ends)
    weight = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device)
    weight = weight.view(-1, *[1] * a.dim())
    z = (1 - weight) * a + weight * b
    if path == "spherical":
        flat_a, flat_b = a.flatten(1), b.flatten(1)
        cosine = torch.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1)
        angle = cosine.acos().view(-1, *[1] * (a.dim() - 1))
        great = (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / angle.sin()
        z = torch.where(angle.sin() > torch.finfo(a.dtype).eps, great, z)  # parallel: a line
    return torch.stack([model.decode(row, label, solver=solver) for row in z])
