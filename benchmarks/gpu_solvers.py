"""Solvers on one GPU, on weights trained for a minute: a section of gpu.py for each model."""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from baseline import Baseline, from_exactflow
from measure import seconds
from sampling import (
    Limits,
    compare,
    drawn,
    least_seconds,
    plain_side,
    plan_side,
    solver_side,
    train,
)
from tarflow import latents, pictures
from torch import Tensor

from exactflow.core.transform import AutoregressiveTransform, Decoding, Solver
from exactflow.models.tarflow.model import TarFlow, TarFlowConfig
from exactflow.sampling.flow_solvers import Adaptive, Sequential, per_block
from exactflow.sampling.solvers import SOLVERS

LEARNING_RATE = 3e-4
RESERVE = 40.0  # seconds before the section's end when planning stops
OBSERVED = 4  # samples whose convergence is told
Row = dict[str, Any]


@final
@dataclass(frozen=True)
class Trained:
    """A model, its training and its measurements."""

    config: TarFlowConfig
    train_batch: int
    pictures: int  # synthetic ones to draw from
    seconds: float  # of training
    batches: tuple[int, ...] = (1, 64)
    pairs: int = 3
    cap: float = 2.0  # seconds the baseline may take before it is cut to its first tokens


LARGE = (
    Trained(TarFlowConfig((3, 64, 64), 4, 1024, 8, 8, noise_std=0.05), 32, 4096, 60.0),
    Trained(TarFlowConfig((3, 64, 64), 2, 768, 8, 8, noise_std=0.05), 16, 4096, 60.0),
)
TINY = tuple(
    Trained(
        TarFlowConfig((3, 16, 16), patch, 64, 2, 1, noise_std=0.05),
        train_batch=4,
        pictures=16,
        seconds=0.3,
        batches=(1, 2),
        pairs=1,
        cap=0.02,
    )
    for patch in (8, 4)
)


@final
class FirstTokens:
    """A solver that inverts only the first tokens of every block: a shorter measurement."""

    def __init__(self, stop: int, decoding: Decoding | None = None) -> None:
        self.stop, self.decoding = stop, decoding

    @torch.no_grad()
    def __call__(
        self, transform: AutoregressiveTransform, z: Tensor, label: Tensor | None
    ) -> Tensor:
        """Tokens from `stop` on keep their latents."""
        x = z.clone()
        with torch.inference_mode():
            cache = transform.new_cache(x, self.decoding)
            for t in range(self.stop):
                theta = transform.conditioner(x[:, : t + 1], label, cache, start=t)
                x[:, t : t + 1] = transform.conditional.inverse(z[:, t : t + 1], theta)
        return x


def title(config: TarFlowConfig) -> str:
    """The published notation."""
    c = config
    return f"[{c.patch_size}-{c.width}-{c.blocks}-{c.layers_per_block}] at {c.image_shape[1]}"


def section(scale: Trained, device: torch.device, limit: float) -> dict[str, Any]:
    """Train, then time every side within the limit, the most informative ones first."""
    end = time.monotonic() + limit - RESERVE
    torch.manual_seed(0)
    with device:
        model = TarFlow(scale.config)
    images = drawn(pictures(scale.config, scale.pictures, device), scale.train_batch)
    training = train(model, images, LEARNING_RATE, min(scale.seconds, 0.45 * limit))
    model.to(torch.bfloat16)
    limits = device_limits(device)
    found: dict[str, Any] = {
        "model": title(scale.config),
        "training": {**training, "batch": scale.train_batch, "pictures": scale.pictures},
        "limits": dataclasses.asdict(limits),
        "convergence": convergence(model),
        "rows": [],
    }
    groups = [(group, batch) for batch in scale.batches for group in (first_tokens, whole)]
    groups += [(partial(planned, end=end), batch) for batch in scale.batches]
    for group, batch in groups:
        try:
            found["rows"] += group(scale, model, batch, limits)
        except Exception as error:  # what is common to its sides; the other groups go on
            failed = f"{type(error).__name__}: {error}"[:300]
            found["rows"] += completed([{"side": "whole group", "failed": failed}], batch)
        torch.cuda.empty_cache()  # graphs have pools of their own
        print(json.dumps(found), flush=True)  # stands, should the next take too long
    return found


def device_limits(device: torch.device) -> Limits:
    """Measured: a copy, which reads and writes, and a large product in bfloat16."""
    large = device.type == "cuda"
    source, target = torch.ones(2, 2**30 if large else 2**20, dtype=torch.uint8, device=device)
    side = 8192 if large else 256
    square = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    copied = least_seconds(lambda: target.copy_(source), device, 20)
    multiplied = least_seconds(lambda: square @ square, device, 10)
    return Limits(2 * source.nbytes / copied, 2 * side**3 / multiplied)


def convergence(model: TarFlow) -> dict[str, Any]:
    """Passes of each block in generation order, which show how far the weights are from random."""
    z, found = latents(model.config, OBSERVED, model.device), {}
    for name in ("jacobi", "adaptive"):
        side = solver_side(model, per_block(SOLVERS[name](), model), z)
        checked = side.attempt(side.check)
        found[name] = checked[1]["passes"] if checked else side.failed
    return found


def first_tokens(scale: Trained, model: TarFlow, batch: int, limits: Limits) -> list[Row]:
    """The sequential sides on as many tokens of every block as the baseline has time for."""
    z, tokens = latents(model.config, batch, model.device), model.config.num_tokens
    baseline = from_exactflow(model)
    stop = affordable(baseline, z, scale.cap)

    def sequential(decoding: Decoding) -> Callable[[], Tensor]:
        return lambda: model.decode(z, solver=FirstTokens(stop, decoding))

    sides = {
        "baseline": plain_side(lambda: baseline.decode(z.to(model.dtype), stop=stop)),
        "sequential, eager": plain_side(sequential(Decoding())),
        "sequential, graph": plain_side(sequential(Decoding(step="graph"))),
    }
    rows = compare(sides, sequential(Decoding())(), pairs=scale.pairs, at_most=3 * scale.cap)
    floor = limits.floor(model, batch) * (stop - 1) / (tokens - 1)
    return completed(rows, batch, "baseline", floor, f"first {stop} of {tokens}")


def affordable(baseline: Baseline, z: Tensor, cap: float) -> int:
    """How many tokens the baseline inverts in so many seconds, judged by its first ones."""
    tokens = baseline.config.num_tokens
    z, probe = z.to(baseline.variance), min(max(tokens // 16, 2), tokens)
    baseline.decode(z, stop=probe)
    took = seconds(lambda: baseline.decode(z, stop=probe), z.device)
    estimate = took * (tokens - 1) / (probe - 1)
    return tokens if estimate <= cap else max(probe, int(tokens * cap / estimate))


def whole(scale: Trained, model: TarFlow, batch: int, limits: Limits) -> list[Row]:
    """Parallel solvers against the sequential inverse on graphs."""
    z, graph = latents(model.config, batch, model.device), Decoding(step="graph")
    ways: dict[str, Solver] = {
        "sequential, graph": Sequential(graph),
        "adaptive, eager": Adaptive(),
        "adaptive, graph": Adaptive(decoding=Decoding(step="graph")),
    }
    sides = {n: solver_side(model, [way] * len(model.blocks), z) for n, way in ways.items()}
    rows = compare(sides, model.decode(z), pairs=scale.pairs, at_most=3 * scale.cap)
    floor = limits.floor(model, batch)
    return completed(rows, batch, "sequential, graph", floor, "all")


def planned(scale: Trained, model: TarFlow, batch: int, limits: Limits, end: float) -> list[Row]:
    """The plan against the sequential inverse on graphs, if it is made by then."""
    z = latents(model.config, batch, model.device)

    steps = [Sequential(Decoding(step="graph"))] * len(model.blocks)
    sides = {
        "sequential, graph": solver_side(model, steps, z),
        "plan": plan_side(model, [], z, end),
    }
    rows = compare(sides, model.decode(z), pairs=scale.pairs, at_most=3 * scale.cap)
    floor = limits.floor(model, batch)
    return completed(rows[1:], batch, "sequential, graph", floor, "all")


def completed(
    rows: list[Row], batch: int, relative_to: str = "", floor: float = 0.0, what: str = ""
) -> list[Row]:
    """Rows with the fields of their group and the ratio to the floor."""
    common = {"batch": batch, "relative_to": relative_to, "tokens_of_each_block": what}
    for row in rows:
        if "failed" not in row:
            row["over_floor"] = statistics.median(row["seconds"]) / floor
    return [{**common, **row} for row in rows]


def markdown(found: dict[str, Any]) -> list[str]:
    """The section for people."""
    training, limits = found["training"], found["limits"]
    lines = [
        f"Solvers, {found['model']}, network in bfloat16. Trained for {training['seconds']:.0f} s "
        f"in bfloat16 autocast: {training['steps']} steps of {training['batch']} of "
        f"{training['pictures']} synthetic smooth pictures with Gaussian noise 0.05, loss from "
        f"{training['first_loss']:.3f} to {training['loss']:.3f} nats/dim. Copies "
        f"{limits['bandwidth'] / 1e12:.2f} TB/s, multiplies {limits['flops'] / 1e12:.0f} TFLOP/s.",
        "",
    ]
    for name, passes in found["convergence"].items():
        told = passes if isinstance(passes, str) else " + ".join(map(str, passes))
        lines.append(f"- passes of each block, {name}, {OBSERVED} samples: {told}")
    lines += [
        "",
        "| batch | side | tokens of each block | s | times as fast: median (min to max) | as "
        "| × floor | max difference | certificate | passes of each block |",
        "|---" * 10 + "|",
    ]
    return [*lines, *map(line, found["rows"]), ""]


def line(row: Row) -> str:
    """One line of the table; differences are from the sequential inverse, operator by operator."""
    cells = [str(row["batch"]), row["side"], row["tokens_of_each_block"]]
    if "failed" in row:
        told = f"failed: {row['failed']}".replace("|", "/").replace("\n", " ")
        return "| " + " | ".join([*cells, told, *[""] * 6]) + " |"
    ratio, certified = row["ratio"], "certificate" in row
    shown = ["", ""]
    if ratio is not None and row["side"] != row["relative_to"]:
        shown = [f"**{ratio['median']:.2f}** ({ratio['min']:.2f} to {ratio['max']:.2f})"]
        shown.append(row["relative_to"])
    cells += [f"{statistics.median(row['seconds']):.3f}", *shown, f"{row['over_floor']:.1f}"]
    cells += [f"{row['error']:.0e}"]
    cells += [f"{row['certificate']:.0e}" if certified else ""]
    cells += [" + ".join(map(str, row["passes"])) if certified else ""]
    return "| " + " | ".join(cells) + " |"
