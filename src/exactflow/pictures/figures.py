"""Figures with words: tables of images, curves; and the one style of all figures."""

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from exactflow.pictures import grids as pictures

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BLUE, RED, GREY = "#2f6db3", "#b3402f", "#8a8a8a"
SMALL = 8  # points: numbers at axes and legends; labels and titles have one more

_STYLE: Mapping[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": SMALL + 1,
    "axes.labelsize": SMALL + 1,
    "figure.constrained_layout.use": True,
    "figure.titlesize": SMALL + 2,
    "figure.labelsize": SMALL + 1,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "lines.markersize": 3,
    "savefig.dpi": 130,
    "savefig.format": "png",
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
}


@contextmanager
def in_style() -> Iterator[None]:
    """Draw inside, or in the decorated function, in the style of all figures.

    Raises:
        ImportError: without the extra `report`.
    """
    with _matplotlib().rc_context(_STYLE):
        yield


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of that many inches."""
    return _matplotlib().figure.Figure(figsize=(width, height))


def png_of(figure: "Figure") -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer)
    return buffer.getvalue()


def color_of(index: int) -> Any:
    """The colour of the curve of that number; those of the first ten differ."""
    return _matplotlib().colormaps["tab10"](index % 10)


def colors_of(count: int) -> list[Any]:
    """Dark to light, for what has an order; the palest end of the map is left out."""
    viridis = _matplotlib().colormaps["viridis"]
    return [viridis(0.85 * index / max(1, count - 1)) for index in range(count)]


def _matplotlib() -> ModuleType:
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("pictures need the extra: pip install 'exactflow[report]'") from error
    return matplotlib


def plain_logarithms(axis: "Axis") -> None:
    """Ticks at 1, 2, 5, 10, ... (of a long axis at 1, 10, ...) in plain numbers, on a log axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(_short))
    axis.set_minor_formatter(NullFormatter())


def _short(value: float, _: int | None = None) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e4 else f"{value:g}"


@in_style()
def image_table(
    images: UInt8[Tensor, "n channels height width"],
    levels: int,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
) -> bytes:
    """PNG: images row after row under names of columns, with names of rows to their left.

    Raises:
        ValueError: unless there is an image for every row and column.
        ImportError: without the extra `report`.
    """
    if len(images) != len(rows) * len(columns):
        raise ValueError(
            f"expected {len(rows)} x {len(columns)} images for the names of rows and columns, "
            f"got {len(images)}"
        )
    sheet = pictures.grid(images, levels, len(columns))
    width, height = sheet.size
    cell_width, cell_height = width / len(columns), height / len(rows)
    margin = 7 * max(len(name) for name in rows) + 10  # pixels; letters are about so wide
    lines = textwrap.wrap(title, max(20, (width + margin) // 8))  # letters of a title are wider
    head = (20 if any(columns) else 4) + (10 + 16 * len(lines) if lines else 0)
    figure = new_figure((width + margin) / 100, (height + head) / 100)
    figure.set_layout_engine("none")
    whole = (width + margin, height + head)
    axes = figure.add_axes((margin / whole[0], 0, width / whole[0], height / whole[1]))
    shown = np.asarray(sheet.convert("RGB"))
    axes.imshow(shown, interpolation="nearest", aspect="auto", extent=(0, width, height, 0))
    axes.xaxis.tick_top()
    across = [cell_width * (index + 0.5) for index in range(len(columns))]
    down = [cell_height * (index + 0.5) for index in range(len(rows))]
    axes.set_xticks(across, columns)
    axes.set_yticks(down, rows)
    axes.tick_params(length=0, pad=3)
    axes.spines[:].set_visible(False)
    if lines:
        text = "\n".join(lines)
        figure.text(0.5, 1 - 6 / whole[1], text, ha="center", va="top", fontsize=SMALL + 2)
    return png_of(figure)


@in_style()
def curves(metrics: Sequence[Mapping[str, Any]], lines: Mapping[str, float]) -> bytes:
    """PNG of a run: training loss, and held-out bits/dim with horizontal `lines` to compare.

    Raises:
        ImportError: without the extra `report`.
    """
    figure = new_figure(9, 3.2)
    left, right = figure.subplots(1, 2)
    loss = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    if loss:
        left.plot(*zip(*loss, strict=True), color=BLUE, linewidth=1)
    left.set(xlabel="step", ylabel="nats / dim", title="training loss")
    score = [(m["step"], m["bits_per_dim"]) for m in metrics if "bits_per_dim" in m]
    if score:
        right.plot(*zip(*score, strict=True), color=RED, marker="o")
    for (name, value), style in zip(lines.items(), ("--", ":", "-."), strict=False):
        right.axhline(value, color=GREY, linestyle=style, linewidth=1, label=name)
    right.set(xlabel="step", ylabel="bits / dim", title="held-out images")
    if lines:
        right.legend()
    return png_of(figure)
