"""[4-1024-8-8] at 64x64 on one GPU: training, likelihood, sampling, against the baseline.

And solvers on trained weights, of this model and of [2-768-8-8]: see gpu_solvers.py.

`benchmarks/gpu.sh [FOLDER]` runs it. Every section is a process with its own time limit, so that a
section that fails or takes too long does not affect the others. Results are written at once.
"""

import argparse
import copy
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import gpu_solvers
import torch
from baseline import Baseline, from_exactflow
from gpu_solvers import FirstTokens, title
from measure import hardware, interleaved, peak_megabytes, ratios, relative_error, seconds
from tarflow import latents, perturbed_model, pictures
from torch import Tensor

import exactflow
from exactflow.core.transform import AutoregressiveTransform
from exactflow.models.tarflow.model import TarFlow, TarFlowConfig
from exactflow.training.optim import TrainConfig, make_optimizer

BUDGET = 510.0  # seconds for all sections
# Dense bfloat16 multiply-adds of one device, FLOP/s, from the vendors' data sheets; the first name
# that the device's name contains counts.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
FORMULA = (
    "training FLOP per image = 6 P N + 12 L N^2 Ch: P = elements of all weight matrices, N tokens, "
    "L attention layers, Ch width; attention counted over the whole square, for every side alike"
)


@final
@dataclass(frozen=True)
class Scale:
    """Sizes of models, batches and measurements."""

    config: TarFlowConfig
    small_patches: TarFlowConfig  # trained too
    train_batch: int
    score_batch: int
    sample_batches: tuple[int, ...]
    pairs: int
    steps: int  # per measurement of training and scoring
    cap: float  # seconds that one sampling run may take before it is cut to its first tokens
    trained: tuple[gpu_solvers.Trained, ...]
    limit: float = math.inf  # seconds that the section may take


LARGE = Scale(
    TarFlowConfig((3, 64, 64), patch_size=4, width=1024, blocks=8, layers_per_block=8),
    TarFlowConfig((3, 64, 64), patch_size=2, width=768, blocks=8, layers_per_block=8),
    train_batch=64,
    score_batch=64,
    sample_batches=(1, 16, 64),
    pairs=3,
    steps=5,
    cap=3.0,
    trained=gpu_solvers.LARGE,
)
TINY = Scale(
    TarFlowConfig((3, 16, 16), patch_size=4, width=64, blocks=2, layers_per_block=1),
    TarFlowConfig((3, 8, 8), patch_size=2, width=64, blocks=2, layers_per_block=1),
    train_batch=2,
    score_batch=2,
    sample_batches=(1, 2),
    pairs=2,
    steps=1,
    cap=0.02,
    trained=gpu_solvers.TINY,
)


def matmul_parameters(config: TarFlowConfig) -> int:
    """Elements of all weight matrices."""
    per_block = 3 * config.token_dim * config.width + config.layers_per_block * 12 * config.width**2
    return config.blocks * per_block


def training_flop(config: TarFlowConfig) -> float:
    """See `FORMULA`."""
    tokens, layers = config.num_tokens, config.blocks * config.layers_per_block
    attention = 12 * layers * tokens**2 * config.width
    return 6.0 * matmul_parameters(config) * tokens + attention


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of the device; None where it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def reduced(device: torch.device, enabled: bool = True) -> Any:
    """bfloat16 autocast."""
    return torch.autocast(device.type, torch.bfloat16) if enabled else nullcontext()


def trainer(model: TarFlow | Baseline, images: Tensor, device: torch.device) -> Callable[[], None]:
    """One optimizer step in bfloat16 autocast, without clipping."""
    model.train()
    if isinstance(model, TarFlow):
        optimizer = make_optimizer(model, TrainConfig(clip_norm=None, precision="bfloat16"))
    else:
        optimizer = model.make_optimizer()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with reduced(device):
            loss = model.loss(images).mean()
        loss.backward()
        optimizer.step()

    return step


def repeated(action: Callable[[], Any], times: int) -> Callable[[], None]:
    """The action, repeated."""

    def run() -> None:
        for _ in range(times):
            action()

    return run


def own_memory(action: Callable[[], Any], model: torch.nn.Module, device: torch.device) -> float:
    """Peak MiB of one side: its weights and what the first run of `action` adds."""
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    return weights / 2**20 + peak_megabytes(action, device)["added"]


def train_sides(scale: Scale, device: torch.device, batch: int, compiled: bool) -> dict[str, Any]:
    """Training at one batch size."""
    config = scale.config
    images = pictures(config, batch, device)
    ours = perturbed_model(config, device)
    sides: dict[str, TarFlow | Baseline] = {"exactflow": ours}
    if compiled:
        sides = {"exactflow compiled": ours}
        for stage in ours.stages:
            stage.compile()
    else:
        sides = {"baseline": from_exactflow(ours), "exactflow": ours}
    memory, steps = {}, {}
    for name, model in sides.items():
        steps[name] = trainer(model, images, device)
        began = time.perf_counter()
        memory[name] = own_memory(steps[name], model, device)
        print(f"# {name}: first step {time.perf_counter() - began:.1f} s", file=sys.stderr)
        repeated(steps[name], 2)()
    actions = {name: repeated(step, scale.steps) for name, step in steps.items()}
    took = interleaved(actions, scale.pairs, device, at_most=25)
    peak = peak_flops(device)
    rows = []
    for name, each in took.items():
        rate = batch * scale.steps / statistics.median(each)
        rows.append(
            {
                "side": name,
                "batch": batch,
                "images_per_second": rate,
                "tflops": rate * training_flop(config) / 1e12,
                "mfu": None if peak is None else rate * training_flop(config) / peak,
                "peak_mib": memory[name],
                "seconds": each,
            }
        )
    found: dict[str, Any] = {"rows": rows}
    if not compiled:
        found["ratio"] = ratios(took["baseline"], took["exactflow"])
    return found


def section_training(scale: Scale, device: torch.device, compiled: bool = False) -> dict[str, Any]:
    """bfloat16 training steps; the batch is halved until it fits."""
    batch = scale.train_batch
    while True:
        try:
            found = train_sides(scale, device, batch, compiled)
            return {"formula": FORMULA, "flop_per_image": training_flop(scale.config), **found}
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2
        torch.cuda.empty_cache()


def section_compiled(scale: Scale, device: torch.device) -> dict[str, Any]:
    """The same, every block of exactflow's compiled."""
    return section_training(scale, device, compiled=True)


def section_likelihood(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Scoring integer images, in float32 and in bfloat16."""
    model = perturbed_model(scale.config, device)
    baseline = from_exactflow(model)
    images = pictures(scale.config, scale.score_batch, device)
    rows = []
    for precision in ("float32", "bfloat16"):

        def ours() -> Tensor:
            with reduced(device, precision == "bfloat16"):  # noqa: B023 - called in this round
                return exactflow.log_likelihood(model, images, batch_size=scale.score_batch).nats

        def theirs() -> Tensor:
            with reduced(device, precision == "bfloat16"):  # noqa: B023
                return baseline.log_likelihood(images)

        memory = {
            "baseline": own_memory(theirs, baseline, device),
            "exactflow": own_memory(ours, model, device),
        }
        sides = {
            "baseline": repeated(theirs, scale.steps),
            "exactflow": repeated(ours, scale.steps),
        }
        took = interleaved(sides, scale.pairs, device, at_most=12)
        count = scale.score_batch * scale.steps
        nats = ours().mean()
        rows.append(
            {
                "precision": precision,
                "batch": scale.score_batch,
                "images_per_second": {n: count / statistics.median(s) for n, s in took.items()},
                "ratio": ratios(took["baseline"], took["exactflow"]),
                "peak_mib": memory,
                "nats": float(nats),
            }
        )
        print(json.dumps({"rows": rows}), flush=True)
    return {"rows": rows}


def section_sampling(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Sequential sampling in bfloat16, whole, or by the first tokens of every block."""
    model = perturbed_model(scale.config, device)
    baseline = from_exactflow(model)
    tokens = scale.config.num_tokens
    rows = []
    for batch in scale.sample_batches:
        z = latents(scale.config, batch, device)

        def run(side: str, stop: int) -> Callable[[], Tensor]:
            def action() -> Tensor:
                with reduced(device):
                    if side == "baseline":
                        return baseline.decode(z, stop=stop)  # noqa: B023 - called in this round
                    solver = None if stop == tokens else FirstTokens(stop)
                    return model.decode(z, solver=solver)  # noqa: B023

            return action

        probe = min(max(tokens // 16, 2), tokens)
        run("baseline", probe)(), run("exactflow", probe)()
        slowest = max(seconds(run(side, probe), device) for side in ("baseline", "exactflow"))
        estimate = slowest * (tokens - 1) / (probe - 1)
        stop = tokens
        if estimate > scale.cap:
            stop = max(probe, int(tokens * scale.cap / estimate))
        sides = {side: run(side, stop) for side in ("baseline", "exactflow")}
        memory = {
            "baseline": own_memory(sides["baseline"], baseline, device),
            "exactflow": own_memory(sides["exactflow"], model, device),
        }
        took = interleaved(sides, scale.pairs, device, at_most=2 * scale.cap)
        share = (stop - 1) / (tokens - 1)
        rows.append(
            {
                "batch": batch,
                "tokens_measured": stop,
                "tokens": tokens,
                "images_per_second": {
                    n: batch * share / statistics.median(s) for n, s in took.items()
                },
                "ratio": ratios(took["baseline"], took["exactflow"]),
                "peak_mib": memory,
                "seconds": took,
            }
        )
        print(json.dumps({"rows": rows}), flush=True)  # stands, should the next take too long
    return {"rows": rows}


def section_smoke(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Check the device's results on a small model in float32."""
    config = TarFlowConfig((3, 16, 16), patch_size=4, width=128, blocks=3, layers_per_block=2)
    on_cpu = perturbed_model(config, torch.device("cpu"))
    model = copy.deepcopy(on_cpu).to(device)
    baseline = from_exactflow(model)
    z = latents(config, 4, device)
    checks = {}
    with torch.no_grad():
        x = model.decode(z)
        encoded, log_abs_det = model.encode(x)
        checks["round trip"] = (relative_error(encoded, z), 1e-4)
        checks["decode equals baseline"] = (relative_error(x, baseline.decode(z)), 1e-4)
        theirs = baseline.encode(x)
        checks["encode equals baseline"] = (relative_error(encoded, theirs[0]), 1e-4)
        checks["log-det equals baseline"] = (relative_error(log_abs_det, theirs[1]), 1e-4)
        block = model.blocks[0]
        assert isinstance(block, AutoregressiveTransform)
        whole = block.conditioner(z)
        cache = block.new_cache(z)
        parts = [
            block.conditioner(z[:, : t + 1], None, cache, t).clone() for t in range(z.shape[1])
        ]
        checks["cached equals uncached"] = (relative_error(torch.cat(parts, 1), whole), 1e-4)
        gpu, cpu = exactflow.sample(model, 4), exactflow.sample(on_cpu, 4)
        checks["sample equals the CPU's"] = (relative_error(gpu.x.cpu(), cpu.x), 1e-3)
        checks["certificate"] = (float(gpu.certificate.max()), 1e-3)
        exact = model.encode(x)[1]
        with reduced(device):
            checks["bfloat16 log-det"] = (relative_error(model.encode(x)[1], exact), 5e-2)
    rows = {n: {"error": e, "limit": limit, "ok": e <= limit} for n, (e, limit) in checks.items()}
    return {"checks": rows, "ok": all(r["ok"] for r in rows.values())}


def section_solvers(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Solvers on trained weights."""
    return gpu_solvers.section(scale.trained[0], device, scale.limit)


def section_training_small_patches(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Training where every block has four times as many tokens."""
    batch = max(1, scale.train_batch // 4)
    return section_training(
        dataclasses.replace(scale, config=scale.small_patches, train_batch=batch), device
    )


def section_small_patches(scale: Scale, device: torch.device) -> dict[str, Any]:
    """The same where every block has four times as many tokens."""
    return gpu_solvers.section(scale.trained[1], device, scale.limit)


Section = Callable[[Scale, torch.device], dict[str, Any]]
SECTIONS: dict[str, tuple[Section, float]] = {  # and its share of the time, as it were in seconds
    "smoke": (section_smoke, 80.0),
    "training": (section_training, 90.0),
    "training, small patches": (section_training_small_patches, 80.0),
    "likelihood": (section_likelihood, 60.0),
    "sampling": (section_sampling, 80.0),
    "solvers": (section_solvers, 150.0),
    "solvers, small patches": (section_small_patches, 150.0),
    "compiled": (section_compiled, 70.0),
}


def in_process_of_its_own(name: str, limit: float, device: str, tiny: bool) -> dict[str, Any]:
    """A section's result, the last line it printed, or {"failed": why}, or both."""
    command = [sys.executable, __file__, "--section", name, "--device", device]
    command += ["--limit", str(limit)]
    command += ["--tiny"] if tiny else []
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, timeout=limit, env=os.environ, check=False
        )
        printed, failed = done.stdout, f"ended with status {done.returncode} before it was done"
        failed = "" if done.returncode == 0 else failed
    except subprocess.TimeoutExpired as error:
        printed, failed = error.stdout or b"", f"not done after {limit:.0f} s"
    found: dict[str, Any] = {"failed": failed} if failed else {}
    for line in reversed(printed.decode(errors="replace").splitlines()):
        with suppress(json.JSONDecodeError):
            return {**json.loads(line), **found}
    return {"failed": failed or "printed no result"}


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    machine = "; ".join(f"{k} {v}" for k, v in report["hardware"].items())
    lines = [f"# TarFlow {report['model']}", "", f"Measured on: {machine}", ""]
    found = report["sections"]
    for name, section in found.items():
        if "failed" in section:
            lines.append(f"**{name}**: {section['failed']}\n")
    if "checks" in found.get("smoke", {}):
        lines += ["| check (float32, small model) | error | limit | |", "|---|---|---|---|"]
        for name, r in found["smoke"]["checks"].items():
            verdict = "ok" if r["ok"] else "**FAILED**"
            lines.append(f"| {name} | {r['error']:.1e} | {r['limit']:.0e} | {verdict} |")
        lines.append("")
    for group in (("training", "compiled"), ("training, small patches",)):
        training = [r for s in group for r in found.get(s, {}).get("rows", [])]
        if not training:
            continue
        lines += [FORMULA + ".", ""]
        lines += [f"| {group[0]}, bf16 | batch | images/s | TFLOP/s | MFU | peak MiB |"]
        lines += ["|---|---|---|---|---|---|"]
        for r in training:
            mfu = "" if r["mfu"] is None else f"{100 * r['mfu']:.1f} %"
            lines.append(
                f"| {r['side']} | {r['batch']} | {r['images_per_second']:.1f} "
                f"| {r['tflops']:.1f} | {mfu} | {r['peak_mib']:.0f} |"
            )
        lines.append("")
    for job in ("likelihood", "sampling"):
        rows = found.get(job, {}).get("rows", [])
        if not rows:
            continue
        lines += [
            f"| {job} | batch | images/s, baseline | images/s, exactflow | ratio: median (min to "
            "max) | peak MiB, baseline | peak MiB, exactflow |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in rows:
            what = r.get("precision", "bfloat16")
            if r.get("tokens_measured", 0) < r.get("tokens", 0):
                what += f", first {r['tokens_measured']} of {r['tokens']} tokens of every block"
            rate, ratio, memory = r["images_per_second"], r["ratio"], r["peak_mib"]
            lines.append(
                f"| {what} | {r['batch']} | {rate['baseline']:.3f} | {rate['exactflow']:.3f} "
                f"| **{ratio['median']:.2f}** ({ratio['min']:.2f} to {ratio['max']:.2f}) "
                f"| {memory['baseline']:.0f} | {memory['exactflow']:.0f} |"
            )
        lines.append("")
    for section in found.values():
        if "convergence" in section:
            lines += gpu_solvers.markdown(section)
    return "\n".join(lines)


def run_all(names: Sequence[str], folder: Path, device: str, tiny: bool) -> dict[str, Any]:
    """Run the sections and write results after each; unused time of one goes to the next."""
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "model": title((TINY if tiny else LARGE).config),
        "hardware": hardware(torch.device(device)),
        "sections": {},
    }
    for index, section in enumerate(names):
        left = BUDGET - (time.monotonic() - began)
        shares = [SECTIONS[name][1] for name in names[index:]]
        if left < 20:
            report["sections"][section] = {"failed": "no time left"}
        else:
            took = time.monotonic()
            limit = left * shares[0] / sum(shares)
            found = in_process_of_its_own(section, limit, device, tiny)
            found["section_seconds"] = time.monotonic() - took
            report["sections"][section] = found
        (folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (folder / "gpu.md").write_text(markdown(report))
        print(f"# {section}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return report


def main() -> int:
    """The command line; 0 if all checks passed or there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="a tiny model: checks the machinery")
    parser.add_argument(
        "--only", nargs="+", choices=tuple(SECTIONS), default=tuple(SECTIONS), help="sections"
    )
    parser.add_argument("--section", choices=tuple(SECTIONS), help="only this, as JSON on stdout")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds for --section")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing measured (--device cpu --tiny checks the machinery)")
        return 0
    if options.section:
        scale = dataclasses.replace(TINY if options.tiny else LARGE, limit=options.limit)
        try:
            found = SECTIONS[options.section][0](scale, torch.device(options.device))
        except Exception as error:  # whatever it is, the other sections go on
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(found))
        return 0
    report = run_all(options.only, options.out, options.device, options.tiny)
    print(markdown(report))
    return 0 if report["sections"].get("smoke", {"ok": True}).get("ok") else 1


if __name__ == "__main__":
    sys.exit(main())
