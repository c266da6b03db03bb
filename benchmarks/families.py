"""Families of flows at equal wall-clock and at equal images: bits/dim, training and sampling speed.

`python benchmarks/families.py --data DATA [--out FILE.json] [--plot FILE.png]`. Models of about the
same size are trained by the library's own `fit`, each by its own recipe; those with a closed form
are fitted. `--table FILE.json` shows what has been measured so far. `--quick` needs no data.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from measure import hardware, interleaved, synchronize
from tarflow import machine
from torch import Tensor

import exactflow
from exactflow.core.config import override
from exactflow.core.density_flow import FittedFlow
from exactflow.core.files import write_atomically
from exactflow.core.model import Flow
from exactflow.data import DataConfig, ImageDataset, load
from exactflow.models import registry
from exactflow.pictures.figures import (
    color_of,
    in_style,
    new_figure,
    plain_logarithms,
    png_of,
)
from exactflow.training import Interrupted, Progress, TrainConfig, fit
from exactflow.training.fitting import fit_closed_form

Result = dict[str, Any]
BENCHMARK = "benchmarks/families.py"


@final
@dataclass(frozen=True)
class Recipe:
    """A model of a family, for every set that it is made for.

    Attributes:
        kind: the family's name in the registry.
        configs: fields of its configuration, by set; image shape and grey levels are the data's.
        common: fields of `TrainConfig`; steps, and by default the warm-up, are the benchmark's.
        special: the same, by set, where a set needs others.
    """

    kind: str
    configs: Mapping[str, Mapping[str, Any]]
    common: Mapping[str, Any]
    special: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def training(self, name: str) -> dict[str, Any]:
        """The fields of `TrainConfig` for the set of that name."""
        return {**self.common, **self.special.get(name, {})}

    def build(self, name: str, shape: tuple[int, int, int], levels: int) -> Flow:
        """A fresh model for the set of that name, always with the same weights."""
        torch.manual_seed(0)
        fields = {"image_shape": shape, "levels": levels, **self.configs[name]}
        model = registry.from_config(self.kind, fields)
        assert isinstance(model, Flow)
        return model


@final
@dataclass(frozen=True)
class Plan:
    """How much is done, for every model alike.

    Attributes:
        minutes: of training.
        first: images after which bits/dim is first measured, and then at every doubling.
        held_out: images scored at the end, at most.
        watched: how many of them are scored on the way.
    """

    minutes: float
    first: int = 4096
    held_out: int = 2000
    watched: int = 500


SETS = {
    "fashion": DataConfig("fashion-mnist"),  # sources are folders of the data, unless built in
    "cifar": DataConfig("cifar10-jpeg", flip=True),
    "digits": DataConfig("digits"),
}
REMARKS = {"cifar": "JPEG-compressed images: bits/dim compare only within this project"}
TARFLOW = {"batch_size": 32, "learning_rate": 3e-3, "weight_decay": 0.01, "ema_decay": 0.998}
TARFLOW_10M = {"patch_size": 4, "width": 256, "blocks": 6, "layers_per_block": 2}
MACOW = {
    "batch_size": 64,
    "learning_rate": 2e-3,
    "betas": (0.9, 0.999),
    "weight_decay": 0.0,
    "clip_norm": 10.0,
    "ema_decay": 0.998,
}
DENSEFLOW = {
    "batch_size": 64,
    "optimizer": "adamax",
    "learning_rate": 5e-3,
    "betas": (0.9, 0.999),
    "weight_decay": 0.0,
}
DEQUANTIZER = {
    "dequantizer_steps": 2,
    "dequantizer_width": 24,
    "dequantizer_depth": 2,
    "dequantizer_growth": 16,
    "context_growth": 16,
}
FITTED = {"batch_size": 1024}
CLOSED_FORM = {  # their size follows from that of the images
    "whitening": Recipe("whitening", {"fashion": {}, "cifar": {}, "digits": {}}, FITTED),
    "gaussianisation": Recipe(
        "gaussianisation",
        {"fashion": {"layers": 2}, "cifar": {"layers": 2}, "digits": {"layers": 2}},
        FITTED,
    ),
}
MODELS: dict[str, dict[str, Recipe]] = {  # by size and name
    "1m": {
        "tarflow": Recipe(
            "tarflow",
            {
                "fashion": {"patch_size": 4, "width": 128, "blocks": 5, "layers_per_block": 1},
                "cifar": {"patch_size": 4, "width": 128, "blocks": 4, "layers_per_block": 1},
            },
            TARFLOW,
            {"fashion": {"learning_rate": 1e-3}},  # 3e-3 overflows after 69,000 images
        ),
        "macow": Recipe(
            "macow",
            {
                "fashion": {"steps": ((1,), (2, 2), (6,)), "hidden": (32, 64, 320)},
                "cifar": {"steps": ((1,), (2, 2), (3,)), "hidden": (24, 64, 208)},
            },
            MACOW,
        ),
        "denseflow": Recipe(
            "denseflow",
            {
                "fashion": {
                    "units": (2, 2),
                    "modules": (3, 4),
                    "widths": (32, 48),
                    "growth": 8,
                    "dense_depth": 2,
                    "dense_growth": 32,
                    "landmarks": 7,
                    **DEQUANTIZER,
                },
                "cifar": {
                    "units": (3, 2, 1),
                    "modules": (3, 3, 6),
                    "widths": (32, 32, 32),
                    "growth": 6,
                    "dense_depth": 2,
                    "dense_growth": 24,
                    **DEQUANTIZER,
                },
            },
            DENSEFLOW,
        ),
        **CLOSED_FORM,
    },
    "10m": {
        "tarflow": Recipe(
            "tarflow",
            {"fashion": TARFLOW_10M, "cifar": TARFLOW_10M},
            {**TARFLOW, "batch_size": 256, "learning_rate": 1e-3},
        ),
        **CLOSED_FORM,
    },
    "quick": {
        "tarflow": Recipe(
            "tarflow",
            {"digits": {"patch_size": 2, "width": 64, "blocks": 2, "layers_per_block": 1}},
            TARFLOW,
        ),
        **CLOSED_FORM,
    },
}
QUICK = Plan(minutes=1 / 60, first=256, held_out=100, watched=50)
MINUTES = {"cpu": 10.0, "cuda": 1.0}  # of training, for each model
SAMPLES = 16
SAMPLING_SECONDS = 30.0  # after which no further round of sampling starts
MARK = 5  # steps of a calibration's warm-up, and between its readings of the clock
CALIBRATED = 25  # the step at which it ends
RUN = ("set", "size", "device", "threads", "minutes")  # what comparable results have in common


@final
@dataclass
class Watch:
    """Callback of `fit`: seconds of training alone, and bits/dim at `first`, 2 `first`, ...

    Attributes:
        device: where the model is.
        images: what is scored on the way; None: only the time is taken.
        first: images after which bits/dim is first measured.
        seconds: of training, up to the last call.
        marks: the same by steps done.
        curve: what was measured.
    """

    device: torch.device
    images: Tensor | None = None
    first: int = 1
    seconds: float = 0.0
    marks: dict[int, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)

    def __call__(self, progress: Progress) -> Mapping[str, float]:
        """Stop the clock, measure what is due, and start it again."""
        synchronize(self.device)
        self.seconds += time.perf_counter() - self._since
        self.marks[progress.step] = self.seconds
        doublings, rest = divmod(progress.images_seen, self.first)
        if self.images is not None and rest == 0 and doublings.bit_count() == 1:
            assert isinstance(progress.model, Flow)
            found = exactflow.log_likelihood(progress.model, self.images)
            self.curve.append(point(progress.images_seen, self.seconds, found.bits_per_dim))
        synchronize(self.device)
        self._since = time.perf_counter()
        return {}


def point(images: int, seconds: float, bits_per_dim: float) -> dict[str, float]:
    """One point of a curve."""
    return {"images": images, "seconds": seconds, "bits_per_dim": bits_per_dim}


@final
@dataclass(frozen=True)
class Case:
    """A recipe on a data set, with the device that trains it."""

    recipe: Recipe
    name: str
    training: ImageDataset
    held_out: ImageDataset
    device: torch.device

    def build(self) -> Flow:
        """A fresh model."""
        shape, levels = self.training.event_shape, self.training.levels
        return self.recipe.build(self.name, shape, levels).to(self.device)

    def scored(self, count: int) -> Tensor:
        """The first held-out images."""
        return torch.as_tensor(np.array(self.held_out.images[:count]))


def train(case: Case, plan: Plan) -> tuple[Flow, Result]:
    """Train for as many steps as the time allows; a calibration, not counted, gives the speed."""
    batch = override(TrainConfig(), case.recipe.training(case.name)).batch_size
    if plan.first % batch:
        raise ValueError(f"expected a batch size that divides {plan.first}, got {batch}")
    calibration = Watch(case.device)
    take_steps(case, CALIBRATED + 1, calibration, MARK, progress=False)  # the last writes files
    took = calibration.marks[CALIBRATED] - calibration.marks[MARK]
    step = took / (CALIBRATED - MARK)
    steps = max(1, round(60 * plan.minutes / step))
    say(f"{step:.3f} s a step: {steps:,} steps of {batch} images")
    watch = Watch(case.device, case.scored(plan.watched), plan.first)
    model = take_steps(case, steps, watch, plan.first // batch, progress=True)
    facts = {"steps": steps, "images": steps * batch, "calibrated_step_seconds": step}
    return model, {**facts, "seconds": watch.seconds, "curve": watch.curve}


def take_steps(case: Case, steps: int, watch: Watch, every: int, progress: bool) -> Flow:
    """Train a fresh model for a number of steps; no file of the run is kept."""
    model = case.build()
    fields = {"warmup_steps": steps // 10, "checkpoint_every": steps, "log_every": 50}
    with tempfile.TemporaryDirectory() as folder:
        fit(
            model,
            case.training,
            override(TrainConfig(), {**fields, **case.recipe.training(case.name), "steps": steps}),
            folder,
            augmentation=SETS[case.name].augmentation,
            every={every: watch},
            progress=progress,
        )
    return model


def fit_at_once(case: Case, model: FittedFlow) -> Result:
    """Fit the model in closed form; its images and seconds."""
    config = override(TrainConfig(), case.recipe.training(case.name))
    augmentation = SETS[case.name].augmentation
    with tempfile.TemporaryDirectory() as folder:
        found = fit_closed_form(model, case.training, config, folder, augmentation=augmentation)
    return {"images": found.images_seen, "seconds": found.seconds, "curve": []}


def measure(case: Case, plan: Plan) -> Result:
    """Train or fit, score, sample."""
    model = case.build()
    fitted = isinstance(model, FittedFlow)
    if fitted:
        facts = fit_at_once(case, model)
    else:
        model, facts = train(case, plan)
    scored = case.scored(plan.held_out)
    found = exactflow.log_likelihood(model, scored, progress=sys.stderr.isatty())
    curve = facts["curve"]
    if not fitted and (not curve or curve[-1]["images"] < facts["images"]):
        end = float(found.per_image[: plan.watched].mean())  # same images, same noise as before
        curve.append(point(facts["images"], facts["seconds"], end))
    score = {"bits_per_dim": found.bits_per_dim, "standard_error": found.standard_error}
    return {
        "parameters": model.num_parameters,
        "fitted": fitted,
        **facts,
        "score": {"kind": found.kind, "k": found.k, "images": len(scored), **score},
        "sampling": sampling(model, case.device),
        "data": {"training": case.training.describe(), "held_out": case.held_out.describe()},
        "hardware": hardware(case.device),
    }


def sampling(model: Flow, device: torch.device) -> Result:
    """Seconds of sampling with the default solver, and the solver's own report."""

    def draw() -> exactflow.Samples:
        return exactflow.sample(
            model, SAMPLES, options=exactflow.SamplingOptions(on_nonfinite="omit")
        )

    samples = draw()  # warms up
    took = interleaved({"draw": draw}, 3, device, at_most=SAMPLING_SECONDS)["draw"]
    certificate = max(samples.certificate.tolist(), default=math.nan)
    return {
        "samples": SAMPLES,
        "nonfinite": len(samples.failures),
        "seconds": took,
        "evaluations": samples.evaluations,
        "certificate": certificate if math.isfinite(certificate) else None,
    }


def identity(recipe: Recipe, name: str, plan: Plan) -> Result:
    """What a result depends on besides its run, in the form that JSON returns."""
    fields = {
        "kind": recipe.kind,
        "config": recipe.configs[name],
        "training": recipe.training(name),
    }
    return json.loads(json.dumps({**fields, "plan": dataclasses.asdict(plan)}))


def attempt(case: Case, plan: Plan) -> Result:
    """The result of `measure`, or its error, so that the other models are still measured."""
    try:
        return measure(case, plan)
    except Interrupted:
        raise
    except Exception as error:
        say(f"failed: {error}")
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def read(path: Path | None) -> list[Result]:
    """The results in a file; none where there is no file. Exits where it holds something else."""
    if path is None or not path.is_file():
        return []
    found = json.loads(path.read_text())
    if found.get("benchmark") != BENCHMARK:
        raise SystemExit(f"expected results of {BENCHMARK} in {path}, got another file")
    return found["results"]


def run_of(result: Result) -> tuple[Any, ...]:
    """The fields that results must share to be compared."""
    return tuple(result[name] for name in RUN)


def same(first: Result, second: Result) -> bool:
    """Whether these are of the same model and run."""
    return (run_of(first), first["model"]) == (run_of(second), second["model"])


HEADER = (
    "| model | kind | parameters | bits/dim | training, s | images | images/s | {} "
    f"| sampling, s/image | evaluations | certificate | not finite |\n{'|---' * 12}|"
)


def table(results: Sequence[Result]) -> str:
    """Markdown of one run, grouped by kind; numbers compare within a column and kind."""
    done = [result for result in results if "failed" not in result]
    done.sort(key=lambda r: (r["score"]["kind"], r["score"]["k"], r["score"]["bits_per_dim"]))
    equal = equal_images(done)
    lines = [HEADER.format(f"bits/dim at {equal:,} images" if equal else "bits/dim, equal images")]
    lines += [row(result, equal) for result in done]
    for result in results:
        if "failed" in result:
            text = result["failed"].replace("|", "/").replace("\n", " ")
            lines.append(f"| {result['model']} | failed: {text} {'|' * 11}")
    return "\n".join([*lines, "", *remarks(done)])


def equal_images(results: Sequence[Result]) -> int:
    """The most images at which all trained models were measured on the way; 0 if there is none."""
    counts = [
        {p["images"] for p in result["curve"] if p["images"] < result["images"]}
        for result in results
        if not result["fitted"]
    ]
    return max(set.intersection(*counts), default=0) if counts else 0


def row(result: Result, equal: int) -> str:
    """One line of the table."""
    score, drawn = result["score"], result["sampling"]
    then = [p["bits_per_dim"] for p in result["curve"] if p["images"] == equal]
    certificate = drawn["certificate"]
    cells = [
        result["model"],
        kind_of(result),
        f"{result['parameters']:,}",
        f"{score['bits_per_dim']:.3f} ± {score['standard_error']:.3f}",
        f"{result['seconds']:.1f}",
        f"{result['images']:,}",
        f"{result['images'] / result['seconds']:,.0f}",
        f"{then[0]:.3f}" if then else "",
        f"{statistics.median(drawn['seconds']) / drawn['samples']:.4f}",
        f"{drawn['evaluations']:,}",
        "" if certificate is None else f"{certificate:.0e}",
        f"{drawn['nonfinite']} of {drawn['samples']}",
    ]
    return "| " + " | ".join(cells) + " |"


def kind_of(result: Result) -> str:
    """The likelihood's kind, with its number of draws."""
    return f"{result['score']['kind']}, k = {result['score']['k']}"


def remarks(done: Sequence[Result]) -> list[str]:
    """The lines under a table: protocol, data, machines."""
    if not done:
        return []
    first = done[0]
    told = [
        f"- Training stops after about {first['minutes']:.2g} minutes, at the end of a cosine made "
        "for that time: its seconds leave out calibration and scoring. Seconds of a fit are all of "
        "it, its images count once for each pass.",
        "- Kinds are not compared with each other. ± is the standard error over images. bits/dim "
        f"at equal images is of the first {first['identity']['plan']['watched']} held-out images, "
        "before the cosine's end.",
        f"- Sampling: {first['sampling']['samples']} samples, default solver; in the last column "
        "those that overflow.",
    ]
    for data in distinct(result["data"] for result in done):
        kinds = ("training", "held_out")
        named = "; ".join(
            "{split}: {count:,} images, {fingerprint:.12}".format(**data[kind]) for kind in kinds
        )
        told.append(f"- {data['training']['id']}, version {data['training']['version']}; {named}.")
    if first["set"] in REMARKS:
        told.append(f"- {REMARKS[first['set']]}.")
    loads, machines = [], []
    for result in done:
        found = dict(result["hardware"])
        loads.append(f"{result['model']} {found.pop('date')}, {found.pop('load at the end')}")
        machines.append(f"- {machine({'hardware': found})}.")
    return [*told, *distinct(machines), f"- Date, and load average at the end: {'; '.join(loads)}."]


def distinct(values: Iterable[Any]) -> list[Any]:
    """In order, each once."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def runs(results: Sequence[Result]) -> list[list[Result]]:
    """The results of each run."""
    return [list(group) for _, group in groupby(sorted(results, key=run_of), run_of)]


def title(results: Sequence[Result]) -> str:
    """Heading of a run."""
    run = results[0]
    threads = f", {run['threads']} threads" if run["device"] == "cpu" else ""
    return f"{run['set']}, {run['size']}, {run['minutes']:.2g} min, {run['device']}{threads}"


@in_style()
def picture(results: Sequence[Result]) -> bytes:
    """PNG, two panels for each run: bits/dim against training seconds and against images."""
    groups = runs([result for result in results if "failed" not in result])
    names = distinct(result["model"] for result in results)
    colors = {name: color_of(index) for index, name in enumerate(names)}
    figure = new_figure(10, 3.6 * len(groups))
    for panels, group in zip(figure.subplots(len(groups), 2, squeeze=False), groups, strict=True):
        for axes, along in zip(panels, ("seconds", "images"), strict=True):
            for result in group:
                label = f"{result['model']} ({kind_of(result)})"
                style: dict[str, Any] = {"color": colors[result["model"]], "label": label}
                if result["fitted"]:
                    axes.axhline(result["score"]["bits_per_dim"], linestyle="--", **style)
                    continue
                x, y = ([p[name] for p in result["curve"]] for name in (along, "bits_per_dim"))
                axes.plot(x, y, marker="o", **style)
            axes.set_xlabel(f"training {along}")
            axes.set_ylabel("bits / dim")
            axes.set_xscale("log")
            plain_logarithms(axes.xaxis)
            axes.set_title(title(group))
        panels[1].legend(frameon=True)
    return png_of(figure)


def show(results: Sequence[Result], plot: Path | None) -> None:
    """Tables on stdout, and the picture."""
    for group in runs(results):
        print(f"## {title(group)}\n\n{table(group)}\n", flush=True)
    if plot is not None:
        write(plot, picture(results))


def write(path: Path, content: bytes) -> None:
    """Write a file and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def say(text: str) -> None:
    """Print progress to stderr."""
    print(f"# {text}", file=sys.stderr, flush=True)


def data_of(name: str, folder: Path | None, plan: Plan) -> tuple[ImageDataset, ImageDataset]:
    """Training images, and those held out."""
    config = SETS[name]
    if folder is not None and (folder / config.source).is_dir():
        config = dataclasses.replace(config, source=str(folder / config.source))
    return load(config, "train"), load(dataclasses.replace(config, limit=plan.held_out), "test")


def run_all(
    recipes: Mapping[str, Recipe],
    names: Sequence[str],
    run: Result,
    plan: Plan,
    data: Path | None,
    out: Path | None,
    again: bool,
) -> list[Result]:
    """Measure what is missing in `out`, set by set; each result is written at once."""
    results = read(out)
    for name in names:
        images = None
        for model, recipe in recipes.items():
            told = {"model": model, **run, "set": name, "identity": identity(recipe, name, plan)}
            before = next((result for result in results if same(result, told)), {"failed": ""})
            if not again and "failed" not in before and before["identity"] == told["identity"]:
                say(f"{model} on {name}: there")
                continue
            say(f"{model} on {name}")
            images = images or data_of(name, data, plan)
            case = Case(recipe, name, *images, torch.device(run["device"]))
            new = {**told, **attempt(case, plan)}
            # Another process may have written since.
            results = [r for r in (results if out is None else read(out)) if not same(r, new)]
            results.append(new)
            if out is not None:
                told = {"benchmark": BENCHMARK, "results": results}
                write(out, (json.dumps(told, indent=1) + "\n").encode())
    return results


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    found = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    found.add_argument("--data", type=Path, help="folder with fashion-mnist and cifar10-jpeg")
    found.add_argument("--only", nargs="+", help="models (default: all)")
    found.add_argument("--sets", nargs="+", choices=("fashion", "cifar"), help="default: both")
    found.add_argument("--size", choices=("1m", "10m"), default="1m", help="parameters, about")
    found.add_argument("--minutes", type=float, help="of training, for each model")
    found.add_argument("--device", default="cpu", choices=tuple(MINUTES))
    found.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    found.add_argument("--out", type=Path, help="JSON: kept, and what it lacks is added")
    found.add_argument("--again", action="store_true", help="measure also what --out has")
    found.add_argument("--plot", type=Path, help="write a picture of the curves (PNG)")
    found.add_argument("--table", type=Path, help="only show the results in this file")
    found.add_argument("--quick", action="store_true", help="tiny models: checks the machinery")
    return found


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """The command line."""
    options = parser().parse_args(arguments)
    if options.table is not None:
        results = read(options.table)
        if not results:
            parser().error(f"no results in {options.table}")
        show(results, options.plot)
        return results
    if not (options.quick or options.data):
        parser().error("expected --data, a folder with fashion-mnist and cifar10-jpeg")
    if options.threads:
        torch.set_num_threads(options.threads)
    size = "quick" if options.quick else options.size
    names = ["digits"] if options.quick else options.sets or ["fashion", "cifar"]
    recipes = MODELS[size]
    unknown = set(options.only or ()) - set(recipes)
    if unknown:
        parser().error(f"expected --only of {', '.join(recipes)}, got {', '.join(unknown)}")
    recipes = {name: recipes[name] for name in options.only or recipes}
    plan = QUICK if options.quick else Plan(options.minutes or MINUTES[options.device])
    run = {
        "size": size,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "minutes": plan.minutes,
    }
    results = run_all(recipes, names, run, plan, options.data, options.out, options.again)
    show(results, options.plot)
    return results


if __name__ == "__main__":
    main()
