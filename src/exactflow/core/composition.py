"""Maps one after another, and those whose input can be had from their output at no extra cost.

Training keeps the input of every map for its gradient. Where the map can be inverted for the price
of evaluating it, the input need not be kept (Dinh et al., NICE, arXiv 1410.8516, have the maps;
Gomez et al., The Reversible Residual Network, arXiv 1707.04585, the idea).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from exactflow.core.shapes import Labels, Latents, PerSample, Values
from exactflow.core.transform import Transform


@final
@dataclass(frozen=True)
class Retraced:
    """A map evaluated once more, from its output.

    Attributes:
        inputs: the input, or what it is cut into along axis 1: leaves that require gradients.
        z: the output, a function of them.
        log_abs_det: likewise.
    """

    inputs: tuple[Tensor, ...]
    z: Tensor
    log_abs_det: Tensor

    @property
    def x(self) -> Tensor:
        """The input, without history."""
        cut = [part.detach() for part in self.inputs]
        return cut[0] if len(cut) == 1 else torch.cat(cut, dim=1)


class ReversibleTransform(Transform, ABC):
    """A transform whose inverse is as cheap as its forward pass; it may depend on a context.

    That is more than `Transform` asks for: the inverse of an autoregressive transform, one token
    after another, is exact too, but far too slow to be part of every training step. Both are to be
    functions of their arguments and of the parameters alone: without random numbers, for one.
    """

    @abstractmethod
    def forward(
        self,
        x: Values,
        label: Labels | None = None,
        context: Float[Tensor, "batch *features"] | None = None,
    ) -> tuple[Latents, PerSample]:
        """See `Transform.forward`."""

    @abstractmethod
    def inverse(
        self,
        z: Latents,
        label: Labels | None = None,
        context: Float[Tensor, "batch *features"] | None = None,
    ) -> Values:
        """See `Transform.inverse`."""

    @abstractmethod
    def retrace(
        self, z: Latents, context: Float[Tensor, "batch *features"] | None = None
    ) -> Retraced:
        """The x of z, and `forward` of that x: together at the cost of one `forward`.

        To be called with gradients enabled. Parameters and context are reached by them too; `z`
        itself, which is where gradients come from, is not.
        """


class ElementaryTransform(ReversibleTransform, ABC):
    """A transform without a network: inverted and evaluated again, it still costs next to nothing.

    A matrix product at each place is about the limit.
    """

    def retrace(
        self, z: Latents, context: Float[Tensor, "batch *features"] | None = None
    ) -> Retraced:
        with torch.no_grad():
            x = self.inverse(z, context=context)
        x = x.detach().requires_grad_()
        return Retraced((x,), *self(x, context=context))


class Composition(nn.Module, ABC):
    """A module that takes its input through several maps in turn.

    It must do so by `through`, which reversible training replaces.
    """

    @property
    @abstractmethod
    def parts(self) -> Sequence[nn.Module]:
        """The maps, first applied first; called with x and a keyword `context`.

        Each gives its output and ln |det|, of every sample, and is a `ReversibleTransform`, a
        composition, or anything else.
        """

    def through(
        self, x: Values, context: Float[Tensor, "batch *features"] | None = None
    ) -> tuple[Latents, PerSample]:
        """x through all parts, and the sum of their ln |det|."""
        log_abs_det = x.new_zeros(len(x))
        for part in self.parts:
            x, change = part(x, context=context)
            log_abs_det = log_abs_det + change
        return x, log_abs_det
