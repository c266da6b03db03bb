"""All measures of samples in a space of features, against a training set and a held-out set."""

from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import UInt8
from torch import Tensor

from exactflow.data.datasets import ImageDataset
from exactflow.metrics.extractors import FeatureExtractor, extract
from exactflow.metrics.frechet import FeatureStatistics, frechet_distance
from exactflow.metrics.memo import Arrays, Memo
from exactflow.metrics.sample_quality import (
    Neighbours,
    density_coverage,
    kernel_distance,
    memorisation,
    nearest_neighbours,
    precision_recall,
    squared_radii,
)

SHOWN = 12  # samples of each model in pictures
PART_BYTES = 64_000_000  # of features in a file


@final
class SampleQuality:
    """Measures samples; the features of the real images are computed once and kept.

    Args:
        training: images that are searched for the nearest neighbours of samples.
        held_out: images that samples are compared with.
        extractor: of the features that distances are taken in.
        folder: for features.
        seed: of subsets.
        progress: show bars.
    """

    def __init__(
        self,
        training: ImageDataset,
        held_out: ImageDataset,
        extractor: FeatureExtractor,
        folder: Path,
        seed: int,
        progress: bool,
    ) -> None:
        self.training, self.held_out, self.extractor = training, held_out, extractor
        self._folder, self._seed, self._progress = folder, seed, progress

    def __call__(self, images: UInt8[Tensor, "n channels height width"]) -> dict[str, Any]:
        """Distances of images from the held-out ones, and from the nearest training image."""
        found = extract(self.extractor, images, self.held_out.levels)
        kid = kernel_distance(self._real, found, seed=self._seed)
        near = precision_recall(self._real, found, 3, real_radii=self._radii[0])
        dense = density_coverage(self._real, found, 5, real_radii=self._radii[1])
        memory = memorisation(found, self._trained, self._usual)
        statistics = FeatureStatistics.of(found, self.extractor.name)
        return {
            "frechet": frechet_distance(statistics, self._statistics),
            "kernel": kid.mean,
            "kernel_error": kid.std,
            "precision": near.precision,
            "recall": near.recall,
            "density": dense.density,
            "coverage": dense.coverage,
            "memorised": memory.fraction,
            "nearest": memory.samples.indices[:SHOWN, 0].tolist(),
        }

    @cached_property
    def _real(self) -> Tensor:
        return self._features(self.held_out, "held-out")

    @cached_property
    def _trained(self) -> Tensor:
        return self._features(self.training, "training")

    @cached_property
    def _statistics(self) -> FeatureStatistics:
        return FeatureStatistics.of(self._real, self.extractor.name)

    @cached_property
    def _radii(self) -> tuple[Tensor, Tensor]:
        """Squared radii of balls around held-out images, for precision and for density."""
        return squared_radii(self._real, 3), squared_radii(self._real, 5)

    @cached_property
    def _usual(self) -> Neighbours:
        """The training image nearest to each held-out one."""
        return nearest_neighbours(self._real, self._trained)

    def _features(self, dataset: ImageDataset, name: str) -> Tensor:
        """Features of real images, kept: (n, dims)."""
        identity = {"images": dataset.fingerprint, "extractor": self.extractor.name}
        memo = Memo(self._folder / name, identity, self._progress)

        def measure(rows: range) -> Arrays:
            images, _ = dataset.tensors(slice(rows.start, rows.stop))
            return {"features": extract(self.extractor, images, dataset.levels).numpy()}

        size = max(1, PART_BYTES // (4 * self.extractor.dims))
        parts = memo.collect(self.extractor.name, {}, len(dataset), size, measure)
        return torch.from_numpy(parts["features"])
