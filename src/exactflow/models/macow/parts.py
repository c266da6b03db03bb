"""The parts of MaCow: units, steps, levels, and levels over levels.

Ma et al., arXiv 1902.04208, section 3. Written from the paper's mathematics.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from exactflow.core.composition import Composition, ReversibleTransform
from exactflow.core.shapes import Images, PerSample
from exactflow.core.transform import Solver
from exactflow.models.macow.config import MultiScalePlan
from exactflow.models.macow.masked_convolution import CouplingNetwork
from exactflow.models.macow.transforms import (
    ActNorm,
    Coupling,
    MaskedConvolution,
    Orientation,
    squeeze,
    unsqueeze,
)
from exactflow.models.transforms import Context, InvertibleComposition, InvertibleConvolution

UNITS_PER_STEP = 2
SPLIT = 2  # a step's coupling transforms one channel in two


@final
@dataclass(frozen=True)
class StepPlan:
    """What the steps of one level are made of."""

    size: tuple[int, int]
    hidden: int
    kernel: tuple[int, int]
    additive: bool
    context: int
    soft_clip: float = 0.0


@final
class GlowStep(InvertibleComposition):
    """ActNorm, a 1x1 convolution, and a coupling that transforms the last channels // factor.

    With a standard normal latent this is the learned conditional Gaussian of those channels.
    """

    def __init__(self, plan: StepPlan, channels: int, factor: int, additive: bool) -> None:
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.mixing = InvertibleConvolution(channels)
        moved = channels // factor
        self.coupling = None  # a single channel has nothing to be coupled with
        if moved:
            kept, outputs = channels - moved, moved if additive else 2 * moved
            network = CouplingNetwork(kept + plan.context, plan.hidden, outputs)
            self.coupling = Coupling(network, kept, additive, plan.soft_clip)

    @property
    def parts(self) -> list[ReversibleTransform]:
        parts = [self.actnorm, self.mixing]
        return parts if self.coupling is None else [*parts, self.coupling]


@final
class Unit(nn.Module):
    """ActNorm, masked convolutions A and B, ActNorm, masked convolutions C and D."""

    def __init__(self, plan: StepPlan, channels: int) -> None:
        super().__init__()

        def conv(orientation: Orientation) -> MaskedConvolution:
            return MaskedConvolution(
                channels,
                plan.size,
                plan.kernel,
                orientation,
                plan.additive,
                plan.context,
                plan.soft_clip,
            )

        self.parts = nn.ModuleList(
            [
                *(ActNorm(channels), conv("A"), conv("B")),
                *(ActNorm(channels), conv("C"), conv("D")),
            ]
        )

    def forward(self, x: Images, context: Context | None = None) -> tuple[Images, PerSample]:
        """z and ln |det dz/dx|."""
        log_abs_det = x.new_zeros(len(x))
        for part in self.parts:
            x, change = part.encode(x, context) if isinstance(part, MaskedConvolution) else part(x)
            log_abs_det = log_abs_det + change
        return x, log_abs_det

    def inverse(self, z: Images, solver: Solver | None = None) -> Images:
        """The x of z, without a context."""
        for part in reversed(self.parts):
            if isinstance(part, MaskedConvolution):
                v = part.arrange(z)
                u = part.inverse(v) if solver is None else solver(part, v, None)
                z = part.restore(u)
            else:
                assert isinstance(part, ActNorm)
                z = part.inverse(z)
        return z


@final
class Step(Composition):
    """Two units and a Glow step."""

    def __init__(self, plan: StepPlan, channels: int) -> None:
        super().__init__()
        self.units = nn.ModuleList(Unit(plan, channels) for _ in range(UNITS_PER_STEP))
        self.glow = GlowStep(plan, channels, SPLIT, plan.additive)

    @property
    def parts(self) -> list[nn.Module]:
        return [*self.units, self.glow]

    def forward(self, x: Images, context: Context | None = None) -> tuple[Images, PerSample]:
        """z and ln |det dz/dx|."""
        return self.through(x, context)

    def inverse(self, z: Images, solver: Solver | None = None) -> Images:
        """The x of z, without a context."""
        z = self.glow.inverse(z)
        for unit in reversed(self.units):
            assert isinstance(unit, Unit)
            z = unit.inverse(z, solver)
        return z


@final
class Level(nn.Module):
    """Steps at one size; between two levels, each run of them ends in a conditional prior.

    Args:
        plan: what steps are made of.
        channels: of the level's input.
        runs: numbers of steps.
        leaving: channels that leave after each run; 0: this level has no priors.
        additive_prior: whether priors only shift.
    """

    def __init__(
        self,
        plan: StepPlan,
        channels: int,
        runs: tuple[int, ...],
        leaving: int,
        additive_prior: bool,
    ) -> None:
        super().__init__()
        self.leaving = leaving
        widths = [channels - leaving * run for run in range(len(runs))]
        self.runs = nn.ModuleList(
            nn.ModuleList(Step(plan, width) for _ in range(count))
            for count, width in zip(runs, widths, strict=True)
        )
        self.priors = nn.ModuleList(
            GlowStep(plan, width, width // leaving, additive_prior) for width in widths if leaving
        )
        self.kept = channels - leaving * len(runs)

    def forward(self, x: Images, context: Context | None = None) -> tuple[Images, PerSample]:
        """z and ln |det dz/dx|; channels from `kept` on are done, the last to leave first."""
        log_abs_det, done = x.new_zeros(len(x)), x[:, :0]
        for index, run in enumerate(self.runs):
            assert isinstance(run, nn.ModuleList)
            for part in (*run, *self.priors[index : index + 1]):
                x, change = part(x, context)
                log_abs_det = log_abs_det + change
            if self.leaving:
                done = torch.cat([x[:, -self.leaving :], done], dim=1)
                x = x[:, : -self.leaving]
        return torch.cat([x, done], dim=1), log_abs_det

    def inverse(self, z: Images, solver: Solver | None = None) -> Images:
        """The x of z, without a context."""
        z, done = z[:, : self.kept], z[:, self.kept :]
        for index in reversed(range(len(self.runs))):
            if self.leaving:
                z, done = torch.cat([z, done[:, : self.leaving]], dim=1), done[:, self.leaving :]
                prior = self.priors[index]
                assert isinstance(prior, GlowStep)
                z = prior.inverse(z)
            run = self.runs[index]
            assert isinstance(run, nn.ModuleList)
            for step in reversed(run):
                assert isinstance(step, Step)
                z = step.inverse(z, solver)
        return z


@final
class MultiScale(nn.Module):
    """Levels, each at half the size of the one before (section 3.3).

    The latent has the image's shape: what leaves a level is put beside what comes back from the
    levels below, and unsqueezed with it.

    Args:
        plan: the levels.
    """

    def __init__(self, plan: MultiScalePlan) -> None:
        super().__init__()
        channels, height, width = plan.image_shape
        levels: list[Level] = []
        for index, runs in enumerate(plan.steps):
            channels *= 4 if index else 1
            step = StepPlan(
                (height >> index, width >> index),
                plan.hidden[index],
                plan.kernel,
                plan.additive,
                plan.context * 4**index,
                plan.soft_clip,
            )
            leaving = channels // plan.factor if 0 < index < len(plan.steps) - 1 else 0
            levels.append(Level(step, channels, runs, leaving, plan.additive_prior))
            channels = levels[-1].kept
        self.levels = nn.ModuleList(levels)

    @property
    def steps(self) -> list[nn.Module]:
        """All steps in encoding order."""
        return [module for module in self.modules() if isinstance(module, Step)]

    def forward(self, x: Images, context: Context | None = None) -> tuple[Images, PerSample]:
        """z in the layout of x, and ln |det dz/dx|."""
        log_abs_det, done = x.new_zeros(len(x)), []
        for index, level in enumerate(self._levels):
            if index:
                x = squeeze(x)
                context = None if context is None else squeeze(context)
            x = x.contiguous(memory_format=torch.channels_last)  # twice as fast for few channels
            x, change = level(x, context)
            log_abs_det = log_abs_det + change
            done.append(x[:, level.kept :])
            x = x[:, : level.kept]
        return self._join(x, done), log_abs_det

    def trajectory(self, z: Images, solver: Solver | None = None) -> Iterator[Images]:
        """z, then the result of each level's inverse, coarsest first, laid out as an image."""
        yield z
        x, done = z, []
        for index, level in enumerate(self._levels):
            x = squeeze(x) if index else x
            done.append(x[:, level.kept :])
            x = x[:, : level.kept]
        for index, level in reversed(list(enumerate(self._levels))):
            x = level.inverse(torch.cat([x, done.pop()], dim=1), solver)
            x = unsqueeze(x) if index else x
            yield self._join(x, done)

    @property
    def _levels(self) -> list[Level]:
        return [level for level in self.levels if isinstance(level, Level)]

    def _join(self, x: Tensor, done: list[Tensor]) -> Tensor:
        """x, the result of as many levels as have something in `done`, as an image."""
        for index in reversed(range(len(done))):
            x = torch.cat([x, done[index]], dim=1)
            x = unsqueeze(x) if index else x
        return x
