"""The backward error of an inverse: of one block in its own dtype, of a whole flow in float64.

A guess u of the inverse of v is the exact inverse of f(u): its backward error is |f(u) - v|. Errors
of a block grow in the blocks after it, and rounding of the network is invisible in its own
arithmetic. The error of an image is therefore that of encoding it in float64.
"""

import copy
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from exactflow.core.conditional import Conditional
from exactflow.core.model import Flow, autoregressive_parts
from exactflow.core.shapes import Images, Labels, Latents, PerSample, Tokens
from exactflow.core.transform import AutoregressiveTransform
from exactflow.sampling.guidance import Guidance, GuidedTransform

# Backward error of a block that counts as exact, by the network's dtype: the difference in rounding
# between parallel and sequential kernels, with a margin.
TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 1e-1,
}
WHILE_SOLVING = 0.03  # of the tolerance, at which solvers stop: about float32's own error
ROUNDING = 0.3  # a token that would move by less than this times the tolerance is solved


def tolerance_of(transform: AutoregressiveTransform, tolerance: float | None = None) -> float:
    """`tolerance`, or the one of its network's dtype. Raises ValueError for a negative one."""
    if tolerance is not None:
        if not tolerance >= 0:
            raise ValueError(f"expected tolerance >= 0, got {tolerance}")
        return tolerance
    weight = next(transform.parameters())
    dtype = weight.dtype
    if torch.is_autocast_enabled(weight.device.type):
        dtype = torch.get_autocast_dtype(weight.device.type)
    return TOLERANCES[dtype]


def solved(
    conditional: Conditional,
    u: Float[Tensor, "batch window dim"],
    image: Float[Tensor, "batch window dim"],
    v: Float[Tensor, "batch window dim"],
    theta: Float[Tensor, "batch window size"],
    tolerance: float,
) -> Bool[Tensor, "batch window"]:
    """Whether each token u is its own image, F(u), up to the tolerance.

    The distance of latents, |g(u; theta) - v|, must be within the tolerance; or, for a g so steep
    that rounding alone exceeds it, the distance of tokens, |u - F(u)| relative to 1 + |u|, within
    less than a third of it. A token that is not finite is not solved.
    """
    moved = (u - image).abs()
    close = (conditional.forward(u, theta)[0] - v).abs() <= tolerance
    return (close | (moved <= ROUNDING * tolerance * (1 + u.abs()))).all(-1)


@torch.no_grad()
def backward_error(
    transform: AutoregressiveTransform, u: Tokens, v: Tokens, label: Tensor | None
) -> PerSample:
    """max |f(u) - v| of each sample, by one pass of the network in its own arithmetic.

    The conditional is evaluated in float64: the error is that of the solver for the equation with
    this network's theta, without the rounding of theta itself.
    """
    theta = transform.conditioner(u, label).double()
    return (transform.conditional.forward(u.double(), theta)[0] - v).abs().amax((1, 2))


@final
class Certificate:
    """max |encode(x) - z| of images x decoded from latents z, the model evaluated in float64.

    The returned images are encoded, so that the error includes the rounding of the decoding, of the
    images, and of all blocks.

    Args:
        model: a flow with autoregressive parts; copied, which takes twice its memory or more.
        guidance: of the decoding; images are then encoded with the guided blocks.
        null_label: see `GuidedTransform`.

    Example:
        >>> from exactflow import build
        >>> model = build("tarflow-tiny")
        >>> z, _ = model.encode(torch.zeros(2, *model.event_shape))
        >>> residual = Certificate(model)(model.decode(z), z)  # one number per image
    """

    def __init__(
        self, model: Flow, guidance: Guidance | None = None, null_label: int | None = None
    ) -> None:
        exact = copy.deepcopy(model)
        # mps has no float64; the CPU always does
        self._device = torch.device("cpu") if model.device.type == "mps" else model.device
        self._model = exact.to(self._device, torch.float64).eval()
        if guidance is not None:
            for part in autoregressive_parts(self._model):
                part.forward = GuidedTransform(copy.copy(part), guidance, null_label).forward

    @torch.no_grad()
    def __call__(self, x: Images, z: Latents, label: Labels | None = None) -> PerSample:
        """max |encode(x) - z| of each image, on the images' device; it may be NaN or infinite.

        Args:
            x: images in [-1, 1], as they were decoded.
            z: their latents.
            label: class of each.
        """
        label = None if label is None else label.to(self._device)
        with torch.autocast(self._device.type, enabled=False):
            found, _ = self._model.encode(x.to(self._device, torch.float64), label)
        return (found - z.to(self._device)).abs().flatten(1).amax(1).float().to(x.device)
