"""Whitening: the linear flow, fitted in closed form.

z = W (x - m) with W^T W = S^-1 and z ~ N(0, I) is the maximum-likelihood Gaussian of mean m and
covariance S, written as a flow. S = L L^T, and z = R L^-1 (x - m): every whitening is the
triangular one, L^-1, which is a linear autoregressive transform, followed by a rotation R of the
latent, which changes no likelihood. `Layout` says which covariances S there are.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from exactflow.core import grey_levels as grey
from exactflow.core.conditional import Affine
from exactflow.core.density_flow import FittedFlow
from exactflow.core.model import log_density
from exactflow.core.prior import DiagonalGaussian
from exactflow.core.randomness import generator, uniform_rows
from exactflow.core.shapes import GreyLevels, Images, Labels, PerSample
from exactflow.core.transform import AutoregressiveTransform, Decoding, Solver, Transform
from exactflow.models.gaussian.moments import Arranged, Layout, fit_linear

FIT_BATCH = 1024  # latents mapped at a time
FIT_VALUES = 2**17  # values of the same kind, at many positions, that suffice to fit layers to


@final
@dataclass(frozen=True)
class WhiteningConfig:
    """Which covariance is estimated, and which of its square roots whitens."""

    image_shape: tuple[int, int, int] = (1, 8, 8)  # channels, height, width
    covariance: Literal["full", "patch", "dct", "diagonal"] = "full"
    patch_size: int = 4  # side of a patch, for "patch"; divides height and width
    rotation: Literal["cholesky", "pca", "zca"] = "cholesky"  # of the latent: same likelihood
    shrinkage: float | None = 0.0  # weight of diag(S); None: what held-out images like best
    levels: int = grey.PHOTOGRAPHIC_LEVELS  # grey levels of the images
    num_classes: ClassVar[int] = 0
    noise_std: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be built."""
        if self.levels < 2:
            raise ValueError(f"expected levels >= 2, got {self.levels}")
        if self.rotation not in ("cholesky", "pca", "zca"):
            raise ValueError(f"expected rotation cholesky | pca | zca, got {self.rotation!r}")
        if self.shrinkage is not None and not 0 <= self.shrinkage <= 1:
            raise ValueError(f"expected shrinkage in [0, 1] or None, got {self.shrinkage}")
        assert self.layout.tokens > 0  # which checks the rest

    @property
    def layout(self) -> Layout:
        """Tokens, and what shares a covariance."""
        return Layout(self.image_shape, self.covariance, self.patch_size)


@final
class TriangularWhitening(AutoregressiveTransform):
    """z = L^-1 (x - m), as an affine autoregressive transform with constant scales.

    L = A^-1 diag(scale) with A of unit diagonal: token t is shifted by its linear prediction from
    the tokens before it, and divided by the standard deviation of what is left (an L D L^T
    factorisation). Its parameters are the free numbers, D (D + 3) / 2 for a full covariance.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.num_tokens = tokens = layout.tokens
        self.conditional = Affine(layout.positions)
        self.mean = nn.Parameter(torch.zeros(tokens, layout.positions))
        self.log_scale = nn.Parameter(torch.zeros(tokens, layout.groups))
        self.below = None  # the entries of A below its diagonal, row after row
        if tokens > 1:
            self.below = nn.Parameter(torch.zeros(layout.groups, _below(tokens)))

    @torch.no_grad()
    def set(
        self, mean: Float[Tensor, "tokens positions"], factor: Float[Tensor, "groups tokens tokens"]
    ) -> None:
        """Set m and L."""
        scale = factor.diagonal(dim1=1, dim2=2)
        self.mean.copy_(mean)
        self.log_scale.copy_(scale.log().T)
        if self.below is not None:
            spread = torch.diag_embed(scale)
            unit = torch.linalg.solve_triangular(factor, spread, upper=False, left=False)
            self.below.copy_(unit[:, _is_below(0, self.num_tokens, unit.device)])

    def new_cache(self, x: Arranged, decoding: Decoding | None = None) -> Tensor | None:
        """See `AutoregressiveTransform.new_cache`: A - I, unpacked once."""
        how = decoding or Decoding()
        if how.step != "eager" or how.dtype not in (None, x.dtype):
            raise ValueError(f"whitening has no other way of decoding than its own, got {how}")
        return self._prediction(0, self.num_tokens, x.dtype)

    def conditioner(
        self,
        x: Float[Tensor, "batch stop positions"],
        label: Labels | None = None,
        cache: Tensor | None = None,
        start: int = 0,
        temperature: PerSample | None = None,
    ) -> Float[Tensor, "batch window size"]:
        """See `AutoregressiveTransform.conditioner`. Raises ValueError for a temperature."""
        if temperature is not None:
            raise ValueError("whitening has no attention: it takes no attention temperature")
        stop = x.shape[1]
        mean = self.mean.to(x.dtype)
        shift = mean[None, start:stop].expand(len(x), -1, -1)
        if stop > 1:
            rows = slice(start, stop)
            weight = self._prediction(start, stop, x.dtype) if cache is None else cache[:, rows]
            known = x[:, : stop - 1] - mean[: stop - 1]
            shift = shift - apply_linear(weight[:, :, : stop - 1], known)
        log_scale = self.log_scale[start:stop].to(x.dtype)
        return torch.cat([log_scale.expand_as(shift), shift], dim=-1)

    def substitute(self, z: Arranged) -> Arranged:
        """The inverse by forward substitution, all tokens in one call of the linear algebra."""
        c = z * self.log_scale.to(z.dtype).exp()
        if self.below is not None:
            unit = self._prediction(0, self.num_tokens, z.dtype)  # its diagonal is not read
            by_position = c.permute(2, 1, 0)
            c = torch.linalg.solve_triangular(unit, by_position, upper=False, unitriangular=True)
            c = c.permute(2, 1, 0)
        return c + self.mean.to(z.dtype)

    def _prediction(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start .. stop - 1 of A - I, (G, stop - start, stop)."""
        groups = self.log_scale.shape[1]
        dense = torch.zeros(groups, stop - start, stop, dtype=dtype, device=self.mean.device)
        if self.below is None:
            return dense
        packed = self.below[:, _below(start) : _below(stop)].to(dtype)
        return dense.masked_scatter(_is_below(start, stop, self.mean.device), packed)


def _below(rows: int) -> int:
    """Entries below the diagonal in that many first rows."""
    return rows * (rows - 1) // 2


def _is_below(start: int, stop: int, device: torch.device) -> Tensor:
    """Which entries of rows start .. stop - 1 and columns 0 .. stop - 1 are below the diagonal."""
    ones = torch.ones(stop - start, stop, dtype=torch.bool, device=device)
    return ones.tril(start - 1)


def apply_linear(
    weight: Float[Tensor, "groups rows tokens"], x: Arranged
) -> Float[Tensor, "batch rows positions"]:
    """One matrix for all positions, or one for each."""
    if len(weight) == 1:
        return torch.einsum("ts,bsp->btp", weight[0], x)
    return torch.einsum("pts,bsp->btp", weight, x)


class FittedTransform(Transform, ABC):
    """A map of white latents (batch, tokens, positions) that is fitted to them."""

    @abstractmethod
    def fit(self, z: Float[Tensor, "n tokens positions"], source: torch.Generator) -> str:
        """Set all parameters, with random choices from `source`; return what was done, as text."""


class LinearFirstFlow(FittedFlow, ABC):
    """A whitening, and then layers that act on the latent (batch, tokens, positions).

    Args:
        linear: the whitening's configuration.
        layers: what follows it.
        fit_images: at most so many images are used to fit the layers.
    """

    def __init__(
        self, linear: WhiteningConfig, layers: Iterable[FittedTransform] = (), fit_images: int = 1
    ) -> None:
        super().__init__()
        self.linear, self.layout, self.fit_images = linear, linear.layout, fit_images
        self.whitening = TriangularWhitening(self.layout)
        rotation = None
        if linear.rotation != "cholesky":
            rotation = torch.eye(self.layout.tokens).repeat(self.layout.groups, 1, 1)
        self.register_buffer("rotation", rotation)
        self.register_buffer("shrinkage", torch.zeros(()))  # what was applied
        self.layers = nn.ModuleList(layers)

    @property
    def stages(self) -> list[nn.Module]:
        return [self.whitening, *self.layers]

    @property
    def prior(self) -> DiagonalGaussian:
        return DiagonalGaussian(torch.ones_like(self.whitening.mean, requires_grad=False))

    def encode(self, x: Images, label: Labels | None = None) -> tuple[Arranged, PerSample]:
        """See `Flow.encode`. Raises ValueError for a wrong shape, dtype or label."""
        self.check_input(x, label)
        z, log_abs_det = self._whitened(x.to(torch.promote_types(x.dtype, torch.float32)))
        for layer in self.layers:
            z, change = layer(z)
            log_abs_det = log_abs_det + change
        return z, log_abs_det

    @torch.no_grad()
    def trajectory(
        self, z: Arranged, label: Labels | None = None, *, solver: Solver | None = None
    ) -> Iterator[Images]:
        """See `Flow.trajectory`. Raises ValueError for a wrong shape."""
        self.check_input(z, label, latent=True)
        yield self.layout.restore(z)
        for layer in reversed(self.layers):
            assert isinstance(layer, FittedTransform)
            z = layer.inverse(z)
            yield self.layout.restore(z)
        if self.rotation is not None:
            z = apply_linear(self.get_buffer("rotation").to(z.dtype).mT, z)
        if solver is None:
            x = self.whitening.substitute(z)
        else:
            x = solver(self.whitening, z.contiguous(), label)
        yield self.layout.restore(x)

    def loss(
        self,
        images: GreyLevels,
        label: Labels | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> PerSample:
        """-ln p(x) / D in nats per dimension, of one draw of uniform dequantisation."""
        return -log_density(self, self.add_noise(images, generator), label) / self.dims

    @torch.no_grad()
    def fit(
        self,
        batches: Iterable[Integer[Tensor, "_ channels height width"]],
        *,
        seed: int = 0,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """See `FittedFlow.fit`: one pass for the whitening, one more if layers follow."""
        report = report or (lambda _: None)
        linear = self.linear
        found = fit_linear(self.layout, linear.levels, linear.shrinkage, batches, self.device)
        self.whitening.set(found.mean, found.factor)
        self.get_buffer("shrinkage").fill_(found.shrinkage)
        if self.rotation is not None:
            rotation = found.rotation(symmetric=linear.rotation == "zca")
            self.get_buffer("rotation").copy_(rotation)
        report(f"covariance of {found.count:,} images, shrinkage {found.shrinkage:.2g}")
        if not len(self.layers):
            return
        z = self._latents(batches, found.count, seed)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, FittedTransform)
            if index > 0:
                z = torch.cat([self.layers[index - 1](part)[0] for part in z.split(FIT_BATCH)])
            done = layer.fit(z, generator(seed, "layer", index))
            report(f"layer {index + 1} of {len(self.layers)}: {done}")

    def _latents(self, batches: Iterable[Tensor], count: int, seed: int) -> Tensor:
        """White latents of dequantised images evenly spread over the set, in random order."""
        shared = self.layout.positions // self.layout.groups
        most = min(self.fit_images, max(FIT_VALUES // shared, 2))
        every, seen, found = -(-count // most), 0, []
        for images in batches:
            rows = range(-seen % every, len(images), every)
            if rows:
                sources = [generator(seed, "fit", seen + row) for row in rows]
                noise = uniform_rows(self.event_shape, sources).to(self.device, self.wide_dtype)
                picked = images[list(rows)].to(self.device)
                found.append(grey.dequantize(picked, noise, self.levels))
            seen += len(images)
        if seen != count:
            raise ValueError(f"expected the same {count} images twice, got {seen}: pass a list")
        x = torch.cat(found)
        order = torch.randperm(len(x), generator=generator(seed, "order")).to(x.device)
        return torch.cat([self._whitened(x[rows])[0] for rows in order.split(FIT_BATCH)])

    def _whitened(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_abs_det = self.whitening(self.layout.arrange(x))
        if self.rotation is not None:
            z = apply_linear(self.get_buffer("rotation").to(z.dtype), z)
        return z, log_abs_det


@final
class Whitening(LinearFirstFlow):
    """The Gaussian as a flow; latents are (batch, tokens, positions)."""

    kind: ClassVar[str] = "whitening"

    def __init__(self, config: WhiteningConfig) -> None:
        super().__init__(config)
        self.config = config
