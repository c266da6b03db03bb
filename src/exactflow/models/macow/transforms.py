"""The invertible maps that are MaCow's own."""

from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.core.composition import ElementaryTransform
from exactflow.core.conditional import Affine
from exactflow.core.shapes import Images, Labels, PerSample, Tokens
from exactflow.core.transform import AutoregressiveTransform, Decoding
from exactflow.models.macow.masked_convolution import Kernel, MaskedNetwork
from exactflow.models.transforms import AffineCoupling, Context, Kept, Moved
from exactflow.nn.data_dependent import DataDependent, standardize

LOG_SCALE_STD = 0.05  # initial spread of ActNorm's log-scales
SCALE_OFFSET = 2.0  # of the sigmoid: raw output 0 gives the scale sigmoid(2) = 0.88
Orientation = Literal["A", "B", "C", "D"]  # sees what is above, below, left, right


@final
class ActNorm(ElementaryTransform, DataDependent):
    """z = exp(log_scale) x + bias for every channel (Glow, arXiv 1807.03039, section 3.1).

    Initialised on data, every channel of z has mean 0 and standard deviation 1 there. The inverse
    is the exact one: no constant is added to the scale.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.randn(channels, 1, 1) * LOG_SCALE_STD)
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(
        self, x: Images, label: Labels | None = None, context: Context | None = None
    ) -> tuple[Images, PerSample]:
        log_scale = self.log_scale.to(x.dtype)
        log_abs_det = log_scale.sum() * (x.shape[2] * x.shape[3])
        z = torch.addcmul(self.bias.to(x.dtype), x, log_scale.exp())
        return z, log_abs_det.expand(len(x))

    def inverse(
        self, z: Images, label: Labels | None = None, context: Context | None = None
    ) -> Images:
        return (z - self.bias.to(z.dtype)) * torch.exp(-self.log_scale.to(z.dtype))

    @torch.no_grad()
    def initialize(self, x: Images) -> None:
        mean, scale = standardize(self.forward(x)[0])
        self.log_scale.add_(scale.log().view(-1, 1, 1))
        self.bias.sub_(mean.view(-1, 1, 1)).mul_(scale.view(-1, 1, 1))


def squeeze(x: Images) -> Float[Tensor, "batch more half_height half_width"]:
    """Every 2 x 2 square of places as one, whose channel (2 dy + dx) C + c is c at (dy, dx)."""
    return F.pixel_unshuffle(x, 2).unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2)


def unsqueeze(z: Images) -> Float[Tensor, "batch fewer double_height double_width"]:
    """Inverse of `squeeze`."""
    return F.pixel_shuffle(z.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2), 2)


@final
class Coupling(AffineCoupling):
    """The coupling of MaCow (eq. 6): s = sigmoid(raw + 2), or 1 if additive.

    What is kept comes before what is transformed, and the raw shifts before the raw scales.

    Args:
        network: takes the kept channels, then the context, and gives the parameters.
        kept: how many channels are not changed.
        additive: whether there are shifts only.
        soft_clip: see `shift_and_log_scale`.
    """

    def __init__(
        self, network: nn.Module, kept: int, additive: bool = False, soft_clip: float = 0.0
    ) -> None:
        super().__init__()
        self.network, self.kept, self.additive = network, kept, additive
        self.soft_clip = soft_clip

    def move(self, kept: Kept, context: Context | None) -> tuple[Moved, Moved]:
        seen = kept if context is None else torch.cat([kept, context.to(kept.dtype)], dim=1)
        raw = self.network(seen).to(kept.dtype)
        return shift_and_log_scale(raw, self.additive, self.soft_clip)


def shift_and_log_scale(
    raw: Float[Tensor, "batch parameters *place"], additive: bool, soft_clip: float = 0.0
) -> tuple[Float[Tensor, "batch channels *place"], Float[Tensor, "batch channels *place"]]:
    """mu and ln s = ln sigmoid(r + 2) of raw parameters (mu, r); ln s = 0 if additive.

    Args:
        raw: the network's output.
        additive: whether these are shifts only.
        soft_clip: c > 0: raw parameters r become c tanh(r / c), so that s >= sigmoid(2 - c) and the
            inverse, which divides by s, is bounded; 0: they are taken as they are (published).
    """
    if soft_clip:
        raw = soft_clip * torch.tanh(raw / soft_clip)
    if additive:
        return raw, torch.zeros_like(raw)
    shift, r = raw.chunk(2, dim=1)
    return shift, F.logsigmoid(r + SCALE_OFFSET)


@final
class MaskedConvolution(AutoregressiveTransform):
    """z = s x + mu, (mu, s) of a row a function of the few rows before it (section 3.1).

    Tokens are the lines of the image in the order of `orientation`: rows downwards (A) or upwards
    (B), columns rightwards (C) or leftwards (D). The mask is a shift: zeros for the lines before
    the first, and the last line left out. Only tokens are transposed or flipped, images never.

    Args:
        channels: of the image.
        size: height and width of the image, which say how many lines there are, and how long.
        kernel: lines before that are seen, and places across.
        orientation: order of the lines.
        additive: s = 1.
        context: channels of the context; 0: none.
        soft_clip: see `shift_and_log_scale`.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        kernel: tuple[int, int],
        orientation: Orientation,
        additive: bool = False,
        context: int = 0,
        soft_clip: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_tokens, across = size if orientation in "AB" else size[::-1]
        self.channels, self.seen = channels, kernel[0]
        self.conditional = Affine(channels * across)
        self.orientation: Orientation = orientation
        self.additive, self.soft_clip = additive, soft_clip
        hidden = 4 * channels if channels <= 96 else min(2 * channels, 512)
        outputs = channels if additive else 2 * channels
        window, padding = kernel, (0, kernel[1] // 2)
        if orientation in "CD":
            window, padding = (kernel[1], kernel[0]), (padding[1], padding[0])
        self.network = MaskedNetwork(channels, hidden, outputs, window, padding, context)

    def arrange(self, x: Images) -> Tokens:
        """The image's lines in generation order."""
        x = x.permute(0, 2, 1, 3) if self.orientation in "AB" else x.permute(0, 3, 1, 2)
        return (x.flip(1) if self.orientation in "BD" else x).flatten(2)

    def restore(self, tokens: Tokens) -> Images:
        """Inverse of `arrange`; also of a few lines only."""
        tokens = tokens.flip(1) if self.orientation in "BD" else tokens
        x = tokens.unflatten(2, (self.channels, -1))
        return x.permute(0, 2, 1, 3) if self.orientation in "AB" else x.permute(0, 2, 3, 1)

    def encode(self, x: Images, context: Context | None = None) -> tuple[Images, PerSample]:
        """`forward` of an image laid out as such, not as tokens; it may depend on a context."""
        hidden = None
        if context is not None:
            assert self.network.context is not None
            hidden = self.network.context(context)
        mu, log_s = self._move(x, (self.seen, -1), hidden)
        return torch.addcmul(mu, x, log_s.exp()), log_s.sum((1, 2, 3))

    def new_cache(self, x: Tokens, decoding: Decoding | None = None) -> tuple[Kernel, Kernel]:
        """The weights, normalised once: nothing of the lines before, which `conditioner` is given.

        Raises ValueError for another step than "eager".
        """
        how = decoding or Decoding()
        if how.step != "eager":
            raise ValueError(f"masked convolutions have no {how.step!r} step: expected 'eager'")
        return self.network.frozen(how.dtype)

    def conditioner(
        self,
        x: Float[Tensor, "batch stop dim"],
        label: Labels | None = None,
        cache: tuple[Kernel, Kernel] | None = None,
        start: int = 0,
        temperature: PerSample | None = None,
    ) -> Float[Tensor, "batch window size"]:
        """See `AutoregressiveTransform.conditioner`: log-scale -ln s and shift -mu / s."""
        before = self.restore(x[:, max(start - self.seen, 0) : -1])
        mu, log_s = self._move(before, (max(self.seen - start, 0), 0), None, cache)
        return torch.cat([self.arrange(-log_s), self.arrange(-mu * torch.exp(-log_s))], dim=-1)

    def _move(
        self,
        x: Tensor,
        missing: tuple[int, int],
        hidden: Tensor | None,
        cache: tuple[Kernel, Kernel] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """mu and ln s, with so many lines of zeros before the first and after the last of `x`."""
        first, last = missing[::-1] if self.orientation in "BD" else missing
        padding = (0, 0, first, last) if self.orientation in "AB" else (first, last, 0, 0)
        raw = self.network(F.pad(x, padding), hidden, cache).to(x.dtype)
        return shift_and_log_scale(raw, self.additive, self.soft_clip)
