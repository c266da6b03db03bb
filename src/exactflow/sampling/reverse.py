"""One step back along a diffusion chain: ancestral or DDIM, guided by a classifier or not."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from exactflow.paths.chain import MarkovChain, Network

Classifier = Callable[[Tensor, Tensor], Tensor]  # (x_t, original timestep) -> logits of classes


@final
@dataclass(frozen=True)
class ClassifierGuidance:
    """Guidance by a classifier of noisy images (Dhariwal and Nichol, arXiv 2105.05233, section 4).

    Attributes:
        classifier: (x_t, original timestep of each image) -> logits.
        scale: s; 0 leaves the model as it is.
    """

    classifier: Classifier
    scale: float

    def __post_init__(self) -> None:
        """Raise ValueError for a negative scale."""
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"expected a finite guidance scale >= 0, got {self.scale}")

    def gradient(
        self,
        x_t: Float[Tensor, "batch channels height width"],
        timestep: Int[Tensor, " batch"],
        label: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        """s times the gradient of ln p(label | x_t) by x_t."""
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            log_p = self.classifier(x, timestep).log_softmax(dim=1)
            (gradient,) = torch.autograd.grad(log_p.gather(1, label[:, None]).sum(), x)
        return self.scale * gradient


def classifier_free(conditional: Network, unconditional: Network, scale: float) -> Network:
    """The network eps_c + scale (eps_c - eps_u) (Ho and Salimans, arXiv 2207.12598, eq. 6).

    Args:
        conditional: is given the label; its variance is kept.
        unconditional: is given None, a dropped label; may be the same network.
        scale: w; 0 leaves the conditional network as it is.
    """
    if not 0 <= scale < math.inf:
        raise ValueError(f"expected a finite guidance scale >= 0, got {scale}")
    if scale == 0:
        return conditional

    def guided(x_t: Tensor, timestep: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor | None]:
        eps, v = conditional(x_t, timestep, label)
        other, _ = unconditional(x_t, timestep, None)
        return eps + scale * (eps - other), v

    return guided


class ReverseRule(ABC):
    """How x_{t-1} is made from x_t."""

    @property
    @abstractmethod
    def stochastic(self) -> bool:
        """Whether steps take noise."""

    @abstractmethod
    def advance(
        self,
        chain: MarkovChain,
        network: Network,
        x_t: Float[Tensor, "batch channels height width"],
        step: int,
        label: Int[Tensor, " batch"] | None,
        noise: Float[Tensor, "batch channels height width"] | None,
        guidance: ClassifierGuidance | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """x_{t-1}.

        Args:
            chain: perhaps respaced.
            network: see `chain.Network`.
            x_t: where the samples are.
            step: index in `chain`, the same for all; the result of step 0 is the image.
            label: class of each sample.
            noise: standard normal; None at step 0 and for a rule that is not stochastic.
            guidance: towards the label; None: none.
        """


@final
@dataclass(frozen=True)
class Ancestral(ReverseRule):
    """x_{t-1} drawn from the reverse kernel (Ho et al., arXiv 2006.11239, algorithm 2).

    Guidance shifts the mean by the variance times its gradient (arXiv 2105.05233, algorithm 1).

    Attributes:
        clip: confine each predicted image to [-1, 1], as the published samplers do.
    """

    clip: bool = True

    @property
    def stochastic(self) -> bool:
        return True

    def advance(
        self,
        chain: MarkovChain,
        network: Network,
        x_t: Float[Tensor, "batch channels height width"],
        step: int,
        label: Int[Tensor, " batch"] | None,
        noise: Float[Tensor, "batch channels height width"] | None,
        guidance: ClassifierGuidance | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """See `ReverseRule.advance`."""
        steps = torch.full((len(x_t),), step, device=x_t.device)
        kernel = chain.reverse_kernel(network, x_t, steps, label, clip=self.clip)
        x = kernel.mean
        if guidance is not None:
            x = x + kernel.log_variance.exp() * _gradient(guidance, chain, x_t, steps, label)
        return x if noise is None else x + torch.exp(0.5 * kernel.log_variance) * noise


@final
@dataclass(frozen=True)
class DDIM(ReverseRule):
    """Song et al., Denoising Diffusion Implicit Models, arXiv 2010.02502, eq. 12 and 16.

    Guidance shifts the noise against its gradient (arXiv 2105.05233, algorithm 2); the image that
    follows from it is not clipped again.

    Attributes:
        eta: 0 is deterministic; 1, over all steps, ancestral sampling with the posterior's
            variance.
        clip: confine each predicted image to [-1, 1] and take the noise to be what then leads to
            x_t, as the published samplers do.
    """

    eta: float = 0.0
    clip: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError unless eta lies in [0, 1]."""
        if not 0 <= self.eta <= 1:
            raise ValueError(f"expected eta in [0, 1], got {self.eta}")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def advance(
        self,
        chain: MarkovChain,
        network: Network,
        x_t: Float[Tensor, "batch channels height width"],
        step: int,
        label: Int[Tensor, " batch"] | None,
        noise: Float[Tensor, "batch channels height width"] | None,
        guidance: ClassifierGuidance | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """See `ReverseRule.advance`."""
        steps = torch.full((len(x_t),), step, device=x_t.device)
        x0 = chain.reverse_kernel(network, x_t, steps, label, clip=self.clip).x0
        eps = chain.eps_from_x0(x0, x_t, steps)
        here, before = float(chain.alpha_bar[step]), float(chain.previous_alpha_bar[step])
        if guidance is not None:
            shift = _gradient(guidance, chain, x_t, steps, label)
            eps = eps - math.sqrt(1 - here) * shift
            x0 = chain.x0_from_eps(eps, x_t, steps)
        sigma = self.eta * math.sqrt((1 - before) / (1 - here) * (1 - here / before))
        x = math.sqrt(before) * x0 + math.sqrt(1 - before - sigma**2) * eps
        return x if noise is None else x + sigma * noise


def _gradient(
    guidance: ClassifierGuidance,
    chain: MarkovChain,
    x_t: Tensor,
    steps: Tensor,
    label: Tensor | None,
) -> Tensor:
    if label is None:
        raise ValueError("classifier guidance needs labels to guide to, got none")
    return guidance.gradient(x_t, chain.timesteps.to(steps.device)[steps], label)
