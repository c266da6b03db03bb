"""The Frechet distance between sets of images: of normal laws with their features' moments.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
arXiv 1706.08500, equation 6.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Float64, Shaped
from torch import Tensor

from exactflow.core.serialization import write_atomically
from exactflow.core.tensor_files import check_unpacked
from exactflow.data.datasets import ImageDataset
from exactflow.metrics.extractors import FeatureExtractor, feature_batches

MOST_BYTES = 2**30  # of a file of moments: those of 8000 features take half


@final
@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Moments of the features of a set of images.

    Attributes:
        mean: of each feature.
        covariance: unbiased, of each pair.
        count: number of images; None where a file does not tell.
        extractor: name of the features; None where a file does not tell.
    """

    mean: Float64[np.ndarray, " dims"]
    covariance: Float64[np.ndarray, "dims dims"]
    count: int | None
    extractor: str | None

    @classmethod
    def of(
        cls, features: Shaped[Tensor, "n dims"], extractor: str | None = None
    ) -> "FeatureStatistics":
        """Moments of features.

        Raises:
            ValueError: fewer than two images, or a feature that is not finite.
        """
        return cls.of_batches([features], extractor)

    @classmethod
    def of_batches(
        cls, batches: Iterable[Shaped[Tensor, "_ dims"]], extractor: str | None = None
    ) -> "FeatureStatistics":
        """Moments of features that come in batches, in memory for one; see `of`."""
        count, sums, products, origin = 0, np.zeros(()), np.zeros(()), None
        for batch in batches:
            if not bool(batch.isfinite().all()):
                raise ValueError("expected finite features, got some that are not")
            if len(batch) == 0:
                continue
            x = batch.detach().cpu().double().numpy()
            # Sums about a point amid the features lose no digits to a distant mean.
            origin = x.mean(0) if origin is None else origin
            x = x - origin
            count, sums, products = count + len(x), sums + x.sum(0), products + x.T @ x
        if origin is None or count < 2:
            raise ValueError(f"expected features of two images or more, got {count}")
        covariance = (products - np.outer(sums, sums) / count) / (count - 1)
        return cls(origin + sums / count, covariance, count, extractor)

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Moments of both sets together (Chan, Golub and LeVeque 1979).

        Raises:
            ValueError: features of other extractors or numbers, or unknown counts.
        """
        _check_comparable(self, other)
        if self.count is None or other.count is None:
            raise ValueError("expected statistics with their counts, to weigh one with the other")
        count, shift = self.count + other.count, other.mean - self.mean
        between = np.outer(shift, shift) * (self.count * other.count / count)
        within = self.covariance * (self.count - 1) + other.covariance * (other.count - 1)
        return FeatureStatistics(
            self.mean + shift * (other.count / count),
            (within + between) / (count - 1),
            count,
            self.extractor or other.extractor,
        )

    def save(self, path: Path) -> None:
        """Write an .npz with `mu` and `sigma`, as other projects do, and `count`, `extractor`."""
        known = {"count": self.count, "extractor": self.extractor}
        arrays: dict[str, Any] = {k: np.array(v) for k, v in known.items() if v is not None}
        buffer = io.BytesIO()
        np.savez(buffer, mu=self.mean, sigma=self.covariance, **arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> "FeatureStatistics":
        """Read an .npz with `mu` and `sigma`: our own, or another project's reference.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that holds no such arrays.
        """
        try:
            check_unpacked(path, MOST_BYTES)
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            mean, covariance = (np.asarray(arrays[n], np.float64) for n in ("mu", "sigma"))
        except FileNotFoundError:
            raise
        except Exception as error:  # a foreign file can fail in any way
            raise ValueError(
                f"{path}: expected an .npz with arrays mu and sigma: {error!r}"
            ) from error
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"{path}: expected mu of shape (d,) and sigma of shape (d, d), "
                f"got {mean.shape} and {covariance.shape}"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError(f"{path}: expected finite mu and sigma")
        return cls(
            mean,
            covariance,
            int(arrays["count"]) if "count" in arrays else None,
            str(arrays["extractor"]) if "extractor" in arrays else None,
        )


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)): a squared distance, as is the custom.

    The last trace is the sum of the singular values of S_a^(1/2) S_b^(1/2), of any two factors of
    the covariances. It is taken as that: the eigenvalues of their product would lose half of the
    digits where a covariance is singular. Call it by the extractor's `distance_name`.

    Warns:
        UserWarning: not more images than features: covariances are singular, and the distance is
            biased upwards by far.

    Raises:
        ValueError: features of other extractors or numbers.
    """
    _check_comparable(a, b)
    for each in (a, b):
        if each.count is not None and each.count <= len(each.mean):
            warnings.warn(
                f"{each.count} images for the covariance of {len(each.mean)} features: the "
                f"distance is biased upwards by far; compare only with as many images",
                stacklevel=2,
            )
    shift = a.mean - b.mean
    factors = [_factor(each.covariance) for each in (a, b)]
    overlap = np.linalg.svd(factors[0].T @ factors[1], compute_uv=False).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance)
    return max(0.0, float(shift @ shift + spread - 2 * overlap))  # -1e-15 is rounding of 0


def _factor(covariance: Float64[np.ndarray, "dims dims"]) -> Float64[np.ndarray, "dims rank"]:
    """F with F F^T = S, of S's rank to rounding."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def statistics_of(
    dataset: ImageDataset,
    extractor: FeatureExtractor,
    cache_dir: Path,
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> FeatureStatistics:
    """Moments of a data set's features, kept in `cache_dir` and measured once.

    What is kept belongs to these very images (their fingerprint), to what was done to them (the
    hash of their preprocessing) and to the extractor's name.

    Raises:
        ValueError: images that the extractor does not take, or a damaged file in `cache_dir`.
    """
    key = (dataset.fingerprint, dataset.preprocessing_hash, extractor.name)
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    known_as = re.sub(r"[^A-Za-z0-9.]+", "-", f"{dataset.id} {dataset.split}").strip("-")
    path = cache_dir / f"{known_as}-{digest[:16]}.npz"
    if path.is_file():
        return FeatureStatistics.load(path)
    batches = feature_batches(
        extractor, dataset.images, dataset.levels, batch_size=batch_size, progress=progress
    )
    found = FeatureStatistics.of_batches(batches, extractor.name)
    found.save(path)
    return found


def _check_comparable(a: FeatureStatistics, b: FeatureStatistics) -> None:
    named = a.extractor is not None and b.extractor is not None
    if a.mean.shape != b.mean.shape or (named and a.extractor != b.extractor):
        raise ValueError(
            f"expected statistics of the same features, got {a.extractor} ({len(a.mean)} features) "
            f"and {b.extractor} ({len(b.mean)})"
        )
