"""exactflow's TarFlow against its public formulation: sampling, training, likelihood.

`python benchmarks/tarflow.py [--quick] [--out FILE.json] [--device cpu|cuda]`. Both sides have the
same weights; before anything is timed they must agree. Each ratio is that of two measurements made
one right after the other, and the table shows the median, the least and the greatest of them.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from baseline import Baseline, corresponding, from_exactflow
from measure import hardware, interleaved, peak_megabytes, ratios, relative_error
from torch import Tensor, nn

import exactflow
from exactflow.core.randomness import generator, normal_rows, uniform_rows
from exactflow.core.transform import AutoregressiveTransform
from exactflow.models.tarflow.model import TarFlow, TarFlowBlock, TarFlowConfig
from exactflow.sampling.guidance import GuidedTransform
from exactflow.training.optim import TrainConfig, make_optimizer

Kind = Literal[
    "sampling",
    "sampling, merged cache",  # against a baseline that keeps the concatenated cache
    "guided sampling",
    "training",
    "training, compiled",  # of exactflow; the public formulation is not compiled
    "training (bf16)",
    "training (bf16), compiled",
    "likelihood",
]
Action = Callable[[], list[Tensor]]  # does the job once and returns what both sides must agree on

TOLERANCE = 1e-5  # of the largest difference, in units of the largest value
OUTPUT_STD = 0.01  # of the output weights: log-scales of about 0.1, a well-conditioned map
CLASS_STD = 0.3  # of the class tables, so that guidance has something to guide by
SECONDS = 6.0  # spent at least on one line, with more pairs where a job is short
CLASSES = 10
GUIDANCE = 1.5  # published rule with its linear ramp
CONFIGS = {
    "32x32": TarFlowConfig((3, 32, 32), patch_size=4, width=256, blocks=4, layers_per_block=4),
    "64x64": TarFlowConfig((3, 64, 64), patch_size=4, width=256, blocks=4, layers_per_block=4),
}
QUICK = {"8x8": TarFlowConfig((3, 8, 8), patch_size=2, width=64, blocks=2, layers_per_block=1)}
TARGETS = {
    "sampling": 2.0,
    "guided sampling": 3.0,
    "training": 1.5,
    "training, compiled": 1.5,
    "likelihood": 1.2,
}


@final
@dataclass(frozen=True)
class Job:
    """One line of the table."""

    size: str
    config: TarFlowConfig
    kind: Kind
    batch: int

    @property
    def checked(self) -> bool:
        """Whether both sides must agree to the tolerance; bfloat16 rounds more coarsely."""
        return "bf16" not in self.kind


def jobs(configs: dict[str, TarFlowConfig], batches: Sequence[int], compiled: bool) -> list[Job]:
    """All lines: sampling at every batch size, the rest at the largest; or without compiling."""
    found = []
    for size, config in configs.items():
        guided = dataclasses.replace(config, num_classes=CLASSES)
        found += [Job(size, config, "sampling", batch) for batch in batches]
        found += [Job(size, config, "sampling, merged cache", batch) for batch in batches]
        found += [Job(size, guided, "guided sampling", batch) for batch in batches]
        kinds: list[Kind] = ["training", "training (bf16)", "likelihood"]
        kinds += ["training, compiled", "training (bf16), compiled"] if compiled else []
        found += [Job(size, config, kind, max(batches)) for kind in kinds]
    return found


def perturbed_model(config: TarFlowConfig, device: torch.device) -> TarFlow:
    """A model with random weights everywhere; a fresh model is nearly the identity."""
    torch.manual_seed(0)
    with device:
        model = TarFlow(config)
    for block in model.blocks:
        assert isinstance(block, TarFlowBlock)
        nn.init.normal_(block.output.weight, std=OUTPUT_STD)
        if block.class_embedding is not None:
            nn.init.normal_(block.class_embedding, std=CLASS_STD)
    return model.eval()


def latents(config: TarFlowConfig, batch: int, device: torch.device) -> Tensor:
    """The noise that `exactflow.sample` gives seeds 0 .. batch - 1."""
    shape = (config.num_tokens, config.token_dim)
    noise = normal_rows(shape, [generator(seed, "sample") for seed in range(batch)])
    return noise.float().to(device)


def pictures(config: TarFlowConfig, batch: int, device: torch.device) -> Tensor:
    """Integer images: smooth, with noise."""
    source = generator(0, "pictures")
    coarse = torch.rand((batch, config.image_shape[0], 4, 4), generator=source)
    images = nn.functional.interpolate(coarse, config.image_shape[1:], mode="bilinear") * 230
    noise = torch.rand(images.shape, generator=source) * 25
    return (images + noise).to(torch.uint8).to(device)


def our_action(job: Job, model: TarFlow) -> Action:
    """The job through exactflow's public functions."""
    device = model.device
    if job.kind in ("sampling", "sampling, merged cache"):
        z = latents(job.config, job.batch, device)
        return lambda: [model.decode(z)]
    if job.kind == "guided sampling":
        z = latents(job.config, job.batch, device)
        labels = torch.tensor([row % CLASSES for row in range(job.batch)], device=device)
        rule = exactflow.Guidance(GUIDANCE)

        def guided(transform: AutoregressiveTransform, v: Tensor, y: Tensor | None) -> Tensor:
            return GuidedTransform(transform, rule, model.null_label).inverse(v, y)

        return lambda: [model.decode(z, labels, solver=guided)]
    images = pictures(job.config, job.batch, device)
    if job.kind == "likelihood":
        return lambda: [exactflow.log_likelihood(model, images, batch_size=job.batch).nats]

    if job.kind.endswith("compiled"):
        torch.compiler.reset()  # another job's graphs count against the limit of this one's
        for stage in model.stages:
            stage.compile()
    optimizer = make_optimizer(model.train(), TrainConfig(clip_norm=None))
    constant = 0.5 * math.log(2 * math.pi)  # the public loss leaves it out

    def loss() -> Tensor:
        return model.loss(images, generator=noise(device)).mean() - constant

    return training_step(job, device, list(model.parameters()), optimizer, loss)


def their_action(job: Job, baseline: Baseline) -> Action:
    """The job in the public formulation."""
    device = baseline.variance.device
    if job.kind == "sampling, merged cache":
        baseline.merge_caches()
    if job.kind in ("sampling", "sampling, merged cache", "guided sampling"):
        z = latents(job.config, job.batch, device)
        if job.kind != "guided sampling":
            return lambda: [baseline.sample(z)]
        labels = torch.tensor([row % CLASSES for row in range(job.batch)], device=device)
        return lambda: [baseline.sample(z, labels, GUIDANCE)]
    images = pictures(job.config, job.batch, device)
    if job.kind == "likelihood":
        return lambda: [baseline.log_likelihood(images)]

    optimizer = baseline.train().make_optimizer()

    def loss() -> Tensor:
        return baseline.loss(images, generator=noise(device))

    return training_step(job, device, list(baseline.parameters()), optimizer, loss)


def noise(device: torch.device) -> torch.Generator:
    """The same dequantisation noise for both sides."""
    return torch.Generator(device).manual_seed(0)


def training_step(
    job: Job,
    device: torch.device,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
) -> Action:
    """Forward, backward, optimizer; the agreement is on the loss and on every gradient."""
    reduced = "bf16" in job.kind

    def step() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        precision = torch.autocast(device.type, torch.bfloat16) if reduced else nullcontext()
        with precision:
            value = loss()
        value.backward()
        optimizer.step()
        return [value.detach(), *(p.grad for p in parameters if p.grad is not None)]

    return step


def disagreement(
    job: Job, model: TarFlow, baseline: Baseline, ours: Action, theirs: Action
) -> float:
    """Largest relative difference of one call of each, which also warms both up."""
    if job.kind == "likelihood":  # each side draws its own noise: for once, give it ours
        images = pictures(job.config, job.batch, model.device)
        sources = [generator(0, "score", row, 0) for row in range(job.batch)]
        drawn = uniform_rows(job.config.image_shape, sources).float().to(model.device)
        theirs()
        theirs = lambda: [baseline.log_likelihood(images, noise=drawn)]  # noqa: E731
    first, second = ours(), theirs()
    if not job.kind.startswith("training"):
        return relative_error(first[0].to(second[0].device), second[0])
    del first, second
    both = [(p.grad, q.grad) for p, q in corresponding(model, baseline)]
    flat = [torch.cat([g[side].flatten() for g in both]) for side in (0, 1)]
    return relative_error(flat[0], flat[1])


def measure_memory(job: Job, side: str, device: torch.device) -> dict[str, float]:
    """Peak memory of the job's first run; to be called in a fresh process."""
    model = perturbed_model(job.config, device)
    baseline = from_exactflow(model)  # made on both sides: so that both have imported the same
    if side == "exactflow":
        del baseline
        return peak_megabytes(our_action(job, model), device)
    del model
    return peak_megabytes(their_action(job, baseline), device)


def memory_in_fresh_process(job: Job, side: str, device: torch.device) -> dict[str, float]:
    """`measure_memory` in a new process."""
    request = json.dumps({"job": dataclasses.asdict(job), "side": side, "device": str(device)})
    command = [sys.executable, __file__, "--child", request]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1])


def child(request: str) -> None:
    """Answer `memory_in_fresh_process`."""
    asked = json.loads(request)
    fields = asked["job"]
    fields["config"]["image_shape"] = tuple(fields["config"]["image_shape"])
    job = Job(**{**fields, "config": TarFlowConfig(**fields["config"])})
    print(json.dumps(measure_memory(job, asked["side"], torch.device(asked["device"]))))


def run_job(
    job: Job, pairs: int, device: torch.device, memory: bool, at_least: float
) -> dict[str, Any]:
    """Check, then measure time and memory. Raises AssertionError if the sides disagree."""
    model = perturbed_model(job.config, device)
    baseline = from_exactflow(model)
    ours, theirs = our_action(job, model), their_action(job, baseline)
    error = disagreement(job, model, baseline, ours, theirs)
    if job.checked and not error <= TOLERANCE:
        raise AssertionError(f"{job.kind} at {job.size}: the sides differ by {error:.1e}")
    sides = {"baseline": theirs, "exactflow": ours}
    took = interleaved(sides, pairs, device, at_least=at_least)
    result = {
        "job": job.kind,
        "size": job.size,
        "batch": job.batch,
        "error": error,
        "checked": job.checked,
        "seconds": took,
        "ratio": ratios(took["baseline"], took["exactflow"]),
        "target": TARGETS.get(job.kind),
    }
    if memory:
        result["memory_mib"] = {
            side: memory_in_fresh_process(job, side, device) for side in ("baseline", "exactflow")
        }
    return result


def run(
    wanted: Sequence[Job],
    pairs: int,
    device: torch.device,
    *,
    memory: bool = True,
    at_least: float = 0.0,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """All jobs: the machine and one result per job."""
    results = []
    for job in wanted:
        results.append(run_job(job, pairs, device, memory, at_least))
        report(row(results[-1]))
    return {"hardware": hardware(device), "guidance": GUIDANCE, "results": results}


HEADER = (
    "| job | size | batch | baseline, s | exactflow, s | ratio: median (min to max) | of best "
    "| wanted | max error | peak MiB, baseline (added) | peak MiB, exactflow (added) |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(result: dict[str, Any]) -> str:
    """One line of the table."""
    median = {side: statistics.median(took) for side, took in result["seconds"].items()}
    ratio, target = result["ratio"], result["target"]
    memory = [
        f"{found['peak']:.0f} ({found['added']:.0f})"
        for found in result.get("memory_mib", {}).values()
    ] or ["", ""]
    cells = [
        result["job"],
        result["size"],
        str(result["batch"]),
        f"{median['baseline']:.4f}",
        f"{median['exactflow']:.4f}",
        f"**{ratio['median']:.2f}** ({ratio['min']:.2f} to {ratio['max']:.2f})",
        f"{ratio['best']:.2f}",
        "" if target is None else f"{target:g}",
        f"{result['error']:.0e}" + ("" if result["checked"] else ", bf16: not compared"),
        *memory,
    ]
    return "| " + " | ".join(cells) + " |"


def machine(report: dict[str, Any]) -> str:
    """The line that says what the numbers were measured on."""
    return "Measured on: " + "; ".join(f"{k} {v}" for k, v in report["hardware"].items())


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute model: checks the machinery")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--pairs", type=int, default=3, help="measurements of each side")
    parser.add_argument("--only", default="", help="jobs whose `kind size batch` contains this")
    parser.add_argument("--no-memory", action="store_true", help="no fresh process per side")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.child:
        child(options.child)
        return {}
    if options.pairs < 1:
        parser.error("expected --pairs of at least 1")
    device = torch.device(options.device)
    configs, batches = (QUICK, (1, 4)) if options.quick else (CONFIGS, (1, 16))
    wanted = jobs(configs, batches, compiled=not options.quick)
    wanted = [j for j in wanted if options.only in f"{j.kind} {j.size} {j.batch}"]
    if not wanted:
        parser.error(f"no job contains {options.only!r}")
    print(HEADER, flush=True)
    report = run(
        wanted,
        options.pairs,
        device,
        memory=not options.no_memory,
        at_least=0.0 if options.quick else SECONDS,
        report=lambda line: print(line, flush=True),
    )
    print(f"\n{machine(report)}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
