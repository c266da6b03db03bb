"""Outputs that a refactoring may not change by a bit: `tests/bitwise.py record|compare FILE`.

Record before the first change, compare after every one. Recorded are hashes of what every family's
tiny preset computes: loss, gradients, latents, samples of every solver, likelihoods of its kind, 20
training steps in one session and in two. Beside FILE a folder keeps models and runs as they were
written, which must still load and score the same. A few minutes of one core.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor

import exactflow
from exactflow.core.model import Flow, GenerativeModel
from exactflow.models import registry

FLOW_SOLVERS = ("sequential", "jacobi", "gauss-seidel-jacobi", "selective", "adaptive")
PATH_SOLVERS = ("euler", "midpoint", "heun", "dpm++", "ancestral", "ddim")
COUNT = 3
CLASSES = {"tarflow", "flow-matching", "hdit", "diffusion"}


def digest(*tensors: Tensor) -> str:
    """Hash of bytes, types and shapes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:20]


def models() -> Iterator[tuple[str, GenerativeModel]]:
    """Every tiny preset, plain and with classes where it has any, off its initial weights."""
    for name in registry.names():
        if not name.endswith("-tiny"):
            continue
        kinds: list[dict[str, Any]] = [{}]
        if registry.family_of(name).model.kind in CLASSES:
            kinds.append({"num_classes": 3})
        if name == "tarflow-tiny":
            kinds.append(
                {
                    "conditional": ["channels", "affine", "mixture", "triangular"],
                    "start_token": True,
                    "mixing": True,
                    "components": 2,
                }
            )
        for fields in kinds:
            torch.manual_seed(0)
            model = exactflow.build(name, **fields)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            yield f"{name} {json.dumps(fields)}", model.eval()


def attempt(work: Callable[[], str]) -> str:
    """The result or the error message, which a refactoring keeps too."""
    try:
        return work()
    except (ValueError, ArithmeticError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def measured(model: GenerativeModel) -> Iterator[tuple[str, str]]:
    """Hashes of all that a model computes, by name."""
    generator = torch.Generator().manual_seed(1)
    shape = (COUNT, *model.event_shape)
    images = torch.randint(0, model.levels, shape, generator=generator, dtype=torch.uint8)
    label = torch.arange(COUNT) % model.num_classes if model.num_classes else None

    def loss() -> str:
        noise = torch.Generator().manual_seed(2)
        value = model.loss(images, label, generator=noise)
        value.sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return digest(value, *gradients)

    yield "loss", attempt(loss)
    yield "likelihood", attempt(lambda: likelihood(model, images, label))
    if isinstance(model, Flow):
        x = torch.rand(shape, generator=generator) * 2 - 1
        yield "latents", attempt(lambda: digest(*model.encode(x, label)))
        yield "images", attempt(lambda: digest(model.decode(model.encode(x, label)[0], label)))
    for solver in (*FLOW_SOLVERS, *PATH_SOLVERS):
        for scale in (0.0, 1.5) if model.num_classes else (0.0,):
            yield f"{solver} {scale}", attempt(partial(samples, model, label, solver, scale))


def likelihood(model: GenerativeModel, images: Tensor, label: Tensor | None) -> str:
    found = exactflow.log_likelihood(model, images, label, seed=3)
    return f"{found.kind} {digest(found.nats)}"


def samples(model: GenerativeModel, label: Tensor | None, solver: str, scale: float) -> str:
    steps = {"steps": 4} if solver in PATH_SOLVERS else {}
    chosen = exactflow.solvers.solver_for(model, solver, **steps)
    drawn = exactflow.sample(model, COUNT, label, 5, chosen, scale)
    return digest(drawn.x)


def trained(preset: str, folder: Path) -> str:
    """Weights after 20 steps in one session and after two sessions of ten; runs are kept."""
    found = []
    for name, pauses in (("whole", (20,)), ("resumed", (10, 20))):
        out = folder / f"{preset}-{name}"
        words = ["-m", "exactflow", "train", preset, "--out", out, "data.source=digits"]
        words += ["data.limit=64", "training.batch_size=8", "training.steps=20"]
        words += ["training.warmup_steps=2", "training.checkpoint_every=10", "run.samples=1"]
        if (out / "model").exists():
            pass  # of the recording: what is there must load
        elif pauses == (20,):
            command(words)
        else:
            command(words)
            (out / "model" / "model.safetensors").unlink()
            last = max((out / "checkpoints").iterdir())
            for file in sorted(last.iterdir()):
                file.unlink()
            last.rmdir()
            command(words)
        model = exactflow.from_pretrained(out)
        found.append(digest(*model.state_dict().values()))
    return " ".join(found)


def command(words: list[Any]) -> None:
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


def everything(folder: Path, fresh: Path) -> dict[str, str]:
    """All hashes by name; models and runs of the recording are read from `folder`."""
    found = {}
    for title, model in models():
        kept = folder / title.translate(str.maketrans(dict.fromkeys(' {}":,[]', "_")))
        for name, value in measured(model):
            found[f"{title}: {name}"] = value
        if not kept.exists():
            model.save_pretrained(kept)
        loaded = exactflow.from_pretrained(kept)
        found[f"{title}: saved"] = digest(*loaded.state_dict().values())
        print(title, flush=True)
    for preset in ("tarflow-tiny", "flow-matching-tiny", "macow-tiny", "iddpm-tiny"):
        found[f"{preset}: trained before"] = trained(preset, folder)
        found[f"{preset}: trained"] = trained(preset, fresh)
        print("trained", preset, flush=True)
    return found


def main() -> None:
    """Record, or compare and print the differences."""
    what, file = sys.argv[1], Path(sys.argv[2]).resolve()
    torch.set_num_threads(1)
    folder = file.with_suffix(".models")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as fresh:
        found = everything(folder, Path(fresh))
    if what == "record":
        file.write_text(json.dumps(found, indent=1))
        return
    before = json.loads(file.read_text())
    other = [name for name in {**before, **found} if before.get(name) != found.get(name)]
    for name in other:
        print(f"{name}: {before.get(name)} before, {found.get(name)} now")
    print(f"{len(found) - len(other)} of {len(before)} are the same")
    sys.exit(bool(other))


if __name__ == "__main__":
    main()
