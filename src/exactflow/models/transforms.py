"""Invertible maps of images that several families are made of."""

from abc import ABC, abstractmethod
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.core.composition import (
    Composition,
    ElementaryTransform,
    Retraced,
    ReversibleTransform,
)
from exactflow.core.shapes import Images, Labels, PerSample

Context = Float[Tensor, "batch features height width"]  # what a map depends on besides x
Kept = Float[Tensor, "batch kept height width"]  # channels that a coupling does not change
Moved = Float[Tensor, "batch moved height width"]  # channels that it transforms


class InvertibleComposition(Composition, ABC):
    """A composition whose parts are inverted directly, without a solver."""

    def forward(self, x: Images, context: Context | None = None) -> tuple[Images, PerSample]:
        """z and ln |det dz/dx|."""
        return self.through(x, context)

    def inverse(self, z: Images) -> Images:
        """The x of z, without a context."""
        for part in reversed(self.parts):
            assert isinstance(part, ReversibleTransform | InvertibleComposition)
            z = part.inverse(z)
        return z


@final
class InvertibleConvolution(ElementaryTransform):
    """z = W x at every place, W a full matrix that starts orthogonal (Glow, section 3.2).

    The inverse solves with the present W: no inverse is kept that could be out of date. W is used
    in the precision of the data, not of autocast: a rounded matrix has another inverse.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels))
        if not self.weight.is_meta:  # where it would take long, and make nothing
            nn.init.orthogonal_(self.weight)

    def forward(
        self, x: Images, label: Labels | None = None, context: Context | None = None
    ) -> tuple[Images, PerSample]:
        weight = self.weight.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            z = F.conv2d(x, weight[..., None, None])
            log_abs_det = torch.linalg.slogdet(weight).logabsdet * (x.shape[2] * x.shape[3])
        return z, log_abs_det.expand(len(x))

    def inverse(
        self, z: Images, label: Labels | None = None, context: Context | None = None
    ) -> Images:
        with torch.autocast(z.device.type, enabled=False):
            return torch.linalg.solve(self.weight.to(z.dtype), z.flatten(2)).view_as(z)


class AffineCoupling(ReversibleTransform, ABC):
    """z = exp(log_scale) x + shift for the last channels, both a function of the first, which stay.

    (Dinh et al., RealNVP, arXiv 1605.08803.)

    Attributes:
        kept: how many channels are not changed.
    """

    kept: int

    @abstractmethod
    def move(self, kept: Kept, context: Context | None) -> tuple[Moved, Moved]:
        """Parameters (shift, log_scale) of the channels that are transformed, in the dtype of x."""

    def forward(
        self, x: Images, label: Labels | None = None, context: Context | None = None
    ) -> tuple[Images, PerSample]:
        kept, moved = x[:, : self.kept], x[:, self.kept :]
        return _couple(kept, moved, *self.move(kept, context))

    def inverse(
        self, z: Images, label: Labels | None = None, context: Context | None = None
    ) -> Images:
        kept, moved = z[:, : self.kept], z[:, self.kept :]
        shift, log_scale = self.move(kept, context)
        return torch.cat([kept, (moved - shift) * torch.exp(-log_scale)], dim=1)

    def retrace(self, z: Images, context: Context | None = None) -> Retraced:
        """See `ReversibleTransform.retrace`: the network is evaluated once, for both.

        Its input equals that of `forward` bit for bit where z is the output of `forward`.
        """
        kept = z[:, : self.kept].detach().requires_grad_()
        shift, log_scale = self.move(kept, context)
        with torch.no_grad():
            moved = (z[:, self.kept :] - shift) * torch.exp(-log_scale)
        moved.requires_grad_()
        return Retraced((kept, moved), *_couple(kept, moved, shift, log_scale))


def _couple(kept: Tensor, moved: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.cat([kept, torch.addcmul(shift, moved, log_scale.exp())], dim=1)
    return z, log_scale.sum((1, 2, 3))
