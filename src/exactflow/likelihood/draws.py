"""Noise for scoring images: that of image i is a function of (seed, i), in any batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, final

from jaxtyping import Int, Integer
from torch import Tensor

from exactflow.core import grey_levels as grey
from exactflow.core.model import GenerativeModel, evaluating
from exactflow.core.progress import tracked
from exactflow.core.randomness import generator, normal_rows, uniform_rows
from exactflow.core.shapes import Values
from exactflow.parallel.process_group import current

T = TypeVar("T")


@final
@dataclass(frozen=True)
class Draws:
    """Seed and number of noise draws, and the batch size.

    Attributes:
        k: noise draws per image.
        seed: of the noise.
        first: number of the first image, if the images are a part of a set.
        batch_size: images scored together.
        progress: show a bar.
    """

    k: int = 1
    seed: int = 0
    first: int = 0
    batch_size: int = 64
    progress: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for no draw or no batch."""
        if self.k < 1 or self.batch_size < 1:
            raise ValueError(
                f"expected k >= 1 and batch_size >= 1, got {self.k}, {self.batch_size}"
            )

    def noise(
        self,
        model: GenerativeModel,
        shape: Sequence[int],
        numbers: range,
        draw: int,
        *,
        uniform: bool,
    ) -> Values:
        """The noise of one draw for images of these numbers, on the model's device."""
        sources = [generator(self.seed, "score", number, draw) for number in numbers]
        rows = uniform_rows if uniform else normal_rows
        dtype = model.wide_dtype
        return rows(shape, sources).to(dtype).to(model.device)

    def by_batch(
        self,
        model: GenerativeModel,
        images: Integer[Tensor, "n channels height width"],
        label: Int[Tensor, " n"] | None,
        score: Callable[[Tensor, Tensor | None, range], T],
    ) -> list[T]:
        """`score(images, label, numbers)` of every batch, on the model's device.

        Processes that work together share the batches; the model is in evaluation mode.

        Raises:
            ValueError: for images of another shape or range than the model's, or wrong labels.
        """
        grey.check_images(images, model.event_shape, model.levels)
        model.check_label(None if label is None else label.cpu(), len(images))

        def batch(start: int) -> T:
            chosen = slice(start, start + self.batch_size)
            some = images[chosen].to(model.device)
            chunk = None if label is None else label[chosen].to(model.device)
            begin = self.first + start
            return score(some, chunk, range(begin, begin + len(some)))

        starts = range(0, len(images), self.batch_size)
        with evaluating(model):
            shown = partial(tracked, total=len(starts), title="scoring", shown=self.progress)
            return current().spread(starts, batch, shown=shown)


ONE_DRAW = Draws()
