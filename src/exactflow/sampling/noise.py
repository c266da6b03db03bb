"""Where samples begin: standard normal noise, of which sample k's is a function of seed + k."""

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor

from exactflow.core.model import GenerativeModel
from exactflow.core.randomness import generator, normal_rows


@final
class Noise:
    """Standard normal noise of a batch, from one stream for every seed.

    Args:
        model: on its device, and in its dtype or float32, is the noise.
        shape: of one sample.
        seeds: of the samples.
        purpose: names the streams.
    """

    def __init__(
        self,
        model: GenerativeModel,
        shape: Sequence[int],
        seeds: Sequence[int],
        purpose: str = "sample",
    ) -> None:
        self.seeds, self._model, self._shape = seeds, model, shape
        self._sources = [generator(seed, purpose) for seed in seeds]

    def __call__(self) -> Float[Tensor, "batch *shape"]:
        """The next noise."""
        rows = normal_rows(self._shape, self._sources)
        return rows.to(self._model.wide_dtype).to(self._model.device)
