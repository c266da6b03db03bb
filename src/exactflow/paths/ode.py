"""Ordinary differential equations along a path: fixed grids of our own, dopri5 of torchdiffeq.

A state is a tuple of tensors, such as (x, ln det). On a fixed grid every sample is computed by
itself, so that its result does not depend on its batch; the adaptive solver shares one step size.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, final, get_args

import torch
from torch import Tensor

from exactflow.core.model import NonFiniteError
from exactflow.paths.path import Path

State = tuple[Tensor, ...]
Field = Callable[[float, State], State]  # time, state -> rate of the state
OdeSolver = Literal["euler", "midpoint", "heun", "dopri5"]

EVALUATIONS_PER_STEP = {"euler": 1, "midpoint": 2, "heun": 2}


@final
@dataclass(frozen=True)
class Solution:
    """The state at the last time, and how often the field was evaluated."""

    state: State
    evaluations: int


def solve(
    field: Field,
    state: State,
    times: Sequence[float],
    solver: OdeSolver = "heun",
    tolerance: float = 1e-5,
) -> Solution:
    """Follow d state / dt = field(t, state) from the first of `times` to the last.

    Args:
        field: rate of every tensor of the state.
        state: where to start; all tensors floating, for "dopri5" of one dtype.
        times: rising or falling. Fixed solvers take one step between neighbours; "dopri5" (Dormand
            & Prince, order 5) chooses its own steps between the first and the last.
        solver: "euler" (order 1), "midpoint", "heun" (order 2), "dopri5".
        tolerance: relative and absolute error of a step of "dopri5": the largest over the state's
            tensors, the log-determinant included, of the root mean square over its values.

    Raises:
        ValueError: for an unknown solver, times that do not rise or fall, no tolerance.
        ModuleNotFoundError: "dopri5" without torchdiffeq.
        NonFiniteError: "dopri5" cannot meet its tolerance.
    """
    if solver not in get_args(OdeSolver):
        raise ValueError(f"expected solver {' | '.join(get_args(OdeSolver))}, got {solver!r}")
    steps = [b - a for a, b in itertools.pairwise(times)]
    if not steps or not (min(steps) > 0 or max(steps) < 0):
        raise ValueError(f"expected at least two times, rising or falling, got {list(times)}")
    if solver == "dopri5":
        return _dopri5(field, state, times[0], times[-1], tolerance)
    advance = {"euler": _euler, "midpoint": _midpoint, "heun": _heun}[solver]
    for t, step in zip(times, steps, strict=False):
        state = advance(field, t, step, state)
    return Solution(state, EVALUATIONS_PER_STEP[solver] * len(steps))


def uniform_times(steps: int, first: float = 0.0, last: float = 1.0) -> list[float]:
    """steps + 1 times at equal distances, from `first` to `last`."""
    if steps < 1:
        raise ValueError(f"expected at least one step, got {steps}")
    return [first + (last - first) * i / steps for i in range(steps)] + [last]


def edm_times(
    path: Path, steps: int, sigma_max: float = 80.0, sigma_min: float = 0.002, rho: float = 7.0
) -> list[float]:
    """steps + 1 times at EDM's noise levels sigma / alpha, and the path's end.

    The levels fall from sigma_max to sigma_min, evenly in their power 1 / rho (Karras et al.,
    arXiv 2206.00364, eq. 5); on the straight path that is t = 1 / (1 + sigma).

    Raises:
        ValueError: no step, or levels that do not fall within the path.
    """
    if steps < 1 or not sigma_max > sigma_min > 0:
        raise ValueError(
            "expected at least one step and sigma_max > sigma_min > 0, "
            f"got {steps}, {sigma_max}, {sigma_min}"
        )
    place = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = (high + place * (low - high)) ** rho
    times = path.time_of(-2 * levels.log()).tolist()
    first, last = path.span
    if not first <= times[0] <= times[-1] < last:
        raise ValueError(
            f"expected noise levels within the path's, got {sigma_max} .. {sigma_min}: "
            f"times {times[0]} .. {times[-1]} of {first} .. {last}"
        )
    return [*times, last]


def _moved(state: State, step: float, rate: State) -> State:
    return tuple(y + step * dy for y, dy in zip(state, rate, strict=True))


def _euler(field: Field, t: float, step: float, state: State) -> State:
    return _moved(state, step, field(t, state))


def _midpoint(field: Field, t: float, step: float, state: State) -> State:
    half = _moved(state, step / 2, field(t, state))
    return _moved(state, step, field(t + step / 2, half))


def _heun(field: Field, t: float, step: float, state: State) -> State:
    here = field(t, state)
    there = field(t + step, _moved(state, step, here))
    return _moved(_moved(state, step / 2, here), step / 2, there)


def _dopri5(field: Field, state: State, first: float, last: float, tolerance: float) -> Solution:
    """The whole way is one unit of the solver's time, whose end is a step's end.

    So the field is never asked for beyond the last time, where a path may be singular.
    """
    if not 0 < tolerance < math.inf:
        raise ValueError(f"expected tolerance > 0, got {tolerance}")
    try:
        odeint = import_module("torchdiffeq").odeint
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the solver 'dopri5' needs torchdiffeq: pip install 'torchdiffeq>=0.2.5'"
        ) from error
    evaluations = 0

    def rate(unit: Tensor, here: State) -> State:
        nonlocal evaluations
        evaluations += 1
        moved = field(first + float(unit.detach()) * (last - first), here)
        return tuple((last - first) * dy for dy in moved)

    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=state[0].device)
    try:
        solved = odeint(
            rate,
            state,
            ends,
            rtol=tolerance,
            atol=tolerance,
            method="dopri5",
            options={"step_t": ends[1:]},
        )
    except AssertionError as error:  # how torchdiffeq reports a step that vanishes
        raise NonFiniteError(
            f"dopri5 does not get from t = {first} to {last} with tolerance {tolerance}: {error}"
        ) from error
    return Solution(tuple(y[-1] for y in solved), evaluations)
