"""Predicted memory of a training step against the peak of a real process.

    .venv/bin/python benchmarks/memory.py
    .venv/bin/python benchmarks/memory.py --device cuda

Every row is a new process that takes steps of the trainer on random images. On a CPU the peak is
that of the resident set beyond what Python and PyTorch need without a model; on a GPU it is what
the allocator gave out. On a CPU there are two measurements: with larger tensors in memory of their
own, which is returned when they are freed, and with malloc as it is, which may keep freed memory.
`--out FILE` also writes the rows as JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import hardware, resident_megabytes

from exactflow.core.config import override
from exactflow.metrics.memory import PeakMemory
from exactflow.models import registry
from exactflow.training import Progress, TrainConfig, fit
from exactflow.training.cost import random_images
from exactflow.training.step_memory import step_memory

MIB = 2**20
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # of glibc; unless it is set, it grows
RUNS = (  # preset, images of a step
    ("tarflow-cifar10", 48),
    ("macow-cifar10-1m", 128),
    ("denseflow-cifar10-1m", 96),
    ("flow-matching-cifar10", 128),
    ("iddpm-cifar10", 128),
    ("hdit-cifar10", 48),
)


def config_of(preset: str, batch_size: int, checkpointing: bool) -> TrainConfig:
    """The preset's training, of a few steps."""
    given = override(TrainConfig(), registry.preset(preset).training)
    return replace(
        given,
        batch_size=batch_size,
        accumulate=1,
        steps=3,
        warmup_steps=1,
        fine_tuning_epochs=0.0,
        checkpoint_every=3,
        activation_checkpointing=checkpointing,
    )


def predicted(preset: str, batch_size: int, checkpointing: bool, device: str) -> float:
    """MiB."""
    with torch.device("meta"):
        model = registry.build(preset)
    config = config_of(preset, batch_size, checkpointing)
    return step_memory(model, config, accelerator=device != "cpu").total / MIB


def measured(preset: str, batch_size: int, checkpointing: bool, device: str) -> float:
    """MiB at the peak of the second step of a model that is built and trained in this process.

    A small model is trained first, so that the memory of loaded libraries is not counted.
    """
    config = config_of(preset, batch_size, checkpointing)
    take_steps("iddpm-tiny", config_of("iddpm-tiny", 4, False), device)
    before = resident_megabytes("VmRSS") if device == "cpu" else 0.0
    return take_steps(preset, config, device) - before


def take_steps(preset: str, config: TrainConfig, device: str) -> float:
    """The peak in MiB after the second step; the last step also writes files."""
    peak = PeakMemory(torch.device(device))
    model = registry.build(preset).to(device)
    reached: list[int] = []

    def note(progress: Progress) -> Mapping[str, float]:
        if progress.step == 2:
            reached.append(peak.bytes() or 0)
        return {}

    with tempfile.TemporaryDirectory() as folder:
        images = random_images(model, config.batch_size)
        fit(model, images, config, folder, every={2: note}, progress=False)
    return reached[0] / MIB


def main() -> None:
    """The table; with --one, a single measurement, for a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", nargs=3, metavar=("PRESET", "BATCH", "CHECKPOINTING"))
    parser.add_argument("--only", help="one preset")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.one:
        preset, batch, checkpointing = options.one
        print(measured(preset, int(batch), checkpointing == "1", options.device))
        return
    rows = []
    print(
        f"{'preset':24} {'images':>6} {'activations':>11} {'predicted':>10} {'measured':>10}   off "
        f"{'as it is':>10}"
    )
    for preset, batch_size in RUNS:
        if options.only not in (None, preset):
            continue
        for checkpointing in (False, True):
            rows.append(row(preset, batch_size, checkpointing, options.device))
    if options.out:
        report = {"hardware": hardware(torch.device(options.device)), "rows": rows}
        options.out.write_text(json.dumps(report, indent=1))


def row(preset: str, batch_size: int, checkpointing: bool, device: str) -> dict[str, Any]:
    """Print one line of the table, and return it."""
    before = predicted(preset, batch_size, checkpointing, device)
    words = [preset, str(batch_size), str(int(checkpointing)), "--device", device]
    command = [sys.executable, __file__, "--one", *words]
    after, as_it_is = (
        float(done.stdout.split()[-1])
        for done in (
            subprocess.run(
                command, capture_output=True, text=True, check=True, env={**os.environ, **more}
            )
            for more in (GIVING_BACK, {})
        )
    )
    kept = "recomputed" if checkpointing else "kept"
    print(
        f"{preset:24} {batch_size:6} {kept:>11} {before:6.0f} MiB {after:6.0f} MiB "
        f"{before / after - 1:+5.0%} {as_it_is:6.0f} MiB",
        flush=True,
    )
    return {
        "preset": preset,
        "images": batch_size,
        "activations": kept,
        "predicted_mib": before,
        "measured_mib": after,
        "measured_with_malloc_as_it_is_mib": as_it_is,
    }


if __name__ == "__main__":
    main()
