"""Pictures of an inversion: how blocks settle under Jacobi iteration, and what a solver did."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from exactflow.pictures.figures import BLUE, GREY, RED, colors_of, in_style, new_figure, png_of
from exactflow.sampling.convergence import BlockConvergence, crm_percent
from exactflow.sampling.inversion import Pass

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 4  # panels side by side in the picture of a solver's passes


@in_style()
def convergence_plot(blocks: Sequence[BlockConvergence]) -> bytes:
    """PNG: both metrics of every block, and how many leading tokens each iteration settles.

    Raises:
        ImportError: without the extra `report`.
    """
    from_one = [*range(1, len(blocks) + 1)]
    figure = new_figure(10, 4)
    panels = figure.subplot_mosaic([["crm", "jacobi"], ["igm", "jacobi"]], width_ratios=[2, 3])
    crm, igm, jacobi = panels["crm"], panels["igm"], panels["jacobi"]
    colors = colors_of(len(blocks))
    share = [math.nan if value is None else value for value in crm_percent(blocks)]
    crm.bar(from_one, share, width=0.6, color=colors)
    crm.set(title="ranking metric", ylabel="% of all blocks")
    for side, color, name in ((-0.17, BLUE, "latent"), (0.17, RED, "zeros")):
        value = [b.igm_latent if name == "latent" else b.igm_zeros for b in blocks]
        height = [v if math.isfinite(v) else 0 for v in value]
        place = [index + side for index in from_one]
        bars = igm.bar(place, height, width=0.3, color=color, label=f"from {name}")
        igm.bar_label(bars, ["" if math.isfinite(v) else "∞" for v in value])
    igm.set(title="initial guessing metric", xlabel="block, in generation order")
    igm.margins(y=0.3)
    igm.legend(ncols=2, loc="upper right")
    for axes in (crm, igm):
        axes.set_xticks(from_one)
    longest = max(block.jacobi.iterations for block in blocks)
    jacobi.plot([0, longest], [1, longest + 1], ":", color=GREY, label="guaranteed")
    for index, (block, color) in enumerate(zip(blocks, colors, strict=True), 1):
        profile = block.jacobi
        jacobi.plot(profile.median, color=color, linewidth=2, label=f"block {index}")
        jacobi.plot(profile.least, color=color, linewidth=0.8)
    jacobi.set(
        title="Jacobi iteration: median (thick) and least frontier (thin)",
        xlabel="iterations",
        ylabel="leading tokens settled",
    )
    jacobi.locator_params(integer=True)
    jacobi.legend()
    return png_of(figure)


@in_style()
def inversion_plot(passes_per_block: Sequence[Sequence[Pass]]) -> bytes:
    """PNG, a panel for every block: the tokens each pass evaluates, and what is settled after it.

    Args:
        passes_per_block: what inverting each block took, in generation order.

    Raises:
        ImportError: without the extra `report`.
    """
    count = len(passes_per_block)
    columns = min(count, COLUMNS)
    rows = math.ceil(count / columns)
    figure = new_figure(max(5.0, 2.9 * columns), 2.4 * rows + 0.4)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for index, axes in enumerate(panels.flat):
        axes.set_visible(index < count)
        if index < count:
            passes = [p for p in passes_per_block[index] if p.stop > 1]  # token 0 alone is free
            tokens = sum(p.stop - max(p.start, 1) for p in passes)
            axes.set_title(f"block {index + 1}: {len(passes):,} passes, {tokens:,} tokens")
            if passes:
                _draw_passes(axes, passes)
    figure.supxlabel("pass")
    figure.supylabel("token")
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3)
    return png_of(figure)


def _draw_passes(axes: "Axes", passes: Sequence[Pass]) -> None:
    """A pass is a band of unit width; the lines run through what stands at its end."""
    start, stop = [p.start for p in passes], [p.stop for p in passes]
    edges = [0.5 + n for n in range(len(passes) + 1)]
    axes.stairs(stop, edges, baseline=start, fill=True, color=BLUE, alpha=0.3, label="evaluated")
    greatest = [p.greatest for p in passes]
    least = [math.nan if p.least is None else p.least for p in passes]
    axes.plot(edges[1:], greatest, color=BLUE, linewidth=1, label="settled, best sample")
    axes.plot(edges[1:], least, color=RED, linewidth=1.2, label="settled, worst sample")
    axes.set_ylim(bottom=0)
    axes.locator_params(integer=True)
