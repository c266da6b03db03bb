"""Detect images unlike those a model was trained on, by scores of its density.

A high likelihood does not mean "inside": flows give simple images of other kinds a higher one than
their own test images (Nalisnick et al., arXiv 1810.09136). The other scores try to correct that.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from exactflow.core import grey_levels as grey
from exactflow.core.model import Flow, GenerativeModel, evaluating
from exactflow.data import DataConfig, ImageDataset, load
from exactflow.data.batches import batches
from exactflow.data.store import fingerprint
from exactflow.latent.restoration import exact_flow, log_density_gradient
from exactflow.likelihood.log_likelihood import log_likelihood
from exactflow.pictures import grids as pictures
from exactflow.pictures.figures import BLUE, GREY, RED, in_style, new_figure, png_of

SCORES = {  # name: formula
    "log-likelihood": "-log p, bits/dim",
    "complexity-corrected": "bits/dim minus bits/dim of PNG",
    "typicality": "|bits/dim - mean of training images|",
    "gradient norm": "|d ln p / dx|",
    "PNG alone": "control without a model: -bits/dim of PNG",
}


def outlier_scores(
    model: GenerativeModel,
    images: Integer[Tensor, "n channels height width"],
    typical: float,
    *,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, Float[Tensor, " n"]]:
    """The scores of `SCORES`, without labels; larger scores mean "outside".

    Complexity correction: Serra et al., arXiv 1909.11480, eq. 2, with PNG as the compressor;
    typicality: Nalisnick et al., arXiv 1906.02994, section 3.2, for single images; gradient norm:
    Grathwohl et al., arXiv 1912.03263, section 5.3, at the middle of every grey level.

    Args:
        model: an exact flow with bits/dim, trained on the images that are inside.
        images: grey levels of the model's shape.
        typical: mean bits/dim of training images, scored without labels.
        seed: names the dequantisation noise.
        batch_size: images evaluated together.
        progress: show bars over batches.

    Raises:
        ValueError: no exact flow, one trained with Gaussian noise, or images that no PNG can hold.
    """
    flow = exact_flow(model)
    compressed = compressed_bits_per_dim(images, flow.levels)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    bits = log_likelihood(flow, images, seed=seed, **options).per_image
    return {
        "log-likelihood": bits,
        "complexity-corrected": bits - compressed,
        "typicality": (bits - typical).abs(),
        "gradient norm": _gradient_norms(flow, images, **options),
        "PNG alone": -compressed,
    }


def _gradient_norms(
    flow: Flow, images: Tensor, *, batch_size: int, progress: bool
) -> Float[Tensor, " n"]:
    norms = []
    with evaluating(flow):
        for rows in batches(len(images), batch_size, "gradients", progress):
            x = flow.from_grey_levels(images[rows].to(flow.device))
            _, gradient = log_density_gradient(flow, x)
            norms.append(gradient.flatten(1).double().norm(dim=1).cpu())
    return torch.cat(norms)


def compressed_bits_per_dim(
    images: Integer[Tensor, "n channels height width"], levels: int
) -> Float[Tensor, " n"]:
    """Bits per dimension of each image as a PNG file, its header included.

    Raises:
        ValueError: unless images have one channel or three.
    """
    channels, height, width = images.shape[1:]
    if channels not in (1, 3):
        raise ValueError(f"PNG holds images of 1 or 3 channels, got {channels}")
    sizes = [len(pictures.png(pictures.single(i.to(torch.uint8), levels))) for i in images]
    return torch.tensor(sizes, dtype=torch.float64) * 8 / (channels * height * width)


def auroc(inside: Float[Tensor, " n"], outside: Float[Tensor, " m"]) -> float:
    """Probability that an outside image scores above an inside one; ties count half.

    1 separates the two, 0.5 is chance; below 0.5 inside images score higher.

    >>> auroc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
    0.875

    Raises:
        ValueError: no scores on a side, or one that is NaN.
    """
    _check(inside, outside)
    ordered, values = inside.double().sort().values, outside.double()
    below = torch.searchsorted(ordered, values, side="left")
    up_to = torch.searchsorted(ordered, values, side="right")
    return float((below + up_to).double().mean()) / (2 * len(inside))


def roc(
    inside: Float[Tensor, " n"], outside: Float[Tensor, " m"]
) -> tuple[Float[Tensor, " thresholds"], Float[Tensor, " thresholds"]]:
    """Share of inside (false alarms) and outside images (detections) at or above each threshold.

    Thresholds fall from infinity to the smallest score. Errors as `auroc`.
    """
    _check(inside, outside)
    inside, outside = inside.double(), outside.double()
    thresholds = torch.cat([inside, outside]).unique().flip(0)
    shares = []
    for scores in (inside, outside):
        ordered = scores.sort().values
        above = len(scores) - torch.searchsorted(ordered, thresholds, side="left")
        shares.append(torch.cat([torch.zeros(1), above / len(scores)]).double())
    return shares[0], shares[1]


def foreign_set(
    source: str,
    shape: tuple[int, int, int],
    levels: int,
    limit: int | None = None,
    *,
    border: int = 0,
) -> ImageDataset:
    """Images of another source in a model's shape and grey levels, with an identity of their own.

    The filters of the data pipeline resize them; grey levels are stretched, black to black and
    white to white. All of the source's training split is read, nothing is cut off for testing: the
    model was trained on none of it.

    Args:
        source: as `DataConfig.source`; "digits" gives handwritten digits.
        shape: (channels, height, width), square.
        levels: grey levels of the model.
        limit: at most so many images.
        border: black pixels on every side, for which the images are made smaller.

    Raises:
        DataError: the source is missing or broken.
        ValueError: a shape that is not square, or a border that leaves no pixel.
    """
    channels, height, width = shape
    if height != width:
        raise ValueError(f"expected square images to resize others to, got {height} x {width}")
    if not 0 <= 2 * border < height:
        raise ValueError(f"expected a border of 0 .. {(height - 1) // 2} pixels, got {border}")
    whole = {"test_fraction": 0.0, "validation_fraction": 0.0, "limit": limit}
    config = DataConfig(source, image_size=height - 2 * border, channels=channels, **whole)
    dataset = load(config, "train")
    notes = []
    images = np.array(dataset.images[:])
    if dataset.levels != levels:
        centred = grey.center(torch.as_tensor(images), dataset.levels)
        images = grey.quantize_centered(centred, levels).numpy()
        notes.append(f"{dataset.levels} levels stretched to {levels}")
    if border:
        images = np.pad(images, ((0, 0), (0, 0), (border, border), (border, border)))
        notes.append(f"black border of {border} pixels")
    if not notes:
        return dataset
    images.setflags(write=False)
    note = "; ".join(notes)
    revised = hashlib.sha256(f"{dataset.preprocessing_hash}, {note}".encode()).hexdigest()
    return replace(
        dataset,
        images=images,
        levels=levels,
        preprocessing=f"{dataset.preprocessing}; {note}",
        preprocessing_hash=revised[: len(dataset.preprocessing_hash)],
        fingerprint=fingerprint(images, dataset.labels, levels),
    )


@in_style()
def outlier_plot(
    inside: Mapping[str, Tensor], outside: Mapping[str, Tensor], names: tuple[str, str]
) -> bytes:
    """PNG: a histogram of every score on both sets, and the curves of all.

    Args:
        inside: scores by name, as `outlier_scores` gives them.
        outside: the same of the other set.
        names: of the two sets.

    Raises:
        ImportError: without the extra `report`.
    """
    figure = new_figure(11, 5.8)
    figure.suptitle(
        f"{names[1]} (outside) against {names[0]} (inside): the larger a score, the more outlying"
    )
    sides = (f"inside: {names[0]}", f"outside: {names[1]}")
    panels = figure.subplots(2, 3).flatten()
    *histograms, curves = panels
    colors = (BLUE, RED)
    for axes, name in zip(histograms, inside, strict=True):
        both = torch.cat([inside[name], outside[name]]).double()
        low, high = both.quantile(0.005), both.quantile(0.995)  # an outlier would hide the rest
        edges = torch.linspace(float(low), float(high), 41).tolist()
        for scores, color, label in zip((inside[name], outside[name]), colors, sides, strict=True):
            shown = scores.clamp(float(low), float(high)).tolist()
            axes.hist(shown, edges, density=True, alpha=0.6, color=color, label=label)
        value = auroc(inside[name], outside[name])
        verdict, color = ("", "#222") if value >= 0.5 else (", reversed", colors[1])
        axes.set_title(f"{name}: AUROC {value:.3f}{verdict}", color=color)
        axes.set_xlabel(SCORES[name])
        axes.set_yticks([])
    histograms[0].legend()
    for name in inside:
        curves.plot(*roc(inside[name], outside[name]), linewidth=1.4, label=name)
    curves.plot([0, 1], [0, 1], ":", color=GREY, label="chance")
    curves.set_xlabel(f"{names[0]} taken for outliers")
    curves.set_ylabel(f"{names[1]} found")
    curves.set_title("all thresholds")
    curves.legend(loc="center", frameon=True, framealpha=0.85, edgecolor="none")
    return png_of(figure)


def _check(inside: Tensor, outside: Tensor) -> None:
    if not len(inside) or not len(outside):
        raise ValueError(f"expected scores on both sides, got {len(inside)} and {len(outside)}")
    if bool(inside.isnan().any() | outside.isnan().any()):
        raise ValueError("expected scores that can be ordered, got NaN")
