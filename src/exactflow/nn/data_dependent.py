"""Parts that take their first parameters from a batch of data (Salimans and Kingma, 1602.07868)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

STD_FLOOR = 1e-6  # added to a standard deviation that something is divided by


class DataDependent(nn.Module, ABC):
    """A part whose first parameters are read off a batch of its inputs."""

    @abstractmethod
    def initialize(self, x: Float[Tensor, "batch channels height width"]) -> None:
        """Set the parameters from `x`, for example so that the output has mean 0 and variance 1."""


@contextmanager
def initializing(module: nn.Module) -> Iterator[None]:
    """Inside, a forward pass initialises each `DataDependent` part of `module` on its own input.

    Gradients are off; autocast too, since statistics want full precision.
    """

    def before(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(part, DataDependent)
        part.initialize(inputs[0])

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(next(module.parameters()).device.type, enabled=False))
        for part in module.modules():
            if isinstance(part, DataDependent):
                stack.callback(part.register_forward_pre_hook(before).remove)
        yield


def standardize(
    out: Float[Tensor, "batch channels height width"],
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Mean and reciprocal standard deviation of every channel, over batch and pixels.

    The reciprocal is 1 for a constant channel, which no scale makes standard.
    """
    std, mean = torch.std_mean(out.transpose(0, 1).flatten(1), 1)
    return mean, torch.where(std > STD_FLOOR, 1 / (std + STD_FLOOR), 1.0)
