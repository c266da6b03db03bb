"""Every way to invert a trained TarFlow, against its public formulation, in one run.

`python benchmarks/sampling.py --data DATA [--models MODELS] [--out FILE.json] [--plot FILE.png]`.
Weights are trained, because the convergence of parallel solvers depends on them: models are read
from MODELS, or trained for some minutes and kept there. `--quick` needs no data.
"""

import argparse
import copy
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from baseline import from_exactflow
from measure import hardware, interleaved, ratios, seconds, time_limit
from rich.console import Console
from rich.progress import Progress
from tarflow import latents, machine, pictures
from torch import Tensor, nn

import exactflow
from exactflow.core.randomness import generator
from exactflow.core.serialization import CONFIG_FILE
from exactflow.core.transform import AutoregressiveTransform, Decoding, Solver
from exactflow.data import Augmentation, DataConfig, load, training_batches
from exactflow.models.tarflow.model import TarFlow, TarFlowConfig
from exactflow.nn import compiled
from exactflow.pictures.figures import GREY, RED, colors_of, in_style, new_figure, png_of
from exactflow.pictures.profiles import inversion_plot
from exactflow.sampling.certificate import Certificate
from exactflow.sampling.flow_solvers import Adaptive, Sequential, per_block
from exactflow.sampling.inversion import Inversion
from exactflow.sampling.planner import plan
from exactflow.sampling.solvers import SOLVERS
from exactflow.training.optim import TrainConfig, make_optimizer

CPU = torch.device("cpu")
MODELS = {
    "fashion": TarFlowConfig((1, 28, 28), 2, 128, blocks=4, layers_per_block=2, noise_std=0.1),
    "cifar": TarFlowConfig((3, 32, 32), 2, 128, blocks=4, layers_per_block=4, noise_std=0.1),
}
FOLDERS = {"fashion": "fashion-mnist", "cifar": "cifar10-jpeg"}  # of the data
QUICK = {
    "grey 8x8": TarFlowConfig((1, 8, 8), 2, 64, blocks=2, layers_per_block=1, noise_std=0.1),
    "rgb 8x8": TarFlowConfig((3, 8, 8), 2, 64, blocks=2, layers_per_block=1, noise_std=0.1),
}
QUICK_STEPS = 20
LEARNING_RATE = 2e-3
TRAIN_BATCH = 32
TARGETS = {1: 4.0, 16: 3.0}  # wanted ratios, by batch size
SECONDS = 10.0  # spent at least on one model and batch, with more rounds where all sides are short
SLOW = 20.0  # where a side takes longer, one round has to do
PROFILED = 16  # samples in the picture of the adaptive solver


@final
class InTurn:
    """The k-th solver at the k-th block: what `Inversion` does, without its certificate."""

    def __init__(self, solvers: Sequence[Solver]) -> None:
        self._solvers = iter(solvers)

    def __call__(
        self, transform: AutoregressiveTransform, z: Tensor, label: Tensor | None
    ) -> Tensor:
        """See `Solver`."""
        return next(self._solvers)(transform, z, label)


@final
@dataclass
class Side:
    """One way from latents to images, which may fail without stopping the others.

    Attributes:
        run: what is timed.
        check: called once before, which also warms up; returns the images and facts about them.
        failed: the error, after which nothing is run.
    """

    run: Callable[[], Tensor]
    check: Callable[[], tuple[Tensor, dict[str, Any]]]
    failed: str = field(default="", init=False)

    def attempt(self, action: Callable[[], Any]) -> Any:
        """The action's result; None if it failed, or another did before."""
        if self.failed:
            return None
        try:
            return action()
        except Exception as error:  # whatever it is, the other sides go on
            self.failed = f"{type(error).__name__}: {error}"[:300]
            return None


def plain_side(run: Callable[[], Tensor]) -> Side:
    """A side without facts about its images."""
    return Side(run, lambda: (run(), {}))


def solver_side(
    model: TarFlow, solvers: Sequence[Solver], z: Tensor, certified: bool = False
) -> Side:
    """The model inverted by these solvers, one for each block in generation order."""

    def run() -> Tensor:
        if not certified:
            return model.decode(z, solver=InTurn(solvers))
        x = model.decode(z, solver=Inversion(solvers, range(len(z))))
        Certificate(model)(x, z)  # as `sample` does, the copy in float64 included
        return x

    return Side(run, lambda: examined(model, solvers, z))


def examined(model: TarFlow, solvers: Sequence[Solver], z: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Images and the records of `Inversion`; nothing is repaired."""
    inversion = Inversion(solvers, range(len(z)), tolerance=math.inf)
    x = model.decode(z, solver=inversion)
    return x, {
        "certificate": float(Certificate(model)(x, z).max()),
        "passes": [record.evaluations for record in inversion.records],
        "tokens": [record.tokens for record in inversion.records],
    }


def plan_side(
    model: TarFlow,
    solvers: list[Solver],
    z: Tensor,
    end: float = math.inf,
) -> Side:
    """The model inverted by its plan, which the check makes by `end` and puts into `solvers`."""

    def check() -> tuple[Tensor, dict[str, Any]]:
        began = time.perf_counter()
        with time_limit(end - time.monotonic(), "no time left to plan"):
            chosen = plan(model, len(z))
        took = time.perf_counter() - began
        solvers[:] = chosen.solvers()
        x, facts = examined(model, solvers, z)
        names = [str(block.chosen) for block in chosen.blocks]
        told = {"chosen": names, "seconds": took, "expected_speedup": chosen.speedup}
        return x, {**facts, "plan": told}

    return Side(solver_side(model, solvers, z).run, check)


def compare(
    sides: dict[str, Side],
    reference: Tensor,
    *,
    pairs: int,
    at_least: float = 0.0,
    at_most: float = math.inf,
) -> list[dict[str, Any]]:
    """Check every side, then time all of them in turn: a row for each, relative to the first."""
    device, facts = reference.device, {}
    for name, side in sides.items():
        found = side.attempt(side.check)
        if found is not None:
            error = float((found[0].to(reference) - reference).abs().max())
            facts[name] = {"side": name, "error": error, **found[1]}
    actions = {n: partial(s.attempt, s.run) for n, s in sides.items() if not s.failed}
    took = interleaved(actions, 1, device)
    if max((t for (t,) in took.values()), default=0.0) <= SLOW:
        more = interleaved(actions, pairs - 1, device, at_least=at_least, at_most=at_most)
        took = {name: took[name] + more[name] for name in actions}
    first, rows = next(iter(sides)), []
    for name, side in sides.items():
        if side.failed:
            rows.append({"side": name, "failed": side.failed})
            continue
        ratio = None if sides[first].failed else ratios(took[first], took[name])
        rows.append({**facts[name], "seconds": took[name], "ratio": ratio})
    return rows


@final
@dataclass(frozen=True)
class Limits:
    """What a machine can do at most.

    Attributes:
        bandwidth: bytes read a second, from a buffer as large as a block's matrices.
        flops: floating-point operations a second, in a large matrix product.
    """

    bandwidth: float
    flops: float

    def floor(self, model: TarFlow, batch: int) -> float:
        """Seconds of a sequential inverse that does nothing but read, or multiply by, weights.

        Each of the N - 1 token steps reads every matrix of its block once and takes 2 FLOP per
        weight and sample: the larger of both times. Attention, norms and launches come free.
        """
        elements = matrix_elements(model)
        reading = elements * model.dtype.itemsize / self.bandwidth
        return max(reading, 2 * elements * batch / self.flops) * (model.config.num_tokens - 1)


def matrix_elements(model: TarFlow) -> int:
    """Elements of all weight matrices."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def least_seconds(action: Callable[[], Any], device: torch.device, times: int) -> float:
    """The least seconds of several calls, after one that is not counted."""
    action()
    return min(seconds(action, device) for _ in range(times))


def cpu_limits(model: TarFlow) -> Limits:
    """Bandwidth of summing a buffer (faster than a product with it) and speed of a product."""
    buffer = torch.ones(matrix_elements(model) // len(model.blocks), dtype=model.dtype)
    square = torch.randn(1024, 1024, dtype=model.dtype)
    read = least_seconds(buffer.sum, CPU, 300)
    multiplied = least_seconds(lambda: square @ square, CPU, 10)
    return Limits(buffer.nbytes / read, 2 * len(square) ** 3 / multiplied)


def train(
    model: TarFlow,
    batches: Iterator[Tensor],
    learning_rate: float,
    seconds: float,
    steps: int | None = None,
) -> dict[str, Any]:
    """Train for a number of seconds or steps; the steps, seconds and loss.

    AdamW under bfloat16 autocast; the learning rate rises for a tenth of the run and falls
    linearly to its end.
    """
    config = TrainConfig(learning_rate=learning_rate, precision="bfloat16")
    optimizer = make_optimizer(model.train(), config)
    losses: list[float] = []
    began, done = time.perf_counter(), 0.0
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("training", total=1.0)
        while done < 1:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(10 * done, 1 - done)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(model.device.type, torch.bfloat16):
                loss = model.loss(next(batches)).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm or math.inf)
            optimizer.step()
            losses.append(float(loss.detach()))
            spent = time.perf_counter() - began
            done = len(losses) / steps if steps else spent / seconds
            what = f"training, {losses[-1]:.3f} nats/dim"
            progress.update(task, completed=done, description=what)
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    last = losses[-10:]
    found = {"steps": len(losses), "seconds": spent, "learning_rate": learning_rate}
    return {**found, "first_loss": losses[0], "loss": statistics.mean(last)}


def drawn(images: Tensor, batch: int) -> Iterator[Tensor]:
    """Batches without end, drawn from these images."""
    source = generator(0, "batches")
    while True:
        yield images[torch.randint(len(images), (batch,), generator=source).to(images.device)]


def trained(
    name: str, config: TarFlowConfig, models: Path, data: Path | None, minutes: float
) -> tuple[TarFlow, dict[str, Any]]:
    """The model of that name, read from its folder or trained and saved there, and its origin."""
    folder = models / name
    if (folder / "model" / CONFIG_FILE).is_file():
        model = exactflow.from_pretrained(folder)
        assert isinstance(model, TarFlow)
        return model, {"trained": "before"}
    torch.manual_seed(0)
    model = TarFlow(config)
    if data is None:
        images = drawn(pictures(config, TRAIN_BATCH, CPU), TRAIN_BATCH)
        return model, train(model, images, LEARNING_RATE, 0.0, QUICK_STEPS)
    images = load(DataConfig(str(data / FOLDERS[name])), "train")
    batches = training_batches(
        images, TRAIN_BATCH, seed=0, augmentation=Augmentation(flip=name == "cifar")
    )
    found = train(model, (batch.images for batch in batches), LEARNING_RATE, 60 * minutes)
    model.save_pretrained(folder / "model", card={"training": found, "data": images.describe()})
    return model, found


def run_job(
    model: TarFlow, batch: int, reference: Tensor, limits: Limits, pairs: int, at_least: float
) -> dict[str, Any]:
    """All sides at one batch size; `reference` has the exact images of the first latents."""
    z, count = latents(model.config, batch, CPU), len(model.blocks)
    grown, merged = from_exactflow(model), from_exactflow(model)
    merged.merge_caches()
    sides = {
        "baseline": plain_side(lambda: grown.decode(z)),
        "baseline, merged cache": plain_side(lambda: merged.decode(z)),
        "sequential": solver_side(model, [Sequential()] * count, z),
    }
    if compiled.available():
        steps = [Sequential(Decoding(step="compiled"))] * count
        sides["sequential, compiled"] = solver_side(model, steps, z)
    for name in ("jacobi", "gauss-seidel-jacobi", "selective", "adaptive"):
        sides[name] = solver_side(model, per_block(SOLVERS[name](), model), z)
    planned: list[Solver] = []
    sides["plan"] = plan_side(model, planned, z)
    sides["plan + certificate"] = solver_side(model, planned, z, certified=True)
    rows = compare(sides, reference[:batch], pairs=pairs, at_least=at_least)
    floor = limits.floor(model, batch)
    for row in rows:
        if "failed" not in row:
            row["over_floor"] = statistics.median(row["seconds"]) / floor
    return {"batch": batch, "floor_seconds": floor, "sides": rows}


HEADER = (
    "| model | batch | side | s | baseline / side: median (min to max) | × floor | max error "
    f"| certificate | passes of each block | tokens a sample |\n{'|---' * 10}|"
)


def row(result: dict[str, Any], side: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [result["model"], str(result["batch"]), side["side"]]
    if "failed" in side:
        cells += [f"failed: {side['failed']}".replace("|", "/").replace("\n", " "), *[""] * 6]
        return "| " + " | ".join(cells) + " |"
    ratio, told = side["ratio"], "certificate" in side
    shown = ""
    if ratio is not None and side["side"] != "baseline":
        shown = f"**{ratio['median']:.2f}** ({ratio['min']:.2f} to {ratio['max']:.2f})"
    cells += [
        f"{statistics.median(side['seconds']):.3f}",
        shown,
        f"{side['over_floor']:.1f}",
        f"{side['error']:.0e}",
        f"{side['certificate']:.0e}" if told else "",
        " + ".join(map(str, side["passes"])) if told else "",
        f"{sum(side['tokens']):,}" if told else "",
    ]
    return "| " + " | ".join(cells) + " |"


def remarks(report: dict[str, Any]) -> str:
    """The lines under the table: floors and plans, the machine and its limits."""
    lines = [""]
    for result in report["results"]:
        told = (
            f"- {result['model']} at batch {result['batch']}: floor {result['floor_seconds']:.4f} s"
        )
        for made in (side["plan"] for side in result["sides"] if "plan" in side):
            told += f"; planned in {made['seconds']:.1f} s: {' / '.join(made['chosen'])}"
        lines.append(told)
    for name, found in report["models"].items():
        limits = found["limits"]
        lines.append(
            f"- {name}: reads {limits['bandwidth'] / 1e9:.0f} GB/s, multiplies "
            f"{limits['flops'] / 1e9:.0f} GFLOP/s"
        )
    return "\n".join([*lines, "", machine(report)])


@in_style()
def bars(report: dict[str, Any]) -> bytes:
    """PNG: every side's ratio to the baseline, a panel for each model; dotted: what is wanted."""
    figure = new_figure(9.5, 3.1 * len(report["models"]) + 0.5)
    panels = figure.subplots(len(report["models"]), 1, squeeze=False)[:, 0]
    for axes, name in zip(panels, report["models"], strict=True):
        results = [result for result in report["results"] if result["model"] == name]
        names = [s["side"] for s in results[0]["sides"] if s["side"] != "baseline"]
        width = 0.86 / len(names)
        for index, side in enumerate(names):
            ratio = [next(s for s in r["sides"] if s["side"] == side).get("ratio") for r in results]
            ratio = [found or dict.fromkeys(("median", "min", "max"), math.nan) for found in ratio]
            median, low, high = ([r[key] for r in ratio] for key in ("median", "min", "max"))
            places = [group + (index - (len(names) - 1) / 2) * width for group in range(len(ratio))]
            color = colors_of(len(names))[index]
            tops = axes.bar(places, high, 0.9 * width, color="none")  # labels stand above
            shown = ["failed" if math.isnan(m) else f"{m:.2g}" for m in median]
            axes.bar_label(tops, shown, padding=1, fontsize=7)
            axes.bar(places, median, 0.9 * width, color=color, label=side)
            axes.vlines(places, low, high, color="#444", linewidth=0.8)
        for group, result in enumerate(results):
            wanted = TARGETS.get(result["batch"], math.nan)
            axes.hlines(wanted, group - 0.47, group + 0.47, color=RED, linestyle=":")
        axes.axhline(1, color=GREY, linewidth=0.8)
        axes.set_xticks(range(len(results)), [f"batch {result['batch']}" for result in results])
        axes.set_ylabel("times as fast as the baseline")
        axes.set_title(name)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5)
    return png_of(figure)


def profile(model: TarFlow) -> bytes:
    """PNG: the passes of the adaptive solver."""
    solvers = [Adaptive()] * len(model.blocks)
    inversion = Inversion(solvers, range(PROFILED), observe=True)
    model.decode(latents(model.config, PROFILED, CPU), solver=inversion)
    return inversion_plot([record.passes for record in inversion.records])


def write(path: Path | None, content: bytes) -> None:
    """Write a file and its folder; None writes nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="minute models: checks the machinery")
    parser.add_argument("--data", type=Path, help="folder with fashion-mnist and cifar10-jpeg")
    parser.add_argument(
        "--models", type=Path, default=Path("runs/benchmarks/models"), help="trained, or to be"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, for each model")
    parser.add_argument("--batches", type=int, nargs="+", help="batch sizes")
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--pairs", type=int, default=3, help="measurements of each side")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--out", type=Path, help="write JSON, anew after every batch size")
    parser.add_argument("--plot", type=Path, help="write a picture of the ratios (PNG)")
    parser.add_argument(
        "--profile", type=Path, help="write what adaptive does on the first model (PNG)"
    )
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    batches = options.batches or ([1, 3] if options.quick else [1, 16, 128])
    if options.pairs < 1 or min(batches) < 1:
        parser.error("expected --pairs and --batches of at least 1")
    configs = {n: c for n, c in (QUICK if options.quick else MODELS).items() if options.only in n}
    if not configs:
        parser.error(f"no model contains {options.only!r}")
    kept = [(options.models / name / "model" / CONFIG_FILE).is_file() for name in configs]
    if not (options.quick or options.data or all(kept)):
        parser.error(f"{options.models} lacks models: expected --data to train them on")

    report: dict[str, Any] = {"hardware": {}, "models": {}, "results": []}
    print(HEADER, flush=True)
    for index, (name, config) in enumerate(configs.items()):
        model, origin = trained(name, config, options.models, options.data, options.minutes)
        limits = cpu_limits(model)
        report["models"][name] = {
            "config": dataclasses.asdict(model.config),
            "training": origin,
            "limits": dataclasses.asdict(limits),
        }
        if index == 0 and options.profile:
            write(options.profile, profile(model))
        z = latents(model.config, max(batches), CPU).double()
        reference = copy.deepcopy(model).double().decode(z)
        for batch in batches:
            at_least = 0.0 if options.quick else SECONDS
            found = run_job(model, batch, reference, limits, options.pairs, at_least)
            report["results"].append({"model": name, **found})
            for side in found["sides"]:
                print(row(report["results"][-1], side), flush=True)
            report["hardware"] = hardware(CPU)
            write(options.out, (json.dumps(report, indent=1) + "\n").encode())
    print(remarks(report))
    if options.plot:
        write(options.plot, bars(report))
    return report


if __name__ == "__main__":
    main()
