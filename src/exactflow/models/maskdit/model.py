"""MaskDiT: a diffusion transformer that learns from a part of each image's patches.

Zheng et al., arXiv 2306.09305. In training the encoder sees a random half of the tokens, which
makes a step cheaper; the loss is EDM's on the patches that were seen, plus a small reconstruction
of those that were not. A short training without masks follows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from exactflow.core import grey_levels as grey
from exactflow.core.shapes import GreyLevels, Images, Labels, PerSample
from exactflow.models.maskdit.network import MaskedTransformer, Part
from exactflow.parallel import shared_batch as batch
from exactflow.paths.edm import Preconditioning
from exactflow.paths.path import InterpolatedCosine
from exactflow.paths.path_model import PathModel, Prediction, per_sample

LEVEL_MEAN, LEVEL_STD = -1.2, 1.2  # of ln(sigma) in training (EDM, table 1)
LEAST, MOST = 1e-3, 100.0  # noise levels at the ends of the path, beyond those that are sampled
VARIANCE_FLOOR = 1e-6  # added to the variance of a patch that is reconstructed


@final
@dataclass(frozen=True)
class MaskDiTConfig:
    """Architecture, masking and noise of a MaskDiT."""

    image_shape: tuple[int, int, int] = (4, 32, 32)  # channels, height, width
    patch_size: int = 2  # side of the pixels' squares that become one token
    width: int = 1152  # channels of a token of the encoder
    depth: int = 28  # blocks of the encoder
    num_heads: int = 16  # of the encoder's attention
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    num_classes: int = 0  # 0: unconditional
    label_dropout: float = 0.1  # probability that training drops a label
    mask_ratio: float = 0.5  # part of the tokens that the encoder does not see in training
    reconstruction: float = 0.1  # weight of the error on removed patches
    sigma_data: float = 0.5  # standard deviation of the data in [-1, 1] units
    levels: int = grey.PHOTOGRAPHIC_LEVELS  # grey levels of the images

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be built."""
        channels, height, width = self.image_shape
        side = self.patch_size
        if min(channels, height, width, side) < 1 or height % side or width % side:
            raise ValueError(
                f"expected a patch_size that divides height and width, got {side} for "
                f"{height} x {width}"
            )
        _ = self.encoder, self.decoder
        if self.num_classes < 0 or self.levels < 2 or not 0 <= self.label_dropout <= 1:
            raise ValueError("expected num_classes >= 0, levels >= 2 and label_dropout in [0, 1]")
        if not 0 <= self.mask_ratio < 1 or self.kept < 1 or not self.reconstruction >= 0:
            raise ValueError(
                "expected a mask_ratio in [0, 1) that keeps a token, and reconstruction >= 0, got "
                f"{self.mask_ratio}, {self.reconstruction} for {self.tokens} tokens"
            )
        if self.mask_ratio and self.reconstruction and channels * side**2 < 2:
            raise ValueError(
                "expected reconstruction=0 or patches of two numbers and more: one number has no "
                "variance by which it could be normalised"
            )
        _ = self.path  # checks sigma_data

    @property
    def encoder(self) -> Part:
        """Sizes of the encoder. Raises ValueError for what cannot be built."""
        return Part(self.width, self.depth, self.num_heads)

    @property
    def decoder(self) -> Part:
        """Sizes of the decoder. Raises ValueError for what cannot be built."""
        return Part(self.decoder_width, self.decoder_depth, self.decoder_heads)

    @property
    def tokens(self) -> int:
        """Number of tokens of an image."""
        return self.image_shape[1] * self.image_shape[2] // self.patch_size**2

    @property
    def kept(self) -> int:
        """How many of them the encoder sees in training."""
        return int(self.tokens * (1 - self.mask_ratio))

    @property
    def path(self) -> InterpolatedCosine:
        """Where the noise levels stand in library time."""
        side = max(self.image_shape[1:])
        return InterpolatedCosine(side, side, side, LEAST, MOST, self.sigma_data)


@final
class MaskDiT(PathModel):
    """The model: EDM's preconditioning around a masked transformer.

    With x = x0 + s eps, the denoised image D (`paths.edm.Preconditioning`) and the weight
    w = (s^2 + d^2) / (s d)^2, the loss of an image is, in means over patches,

        w (D - x0)^2 over patches that the encoder saw
        + reconstruction * (D - n(x))^2 over the others,

    where n(x) is the noisy patch less its mean, over its standard deviation.

    >>> import exactflow
    >>> model = exactflow.build("maskdit-tiny")
    >>> exactflow.sample(model, 2, solver=exactflow.solvers.EDMSolver(4)).x.shape
    torch.Size([2, 3, 8, 8])
    """

    kind: ClassVar[str] = "maskdit"
    usual_solver: ClassVar[str] = "edm"
    quick_solver: ClassVar[str] = "edm"
    sampled_between: ClassVar[tuple[float, float] | None] = (80.0, 0.002)

    def __init__(self, config: MaskDiTConfig) -> None:
        super().__init__()
        self.config = config
        self._path, self._edm = config.path, Preconditioning(config.sigma_data)
        self.network = MaskedTransformer(
            config.image_shape,
            config.patch_size,
            config.encoder,
            config.decoder,
            config.num_classes,
        )

    @property
    def stages(self) -> Sequence[nn.Module]:
        return [*self.network.encoder, *self.network.decoder]

    @property
    def path(self) -> InterpolatedCosine:
        return self._path

    @property
    def prediction(self) -> Prediction:
        return "v"

    def predict(self, x_t: Images, t: PerSample, label: Labels | None = None) -> Images:
        """See `PathModel.predict`; all tokens are seen."""
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
        """Masked denoising error of centred images; labels are dropped.

        Outside of training nothing is masked.
        """
        x0 = self.as_data(images)
        self.check_label(label, len(images))
        options = {"generator": generator, "dtype": x0.dtype, "device": x0.device}
        noise = batch.randn(x0.shape, **options)
        log_sigma = LEVEL_MEAN + LEVEL_STD * batch.randn((len(x0),), **options)
        kept = None
        if self.training and self.config.mask_ratio:
            places = batch.rand((len(x0), self.config.tokens), **options)
            kept = places.argsort(dim=1)[:, : self.config.kept]
        return self.denoising_loss(
            x0, noise, log_sigma, self.drop_labels(label, generator), kept=kept
        )

    def denoising_loss(
        self,
        x0: Images,
        noise: Images,
        log_sigma: PerSample,
        label: Labels | None = None,
        *,
        kept: Int[Tensor, "batch kept"] | None = None,
    ) -> PerSample:
        """The loss given data and noise.

        w (D - x0)^2 is the squared error of the network's own output.

        Args:
            x0: images in [-1, 1].
            noise: standard normal.
            log_sigma: ln of the noise level of each image.
            label: class of each image; None for a dropped label.
            kept: places of the tokens that the encoder sees; None: all.
        """
        x = x0 + per_sample(log_sigma.exp(), x0) * noise
        output = self._evaluate(self._edm.scale(x, log_sigma) * x, log_sigma, label, kept)
        error = (output - self._edm.target(x0, noise, log_sigma)).square()
        if kept is None:
            return error.flatten(1).mean(1)
        patches = self.network.patches
        seen = patches(error).mean(2)
        denoised = patches(self._edm.denoised(x, output, log_sigma))
        unseen = (denoised - _normalized(patches(x))).square().mean(2)
        visible = torch.zeros_like(seen).scatter(1, kept, 1.0)
        removed = 1 - visible
        loss = (seen * visible).sum(1) / visible.sum(1)
        return loss + self.config.reconstruction * (unseen * removed).sum(1) / removed.sum(1)

    def _evaluate(
        self, x: Tensor, log_sigma: Tensor, label: Tensor | None, kept: Tensor | None = None
    ) -> Images:
        """The network F at unit-variance x, in the dtype of x."""
        output = self.network(x.to(self.dtype), log_sigma.to(self.dtype) / 4, label, kept)
        return output.to(x.dtype)


def _normalized(
    patches: Float[Tensor, "batch tokens values"],
) -> Float[Tensor, "batch tokens values"]:
    """Each patch less its mean, over its standard deviation (of an unbiased variance)."""
    variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
    return (patches - mean) / (variance + VARIANCE_FLOOR).sqrt()
