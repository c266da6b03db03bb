"""Seconds of a training step of MaskDiT, by the part of the tokens that its encoder does not see.

`python benchmarks/masking.py [--quick] [--ratios 0 0.25 0.5 0.75] [--out FILE.json]`. All ratios
are timed in turn in one process, on the same images and weights.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import hardware, interleaved, ratios
from reversible import pictures, step_of

from exactflow.models import registry
from exactflow.models.maskdit.model import MaskDiT, MaskDiTConfig

# A B/2 on latents of 256-pixel images, and our small preset.
JOBS = {
    "B/2 of latents": (MaskDiTConfig(width=768, depth=12, num_heads=12, num_classes=1000), 16),
    "maskdit-fashion-mnist": (registry.preset("maskdit-fashion-mnist").config, 64),
}
QUICK = {"maskdit-tiny": (registry.preset("maskdit-tiny").config, 4)}


def run(
    name: str, config: MaskDiTConfig, batch: int, masked: Sequence[float], pairs: int
) -> dict[str, Any]:
    """Time a step of each ratio."""
    steps = {}
    for ratio in masked:
        torch.manual_seed(0)
        model = MaskDiT(replace(config, mask_ratio=ratio)).train()
        steps[ratio] = step_of(model, pictures(model, batch))
        steps[ratio]()
    took = interleaved(steps, pairs, torch.device("cpu"))
    speedups = {ratio: ratios(took[masked[0]], took[ratio]) for ratio in masked}
    return {"model": name, "batch": batch, "seconds": took, "speedup": speedups}


def rows(result: dict[str, Any]) -> list[str]:
    """A line of the table for each ratio."""
    lines = []
    for ratio, took in result["seconds"].items():
        middle, faster = statistics.median(took), result["speedup"][ratio]
        cells = [
            result["model"],
            str(result["batch"]),
            f"{ratio:g}",
            f"{middle:.3f}",
            f"{result['batch'] / middle:.1f}",
            f"{faster['median']:.2f} ({faster['min']:.2f} to {faster['max']:.2f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75])
    parser.add_argument("--pairs", type=int, default=5, help="timed steps of each ratio")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as PyTorch likes")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--quick", action="store_true", help="a tiny model: the machinery only")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    print("| model | batch | mask ratio | s per step | images/s | as fast as the first by |")
    print("|---|---:|---:|---:|---:|---:|")
    results = []
    for name, (config, batch) in (QUICK if options.quick else JOBS).items():
        results.append(run(name, config, batch, options.ratios, options.pairs))
        print("\n".join(rows(results[-1])), flush=True)
    found = {"hardware": hardware(torch.device("cpu")), "results": results}
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1))
    return results


if __name__ == "__main__":
    main()
