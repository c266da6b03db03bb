"""The report of a comparison: Markdown, one HTML file with its pictures, and JSON.

A likelihood stands in the column of its kind, and columns are never ranked against each other.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from exactflow.comparison import plots as comparison_plots
from exactflow.comparison.comparison import Bench, Result
from exactflow.comparison.protocol import Protocol
from exactflow.core.files import write_atomically
from exactflow.metrics.quality import SHOWN
from exactflow.pictures.figures import image_table
from exactflow.pictures.report import Picture, Table, write_report

KINDS = {"dequantized": "dequantized", "bound": "bound", "estimate": "ODE estimate"}
OFF_ITS_DATA = " †"
GIGA = 1e9


@final
@dataclass(frozen=True)
class Report:
    """A comparison.

    Attributes:
        results: of each model, as `Bench.measure` gives them, in the order asked for.
        floor: training images in the place of samples.
        training: the training split, `ImageDataset.describe()`.
        held_out: the split that was scored.
        levels: grey levels.
        extractor: name of the features.
        distance: name of the distance: "FID" for the published features, else FD and the extractor.
        protocol: amounts that were measured.
        setting: budget, device, threads, versions and further facts.
        grids: the first samples of each model, as grey levels.
        nearest: the nearest training image of each of them.
        failures: reasons, by the names of models that could not be measured.
    """

    results: Sequence[Result]
    floor: Result
    training: Mapping[str, Any]
    held_out: Mapping[str, Any]
    levels: int
    extractor: str
    distance: str
    protocol: Protocol
    setting: Mapping[str, Any]
    grids: Mapping[str, torch.Tensor]
    nearest: Mapping[str, torch.Tensor]
    failures: Mapping[str, str]

    def describe(self) -> dict[str, Any]:
        """Everything but the pictures, JSON-able."""
        return {
            "training": dict(self.training),
            "held_out": dict(self.held_out),
            "extractor": self.extractor,
            "distance": self.distance,
            "protocol": asdict(self.protocol),
            "setting": dict(self.setting),
            "floor": self.floor,
            "failures": dict(self.failures),
            "results": list(self.results),
        }

    def tables(self) -> list[Table]:
        """Cost and likelihood; samples; time and memory."""
        return [self._likelihoods(), self._samples(), self._costs()]

    def markdown(self) -> str:
        """The tables as text, and the pictures that `save` writes."""
        lines = [f"# {self.title}"]
        for table in self.tables():
            rows = [table.header, ["---"] * len(table.header), *table.rows]
            lines += ["", f"## {table.title}", ""]
            lines += ["| " + " | ".join(row) + " |" for row in rows]
            lines += ["", table.note]
        for name, picture in self.pictures().items():
            lines += ["", f"## {picture.title}", "", f"![{picture.title}]({name}.png)"]
            lines += ["", picture.caption]
        return "\n".join(lines) + "\n"

    def summary(self) -> Table:
        """A table that fits a terminal: likelihoods by kind, distance and time of samples."""
        rows = []
        for result in self.results:
            samples = result["samples"]
            costs = (samples.get("frechet"), ".1f"), (samples["seconds_per_sample"], ".2g")
            kinds = self._kinds(result["likelihood"])
            rows.append([result["name"], *kinds, *(_number(*cost) for cost in costs)])
        header = ["model", *KINDS.values(), "FD", "s/sample"]
        note = f"bits/dim by kind; kinds do not compare. FD: {self.distance}."
        if self.failures:
            note += f" Not measured: {', '.join(self.failures)}."
        return Table(self.title, header, rows, note)

    @property
    def title(self) -> str:
        """Title of the report."""
        return f"{len(self.results)} models on {self.held_out['id']}"

    def save(self, folder: Path) -> None:
        """Write report.html, report.md, report.json and the pictures."""
        folder.mkdir(parents=True, exist_ok=True)
        parts: list[Table | Picture] = [*self.tables()[:2]]
        for name, picture in self.pictures().items():
            write_atomically(folder / f"{name}.png", picture.content)
            parts.append(picture)
        parts.append(self.tables()[2])
        write_report(folder / "report.html", self.title, parts, self.setting)
        write_atomically(folder / "report.md", self.markdown().encode())
        described = json.dumps(self.describe(), indent=1) + "\n"
        write_atomically(folder / "report.json", described.encode())

    def pictures(self) -> dict[str, Picture]:
        """Samples side by side, likelihood against time, quality against evaluations, by file."""
        found = {}
        names = [name for name, images in self.grids.items() if len(images) >= SHOWN]
        if names:
            rows = torch.cat([self.grids[name][:SHOWN] for name in names])
            found["samples"] = Picture(
                "Samples from the same seeds",
                image_table(rows, self.levels, names, [""] * SHOWN),
                f"Seeds from {self.protocol.seed} on in a row; only samples that are not finite "
                f"are left out. Models on a path: {self.protocol.evaluations[0]} evaluations.",
            )
            both = [(self.grids[name], self.nearest[name]) for name in names]
            found["nearest"] = Picture(
                "Samples above their nearest training images",
                image_table(
                    torch.cat([images[:SHOWN] for pair in both for images in pair]),
                    self.levels,
                    [text for name in names for text in (name, "nearest")],
                    [""] * SHOWN,
                ),
                f"Nearest in the features {self.extractor}. Copies would show a model that "
                "remembers.",
            )
        if any(result["curve"] for result in self.results):
            found["likelihood"] = Picture(
                "Likelihood in the course of training",
                comparison_plots.likelihoods(self.results, KINDS),
                "One panel for each kind: values of different kinds do not compare. Fewer images "
                "and evaluations than in the table, the same at every point.",
            )
        found["quality"] = Picture(
            f"{self.distance} against the cost of a sample",
            comparison_plots.qualities(self.results, self.floor, self.distance),
            f"Lower is better; {self.protocol.few_samples:,} samples at every point. Flows have "
            "one point; the grey line is training images in the place of samples.",
        )
        return found

    def _likelihoods(self) -> Table:
        rows = []
        for result in self.results:
            training, likelihood = result["training"], result["likelihood"]
            cells = self._kinds(likelihood)
            rows.append(
                [
                    result["name"],
                    f"{result['parameters']:,}",
                    _number(training.get("step_seconds"), ".0f"),
                    _number(training.get("images_seen"), ",.0f"),
                    _number(training.get("flops"), ".2g"),
                    *cells,
                    f"{likelihood['images']:,}" if any(cells) else "none: noisy density",
                ]
            )
        data, split = self.held_out, self.training
        header = ["model", "parameters", "training, s", "images seen", "FLOP", *KINDS.values()]
        protocol = self.protocol
        note = (
            f"bits/dim, lower is better, in the column of its kind; kinds do not compare. ± is the "
            f"standard error over the images in the last column. Dequantized: one uniform draw. "
            f"Bound: {protocol.bound_evaluations} terms of the chain drawn per image. ODE "
            f"estimate: {protocol.ode_solver}, {protocol.ode_steps} steps, one Rademacher probe, "
            f"one uniform draw;{OFF_ITS_DATA}: of a model trained on centred images. "
            f"FLOP: of all training steps, two per multiply-add. Data: "
            f"{data['id']}, version {data['version']}, {data['split']} split of "
            f"{data['count']:,}, fingerprint {data['fingerprint'][:12]}; trained on "
            f"{split['count']:,}, fingerprint {split['fingerprint'][:12]}."
        )
        given = [r["name"] for r in self.results if r["num_classes"]]
        if given:
            note += f" Given the class of the image: {', '.join(given)}."
        for result in self.results:
            if images := result["training"].get("other_images"):
                note += f" {result['name']} was trained on other images of this version: {images}."
        for name, reason in self.failures.items():
            note += f" {name} was not measured: {reason.splitlines()[0]}"
        return Table("Likelihood of held-out images", [*header, "scored"], rows, note)

    @staticmethod
    def _kinds(likelihood: Mapping[str, Any]) -> list[str]:
        """Cells of the columns of kinds: the value in that of its kind, the others empty."""
        if likelihood["bits_per_dim"] is None:
            return [""] * len(KINDS)
        text = f"{likelihood['bits_per_dim']:.3f} ± {likelihood['standard_error']:.3f}"
        mark = OFF_ITS_DATA if likelihood.get("trained_on") == "centred images" else ""
        return [text + mark if likelihood["kind"] == kind else "" for kind in KINDS]

    def _samples(self) -> Table:
        rows = [self._quality("training images", self.floor)]
        for result in self.results:
            rows.append(self._quality(result["name"], result["samples"]))
            for other in result["other_steps"]:
                rows.append(self._quality(f"{result['name']}, {other['evaluations']:.0f}", other))
        header = [
            *("model", "samples", self.distance, "KD", "precision", "recall"),
            *("density", "coverage", "memorised", "passes", "s / sample", "not finite"),
        ]
        note = (
            f"Features: {self.extractor}; compared with all {self.held_out['count']:,} held-out "
            "images. Distances fall with the number of samples: compare rows of the same. KD: "
            "unbiased kernel distance, ± over subsets. Memorised: part of the samples nearer to "
            "a training image than 99 % of the held-out images are. Passes: one after the "
            "other, for a batch; a flow's are each of one block. s / sample: in batches of 64."
        )
        guided = [f"{r['name']} ({r['guidance']:g})" for r in self.results if r["guidance"]]
        if guided:
            note += f" Guided towards the class of the sample: {', '.join(guided)}."
        noisy = [r["name"] for r in self.results if r["likelihood"]["bits_per_dim"] is None]
        if noisy:
            note += f" Trained with Gaussian noise, denoised along the score: {', '.join(noisy)}."
        return Table("Samples", header, rows, note)

    def _quality(self, name: str, found: Mapping[str, Any]) -> list[str]:
        kernel = ""
        if "kernel" in found:
            kernel = f"{found['kernel']:.4f} ± {found['kernel_error']:.4f}"
        return [
            name,
            f"{found['count']:,}",
            _number(found.get("frechet"), ".2f"),
            kernel,
            *(_number(found.get(n), ".3f") for n in ("precision", "recall", "density", "coverage")),
            _number(found.get("memorised"), ".3f"),
            _number(found.get("evaluations"), ",.0f"),
            _number(found.get("seconds_per_sample"), ".4f"),
            _number(found.get("nonfinite"), "d"),
        ]

    def _costs(self) -> Table:
        rows = []
        for result in self.results:
            memory, training = result["memory"], result["training"]
            peaks = [training.get("peak_memory"), memory["scoring"], memory["sampling"]]
            rows.append(
                [
                    result["name"],
                    _number(training.get("flops_per_image"), ".3g"),
                    _number(result["likelihood"]["seconds_per_image"], ".4f"),
                    *(_number(peak and peak / GIGA, ".2f") for peak in peaks),
                ]
            )
        header = ["model", "FLOP / image trained", "s / image scored"]
        header += [f"GB, {name}" for name in ("training", "scoring 64", "sampling 64")]
        note = "Peak memory of the process (of the allocator on a GPU), all that it holds included."
        return Table("Work and memory", header, rows, note)


def report_of(
    bench: Bench,
    results: Sequence[Result],
    setting: Mapping[str, Any],
    failures: Mapping[str, str],
) -> Report:
    """The report of models that were measured on a bench."""
    return Report(
        results=results,
        floor=bench.floor(),
        training=bench.training.describe(),
        held_out=bench.held_out.describe(),
        levels=bench.held_out.levels,
        extractor=bench.extractor.name,
        distance=bench.extractor.distance_name,
        protocol=bench.protocol,
        setting=setting,
        grids={result["name"]: bench.drawn(result["name"], SHOWN) for result in results},
        nearest={
            result["name"]: bench.training.tensors(
                np.array(result["samples"].get("nearest", []), dtype=int)
            )[0]
            for result in results
        },
        failures=failures,
    )


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
