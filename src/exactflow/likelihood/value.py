"""A log-likelihood is a value with its kind."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from jaxtyping import Float
from torch import Tensor

from exactflow.core.grey_levels import bits_per_dim
from exactflow.core.model import Dequantization, LikelihoodKind, NonFiniteError


@final
@dataclass(frozen=True)
class LogLikelihood:
    """Log-likelihood of each image, with its kind.

    Attributes:
        nats: (n,), float64. For "dequantized", ln of a lower bound of the probability of the
            integer image: ln of the mean density over its grey-level cube, estimated by k draws
            (Theis et al., arXiv 1511.01844, eq. 3). For "bound", the same with the mean over what
            an augmented flow draws besides: the ELBO for k = 1, else the IWBO_k (Burda et al.,
            arXiv 1509.00519, eq. 8). For "estimate", the first by a probability flow, whose
            probes' noise enters the mean's exponentials: for k > 1 it errs upwards. For
            "noisy-density", ln p(x + sigma eps), a density with respect to [-1, 1] and not a code
            length.
        kind: see `GenerativeModel.likelihood_kind`.
        dims: C * H * W.
        levels: number of grey levels.
        k: noise draws per image; 1 is the published protocol, more tighten the bound.
        data: fingerprint of the images, where they come from a data set.
        dequantization: law of the noise inside a grey level; "gaussian" is noise across levels, and
            "none" a bound on the probability of the integers themselves.
        details: further facts: of an estimate, see `ode_log_likelihood`; of a chain's bound, its
            steps and evaluations of the network.

    Example:
        >>> import torch
        >>> found = LogLikelihood(torch.tensor([-2000.0, -2100.0]), "dequantized", 768, 256, k=1)
        >>> round(found.bits_per_dim, 3)
        3.851
    """

    nats: Float[Tensor, " n"]
    kind: LikelihoodKind
    dims: int
    levels: int
    k: int
    data: str | None = None
    dequantization: Dequantization = "uniform"
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def off_its_data(self) -> bool:
        """Whether this is an estimate on dequantised images of a model trained on centred ones."""
        return self.details.get("trained_on") == "centred images"

    @property
    def is_code_length(self) -> bool:
        """Whether it is a probability of integer images, which has bits per dimension."""
        return self.kind != "noisy-density"

    @property
    def nats_per_dim(self) -> float:
        """Mean over images of nats / dims; defined for every kind."""
        return float(self.nats.mean()) / self.dims

    @property
    def per_image(self) -> Float[Tensor, " n"]:
        """Bits per dimension of each image. Raises ValueError for a noisy density."""
        if not self.is_code_length:
            raise ValueError(
                "a model trained with Gaussian noise has the density of noisy images, which is "
                "not a code length: it has no bits/dim comparable with any other "
                "(nats_per_dim gives the density itself)"
            )
        return bits_per_dim(self.nats, self.dims)

    @property
    def bits_per_dim(self) -> float:
        """Mean of `per_image`."""
        return float(self.per_image.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of `bits_per_dim` over images; NaN for a single one."""
        return float(self.per_image.std()) / math.sqrt(len(self.nats))


def check_finite(nats: Float[Tensor, " n"], first: int, why: str) -> None:
    """Raise NonFiniteError that names the first image that has no finite likelihood.

    Args:
        nats: of each image.
        first: number of the first of them in the set that they are a part of.
        why: the cause, for the message.
    """
    failed = (~nats.isfinite()).nonzero()[:, 0].tolist()
    if failed:
        raise NonFiniteError(
            f"log-likelihood of image {first + failed[0]} is {float(nats[failed[0]])} "
            f"({len(failed)} of {len(nats)} are not finite): {why}"
        )
