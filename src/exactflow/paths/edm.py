"""EDM's preconditioning of a denoiser (Karras et al., arXiv 2206.00364, section 5 and table 1).

EDM writes x = x0 + s eps with the noise level s; a variance preserving path of this library has
x_t = alpha x, with alpha = 1 / sqrt(1 + s^2).
"""

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from exactflow.core.shapes import Images, PerSample
from exactflow.paths.path_model import per_sample

Factors = Float[Tensor, "batch 1 1 1"]  # one of each image


@final
@dataclass(frozen=True)
class Preconditioning:
    """Around a network F that sees input, and gives output, of unit variance.

        D(x; s) = d^2 / (s^2 + d^2) x + s d / sqrt(s^2 + d^2) F(x / sqrt(s^2 + d^2), ln(s) / 4)

    Attributes:
        sigma_data: d, the standard deviation of the data.
    """

    sigma_data: float

    def scale(self, x: Images, log_sigma: PerSample) -> Factors:
        """1 / sqrt(s^2 + d^2): x times this is the network's input."""
        return (per_sample(log_sigma.exp(), x).square() + self.sigma_data**2).rsqrt()

    def denoised(self, x: Images, output: Images, log_sigma: PerSample) -> Images:
        """D, given x = x0 + s eps and what the network makes of it."""
        s, d, scale = per_sample(log_sigma.exp(), x), self.sigma_data, self.scale(x, log_sigma)
        return (d * scale).square() * x + s * d * scale * output

    def target(self, x0: Images, noise: Images, log_sigma: PerSample) -> Images:
        """The output with which D is x0: (x0 s / d - d eps) / sqrt(s^2 + d^2)."""
        s, d = per_sample(log_sigma.exp(), x0), self.sigma_data
        return (x0 * (s / d) - d * noise) * self.scale(x0, log_sigma)

    def path_scale(self, x_t: Images, log_sigma: PerSample) -> Factors:
        """sqrt((1 + s^2) / (s^2 + d^2)): x_t of the path times this is the network's input."""
        squared = log_sigma.exp().square()
        return per_sample(((1 + squared) / (squared + self.sigma_data**2)).sqrt(), x_t)

    def v(self, x_t: Images, output: Images, log_sigma: PerSample) -> Images:
        """v = alpha eps - sigma x0 that follows from the output; exact at any level.

        s (1 - d^2) / (s^2 + d^2) x_t - d sqrt((1 + s^2) / (s^2 + d^2)) F: no cancellation at low
        noise, no division by alpha.
        """
        s, d = log_sigma.exp(), self.sigma_data
        total = s.square() + d**2
        skip, gain = s * (1 - d**2) / total, d * ((1 + s.square()) / total).sqrt()
        return per_sample(skip, x_t) * x_t - per_sample(gain, x_t) * output
