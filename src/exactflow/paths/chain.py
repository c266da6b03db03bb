"""The discrete diffusion chain: schedules, posteriors, reverse kernels and the bound's terms.

Pure mathematics on tensors. Ho et al., Denoising Diffusion Probabilistic Models, arXiv 2006.11239
(DDPM below); Nichol and Dhariwal, Improved DDPM, arXiv 2102.09672 (iDDPM). Step 0 is the one
nearest to the data: x_t of step t has x0's share sqrt(alpha_bar_t).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor
from torch.nn import functional as F

from exactflow.core.shapes import Images, Labels, PerSample

Schedule = Literal["linear", "cosine"]
FixedVariance = Literal["large", "small"]
Steps = Int[Tensor, " batch"]  # index in a chain, of each image

# (x_t, original timestep of each image, label) -> (eps, v): predicted noise, and the number that
# places the log-variance between its bounds, -1 .. 1 from one to the other; None if it is fixed.
Network = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]

COSINE_OFFSET = 0.008  # s of iDDPM eq. 17: the first steps add at least a grey level of noise
LARGEST_BETA = 0.999
SMALLEST_MASS = 1e-12  # probability of a grey level that the decoder never goes below
MAX_STEPS = 1_000_000  # each takes some numbers in float64, here and in every copy of the chain
FARTHEST = 20.0  # standard deviations; well beyond where the mass falls below the smallest


def schedule_betas(schedule: Schedule, steps: int) -> Float64[Tensor, " steps"]:
    """beta_t, float64. "linear": 0.1/T to 20/T (DDPM's for T = 1000); "cosine": iDDPM, eq. 17.

    Raises:
        ValueError: for too few or too many steps, or another schedule.
    """
    if not 2 <= steps <= MAX_STEPS:
        raise ValueError(f"expected a chain of 2 to {MAX_STEPS:,} steps, got {steps}")
    if schedule == "linear":
        if steps <= 20:
            raise ValueError(f"expected a linear chain of more than 20 steps, got {steps}")
        return torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64, device="cpu")
    if schedule != "cosine":
        raise ValueError(f"expected schedule 'linear' or 'cosine', got {schedule!r}")
    time = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
    angle = (time + COSINE_OFFSET) / (1 + COSINE_OFFSET) * (math.pi / 2)
    alpha_bar = angle.cos().square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=LARGEST_BETA)


def kept_steps(steps: int, respacing: str) -> tuple[int, ...]:
    """The steps that a strided chain keeps of `steps`, ascending.

    Args:
        steps: T of the whole chain.
        respacing: "" keeps all; "N" takes N steps at equal distances from the first to the last,
            rounded half to even; "ddimN" every k-th from the first, with the integer k that gives
            N of them (Song et al., arXiv 2010.02502).

    Raises:
        ValueError: there are no such steps.
    """
    if not respacing:
        return tuple(range(steps))
    number = respacing.removeprefix("ddim")
    if not number.isdecimal() or not 2 <= int(number) <= steps:
        raise ValueError(
            f"expected respacing '', 'N' or 'ddimN' with N in 2 .. {steps}, got {respacing!r}"
        )
    count = int(number)
    if respacing == number:
        return tuple(round(i * (steps - 1) / (count - 1)) for i in range(count))
    for stride in range(1, steps):
        kept = range(0, steps, stride)
        if len(kept) == count:
            return tuple(kept)
    raise ValueError(f"no integer stride takes {count} of {steps} steps: {respacing!r}")


def gaussian_kl(
    mean: Float[Tensor, "*shape"],
    log_variance: Float[Tensor, "*#shape"],
    other_mean: Float[Tensor, "*#shape"],
    other_log_variance: Float[Tensor, "*#shape"],
) -> Float[Tensor, "*shape"]:
    """KL(N(mean, variance) || N(other_mean, other_variance)), elementwise, in nats."""
    difference = log_variance - other_log_variance
    distance = (mean - other_mean).square() * torch.exp(-other_log_variance)
    return 0.5 * (torch.expm1(difference) - difference + distance)


def log_mass_of_level(
    x: Float[Tensor, "*shape"],
    mean: Float[Tensor, "*shape"],
    log_variance: Float[Tensor, "*#shape"],
    levels: int,
) -> Float[Tensor, "*shape"]:
    """ln of a Gaussian's mass on the bin of each centred grey level, elementwise (DDPM, eq. 13).

    Bins reach half way to the neighbours, 1 / (levels - 1) to each side, and those of the extreme
    levels to infinity. As published, Phi(z) = sigmoid(2 sqrt(2/pi) (z + 0.044715 z^3)) stands for
    the normal distribution function, and no mass is taken to be less than 1e-12; so the masses of
    all levels sum to 1, but for at most levels * 1e-12 more.

    Args:
        x: grey levels as `core.grey_levels.center` gives them.
        mean: of the Gaussian.
        log_variance: its ln sigma^2.
        levels: number of grey levels.
    """
    half = 1.0 / (levels - 1)
    inverse_std = torch.exp(-0.5 * log_variance)
    upper = _logit((x + half - mean) * inverse_std)
    lower = _logit((x - half - mean) * inverse_std)
    below, above = F.logsigmoid(upper), F.logsigmoid(-lower)
    # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - e^(l - u)): no cancellation in the tails
    distance = (lower - upper).clamp(max=-SMALLEST_MASS)  # 0 when both are too far away
    between = below + above + torch.log(-torch.expm1(distance))
    log_mass = torch.where(x > 1 - half, above, between)
    log_mass = torch.where(x < half - 1, below, log_mass)
    return log_mass.clamp(min=math.log(SMALLEST_MASS))


def _logit(z: Tensor) -> Tensor:
    """ln Phi(z) / (1 - Phi(z)) of the approximate normal distribution function."""
    z = z.clamp(-FARTHEST, FARTHEST)
    return 2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)


@final
@dataclass(frozen=True)
class ReverseKernel:
    """p(x_{t-1} | x_t), a Gaussian with diagonal covariance.

    Attributes:
        mean: of the Gaussian.
        log_variance: its ln sigma^2; broadcasts to `mean`.
        x0: the predicted image, after clipping if there is any.
    """

    mean: Images
    log_variance: Float[Tensor, "batch #channels #height #width"]
    x0: Images


@final
class MarkovChain:
    """A forward chain q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t) and its reverse.

    Coefficients are float64 on the CPU; results have the dtype and device of x.

    Args:
        betas: of each step, in (0, 1), the step nearest to the data first.
        timesteps: the step of the original chain that each step stands for, which the network was
            trained on; None: this is the original chain.
        fixed_variance: of kernels whose network does not learn it: beta_t ("large") or the
            posterior's ("small"); at step 0 both are the posterior's of step 1.

    Raises:
        ValueError: for betas that make no chain.

    Example:
        >>> chain = MarkovChain(schedule_betas("cosine", 100)).respaced("10")
        >>> chain.timesteps.tolist()
        [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    """

    def __init__(
        self,
        betas: Float64[Tensor, " steps"],
        timesteps: Sequence[int] | None = None,
        *,
        fixed_variance: FixedVariance = "large",
    ) -> None:
        if betas.dim() != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"expected at least 2 betas in (0, 1), got {betas}")
        if timesteps is not None and len(timesteps) != len(betas):
            raise ValueError(f"expected {len(betas)} timesteps, got {len(timesteps)}")
        if fixed_variance not in ("large", "small"):
            raise ValueError(f"expected fixed_variance 'large' or 'small', got {fixed_variance!r}")
        self.betas = betas
        kept = range(len(betas)) if timesteps is None else timesteps
        self.timesteps = torch.tensor(kept, device="cpu")
        self.fixed_variance: FixedVariance = fixed_variance
        self.alpha_bar = (1 - betas).cumprod(0)
        self.previous_alpha_bar = torch.cat([betas.new_ones(1), self.alpha_bar[:-1]])
        noise = 1 - self.alpha_bar
        variance = betas * (1 - self.previous_alpha_bar) / noise
        # q(x_0 | x_1, x_0) has variance 0, whose logarithm is replaced by the next step's
        self.posterior_log_variance = torch.cat([variance[1:2], variance[1:]]).log()
        self.largest_log_variance = betas.log()
        self._x0_share = betas * self.previous_alpha_bar.sqrt() / noise
        self._x_t_share = (1 - self.previous_alpha_bar) * (1 - betas).sqrt() / noise

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.betas)

    def respaced(self, respacing: str) -> "MarkovChain":
        """The chain of the steps that `kept_steps` gives, with the same marginals there."""
        kept = list(kept_steps(self.steps, respacing))
        alpha_bar = self.alpha_bar[kept]
        previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        timesteps = self.timesteps[kept].tolist()
        return MarkovChain(1 - alpha_bar / previous, timesteps, fixed_variance=self.fixed_variance)

    def diffuse(self, x0: Images, step: Steps, noise: Images) -> Images:
        """x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise (DDPM, eq. 4)."""
        return (
            _at(self.alpha_bar.sqrt(), step, x0) * x0
            + _at((1 - self.alpha_bar).sqrt(), step, x0) * noise
        )

    def x0_from_eps(self, eps: Images, x_t: Images, step: Steps) -> Images:
        """The image from which noise `eps` leads to x_t."""
        return (
            _at(self.alpha_bar.rsqrt(), step, x_t) * x_t
            - _at((1 / self.alpha_bar - 1).sqrt(), step, x_t) * eps
        )

    def eps_from_x0(self, x0: Images, x_t: Images, step: Steps) -> Images:
        """The noise that leads from x0 to x_t."""
        return (_at(self.alpha_bar.rsqrt(), step, x_t) * x_t - x0) / _at(
            (1 / self.alpha_bar - 1).sqrt(), step, x_t
        )

    def posterior_mean(self, x0: Images, x_t: Images, step: Steps) -> Images:
        """Mean of q(x_{t-1} | x_t, x0) (DDPM, eq. 7)."""
        return _at(self._x0_share, step, x_t) * x0 + _at(self._x_t_share, step, x_t) * x_t

    def log_variance(
        self, v: Images | None, step: Steps, like: Tensor
    ) -> Float[Tensor, "batch #channels #height #width"]:
        """ln sigma^2 of the kernel: between beta and the posterior's (iDDPM, eq. 15), or fixed.

        Args:
            v: -1 gives the posterior's variance, 1 beta's, and it may lie beyond; None: fixed.
            step: index in this chain.
            like: gives dtype and device.
        """
        small = _at(self.posterior_log_variance, step, like)
        if v is not None:
            large, share = _at(self.largest_log_variance, step, like), (v + 1) / 2
            return share * large + (1 - share) * small
        if self.fixed_variance == "small":
            return small
        first = self.posterior_log_variance[:1]
        return _at(torch.cat([first, self.largest_log_variance[1:]]), step, like)

    def kernel(
        self, eps: Images, v: Images | None, x_t: Images, step: Steps, *, clip: bool
    ) -> ReverseKernel:
        """p(x_{t-1} | x_t) of a network's outputs; `clip` confines the predicted x0 to [-1, 1]."""
        x0 = self.x0_from_eps(eps, x_t, step)
        if clip:
            x0 = x0.clamp(-1, 1)
        return ReverseKernel(
            self.posterior_mean(x0, x_t, step), self.log_variance(v, step, x_t), x0
        )

    def reverse_kernel(
        self, network: Network, x_t: Images, step: Steps, label: Labels | None = None, *, clip: bool
    ) -> ReverseKernel:
        """`kernel` of the network's outputs; its timesteps are those of the original chain."""
        eps, v = network(x_t, self.timesteps.to(step.device)[step], label)
        return self.kernel(eps, v, x_t, step, clip=clip)

    def bound_term(
        self, kernel: ReverseKernel, x0: Images, x_t: Images, step: Steps, levels: int
    ) -> PerSample:
        """The term L_t of the variational bound, summed over dimensions, in nats.

        KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) for t > 0, minus the log-mass that the kernel
        gives the grey levels of x0 for t = 0 (DDPM, eq. 5).
        """
        kl = gaussian_kl(
            self.posterior_mean(x0, x_t, step),
            _at(self.posterior_log_variance, step, x_t),
            kernel.mean,
            kernel.log_variance,
        )
        decoder = -log_mass_of_level(x0, kernel.mean, kernel.log_variance, levels)
        return torch.where(step == 0, decoder.flatten(1).sum(1), kl.flatten(1).sum(1))

    def prior_term(self, x0: Images) -> PerSample:
        """KL(q(x_T | x0) || N(0, I)), summed over dimensions, in nats."""
        last = torch.full((len(x0),), self.steps - 1, device=x0.device)
        mean = _at(self.alpha_bar.sqrt(), last, x0) * x0
        zero = torch.zeros_like(mean)
        kl = gaussian_kl(mean, _at((1 - self.alpha_bar).log(), last, x0), zero, zero)
        return kl.flatten(1).sum(1)


def _at(
    coefficients: Float64[Tensor, " steps"], step: Int64[Tensor, " batch"], like: Tensor
) -> Float[Tensor, "batch 1 1 1"]:
    """The coefficient of each image's step, in dtype and device of `like`."""
    return coefficients.to(step.device)[step].to(like)[:, None, None, None]
