"""Solvers of models on a path: of its differential equation, or of its chain step by step.

A solver is a value with its own options, and a generator of states from noise to images.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import ClassVar, final

import torch
from torch import Tensor

from exactflow.core.shapes import Images
from exactflow.paths.chain import MarkovChain
from exactflow.paths.ode import OdeSolver, State, edm_levels, edm_times, uniform_times
from exactflow.paths.path_model import PathModel
from exactflow.sampling.denoiser import Denoiser, chain_model
from exactflow.sampling.noise import Noise
from exactflow.sampling.nonfinite import OnNonFinite


@final
@dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver++(2M): a multistep solver of the probability flow in log-SNR.

    Lu et al., arXiv 2211.01095, algorithm 2. With l = ln(alpha / sigma) and D the data expected
    behind x, the flow is exactly

        x_t = sigma_t / sigma_s x_s + sigma_t * (integral from l_s to l_t of e^l D dl),

    and a step extrapolates D to its middle from the last two evaluations. The first and the last
    step are of first order: the first has no earlier evaluation, and the last may end without
    noise, infinitely far in log-SNR.

    Attributes:
        steps: their number, of one evaluation each.
    """

    steps: int = 50

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"expected steps >= 1, got {self.steps}")

    @torch.no_grad()
    def solve(self, denoiser: Denoiser, x: Images, times: Sequence[float]) -> Images:
        """Follow the probability flow along `times`; every sample is computed by itself.

        Args:
            denoiser: gives D.
            x: points at the first of `times`.
            times: steps + 1 rising library times, from noise to data; see `edm_times`.

        Raises:
            ValueError: another number of times, or times that do not rise within [0, 1].
        """
        pairs = list(itertools.pairwise(times))
        if len(pairs) != self.steps or not all(0 <= s < t <= 1 for s, t in pairs):
            raise ValueError(
                f"expected {self.steps + 1} times, rising in [0, 1], got {list(times)}"
            )
        places = denoiser.model.path.at(torch.tensor(times, dtype=torch.float64))
        alpha, sigma = places.alpha.tolist(), places.sigma.tolist()
        half_log_snr = (places.log_snr / 2).tolist()
        before: Tensor | None = None  # the previous evaluation
        for i, t in enumerate(times[:-1]):
            data = denoiser.denoise(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device))
            step = half_log_snr[i + 1] - half_log_snr[i]
            middle = data
            if before is not None and i < len(pairs) - 1:
                reach = step / (2 * (half_log_snr[i] - half_log_snr[i - 1]))
                middle = torch.lerp(before, data, 1 + reach)
            x = (sigma[i + 1] / sigma[i]) * x - alpha[i + 1] * math.expm1(-step) * middle
            before = data
        return x


@dataclass(frozen=True)
class ChainSolver(ABC):
    """A rule for x_{t-1} given x_t, and the steps of a chain to which it is applied.

    Attributes:
        steps: their number, at equal distances; None: the usual one, or all of a shorter chain.
        clip: confine each predicted image to [-1, 1], as the published samplers do.
    """

    steps: int | None = None
    clip: bool = True
    usual: ClassVar[int]

    @property
    @abstractmethod
    def stochastic(self) -> bool:
        """Whether steps take noise."""

    @abstractmethod
    def advance(
        self, chain: MarkovChain, denoiser: Denoiser, x_t: Images, step: int, noise: Images | None
    ) -> Images:
        """x_{t-1}.

        Args:
            chain: the whole chain of the model, or a respaced one.
            denoiser: of a chain model.
            x_t: the samples at this step.
            step: index in `chain`, the same for all; the result of step 0 is the image.
            noise: standard normal; None at step 0 and for a solver that is not stochastic.
        """

    def kept(self, chain: MarkovChain) -> MarkovChain:
        """The chain of the steps taken. Raises ValueError for more steps than it has."""
        least = min(2, chain.steps)
        if self.steps is not None and not least <= self.steps <= chain.steps:
            raise ValueError(
                f"expected {least} .. {chain.steps} steps of this chain, got {self.steps}"
            )
        steps = min(self.usual, chain.steps) if self.steps is None else self.steps
        return chain if steps == chain.steps else chain.respaced(str(steps))


@final
@dataclass(frozen=True)
class Ancestral(ChainSolver):
    """x_{t-1} drawn from the reverse kernel (Ho et al., arXiv 2006.11239, algorithm 2).

    A classifier shifts the mean by the variance times its gradient (arXiv 2105.05233, algorithm 1).
    """

    usual: ClassVar[int] = 250

    @property
    def stochastic(self) -> bool:
        return True

    def advance(
        self, chain: MarkovChain, denoiser: Denoiser, x_t: Images, step: int, noise: Images | None
    ) -> Images:
        steps = torch.full((len(x_t),), step, device=x_t.device)
        kernel = chain.reverse_kernel(denoiser.noise, x_t, steps, denoiser.label, clip=self.clip)
        x, shift = kernel.mean, denoiser.gradient(x_t, chain.timesteps.to(steps.device)[steps])
        if shift is not None:
            x = x + kernel.log_variance.exp() * shift
        return x if noise is None else x + torch.exp(0.5 * kernel.log_variance) * noise


@final
@dataclass(frozen=True)
class DDIM(ChainSolver):
    """Song et al., Denoising Diffusion Implicit Models, arXiv 2010.02502, eq. 12 and 16.

        x_{t-1} = sqrt(ab_{t-1}) x0 + sqrt(1 - ab_{t-1} - s^2) eps + s noise,
        s = eta sqrt((1 - ab_{t-1}) / (1 - ab_t) (1 - ab_t / ab_{t-1})),  ab = alpha-bar.

    If x0 is clipped, eps is the noise that leads from it to x_t. A classifier shifts eps against
    its gradient (arXiv 2105.05233, algorithm 2); the x0 of that eps is not clipped again.

    Attributes:
        eta: 0 is deterministic; 1, over all steps, ancestral sampling with the posterior's
            variance.
    """

    eta: float = 0.0
    usual: ClassVar[int] = 50

    def __post_init__(self) -> None:
        """Raise ValueError unless eta lies in [0, 1]."""
        if not 0 <= self.eta <= 1:
            raise ValueError(f"expected eta in [0, 1], got {self.eta}")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def advance(
        self, chain: MarkovChain, denoiser: Denoiser, x_t: Images, step: int, noise: Images | None
    ) -> Images:
        steps = torch.full((len(x_t),), step, device=x_t.device)
        x0 = chain.reverse_kernel(denoiser.noise, x_t, steps, denoiser.label, clip=self.clip).x0
        eps = chain.eps_from_x0(x0, x_t, steps)
        here, before = float(chain.alpha_bar[step]), float(chain.previous_alpha_bar[step])
        shift = denoiser.gradient(x_t, chain.timesteps.to(steps.device)[steps])
        if shift is not None:
            eps = eps - math.sqrt(1 - here) * shift
            x0 = chain.x0_from_eps(eps, x_t, steps)
        sigma = self.eta * math.sqrt((1 - before) / (1 - here) * (1 - here / before))
        x = math.sqrt(before) * x0 + math.sqrt(1 - before - sigma**2) * eps
        return x if noise is None else x + sigma * noise


@final
@dataclass(frozen=True)
class EDMSolver:
    """Heun's method in the noise level s = sigma / alpha (arXiv 2206.00364, algorithm 1).

    With x = x_t / alpha the flow is dx / ds = (x - D(x; s)) / s, where D is the data expected
    behind x. The last step, to s = 0, is Euler's and gives D.

    Attributes:
        steps: their number; all but the last take two evaluations.
    """

    steps: int = 40

    def __post_init__(self) -> None:
        """Raise ValueError for no step."""
        if self.steps < 1:
            raise ValueError(f"expected steps >= 1, got {self.steps}")

    @torch.no_grad()
    def solve(self, denoiser: Denoiser, x: Images, levels: Sequence[float]) -> Images:
        """Follow the flow to the data; every sample is computed by itself.

        Args:
            denoiser: gives D.
            x: data with noise of the first level.
            levels: falling noise levels, one for each step.

        Raises:
            ValueError: another number of levels, or levels that do not fall.
        """
        if len(levels) != self.steps or not all(a > b > 0 for a, b in itertools.pairwise(levels)):
            raise ValueError(f"expected {self.steps} falling noise levels, got {list(levels)}")
        path = denoiser.model.path
        times = path.time_of(-2 * torch.tensor(levels, dtype=torch.float64).log())
        alphas = path.at(times).alpha.tolist()

        def slope(x: Tensor, index: int) -> Tensor:
            t = torch.full((len(x),), float(times[index]), dtype=x.dtype, device=x.device)
            return (x - denoiser.denoise(alphas[index] * x, t)) / levels[index]

        for index, level in enumerate(levels):
            here = slope(x, index)
            if index + 1 == len(levels):
                return x - level * here
            step = levels[index + 1] - level
            there = slope(x + step * here, index + 1)
            x = x + step * (0.5 * here + 0.5 * there)
        return x


PathSolver = OdeSolver | DPMSolver | EDMSolver | ChainSolver


@singledispatch
def states(
    solver: object, denoiser: Denoiser, noise: Noise, on_nonfinite: OnNonFinite
) -> Iterator[Tensor]:
    """The states of a `PathSolver` on its way from noise, the images last."""
    raise ValueError(f"expected a solver of models on a path, got {solver!r}")


@states.register(OdeSolver)
def _(
    solver: OdeSolver, denoiser: Denoiser, noise: Noise, on_nonfinite: OnNonFinite
) -> Iterator[Tensor]:
    def field(t: Tensor, state: State) -> State:
        return (denoiser.velocity(state[0], t),)

    model = denoiser.model
    times = _published_times(model, solver.steps or 1)
    times = times or uniform_times(solver.steps or 1, *model.span)
    names = [f"the sample of seed {seed}" for seed in noise.seeds]
    lost = "raise" if on_nonfinite == "raise" else "nan"
    yield solver.solve(field, (_start(model, times, noise),), times, names, lost).state[0]


@states.register(DPMSolver)
def _(
    solver: DPMSolver, denoiser: Denoiser, noise: Noise, on_nonfinite: OnNonFinite
) -> Iterator[Tensor]:
    model = denoiser.model
    times = _published_times(model, solver.steps)
    if times is None:  # the log-SNR is infinite at the ends
        times = edm_times(model.path, solver.steps, *_levels(model))
    yield solver.solve(denoiser, _start(model, times, noise), times)


@states.register(EDMSolver)
def _(
    solver: EDMSolver, denoiser: Denoiser, noise: Noise, on_nonfinite: OnNonFinite
) -> Iterator[Tensor]:
    levels = edm_levels(solver.steps, *_levels(denoiser.model)).tolist()
    yield solver.solve(denoiser, levels[0] * noise(), levels)


@states.register(ChainSolver)
def _(
    solver: ChainSolver, denoiser: Denoiser, noise: Noise, on_nonfinite: OnNonFinite
) -> Iterator[Tensor]:
    chain, x = solver.kept(chain_model(denoiser.model).chain), noise()
    for step in reversed(range(chain.steps)):
        fresh = noise() if solver.stochastic and step > 0 else None
        x = solver.advance(chain, denoiser, x, step, fresh)
        yield x


def steps_of(solver: PathSolver, model: PathModel) -> int:
    """Number of its `states`. Raises ValueError for steps that the chain does not have."""
    return solver.kept(chain_model(model).chain).steps if isinstance(solver, ChainSolver) else 1


def _published_times(model: PathModel, steps: int) -> list[float] | None:
    """Times at the noise levels that the model is sampled between; None: even times do."""
    levels = model.sampled_between
    return None if levels is None else edm_times(model.path, steps, *levels)


def _levels(model: PathModel) -> tuple[float, float]:
    """Greatest and least noise level to sample between, short of the path's ends."""
    if model.sampled_between is not None:
        return model.sampled_between
    ends = model.path.at(torch.tensor(model.span, dtype=torch.float64))
    most, least = (ends.sigma / ends.alpha).tolist()
    return min(80.0, 0.99 * most), max(0.002, 1.01 * least)


def _start(model: PathModel, times: Sequence[float], noise: Noise) -> Tensor:
    """Noise scaled to points at the first of the times."""
    return float(model.path.at(torch.tensor(times[0], dtype=torch.float64)).sigma) * noise()
