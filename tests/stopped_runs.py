"""Stopped runs of the toy, whole or split, for tests that change their files."""

import json
import warnings
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

from exactflow.core.saved_run import described, read_checkpoint
from exactflow.training import FitResult, Progress, fit
from training_worker import PLAIN, Toy, make_data, make_toy

STEP = 4


class Stopped(Exception):
    """Ends a run between two steps, as a kill would."""


def go_on(
    folder: Path, model: Toy | None = None, stop: int | None = None, keep: int = 9
) -> FitResult | None:
    """Train the toy, or resume its training; None if it was stopped at step `stop`."""

    def end(told: Progress) -> dict[str, float]:
        if told.step == stop:
            raise Stopped
        return {}

    config = replace(PLAIN, checkpoint_every=1, log_every=1, keep_checkpoints=keep, ema_decay=0.5)
    every = {1: end}
    try:
        return fit(model or make_toy(), make_data(), config, folder, every=every, progress=False)
    except Stopped:
        return None


def stopped(folder: Path) -> Path:
    """The newest checkpoint of a run that was stopped."""
    assert go_on(folder, stop=STEP) is None
    return folder / "checkpoints" / f"step_{STEP:08d}"


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def stopped_split(folder: Path) -> Path:
    """The same as processes with split parameters write it."""
    checkpoint = stopped(folder)
    names = [name for name, _ in make_toy().named_parameters()]
    tensors = {f"model.{k}": v for k, v in load_file(checkpoint / "model.safetensors").items()}
    averages = load_file(checkpoint / "ema.safetensors")
    tensors |= {f"average.{name}": averages[name] for name in names}
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    for index, moments in state.items():
        tensors |= {f"optimizer.{key}.{names[index]}": value for key, value in moments.items()}
    for file in ("model.safetensors", "ema.safetensors", "optimizer.pt"):
        (checkpoint / file).unlink()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    dcp.save(tensors, checkpoint_id=checkpoint / "tensors", no_dist=True)
    sign(checkpoint)
    return checkpoint


def sign(checkpoint: Path) -> None:
    """Put the hashes of changed files into state.json, as an attacker would."""
    path = checkpoint / "state.json"
    unsigned = json.loads(path.read_text()) | {"sha256": {}, "format_version": 0}
    path.write_text(json.dumps(unsigned))
    files = [file for file in checkpoint.rglob("*") if file.is_file() and file != path]
    hashes = {
        file.relative_to(checkpoint).as_posix(): sha256(file.read_bytes()).hexdigest()
        for file in files
    }
    path.write_text(json.dumps(described(read_checkpoint(checkpoint), hashes)))
