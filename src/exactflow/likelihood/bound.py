"""The variational bound of a diffusion chain, term by term.

It bounds the probability of the grey levels themselves: there is no dequantisation, and nothing to
add for the width of a level. Sohl-Dickstein et al., arXiv 1503.03585; Ho et al., arXiv 2006.11239,
eq. 5; protocol of Nichol and Dhariwal, arXiv 2102.09672.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, final

import torch
from jaxtyping import Float64, Int, Integer
from torch import Tensor

from exactflow.core import images as grey
from exactflow.core.model import NonFiniteError, evaluating
from exactflow.core.process_group import current
from exactflow.core.progress import shown_progress
from exactflow.core.random import generator, normal_rows
from exactflow.paths.chain import MarkovChain, Network
from exactflow.paths.chain_model import ChainModel


@final
@dataclass(frozen=True)
class ChainBound:
    """An upper bound on -ln P of each image, with its terms.

    Attributes:
        terms: (n, T + 1), nats, summed over dimensions: column 0 is the decoder's, column t the
            Kullback-Leibler divergence of step t, column T that of the prior. Each is estimated
            with one noise draw, so that only the mean of a sum over images bounds -ln P. Where
            only some steps were evaluated, a column stands for a run of steps: see `strata`.
        dims: C * H * W.
        levels: number of grey levels.
        timesteps: of the original chain, of each step.
        strata: first step of each column but the prior's; with one step each, all were evaluated.
        data: fingerprint of the images, where they come from a data set.
    """

    terms: Float64[Tensor, "n terms"]
    dims: int
    levels: int
    timesteps: tuple[int, ...]
    strata: tuple[int, ...]
    data: str | None = None
    kind: Literal["bound"] = "bound"

    @property
    def nats(self) -> Float64[Tensor, " n"]:
        """The bound on ln P of each image."""
        return -self.terms.sum(1)

    @property
    def per_image(self) -> Float64[Tensor, " n"]:
        """Bits per dimension of each image."""
        return -self.nats / (self.dims * math.log(2))

    @property
    def bits_per_dim(self) -> float:
        """Mean of `per_image`."""
        return float(self.per_image.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of `bits_per_dim` over images and noise; NaN for a single image."""
        return float(self.per_image.std()) / math.sqrt(len(self.terms))

    @property
    def curve(self) -> Float64[Tensor, " terms"]:
        """Mean over images of each term, in bits per dimension; they sum to `bits_per_dim`."""
        return self.terms.mean(0) / (self.dims * math.log(2))


@torch.no_grad()
def chain_bound(
    model: ChainModel,
    images: Integer[Tensor, "n channels height width"],
    label: Int[Tensor, " n"] | None = None,
    *,
    seed: int = 0,
    respacing: str = "",
    evaluations: int | None = None,
    first: int = 0,
    batch_size: int = 64,
    data: str | None = None,
    progress: bool = False,
) -> ChainBound:
    """Score integer images over all steps; the noise of image i at step t is that of (seed, i, t).

    The predicted image is clipped to [-1, 1], as published; terms are computed in float64.

    Args:
        model: a chain model; scored in evaluation mode.
        images: grey levels 0 .. levels-1, on any device.
        label: class of each image; None scores without labels.
        seed: names the noise.
        respacing: bound of the shorter chain of these steps (see `chain.kept_steps`), which is a
            bound as well, mostly a looser one; "" is the whole chain.
        evaluations: of the network for each image, at most; None evaluates every step. Fewer are
            drawn at random, the decoder's always and one of each of `strata`, in whose name it
            counts: the same bound in expectation, with more noise.
        first: number of the first image, where these are a part of a set.
        batch_size: images evaluated together.
        data: fingerprint of the data set, carried into the result.
        progress: show a bar over steps.

    Raises:
        ValueError: for images that are not such integers, or labels the model cannot take.
        NonFiniteError: names the first image and step whose term is not finite.
    """
    if batch_size < 1 or (evaluations is not None and evaluations < 2):
        raise ValueError(
            f"expected batch_size >= 1 and evaluations >= 2, got {batch_size}, {evaluations}"
        )
    grey.check_images(images, model.event_shape, model.levels)
    model.check_label(None if label is None else label.cpu(), len(images))
    chain = model.chain.respaced(respacing)
    strata = strata_of(chain.steps, chain.steps if evaluations is None else evaluations)
    group, starts = current(), range(0, len(images), batch_size)
    shown = progress and group.is_main
    total = len(starts[group.rank :: group.count]) * len(strata)
    counted = shown_progress(total, "scoring", unit="evaluations", quiet=not shown)
    with evaluating(model), counted as advance:

        def score(start: int) -> Tensor:
            rows = slice(start, start + batch_size)
            x0 = grey.center(images[rows].to(model.device), model.levels, torch.float64)
            chunk = None if label is None else label[rows].to(model.device)
            names = range(first + start, first + start + len(x0))
            return _terms(model, chain, strata, x0, chunk, seed, names, lambda: advance(1))

        terms = torch.cat(group.spread(starts, score))
    if not bool(terms.isfinite().all()):
        image, step = (~terms.isfinite()).nonzero()[0].tolist()
        raise NonFiniteError(
            f"term {step} of the bound of image {first + image} is {float(terms[image, step])} "
            f"({int((~terms.isfinite()).sum())} of {terms.numel()} terms are not finite)"
        )
    timesteps = tuple(chain.timesteps.tolist())
    return ChainBound(terms, model.dims, model.levels, timesteps, strata, data)


def strata_of(steps: int, count: int) -> tuple[int, ...]:
    """First steps of `count` runs that make up a chain, or of all its steps if there are no more.

    The first run is step 0, the decoder's; the others grow linearly, as terms shrink with t.
    """
    count = min(count, steps)
    starts = [0]
    for index in range(count - 1):
        even = round(1 + (steps - 1) * (index / (count - 1)) ** 2)
        starts.append(max(starts[-1] + 1, even))
    return tuple(starts)


def _terms(
    model: ChainModel,
    chain: MarkovChain,
    strata: tuple[int, ...],
    x0: Tensor,
    label: Tensor | None,
    seed: int,
    names: range,
    advanced: Callable[[], None],
) -> Float64[Tensor, "batch terms"]:
    """All terms of a batch, on the CPU; noise is named by the original chain's timestep."""
    network: Network = model.predict_noise
    drawn = [generator(seed, "bound steps", name) for name in names]
    terms = []
    for start, end in pairwise((*strata, chain.steps)):
        if end - start == 1:
            step = torch.full((len(x0),), start)
        else:
            step = torch.cat([torch.randint(start, end, (1,), generator=each) for each in drawn])
        timesteps = chain.timesteps.cpu()[step].tolist()
        sources = [generator(seed, "bound", *each) for each in zip(names, timesteps, strict=True)]
        noise = normal_rows(model.event_shape, sources).to(x0)
        step = step.to(x0.device)
        x_t = chain.diffuse(x0, step, noise)
        kernel = chain.reverse_kernel(network, x_t, step, label, clip=True)
        terms.append((end - start) * chain.bound_term(kernel, x0, x_t, step, model.levels))
        advanced()
    terms.append(chain.prior_term(x0))
    return torch.stack(terms, dim=1).cpu()
