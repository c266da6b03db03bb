"""What defines a DenseFlow: its blocks, its coupling networks, its dequantiser."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, final

from exactflow.core import grey_levels as grey

AttentionVariant = Literal["published", "corrected"]

MAX_UNITS = 10_000  # of a block


@final
@dataclass(frozen=True)
class DenseFlowConfig:
    """Architecture of a DenseFlow-L-g: L = sum of units x modules, g = growth."""

    image_shape: tuple[int, int, int] = (3, 32, 32)  # channels, height, width
    units: tuple[int, ...] = (6, 4, 1)  # of each block, at 1/2, 1/4, ... of the resolution
    modules: tuple[int, ...] = (5, 6, 20)  # coupling modules in each unit of a block
    widths: tuple[int, ...] = (48, 48, 48)  # channels of a block's coupling networks
    growth: int = 10  # g: noise channels injected before every unit but a block's first
    dense_depth: int = 7  # layers of a coupling network's dense part
    dense_growth: int = 64  # channels that each of them adds
    landmarks: int = 4  # of the attention; divides the number of positions of every block
    attention: AttentionVariant = "published"  # corrected: what was meant, with other weights
    dequantizer_steps: int = 4  # couplings of the variational dequantiser
    dequantizer_width: int = 64  # channels of its context and networks
    dequantizer_depth: int = 4  # layers of each of its dense parts
    dequantizer_growth: int = 64  # channels that each of them adds
    context_growth: int = 16  # the same in the network of its context
    levels: int = grey.PHOTOGRAPHIC_LEVELS  # grey levels of the images
    initial_images: int = 64  # how many the normalisations start from; published: a batch
    num_classes: ClassVar[int] = 0
    noise_std: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be built."""
        blocks = len(self.units)
        if not blocks or {len(self.modules), len(self.widths)} != {blocks}:
            raise ValueError(
                "expected units, modules and widths with one entry for each block, got "
                f"{self.units}, {self.modules}, {self.widths}"
            )
        sizes = (*self.image_shape, *self.units, *self.modules, self.growth, self.landmarks)
        networks = (self.dense_depth, self.dense_growth, self.dequantizer_width)
        networks += (self.dequantizer_depth, self.dequantizer_growth, self.context_growth)
        if min(*sizes, *networks) < 1 or min(self.widths) < 2 or self.dequantizer_steps < 0:
            raise ValueError(f"expected positive sizes and widths of 2 or more, got {self}")
        if max(*self.units, *self.modules) > MAX_UNITS:  # lists of them are made before any layer
            raise ValueError(f"expected at most {MAX_UNITS:,} units and modules, got {self}")
        if self.attention not in ("published", "corrected"):
            raise ValueError(
                f"expected attention 'published' or 'corrected', got {self.attention!r}"
            )
        if min(self.levels, self.initial_images) < 2:
            raise ValueError(
                "expected levels and initial_images of 2 or more, "
                f"got {self.levels} and {self.initial_images}"
            )
        _, height, width = self.image_shape
        if height % 2**blocks or width % 2**blocks:
            raise ValueError(
                f"expected height and width that are multiples of {2**blocks} for {blocks} "
                f"blocks, got {height} x {width}"
            )
        rows, columns = self.size(blocks - 1)
        if rows * columns % self.landmarks:
            raise ValueError(
                f"expected landmarks that divide the {rows} x {columns} positions of the last "
                f"block, got {self.landmarks}"
            )

    @property
    def channels(self) -> tuple[tuple[int, int], ...]:
        """Channels of each block's input and output."""
        pairs: list[tuple[int, int]] = []
        entering = 4 * self.image_shape[0]
        for units in self.units:
            pairs.append((entering, entering + (units - 1) * self.growth))
            entering = 2 * pairs[-1][1]  # a squeeze, of which half is kept
        return tuple(pairs)

    def size(self, block: int) -> tuple[int, int]:
        """Height and width in a block."""
        return self.image_shape[1] >> (block + 1), self.image_shape[2] >> (block + 1)

    @property
    def dropped_shapes(self) -> list[tuple[int, int, int]]:
        """Shape of what is dropped after each block but the last."""
        pairs = enumerate(pairwise(self.channels))
        return [(follower[0], *self.size(block + 1)) for block, (_, follower) in pairs]

    @property
    def injected_shapes(self) -> list[tuple[int, int, int]]:
        """Shape of each injection of noise, in order."""
        return [
            (self.growth, *self.size(block))
            for block, units in enumerate(self.units)
            for _ in range(units - 1)
        ]
