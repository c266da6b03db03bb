"""Guidance of autoregressive flows: a guided transform is again an autoregressive transform.

Guided samples no longer follow the model's density.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from exactflow.core.conditional import Affine
from exactflow.core.shapes import Labels, PerSample, Tokens
from exactflow.core.transform import AutoregressiveTransform, Decoding


@final
@dataclass(frozen=True)
class Guidance:
    """Guidance of a flow: theta = theta_c + w (theta_c - theta_u), or a product of Gaussians.

    Attributes:
        scale: w; 0 leaves the model as it is.
        rule: "extrapolate" parameters linearly (TarFlow, arXiv 2412.06329, section 3.5, of shifts
            and log-scales), or multiply the Gaussians p_c^(1+w) / p_u^w of affine conditionals,
            "gaussian-score" (STARFlow, arXiv 2506.06276).
        schedule: "linear" uses w t / (N - 1) for token t, "constant" w for all.
        temperature: attention temperature of the unconditional branch; an unconditional model is
            guided by this alone.
    """

    scale: float
    rule: Literal["extrapolate", "gaussian-score"] = "extrapolate"
    schedule: Literal["linear", "constant"] = "linear"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError for unknown rules and schedules and for bad numbers."""
        if self.rule not in ("extrapolate", "gaussian-score"):
            raise ValueError(
                f"expected guidance rule 'extrapolate' or 'gaussian-score', got {self.rule!r}"
            )
        if self.schedule not in ("linear", "constant"):
            raise ValueError(
                f"expected guidance schedule 'linear' or 'constant', got {self.schedule!r}"
            )
        if not 0 <= self.scale < math.inf or not self.temperature > 0:
            raise ValueError(
                "expected a finite guidance scale >= 0 and temperature > 0, "
                f"got {self.scale}, {self.temperature}"
            )


@final
class GuidedCache:
    """The inner transform's cache for both branches, with their tokens, labels, temperatures."""

    def __init__(self, tokens: Float[Tensor, "double tokens dim"], inner: Any) -> None:
        self.tokens = tokens
        self.inner = inner
        self.branches: tuple[Tensor | None, Tensor | None] | None = None


@final
class GuidedTransform(AutoregressiveTransform):
    """Both branches of `transform` in one batch, combined into guided parameters.

    Args:
        transform: the model's transform.
        guidance: rule, scale and schedule.
        null_label: the class of a dropped label; None for an unconditional model.
    """

    def __init__(
        self, transform: AutoregressiveTransform, guidance: Guidance, null_label: int | None
    ) -> None:
        super().__init__()
        if guidance.rule == "gaussian-score" and not isinstance(transform.conditional, Affine):
            raise ValueError(
                "guidance rule 'gaussian-score' multiplies Gaussians: it needs affine "
                f"conditionals, got {transform.conditional}; use 'extrapolate'"
            )
        self.transform = transform
        self.guidance = guidance
        self.null_label = null_label
        self.num_tokens = transform.num_tokens
        self.conditional = transform.conditional
        self.predicts_first = transform.predicts_first

    def new_cache(self, x: Tokens, decoding: Decoding | None = None) -> GuidedCache:
        tokens = torch.zeros_like(x).repeat(2, 1, 1)
        return GuidedCache(tokens, self.transform.new_cache(tokens, decoding))

    def conditioner(
        self,
        x: Float[Tensor, "batch stop dim"],
        label: Labels | None = None,
        cache: GuidedCache | None = None,
        start: int = 0,
        temperature: PerSample | None = None,
    ) -> Float[Tensor, "batch window size"]:
        """See `AutoregressiveTransform.conditioner`; a temperature is the conditional branch's."""
        batch, stop = x.shape[:2]
        if cache is None:
            pair, branches, inner = x.repeat(2, 1, 1), self._branches(x, label, temperature), None
        else:  # only tokens that are evaluated are copied: earlier ones were copied before
            pair, inner = cache.tokens[:, :stop], cache.inner
            first = max(start - 1, 0)
            pair.unflatten(0, (2, batch))[:, :, first:] = x[:, first:]
            branches = cache.branches = cache.branches or self._branches(x, label, temperature)
        both = self.transform.conditioner(pair, branches[0], inner, start, branches[1])
        theta, theta_u = both.chunk(2)
        return self._combine(theta, theta_u, start)

    def _branches(
        self, x: Tensor, label: Tensor | None, temperature: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Labels and temperatures of both branches."""
        if label is not None and self.null_label is not None:
            label = torch.cat([label, torch.full_like(label, self.null_label)])
        if self.guidance.temperature == 1 and temperature is None:
            return label, None
        conditional = x.new_ones(len(x)) if temperature is None else temperature
        other = torch.full_like(conditional, self.guidance.temperature)
        return label, torch.cat([conditional, other])

    def _combine(self, theta: Tensor, theta_u: Tensor, start: int) -> Tensor:
        w: float | Tensor = self.guidance.scale
        if self.guidance.schedule == "linear" and self.num_tokens > 1:
            stop = start + theta.shape[1]
            place = torch.arange(start, stop, device=theta.device, dtype=theta.dtype)
            w = (self.guidance.scale / (self.num_tokens - 1)) * place[:, None]
        if self.guidance.rule == "extrapolate":
            return self.conditional.extrapolate(theta, theta_u, w)
        (log_scale, shift), (log_scale_u, shift_u) = theta.chunk(2, -1), theta_u.chunk(2, -1)
        # s = min(sigma_c / sigma_u, 1)^2 keeps the precision positive for every w
        s = torch.exp(2 * (log_scale - log_scale_u).clamp(max=0))
        precision = 1 + w - w * s  # of the product, in units of the conditional's
        mean = ((1 + w) * shift - w * s * shift_u) / precision
        return torch.cat([log_scale - 0.5 * precision.log(), mean], dim=-1)
