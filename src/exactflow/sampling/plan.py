"""What was chosen for inverting a model fast on one machine, and its file beside the model."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch

from exactflow.core.config import made
from exactflow.core.files import write_atomically
from exactflow.core.serialization import PLAN_FILE
from exactflow.core.transform import Decoding, Solver
from exactflow.sampling.flow_solvers import Adaptive, Sequential

FORMAT_VERSION = 1


@final
@dataclass(frozen=True)
class Candidate:
    """One way to invert a block.

    Attributes:
        solver: "sequential" or "adaptive".
        lookahead: of the adaptive solver.
        step: see `Decoding`.
        dtype: of weights, keys and values, as "bfloat16"; None: the network's own.
    """

    solver: Literal["sequential", "adaptive"] = "sequential"
    lookahead: int | None = None
    step: Literal["eager", "compiled", "graph"] = "eager"
    dtype: str | None = None

    def __str__(self) -> str:
        named = self.solver if self.lookahead is None else f"{self.solver} {self.lookahead}"
        return ", ".join([named, self.step, *([self.dtype] if self.dtype else [])])

    def decoding(self, memory: dict[Any, Any]) -> Decoding:
        """How its caches evaluate the network."""
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        return Decoding(dtype, self.step, memory)

    def build(self, tolerance: float, memory: dict[Any, Any]) -> Solver:
        """The solver, on memory that solvers of other blocks may share."""
        decoding = self.decoding(memory)
        if self.lookahead is None:
            return Sequential(decoding)
        return Adaptive(self.lookahead, tolerance=tolerance, decoding=decoding)


@final
@dataclass(frozen=True)
class Measured:
    """What one candidate took on the probe.

    Attributes:
        seconds: least of some runs.
        passes: network evaluations.
        tokens: tokens evaluated per sample.
        residual: largest backward error, max |f(u) - v|.
    """

    seconds: float
    passes: int
    tokens: int
    residual: float


@final
@dataclass(frozen=True)
class BlockPlan:
    """What was chosen for a block, and everything it was chosen from.

    Attributes:
        chosen: the choice.
        reference_seconds: the sequential inverse, operator by operator.
        seconds: the choice, run in turn with the reference.
        window_seconds: one pass over so many tokens, behind half of the others.
        frontier: tokens known in all samples after each pass over everything.
        measured: all candidates tried.
    """

    chosen: Candidate
    reference_seconds: float
    seconds: float
    window_seconds: dict[int, float]
    frontier: tuple[int, ...]
    measured: dict[str, Measured]


@final
@dataclass(frozen=True)
class InversionPlan:
    """Solvers of all blocks in generation order, for one machine, dtype and batch size."""

    machine: str
    dtype: str
    batch_size: int
    tolerance: float
    blocks: tuple[BlockPlan, ...]

    def solvers(self) -> list[Solver]:
        """One solver for each block, on common memory."""
        memory: dict[Any, Any] = {}
        return [block.chosen.build(self.tolerance, memory) for block in self.blocks]

    @property
    def speedup(self) -> float:
        """Time of the reference over that of the plan."""
        return sum(b.reference_seconds for b in self.blocks) / sum(b.seconds for b in self.blocks)

    def batches_to_earn(self, loading: float) -> int:
        """Batches from which on the plan saves what loading compiled steps takes, in seconds."""
        if all(block.chosen.step != "compiled" for block in self.blocks):
            return 1
        saved = sum(block.reference_seconds - block.seconds for block in self.blocks)
        return max(1, math.ceil(loading / saved)) if saved > 0 else sys.maxsize


def read_plans(folder: Path) -> list[InversionPlan]:
    """The plans beside a model, none if there is no file. Raises ValueError for a damaged one."""
    path = folder / PLAN_FILE
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text())
        if content["format_version"] > FORMAT_VERSION:
            raise ValueError(f"format version {content['format_version']} is newer than this code")
        return [_plan(fields) for fields in content["plans"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a plan ({error}); delete it, or plan anew") from error


def keep_plans(folder: Path, new: Sequence[InversionPlan]) -> None:
    """Add plans to those beside a model, in place of those for the same circumstances."""

    def key(plan: InversionPlan) -> tuple[str, str, int]:
        return plan.machine, plan.dtype, plan.batch_size

    plans = {key(plan): plan for plan in (*read_plans(folder), *new)}
    content = {"format_version": FORMAT_VERSION, "plans": [asdict(p) for p in plans.values()]}
    write_atomically(folder / PLAN_FILE, (json.dumps(content, indent=1) + "\n").encode())


def _plan(fields: dict[str, Any]) -> InversionPlan:
    blocks = tuple(
        BlockPlan(
            **{
                **block,
                "chosen": made(Candidate, block["chosen"], "chosen"),
                "window_seconds": {int(size): s for size, s in block["window_seconds"].items()},
                "frontier": tuple(block["frontier"]),
                "measured": {
                    name: made(Measured, m, name) for name, m in block["measured"].items()
                },
            }
        )
        for block in fields["blocks"]
    )
    return InversionPlan(**{**fields, "blocks": blocks})
