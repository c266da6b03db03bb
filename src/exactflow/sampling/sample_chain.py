"""Samples of a diffusion chain: sample k belongs to seed k, whatever the batch size."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from exactflow.core.model import NonFiniteError
from exactflow.core.progress import shown_progress
from exactflow.core.random import generator, normal_rows
from exactflow.paths.chain import MarkovChain, Network
from exactflow.paths.chain_model import ChainModel
from exactflow.sampling.reverse import Ancestral, ClassifierGuidance, ReverseRule


@final
@dataclass(frozen=True)
class ChainSamples:
    """What `sample_chain` drew.

    Attributes:
        x: images in [-1, 1] as the last step gives them, float32 or the model's float64.
        images: the same as grey levels 0 .. levels-1.
        seeds: seed of each sample.
        label: class of each sample, None where none was given.
        evaluations: network passes, summed over batches.
        classifier_evaluations: passes of the guiding classifier, forwards and back, likewise.
        seconds: wall-clock of everything.
    """

    x: Float[Tensor, "n channels height width"]
    images: UInt8[Tensor, "n channels height width"]
    seeds: tuple[int, ...]
    label: Int[Tensor, " n"] | None
    evaluations: int
    classifier_evaluations: int
    seconds: float


@torch.no_grad()
def sample_chain(
    model: ChainModel,
    n: int,
    label: Int[Tensor, " n"] | None = None,
    seed: int = 0,
    *,
    rule: ReverseRule | None = None,
    respacing: str = "",
    guidance: ClassifierGuidance | None = None,
    wrap: Callable[[Network], Network] | None = None,
    low: Float[Tensor, "n channels low_height low_width"] | None = None,
    batch_size: int = 64,
    check_finite: bool = True,
    progress: bool = False,
) -> ChainSamples:
    """Draw `n` samples; sample k is a function of seed + k, whatever `n` and `batch_size`.

    Args:
        model: a chain model.
        n: number of samples.
        label: class of each sample; None for dropped labels. With classifier guidance it is the
            class to guide to, which an unconditional model is not told.
        seed: first seed.
        rule: how each step is made; None: ancestral, clipped.
        respacing: which steps to take, see `chain.kept_steps`; "" takes all.
        guidance: by a classifier, towards the labels.
        wrap: makes another network of the model's (as `classifier_free` does), whose passes are
            still counted.
        low: the small images that an upsampler enlarges, in [-1, 1].
        batch_size: samples drawn together.
        check_finite: whether a sample that is not finite is an error; else it is in the result.
        progress: show a bar over steps.

    Raises:
        NonFiniteError: names the first seed whose sample is not finite.
        ValueError: for labels that the model cannot take, or steps that the chain does not have.
    """
    if n < 1 or batch_size < 1:
        raise ValueError(f"expected n >= 1 and batch_size >= 1, got {n}, {batch_size}")
    began = time.perf_counter()
    rule = rule or Ancestral()
    chain = model.chain.respaced(respacing)
    if model.num_classes or guidance is None:
        model.check_label(label, n)
    batches = _Batches(model, chain, rule, guidance, wrap, check_finite)
    parts, starts = [], range(0, n, batch_size)
    total = len(starts) * chain.steps
    with shown_progress(total, "sampling", unit="evaluations", quiet=not progress) as advance:
        for first in starts:
            seeds = range(seed + first, seed + min(first + batch_size, n))
            rows = slice(first, first + batch_size)
            chunk = None if label is None else label[rows].to(model.device)
            small = None if low is None else low[rows].to(model.device)
            parts.append(batches.draw(seeds, chunk, small, lambda: advance(1)))
    x = torch.cat(parts)
    return ChainSamples(
        x,
        model.to_grey_levels(x),
        tuple(range(seed, seed + n)),
        None if label is None else label.to(model.device),
        batches.evaluations,
        0 if guidance is None else len(starts) * chain.steps,
        time.perf_counter() - began,
    )


@final
class _Batches:
    """What all batches have in common; counts the passes of the network."""

    def __init__(
        self,
        model: ChainModel,
        chain: MarkovChain,
        rule: ReverseRule,
        guidance: ClassifierGuidance | None,
        wrap: Callable[[Network], Network] | None,
        check_finite: bool,
    ) -> None:
        self._model, self._chain, self._rule, self._guidance = model, chain, rule, guidance
        self._wrap, self._check_finite = wrap or (lambda network: network), check_finite
        self.evaluations = 0

    def draw(
        self, seeds: range, label: Tensor | None, low: Tensor | None, advanced: Callable[[], None]
    ) -> Tensor:
        """One batch: noise of the start and of the steps, in this order, from streams of seeds."""
        model, sources = self._model, [generator(seed, "sample") for seed in seeds]
        dtype = torch.promote_types(model.dtype, torch.float32)

        def noise() -> Tensor:
            return normal_rows(model.event_shape, sources).to(dtype).to(model.device)

        network = self._wrap(self._network(low))
        x = noise()
        for step in reversed(range(self._chain.steps)):
            fresh = noise() if self._rule.stochastic and step > 0 else None
            x = self._rule.advance(self._chain, network, x, step, label, fresh, self._guidance)
            advanced()
        finite = x.flatten(1).isfinite().all(1)
        if self._check_finite and not bool(finite.all()):
            failed = seeds[int((~finite).nonzero()[0, 0])]
            raise NonFiniteError(f"the sample of seed {failed} is not finite")
        return x

    def _network(self, low: Tensor | None) -> Network:
        """The model's network; an unconditional one is not told where guidance leads."""

        def counted(
            x_t: Tensor, timestep: Tensor, label: Tensor | None
        ) -> tuple[Tensor, Tensor | None]:
            self.evaluations += 1
            label = label if self._model.num_classes else None
            return self._model.predict_noise(x_t, timestep, label, low)

        return counted
