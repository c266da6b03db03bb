"""A causal pre-norm transformer."""

from typing import final

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.nn.attention import CausalSelfAttention


@final
class FeedForward(nn.Module):
    """Pre-norm perceptron of four times the width, GELU in its exact (erf) form."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 4 * channels)
        self.contract = nn.Linear(4 * channels, channels)

    def forward(self, h: Float[Tensor, "... channels"]) -> Float[Tensor, "... channels"]:
        """The perceptron's output, without the residual."""
        return self.contract(F.gelu(self.expand(self.norm(h))))


@final
class TransformerLayer(nn.Module):
    """h <- h + Attention(h); h <- h + FeedForward(h)."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.attention = CausalSelfAttention(channels, head_dim)
        self.feed_forward = FeedForward(channels)

    def forward(
        self,
        h: Float[Tensor, "batch window channels"],
        cache: Float[Tensor, "2 batch heads tokens head_dim"] | None = None,
        start: int = 0,
        temperature: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch window channels"]:
        """One layer; arguments as in `CausalSelfAttention`."""
        h = h + self.attention(h, cache, start, temperature)
        return h + self.feed_forward(h)
