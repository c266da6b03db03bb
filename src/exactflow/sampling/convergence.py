"""Convergence of Jacobi iteration for each block: two published metrics, and the iteration itself.

Accelerate TarFlow Sampling with GS-Jacobi Iteration, arXiv 2505.12849. A block's inverse is the
fixed point of F(u)_t = g^-1(v_t; theta_t(u_<t)), and u <- F(u) settles at least one token more with
every iteration. Encoding images gives u, from which the speed of the iteration can be measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.core.conditional import Affine
from exactflow.core.model import Flow, NonFiniteError
from exactflow.core.shapes import Tokens
from exactflow.core.transform import AutoregressiveTransform

Norm = Literal["2", "1", "fro"]
NORMS: dict[str, Any] = {"2": 2, "1": 1, "fro": "fro"}  # as torch.linalg.matrix_norm has them
TOLERANCE = 1e-4  # a token this near to the truth, in [-1, 1] units, counts as settled


@final
@dataclass(frozen=True)
class JacobiProfile:
    """Plain Jacobi iteration started at v, compared with the true u.

    Entry n of each sequence is after n iterations, entry 0 the start itself.

    Attributes:
        error: max |u^(n) - u| over samples and tokens; infinite where an iterate overflows.
        least: frontier, the number of leading tokens within the tolerance, of the worst sample.
        median: the samples' median frontier, of two the lower.
        finished: whether every token of every sample came within the tolerance.
    """

    error: tuple[float, ...]
    least: tuple[int, ...]
    median: tuple[int, ...]
    finished: bool

    @property
    def iterations(self) -> int:
        """Iterations made."""
        return len(self.error) - 1


@final
@dataclass(frozen=True)
class BlockConvergence:
    """Metrics and Jacobi profile of one block.

    Attributes:
        igm_latent: initial guessing metric |mean F(g) - u| for the guess g = v: the norm of the
            batch mean, a tokens x dim matrix; infinite where F(g) overflows.
        igm_zeros: the same for the guess v_0 in the first token and zeros behind it.
        crm_parts: |mean exp(-log_scale(u)) u|, |W_s| and |W_u|, where W_s and W_u are the rows of
            the block's last linear map that give log-scale and shift. |W_s| is 0 for a
            volume-preserving block, which has shifts only. None if no such map is found, or the
            conditional is not affine.
        jacobi: the profile.
    """

    igm_latent: float
    igm_zeros: float
    crm_parts: tuple[float, float, float] | None
    jacobi: JacobiProfile

    @property
    def crm(self) -> float | None:
        """Convergence ranking metric, |mean exp(-log_scale) u| |W_s| + |W_u|."""
        if self.crm_parts is None:
            return None
        scaled, log_scale, shift = self.crm_parts
        return scaled * log_scale + shift


@torch.no_grad()
def convergence(
    model: Flow,
    x: Float[Tensor, "n channels height width"],
    label: Int[Tensor, " n"] | None = None,
    *,
    norm: Norm = "2",
    tolerance: float = TOLERANCE,
) -> list[BlockConvergence]:
    """Metrics and Jacobi profile of every autoregressive part, in generation order.

    The published program uses clean images, though the model is defined on noisy ones, drops all
    labels, and takes batch means, in which the residuals of different images cancel; the ranking
    metric depends only on the network's last linear map. Both metrics rank blocks and bound
    nothing: the profile beside them is measured.

    Args:
        model: a flow with autoregressive parts among its stages.
        x: images in [-1, 1], with training noise where the model has it; evaluated all at once.
        label: class of each image; None for dropped labels, as published.
        norm: matrix norm of the metrics: largest singular value, largest column sum, or Frobenius.
        tolerance: largest |u^(n) - u| of a settled token.

    Raises:
        ValueError: for an unknown norm, or a model without autoregressive parts.
        NonFiniteError: the model overflows on these images.
    """
    if norm not in NORMS:
        raise ValueError(f"expected norm {' | '.join(NORMS)}, got {norm!r}")
    blocks = []
    for transform, u, v in _solved(model, x, label):
        zeros = F.pad(v[:, :1], (0, 0, 0, v.shape[1] - 1))
        residuals = [_step(transform, guess, v, label) - u for guess in (v, zeros)]
        igm_latent, igm_zeros = (_norm(residual.mean(0), norm) for residual in residuals)
        parts = _crm_parts(transform, u, label, norm)
        profile = _jacobi(transform, u, v, label, tolerance)
        blocks.append(BlockConvergence(igm_latent, igm_zeros, parts, profile))
    return blocks


def crm_percent(blocks: Sequence[BlockConvergence]) -> list[float | None]:
    """Each block's share of the ranking metric's sum; None where there is nothing to share."""
    metrics = [block.crm for block in blocks]
    total = sum(crm or 0 for crm in metrics)
    return [100 * crm / total if total and crm is not None else None for crm in metrics]


def _solved(
    model: Flow, x: Tensor, label: Tensor | None
) -> list[tuple[AutoregressiveTransform, Tensor, Tensor]]:
    """(part, u, v) with part(u) = v in generation order, recorded while the model encodes.

    Parts whose `forward` is not called, as masked convolutions, are recorded while the model
    decodes, token by token.
    """
    solved: list[tuple[Any, Tensor, Tensor]] = []
    hooks = [
        stage.register_forward_hook(lambda part, u, out: solved.append((part, u[0], out[0])))
        for stage in model.stages
        if isinstance(stage, AutoregressiveTransform)
    ]
    try:
        z, _ = model.encode(x, label)
    finally:
        for hook in hooks:
            hook.remove()
    if not solved:

        def record(transform: AutoregressiveTransform, z: Tensor, label: Tensor | None) -> Tensor:
            u = transform.inverse(z, label)
            solved.insert(0, (transform, u, z))
            return u

        model.decode(z, label, solver=record)
    if not solved:
        raise ValueError(f"{model.kind} has no autoregressive parts to invert")
    for index, (_, _, v) in enumerate(solved):
        if not bool(v.isfinite().all()):
            raise NonFiniteError(
                f"block {len(solved) - index} in generation order gives non-finite latents: "
                "the model's scales overflow on these images"
            )
    return solved[::-1]


def _step(
    transform: AutoregressiveTransform, guess: Tensor, v: Tensor, label: Tensor | None
) -> Tokens:
    """F(guess): one Jacobi iteration, one evaluation of the network."""
    return transform.conditional.inverse(v, transform.conditioner(guess, label))


def _crm_parts(
    transform: AutoregressiveTransform, u: Tensor, label: Tensor | None, norm: Norm
) -> tuple[float, float, float] | None:
    """See `BlockConvergence`; the last linear map is the last registered one of the right size."""
    if not isinstance(transform.conditional, Affine):
        return None
    dim = u.shape[-1]
    fitting = [
        part.weight
        for part in transform.modules()
        if isinstance(part, nn.Linear) and part.out_features in (dim, 2 * dim)
    ]
    if not fitting:
        return None
    *log_scale_rows, shift_rows = fitting[-1].split(dim)
    log_scale = transform.conditioner(u, label)[..., :dim]
    scaled = (log_scale.neg().exp() * u).mean(0)
    of_log_scale = _norm(log_scale_rows[0], norm) if log_scale_rows else 0.0
    return _norm(scaled, norm), of_log_scale, _norm(shift_rows, norm)


def _jacobi(
    transform: AutoregressiveTransform,
    u: Tensor,
    v: Tensor,
    label: Tensor | None,
    tolerance: float,
) -> JacobiProfile:
    """Iterate until every sample has settled, at most the N times that always suffice.

    A sample that has overflowed is given up: attention spreads a NaN to earlier tokens.
    """
    error, least, median = [], [], []
    finished, guess = False, v
    for n in range(transform.num_tokens + 1):
        guess = _step(transform, guess, v, label) if n else v
        off = (guess - u).abs().amax(2)
        frontier = (off <= tolerance).long().cumprod(1).sum(1)
        error.append(float(off.max().nan_to_num(math.inf, math.inf)))
        least.append(int(frontier.min()))
        median.append(int(frontier.median()))
        finished = least[-1] == transform.num_tokens
        if bool(((frontier == transform.num_tokens) | ~off.isfinite().all(1)).all()):
            break
    return JacobiProfile(tuple(error), tuple(least), tuple(median), finished)


def _norm(matrix: Tensor, norm: Norm) -> float:
    if not bool(matrix.isfinite().all()):
        return math.inf
    return float(torch.linalg.matrix_norm(matrix.cpu().double(), NORMS[norm]))
