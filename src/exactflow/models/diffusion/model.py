"""Discrete diffusion with a U-Net: iDDPM and ADM.

Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672;
Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, arXiv 2105.05233.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.core import grey_levels as grey
from exactflow.core.shapes import GreyLevels, Images, Labels, PerSample
from exactflow.models.diffusion.step_importance import StepImportance
from exactflow.nn.unet import Resampling, UNet, UNetConfig
from exactflow.nn.unet_parts import AttentionOrder
from exactflow.parallel import shared_batch as batch
from exactflow.paths.chain import FixedVariance, MarkovChain, Schedule, schedule_betas
from exactflow.paths.chain_model import ChainModel
from exactflow.paths.path import DiscreteBetas
from exactflow.paths.path_model import Prediction

Objective = Literal["simple", "hybrid", "vlb"]

TIMESTEP_SCALE = 1000  # steps of the chain whose timesteps `rescale_timesteps` imitates
OBJECTIVES: tuple[Objective, ...] = ("simple", "hybrid", "vlb")


@final
@dataclass(frozen=True)
class DiscreteDiffusionConfig:
    """The U-Net (see `UNetConfig`), the chain and the objective; defaults: iDDPM on ImageNet 64."""

    image_shape: tuple[int, int, int] = (3, 64, 64)  # channels, height, width
    levels: int = grey.PHOTOGRAPHIC_LEVELS  # grey levels of the images
    num_classes: int = 0  # 0: unconditional
    label_dropout: float = 0.0  # probability that training drops a label; 0: no null class
    low_size: int = 0  # > 0: an upsampler, given the image averaged to this side as well
    model_channels: int = 128
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)
    num_res_blocks: int = 3
    attention_factors: tuple[int, ...] = (4, 8)
    num_heads: int | None = 4
    head_channels: int | None = None
    attention_order: AttentionOrder = "legacy"
    scale_shift: bool = True
    resample: Resampling = "conv"
    dropout: float = 0.0
    diffusion_steps: int = 4000  # T
    schedule: Schedule = "cosine"
    learn_sigma: bool = True
    fixed_variance: FixedVariance = "large"  # where it is not learned, see `MarkovChain`
    rescale_timesteps: bool = True  # the network is told 1000 t / T
    rescale_learned_sigmas: bool = True  # hybrid: weight T / 1000 of the bound's term, else 1
    objective: Objective = "hybrid"
    timestep_law: Literal["uniform", "importance"] = "uniform"  # of t in training

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be built."""
        if min(self.image_shape) < 1 or self.num_classes < 0 or self.levels < 2:
            raise ValueError("expected positive sizes, num_classes >= 0 and levels >= 2")
        divisor = self.unet.size_divisor
        if any(side % divisor for side in self.image_shape[1:]):
            raise ValueError(
                f"expected height and width that are multiples of {divisor} for "
                f"{len(self.channel_mult)} levels of the U-Net, got {self.image_shape}"
            )
        if not 0 <= self.label_dropout <= 1 or (self.label_dropout and not self.num_classes):
            raise ValueError(
                f"expected label_dropout in [0, 1], 0 without classes, got {self.label_dropout}"
            )
        if not 0 <= self.low_size < min(self.image_shape[1:]):
            raise ValueError(
                f"expected low_size 0, or less than the image's sides, got {self.low_size}"
            )
        if self.objective not in OBJECTIVES:
            raise ValueError(f"expected objective {OBJECTIVES}, got {self.objective!r}")
        if self.objective != "vlb" and self.learn_sigma != (self.objective == "hybrid"):
            raise ValueError(
                "expected learn_sigma with objective 'hybrid' and not with 'simple' (which cannot "
                f"train it), got {self.learn_sigma} with {self.objective!r}"
            )
        if self.timestep_law not in ("uniform", "importance"):
            raise ValueError(
                f"expected timestep_law 'uniform' or 'importance', got {self.timestep_law!r}"
            )
        self.chain()  # checks the rest

    @property
    def unet(self) -> UNetConfig:
        """Architecture of the network."""
        channels = self.image_shape[0]
        return UNetConfig(
            in_channels=2 * channels if self.low_size else channels,
            out_channels=2 * channels if self.learn_sigma else channels,
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
            num_classes=self.num_classes + (self.label_dropout > 0),
        )

    def chain(self) -> MarkovChain:
        """The chain that the model is trained on."""
        betas = schedule_betas(self.schedule, self.diffusion_steps)
        return MarkovChain(betas, fixed_variance=self.fixed_variance)


@final
class DiscreteDiffusion(ChainModel):
    """iDDPM and ADM: a U-Net predicts the noise, and where the variance lies between its bounds.

    A conditional model without label dropout has no null class: it needs labels.
    """

    kind: ClassVar[str] = "diffusion"

    def __init__(self, config: DiscreteDiffusionConfig) -> None:
        super().__init__()
        self.config = config
        self.network = UNet(config.unet)
        self._chain = config.chain()
        self.most_steps = self._chain.steps
        self.importance = None
        if config.timestep_law == "importance":
            self.importance = StepImportance(config.diffusion_steps)

    @property
    def stages(self) -> Sequence[nn.Module]:
        return self.network.stages

    @property
    def chain(self) -> MarkovChain:
        return self._chain

    @cached_property
    def _path(self) -> DiscreteBetas:
        return DiscreteBetas(tuple(self._chain.betas.tolist()))

    @property
    def path(self) -> DiscreteBetas:
        return self._path

    @property
    def prediction(self) -> Prediction:
        return "eps"

    def predict(self, x_t: Images, t: PerSample, label: Labels | None = None) -> Images:
        """The predicted noise at the step, a real number, of library time t."""
        return self.predict_noise(x_t, self.path.step_of(t), label)[0]

    def predict_noise(
        self,
        x_t: Images,
        timestep: Shaped[Tensor, " batch"],
        label: Labels | None = None,
        low: Float[Tensor, "batch channels low_height low_width"] | None = None,
    ) -> tuple[Images, Images | None]:
        scale = TIMESTEP_SCALE / self.config.diffusion_steps
        time = timestep.to(self.wide_dtype)
        time = time * scale if self.config.rescale_timesteps else time
        label = self._label(label, x_t)
        out = self.network(self._input(x_t, low), time, label)
        if not self.config.learn_sigma:
            return out, None
        eps, v = out.chunk(2, dim=1)
        return eps, v

    def loss(
        self,
        images: GreyLevels,
        label: Labels | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> PerSample:
        """The objective of each image at a random step, in its published units (see `objective`).

        With `timestep_law` "importance" (iDDPM, section 3.3) steps are drawn by the second moments
        of their losses and the losses weighted back; only training updates the moments.
        """
        x0 = self.as_data(images)
        self.check_label(label, len(images))
        count, device = len(images), images.device
        if self.importance is None:
            options = {"generator": generator, "device": device}
            steps = self.chain.steps
            step = batch.own_rows(lambda rows: torch.randint(steps, (rows,), **options), count)
            weight = None
        else:
            step, weight = self.importance.draw(count, generator)
        noise = batch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=device)
        if self.config.label_dropout:
            label = self.drop_labels(label, generator)
        loss = self.objective(self.chain, x0, step, noise, label)
        if self.importance is not None and weight is not None:
            if self.training:
                self.importance.record(batch.all_rows(step), batch.all_rows(loss))
            loss = loss * weight.to(loss.dtype)
        return loss

    def objective(
        self,
        chain: MarkovChain,
        x0: Images,
        step: Int[Tensor, " batch"],
        noise: Images,
        label: Labels | None = None,
    ) -> PerSample:
        """The configured objective at given steps (iDDPM, section 3).

        "simple": mean squared error of the noise, per dimension. "hybrid": that, and the bound's
        term in bits/dim with the predicted noise detached, so that it trains the variance alone,
        times T / 1000 with `rescale_learned_sigmas`. "vlb": the bound's term in bits/dim, times T.

        Args:
            chain: the model's own, or one respaced from it.
            x0: centred images.
            step: of each image in `chain`.
            noise: standard normal.
            label: class of each image.
        """
        x_t = chain.diffuse(x0, step, noise)
        size = self.config.low_size
        low = F.interpolate(x0, size, mode="area") if size else None
        eps, v = self.predict_noise(x_t, chain.timesteps.to(step.device)[step], label, low)
        mse = (noise - eps).square().flatten(1).mean(1)
        if self.config.objective == "simple":
            return mse
        detached = self.config.objective == "hybrid"
        kernel = chain.kernel(eps.detach() if detached else eps, v, x_t, step, clip=False)
        nats = chain.bound_term(kernel, x0, x_t, step, self.levels)
        bits_per_dim = grey.bits_per_dim(-nats, self.dims)
        if self.config.objective == "vlb":
            return bits_per_dim * chain.steps
        rescale = chain.steps / TIMESTEP_SCALE if self.config.rescale_learned_sigmas else 1.0
        return mse + rescale * bits_per_dim

    def _label(self, label: Tensor | None, x_t: Tensor) -> Tensor | None:
        """Rows of the network's label table; the network itself refuses a label too many."""
        if self.num_classes == 0 or (label is not None and self.config.label_dropout):
            return label
        if self.config.label_dropout:
            return torch.full((len(x_t),), self.null_label, device=x_t.device)
        on_cpu = label is not None and label.device.type == "cpu"
        if label is None or (on_cpu and bool((label == self.null_label).any())):
            raise ValueError(
                f"this model was trained with a label on every image and has no null class: "
                f"expected classes 0 .. {self.num_classes - 1}, "
                f"got {'none' if label is None else self.null_label}"
            )
        return label

    def _input(self, x_t: Tensor, low: Tensor | None) -> Tensor:
        """The network's input; of an upsampler, with the enlarged small images as channels."""
        side = self.config.low_size
        expected = (len(x_t), self.event_shape[0], side, side) if side else None
        if (None if low is None else tuple(low.shape)) != expected:
            raise ValueError(
                f"expected small images of shape {expected}, "
                f"got {None if low is None else tuple(low.shape)}"
            )
        if low is None:
            return x_t
        enlarged = F.interpolate(low.to(x_t), x_t.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([x_t, enlarged], dim=1)
