"""Windows of tokens as CUDA graphs: launching kernels takes most of a small pass on a GPU."""

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from exactflow.nn.transformer import NetworkWeights, causal_network

FEWEST_KEYS = 64  # of a graph; there is one for every power of two from here on


@final
class GraphedPasses:
    """The network over windows whose sizes are rounded up to powers of two, so that graphs are few.

    Args:
        network: weights in the dtype of the caches.
        caches: keys and values of each layer, (2, batch, heads, tokens or more, head_dim), finite.
    """

    def __init__(self, network: NetworkWeights, caches: tuple[Tensor, ...]) -> None:
        self._network, self._caches = network, caches
        self._passes: dict[tuple[int, int, int, bool], StaticPass] = {}
        self._condition: Tensor | None = None  # the one copied to `_static`
        self._static: dict[int, Tensor] = {}
        on_cuda = network.output.device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if on_cuda else None

    def __call__(
        self,
        x: Float[Tensor, "batch stop dim"],
        condition: Float[Tensor, "batch_or_1 tokens channels"],
        first: int,
        temperature: Float[Tensor, " batch"] | None,
    ) -> Float[Tensor, "batch window out"]:
        """The network at positions first .. stop - 1; the result is valid until the next call."""
        tokens, window = condition.shape[1], x.shape[1] - first
        size = min(_power_of_two(window), tokens)
        begin = min(first, tokens - size)  # the last window also computes what is known
        keys = min(max(_power_of_two(begin + size), FEWEST_KEYS), self._caches[0].shape[3])
        static = self._static.setdefault(len(condition), torch.empty_like(condition))
        if condition is not self._condition:
            static.copy_(condition)
            self._condition = condition
        key = (size, keys, len(condition), temperature is not None)
        if key not in self._passes:
            build = (self._network, self._caches, static, size, keys, temperature is not None)
            self._passes[key] = StaticPass(*build, self._pool)
        raw = self._passes[key](x[:, begin:], begin, temperature)
        return raw[:, first - begin : first - begin + window]


@final
class StaticPass:
    """One window at a position that is a tensor, over a fixed number of keys.

    On CUDA it is captured as a graph at its first call and replayed from then on.
    """

    def __init__(
        self,
        network: NetworkWeights,
        caches: tuple[Tensor, ...],
        condition: Float[Tensor, "batch_or_1 tokens channels"],
        window: int,
        keys: int,
        tempered: bool,
        pool: Any = None,
    ) -> None:
        batch = caches[0].shape[1]
        like = network.output
        self._network, self._caches = network, caches
        self._tokens = like.new_zeros(batch, window, network.input.shape[1])
        self._condition = condition
        self._first = torch.zeros((), dtype=torch.int64, device=like.device)
        self._offsets = torch.arange(window, device=like.device)
        self._places = torch.arange(keys, device=like.device)
        self._temperature = like.new_ones(batch) if tempered else None
        self._raw = like.new_zeros(batch, window, network.output.shape[0])
        self._pool = pool  # graphs that never run at once share their memory
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(
        self,
        x: Float[Tensor, "batch some dim"],
        first: int,
        temperature: Float[Tensor, " batch"] | None,
    ) -> Float[Tensor, "batch window out"]:
        """Positions first .. first + window - 1; where x ends earlier, the rest is no result."""
        given = x.shape[1]
        self._tokens[:, :given] = x
        self._tokens[:, given:] = 0  # a stale infinity would reach the others as 0 * infinity
        self._first.fill_(first)
        if self._temperature is not None and temperature is not None:
            self._temperature.copy_(temperature)
        if self._tokens.device.type != "cuda":
            self._run()
        elif self._graph is None:
            self._capture()
        else:
            self._graph.replay()
        return self._raw

    def _capture(self) -> None:
        """Run once for the result, then capture, which computes nothing."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._run()
        self._graph = graph

    def _run(self) -> None:
        place = self._first + self._offsets
        seen = self._places <= place[:, None]

        def keep(layer: int, new: Tensor) -> tuple[Tensor, Tensor]:
            cache = self._caches[layer]
            for slot, added in zip(cache.unbind(0), new.unbind(0), strict=True):
                slot.index_copy_(2, place, added)
            return cache[:, :, :, : len(self._places)], seen

        condition = self._condition.index_select(1, place)
        head_dim = self._caches[0].shape[4]
        raw = causal_network(
            self._network, self._tokens, condition, head_dim, self._temperature, keep
        )
        self._raw.copy_(raw.view_as(self._raw))


def _power_of_two(count: int) -> int:
    """The least power of two that is not less than `count`."""
    return 1 << (count - 1).bit_length()
