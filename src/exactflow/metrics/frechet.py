"""The Frechet distance between two sets of images, from the moments of their features.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
arXiv 1706.08500, equation 6.
"""

import warnings
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float64, Shaped
from torch import Tensor


@final
@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Moments of the features of a set of images.

    Attributes:
        mean: of each feature.
        covariance: unbiased, of each pair.
        count: number of images.
        extractor: name of the features; None matches any name.
    """

    mean: Float64[np.ndarray, " dims"]
    covariance: Float64[np.ndarray, "dims dims"]
    count: int
    extractor: str | None

    @classmethod
    def of(
        cls, features: Shaped[Tensor, "n dims"], extractor: str | None = None
    ) -> "FeatureStatistics":
        """Moments of features.

        Raises:
            ValueError: fewer than two images, or a feature that is not finite.
        """
        if not bool(features.isfinite().all()):
            raise ValueError("expected finite features, got some that are not")
        count = len(features)
        if count < 2:
            raise ValueError(f"expected features of two images or more, got {count}")
        x = features.detach().cpu().double().numpy()
        # Sums about a point amid the features lose no digits to a distant mean.
        origin = x.mean(0)
        x = x - origin
        sums = x.sum(0)
        covariance = (x.T @ x - np.outer(sums, sums) / count) / (count - 1)
        return cls(origin + sums / count, covariance, count, extractor)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)): a squared distance, by custom.

    The last trace is the sum of the singular values of F_a^T F_b, for any factors F F^T = S of the
    covariances: the eigenvalues of S_a S_b would lose half of the digits where one is singular.
    `FeatureExtractor.distance_name` is the name of the distance.

    >>> import torch
    >>> x = torch.tensor([[0.0], [2.0]])
    >>> a, b = FeatureStatistics.of(x), FeatureStatistics.of(x + 3)
    >>> round(frechet_distance(a, b), 6)
    9.0

    Warns:
        UserWarning: not more images than features: covariances are singular, and the distance is
            biased upwards by far.

    Raises:
        ValueError: features of other extractors or numbers.
    """
    named = a.extractor is not None and b.extractor is not None
    if a.mean.shape != b.mean.shape or (named and a.extractor != b.extractor):
        raise ValueError(
            f"expected statistics of the same features, got {a.extractor} ({len(a.mean)} features) "
            f"and {b.extractor} ({len(b.mean)})"
        )
    for each in (a, b):
        if each.count <= len(each.mean):
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
