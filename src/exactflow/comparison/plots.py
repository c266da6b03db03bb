"""Pictures of a comparison."""

from collections.abc import Mapping, Sequence
from typing import Any

from exactflow.comparison.comparison import Result
from exactflow.pictures.figures import (
    GREY,
    color_of,
    in_style,
    new_figure,
    plain_logarithms,
    png_of,
)


@in_style()
def likelihoods(results: Sequence[Result], kinds: Mapping[str, str]) -> bytes:
    """PNG: bits/dim against training seconds (above) and images (below), a column for each kind.

    Args:
        results: with curves of `{step_seconds, images, bits_per_dim}`.
        kinds: kind -> title of its panels.

    Raises:
        ImportError: without the extra `report`.
    """
    shown = [result for result in results if result["curve"]]
    present = [k for k in kinds if any(result["likelihood"]["kind"] == k for result in shown)]
    figure = new_figure(1.0 + 3.6 * len(present), 6.0)
    panels = figure.subplots(2, len(present), squeeze=False)
    for column, kind in enumerate(present):
        for row, along in enumerate(("step_seconds", "images")):
            axes = panels[row, column]
            for index, result in enumerate(results):
                curve = result["curve"]
                if not curve or result["likelihood"]["kind"] != kind:
                    continue
                x, y = ([point[name] for point in curve] for name in (along, "bits_per_dim"))
                style: dict[str, Any] = {"color": color_of(index), "label": result["name"]}
                if len(curve) == 1:
                    axes.axhline(y[0], linestyle="--", linewidth=1, **style)
                else:
                    axes.plot(x, y, marker="o", **style)
            axes.set_xscale("log")
            plain_logarithms(axes.xaxis)
            axes.set_xlabel("training seconds" if row == 0 else "images seen")
            axes.set_ylabel("bits / dim")
            axes.set_title(kinds[kind])
            axes.grid(alpha=0.2)
        panels[0, column].legend()
    return png_of(figure)


@in_style()
def qualities(results: Sequence[Result], floor: Result, distance: str) -> bytes:
    """PNG: distance of samples from held-out images against passes and seconds of a sample.

    Raises:
        ImportError: without the extra `report`.
    """
    figure = new_figure(9, 3.6)
    panels = figure.subplots(1, 2)
    for axes, along in zip(panels, ("evaluations", "seconds_per_sample"), strict=True):
        for index, result in enumerate(results):
            points = [result["samples"], *result["other_steps"]]
            points = sorted((p for p in points if "curve_frechet" in p), key=lambda p: p[along])
            x, y = ([point[name] for point in points] for name in (along, "curve_frechet"))
            axes.plot(x, y, marker="o", color=color_of(index), label=result["name"])
        axes.axhline(floor["curve_frechet"], color=GREY, linewidth=1, label="training images")
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_logarithms(axes.xaxis)
        plain_logarithms(axes.yaxis)
        axes.set_xlabel("network passes" if along == "evaluations" else "seconds per sample")
        axes.set_ylabel(distance)
        axes.grid(alpha=0.2)
    panels[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return png_of(figure)
