"""A flow with known results: images of class c are N(mean_c, L L^T)."""

import torch
from torch import Tensor

from exactflow.core.density_flow import DensityFlow
from exactflow.core.prior import DiagonalGaussian


class GaussianFlow(DensityFlow):
    """z = L^-1 (x - mean_c); without a label, or with the null label, the first mean."""

    kind = "gaussian"
    stages = ()

    def __init__(
        self,
        means: Tensor,  # (classes, channels, height, width); one class: unconditional
        factor: Tensor | None = None,  # L, (D, D) lower triangular; None: the identity
        noise_std: float = 0.0,
        levels: int = 256,
    ) -> None:
        super().__init__()
        self._noise_std, self._levels = noise_std, levels
        dims = means[0].numel()
        factor = torch.eye(dims, dtype=means.dtype) if factor is None else factor
        self.means, self.factor = torch.nn.Parameter(means), torch.nn.Parameter(factor)

    @property
    def event_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.means.shape[1:]
        return channels, height, width

    @property
    def levels(self) -> int:
        return self._levels

    @property
    def num_classes(self) -> int:
        return len(self.means) if len(self.means) > 1 else 0

    @property
    def noise_std(self) -> float:
        return self._noise_std

    @property
    def prior(self) -> DiagonalGaussian:
        return DiagonalGaussian(torch.ones_like(self.means[0].flatten()))

    @property
    def covariance(self) -> Tensor:
        return (self.factor @ self.factor.T).detach()

    def _mean(self, label: Tensor | None) -> Tensor:
        rows = torch.zeros(1, dtype=torch.int64) if label is None else label % len(self.means)
        return self.means[rows].flatten(1)

    def encode(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        centred = (x.flatten(1) - self._mean(label)).T
        z = torch.linalg.solve_triangular(self.factor, centred, upper=False).T
        return z, -self.factor.diagonal().log().sum().expand(len(x))

    @torch.no_grad()
    def trajectory(self, z: Tensor, label: Tensor | None = None, *, solver=None):
        yield (z @ self.factor.T + self._mean(label)).view(-1, *self.event_shape)

    def loss(self, images, label=None, *, generator=None):
        raise NotImplementedError


def some_factor(dims: int, seed: int = 0, scale: float = 0.3) -> Tensor:
    """A well-conditioned lower triangular matrix, float64."""
    source = torch.Generator().manual_seed(seed)
    noise = torch.randn(dims, dims, generator=source, dtype=torch.float64)
    return scale * (torch.eye(dims, dtype=torch.float64) + 0.5 * noise.tril(-1))
