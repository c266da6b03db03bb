"""Flow matching: a network regressed on the velocity of a path from noise to data.

Lipman et al., Flow Matching for Generative Modeling, arXiv 2210.02747. Path, prediction, weight
and law of t are chosen one by one, so that diffusion objectives are members of the same family.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, final, get_args, get_origin

import torch
from torch import Tensor, nn

from exactflow.core import grey_levels as grey
from exactflow.core.shapes import GreyLevels, Images, Labels, PerSample, Values
from exactflow.nn.dit import DiT, DiTConfig
from exactflow.nn.unet import UNet, UNetConfig
from exactflow.parallel import shared_batch as batch
from exactflow.paths.coupling import minibatch_transport
from exactflow.paths.path import Cosine, LinearVP, Path, Straight, VariancePreserving
from exactflow.paths.path_model import PathModel, Prediction, combine, per_sample, velocity_gain

PathName = Literal["straight", "ot", "vp", "linear-vp", "cosine"]
TimeLaw = Literal["uniform", "stratified", "edm", "logit-normal"]

EDM_MEAN, EDM_STD = -1.2, 1.2  # of ln(sigma / alpha) (arXiv 2206.00364, table 1)
EDM_FIRST = 1e-4  # no earlier time is drawn by the "edm" law


@final
@dataclass(frozen=True)
class FlowMatchingConfig:
    """Objective and architecture; fields of a network that is not chosen have no effect."""

    image_shape: tuple[int, int, int] = (3, 32, 32)  # channels, height, width
    num_classes: int = 0  # 0: unconditional
    label_dropout: float = 0.1  # probability that training drops a label
    levels: int = grey.PHOTOGRAPHIC_LEVELS  # grey levels of the images
    dequantize: bool = False  # train on dequantised images, as the likelihood sees them
    # Objective
    path: PathName = "straight"
    sigma_min: float = 1e-4  # noise left at the data, of "ot"
    prediction: Prediction = "velocity"
    weight: Literal["velocity", "prediction"] = "velocity"  # whose square error is averaged
    times: TimeLaw = "uniform"
    coupling: Literal["independent", "minibatch-ot"] = "independent"  # of noise and images
    # Network
    network: Literal["unet", "dit"] = "unet"
    time_scale: float = 1000.0  # factor of t before the sinusoids (ADM); 1: Meta's example
    num_heads: int | None = None  # U-Net: or head_channels
    dropout: float = 0.0
    # U-Net (see UNetConfig)
    model_channels: int = 128
    channel_mult: tuple[float, ...] = (1.0, 2.0, 2.0, 2.0)
    num_res_blocks: int = 2
    attention_factors: tuple[int, ...] = (2,)
    head_channels: int | None = 64
    attention_order: Literal["legacy", "new"] = "legacy"
    scale_shift: bool = True
    resample: Literal["conv", "resblock", "plain"] = "resblock"
    # DiT (see DiTConfig)
    patch_size: int = 2
    width: int = 384
    depth: int = 12

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be built."""
        if min(self.image_shape) < 1 or self.num_classes < 0 or self.levels < 2:
            raise ValueError(
                f"expected positive sizes, num_classes >= 0 and levels >= 2, got "
                f"{self.image_shape}, {self.num_classes}, {self.levels}"
            )
        if not 0 <= self.label_dropout <= 1 or not self.time_scale > 0:
            raise ValueError(
                "expected label_dropout in [0, 1] and time_scale > 0, "
                f"got {self.label_dropout}, {self.time_scale}"
            )
        for field in fields(self):
            value, known = getattr(self, field.name), get_args(field.type)
            if get_origin(field.type) is Literal and value not in known:
                raise ValueError(f"expected {field.name} {' | '.join(known)}, got {value!r}")
        _named_path(self)
        if self.network == "dit":
            _ = self.dit
        else:
            divisor = self.unet.size_divisor
            if self.image_shape[1] % divisor or self.image_shape[2] % divisor:
                raise ValueError(
                    f"expected height and width to be multiples of {divisor} for "
                    f"{len(self.channel_mult)} levels, got {self.image_shape}"
                )

    @property
    def unet(self) -> UNetConfig:
        """The U-Net's part of the configuration. Raises ValueError for what cannot be built."""
        channels = self.image_shape[0]
        return UNetConfig(
            in_channels=channels,
            out_channels=channels,
            model_channels=self.model_channels,
            channel_mult=self.channel_mult,
            num_res_blocks=self.num_res_blocks,
            attention_factors=self.attention_factors,
            num_heads=self.num_heads,
            head_channels=self.head_channels,
            attention_order=self.attention_order,
            scale_shift=self.scale_shift,
            resample=self.resample,
            dropout=self.dropout,
            num_classes=self.num_classes + 1 if self.num_classes else 0,  # with the null class
        )

    @property
    def dit(self) -> DiTConfig:
        """The DiT's part of the configuration. Raises ValueError for what cannot be built."""
        if self.num_heads is None:
            raise ValueError("expected num_heads for a DiT, got None")
        return DiTConfig(
            image_shape=self.image_shape,
            out_channels=self.image_shape[0],
            patch_size=self.patch_size,
            width=self.width,
            depth=self.depth,
            num_heads=self.num_heads,
            num_classes=self.num_classes,
            dropout=self.dropout,
        )


@final
class FlowMatching(PathModel):
    """A U-Net or a DiT that predicts on a path x_t = alpha(t) x0 + sigma(t) eps."""

    kind: ClassVar[str] = "flow-matching"

    def __init__(self, config: FlowMatchingConfig) -> None:
        super().__init__()
        self.config = config
        self.dequantized = config.dequantize
        self.network = UNet(config.unet) if config.network == "unet" else DiT(config.dit)
        self._path = _named_path(config)

    @property
    def stages(self) -> Sequence[nn.Module]:
        network = self.network
        return network.stages if isinstance(network, UNet) else list(network.blocks)

    @property
    def path(self) -> Path:
        return self._path

    @property
    def prediction(self) -> Prediction:
        return self.config.prediction

    def predict(self, x_t: Images, t: PerSample, label: Labels | None = None) -> Images:
        """See `PathModel.predict`. Raises ValueError for a label the model cannot take."""
        self.check_label(label, len(x_t))
        if label is None and self.num_classes:
            label = torch.full((len(x_t),), self.null_label, device=x_t.device)
        return self.network(x_t, self.config.time_scale * t, label).to(x_t.dtype)

    def loss(
        self,
        images: GreyLevels,
        label: Labels | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> PerSample:
        """Mean over dimensions of the square error of velocity or prediction (eq. 9).

        In training, labels are dropped with probability `label_dropout`, sample by sample.
        """
        x0 = self.as_data(images, generator)
        eps = self._noise(x0, generator)
        label = self.drop_labels(label, generator)
        t = draw_times(self.config.times, self.path, x0, generator).clamp(*self.span)
        point = self.path.at(t)
        x_t = per_sample(point.alpha, x0) * x0 + per_sample(point.sigma, x0) * eps
        error = self.predict(x_t, t, label) - combine(x0, eps, point, self.prediction)
        if self.config.weight == "velocity":
            error = error * per_sample(velocity_gain(point, self.prediction), error)
        return error.square().flatten(1).mean(1)

    def _noise(self, x0: Tensor, generator: torch.Generator | None) -> Tensor:
        """Noise for each image, drawn alone or assigned by minibatch optimal transport."""
        options = {"generator": generator, "dtype": x0.dtype, "device": x0.device}
        if self.config.coupling == "independent":
            return batch.randn(x0.shape, **options)
        images = batch.all_rows(x0)
        paired = minibatch_transport(torch.randn(images.shape, **options), images)
        return batch.own_rows(lambda _: paired, len(x0))


def draw_times(law: TimeLaw, path: Path, x: Values, generator: torch.Generator | None) -> PerSample:
    """Training times in [0, 1] of a batch like x.

    Args:
        law: "uniform"; "stratified", one in each of batch equal parts of [0, 1], in order;
            "edm", log-normal noise level sigma / alpha; "logit-normal".
        path: turns the noise levels of "edm" into times.
        x: gives batch size, dtype and device.
        generator: source of randomness, on x's device.
    """
    count, like = len(x), {"dtype": x.dtype, "device": x.device}
    match law:
        case "uniform":
            return batch.rand((count,), generator=generator, **like)
        case "stratified":
            return batch.own_rows(lambda rows: _stratified(rows, generator, **like), count)
        case "edm":
            log_level = EDM_MEAN + EDM_STD * batch.randn((count,), generator=generator, **like)
            return path.time_of(-2 * log_level).clamp(EDM_FIRST, 1)
        case "logit-normal":
            return batch.randn((count,), generator=generator, **like).sigmoid()


def _stratified(
    count: int, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    place = torch.arange(count, dtype=dtype, device=device)
    return (place + torch.rand(count, generator=generator, dtype=dtype, device=device)) / count


def _named_path(config: FlowMatchingConfig) -> Path:
    match config.path:
        case "straight":
            return Straight()
        case "ot":
            return Straight(config.sigma_min)
        case "vp":
            return VariancePreserving()
        case "linear-vp":
            return LinearVP()
        case "cosine":
            return Cosine()
