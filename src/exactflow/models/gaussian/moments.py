"""First and second moments of images, in one pass, and the Gaussian that follows from them.

Which values are a token, and which tokens share a covariance, decides how much is estimated:

* full: every value is a token; D (D + 1) / 2 numbers;
* patch: one covariance of the values of a patch, shared by all patches, which are independent;
* dct: channels are tokens, coefficients of the orthonormal two-dimensional cosine transform are
  independent, each with its own covariance of channels;
* diagonal: all values are independent.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from exactflow.core import grey_levels as grey
from exactflow.core.shapes import Images

FULL_COVARIANCE_DIMS = 4096  # beyond this the covariance alone fills a laptop's memory
CHUNK_VALUES = 2**23  # numbers turned to float64 at a time
HELD_OUT_EVERY = 5  # one image of so many judges the shrinkage
CANDIDATES = 121  # values of the shrinkage that are compared
LEAST_SHRINKAGE = -6  # decimal logarithm of the smallest of them that is not zero


Arranged = Float[Tensor, "batch tokens positions"]  # images as `Layout.arrange` gives them


@final
@dataclass(frozen=True)
class Layout:
    """Images as T tokens at P positions, T P = D; tokens at one position share a covariance."""

    image_shape: tuple[int, int, int]
    covariance: Literal["full", "patch", "dct", "diagonal"]
    patch_size: int

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be laid out."""
        _, height, width = self.image_shape
        if min(*self.image_shape, self.patch_size) < 1:
            raise ValueError(f"expected positive sizes, got {self.image_shape}, {self.patch_size}")
        if self.covariance not in ("full", "patch", "dct", "diagonal"):
            known = "full | patch | dct | diagonal"
            raise ValueError(f"expected covariance {known}, got {self.covariance!r}")
        if self.covariance == "patch" and (height % self.patch_size or width % self.patch_size):
            raise ValueError(
                f"expected a patch size that divides height and width, got {self.patch_size} "
                f"for {height} x {width}"
            )
        if self.tokens > FULL_COVARIANCE_DIMS:
            raise ValueError(
                f"expected at most {FULL_COVARIANCE_DIMS} dimensions for one covariance, got "
                f"{self.tokens}: choose covariance=dct, or patch with a small patch_size"
            )

    @property
    def tokens(self) -> int:
        """T: values that one covariance couples."""
        channels, height, width = self.image_shape
        match self.covariance:
            case "full":
                return channels * height * width
            case "patch":
                return channels * self.patch_size**2
            case "dct":
                return channels
            case "diagonal":
                return 1

    @property
    def positions(self) -> int:
        """P: groups of values that are independent of each other."""
        return math.prod(self.image_shape) // self.tokens

    @property
    def groups(self) -> int:
        """G: different covariances, one for all positions or one for each."""
        return self.positions if self.covariance in ("dct", "diagonal") else 1

    def arrange(self, x: Images) -> Arranged:
        """Images as tokens at positions: an orthogonal map. Channels slowest, then rows."""
        match self.covariance:
            case "full":
                return x.flatten(1)[:, :, None]
            case "patch":
                return F.pixel_unshuffle(x, self.patch_size).flatten(2)
            case "dct":
                rows, columns = (_cosines(size, x) for size in x.shape[2:])
                return (rows @ x @ columns.T).flatten(2)
            case "diagonal":
                return x.flatten(1)[:, None]

    def restore(self, tokens: Arranged) -> Images:
        """Inverse of `arrange`."""
        _, height, width = self.image_shape
        if self.covariance == "patch":
            grid = (height // self.patch_size, width // self.patch_size)
            return F.pixel_shuffle(tokens.unflatten(2, grid), self.patch_size)
        images = tokens.reshape(len(tokens), *self.image_shape)
        if self.covariance == "dct":
            return _cosines(height, images).T @ images @ _cosines(width, images)
        return images


def _cosines(size: int, like: Tensor) -> Tensor:
    """The orthonormal cosine transform (DCT-II) of that size, one basis vector a row."""
    index = torch.arange(size, dtype=torch.float64, device=like.device)
    basis = torch.cos(math.pi / size * torch.outer(index, index + 0.5)) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis.to(like.dtype)


@final
class Moments:
    """Mean and covariance of tokens at positions, one batch after the other, in float64.

    Sums are of deviations from the running mean (Chan, Golub, LeVeque 1979), so that no digits
    are lost to the mean. A single covariance (G = 1) is pooled over positions, each about its own
    mean. `scatter` is the sum of outer products of deviations.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        tokens, wide = layout.tokens, {"dtype": torch.float64, "device": device}
        self.count = 0
        self.mean = torch.zeros(tokens, layout.positions, **wide)
        self.scatter = torch.zeros(layout.groups, tokens, tokens, **wide)

    def update(self, x: Arranged) -> None:
        """Add some samples."""
        if len(x):
            mean = x.mean(0)
            _add_products(self.scatter, x - mean)
            self._move(len(x), mean)

    def merge(self, other: "Moments") -> None:
        """Add the samples of another one."""
        if other.count:
            self.scatter += other.scatter
            self._move(other.count, other.mean)

    def _move(self, count: int, mean: Tensor) -> None:
        step, total = mean - self.mean, self.count + count
        _add_products(self.scatter, step[None], self.count * count / total)
        self.mean += step * (count / total)
        self.count = total

    def covariance(
        self, noise: float = 0.0, about: Float[Tensor, "tokens positions"] | None = None
    ) -> Float[Tensor, "groups tokens tokens"]:
        """Biased (divided by n), or about another mean; with the variance of independent noise."""
        pooled = self.mean.shape[1] if len(self.scatter) == 1 else 1
        matrix = self.scatter / (self.count * pooled)
        if about is not None:
            _add_products(matrix, (self.mean - about)[None], 1 / pooled)
        matrix.diagonal(dim1=1, dim2=2).add_(noise)
        return matrix


def _add_products(
    scatter: Float[Tensor, "groups tokens tokens"], deviation: Arranged, weight: float = 1.0
) -> None:
    """Add outer products of tokens in place: summed over positions, or of each position."""
    if len(scatter) == 1:
        rows = deviation.transpose(1, 2).flatten(0, 1)
        scatter[0].addmm_(rows.T, rows, alpha=weight)
    elif deviation.shape[1] == 1:
        scatter[:, 0, 0] += deviation[:, 0].square().sum(0) * weight
    else:
        columns = deviation.permute(2, 1, 0)
        scatter.baddbmm_(columns, columns.mT, alpha=weight)


@final
@dataclass(frozen=True)
class LinearFit:
    """Parameters of a whitening: m, S after shrinkage by rho, and L, from `count` images."""

    count: int
    mean: Float[Tensor, "tokens positions"]
    covariance: Float[Tensor, "groups tokens tokens"]
    factor: Float[Tensor, "groups tokens tokens"]
    shrinkage: float

    def rotation(self, *, symmetric: bool) -> Float[Tensor, "groups tokens tokens"]:
        """R with R L^-1 = Lambda^-1/2 U^T (variances descending), or U Lambda^-1/2 U^T."""
        variance, vectors = torch.linalg.eigh(self.covariance)
        variance, vectors = variance.flip(-1), vectors.flip(-1)
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        vectors = vectors * largest.sign()  # eigenvectors have no sign of their own
        rotation = variance.rsqrt()[..., None] * (vectors.mT @ self.factor)
        return vectors @ rotation if symmetric else rotation


def fit_linear(
    layout: Layout,
    levels: int,
    shrinkage: float | None,
    batches: Iterable[Tensor],
    device: torch.device,
) -> LinearFit:
    """Maximum likelihood, or with shrinkage, in one pass over grey levels.

    Uniform dequantisation adds half a grey level to the mean and 1/12 of a squared one to every
    variance, in any orthonormal basis, so the fit needs no draw.

    Args:
        layout: which covariance.
        levels: grey levels of the images.
        shrinkage: rho of S + rho (diag(S) - S); None: see `chosen_shrinkage`.
        batches: integer images; how they are cut into batches does not change a bit of the result.
        device: where to compute; it must have float64.

    Raises:
        ValueError: no images, or images that are not such integers.
        ArithmeticError: the covariance is not positive definite.
    """
    whole, held_out, seen = Moments(layout, device), Moments(layout, device), 0
    for images in _recut(batches, layout.image_shape, levels):
        middle = torch.full(images.shape, 0.5, dtype=torch.float64, device=device)
        x = layout.arrange(grey.dequantize(images.to(device), middle, levels))
        if shrinkage is None:
            index = torch.arange(seen + 1, seen + len(x) + 1, device=device)
            held_out.update(x[index % HELD_OUT_EVERY == 0])
            x = x[index % HELD_OUT_EVERY != 0]
        whole.update(x)
        seen += len(images)
    noise = (2 / levels) ** 2 / 12
    if shrinkage is None:
        shrinkage = chosen_shrinkage(whole, held_out, noise) if held_out.count else 1.0
        whole.merge(held_out)
    if whole.count == 0:
        raise ValueError("expected at least one image to fit to, got none")
    covariance = whole.covariance(noise)
    diagonal = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
    covariance = torch.lerp(covariance, diagonal, shrinkage)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed.any()):
        least = float(torch.linalg.eigvalsh(covariance).min())
        raise ArithmeticError(
            f"the covariance is not positive definite (smallest eigenvalue {least:.3g}): "
            "raise model.shrinkage"
        )
    return LinearFit(whole.count, whole.mean, covariance, factor, shrinkage)


def chosen_shrinkage(part: Moments, held_out: Moments, noise: float) -> float:
    """The rho in [0, 1] under which the Gaussian of `part` gives `held_out` the most likelihood.

    In the eigenbasis of the correlations every rho costs the same few sums, since the diagonal is
    the identity there.
    """
    covariance = part.covariance(noise)
    deviation = covariance.diagonal(dim1=1, dim2=2).sqrt()
    unit = deviation[:, :, None] * deviation[:, None]
    spectrum, vectors = torch.linalg.eigh(covariance / unit)
    power = ((held_out.covariance(noise, part.mean) / unit @ vectors) * vectors).sum(1)
    steps = torch.logspace(LEAST_SHRINKAGE, 0, CANDIDATES, dtype=torch.float64).tolist()
    costs = {}
    for rho in (0.0, *steps[:-1], 1.0):
        variance = torch.lerp(spectrum, torch.ones_like(spectrum), rho)
        costs[rho] = float((variance.log() + power / variance).sum())
    return min((rho for rho in costs if math.isfinite(costs[rho])), key=costs.__getitem__)


def _recut(batches: Iterable[Tensor], shape: tuple[int, int, int], levels: int) -> Iterator[Tensor]:
    """The same images, so many at a time that `CHUNK_VALUES` is not exceeded."""
    rows, waiting, count = max(1, CHUNK_VALUES // math.prod(shape)), [], 0
    for batch in batches:
        grey.check_images(batch, shape, levels)
        waiting.append(batch)
        count += len(batch)
        if count >= rows:
            *full, rest = torch.cat(waiting).tensor_split([*range(rows, count + 1, rows)])
            yield from full
            waiting, count = [rest], len(rest)
    if count:
        yield torch.cat(waiting)
