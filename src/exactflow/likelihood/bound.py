"""The variational bound of a diffusion chain, term by term.

It bounds the probability of the grey levels themselves: there is no dequantisation, and nothing to
add for the width of a level. Sohl-Dickstein et al., arXiv 1503.03585; Ho et al., arXiv 2006.11239,
eq. 5; protocol of Nichol and Dhariwal, arXiv 2102.09672.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import final

import torch
from jaxtyping import Float64, Int, Integer
from torch import Tensor

from exactflow.core import grey_levels as grey
from exactflow.core.model import NonFiniteError
from exactflow.core.progress import shown_progress
from exactflow.core.randomness import generator, normal_rows
from exactflow.likelihood.draws import ONE_DRAW, Draws
from exactflow.likelihood.value import LogLikelihood
from exactflow.parallel.process_group import current
from exactflow.paths.chain import MarkovChain, Network
from exactflow.paths.chain_model import ChainModel


@final
@dataclass(frozen=True)
class ChainBound:
    """An upper bound on -ln P of each image, with its terms.

    Attributes:
        likelihood: the bound on ln P of each image.
        terms: (n, T + 1), nats, summed over dimensions: column 0 is the decoder's, column t the
            Kullback-Leibler divergence of step t, column T that of the prior. Each is estimated
            with one noise draw, so that only the mean of a sum over images bounds -ln P. Where
            only some steps were evaluated, a column stands for a run of steps: see `strata`.
        timesteps: of the original chain, of each step.
        strata: first step of each column but the prior's; with one step each, all were evaluated.
    """

    likelihood: LogLikelihood
    terms: Float64[Tensor, "n terms"]
    timesteps: tuple[int, ...]
    strata: tuple[int, ...]

    @property
    def curve(self) -> Float64[Tensor, " terms"]:
        """Mean over images of each term, in bits per dimension; they sum to the bound's."""
        return grey.bits_per_dim(-self.terms.mean(0), self.likelihood.dims)


@torch.no_grad()
def chain_bound(
    model: ChainModel,
    images: Integer[Tensor, "n channels height width"],
    label: Int[Tensor, " n"] | None = None,
    draws: Draws = ONE_DRAW,
    *,
    respacing: str = "",
    evaluations: int | None = None,
) -> ChainBound:
    """Score integer images over all steps; the noise of image i at step t is that of (seed, i, t).

    The predicted image is clipped to [-1, 1], as published; terms are computed in float64.

    Args:
        model: a chain model; scored in evaluation mode.
        images: grey levels 0 .. levels-1, on any device.
        label: class of each image; None scores without labels.
        draws: seed and batches; the progress bar counts evaluations.
        respacing: bound of the shorter chain of these steps (see `chain.kept_steps`), which is a
            bound as well, usually a looser one; "" is the whole chain.
        evaluations: of the network for each image, at most; None evaluates every step. Otherwise
            one random step of each of `strata` is evaluated, weighted by the number of its steps:
            the same bound in expectation, with more noise.

    Raises:
        ValueError: for images that are not such integers, labels the model cannot take, or more
            than one draw.
        NonFiniteError: names the first image and step whose term is not finite.
    """
    if draws.k != 1:
        raise ValueError(f"the bound of a chain has one draw per term: expected k=1, got {draws.k}")
    if evaluations is not None and evaluations < 2:
        raise ValueError(f"expected evaluations >= 2, got {evaluations}")
    chain = model.chain.respaced(respacing)
    strata = strata_of(chain.steps, chain.steps if evaluations is None else evaluations)
    group, starts = current(), range(0, len(images), draws.batch_size)
    total = len(starts[group.rank :: group.count]) * len(strata)
    quiet = not (draws.progress and group.is_main)
    with shown_progress(total, "scoring", unit="evaluations", quiet=quiet) as advance:

        def score(some: Tensor, chunk: Tensor | None, numbers: range) -> Tensor:
            x0 = grey.center(some, model.levels, torch.float64)
            terms = []
            for term in _terms(model, chain, strata, x0, chunk, draws.seed, numbers):
                terms.append(term)
                advance(1)
            return torch.stack([*terms, chain.prior_term(x0)], dim=1).cpu()

        batches = replace(draws, progress=False).by_batch(model, images, label, score)
    terms = torch.cat(batches)
    _check_terms(terms, draws.first)
    details = {"steps": chain.steps, "evaluations": len(strata)}
    facts = model.dims, model.levels, draws.k
    found = LogLikelihood(-terms.sum(1), "bound", *facts, None, "none", details)
    return ChainBound(found, terms, tuple(chain.timesteps.tolist()), strata)


def _check_terms(terms: Tensor, first: int) -> None:
    """Raise NonFiniteError that names the first image and step whose term is not finite."""
    failed = (~terms.isfinite()).nonzero()
    if len(failed):
        image, step = failed[0].tolist()
        raise NonFiniteError(
            f"term {step} of the bound of image {first + image} is {float(terms[image, step])} "
            f"({len(failed)} of {terms.numel()} terms are not finite)"
        )


def strata_of(steps: int, count: int) -> tuple[int, ...]:
    """First steps of `count` runs that partition a chain, or all steps of a shorter chain.

    The first run is step 0, the decoder's; the others grow linearly, since terms shrink with t.
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
) -> Iterator[Float64[Tensor, " batch"]]:
    """All terms of a batch but the prior's; the original chain's timestep names the noise."""
    network: Network = model.predict_noise
    drawn = [generator(seed, "bound steps", name) for name in names]
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
        yield (end - start) * chain.bound_term(kernel, x0, x_t, step, model.levels)
