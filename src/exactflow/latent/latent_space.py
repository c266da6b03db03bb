"""Arithmetic in a flow's latent space, and the error of encoding; see also `interpolation`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from exactflow.core.model import Flow, NonFiniteError, autoregressive_parts, evaluating
from exactflow.data.batches import batches
from exactflow.latent.interpolation import reconstruct
from exactflow.sampling.certificate import Certificate
from exactflow.sampling.flow_solvers import per_block
from exactflow.sampling.inversion import Inversion
from exactflow.sampling.planner import Planned


@final
@dataclass(frozen=True)
class ReconstructionError:
    """The difference between images and their decoded latents.

    Attributes:
        largest: max |decode(encode(x)) - x| over the pixels of each image, in [-1, 1].
        mean: the mean over its pixels.
        wrong: pixels of each image whose grey level differs.
    """

    largest: Float[Tensor, " n"]
    mean: Float[Tensor, " n"]
    wrong: Int[Tensor, " n"]

    def describe(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "images": len(self.largest),
            "largest": float(self.largest.max()),
            "mean": float(self.mean.mean()),
            "wrong_grey_levels": int(self.wrong.sum()),
        }


@final
@dataclass(frozen=True)
class Edit:
    """Images moved along a direction of the latent space.

    Attributes:
        x: decoded images in [-1, 1], by strength and image.
        certificate: max |encode(x) - z| of each image, as in `Samples`; NaN for a flow without
            autoregressive parts.
    """

    x: Float[Tensor, "strengths n channels height width"]
    certificate: Float[Tensor, "strengths n"]


def reconstruction_error(
    model: Flow,
    images: Integer[Tensor, "n channels height width"],
    label: Int[Tensor, " n"] | None = None,
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> ReconstructionError:
    """Encode and decode images, and compare: the error of an exact flow is that of rounding.

    Raises:
        ValueError: for images that are not the model's.
    """
    largest, mean, wrong = [], [], []
    with evaluating(model):
        for rows in batches(len(images), batch_size, "decoding", progress):
            part = images[rows].to(model.device)
            back = reconstruct(model, part, None if label is None else label[rows].to(model.device))
            error = (back.x - model.from_grey_levels(part)).abs().flatten(1)
            largest.append(back.error.cpu())
            mean.append(error.mean(1).cpu())
            wrong.append((model.to_grey_levels(back.x) != part).flatten(1).sum(1).cpu())
    return ReconstructionError(torch.cat(largest), torch.cat(mean), torch.cat(wrong))


@torch.no_grad()
def encode_images(
    model: Flow,
    images: Integer[Tensor, "n channels height width"],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> Float[Tensor, "n *latent"]:
    """Latents of grey levels without noise and without labels, on the CPU."""
    parts = []
    with evaluating(model):
        for rows in batches(len(images), batch_size, "encoding", progress):
            z, _ = model.encode(model.from_grey_levels(images[rows].to(model.device)))
            parts.append(z.cpu())
    return torch.cat(parts)


def attribute_direction(
    latents: Float[Tensor, "n *latent"], has: Bool[Tensor, " n"]
) -> Float[Tensor, "*latent"]:
    """Mean latent of the images that have an attribute minus that of those which have not.

    Kingma and Dhariwal, Glow, arXiv 1807.03039, section 6.

    Raises:
        ValueError: unless some images have it and some have not.
    """
    if not bool(has.any()) or bool(has.all()):
        raise ValueError(
            f"expected images with the attribute and images without, "
            f"got {int(has.sum())} of {len(has)} with it"
        )
    return latents[has].mean(0) - latents[~has].mean(0)


def move(
    model: Flow,
    latents: Float[Tensor, "n *latent"],
    direction: Float[Tensor, "*latent"],
    strengths: Sequence[float],
) -> Edit:
    """Decode z + s * direction for every strength s, without labels.

    The inverse is by the solvers of `sample`, certified, and repaired where its error is too large.

    Args:
        model: a flow.
        latents: z, as `encode_images` gives them.
        direction: of one latent's shape.
        strengths: s; 0 gives the images back.

    Raises:
        ValueError: for shapes that do not fit, or no strengths.
        NonFiniteError: a latent has no finite image; names the image by its number.
    """
    if not strengths or latents.shape[1:] != direction.shape:
        raise ValueError(
            f"expected strengths and a direction of a latent's shape {tuple(latents.shape[1:])}, "
            f"got {list(strengths)} and {tuple(direction.shape)}"
        )
    images, certificates = [], []
    with evaluating(model):
        solvers = per_block(Planned(), model, len(latents))
        certificate = Certificate(model) if autoregressive_parts(model) else None
        for strength in strengths:
            inversion = Inversion(solvers, range(len(latents)), on_nonfinite="omit")
            z = (latents + strength * direction).to(model.device)
            x = model.decode(z, solver=inversion)
            inversion.watch(x, "the image")
            failures = inversion.watch.failures
            for index, place in failures.items():
                raise NonFiniteError(
                    f"image {index} moved by strength {strength:g} became non-finite in {place} "
                    f"({len(failures)} of {len(latents)} images did): the model's scales "
                    "overflow there; smaller strengths stay closer to its images"
                )
            images.append(x.cpu())
            residual = torch.full((len(z),), torch.nan)
            certificates.append(residual if certificate is None else certificate(x, z).cpu())
    return Edit(torch.stack(images), torch.stack(certificates))
