"""Inverting a flow's autoregressive parts, with what it cost and how exact it came out."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from exactflow.core.model import NonFiniteError
from exactflow.core.transform import AutoregressiveTransform, Solver
from exactflow.sampling.guidance import Guidance, GuidedTransform


def sequential(transform: AutoregressiveTransform, z: Tensor, label: Tensor | None) -> Tensor:
    """Token by token with a cache: the reference inverse."""
    return transform.inverse(z, label)


SOLVERS: dict[str, Solver] = {"auto": sequential, "sequential": sequential}


def named_solver(name: str) -> Solver:
    """The solver of that name. Raises ValueError naming the known ones."""
    if name not in SOLVERS:
        raise ValueError(f"expected solver {' | '.join(sorted(SOLVERS))}, got {name!r}")
    return SOLVERS[name]


@final
@dataclass(frozen=True)
class BlockRecord:
    """What inverting one block took and gave.

    Attributes:
        evaluations: network passes, whatever their width.
        tokens: tokens evaluated per sample.
        seconds: wall-clock, certificate included.
        residual: max |f(u) - v| of each sample over the block's tokens, from one parallel pass:
            u is the exact inverse of a latent that far from the given one.
    """

    evaluations: int
    tokens: int
    seconds: float
    residual: Float[Tensor, " batch"]


@final
class CountedTransform(AutoregressiveTransform):
    """A transform that counts what is asked of it."""

    def __init__(self, transform: AutoregressiveTransform) -> None:
        super().__init__()
        self.transform = transform
        self.num_tokens = transform.num_tokens
        self.evaluations = 0
        self.tokens = 0

    def new_cache(self, x: Float[Tensor, "batch tokens dim"]) -> Any:
        """See `AutoregressiveTransform.new_cache`."""
        return self.transform.new_cache(x)

    def affine(
        self,
        x: Float[Tensor, "batch stop dim"],
        label: Int[Tensor, " batch"] | None = None,
        cache: Any = None,
        start: int = 0,
        temperature: Float[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch window dim"], Float[Tensor, "batch window dim"]]:
        """See `AutoregressiveTransform.affine`; the first token alone costs no evaluation."""
        read = x.shape[1] - 1 - max(start - 1, 0)
        self.evaluations += read > 0
        self.tokens += read
        return self.transform.affine(x, label, cache, start, temperature)


@final
class Inversion:
    """A solver that guides, certifies, watches for non-finite values and keeps records.

    Args:
        solver: what does the work, block by block.
        seeds: the samples' names in error messages.
        guidance: None for none.
        null_label: see `GuidedTransform`.
        on_nonfinite: "raise" NonFiniteError, or "omit": mark the sample in `failed` and go on.
    """

    def __init__(
        self,
        solver: Solver,
        seeds: Sequence[int],
        *,
        guidance: Guidance | None = None,
        null_label: int | None = None,
        on_nonfinite: Literal["raise", "omit"] = "raise",
    ) -> None:
        self.solver = solver
        self.seeds = list(seeds)
        self.guidance = guidance
        self.null_label = null_label
        self.on_nonfinite = on_nonfinite
        self.records: list[BlockRecord] = []
        self.failures: dict[int, str] = {}

    @torch.no_grad()
    def __call__(
        self,
        transform: AutoregressiveTransform,
        z: Float[Tensor, "batch tokens dim"],
        label: Int[Tensor, " batch"] | None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Invert one block; see `Solver`."""
        began = time.perf_counter()
        system = transform
        if self.guidance is not None:
            system = GuidedTransform(transform, self.guidance, self.null_label)
        counted = CountedTransform(system)
        u = self.solver(counted, z, label)
        residual = (system(u, label)[0] - z).abs().amax((1, 2))
        self.watch(u, f"block {len(self.records) + 1} in generation order")
        self.records.append(
            BlockRecord(
                counted.evaluations,
                counted.tokens,
                time.perf_counter() - began,
                residual,
            )
        )
        return u

    def watch(self, result: Float[Tensor, "batch *shape"], place: str) -> None:
        """Record or raise the first non-finite entry of every sample that has one.

        The first axis of a sample's result is what the message calls a token.
        """
        finite = result.isfinite().flatten(2).all(-1)
        if bool(finite.all()):
            return
        for row in (~finite).any(1).nonzero()[:, 0].tolist():
            token = int((~finite[row]).nonzero()[0, 0])
            self.failures.setdefault(self.seeds[row], f"{place}, token {token}")
        if self.on_nonfinite == "raise":
            seed, where = next(iter(self.failures.items()))
            raise NonFiniteError(
                f"sample with seed {seed} became non-finite in {where} "
                f"({len(self.failures)} of {len(self.seeds)} samples of this batch did): "
                "the model's scales overflow there; on_nonfinite='omit' reports such samples "
                "and leaves them out"
            )
