"""What defines a TarFlow: its architecture, its training noise, and its map of a token."""

from dataclasses import dataclass
from typing import Literal, final

from exactflow.core import grey_levels as grey
from exactflow.core.conditional import (
    Affine,
    Chain,
    Conditional,
    LogisticMixture,
    Triangular,
)
from exactflow.core.spline import Spline

PARTS = ("affine", "channels", "triangular", "mixture", "spline")
Part = Literal["affine", "channels", "triangular", "mixture", "spline"]


@final
@dataclass(frozen=True)
class TarFlowConfig:
    """Architecture and training noise of a TarFlow, [P-Ch-T-K-sigma] in the paper's notation."""

    image_shape: tuple[int, int, int] = (3, 64, 64)  # channels, height, width
    patch_size: int = 4  # P: side of a patch; divides height and width
    width: int = 1024  # Ch: transformer channels; a multiple of head_dim
    blocks: int = 8  # T: flow blocks
    layers_per_block: int = 8  # K: transformer layers in each block
    head_dim: int = 64
    num_classes: int = 0  # 0: unconditional
    label_dropout: float = 0.1  # probability that training drops a label
    volume_preserving: bool = False  # shifts only, and a prior with learned variance (VP)
    noise_std: float = 0.0  # sigma in [-1, 1] units; 0: uniform dequantisation
    levels: int = grey.PHOTOGRAPHIC_LEVELS  # grey levels of the images
    scale: Literal["exp", "softplus"] = "exp"  # softplus: STARFlow (arXiv 2506.06276)
    soft_clip: float = 0.0  # c > 0: raw outputs r become c tanh(r / c), STARFlow uses 4
    final_norm: bool = False  # RMSNorm before the output map, STARFlow
    conditional: tuple[Part, ...] = ("affine",)  # maps of a token, from data to latent
    components: int = 4  # K of a mixture, or bins of a spline
    start_token: bool = False  # a learned token gives token 0 its parameters; else it is kept
    mixing: bool = False  # before each block, see `TokenMixing`

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be built."""
        _, height, width = self.image_shape
        if min(self.image_shape) < 1 or self.patch_size < 1:
            raise ValueError(f"expected positive sizes, got {self.image_shape}, {self.patch_size}")
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"expected a patch size that divides height and width, got {self.patch_size} "
                f"for {height} x {width}"
            )
        if self.head_dim < 1 or self.width < 1 or self.width % self.head_dim:
            raise ValueError(
                f"expected width to be a multiple of head_dim={self.head_dim}, got {self.width}"
            )
        if self.blocks < 1 or self.layers_per_block < 1:
            raise ValueError("expected at least one block and one layer per block")
        if self.num_classes < 0 or self.levels < 2:
            raise ValueError("expected num_classes >= 0 and levels >= 2")
        if not 0 <= self.label_dropout <= 1 or self.noise_std < 0 or self.soft_clip < 0:
            raise ValueError(
                "expected label_dropout in [0, 1] and non-negative noise_std and soft_clip"
            )
        if self.scale not in ("exp", "softplus"):
            raise ValueError(f"expected scale 'exp' or 'softplus', got {self.scale!r}")
        unknown = [part for part in self.conditional if part not in PARTS]
        if unknown or not self.conditional or self.components < 1:
            raise ValueError(
                f"expected a conditional of parts {' | '.join(PARTS)} and components >= 1, "
                f"got {list(self.conditional)} and {self.components}"
            )
        if self.conditional != ("affine",) and (self.volume_preserving or not self.start_token):
            raise ValueError(
                f"expected start_token=True and volume_preserving=False for the conditional "
                f"{list(self.conditional)}: only an affine map leaves token 0 alone or has shifts "
                "only"
            )

    @property
    def num_tokens(self) -> int:
        """N = (H / P) (W / P)."""
        return (self.image_shape[1] // self.patch_size) * (self.image_shape[2] // self.patch_size)

    @property
    def token_dim(self) -> int:
        """d = C P^2."""
        return self.image_shape[0] * self.patch_size**2

    def make_conditional(self) -> Conditional:
        """The map of one token, given its parameters."""
        dim = self.token_dim
        known = {
            "affine": Affine(dim, self.scale),
            "channels": Triangular(dim, self._channels()),
            "triangular": Triangular(dim),
            "mixture": LogisticMixture(dim, self.components),
            "spline": Spline(dim, self.components),
        }
        parts = tuple(known[part] for part in self.conditional)
        return parts[0] if len(parts) == 1 else Chain(parts)

    def _channels(self) -> tuple[tuple[int, int], ...]:
        """Pairs of a number of a token and one of the same pixel in an earlier channel."""
        channels, size = self.image_shape[0], self.patch_size**2
        return tuple(
            (channel * size + pixel, before * size + pixel)
            for channel in range(channels)
            for before in range(channel)
            for pixel in range(size)
        )
