"""Memory and time of a training step: plain, with activation checkpointing, reversible.

`python benchmarks/reversible.py [--quick] [--out FILE.json] [--device cpu|cuda]`. Each way of
training has a fresh process for its memory; time is measured in turn, in one process, where every
way must first give the plain loss to the bit and its gradients up to rounding.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from measure import hardware, interleaved, peak_megabytes
from torch import Tensor

from exactflow.core.model import DataInitialized, GenerativeModel
from exactflow.core.randomness import generator
from exactflow.models import registry
from exactflow.training.optim import TrainConfig, make_optimizer, recomputed
from exactflow.training.reversible import reversible

WAYS = ("plain", "checkpointed", "reversible")
TOLERANCE = 1e-4  # of gradients, the norm of the difference over that of the plain ones
WARM_UP = 2  # images of the step that makes gradients and the optimizer's state
START = 32  # images that a model is initialised on
# Memory that is freed leaves the process at once, so that its peak is what lives at one time.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
HEADER = (
    "| model | parameters | batch | training | added MiB | of plain | s per step: median (min to "
    "max) | of plain | gradients differ by |\n|---|---:|---:|---|---:|---:|---:|---:|---:|"
)


@final
@dataclass(frozen=True)
class Job:
    """A model and the number of images in its step."""

    preset: str
    batch: int
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The preset, and what differs from it."""
        changes = (f", {key} {value}" for key, value in self.overrides.items())
        return self.preset + "".join(changes)


JOBS = (
    Job("tarflow-cifar10-1m", 64),
    Job("macow-cifar10-1m", 64),
    Job("macow-cifar10-1m", 64, {"dequantization": "variational"}),
    Job("denseflow-cifar10-1m", 64),
    Job("denseflow-cifar10-1m", 64, {"modules": (12, 12, 24)}),  # four times as deep
)
QUICK = (Job("tarflow-tiny", 4), Job("macow-tiny", 4), Job("denseflow-tiny", 4))


@contextmanager
def trained(model: GenerativeModel, way: str) -> Iterator[None]:
    """Compute gradients in this way inside the block."""
    with recomputed(model.stages, way == "checkpointed"), reversible(model, way == "reversible"):
        yield


def pictures(model: GenerativeModel, count: int) -> Tensor:
    """Integer images: smooth, with noise."""
    source = generator(0, "pictures")
    channels, height, width = model.event_shape
    coarse = torch.rand((count, channels, 4, 4), generator=source)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    images = 0.9 * images + 0.1 * torch.rand(images.shape, generator=source)
    return (images * (model.levels - 1)).round().to(torch.uint8).to(model.device)


def build(job: Job, device: torch.device) -> GenerativeModel:
    """The model, with parameters that are read off images initialised."""
    torch.manual_seed(0)
    model = registry.build(job.preset, **job.overrides).to(device)
    if isinstance(model, DataInitialized):
        source = generator(0, "initialization", device=device)
        model.initialize(pictures(model, START), generator=source)
    return model.train()


def backward(model: GenerativeModel, images: Tensor) -> Tensor:
    """Loss of the images; its gradients are left in the parameters."""
    noise = generator(0, "noise", device=model.device)
    loss = model.loss(images, generator=noise).mean()
    loss.backward()
    return loss.detach()


def step_of(model: GenerativeModel, images: Tensor) -> Callable[[], None]:
    """A training step; gradients and the optimizer's state are there already."""
    optimizer = make_optimizer(model, TrainConfig())

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        backward(model, images)
        optimizer.step()

    backward(model, images[:WARM_UP])
    optimizer.step()
    return step


def memory(job: Job, way: str, device: torch.device) -> dict[str, float]:
    """Peak memory of a step; to be called in a fresh process."""
    model = build(job, device)
    with trained(model, way):
        return peak_megabytes(step_of(model, pictures(model, job.batch)), device)


def memory_in_fresh_process(job: Job, way: str, device: torch.device) -> dict[str, float]:
    """`memory`, measured in a new process."""
    asked = {"job": dataclasses.asdict(job), "way": way, "device": str(device)}
    asked["threads"] = torch.get_num_threads()
    command = [sys.executable, __file__, "--child", json.dumps(asked)]
    environment = {**os.environ, **ALLOCATOR}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def child(request: str) -> None:
    """Answer `memory_in_fresh_process`."""
    asked = json.loads(request)
    torch.set_num_threads(asked["threads"])
    overrides = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in asked["job"]["overrides"].items()
    }
    job = Job(asked["job"]["preset"], asked["job"]["batch"], overrides)
    print(json.dumps(memory(job, asked["way"], torch.device(asked["device"]))))


def check(model: GenerativeModel, images: Tensor) -> dict[str, float]:
    """How far each way's gradients are from the plain ones. Raises AssertionError if too far."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for way in WAYS:
        model.zero_grad()
        with trained(model, way):
            loss = backward(model, images)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found[way] = (loss, torch.cat([gradient.flatten() for gradient in gradients]).double())
    loss, gradient = found["plain"]
    errors = {way: float((g - gradient).norm() / gradient.norm()) for way, (_, g) in found.items()}
    for way in WAYS:
        if not torch.equal(found[way][0], loss) or not errors[way] <= TOLERANCE:
            raise AssertionError(
                f"{way}: loss {float(found[way][0])} for {float(loss)}, gradients {errors[way]:.0e}"
            )
    return errors


def run_job(job: Job, pairs: int, device: torch.device, weigh: bool) -> dict[str, Any]:
    """Check gradients, then measure time and memory."""
    model = build(job, device)
    images = pictures(model, job.batch)
    errors = check(model, images)
    plain = step_of(model, images)

    def step(way: str) -> None:
        with trained(model, way):
            plain()

    took = interleaved({way: lambda way=way: step(way) for way in WAYS}, pairs, device)
    result: dict[str, Any] = {
        "model": job.name,
        "parameters": model.num_parameters,
        "batch": job.batch,
        "seconds": took,
        "gradients": errors,
    }
    if weigh:
        result["memory_mib"] = {way: memory_in_fresh_process(job, way, device) for way in WAYS}
    return result


def rows(result: dict[str, Any]) -> list[str]:
    """The lines of the table: one for each way of training."""
    lines = []
    seconds, memories = result["seconds"], result.get("memory_mib")
    for way in WAYS:
        took = seconds[way]
        added = ["", ""]
        if memories is not None:
            of_plain = memories[way]["added"] / memories["plain"]["added"]
            added = [f"{memories[way]['added']:.0f}", f"{of_plain:.2f}"]
        ratio = statistics.median(a / b for a, b in zip(took, seconds["plain"], strict=True))
        cells = [
            result["model"],
            f"{result['parameters']:,}",
            str(result["batch"]),
            way,
            *added,
            f"{statistics.median(took):.3f} ({min(took):.3f} to {max(took):.3f})",
            f"{ratio:.2f}",
            "" if way == "plain" else f"{result['gradients'][way]:.0e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as PyTorch likes")
    parser.add_argument("--pairs", type=int, default=5, help="timed steps of each way")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--quick", action="store_true", help="tiny models: the machinery only")
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--no-memory", action="store_true", help="no fresh process per way")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(options.child)
        return {}
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    wanted = [job for job in (QUICK if options.quick else JOBS) if options.only in job.name]
    if not wanted:
        parser.error(f"no model contains {options.only!r}")
    print(HEADER, flush=True)
    results = []
    for job in wanted:
        results.append(run_job(job, options.pairs, device, not options.no_memory))
        print("\n".join(rows(results[-1])), flush=True)
    report = {"hardware": hardware(device), "results": results}
    machine = "; ".join(f"{name} {value}" for name, value in report["hardware"].items())
    print(f"\nMeasured on: {machine}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
