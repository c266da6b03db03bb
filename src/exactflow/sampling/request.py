"""Arguments of `sample`, and the result of one batch, for every kind of model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from jaxtyping import Float, Int
from torch import Tensor

from exactflow.core.model import GenerativeModel
from exactflow.core.shapes import PerSample
from exactflow.sampling.denoiser import ClassifierGuidance
from exactflow.sampling.guidance import Guidance
from exactflow.sampling.inversion import BlockRecord
from exactflow.sampling.nonfinite import OnNonFinite


@final
@dataclass(frozen=True, eq=False)
class SamplingOptions:
    """Rarely used arguments of `sample`; an option without meaning for the model is an error.

    Attributes:
        temperature: of a flow, factor on the prior's standard deviation.
        denoise: of a flow, one step of score denoising; None: for models trained with Gaussian
            noise.
        low: of an upsampler, the small images in [-1, 1] that it enlarges, one per sample.
        trace: of a flow, keep the images between blocks.
        profile: of a flow, keep a record of every pass.
        on_nonfinite: a NaN or an infinity is an error ("raise"), or the sample is left out and
            reported ("omit").
        progress: show a bar.
    """

    temperature: float = 1.0
    denoise: bool | None = None
    low: Float[Tensor, "n channels low_height low_width"] | None = None
    trace: bool = False
    profile: bool = False
    on_nonfinite: OnNonFinite = "raise"
    progress: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for a temperature below 0 and for an unknown rule."""
        if not self.temperature >= 0:
            raise ValueError(f"expected temperature >= 0, got {self.temperature}")
        if self.on_nonfinite not in ("raise", "omit"):
            raise ValueError(f"expected on_nonfinite 'raise' or 'omit', got {self.on_nonfinite!r}")

    def refuse(self, *names: str) -> None:
        """Raise ValueError for the first of these options that differs from its default."""
        usual = SamplingOptions()
        for name in names:
            given = getattr(self, name)
            if given is not getattr(usual, name) and given != getattr(usual, name):
                raise ValueError(f"{name} has no meaning for this model")


@final
@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of `sample`, checked as far as they can be for any model."""

    model: GenerativeModel
    n: int
    label: Int[Tensor, " n"] | None
    seed: int
    solver: Any
    guidance: float | Guidance | ClassifierGuidance
    batch_size: int
    options: SamplingOptions

    @property
    def batches(self) -> list[range]:
        """Samples of each batch, as numbers 0 .. n - 1."""
        size = self.batch_size
        return [range(first, min(first + size, self.n)) for first in range(0, self.n, size)]

    def seeds(self, rows: range) -> range:
        """Seeds of these samples."""
        return range(self.seed + rows.start, self.seed + rows.stop)

    def labels(self, rows: range) -> Tensor | None:
        """Classes of these samples."""
        return None if self.label is None else self.label[rows.start : rows.stop]

    def part(self, rows: range, progress: bool) -> "Request":
        """The request for these samples alone."""
        low = self.options.low
        low = None if low is None else low[rows.start : rows.stop]
        return replace(
            self,
            n=len(rows),
            label=self.labels(rows),
            seed=self.seed + rows.start,
            options=replace(self.options, low=low, progress=progress),
        )


@final
@dataclass(frozen=True, eq=False)
class DrawnBatch:
    """Samples of one batch.

    Attributes:
        images: intermediate steps, the result last; without `trace` the result alone.
        evaluations: network passes.
        failures: seed -> place, of samples that are not finite.
        certificate: see `Samples.certificate`.
        records: of every autoregressive block.
    """

    images: Float[Tensor, "steps batch channels height width"]
    evaluations: int
    failures: dict[int, str]
    certificate: PerSample
    records: Sequence[BlockRecord] = ()


class Sampler(ABC):
    """An algorithm that draws the batches of a request, for one kind of model.

    Attributes:
        grey_levels: the model's map from images to grey levels.
        steps: of a batch, for the progress bar.
        limit: certificate above which a sample is beyond its tolerance.
    """

    grey_levels: Callable[[Tensor], Tensor]
    steps: int
    limit: float

    @abstractmethod
    def draw(self, rows: range, advance: Callable[[int], None]) -> DrawnBatch:
        """Draw these samples; call `advance` with the number of steps done."""
