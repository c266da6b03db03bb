"""DPM-Solver++(2M): a multistep solver of the probability flow in log-SNR.

Lu et al., DPM-Solver++, arXiv 2211.01095, algorithm 2. With l = ln(alpha / sigma) and D the data
expected behind x, the flow is exactly

    x_t = sigma_t / sigma_s x_s + sigma_t * (integral from l_s to l_t of e^l D dl),

and a step takes D as what the last two evaluations say of the middle of the step.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from exactflow.paths.path import Path
from exactflow.paths.path_model import PathModel


@final
@dataclass(frozen=True)
class MultistepSolution:
    """What `dpm_solver` found.

    Attributes:
        x: points at the last time.
        evaluations: how often the model was evaluated, each time for the whole batch.
    """

    x: Float[Tensor, "batch channels height width"]
    evaluations: int


@torch.no_grad()
def dpm_solver(
    model: PathModel,
    x: Float[Tensor, "batch channels height width"],
    times: Sequence[float],
    label: Int[Tensor, " batch"] | None = None,
) -> MultistepSolution:
    """Follow the probability flow along `times`, one evaluation per step.

    Every sample is computed by itself. The first and the last step are of first order: before the
    first nothing is known, and the last may end without noise, infinitely far in log-SNR.

    Args:
        model: any model on a path.
        x: points at the first of `times`.
        times: rising library times, from noise to data; see `log_snr_times` and `edm_times`.
        label: class of each sample; None for a dropped label.

    Raises:
        ValueError: fewer than two times, or times that do not rise within [0, 1].
    """
    pairs = list(itertools.pairwise(times))
    if not pairs or not all(0 <= s < t <= 1 for s, t in pairs):
        raise ValueError(f"expected at least two times, rising in [0, 1], got {list(times)}")
    places = model.path.at(torch.tensor(times, dtype=torch.float64))
    alpha, sigma = places.alpha.tolist(), places.sigma.tolist()
    half_log_snr = (places.log_snr / 2).tolist()
    before: Tensor | None = None  # the previous evaluation
    for i, t in enumerate(times[:-1]):
        now = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        data = model.denoise(x, now, label).mean
        step = half_log_snr[i + 1] - half_log_snr[i]
        middle = data
        if before is not None and i < len(pairs) - 1:
            reach = step / (2 * (half_log_snr[i] - half_log_snr[i - 1]))
            middle = torch.lerp(before, data, 1 + reach)
        x = (sigma[i + 1] / sigma[i]) * x - alpha[i + 1] * math.expm1(-step) * middle
        before = data
    return MultistepSolution(x, len(pairs))


def log_snr_times(path: Path, steps: int, span: tuple[float, float] | None = None) -> list[float]:
    """steps + 1 library times at equal distances in log-SNR.

    Args:
        path: where the times are on.
        steps: at least 1.
        span: first and last time, where the log-SNR is finite; None: the path's own span.

    Raises:
        ValueError: no step, or an end of infinite log-SNR.
    """
    first, last = path.span if span is None else span
    ends = path.at(torch.tensor([first, last], dtype=torch.float64)).log_snr
    if steps < 1 or not bool(ends.isfinite().all()):
        raise ValueError(
            "expected at least one step between times of finite log-SNR, "
            f"got {steps} steps from {first} to {last} with log-SNR {ends.tolist()}"
        )
    inner = torch.linspace(float(ends[0]), float(ends[1]), steps + 1, dtype=torch.float64)[1:-1]
    return [first, *path.time_of(inner).tolist(), last]
