"""Muon: a weight matrix inside of a layer moves along U V^T, where its momentum is U S V^T.

Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024), and Liu et al., Muon
is scalable for LLM training, arXiv 2502.16982. Everything else moves by AdamW (Loshchilov and
Hutter, arXiv 1711.05101).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of a quintic that brings 0.01 .. 1 to 0.7 .. 1.2
EPS = 1e-8  # AdamW's


@final
class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum for groups with "matrices", AdamW for the others.

    A matrix W of gradient G moves by M <- 0.95 M + 0.05 G and W <- W - lr sqrt(max(1, rows /
    columns)) orthogonalize(0.95 M + 0.05 G), after decoupled weight decay.

    Args:
        groups: of parameters, each with "lr", "weight_decay" and "matrices": how many matrices of
            equal height each of its 2-D weights stacks (three for one map to queries, keys and
            values); 0 for AdamW.
        betas: decay of AdamW's moments.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move all parameters that have a gradient. Raises ValueError for a closure."""
        if closure is not None:
            raise ValueError("Muon evaluates nothing itself: expected no closure")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            if group["matrices"]:
                self._move_matrices(parameters, group["lr"], group["matrices"])
            else:
                self._move_by_adam(parameters, group["lr"], *group["betas"])

    def _move_matrices(self, parameters: list[Tensor], rate: float, stacked: int) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        updates = torch._foreach_lerp(gradients, momenta, MOMENTUM)
        alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter, update in zip(parameters, updates, strict=True):
            alike[parameter.shape].append((parameter, update))
        for pairs in alike.values():
            cut = torch.stack([update for _, update in pairs]).unflatten(1, (stacked, -1))
            rows, columns = cut.shape[2:]
            scale = math.sqrt(max(1.0, rows / columns))
            moved = orthogonalize(cut.flatten(0, 1)).view_as(cut).flatten(1, 2)
            for (parameter, _), direction in zip(pairs, moved, strict=True):
                parameter.add_(direction, alpha=-rate * scale)

    def _move_by_adam(
        self, parameters: list[Tensor], rate: float, beta1: float, beta2: float
    ) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for p in parameters:
            if not self.state[p]:
                zeros = torch.zeros_like(p), torch.zeros_like(p)
                self.state[p] |= dict(zip(("exp_avg", "exp_avg_sq"), zeros, strict=True))
                self.state[p]["step"] = torch.zeros((), device="cpu")
        first = [self.state[p]["exp_avg"] for p in parameters]
        second = [self.state[p]["exp_avg_sq"] for p in parameters]
        counts = [self.state[p]["step"] for p in parameters]
        torch._foreach_add_(counts, 1)
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        done = [float(count) for count in counts]
        scales = torch._foreach_sqrt(second)
        torch._foreach_div_(scales, [math.sqrt(1 - beta2**t) for t in done])
        torch._foreach_add_(scales, EPS)
        torch._foreach_addcdiv_(parameters, first, scales, [-rate / (1 - beta1**t) for t in done])


def orthogonalize(matrices: Tensor) -> Tensor:
    """U V^T of matrices U S V^T up to singular values of 0.7 to 1.2, by a Newton-Schulz iteration.

    Args:
        matrices: (count, rows, columns), all of full rank or close to it.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
