"""The distribution at the end of a flow."""

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor


class Prior(ABC):
    """A distribution over latents z of one shape (without the batch axis)."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one latent."""

    @abstractmethod
    def log_prob(self, z: Float[Tensor, "batch *latent"]) -> Float[Tensor, " batch"]:
        """Log-density in nats, summed over the latent, float32 or better."""

    @abstractmethod
    def from_noise(self, noise: Float[Tensor, "batch *latent"]) -> Float[Tensor, "batch *latent"]:
        """The sample of this prior that is a function of standard normal `noise`."""


@final
class DiagonalGaussian(Prior):
    """N(0, diag(variance)): ln p(z) = -1/2 sum (z^2 / variance + ln variance + ln 2 pi).

    Args:
        variance: positive, of the latent's shape.

    Example:
        >>> prior = DiagonalGaussian(torch.ones(3, 8, 8))
        >>> prior.log_prob(torch.zeros(2, 3, 8, 8))  # -96 ln(2 pi)
        tensor([-176.4362, -176.4362])
    """

    def __init__(self, variance: Float[Tensor, " *latent"]) -> None:
        self.variance = variance

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.variance.shape)

    def log_prob(self, z: Float[Tensor, "batch *latent"]) -> Float[Tensor, " batch"]:
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        variance = self.variance.to(z.dtype)
        quadratic = (z.square() / variance).flatten(1).sum(1)
        constant = variance.log().sum() + variance.numel() * math.log(2 * math.pi)
        return -0.5 * (quadratic + constant)

    def from_noise(self, noise: Float[Tensor, "batch *latent"]) -> Float[Tensor, "batch *latent"]:
        return noise * self.variance.sqrt().to(noise.dtype)
