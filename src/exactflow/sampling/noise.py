"""Standard normal noise of samples: that of sample k is a function of seed + k."""

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor

from exactflow.core.model import GenerativeModel
from exactflow.core.randomness import generator, normal_rows


@final
class Noise:
    """A source of standard normal noise for a batch, with one stream for every seed.

    Args:
        model: gives the device and the dtype (float32, or the model's if that is wider).
        shape: of one sample.
        seeds: of the samples.
        purpose: part of the streams' names.
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
