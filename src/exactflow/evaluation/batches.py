"""Many images a batch at a time."""

from collections.abc import Iterator

from rich.progress import track


def batches(count: int, size: int, title: str, progress: bool) -> Iterator[slice]:
    """Rows of each batch of `size`, with a bar over batches if there is to be `progress`.

    Raises:
        ValueError: no images, or batches of none.
    """
    if count < 1 or size < 1:
        raise ValueError(f"expected images and batch_size >= 1, got {count} images, {size}")
    for start in track(range(0, count, size), title, transient=True, disable=not progress):
        yield slice(start, start + size)
