"""A run on disk: checkpoints that are whole or absent.

    run_dir/checkpoints/step_00000500/model.safetensors    weights and buffers
                                      ema.safetensors      the same with averaged weights, if any
                                      optimizer.pt         loads with weights_only=True
                                      state.json           where the run stands, hashes of the rest

A model whose parameters are split over processes has a folder tensors/ of PyTorch's distributed
checkpoints in place of the first three. No generator state is saved: all randomness is a function
of the seed and the step.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import safetensors.torch
import torch
from torch import Tensor

from exactflow.core.model import GenerativeModel
from exactflow.core.serialization import explained_write, write_atomically
from exactflow.data.augmentation import Augmentation
from exactflow.data.datasets import ImageDataset
from exactflow.training.optim import TrainConfig

MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"
SPLIT_FOLDER = "tensors"

# What may differ when a run is resumed: it changes no weight.
_FREE_FIELDS = frozenset(
    {
        *("activation_checkpointing", "num_workers", "parallel"),
        *("log_every", "checkpoint_every", "keep_checkpoints"),
    }
)

# A folder without its files is damaged; any other OSError says nothing about what is in them.
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)

_NAME = re.compile(r"step_\d{8,}")


@final
@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        images: images seen, step times batch size.
        seconds: wall-clock time in all sessions of the run.
        step_seconds: the part of it that optimizer steps took, without callbacks and files.
        logged_step: step of the last line of the log when this was saved, 0 before the first.
        loss_sum: sum of the losses of the steps since that line.
        grad_norm_sum: the same of gradient norms.
    """

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    logged_step: int = 0
    loss_sum: float = 0.0
    grad_norm_sum: float = 0.0

    def logged(self) -> "RunState":
        """The state once `step` has its line in the log."""
        return dataclasses.replace(self, logged_step=self.step, loss_sum=0.0, grad_norm_sum=0.0)


@final
@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole: just written, or verified by its hashes.

    Attributes:
        folder: where its files lie.
        state: where the run stood.
        identity: what decides the weights at a given step: model, data, training configuration.
    """

    folder: Path
    state: RunState
    identity: Mapping[str, Any]

    @property
    def is_split(self) -> bool:
        """Whether processes wrote it together, each its parts."""
        return (self.folder / SPLIT_FOLDER).is_dir()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The content of a .safetensors file, on the CPU."""
        return safetensors.torch.load_file(self.folder / name)

    def optimizer(self) -> dict[str, Any]:
        """The optimizer's state dict, on the CPU."""
        return torch.load(self.folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)

    def require(self, identity: Mapping[str, Any], later: Mapping[str, Any]) -> None:
        """Raise ValueError, naming each difference, unless this is a run of that identity.

        Args:
            identity: what is asked for, see `identity`.
            later: what held of fields before they existed: their defaults, see `defaults`.
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


@final
class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie, made at the first save.
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def save(
        self,
        state: RunState,
        identity: Mapping[str, Any],
        files: Mapping[str, Callable[[], bytes]],
    ) -> Checkpoint:
        """Write a whole checkpoint.

        Args:
            state: where the run stands.
            identity: see `Checkpoint`.
            files: content by file name, made one at a time to save memory.

        Raises:
            OSError: it could not be written; earlier checkpoints are intact.
        """
        with self.undone(state.step):
            partial = self.begin(state.step)
            hashes = {name: _write(partial / name, make()) for name, make in files.items()}
            return self.commit(state, identity, hashes)

    def begin(self, step: int) -> Path:
        """An empty folder for the files of a checkpoint. Raises OSError."""
        partial = self._partial(step)
        with explained_write(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        return partial

    def commit(
        self, state: RunState, identity: Mapping[str, Any], hashes: Mapping[str, str]
    ) -> Checkpoint:
        """Give the folder, all files of which are on disk, its name; remove the oldest ones.

        Args:
            state: where the run stood.
            identity: see `Checkpoint`.
            hashes: SHA-256 by file name.

        Raises:
            OSError: it could not be written.
        """
        partial, final_ = self._partial(state.step), self.folder_of(state.step)
        text = json.dumps(_describe(state, identity, hashes), indent=2, allow_nan=False)
        _write(partial / STATE_FILE, text.encode())
        with explained_write(final_):
            _sync_folder(partial)
            partial.rename(final_)
            _sync_folder(self._folder)
        for old in self._names()[: -self._keep]:
            shutil.rmtree(old)
        return Checkpoint(final_, state, identity)

    def folder_of(self, step: int) -> Path:
        """Where the checkpoint of a step lies once it is whole."""
        return self._folder / f"step_{step:08d}"

    @contextmanager
    def undone(self, step: int) -> Iterator[None]:
        """An OSError inside removes what was begun."""
        try:
            yield
        except OSError:
            shutil.rmtree(self._partial(step), ignore_errors=True)
            raise

    def _partial(self, step: int) -> Path:
        return self._folder / f".{self.folder_of(step).name}.partial"

    def newest(self) -> Checkpoint | None:
        """The newest intact checkpoint; None if there is none.

        Damaged ones are set aside as `step_*.damaged` with a warning that says what is wrong;
        leftovers of an interrupted save are removed.

        Raises:
            OSError: a file is there and cannot be read, which another day it may.
        """
        for leftover in self._folder.glob(".step_*.partial"):
            shutil.rmtree(leftover)
        for folder in reversed(self._names()):
            try:
                return _verified(folder)
            except (*_ABSENT, ValueError, KeyError, TypeError) as error:
                aside = folder.with_name(f"{folder.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                warnings.warn(
                    f"checkpoint {folder} is damaged ({error}): set aside as {aside.name}, "
                    "training resumes from the one before, or from the start",
                    stacklevel=2,
                )
        return None

    def _names(self) -> list[Path]:
        """Folders of finished checkpoints, oldest first."""
        found = [p for p in self._folder.glob("step_*") if _NAME.fullmatch(p.name)]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def identity(
    model: GenerativeModel, dataset: ImageDataset, config: TrainConfig, augmentation: Augmentation
) -> dict[str, Any]:
    """What decides the weights after a given step, flat and as JSON gives it back."""
    training = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE_FIELDS}
    fields = {
        "model.kind": model.kind,
        **{f"model.{name}": value for name, value in dataclasses.asdict(model.config).items()},
        "data.fingerprint": dataset.fingerprint,
        **{f"data.{name}": value for name, value in dataclasses.asdict(augmentation).items()},
        **{f"training.{name}": value for name, value in training.items()},
    }
    return json.loads(json.dumps(fields))


def defaults(model: GenerativeModel, config: TrainConfig) -> dict[str, Any]:
    """The defaults of the model's and the training's fields, named as `identity` names them."""
    found = {}
    for section, instance in (("model", model.config), ("training", config)):
        for field in dataclasses.fields(instance):
            free = section == "training" and field.name in _FREE_FIELDS
            if field.default is not dataclasses.MISSING and not free:
                found[f"{section}.{field.name}"] = field.default
    return json.loads(json.dumps(found))


def tensor_bytes(state: Mapping[str, Tensor]) -> bytes:
    """A state dict as the content of a .safetensors file."""
    return safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in state.items()})


def optimizer_bytes(state: Mapping[str, Any]) -> bytes:
    """An optimizer's state dict as `torch.save` writes it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> str:
    """Write and sync a file; its SHA-256."""
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def _describe(
    state: RunState, identity: Mapping[str, Any], hashes: Mapping[str, str]
) -> dict[str, Any]:
    canonical = json.dumps(identity, sort_keys=True)
    return {
        "state": dataclasses.asdict(state),
        "identity": dict(identity),
        "config_hash": hashlib.sha256(canonical.encode()).hexdigest(),
        "sha256": dict(hashes),
        "torch": torch.__version__,
    }


def _verified(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`. Raises OSError, ValueError, KeyError or TypeError if damaged."""
    described = json.loads((folder / STATE_FILE).read_text())
    for name, expected in described["sha256"].items():
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise ValueError(f"{name} does not have the SHA-256 it was saved with")
    return Checkpoint(folder, RunState(**described["state"]), described["identity"])


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
