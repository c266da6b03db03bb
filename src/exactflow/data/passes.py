"""Repeated passes over the images of a set, for fits in closed form."""

from collections.abc import Iterator
from typing import final

from torch import Tensor

from exactflow.core.progress import tracked
from exactflow.data.datasets import ImageDataset
from exactflow.data.loader import evaluation_batches


@final
class ImagePasses:
    """Images, uint8 (B, C, H, W), batch by batch; every iteration is one pass over all of them.

    Args:
        dataset: the images.
        batch_size: images at a time.
        flip: also yield every batch mirrored.
        progress: show a bar for every pass.

    Attributes:
        images: number of images read so far, in all passes.
    """

    def __init__(
        self, dataset: ImageDataset, batch_size: int, flip: bool = False, progress: bool = False
    ) -> None:
        self._dataset, self._batch_size, self._flip = dataset, batch_size, flip
        self._progress = progress
        self.images = 0

    def __iter__(self) -> Iterator[Tensor]:
        count = -(-len(self._dataset) // self._batch_size)
        batches = evaluation_batches(self._dataset, self._batch_size)
        for batch in tracked(batches, count, "reading", shown=self._progress):
            for images in [batch.images, batch.images.flip(-1)][: 2 if self._flip else 1]:
                self.images += len(images)
                yield images
