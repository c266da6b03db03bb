"""The classifier of noisy images whose gradient guides a diffusion model.

Dhariwal & Nichol, arXiv 2105.05233, section 4: the encoder half of ADM's U-Net, and attention
pooling as in CLIP (Radford et al., arXiv 2103.00020).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.core.shapes import Images, PerSample
from exactflow.nn.unet import UNetConfig, check_images, encoder, middle
from exactflow.nn.unet_parts import GroupNorm32, TimeEmbedding, attend


@final
@dataclass(frozen=True)
class ClassifierConfig:
    """Architecture of a classifier; the defaults are the published one's for 64 x 64 pixels."""

    image_size: int = 64  # height and width in pixels: the pooling has a table of positions
    num_classes: int = 1000
    in_channels: int = 3
    model_channels: int = 128
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)
    num_res_blocks: int = 4  # per level
    attention_factors: tuple[int, ...] = (2, 4, 8)
    head_channels: int = 64

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be built."""
        divisor = self.encoder.size_divisor
        if self.num_classes < 1 or self.image_size < divisor or self.image_size % divisor:
            raise ValueError(
                f"expected at least one class and an image size that is a multiple of {divisor}, "
                f"got {self.num_classes} and {self.image_size}"
            )

    @cached_property
    def encoder(self) -> UNetConfig:
        """The U-Net whose encoder and middle the classifier is."""
        return UNetConfig(
            in_channels=self.in_channels,
            model_channels=self.model_channels,
            channel_mult=self.channel_mult,
            num_res_blocks=self.num_res_blocks,
            attention_factors=self.attention_factors,
            num_heads=None,
            head_channels=self.head_channels,
            resample="resblock",
        )


@final
class AttentionPool(nn.Module):
    """The mean pixel's attention to all pixels and itself, as features of the whole image.

    Args:
        positions: number of pixels.
        channels: width, a multiple of `head_channels`.
        head_channels: width of one head.
        features: width of the result.
    """

    def __init__(self, positions: int, channels: int, head_channels: int, features: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.position = nn.Parameter(torch.randn(channels, positions + 1) / channels**0.5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, features)

    def forward(
        self, h: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch features"]:
        tokens = h.flatten(2)
        tokens = torch.cat([tokens.mean(dim=2, keepdim=True), tokens], dim=2) + self.position
        tokens = self.qkv(tokens.transpose(1, 2).to(self.qkv.weight.dtype))
        return self.output(attend(tokens, self.head_channels, "new")[:, 0])


@final
class ClassifierUNet(nn.Module):
    """ln p(label | noisy image, time), up to a constant of each image.

    Args:
        config: the architecture.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.encoder.widths[-1]
        positions = (config.image_size // config.encoder.size_divisor) ** 2
        self.time = TimeEmbedding(config.model_channels)
        self.stem = nn.Conv2d(config.in_channels, config.encoder.widths[0], 3, padding=1)
        self.down, _ = encoder(config.encoder)
        self.middle = middle(config.encoder)
        self.norm = GroupNorm32(channels)
        self.pool = AttentionPool(positions, channels, config.head_channels, config.num_classes)

    def forward(
        self, x: Images, t: PerSample | Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch classes"]:
        """Logits of the classes, in x's type.

        Args:
            x: noisy images of the configured size.
            t: time, or step of a chain, as it enters the sinusoids: scaling it is the caller's.

        Raises:
            ValueError: images of another size or number of channels.
        """
        check_images(self.config.encoder, x)
        size = self.config.image_size
        if tuple(x.shape[2:]) != (size, size):
            raise ValueError(f"expected images of {size} x {size} pixels, got {tuple(x.shape)}")
        embedding = self.time(t.to(torch.promote_types(t.dtype, torch.float32)))
        h = self.stem(x.to(self.stem.weight.dtype))
        for stage in [*self.down, self.middle]:
            h = stage(h, embedding)
        return self.pool(F.silu(self.norm(h))).to(x.dtype)
