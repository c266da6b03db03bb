"""What each change of TarFlow gains in bits/dim, at equal images and at equal seconds.

`python benchmarks/ablation.py --data DATA [--only cifar10] [--equal images] [--seeds 0 1 2]` times
the steps of every row first, trains the rows one after the other, and prints the table of all
results in --out. The same command continues after a kill. Only the timing (two minutes) needs a
quiet machine: from it follows how many steps a row may take at equal seconds.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from exactflow.cli.settings import resolve, some
from exactflow.core.files import write_json
from exactflow.core.model import GenerativeModel
from exactflow.data import ImageDataset, load
from exactflow.metrics.bits_per_dim import evaluate
from exactflow.nn import transformer
from exactflow.training import fit
from exactflow.training.budget import seconds_per_step
from exactflow.training.settings import Settings

SCORED = 2000  # test images
AFFINE = "model.conditional=[affine]"
MUON = ("training.optimizer=muon", "training.learning_rate=3e-3")
START = "model.start_token=true"


def as_built(model: GenerativeModel) -> AbstractContextManager[None]:
    """The network as it is."""
    return nullcontext()


def zero_projections(model: GenerativeModel) -> AbstractContextManager[None]:
    """Initialise each layer so that its residual branches are zero."""
    for layer in model.modules():
        if isinstance(layer, transformer.TransformerLayer):
            for last in (layer.proj, layer.contract):
                torch.nn.init.zeros_(last.weight)
                torch.nn.init.zeros_(last.bias)
    return nullcontext()


@contextmanager
def squared_relu(model: GenerativeModel) -> Iterator[None]:
    """max(x, 0)^2 in place of GELU (arXiv 2109.08668)."""
    with patch.object(transformer, "gelu", lambda x: F.relu(x).square()):
        yield


@contextmanager
def query_key_norm(model: GenerativeModel) -> Iterator[None]:
    """Queries and keys of root mean square one (arXiv 2010.04245)."""
    plain = transformer.causal_attention

    def attention(qkv: Tensor, batch: int, head_dim: int, *rest: Any, **options: Any) -> Tensor:
        heads = qkv.unflatten(1, (3, -1, head_dim))
        normed = F.rms_norm(heads[:, :2], (head_dim,))
        joined = torch.cat([normed, heads[:, 2:]], dim=1)
        return plain(joined.flatten(1), batch, head_dim, *rest, **options)

    with patch.object(transformer, "causal_attention", attention):
        yield


class Row(NamedTuple):
    """A recipe: a preset and what differs from it."""

    title: str
    preset: str  # after the name of the set
    words: tuple[str, ...] = ()
    network: Callable[[GenerativeModel], AbstractContextManager[None]] = as_built


NETWORKS = [
    Row("best, zero-initialised projections", "", (), zero_projections),
    Row("best, squared ReLU", "", (), squared_relu),
    Row("best, norm of queries and keys", "", (), query_key_norm),
]
# By set: its folder in DATA, and rows.
ROWS: dict[str, tuple[str, list[Row]]] = {
    "fashion-mnist": (
        "fashion-mnist",
        [
            Row("plain: affine, AdamW", "affine", ("training.learning_rate=3e-3",)),
            Row("affine, Muon", "affine", MUON),
            Row("affine, Muon, start token", "affine", (*MUON, START)),
            Row(
                "affine, triangular, Muon",
                "affine",
                (*MUON, START, "model.conditional=[affine, triangular]"),
            ),
            Row("affine, mixture, AdamW", "", ("training.optimizer=adamw",)),
            Row("best: affine, mixture, Muon", ""),
            Row("best, mixing", "", ("model.mixing=true",)),
            *NETWORKS,
        ],
    ),
    "cifar10": (
        "cifar10-jpeg",
        [
            Row("plain: affine, AdamW", "affine"),
            Row("affine, Muon", "affine", MUON),
            Row("mixing, affine, Muon", "affine", (*MUON, "model.mixing=true")),
            Row(
                "affine, mixture, Muon",
                "",
                ("model.conditional=[affine, mixture]", "model.mixing=false"),
            ),
            Row("mixing, affine, mixture, Muon", "", ("model.conditional=[affine, mixture]",)),
            Row(
                "mixing, channels, affine, mixture, AdamW",
                "",
                ("training.optimizer=adamw",),
            ),
            Row("best: mixing, channels, affine, mixture, Muon", ""),
            *NETWORKS,
        ],
    ),
}


def prepared(
    name: str, row: Row, seed: int, options: argparse.Namespace
) -> tuple[Settings, ImageDataset]:
    """The settings of a row and its training images."""
    place, _ = ROWS[name]
    preset = "-".join(["tarflow", name, "1m", *([row.preset] if row.preset else [])])
    source = f"data.source={options.data / place}"
    settings = resolve(preset, (*row.words, source, f"training.seed={seed}"), None)
    training = load(settings.data, "train")
    return settings.fitted(training), training


def timed(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step of every row: measured on the first call, then read from the folder."""
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "seconds_per_step.json"
    found: dict[str, float] = json.loads(kept.read_text()) if kept.is_file() else {}
    for name in options.only:
        for row in ROWS[name][1]:
            key = f"{name}, {row.title}"
            if key not in found:
                settings, training = prepared(name, row, 0, options)
                model = settings.build()
                with row.network(model):
                    found[key] = seconds_per_step(
                        model, training, settings.training, settings.data.augmentation
                    )
                write_json(kept, found)
    return found


def measured(
    name: str, row: Row, steps: int, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Train and score one row, unless its result is in the folder."""
    title = row.title.replace(": ", " ").replace(", ", "-")
    folder = options.out / name / title / f"{steps}-steps" / str(seed)
    kept = folder / "result.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    settings, training = prepared(name, row, seed, options)
    model = settings.build()
    config = replace(settings.training, steps=steps, warmup_steps=steps // 16)
    with row.network(model):
        done = fit(model, training, config, folder / "run", augmentation=settings.data.augmentation)
        scored = evaluate(model, some(settings.data, "test", SCORED)).likelihood
    result = {
        "parameters": model.num_parameters,
        "images": done.images_seen,
        "bits_per_dim": scored.bits_per_dim,
        "error": scored.standard_error,
    }
    write_json(kept, result)
    return result


def line(title: str, results: Sequence[dict[str, Any]], seconds: float) -> str:
    """One row of the table: mean over seeds, with the standard error over seeds or over images."""
    bits = [result["bits_per_dim"] for result in results]
    error = results[0]["error"]
    if len(bits) > 1:
        error = statistics.stdev(bits) / math.sqrt(len(bits))
    images = statistics.mean(result["images"] for result in results)
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
    parser.add_argument("--images", type=int, default=51_200, help="of each training")
    parser.add_argument("--seconds", type=float, default=300.0, help="of each training")
    parser.add_argument("--seeds", type=int, nargs="*", default=(0, 1, 2))
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    seconds = timed(options)
    for name, equal in product(options.only, options.equal):
        found: dict[str, list[dict[str, Any]]] = {}
        taken: dict[str, float] = {}
        for seed, row in product(options.seeds, ROWS[name][1]):
            each = seconds[f"{name}, {row.title}"]
            batch = prepared(name, row, seed, options)[0].training.batch_size
            steps = round(options.seconds / each)
            if equal == "images":
                steps = options.images // batch
            found.setdefault(row.title, []).append(measured(name, row, steps, seed, options))
            taken[row.title] = steps * each
        print(f"\n{name}, equal {equal}, {torch.get_num_threads()} threads\n")
        print("| recipe | parameters | images | seconds | seeds | bits/dim |")
        print("|---|---|---|---|---|---|")
        for title, results in found.items():
            print(line(title, results, taken[title]))


if __name__ == "__main__":
    main()
