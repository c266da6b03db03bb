"""Buffers that training moves, and what several processes would make of them together.

Training runs in one process so far, and combines nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor


class RunningBuffers(ABC):
    """A module, some of whose buffers move with every batch that it is trained on.

    Processes that train one model each see some parts of a batch. They all start from the same
    buffers, and every one has moved its own.
    """

    @abstractmethod
    def combine(
        self, before: Mapping[str, Tensor], after: Sequence[Mapping[str, Tensor]], parts: int
    ) -> None:
        """Set the module's own buffers to what one process, taking all parts, would have made.

        Args:
            before: buffers at the start, by their names in this module.
            after: what each process has made of them; the parts of the first come first.
            parts: batches that each process has taken.
        """


def one_after_another(before: Tensor, after: Sequence[Tensor], kept: float) -> Tensor:
    """The end of v <- kept v + c over the changes c of all processes, each begun at `before`.

    A running average by momentum m keeps (1 - m)^parts of its start; a count keeps all of it.
    """
    value = before
    for end in after:
        value = end + kept * (value - before)
    return value
