"""Checkpoints of a run, read both to continue its training and to load its weights.

    run_dir/checkpoints/step_00000500/model.safetensors    weights and buffers
                                      ema.safetensors      the same with averaged weights, if any
                                      optimizer.pt         tensors, as `torch.save` writes them
                                      state.json           step, images ..; hashes of the others

A model whose parameters are split over processes has a folder tensors/ in the format of PyTorch's
distributed checkpoints in place of the first three.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from exactflow.core.config import made
from exactflow.core.files import json_hash, read_json
from exactflow.core.split_tensors import load_split, read_layout
from exactflow.core.tensor_files import read_safetensors

CHECKPOINTS_FOLDER = "checkpoints"
MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"
SPLIT_FOLDER = "tensors"

_FORMAT_VERSION = 1  # 0: without the log's length and hash, and without a checksum
_NAME = re.compile(r"step_\d{8,}")
_CHECKSUM = "checksum"
_AVERAGE = "average."


@final
class NewerFormatError(ValueError):
    """The checkpoint was written by a later version of this library; it is not damaged."""


@final
@dataclass(frozen=True)
class RunState:
    """Counters of a run.

    Attributes:
        step: optimizer steps done.
        images: images seen, step times batch size.
        seconds: wall-clock time in all sessions of the run.
        step_seconds: the time of optimizer steps alone, without callbacks and files.
        logged_step: step of the last line of the log, 0 before the first.
        loss_sum: sum of the losses of the steps since that line.
        grad_norm_sum: sum of the gradient norms of these steps.
    """

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    logged_step: int = 0
    loss_sum: float = 0.0
    grad_norm_sum: float = 0.0

    def logged(self) -> "RunState":
        """The state after `step` has been logged."""
        return dataclasses.replace(self, logged_step=self.step, loss_sum=0.0, grad_norm_sum=0.0)


@final
@dataclass(frozen=True)
class LogState:
    """The log of a run at the time of a checkpoint.

    Attributes:
        lines: number of lines.
        sha256: of all of them.
    """

    lines: int
    sha256: str


@final
@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: just written, or verified by its hashes.

    Attributes:
        folder: of its files.
        state: counters of the run.
        identity: all that determines the weights at a given step: model, data, training
            configuration.
        log: the run's log at that time; None if there was none, or an earlier version wrote this.
    """

    folder: Path
    state: RunState
    identity: Mapping[str, Any]
    log: LogState | None = None

    @property
    def is_split(self) -> bool:
        """Whether several processes wrote it, each its parts of the tensors."""
        return (self.folder / SPLIT_FOLDER).is_dir()

    @property
    def has_average(self) -> bool:
        """Whether it has averaged weights. Raises ValueError or OSError for a damaged layout."""
        if not self.is_split:
            return (self.folder / EMA_FILE).is_file()
        names = read_layout(self.folder / SPLIT_FOLDER).state_dict_metadata
        return any(name.startswith(_AVERAGE) for name in names)

    def require(self, identity: Mapping[str, Any], later: Mapping[str, Any]) -> None:
        """Raise ValueError, naming each difference, unless the run has this identity.

        Args:
            identity: the one asked for: model, data and training, flat.
            later: defaults of fields that earlier versions did not have.
        """
        own = {**later, **self.identity}
        differences = [
            f"  {name}: {own.get(name)!r} in the checkpoint, {identity.get(name)!r} asked"
            for name in sorted({*own, *identity})
            if own.get(name) != identity.get(name)
        ]
        if differences:
            raise ValueError(
                f"cannot resume from {self.folder}: it belongs to another run.\n"
                + "\n".join(differences)
                + "\nAsk for what the checkpoint has, or train in another folder."
            )

    def weights(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """Weights and buffers for a model, averaged if the run has an average.

        Args:
            model: of the run's configuration, on any device, for names and shapes of tensors.

        Raises:
            ValueError: the checkpoint has not all of them.
            OSError: a file cannot be read.
        """
        if not self.is_split:
            return read_safetensors(self.folder / (EMA_FILE if self.has_average else MODEL_FILE))[0]
        folder = self.folder / SPLIT_FOLDER
        layout = read_layout(folder)
        stored = layout.state_dict_metadata
        names: dict[str, str] = {}
        found: dict[str, Tensor] = {}
        for name, value in model.state_dict().items():
            key = f"{_AVERAGE}{name}" if f"{_AVERAGE}{name}" in stored else f"model.{name}"
            dtype = stored[key].properties.dtype if key in stored else value.dtype
            names[name], found[key] = key, torch.zeros(value.shape, dtype=dtype)
        load_split(found, folder, layout, alone=True)
        return {name: found[key] for name, key in names.items()}


@final
@dataclass(frozen=True)
class _StateFile:
    """The fields of state.json."""

    state: Mapping[str, Any]
    identity: Mapping[str, Any]
    sha256: Mapping[str, str]
    torch: str
    config_hash: str
    log: Mapping[str, Any] | None = None
    format_version: int = 0
    checksum: str = ""


def described(checkpoint: Checkpoint, hashes: Mapping[str, str]) -> dict[str, Any]:
    """The contents of state.json, with the SHA-256 of all other files."""
    log = checkpoint.log
    content = {
        "state": dataclasses.asdict(checkpoint.state),
        "identity": dict(checkpoint.identity),
        "config_hash": json_hash(checkpoint.identity),
        "log": None if log is None else dataclasses.asdict(log),
        "sha256": dict(hashes),
        "torch": torch.__version__,
        "format_version": _FORMAT_VERSION,
    }
    return {**content, _CHECKSUM: json_hash(content)}


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, verified.

    Raises:
        NewerFormatError: a later version of this library wrote it.
        ValueError: it is damaged.
        OSError: a file is absent or cannot be read.
    """
    path = folder / STATE_FILE
    content = read_json(path)
    version = content.get("format_version", 0)
    if isinstance(version, int) and version > _FORMAT_VERSION:
        raise NewerFormatError(
            f"{path} has format version {version}, this exactflow reads up to {_FORMAT_VERSION}"
        )
    file = made(_StateFile, content, path)
    hashed = {name: value for name, value in content.items() if name != _CHECKSUM}
    if file.config_hash != json_hash(file.identity) or (
        version and file.checksum != json_hash(hashed)
    ):
        raise ValueError(f"{path} does not have the SHA-256 it was saved with")
    state = made(RunState, file.state, f"{path}, its state", complete=True)
    log = None if file.log is None else made(LogState, file.log, f"{path}, its log")
    for name, expected in file.sha256.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{path}: expected files of the checkpoint, got {name!r}")
        with (folder / name).open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != expected:
                raise ValueError(f"{name} does not have the SHA-256 it was saved with")
    return Checkpoint(folder, state, file.identity, log)


def finished(folder: Path) -> list[Path]:
    """Folders of finished checkpoints in a run's folder of checkpoints, oldest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))
