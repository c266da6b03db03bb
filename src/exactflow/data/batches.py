"""Many images a batch at a time."""

from collections.abc import Iterator

from exactflow.core.progress import tracked


def batches(count: int, size: int, title: str, progress: bool) -> Iterator[slice]:
    """Rows of each batch of `size`, with progress over batches if there is to be `progress`.

    Raises:
        ValueError: no images, or batches of none.
    """
    if count < 1 or size < 1:
        raise ValueError(f"expected images and batch_size >= 1, got {count} images, {size}")
    starts = range(0, count, size)
    for start in tracked(starts, len(starts), title, shown=progress):
        yield slice(start, start + size)
