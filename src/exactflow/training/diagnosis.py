"""Find where a step is not finite: evaluate the batch once more, stage by stage, and keep it."""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from exactflow.core.files import write_atomically
from exactflow.core.model import GenerativeModel
from exactflow.core.transform import AutoregressiveTransform

_MAX_NAMES = 5  # parameters listed before "and N more"


@final
@dataclass(frozen=True)
class Range:
    """The least and the greatest finite number of a tensor, and how many are not finite."""

    low: float
    high: float
    non_finite: int

    @classmethod
    def of(cls, values: Tensor) -> "Range":
        """The range of `values`; (nan, nan) where nothing is finite."""
        finite = values[values.isfinite()].double()
        lost = values.numel() - finite.numel()
        if finite.numel() == 0:
            return cls(float("nan"), float("nan"), lost)
        return cls(float(finite.min()), float(finite.max()), lost)

    def __str__(self) -> str:
        text = f"{self.low:.4g} .. {self.high:.4g}"
        return f"{text} and {self.non_finite} not finite" if self.non_finite else text


@final
@dataclass(frozen=True)
class StageReport:
    """Ranges of one stage's values on the batch.

    Attributes:
        name: place and class of the stage.
        latent: range of its first floating-point output.
        theta: ranges of the parameters of an autoregressive transform's conditional, by name; empty
            for any other stage.
        finite_input: whether all its inputs were finite.
        finite_output: whether all its outputs were.
    """

    name: str
    latent: Range
    theta: Mapping[str, Range]
    finite_input: bool
    finite_output: bool

    def __str__(self) -> str:
        theta = "".join(f", {name} {values}" for name, values in self.theta.items())
        return f"{self.name}: latent {self.latent}{theta}"


def diagnose(model: GenerativeModel, rerun: Callable[[int], Tensor], parts: int) -> str | None:
    """Report where the first NaN or infinity of a step arises; None if there is none.

    Every micro-batch is evaluated forward and backward, whatever is found before: other processes,
    which share statistics of the batch, do the same.

    Args:
        model: as it was before the step; its gradients are overwritten.
        rerun: the mean loss of micro-batch 0 .. parts-1, exactly as the step computed it.
        parts: number of micro-batches.
    """
    found = None
    with torch.compiler.set_stance("force_eager"), torch.enable_grad():
        for part in range(parts):
            reports: list[StageReport] = []
            model.zero_grad(set_to_none=True)
            with _observed(model, reports):
                loss = rerun(part)
                loss.backward()
            found = found or _finding(model, reports, loss)
    return found


def _finding(model: GenerativeModel, reports: list[StageReport], loss: Tensor) -> str | None:
    """Report what is not finite in a micro-batch; None if everything is."""
    text = "\n".join(f"  {report}" for report in reports)
    if not (bool(loss.isfinite()) and all(r.finite_output for r in reports)):
        return f"{_blame_forward(model, reports)}\n{text}"
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    broken = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    if broken:
        names = _enumerate(broken)
        return f"The forward pass is finite; gradients that are not: {names}.\n{text}"
    return None


def save_batch(path: Path, images: Tensor, labels: Tensor | None, step: int, seed: int) -> None:
    """Keep the batch of a step; `torch.load(path, weights_only=True)` gives it back as a dict.

    With the run's last checkpoint before `step`, this is all it takes to repeat the step.
    """
    buffer = io.BytesIO()
    torch.save({"images": images, "labels": labels, "step": step, "seed": seed}, buffer)
    write_atomically(path, buffer.getvalue())


@contextmanager
def _observed(model: GenerativeModel, reports: list[StageReport]) -> Iterator[None]:
    """Append a report for every stage evaluated inside, in the order of evaluation."""
    handles = [
        stage.register_forward_hook(_observer(f"stage {index}", reports), with_kwargs=True)
        for index, stage in enumerate(model.stages)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observer(name: str, reports: list[StageReport]) -> Callable[..., None]:
    @torch.no_grad()
    def observe(
        stage: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        given, returned = _floats((*args, *kwargs.values())), _floats(output)
        if not returned:
            return
        theta = {}
        if isinstance(stage, AutoregressiveTransform):
            named = stage.conditional.named(stage.conditioner(*args, **kwargs))
            theta = {name: Range.of(values) for name, values in named.items()}
        reports.append(
            StageReport(
                name=f"{name} ({type(stage).__name__})",
                latent=Range.of(returned[0]),
                theta=theta,
                finite_input=all(bool(t.isfinite().all()) for t in given),
                finite_output=all(bool(t.isfinite().all()) for t in returned),
            )
        )

    return observe


def _floats(value: Any) -> list[Tensor]:
    """The floating-point tensors of a stage's arguments or result."""
    values = value if isinstance(value, tuple) else (value,)
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _blame_forward(model: GenerativeModel, reports: list[StageReport]) -> str:
    """Name the first stage with an output that is not finite, and parameters that are not."""
    first = next((report for report in reports if not report.finite_output), None)
    if first is None:
        text = "Every stage is finite, the loss is not."
    elif first.finite_input:
        text = f"The first output that is not finite is that of {first.name}."
    else:
        text = f"The input of {first.name} is already not finite."
    broken = [n for n, p in model.named_parameters() if not bool(p.isfinite().all())]
    return f"{text} Parameters that are not finite: {_enumerate(broken)}." if broken else text


def _enumerate(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES])
    return f"{shown} and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else shown
