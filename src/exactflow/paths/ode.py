"""Solvers of ordinary differential equations along a path, with fixed or adaptive steps.

A state is a tuple of tensors of one row per sample, such as (x, ln det). Every row is computed by
itself, the adaptive solver's steps included: its result does not depend on the rest of the batch.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from exactflow.core.model import NonFiniteError
from exactflow.core.shapes import PerSample
from exactflow.paths.path import Path

State = tuple[Tensor, ...]
Field = Callable[[Tensor, State], State]  # time of each row, state -> rate of the state
_Field = Callable[[float, State], State]  # one time for all rows
Lost = Literal["raise", "nan"]
OdeMethod = Literal["euler", "midpoint", "heun", "dopri5"]

# Dormand and Prince, A family of embedded Runge-Kutta formulae, 1980: the last stage is the result,
# and its slope the first of the next step.
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
WEIGHTS = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR_WEIGHTS = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
SAFETY, LEAST_FACTOR, MOST_FACTOR = 0.9, 0.2, 10.0  # from one step to the next
LEAST_STEP = 1e-14  # of the whole way
MOST_STEPS = 10_000


@final
@dataclass(frozen=True)
class Solution:
    """The state at the last time, and how often the field was evaluated."""

    state: State
    evaluations: int


@dataclass(frozen=True)
class FixedSteps(ABC):
    """An explicit Runge-Kutta method with one step from each time to the next.

    Attributes:
        steps: their number.
    """

    steps: int = 50
    name: ClassVar[OdeMethod]
    tolerance: ClassVar[None] = None
    evaluations_per_step: ClassVar[int]

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"expected steps >= 1, got {self.steps}")

    def solve(
        self,
        field: Field,
        state: State,
        times: Sequence[float],
        names: Sequence[object] | None = None,
        lost: Lost = "raise",
    ) -> Solution:
        """Follow d state / dt = field(t, state) from the first of `times` to the last.

        Args:
            field: rate of every tensor of the state.
            state: at the first time; floating-point tensors of one row per sample.
            times: rising or falling, one more than there are steps.
            names: of the rows, for an error.
            lost: result of a row whose tolerance cannot be met: an error, or NaN.

        Raises:
            ValueError: times that do not rise or fall, or another number of them.
            NonFiniteError: a tolerance cannot be met, and in which row.
        """

        def at(t: float, here: State) -> State:
            return field(here[0].new_full((len(here[0]),), t), here)

        for t, step in zip(times, _checked(times, self.steps), strict=False):
            state = self.advance(at, t, step, state)
        return Solution(state, self.evaluations_per_step * self.steps)

    @abstractmethod
    def advance(self, field: _Field, t: float, step: float, state: State) -> State:
        """The state at t + step."""


@final
class Euler(FixedSteps):
    """y + h f(t, y), of order 1."""

    name = "euler"
    evaluations_per_step = 1

    def advance(self, field: _Field, t: float, step: float, state: State) -> State:
        return _moved(state, step, field(t, state))


@final
class Midpoint(FixedSteps):
    """y + h f(t + h/2, y + h/2 f(t, y)), of order 2."""

    name = "midpoint"
    evaluations_per_step = 2

    def advance(self, field: _Field, t: float, step: float, state: State) -> State:
        half = _moved(state, step / 2, field(t, state))
        return _moved(state, step, field(t + step / 2, half))


@final
class Heun(FixedSteps):
    """y + h/2 (f(t, y) + f(t + h, y + h f(t, y))), of order 2.

    Example:
        >>> y = torch.ones(1)
        >>> found = Heun(steps=10).solve(lambda t, state: (-state[0],), (y,), uniform_times(10))
        >>> round(float(found.state[0]), 4), found.evaluations  # exp(-1) is 0.3679
        (0.3685, 20)
    """

    name = "heun"
    evaluations_per_step = 2

    def advance(self, field: _Field, t: float, step: float, state: State) -> State:
        here = field(t, state)
        there = field(t + step, _moved(state, step, here))
        return _moved(_moved(state, step / 2, here), step / 2, there)


@final
@dataclass(frozen=True)
class Dopri5:
    """Dormand & Prince's method of order 5; every row has a time and a step of its own.

    Attributes:
        tolerance: relative and absolute error of a step: in each row, the largest over the state's
            tensors, the log-determinant included, of the root mean square over values.
    """

    tolerance: float = 1e-5
    name: ClassVar[OdeMethod] = "dopri5"
    steps: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < math.inf:
            raise ValueError(f"expected tolerance > 0, got {self.tolerance}")

    def solve(
        self,
        field: Field,
        state: State,
        times: Sequence[float],
        names: Sequence[object] | None = None,
        lost: Lost = "raise",
    ) -> Solution:
        """See `FixedSteps.solve`; there are two times, and the steps between adapt."""
        _checked(times, 1)
        return _dopri5(field, state, (times[0], times[1]), self.tolerance, names, lost)


OdeSolver = FixedSteps | Dopri5
ODE_SOLVERS: dict[str, type[FixedSteps] | type[Dopri5]] = {
    kind.name: kind for kind in (Euler, Midpoint, Heun, Dopri5)
}


def _checked(times: Sequence[float], intervals: int) -> list[float]:
    """The distance from each of the times to the next. Raises ValueError for wrong times."""
    steps = [b - a for a, b in itertools.pairwise(times)]
    if len(steps) != intervals or not (min(steps) > 0 or max(steps) < 0):
        raise ValueError(f"expected {intervals + 1} times, rising or falling, got {list(times)}")
    return steps


def uniform_times(steps: int, first: float = 0.0, last: float = 1.0) -> list[float]:
    """steps + 1 times at equal distances, from `first` to `last`."""
    if steps < 1:
        raise ValueError(f"expected at least one step, got {steps}")
    return [first + (last - first) * i / steps for i in range(steps)] + [last]


def edm_levels(
    steps: int, sigma_max: float = 80.0, sigma_min: float = 0.002, rho: float = 7.0
) -> Float[Tensor, " steps"]:
    """Noise levels from sigma_max down to sigma_min, evenly in their power 1 / rho, in float64.

    Karras et al., arXiv 2206.00364, eq. 5. Raises ValueError for no step, or levels that do not
    fall.
    """
    if steps < 1 or not sigma_max > sigma_min > 0:
        raise ValueError(
            "expected at least one step and sigma_max > sigma_min > 0, "
            f"got {steps}, {sigma_max}, {sigma_min}"
        )
    place = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + place * (low - high)) ** rho


def edm_times(
    path: Path, steps: int, sigma_max: float = 80.0, sigma_min: float = 0.002, rho: float = 7.0
) -> list[float]:
    """steps + 1 times at EDM's noise levels sigma / alpha (`edm_levels`), and the path's end.

    On the straight path a level stands at t = 1 / (1 + sigma).

    Raises:
        ValueError: no step, or levels that do not fall within the path.
    """
    levels = edm_levels(steps, sigma_max, sigma_min, rho)
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


def _dopri5(
    field: Field,
    state: State,
    ends: tuple[float, float],
    tolerance: float,
    names: Sequence[object] | None,
    lost: Lost,
) -> Solution:
    """Solve with a time and a step for every row; all rows are evaluated until the last is done.

    Time is scaled to 0 .. 1, and steps are powers of two: other rows of the batch may change how a
    row is rounded, but not its steps, unless an error lies on a threshold itself. The field is
    never evaluated beyond the last time, where a path may be singular.
    """
    evaluations, like = 0, state[0]
    first, last = torch.tensor(ends, dtype=torch.float64, device=like.device)

    def rate(place: Tensor, here: State) -> State:
        nonlocal evaluations
        evaluations += 1
        moved = field(torch.lerp(first, last, place).to(like.dtype), here)
        return tuple((ends[1] - ends[0]) * dy for dy in moved)

    place = torch.zeros(len(like), dtype=torch.float64, device=like.device)
    slope = rate(place, state)
    step = _first_steps(rate, state, slope, tolerance)
    stuck = torch.zeros_like(place, dtype=torch.bool)
    for _ in range(MOST_STEPS):
        step = torch.minimum(step, 1 - place)  # 0 for a row that is done
        slopes, moved = [slope], state
        for node, weights in zip(NODES, WEIGHTS, strict=True):
            moved = _along(state, step, slopes, weights)
            slopes.append(rate(place + node * step, moved))
        nothing = tuple(torch.zeros_like(y) for y in state)
        error = _size(_along(nothing, step, slopes, ERROR_WEIGHTS), state, moved, tolerance)
        good = error <= 1  # not if NaN
        place = torch.where(good, place + step, place)  # exact: few bits each
        state, slope = _chosen(good, moved, state), _chosen(good, slopes[-1], slope)
        wish = (SAFETY * error**-0.2).nan_to_num(LEAST_FACTOR, posinf=MOST_FACTOR)
        wish = wish.clamp(LEAST_FACTOR, MOST_FACTOR)
        step = _power_of_two(step * torch.where(good, wish.clamp(min=1), wish))
        stuck = (place < 1) & (step < LEAST_STEP)
        if bool(stuck.any()):
            if lost == "raise":
                break
            state = _chosen(stuck, tuple(torch.full_like(y, math.nan) for y in state), state)
            place = torch.where(stuck, 1.0, place)
        if bool((place == 1).all()):
            return Solution(state, evaluations)
    row = int((stuck if bool(stuck.any()) else place < 1).nonzero()[0, 0])
    of = "" if names is None else f" for {names[row]}"
    at = float(torch.lerp(first, last, place[row]))
    raise NonFiniteError(
        f"dopri5 does not get from t = {ends[0]} to {ends[1]} with tolerance {tolerance}{of}: at "
        f"t = {at:.6g} its step is {float(step[row]):.1e} of the way (a velocity that is "
        f"not finite or too steep, or a tolerance below the rounding of {like.dtype})"
    )


def _first_steps(
    rate: Callable[[Tensor, State], State], state: State, slope: State, tolerance: float
) -> PerSample:
    """Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section II.4."""
    position, speed = (_size(y, state, state, tolerance) for y in (state, slope))
    small = (position < 1e-5) | (speed < 1e-5)
    trial = torch.where(small, 1e-6, 0.01 * position / speed).nan_to_num(1e-6).clamp(1e-6, 1)
    there = rate(trial, _along(state, trial, [slope], (1.0,)))
    change = tuple(b - a for a, b in zip(slope, there, strict=True))
    bend = torch.maximum(speed, _size(change, state, state, tolerance) / trial)
    step = torch.where(bend <= 1e-15, (1e-3 * trial).clamp(min=1e-6), (0.01 / bend) ** 0.2)
    return _power_of_two(torch.minimum(100 * trial, step).nan_to_num(1e-6).clamp(1e-6, 1))


def _power_of_two(step: Tensor) -> Tensor:
    """The largest power of two that is not above each step; 0 for 0."""
    return torch.where(step > 0, step.log2().floor().exp2(), 0.0)


def _along(state: State, step: Tensor, slopes: Sequence[State], weights: Sequence[float]) -> State:
    """state + step * (weighted sum of slopes), each row by its own step."""
    found = []
    for index, y in enumerate(state):
        total = sum(w * k[index] for w, k in zip(weights, slopes, strict=True) if w)
        found.append(y + _per_row(step.to(y.dtype), y) * total)
    return tuple(found)


def _chosen(good: Tensor, yes: State, no: State) -> State:
    return tuple(torch.where(_per_row(good, b), a, b) for a, b in zip(yes, no, strict=True))


def _size(error: State, before: State, after: State, tolerance: float) -> PerSample:
    """Largest root mean square of each row over the tensors, in units of the tolerance."""
    sizes = []
    for e, a, b in zip(error, before, after, strict=True):
        scale = tolerance * (1 + torch.maximum(a.abs(), b.abs()).double())
        sizes.append((e.double() / scale).square().reshape(len(e), -1).mean(1).sqrt())
    return torch.stack(sizes).amax(0)


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    """One value per row, shaped to meet `like`."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))
