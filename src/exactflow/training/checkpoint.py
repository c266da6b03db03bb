"""Write the checkpoints of a run, each whole or not at all; `core.saved_run` has their layout.

No generator state is saved: all randomness is a function of the seed and the step.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import safetensors.torch
import torch
from torch import Tensor

from exactflow.core.files import explained_write, sync_folder, write_atomically
from exactflow.core.model import GenerativeModel
from exactflow.core.saved_run import (
    STATE_FILE,
    Checkpoint,
    LogState,
    NewerFormatError,
    RunState,
    described,
    finished,
    read_checkpoint,
)
from exactflow.data.augmentation import Augmentation
from exactflow.data.datasets import ImageDataset
from exactflow.training.optim import TrainConfig, total_steps

# What may differ when a run is resumed: it changes no weight.
_FREE_FIELDS = {"activation_checkpointing", "num_workers", "parallel"}
_FREE_FIELDS |= {"log_every", "checkpoint_every", "keep_checkpoints"}

# A checkpoint that lacks a file is damaged; any other OSError may pass.
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


@final
class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they are, made at the first save.
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep

    def save(
        self,
        state: RunState,
        identity: Mapping[str, Any],
        files: Mapping[str, Callable[[], bytes]],
        log: LogState | None = None,
    ) -> Checkpoint:
        """Write a whole checkpoint.

        Args:
            state: where the run stands.
            identity: see `Checkpoint`.
            files: content by file name, made one at a time to save memory.
            log: see `Checkpoint`.

        Raises:
            OSError: it could not be written; earlier checkpoints are intact.
        """
        with self.removed_on_error(state.step):
            partial = self.begin(state.step)
            hashes = {name: _write(partial / name, make()) for name, make in files.items()}
            return self.commit(state, identity, hashes, log)

    def begin(self, step: int) -> Path:
        """An empty folder for the files of a checkpoint. Raises OSError."""
        partial = self._partial(step)
        with explained_write(partial):
            if self._is_inside:
                shutil.rmtree(partial, ignore_errors=True)
            elif partial.exists():
                partial.rename(_free(partial.with_name(f"{partial.name}.left")))
            partial.mkdir(parents=True)
        return partial

    def commit(
        self,
        state: RunState,
        identity: Mapping[str, Any],
        hashes: Mapping[str, str],
        log: LogState | None,
    ) -> Checkpoint:
        """Give a folder its final name once all its files are on disk; remove old checkpoints.

        Arguments as of `save`, but for the SHA-256 of the files by their names. Raises OSError.
        """
        partial, final_ = self._partial(state.step), self.folder_of(state.step)
        made = Checkpoint(final_, state, identity, log)
        text = json.dumps(described(made, hashes), indent=2, allow_nan=False)
        _write(partial / STATE_FILE, text.encode())
        with explained_write(final_):
            sync_folder(partial)
            partial.rename(final_)
            sync_folder(self._folder)
        for old in finished(self._folder)[: -self._keep] if self._is_inside else ():
            _remove(old)
        return made

    @property
    def _is_inside(self) -> bool:
        """Whether checkpoints lie in the run's folder, and not behind a link to another place.

        Other runs may need what is there: nothing is removed behind a link.
        """
        return self._folder.resolve().is_relative_to(self._folder.parent.resolve())

    def folder_of(self, step: int) -> Path:
        """The folder of the whole checkpoint of a step."""
        return self._folder / f"step_{step:08d}"

    @contextmanager
    def removed_on_error(self, step: int) -> Iterator[None]:
        """Remove the unfinished checkpoint of a step where an OSError is raised inside."""
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
        leftovers of an interrupted save are removed. Where the folder is a link that leads out of
        the run's, nothing is ever removed, and a warning says so.

        Raises:
            OSError: a file is there and cannot be read now.
        """
        if not self._is_inside:
            warnings.warn(
                f"{self._folder} is a link to {self._folder.resolve()}, outside of the run's "
                "folder: nothing is removed there, so that all checkpoints stay",
                stacklevel=2,
            )
        for leftover in self._folder.glob(".step_*.partial") if self._is_inside else ():
            _remove(leftover)
        for folder in reversed(finished(self._folder)):
            try:
                return read_checkpoint(folder)
            except NewerFormatError:
                raise
            except (*_ABSENT, ValueError) as error:
                aside = _free(folder.with_name(f"{folder.name}.damaged"))
                folder.rename(aside)
                warnings.warn(
                    f"checkpoint {folder} is damaged ({error}): set aside as {aside.name}, "
                    "training resumes from the one before, or from the start",
                    stacklevel=2,
                )
        return None


def identity(
    model: GenerativeModel, dataset: ImageDataset, config: TrainConfig, augmentation: Augmentation
) -> dict[str, Any]:
    """The fields that determine the weights after a given step, by "SECTION.FIELD"."""
    training = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE_FIELDS}
    fields = {
        "model.kind": model.kind,
        **{f"model.{name}": value for name, value in dataclasses.asdict(model.config).items()},
        "data.fingerprint": dataset.fingerprint,
        **{f"data.{name}": value for name, value in dataclasses.asdict(augmentation).items()},
        **{f"training.{name}": value for name, value in training.items()},
    }
    return json.loads(json.dumps(fields))  # as it is read back


def grown(
    found: Checkpoint, identity: Mapping[str, Any], total: int, num_images: int
) -> Mapping[str, Any]:
    """The identity of a run, with the old length of a finished run that is to take more steps.

    Args:
        found: the run's newest checkpoint.
        identity: asked for.
        total: steps asked for.
        num_images: of the data.
    """
    lengths = {name: found.identity[f"training.{name}"] for name in ("steps", "epochs")}
    batch = found.identity["training.batch_size"]
    before = total_steps(**lengths, epoch=max(num_images // batch, 1))
    if not found.state.step == before < total:
        return identity
    return {**identity, **{f"training.{name}": value for name, value in lengths.items()}}


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


def _remove(folder: Path) -> None:
    """Remove a folder with its contents; of a link, the link alone."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def _free(path: Path) -> Path:
    """The path, with the smallest number after its name that makes it free if it is not."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not os.path.lexists(p))
