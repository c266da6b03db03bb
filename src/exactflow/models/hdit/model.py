"""HDiT: an hourglass diffusion transformer under the preconditioning of EDM.

Crowson et al., arXiv 2401.11605; Karras et al., Elucidating the Design Space of Diffusion-Based
Generative Models (EDM), arXiv 2206.00364, table 1. Both write x0 + sigma eps, where this library
writes x_t = alpha x0 + sqrt(1 - alpha^2) eps: the same points up to the factor alpha, and sigma is
the noise level sqrt(1 - alpha^2) / alpha. In library time the noise levels of training are those of
uniform t on an `InterpolatedCosine` path.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

import torch
from torch import Tensor, nn

from exactflow.core import grey_levels as grey
from exactflow.core.model import ParameterRule
from exactflow.core.shapes import GreyLevels, Images, Labels, PerSample
from exactflow.models.hdit.network import AttentionKind, HourglassLevel, HourglassTransformer
from exactflow.parallel import shared_batch as batch
from exactflow.paths.edm import Preconditioning
from exactflow.paths.path import InterpolatedCosine
from exactflow.paths.path_model import PathModel, Prediction, per_sample

Weighting = Literal["soft-min-snr", "min-snr", "snr", "karras"]


@final
@dataclass(frozen=True)
class HDiTConfig:
    """Architecture, noise and loss of an HDiT; of each level, full resolution first."""

    image_shape: tuple[int, int, int] = (3, 64, 64)  # channels, height, width
    patch_size: int = 4  # side of the pixels' squares that become one token
    depths: tuple[int, ...] = (2, 4)  # layers of each level; outer levels have them twice
    widths: tuple[int, ...] = (256, 512)  # channels of each level
    attention: tuple[AttentionKind, ...] = ("neighborhood", "global")
    d_ff: tuple[int, ...] | None = None  # within the feed-forward blocks; None: 3 * width
    dropout: tuple[float, ...] | None = None  # None: none
    head_dim: int = 64  # divides every width; a multiple of 8
    kernel_size: int = 7  # side of the neighbourhood in tokens, odd
    window_size: int = 8  # side of the shifted windows in tokens
    mapping_depth: int = 2
    mapping_width: int = 256
    mapping_d_ff: int | None = None  # None: 3 * mapping_width
    num_classes: int = 0  # 0: unconditional
    label_dropout: float = 0.1  # probability that training drops a label
    sigma_data: float = 0.5  # standard deviation of the data in [-1, 1] units
    sigma_min: float = 1e-3  # least noise level of training
    sigma_max: float = 1e3  # greatest noise level of training
    low_resolution: int = 32  # side of images whose cosine schedule holds at high noise
    weighting: Weighting = "soft-min-snr"
    min_snr_gamma: float = 5.0  # largest weight on x0 under "min-snr"
    levels: int = grey.PHOTOGRAPHIC_LEVELS  # grey levels of the images

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be built."""
        scales = len(self.depths)
        per_level = (self.widths, self.attention, self.d_ff, self.dropout)
        if scales == 0 or any(len(p) != scales for p in per_level if p is not None):
            raise ValueError(
                f"expected {max(scales, 1)} levels in depths, widths, attention, d_ff and dropout, "
                f"got {(self.depths, *per_level)}"
            )
        sizes = (*self.image_shape, self.patch_size, *self.depths, *self.widths, *self.inner_widths)
        if min(*sizes, self.mapping_width, self.head_dim, self.window_size) < 1:
            raise ValueError("expected positive sizes, depths and widths")
        if self.head_dim % 8 or any(width % self.head_dim for width in self.widths):
            raise ValueError(
                "expected widths that are multiples of head_dim, itself a multiple of 8, "
                f"got {self.widths}, {self.head_dim}"
            )
        if self.mapping_width % 2 or self.mapping_depth < 0:
            raise ValueError(
                "expected an even mapping_width and mapping_depth >= 0, "
                f"got {self.mapping_width}, {self.mapping_depth}"
            )
        if self.num_classes < 0 or self.levels < 2 or not 0 <= self.label_dropout <= 1:
            raise ValueError("expected num_classes >= 0, levels >= 2 and label_dropout in [0, 1]")
        if not all(0 <= rate < 1 for rate in self.dropout or ()) or not self.min_snr_gamma > 0:
            raise ValueError(
                "expected dropout in [0, 1) and min_snr_gamma > 0, "
                f"got {self.dropout}, {self.min_snr_gamma}"
            )
        kinds = set(self.attention) - set(get_args(AttentionKind))
        if kinds or self.weighting not in get_args(Weighting):
            raise ValueError(
                f"expected attention {' | '.join(get_args(AttentionKind))} and weighting "
                f"{' | '.join(get_args(Weighting))}, got {self.attention}, {self.weighting!r}"
            )
        self._check_grids()
        _ = self.path  # checks the range of noise

    def _check_grids(self) -> None:
        """Raise ValueError unless every level's tokens fill its windows."""
        _, height, width = self.image_shape
        for depth, kind in enumerate(self.attention):
            side = self.patch_size * 2**depth
            grid = height // side, width // side
            if height % side or width % side:
                raise ValueError(
                    f"expected height and width that are multiples of {side} for level {depth} "
                    f"(patch_size={self.patch_size}), got {height} x {width}"
                )
            if kind == "neighborhood" and (
                self.kernel_size % 2 == 0 or min(grid) < self.kernel_size
            ):
                raise ValueError(
                    f"expected an odd kernel_size of at most {min(grid)}, the tokens' side at "
                    f"level {depth}, got {self.kernel_size}"
                )
            if kind == "shifted-window" and any(n % self.window_size for n in grid):
                raise ValueError(
                    f"expected a window_size that divides the {grid[0]} x {grid[1]} tokens of "
                    f"level {depth}, got {self.window_size}"
                )

    @property
    def inner_widths(self) -> tuple[int, ...]:
        """Channels within the feed-forward blocks of each level."""
        return self.d_ff or tuple(3 * width for width in self.widths)

    @property
    def path(self) -> InterpolatedCosine:
        """The noise levels of training, in library time."""
        side = max(self.image_shape[1:])
        return InterpolatedCosine(
            side, self.low_resolution, side, self.sigma_min, self.sigma_max, self.sigma_data
        )

    @property
    def scales(self) -> tuple[HourglassLevel, ...]:
        """The network's levels."""
        reach = {"neighborhood": self.kernel_size, "shifted-window": self.window_size}
        dropout = self.dropout or (0.0,) * len(self.depths)
        rows = zip(
            self.depths, self.widths, self.inner_widths, self.attention, dropout, strict=True
        )
        return tuple(
            HourglassLevel(depth, width, d_ff, kind, self.head_dim, reach.get(kind, 0), rate)
            for depth, width, d_ff, kind, rate in rows
        )


@final
class HDiT(PathModel):
    """The model: its network F sees x0 + sigma eps at unit variance and learns a unit target.

    With s = sigma and d = sigma_data, the data expected behind x = x0 + s eps are
    d^2 / (s^2 + d^2) x + s d / sqrt(s^2 + d^2) F (EDM, eq. 7).
    """

    kind: ClassVar[str] = "hdit"
    usual_solver: ClassVar[str] = "dpm++"
    quick_solver: ClassVar[str] = "dpm++"
    evaluations_per_step: ClassVar[int] = 1
    sampled_between: ClassVar[tuple[float, float] | None] = (160.0, 1e-2)
    parameter_rules: ClassVar[tuple[ParameterRule, ...]] = (
        ParameterRule(r"network\.mapping\..*\.scale", 1 / 3, decay=False),
        ParameterRule(r"network\.mapping\..*|.*\.norm\.linear\.weight", 1 / 3),
        ParameterRule(r".*\.(scale|fac)|network\.class_emb\.weight", decay=False),
    )

    def __init__(self, config: HDiTConfig) -> None:
        super().__init__()
        self.config = config
        self._path, self._edm = config.path, Preconditioning(config.sigma_data)
        width = config.mapping_width
        self.network = HourglassTransformer(
            config.scales,
            config.image_shape[0],
            config.patch_size,
            (config.mapping_depth, width, config.mapping_d_ff or 3 * width),
            config.num_classes + 1 if config.num_classes else 0,
        )

    @property
    def stages(self) -> list[nn.Module]:
        return self.network.layers

    @property
    def path(self) -> InterpolatedCosine:
        return self._path

    @property
    def prediction(self) -> Prediction:
        return "v"

    def predict(self, x_t: Images, t: PerSample, label: Labels | None = None) -> Images:
        """See `PathModel.predict`."""
        self.check_label(label, len(x_t))
        log_sigma = -0.5 * self.path.at(t).log_snr
        scaled = self._edm.path_scale(x_t, log_sigma) * x_t
        return self._edm.v(x_t, self._evaluate(scaled, log_sigma, label), log_sigma)

    def loss(
        self,
        images: GreyLevels,
        label: Labels | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> PerSample:
        """Weighted denoising error of centred images; in training, labels are dropped."""
        x0 = self.as_data(images)
        self.check_label(label, len(images))
        noise = batch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
        log_sigma = -0.5 * self.path.at(_times(x0, generator)).log_snr
        return self.denoising_loss(x0, noise, log_sigma, self.drop_labels(label, generator))

    def denoising_loss(
        self, x0: Images, noise: Images, log_sigma: PerSample, label: Labels | None = None
    ) -> PerSample:
        """Squared error of the network's output times the weight, mean over dimensions."""
        x = x0 + per_sample(log_sigma.exp(), x0) * noise
        output = self._evaluate(x * self._edm.scale(x0, log_sigma), log_sigma, label)
        error = output - self._edm.target(x0, noise, log_sigma)
        return error.square().flatten(1).mean(1) * self.weight(log_sigma)

    def weight(self, log_sigma: PerSample) -> PerSample:
        """Weight of F's squared error: (s d)^2 / (s^2 + d^2) times that of x0's.

        Of x0: 1 / (s^2 + d^2) under "soft-min-snr" (arXiv 2401.11605, section 4.5),
        min(1 / s^2, gamma) under "min-snr" (arXiv 2303.09556), 1 / s^2 under "snr", and what
        cancels the factor under "karras" (arXiv 2206.00364).
        """
        squared, d2 = (2 * log_sigma).exp(), self.config.sigma_data**2
        factor = squared * d2 / (squared + d2)
        match self.config.weighting:
            case "soft-min-snr":
                return factor / (squared + d2)
            case "min-snr":
                return factor * (1 / squared).clamp(max=self.config.min_snr_gamma)
            case "snr":
                return factor / squared
            case _:
                return torch.ones_like(factor)

    def _evaluate(self, x: Tensor, log_sigma: Tensor, label: Tensor | None) -> Images:
        """The network F at unit-variance x, in the dtype of x."""
        if label is None and self.num_classes:
            label = torch.full((len(x),), self.null_label, device=x.device)
        output = self.network(x.to(self.dtype), log_sigma.to(self.dtype), label)
        return output.to(x.dtype)


def _times(like: Tensor, generator: torch.Generator | None) -> PerSample:
    """Times uniform on [0, 1), one in each of `batch` equal intervals, in random order."""

    def stratified(rows: int) -> Tensor:
        place = torch.randperm(rows, generator=generator, device=like.device)
        offset = torch.rand(rows, generator=generator, dtype=like.dtype, device=like.device)
        return (place + offset) / rows

    return batch.own_rows(stratified, len(like))
