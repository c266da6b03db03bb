"""Every solver by its name, and the solvers of each kind of model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import singledispatch
from typing import Any, final

from exactflow.core.model import Flow, GenerativeModel
from exactflow.core.transform import Solver
from exactflow.paths.chain_model import ChainModel
from exactflow.paths.ode import ODE_SOLVERS, Dopri5, Euler, FixedSteps, Heun, Midpoint
from exactflow.paths.path_model import PathModel
from exactflow.sampling.flow_sampler import FlowSampler
from exactflow.sampling.flow_solvers import (
    Adaptive,
    BlockSolvers,
    GaussSeidelJacobi,
    Jacobi,
    Selective,
    Sequential,
)
from exactflow.sampling.path_sampler import PathSampler
from exactflow.sampling.path_solvers import (
    DDIM,
    Ancestral,
    ChainSolver,
    DPMSolver,
    EDMSolver,
    PathSolver,
)
from exactflow.sampling.planner import Planned
from exactflow.sampling.request import Request, Sampler

__all__ = [
    "DDIM",
    "SOLVERS",
    "Adaptive",
    "Ancestral",
    "AnySolver",
    "DPMSolver",
    "Dopri5",
    "EDMSolver",
    "Euler",
    "GaussSeidelJacobi",
    "Heun",
    "Jacobi",
    "Midpoint",
    "Planned",
    "Sampling",
    "Selective",
    "Sequential",
    "sampling_of",
    "solver_for",
]

AnySolver = Solver | Sequence[Solver] | BlockSolvers | PathSolver

SOLVERS: dict[str, type] = {
    "sequential": Sequential,
    "jacobi": Jacobi,
    "gauss-seidel-jacobi": GaussSeidelJacobi,
    "selective": Selective,
    "adaptive": Adaptive,
    "ancestral": Ancestral,
    "ddim": DDIM,
    **ODE_SOLVERS,
    "dpm++": DPMSolver,
    "edm": EDMSolver,
}


@final
@dataclass(frozen=True)
class Sampling:
    """How one kind of model is sampled.

    Attributes:
        solvers: types of its solvers.
        usual: type of the solver "auto".
        sampler: draws the batches of a request.
    """

    solvers: tuple[type, ...]
    usual: type
    sampler: Callable[[Any, Request], Sampler]

    @property
    def names(self) -> dict[str, type]:
        """Its solvers by name."""
        return {name: kind for name, kind in SOLVERS.items() if issubclass(kind, self.solvers)}


@singledispatch
def sampling_of(model: GenerativeModel) -> Sampling:
    """Solvers and sampler of a model. Raises ValueError for neither a flow nor a path model."""
    raise ValueError(f"expected a flow or a model on a path, got {model.kind!r}")


@sampling_of.register(Flow)
def _(model: Flow) -> Sampling:
    return Sampling((Solver, BlockSolvers, Sequence), Planned, FlowSampler)


@sampling_of.register(PathModel)
def _(model: PathModel) -> Sampling:
    kinds = (FixedSteps, Dopri5, DPMSolver, EDMSolver)
    return Sampling(kinds, SOLVERS[model.usual_solver], PathSampler)


@sampling_of.register(ChainModel)
def _(model: ChainModel) -> Sampling:
    kinds = (ChainSolver, FixedSteps, Dopri5, DPMSolver, EDMSolver)
    return Sampling(kinds, SOLVERS[model.usual_solver], PathSampler)


def solver_for(model: GenerativeModel, name: str = "auto", **options: Any) -> AnySolver:
    """The solver of that name with options; an option that is None keeps its default.

    Args:
        model: to be sampled.
        name: one of `SOLVERS` for this kind of model, or "auto": the usual one; of a flow, the one
            of its plan.
        options: fields of the solver, such as steps, tolerance, eta.

    Raises:
        ValueError: for another name, and for an option that this solver does not have.
    """
    sampling = sampling_of(model)
    names, given = sampling.names, {k: v for k, v in options.items() if v is not None}
    for option in given:
        if not any(option in _options(kind) for kind in names.values()):
            raise ValueError(f"{option} has no meaning for this model")
    if name != "auto" and name not in names:
        raise ValueError(f"expected solver auto | {' | '.join(names)}, got {name!r}")
    kind = sampling.usual if name == "auto" else names[name]
    for option in given:
        if option not in _options(kind):
            called = next((name for name, each in SOLVERS.items() if each is kind), name)
            raise ValueError(
                f"{option} has no meaning for the solver {called!r}, which has "
                f"{', '.join(_options(kind)) or 'no options'}"
            )
    return kind(**given)


def _options(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]
