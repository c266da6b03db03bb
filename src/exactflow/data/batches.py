"""Work on many images, one batch at a time."""

from collections.abc import Iterator

from exactflow.core.progress import tracked


def batches(count: int, size: int, title: str, progress: bool) -> Iterator[slice]:
    """Row slices of batches of `size`; `progress` shows the progress on stderr.

    Raises a ValueError if `count` or `size` is below 1.
    """
    if count < 1 or size < 1:
        raise ValueError(f"expected images and batch_size >= 1, got {count} images, {size}")
    starts = range(0, count, size)
    for start in tracked(starts, len(starts), title, shown=progress):
        yield slice(start, start + size)
