"""What defines a MaCow: its levels, those of its dequantiser, and the dequantisation."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from exactflow.core import grey_levels as grey

Steps = tuple[tuple[int, ...], ...]


@final
@dataclass(frozen=True)
class MultiScalePlan:
    """The levels of a flow, see `MaCowConfig`."""

    image_shape: tuple[int, int, int]
    steps: Steps
    hidden: tuple[int, ...]
    kernel: tuple[int, int]
    factor: int
    additive: bool = False  # whether steps only shift
    additive_prior: bool = False  # whether priors do
    context: int = 0  # channels of the context at full size; 0: none
    soft_clip: float = 0.0  # of raw parameters, see `shift_and_log_scale`
    prefix: str = ""  # before the names of these fields in the model's configuration

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be built."""
        channels, height, width = self.image_shape
        steps, of, factor = self.steps, self.prefix, self.factor
        if not steps or min(min(level, default=0) for level in steps) < 1:
            raise ValueError(f"expected {of}steps of at least one level and 1 each, got {steps}")
        if len(steps[0]) != 1 or len(steps[-1]) != 1:
            raise ValueError(f"expected one number for first and last level, got {of}steps={steps}")
        if len(self.hidden) != len(steps) or min(self.hidden) < 1:
            raise ValueError(
                f"expected {of}hidden with {len(steps)} positive numbers, one for each level, "
                f"got {self.hidden}"
            )
        if min(self.kernel) < 1 or self.kernel[1] % 2 == 0:
            raise ValueError(
                f"expected a {of}kernel with an odd number of columns, got {self.kernel}"
            )
        side = 2 ** (len(steps) - 1)
        if height % side or width % side:
            raise ValueError(
                f"expected {len(steps)} levels to halve {height} x {width} evenly: "
                f"multiples of {side}"
            )
        for level in steps[1:-1]:
            if len(level) >= factor or 4 * channels % factor:
                raise ValueError(
                    f"expected levels of fewer than {of}factor={factor} numbers, whose "
                    f"{4 * channels} channels it divides, got {of}steps={steps}"
                )
            channels = 4 * channels // factor * (factor - len(level))


@final
@dataclass(frozen=True)
class MaCowConfig:
    """Architecture and dequantisation of a MaCow.

    `steps` has one entry per level, finest first. The finest level works on the image itself and
    the coarsest has no split: one number each. Every number of a level between stands for so many
    steps, after which one part in `factor` of the level's channels leaves for the latent.
    """

    image_shape: tuple[int, int, int] = (3, 32, 32)  # channels, height, width
    steps: Steps = ((4,), (12, 12), (12, 12), (12,))
    hidden: tuple[int, ...] = (24, 512, 512, 512)  # channels of each level's coupling networks
    kernel: tuple[int, int] = (2, 3)  # rows seen, and columns, of orientation A
    factor: int = 4
    additive: bool = False  # masked convolutions and couplings only shift
    additive_prior: bool = False  # so do the conditional priors
    soft_clip: float = 0.0  # c > 0: raw shifts and scales r become c tanh(r / c); ours, not MaCow's
    dequantization: Literal["uniform", "variational"] = "uniform"
    dequantizer_steps: Steps = ((4,), (4,))
    dequantizer_hidden: tuple[int, ...] = (24, 256)
    dequantizer_kernel: tuple[int, int] = (2, 3)
    dequantizer_factor: int = 2
    context: int = 4  # features of the image that the dequantiser sees at every pixel
    levels: int = grey.PHOTOGRAPHIC_LEVELS  # grey levels of the images
    initial_images: int = 512  # how many to initialise on
    num_classes: ClassVar[int] = 0
    noise_std: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be built."""
        if min(self.image_shape) < 1 or self.levels < 2 or self.initial_images < 2:
            raise ValueError("expected positive sizes, levels >= 2 and initial_images >= 2")
        if self.dequantization not in ("uniform", "variational"):
            raise ValueError(
                f"expected dequantization 'uniform' or 'variational', got {self.dequantization!r}"
            )
        if min(self.factor, self.dequantizer_factor) < 2 or self.context < 1:
            raise ValueError("expected factors >= 2 and context >= 1")
        if not 0 <= self.soft_clip < math.inf:
            raise ValueError(f"expected a finite soft_clip >= 0, got {self.soft_clip}")
        _ = self.plan  # checks the rest
        if self.dequantization == "variational":
            _ = self.dequantizer_plan

    @property
    def plan(self) -> MultiScalePlan:
        """The levels of the flow."""
        return MultiScalePlan(
            self.image_shape,
            self.steps,
            self.hidden,
            self.kernel,
            self.factor,
            self.additive,
            self.additive_prior,
            soft_clip=self.soft_clip,
        )

    @property
    def dequantizer_plan(self) -> MultiScalePlan:
        """The levels of the variational dequantiser's flow."""
        return MultiScalePlan(
            self.image_shape,
            self.dequantizer_steps,
            self.dequantizer_hidden,
            self.dequantizer_kernel,
            self.dequantizer_factor,
            context=self.context,
            soft_clip=self.soft_clip,
            prefix="dequantizer_",
        )
