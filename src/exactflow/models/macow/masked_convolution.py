"""Weight-normalised convolutions that take their scale from data, and the networks of MaCow.

Weight normalisation and its data-dependent initialisation: Salimans and Kingma, arXiv 1602.07868,
eqs. 2 and 5. Masking by shifting: Ma et al., MaCow, arXiv 1902.04208, section 3.1.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.core.shapes import Images
from exactflow.models.transforms import Context
from exactflow.nn.data_dependent import DataDependent, standardize

DIRECTION_STD = 0.05  # initial spread of the directions of weights
Kernel = Callable[[Tensor], Tensor]  # a convolution with its weights


@final
class WeightNormConv(DataDependent):
    """A convolution whose weight is gain * direction / |direction| per output channel.

    Args:
        inputs: channels.
        outputs: channels.
        kernel: height and width.
        padding: zeros around the input, rows and columns.
        stride: of both axes.
        transposed: the transposed convolution, which doubles the size at stride 2.
        last: data-dependent initialisation makes the output zero instead of standard.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        stride: int = 1,
        *,
        transposed: bool = False,
        last: bool = False,
    ) -> None:
        super().__init__()
        self.padding, self.stride = padding, stride
        self.transposed, self.last = transposed, last
        size = (inputs, outputs) if transposed else (outputs, inputs)
        direction = torch.randn(*size, *kernel) * DIRECTION_STD
        self.direction = nn.Parameter(direction)
        self._summed = (0, 2, 3) if transposed else (1, 2, 3)
        shape = (1, outputs, 1, 1) if transposed else (outputs, 1, 1, 1)
        # Norms on the meta device take half a millisecond each, and large models have thousands.
        norm = direction.new_empty(shape) if direction.is_meta else self._norm(direction)
        self.gain = nn.Parameter(norm)
        self.bias = nn.Parameter(torch.zeros(outputs))

    @property
    def weight(self) -> Float[Tensor, "a b height width"]:
        """The weight that the input is convolved with."""
        return self.direction * (self.gain / self._norm(self.direction))

    def forward(
        self, x: Float[Tensor, "batch inputs height width"]
    ) -> Float[Tensor, "batch outputs _ _"]:
        """The convolution."""
        return self._convolve(self.weight, self.bias, x)

    def frozen(self, dtype: torch.dtype | None = None) -> Kernel:
        """The convolution with its present weights, normalised once."""
        weight, bias = self.weight.detach(), self.bias.detach()
        dtype = dtype or weight.dtype
        return partial(self._convolve, weight.to(dtype), bias.to(dtype))

    @torch.no_grad()
    def initialize(self, x: Float[Tensor, "batch inputs height width"]) -> None:
        """Mean 0 and standard deviation 1 of every output channel on `x`; all 0 if `last`."""
        if self.last:
            self.gain.zero_()
            self.bias.zero_()
            return
        mean, scale = standardize(self.forward(x))
        self.gain.mul_(scale.view(self.gain.shape))
        self.bias.sub_(mean).mul_(scale)

    def _norm(self, direction: Tensor) -> Tensor:
        return torch.linalg.vector_norm(direction, dim=self._summed, keepdim=True)

    def _convolve(self, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        x = x.to(weight.dtype)
        if self.transposed:
            return F.conv_transpose2d(x, weight, bias, self.stride, self.padding, self.stride - 1)
        return F.conv2d(x, weight, bias, self.stride, self.padding)


@final
class MaskedNetwork(nn.Module):
    """conv, ELU, conv 1x1: parameters of a line from the lines before it.

    Along the lines nothing is padded: k lines give the parameters of one, so that masking is a
    matter of which lines are handed in.

    Args:
        channels: of the image.
        hidden: channels between the convolutions.
        outputs: parameters of each place.
        kernel: rows and columns seen.
        padding: rows and columns of zeros: none along the lines.
        context: channels of what the flow is conditioned on; 0: none.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        outputs: int,
        kernel: tuple[int, int],
        padding: tuple[int, int],
        context: int = 0,
    ) -> None:
        super().__init__()
        self.conv = WeightNormConv(channels, hidden, kernel, padding)
        self.output = WeightNormConv(hidden, outputs, last=True)
        self.context = WeightNormConv(context, hidden, (3, 3), (1, 1)) if context else None

    def forward(
        self,
        before: Float[Tensor, "batch channels more_rows more_columns"],
        hidden: Float[Tensor, "batch hidden rows columns"] | None = None,
        kernels: tuple[Kernel, Kernel] | None = None,
    ) -> Float[Tensor, "batch outputs rows columns"]:
        """Parameters of every line that has all its k lines among those given.

        Args:
            before: k - 1 lines more than there are outputs.
            hidden: what `context` makes of the context.
            kernels: from `frozen`; None: the weights as they are.
        """
        conv, output = (self.conv, self.output) if kernels is None else kernels
        h = conv(before)
        return output(F.elu(h if hidden is None else h + hidden))

    def frozen(self, dtype: torch.dtype | None = None) -> tuple[Kernel, Kernel]:
        """Both convolutions with their present weights."""
        return self.conv.frozen(dtype), self.output.frozen(dtype)


@final
class CouplingNetwork(nn.Module):
    """conv 3x3, ELU, conv 1x1, ELU, conv 3x3: parameters of the channels that are transformed."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = WeightNormConv(inputs, hidden, (3, 3), (1, 1))
        self.conv2 = WeightNormConv(hidden, hidden)
        self.conv3 = WeightNormConv(hidden, outputs, (3, 3), (1, 1), last=True)

    def forward(
        self, x: Float[Tensor, "batch inputs height width"]
    ) -> Float[Tensor, "batch outputs height width"]:
        """The parameters."""
        return self.conv3(F.elu(self.conv2(F.elu(self.conv1(x)))))


@final
class ResidualBlock(nn.Module):
    """ELU(shortcut(x) + conv 3x3(ELU(conv 3x3(x))))."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = WeightNormConv(inputs, outputs, (3, 3), (1, 1))
        self.conv2 = WeightNormConv(outputs, outputs, (3, 3), (1, 1))
        self.shortcut = WeightNormConv(inputs, outputs) if inputs != outputs else None

    def forward(
        self, x: Float[Tensor, "batch inputs height width"]
    ) -> Float[Tensor, "batch outputs height width"]:
        """The block."""
        change = self.conv2(F.elu(self.conv1(x)))
        return F.elu(change + (x if self.shortcut is None else self.shortcut(x)))


@final
class ContextEncoder(nn.Module):
    """Down to the coarsest level of a flow and up again: features of every pixel of an image.

    Args:
        channels: of the image.
        levels: how often the size is halved.
        outputs: features.
        planes: channels at full size; each level adds as many, up to four times that.
    """

    def __init__(self, channels: int, levels: int, outputs: int, planes: int = 32) -> None:
        super().__init__()
        widths = [min(planes * (i + 1), 4 * planes) for i in range(levels + 1)]
        self.bottom = nn.Sequential(ResidualBlock(channels, planes), ResidualBlock(planes, planes))
        steps = list(pairwise(widths))
        self.down = nn.ModuleList(WeightNormConv(a, b, (3, 3), (1, 1), stride=2) for a, b in steps)
        self.residual = nn.ModuleList(
            nn.Sequential(ResidualBlock(b, b), ResidualBlock(b, b)) for _, b in steps
        )
        self.up = nn.ModuleList(
            WeightNormConv(b, a, (3, 3), (1, 1), stride=2, transposed=True)
            for a, b in reversed(steps)
        )
        self.output = WeightNormConv(planes, outputs)

    def forward(self, x: Images) -> Context:
        """Features at full size."""
        h = self.bottom(x)
        for down, residual in zip(self.down, self.residual, strict=True):
            h = residual(F.elu(down(h)))
        for up in self.up:
            h = F.elu(up(h))
        return self.output(h)
