"""Compositions of maps, and maps that are as cheap to invert as to evaluate.

Training stores the input of every map for its gradient. The input of a cheaply inverted map need
not be stored: the backward pass computes it from the output (Gomez et al., The Reversible Residual
Network, arXiv 1707.04585; such maps: Dinh et al., NICE, arXiv 1410.8516).
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

Context = Float[Tensor, "batch *features"]  # further inputs of a map, which it does not transform


@final
@dataclass(frozen=True)
class Retraced:
    """A map evaluated again at the input that belongs to its output.

    Attributes:
        inputs: the input, or its parts along axis 1: leaves that require gradients.
        z: the output, a function of them.
        log_abs_det: ln |det|, likewise.
    """

    inputs: tuple[Tensor, ...]
    z: Tensor
    log_abs_det: Tensor

    @property
    def x(self) -> Tensor:
        """The input, without gradient."""
        parts = [part.detach() for part in self.inputs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class ReversibleTransform(Transform, ABC):
    """A transform whose inverse is as cheap as its forward pass; it may depend on a context.

    That is more than `Transform` requires: the inverse of an autoregressive transform, one token
    after another, is exact too, but too slow for every training step. Both passes must be functions
    of their arguments and of the parameters alone, without random numbers.
    """

    @abstractmethod
    def forward(
        self, x: Values, label: Labels | None = None, context: Context | None = None
    ) -> tuple[Latents, PerSample]:
        """See `Transform.forward`."""

    @abstractmethod
    def inverse(
        self, z: Latents, label: Labels | None = None, context: Context | None = None
    ) -> Values:
        """See `Transform.inverse`."""

    @abstractmethod
    def retrace(self, z: Latents, context: Context | None = None) -> Retraced:
        """The x of z, and `forward` of that x, at the cost of about one `forward`.

        Call this with gradients enabled. They flow to `inputs`, parameters and context, not to the
        argument `z`.
        """


class ElementaryTransform(ReversibleTransform, ABC):
    """A transform without a network, so cheap that `retrace` inverts and evaluates it.

    A matrix product at each pixel is about the limit.
    """

    def retrace(self, z: Latents, context: Context | None = None) -> Retraced:
        with torch.no_grad():
            x = self.inverse(z, context=context)
        x = x.detach().requires_grad_()
        return Retraced((x,), *self(x, context=context))


class Composition(nn.Module, ABC):
    """A module that applies several maps in turn: z = f_n(.. f_1(x)), ln |det| their sum.

    It must call `through`, which reversible training replaces.
    """

    @property
    @abstractmethod
    def parts(self) -> Sequence[nn.Module]:
        """The maps in the order of application; called with x and a keyword `context`.

        Each returns its output and ln |det| of every sample. Only a `ReversibleTransform` or a
        composition of them saves memory.
        """

    def through(self, x: Values, context: Context | None = None) -> tuple[Latents, PerSample]:
        """x through all parts, and the sum of their ln |det|."""
        log_abs_det = x.new_zeros(len(x))
        for part in self.parts:
            x, change = part(x, context=context)
            log_abs_det = log_abs_det + change
        return x, log_abs_det
