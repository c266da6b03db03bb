"""How exact an inverse is: the backward error of every token, which one pass gives for free.

For u_t = F(u)_t = v_t exp(a_t(u_<t)) + m_t(u_<t), the map forward gives f(u) - v =
(u - F(u)) exp(-a) exactly: u is the inverse of a latent that far from the given one.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from exactflow.core.transform import AutoregressiveTransform

# Backward error of a block that counts as exact, by the network's dtype: what remains when parallel
# and sequential kernels round differently, with a margin.
TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 1e-1,
}
WHILE_SOLVING = 0.03  # of the tolerance: solvers stop where float32 has its own error
ROUNDING = 0.3  # a token that would move by less than this times the tolerance may stand


def tolerance_of(transform: AutoregressiveTransform, tolerance: float | None = None) -> float:
    """`tolerance`, or what its network's dtype can reach. Raises ValueError for a negative one."""
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
    u: Float[Tensor, "batch window dim"],
    image: Float[Tensor, "batch window dim"],
    log_scale: Float[Tensor, "batch window dim"],
    tolerance: float,
) -> Bool[Tensor, "batch window"]:
    """Whether each token is its own image under F, up to the tolerance.

    |u - F(u)| exp(-a), the distance of latents, is held to the tolerance; where exp(-a) is so
    large that rounding alone exceeds it, the distance of the tokens themselves, relative to
    1 + |u|, to less than a third of it. What is not finite is not solved.
    """
    moved = (u - image).abs()
    close = moved * torch.exp(-log_scale) <= tolerance
    return (close | (moved <= ROUNDING * tolerance * (1 + u.abs()))).all(-1)


def certify(
    transform: AutoregressiveTransform,
    u: Float[Tensor, "batch tokens dim"],
    v: Float[Tensor, "batch tokens dim"],
    label: Tensor | None,
    tolerance: float,
) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """max |f(u) - v| of each sample, and whether all its tokens are `solved`: one pass."""
    shift, log_scale = transform.affine(u, label)
    residual = ((u - shift) * torch.exp(-log_scale) - v).abs().amax((1, 2))
    image = torch.addcmul(shift, v, log_scale.exp())
    return residual, solved(u, image, log_scale, tolerance).all(1) & residual.isfinite()
