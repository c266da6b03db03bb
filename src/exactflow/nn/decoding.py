"""A causal network one window of tokens after another, on memory allocated once."""

from collections.abc import Callable
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from exactflow.nn.compiled import CompiledStep
from exactflow.nn.graphed import GraphedPasses
from exactflow.nn.transformer import LayerWeights, NetworkWeights, causal_network

ALIGNMENT = 8  # positions: attention kernels want masks whose length is a multiple
MANY_SAMPLES = 8  # from here on, a CPU multiplies faster by matrices stored by columns
FAST_STEPS = {"compiled": CompiledStep, "graph": GraphedPasses}


@final
class DecodingCache:
    """Keys and values, weights and buffers of one decoding of one batch.

    Args:
        network: its tensors, taken as they are now; they get no gradient.
        head_dim: width of one attention head.
        batch: number of samples.
        tokens: number of positions.
        dtype: of weights, keys and values; None: the network's, or autocast's.
        step: see `exactflow.core.transform.Decoding`.
        memory: buffers and prepared weights of earlier caches, which this one reuses.

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
        autocast = dtype is None and torch.is_autocast_enabled(device.type)
        if autocast and step != "eager":
            raise ValueError(f"expected step 'eager' under autocast, got {step!r}")
        self._head_dim, self._tokens = head_dim, tokens
        self._condition: Tensor | None = None
        self._inputs: Tensor | None = None
        self._dtype = dtype or network.output.dtype
        inside = torch.get_autocast_dtype(device.type) if autocast else self._dtype
        heads = network.output.shape[1] // head_dim
        length = tokens + -tokens % ALIGNMENT
        shape = (len(network.layers), 2, batch, heads, length, head_dim)
        # Only one of the caches that share `memory` is in use at a time: one buffer serves all
        # blocks, since allocating takes long.
        place = ("keys and values", shape, inside, device)
        if place not in memory:
            memory[place] = torch.empty(shape, dtype=inside, device=device)
        if step == "graph":  # its passes also read what is not yet written, and mask it
            memory[place].zero_()
        self._caches: tuple[Tensor, ...] = memory[place].unbind(0)
        key = ("network", _identity(network), self._dtype, step, place)
        if key not in memory:
            weights = _prepared(network, batch, self._dtype)
            made = FAST_STEPS[step](weights, self._caches) if step in FAST_STEPS else None
            memory[key] = (weights, made)
        self._network: NetworkWeights = memory[key][0]
        self._one: CompiledStep | GraphedPasses | None = memory[key][1]

    def condition(self, make: Callable[[], Tensor]) -> None:
        """Make what is added to the embedding, (batch or 1, tokens, channels), at the first call.

        It is a function of the label alone.
        """
        if self._condition is None:
            self._condition = make().detach()[:, : self._tokens].to(self._dtype)

    @torch.no_grad()
    def behind(
        self, token: Float[Tensor, " dim"], x: Float[Tensor, "batch stop dim"], start: int
    ) -> Float[Tensor, "batch stop dim"]:
        """The inputs token, x_0 .. x_(stop - 2); those before x_(start - 1) are kept."""
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

        Inputs before `first` are only counted, except with step "graph". The result is valid until
        the next call.
        """
        assert self._condition is not None
        window = x.shape[1] - first
        if isinstance(self._one, GraphedPasses):
            return self._one(x, self._condition, first, temperature)
        if window == 1:
            read, condition = x[:, first], self._condition[:, first]
            if self._one is not None:
                return self._one(read, condition, first, temperature)[:, None]
        else:
            read, condition = x[:, first:], self._condition[:, first : first + window]
        seen = None
        if window > 1 and first > 0:  # is_causal aligns top-left: wrong behind a prefix
            seen = x.new_ones(window, x.shape[1], dtype=torch.bool).tril(first)

        def keep(layer: int, new: Tensor) -> tuple[Tensor, Tensor | None]:
            cache = self._caches[layer]
            cache.narrow(3, first, window).copy_(new)
            return cache.narrow(3, 0, first + window), seen

        raw = causal_network(self._network, read, condition, self._head_dim, temperature, keep)
        return raw.view(len(x), window, -1)


def _identity(network: NetworkWeights) -> tuple[tuple[int, int], ...]:
    """A key that changes when weights do, by an optimizer's step or with another network."""
    every = (network.input, network.output, *(t for layer in network.layers for t in layer))
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in every)


def _prepared(network: NetworkWeights, batch: int, dtype: torch.dtype) -> NetworkWeights:
    """The weights without gradients, in the dtype and layout that suit products of a few rows."""
    by_columns = network.output.device.type == "cpu" and batch >= MANY_SAMPLES

    def prepare(t: Tensor) -> Tensor:
        t = t.detach().to(dtype)
        return t.t().contiguous().t() if by_columns and t.dim() == 2 else t

    layers = tuple(LayerWeights(*map(prepare, layer)) for layer in network.layers)
    tensors = {k: t for k, t in network._asdict().items() if isinstance(t, Tensor)}
    ends = {name: t.detach().to(dtype) for name, t in tensors.items()}
    return network._replace(layers=layers, **ends)
