"""The result of sampling, for every kind of model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from exactflow.sampling.inversion import Pass


@final
@dataclass(frozen=True)
class Samples:
    """The result of `sample`.

    Tensors are on the model's device, or on the CPU if several processes drew them.

    Attributes:
        x: images in [-1, 1] (not clipped), float32 or the model's float64.
        images: the same as grey levels 0 .. levels-1.
        seeds: seed of each sample; fewer than n only if samples were left out.
        label: class of each sample; None if none was given.
        evaluations: network passes, summed over blocks and batches (certificates excluded); one
            for each batch of a flow without autoregressive blocks; with guidance of a diffusion
            model both of its branches count.
        iterations: passes of each autoregressive block in generation order, largest over batches;
            none for a flow without such blocks, and for models that are no flows.
        seconds: wall-clock of everything but loading.
        loading: wall-clock of loading compiled steps, which happens once in a process.
        certificate: max |encode(x) - z| of each sample, with the model evaluated in float64 and x
            before denoising: the distance of the drawn latent from that of the image. NaN for
            models without autoregressive parts.
        repairs: samples of each block in generation order that were inverted again, token by
            token, because their backward error was above the tolerance.
        beyond_tolerance: seeds of the samples whose certificate still exceeds the tolerance, by
            rounding in the model's dtype.
        failures: seed -> place, of samples left out because they were not finite.
        trace: the latent laid out as an image, the result of each block in generation order, and
            the denoised image if there is one: (steps, n, C, H, W); None unless asked for.
        passes: of each block, every evaluation for the first batch; None unless asked for.
    """

    x: Float[Tensor, "n channels height width"]
    images: UInt8[Tensor, "n channels height width"]
    seeds: tuple[int, ...]
    label: Int[Tensor, " n"] | None
    evaluations: int
    iterations: tuple[int, ...]
    seconds: float
    certificate: Float[Tensor, " n"]
    repairs: tuple[int, ...]
    beyond_tolerance: tuple[int, ...]
    failures: dict[int, str]
    trace: Float[Tensor, "steps n channels height width"] | None
    passes: tuple[tuple[Pass, ...], ...] | None
    loading: float = 0.0


def together(parts: Sequence[Samples]) -> Samples:
    """Concatenated samples of one model, which several processes drew at the same time."""
    first = parts[0]
    if len(parts) == 1:
        return first
    device = first.x.device
    labels = [part.label.to(device) for part in parts if part.label is not None]
    traces = [part.trace.to(device) for part in parts if part.trace is not None]
    return Samples(
        x=torch.cat([part.x.to(device) for part in parts]),
        images=torch.cat([part.images.to(device) for part in parts]),
        seeds=tuple(seed for part in parts for seed in part.seeds),
        label=torch.cat(labels) if labels else None,
        evaluations=sum(part.evaluations for part in parts),
        iterations=tuple(map(max, zip(*(part.iterations for part in parts), strict=True))),
        seconds=max(part.seconds for part in parts),
        certificate=torch.cat([part.certificate.to(device) for part in parts]),
        repairs=tuple(map(sum, zip(*(part.repairs for part in parts), strict=True))),
        beyond_tolerance=tuple(seed for part in parts for seed in part.beyond_tolerance),
        failures={seed: where for part in parts for seed, where in part.failures.items()},
        trace=torch.cat(traces, dim=1) if traces else None,
        passes=first.passes,
        loading=max(part.loading for part in parts),
    )
