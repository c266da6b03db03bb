"""Invertible maps with their log-determinants, and the one reference inverse."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from exactflow.core.conditional import Conditional
from exactflow.core.shapes import Labels, Latents, PerSample, Tokens, Values


class Transform(nn.Module, ABC):
    """An invertible map of one sample, applied to a batch."""

    @abstractmethod
    def forward(self, x: Values, label: Labels | None = None) -> tuple[Latents, PerSample]:
        """The image of x and ln |det dz/dx|, summed, in nats, float32 or better."""

    @abstractmethod
    def inverse(self, z: Latents, label: Labels | None = None) -> Values:
        """The x with forward(x, label)[0] == z, up to rounding."""


@final
@dataclass(frozen=True)
class Decoding:
    """How caches evaluate the network, and buffers that one inversion leaves to the next.

    Attributes:
        dtype: of weights, keys and values; None: the network's own.
        step: how one token of every sample is evaluated: "eager", operator by operator;
            "compiled", as one function on a CPU; "graph", as a captured CUDA graph (whole windows
            too).
        memory: buffers and graphs, which caches made with the same dictionary reuse: at most one
            of these caches may be in use at a time.
    """

    dtype: torch.dtype | None = None
    step: Literal["eager", "compiled", "graph"] = "eager"
    memory: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.step not in ("eager", "compiled", "graph"):
            raise ValueError(f"expected step eager | compiled | graph, got {self.step!r}")


class AutoregressiveTransform(Transform):
    """z_t = g(x_t; theta_t(x_<t)) over tokens t = 0 .. num_tokens - 1, in generation order.

    An inverse may use only the conditioner, which gives theta, and the conditional g: the structure
    is triangular (Papamakarios et al., MAF, arXiv 1705.07057, eq. 4).

    Attributes:
        num_tokens: how many tokens there are.
        conditional: g.
        predicts_first: whether the network computes theta_0 too; else it is a constant.
    """

    num_tokens: int
    conditional: Conditional
    predicts_first: bool = False

    @abstractmethod
    def conditioner(
        self,
        x: Float[Tensor, "batch stop dim"],
        label: Labels | None = None,
        cache: Any = None,
        start: int = 0,
        temperature: PerSample | None = None,
    ) -> Float[Tensor, "batch window size"]:
        """theta of the tokens start .. stop - 1.

        Token t's parameters are a function of x[:, :t] alone; x[:, stop - 1] is never read. With a
        cache, the result is valid until its next use.

        Args:
            x: tokens 0 .. stop - 1.
            label: class of each sample; None where there is none.
            cache: made by `new_cache`; holds keys and values of tokens 0 .. start - 2, so that only
                x[:, start - 1 : stop - 1] is evaluated, whose keys and values are added.
            start: first token asked for; without a cache it must be 0.
            temperature: attention temperature of each sample, 1 where None.
        """

    @abstractmethod
    def new_cache(self, x: Tokens, decoding: Decoding | None = None) -> Any:
        """An empty cache for one inversion of a batch of the size, dtype and device of `x`.

        It belongs to one batch, one label and one temperature. Raises ValueError for a decoding
        that this network, device or dtype does not support.
        """

    def forward(self, x: Tokens, label: Labels | None = None) -> tuple[Tokens, PerSample]:
        """All tokens at once: one evaluation of the network."""
        return self.conditional.forward(x, self.conditioner(x, label))

    @torch.no_grad()
    def inverse(
        self, z: Tokens, label: Labels | None = None, decoding: Decoding | None = None
    ) -> Tokens:
        """The reference inverse: token by token, exact by construction; carries no gradient."""
        x = torch.zeros_like(z)
        with torch.inference_mode():  # else autograd takes a third of a small model's time
            cache = self.new_cache(x, decoding)
            for t in range(self.num_tokens):
                theta = self.conditioner(x[:, : t + 1], label, cache, start=t)
                x[:, t : t + 1] = self.conditional.inverse(z[:, t : t + 1], theta)
        return x


@runtime_checkable
class Solver(Protocol):
    """A function that inverts one autoregressive transform."""

    def __call__(
        self, transform: AutoregressiveTransform, z: Tokens, label: Labels | None
    ) -> Tokens:
        """The x with transform(x, label)[0] == z."""
        ...
