"""What each change of TarFlow buys, in bits/dim: at equal images, and at equal seconds.

`python benchmarks/ablation.py --data DATA [--only cifar10] [--equal images] [--seeds 0 1 2]` trains
every row, one after the other, and prints the table of all that has been measured in --out. A
killed one goes on where it was. Seconds mean something on a quiet machine only.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from exactflow.cli.settings import resolve, some
from exactflow.core.serialization import write_json
from exactflow.data import load
from exactflow.metrics.bits_per_dim import evaluate
from exactflow.training import fit
from exactflow.training.budget import Budget, steps_within

IMAGES = 51_200
SECONDS = 300.0
SCORED = 2000  # test images
AFFINE = "model.conditional=[affine]"
MUON = ("training.optimizer=muon", "training.learning_rate=3e-3")
START = "model.start_token=true"
# By set: its folder in DATA, and rows of a name, a preset and the fields that differ from it.
ROWS: dict[str, tuple[str, list[tuple[str, str, tuple[str, ...]]]]] = {
    "fashion-mnist": (
        "fashion-mnist",
        [
            ("plain: affine, AdamW", "affine", ("training.learning_rate=3e-3",)),
            ("affine, Muon", "affine", MUON),
            ("affine, Muon, start token", "affine", (*MUON, START)),
            (
                "affine, triangular, Muon",
                "affine",
                (*MUON, START, "model.conditional=[affine, triangular]"),
            ),
            ("affine, mixture, AdamW", "", ("training.optimizer=adamw",)),
            ("affine, mixture, Muon", "", ()),
            ("mixing, affine, mixture, Muon", "", ("model.mixing=true",)),
        ],
    ),
    "cifar10": (
        "cifar10-jpeg",
        [
            ("plain: affine, AdamW", "affine", ()),
            ("affine, Muon", "affine", MUON),
            ("mixing, affine, Muon", "affine", (*MUON, "model.mixing=true")),
            (
                "affine, mixture, Muon",
                "",
                ("model.conditional=[affine, mixture]", "model.mixing=false"),
            ),
            ("mixing, affine, mixture, Muon", "", ("model.conditional=[affine, mixture]",)),
            ("mixing, channels, affine, mixture, AdamW", "", ("training.optimizer=adamw",)),
            ("mixing, channels, affine, mixture, Muon", "", ()),
        ],
    ),
}


def measured(
    name: str,
    row: tuple[str, str, tuple[str, ...]],
    equal: str,
    seed: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Train one row, and score it; what is in the folder is not measured again."""
    place, _ = ROWS[name]
    title, suffix, words = row
    folder = options.out / name / equal / title.replace(": ", " ").replace(", ", "-") / str(seed)
    kept = folder / "result.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    preset = "-".join(["tarflow", name, "1m", *([suffix] if suffix else [])])
    source = f"data.source={options.data / place}"
    settings = resolve(preset, (*words, source, f"training.seed={seed}"), None)
    training = load(settings.data, "train")
    settings = settings.fitted(training)
    model, config = settings.build(), settings.training
    augmentation = settings.data.augmentation
    steps = IMAGES // config.batch_size
    if equal == "seconds":
        budget = Budget(seconds=SECONDS)
        steps = steps_within(budget, model, training, config, augmentation=augmentation)
    config = replace(config, steps=steps, warmup_steps=steps // 16)
    done = fit(model, training, config, folder / "run", augmentation=augmentation)
    scored = evaluate(model, some(settings.data, "test", SCORED)).likelihood
    result = {
        "parameters": model.num_parameters,
        "images": done.images_seen,
        "seconds": done.step_seconds,
        "bits_per_dim": scored.bits_per_dim,
        "error": scored.standard_error,
        "threads": torch.get_num_threads(),
    }
    write_json(kept, result)
    return result


def line(title: str, results: Sequence[dict[str, Any]]) -> str:
    """One row of the table: mean over seeds, and their standard error or that over images."""
    bits = [result["bits_per_dim"] for result in results]
    error = results[0]["error"]
    if len(bits) > 1:
        error = statistics.stdev(bits) / math.sqrt(len(bits))
    images = statistics.mean(result["images"] for result in results)
    seconds = statistics.mean(result["seconds"] for result in results)
    cells = [
        title,
        f"{results[0]['parameters']:,}",
        f"{images:,.0f}",
        f"{seconds:.0f}",
        str(len(bits)),
        f"{statistics.mean(bits):.3f} ± {error:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--only", choices=tuple(ROWS), nargs="*", default=tuple(ROWS))
    parser.add_argument(
        "--equal", choices=("images", "seconds"), nargs="*", default=("images", "seconds")
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=(0, 1, 2))
    options = parser.parse_args()
    for name, equal in product(options.only, options.equal):
        found: dict[str, list[dict[str, Any]]] = {}
        for seed, row in product(options.seeds, ROWS[name][1]):
            found.setdefault(row[0], []).append(measured(name, row, equal, seed, options))
        print(f"\n{name}, equal {equal}, {torch.get_num_threads()} threads\n")
        print("| recipe | parameters | images | seconds | seeds | bits/dim |")
        print("|---|---|---|---|---|---|")
        print("\n".join(line(title, results) for title, results in found.items()))


if __name__ == "__main__":
    main()
