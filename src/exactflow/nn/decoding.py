"""A causal network one window of tokens after another, on memory allocated once."""

from collections.abc import Callable
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from exactflow.nn.causal import NORM_EPS, LayerWeights, NetworkWeights, gelu, transformer_layer
from exactflow.nn.graphed import GraphedPasses

ALIGNMENT = 8  # positions: attention kernels want masks of such lengths
MANY_SAMPLES = 8  # from here on, a CPU multiplies faster by matrices stored by columns
# tokens (batch, dim), condition (batch or 1, channels), position, temperature -> raw (batch, out)
Step = Callable[[Tensor, Tensor, int, Tensor | None], Tensor]


@final
class DecodingCache:
    """What one decoding of one batch keeps: keys and values, weights, and buffers.

    Args:
        network: its tensors, taken as they are now; they get no gradient.
        head_dim: width of one attention head.
        batch: number of samples.
        tokens: number of positions.
        dtype: of weights, keys and values; None: the network's, or autocast's.
        step: see `exactflow.core.transform.Decoding`.
        memory: what earlier caches left for later ones.

    Raises:
        ValueError: a step that this device or dtype does not have.
    """

    def __init__(
        self,
        network: NetworkWeights,
        head_dim: int,
        batch: int,
        tokens: int,
        dtype: torch.dtype | None = None,
        step: Literal["eager", "compiled", "graph"] = "eager",
        memory: dict[Any, Any] | None = None,
    ) -> None:
        memory = {} if memory is None else memory
        device = network.output.device
        # autocast does not reach into operators that write to a given buffer
        self._autocast = dtype is None and torch.is_autocast_enabled(device.type)
        if self._autocast and step != "eager":
            raise ValueError(f"expected step 'eager' under autocast, got {step!r}")
        self._batch, self._head_dim, self._tokens = batch, head_dim, tokens
        self._condition: Tensor | None = None
        self._inputs: Tensor | None = None
        self._dtype = dtype or network.output.dtype
        inside = torch.get_autocast_dtype(device.type) if self._autocast else self._dtype
        heads = network.output.shape[1] // head_dim
        length = tokens + -tokens % ALIGNMENT
        shape = (len(network.layers), 2, batch, heads, length, head_dim)
        # Of all caches that share the memory one is in use at a time, so that one buffer serves
        # all blocks: fresh memory is dear.
        place = ("keys and values", shape, inside, device)
        if place not in memory:
            memory[place] = torch.empty(shape, dtype=inside, device=device)
        if step == "graph":  # static passes read, and mask, what is not yet written
            memory[place].zero_()
        self._caches: tuple[Tensor, ...] = memory[place].unbind(0)
        key = ("network", _identity(network), self._dtype, step, place)
        if key not in memory:
            weights = _prepared(network, batch, self._dtype)
            memory[key] = (weights, self._step(step, weights))
        self._network: NetworkWeights = memory[key][0]
        self._one: Step | GraphedPasses | None = memory[key][1]

    def _step(self, step: str, network: NetworkWeights) -> Step | GraphedPasses | None:
        if step == "graph":
            return GraphedPasses(network, self._caches)
        if step == "compiled":
            from exactflow.nn.compiled import CompiledStep

            return CompiledStep(network, self._caches)
        return None if self._autocast else TokenStep(network, self._caches)

    def condition(self, make: Callable[[], Tensor]) -> None:
        """Take what is added to the embedding, (batch or 1, tokens, channels), at first use.

        It is a function of the label alone.
        """
        if self._condition is None:
            self._condition = make().detach()[:, : self._tokens].to(self._dtype)

    @torch.no_grad()
    def behind(
        self, token: Float[Tensor, " dim"], x: Float[Tensor, "batch stop dim"], start: int
    ) -> Float[Tensor, "batch stop dim"]:
        """The inputs token, x_0 .. x_(stop - 2); those before x_(start - 1) are there already."""
        if self._inputs is None:
            self._inputs = x.new_empty(len(x), self._tokens, x.shape[2])
            self._inputs[:, 0] = token
        first = max(start, 1)
        self._inputs[:, first : x.shape[1]] = x[:, first - 1 : -1]
        return self._inputs[:, : x.shape[1]]

    @torch.no_grad()
    def __call__(
        self,
        x: Float[Tensor, "batch stop dim"],
        first: int,
        temperature: Float[Tensor, " batch"] | None,
    ) -> Float[Tensor, "batch window out"]:
        """The network at positions first .. stop - 1, of the inputs x from position 0 on.

        Of those before `first` nothing but their number is used, except with step "graph". The
        result is valid until the next call.
        """
        assert self._condition is not None
        window = x.shape[1] - first
        if isinstance(self._one, GraphedPasses):
            return self._one(x, self._condition, first, temperature)
        if window == 1 and self._one is not None:
            here = self._condition[:, first]
            return self._one(x[:, first], here, first, temperature)[:, None]
        read = x[:, first:].to(self._dtype)
        net = self._network
        h = F.linear(read, net.input, net.input_bias)
        h = (h + self._condition[:, first : first + window]).flatten(0, 1)
        for w, cache in zip(net.layers, self._caches, strict=True):
            h = transformer_layer(h, w, self._batch, self._head_dim, cache, first, temperature)
        if net.norm is not None:
            h = F.rms_norm(h, net.norm.shape, net.norm)
        return F.linear(h, net.output, net.output_bias).view(self._batch, window, -1)


@final
class TokenStep:
    """One token of every sample through the network, in as few operators as it takes.

    Buffers are allocated and views of them made once: half of a small model's step is neither
    arithmetic nor reading weights.
    """

    def __init__(self, network: NetworkWeights, caches: tuple[Tensor, ...]) -> None:
        _, batch, heads, _, head_dim = caches[0].shape
        channels = heads * head_dim
        like = network.output
        self._h, self._change = like.new_empty(2, batch, channels).unbind(0)
        self._qkv = like.new_empty(batch, 3 * channels)
        parts = self._qkv.view(batch, 1, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        self._query, self._key_value = parts[0], parts[1:]
        self._wide = like.new_empty(batch, 4 * channels)
        self._raw = like.new_empty(batch, network.output.shape[0])
        self._input, self._input_bias = network.input.t(), network.input_bias
        self._norm = network.norm
        self._output, self._output_bias = network.output.t(), network.output_bias
        layers = zip(network.layers, caches, strict=True)
        self._layers = [(_transposed(w), cache, *cache.unbind(0)) for w, cache in layers]

    def __call__(
        self,
        tokens: Float[Tensor, "batch dim"],
        condition: Float[Tensor, "batch_or_1 channels"],
        position: int,
        temperature: Float[Tensor, " batch"] | None,
    ) -> Float[Tensor, "batch out"]:
        """All layers at one position; the result is valid until the next call."""
        h, change, size = self._h, self._change, self._h.shape[1:]
        torch.addmm(self._input_bias, tokens.to(h.dtype), self._input, out=h)
        h.add_(condition)
        for w, cache, keys, values in self._layers:
            y = torch.layer_norm(h, size, w.attention_scale, w.attention_offset, NORM_EPS)
            torch.addmm(w.qkv_bias, y, w.qkv, out=self._qkv)
            cache.narrow(3, position, 1).copy_(self._key_value)
            query = self._query
            if temperature is not None:
                query = query / temperature.to(query.dtype).view(-1, 1, 1, 1)
            seen = position + 1
            y = F.scaled_dot_product_attention(
                query, keys.narrow(2, 0, seen), values.narrow(2, 0, seen)
            )
            h.add_(torch.addmm(w.proj_bias, y.view(h.shape), w.proj, out=change))
            y = torch.layer_norm(h, size, w.mlp_scale, w.mlp_offset, NORM_EPS)
            torch.addmm(w.expand_bias, y, w.expand, out=self._wide)
            h.add_(torch.addmm(w.contract_bias, gelu(self._wide), w.contract, out=change))
        if self._norm is not None:
            h = F.rms_norm(h, size, self._norm)
        return torch.addmm(self._output_bias, h, self._output, out=self._raw)


def _identity(network: NetworkWeights) -> tuple[tuple[int, int], ...]:
    """What changes when a weight does: an optimizer's step, another network."""
    every = (network.input, network.output, *(t for layer in network.layers for t in layer))
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in every)


def _prepared(network: NetworkWeights, batch: int, dtype: torch.dtype) -> NetworkWeights:
    """The weights without gradients, in the dtype and layout that suit products of a few rows."""
    by_columns = network.output.device.type == "cpu" and batch >= MANY_SAMPLES

    def prepare(t: Tensor) -> Tensor:
        t = t.detach().to(dtype)
        return t.t().contiguous().t() if by_columns and t.dim() == 2 else t

    return NetworkWeights(
        network.input.detach().to(dtype),
        network.input_bias.detach().to(dtype),
        tuple(LayerWeights(*map(prepare, layer)) for layer in network.layers),
        None if network.norm is None else network.norm.detach().to(dtype),
        network.output.detach().to(dtype),
        network.output_bias.detach().to(dtype),
    )


def _transposed(w: LayerWeights) -> LayerWeights:
    """The matrices as `addmm` takes them."""
    return LayerWeights(*(t.t() if t.dim() == 2 else t for t in w))
