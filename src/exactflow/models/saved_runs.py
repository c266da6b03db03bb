"""Models of runs that have not ended, or were never given a model folder: from checkpoints."""

import warnings
from pathlib import Path

from torch import Tensor

from exactflow.core.model import GenerativeModel
from exactflow.core.saved_run import (
    CHECKPOINTS_FOLDER,
    STATE_FILE,
    Checkpoint,
    finished,
    read_checkpoint,
)
from exactflow.models import registry

_MODEL = "model."  # prefix of the model's fields in a run's identity


def is_run(folder: Path) -> bool:
    """Whether this is the folder of a run, of its checkpoints, or of one checkpoint."""
    return (
        (folder / STATE_FILE).is_file()
        or (folder / CHECKPOINTS_FOLDER).is_dir()
        or bool(finished(folder))
    )


def averaged_model(folder: Path) -> tuple[GenerativeModel, dict[str, Tensor], Path]:
    """The model of the newest whole checkpoint; a warning says which weights were taken.

    No file is changed: the run may be going on.

    Args:
        folder: see `is_run`.

    Returns:
        The model on the meta device; its weights and buffers, averaged where the run has an
        average; the checkpoint's folder.

    Raises:
        ValueError: there is no whole checkpoint, or it is of a kind of model that is not known.
        OSError: a file cannot be read.
    """
    found = _newest(folder)
    fields = {
        name.removeprefix(_MODEL): value
        for name, value in found.identity.items()
        if name.startswith(_MODEL)
    }
    kind = fields.pop("kind", None)
    try:
        model = registry.without_numbers(str(kind), fields)
    except ValueError as error:
        raise ValueError(f"{found.folder / STATE_FILE}: {error}") from error
    weights = found.weights(model)
    which = "averaged weights" if found.has_average else "weights, of which it has no average,"
    whose = "" if found.folder == folder else " of the newest checkpoint"
    warnings.warn(
        f"{folder} holds no finished model: took the {which}{whose} after step {found.state.step}",
        stacklevel=3,
    )
    return model, weights, found.folder


def _newest(folder: Path) -> Checkpoint:
    """The newest checkpoint that is whole; a warning names newer ones that are damaged."""
    if (folder / STATE_FILE).is_file():
        return read_checkpoint(folder)
    inner = folder / CHECKPOINTS_FOLDER
    for candidate in reversed(finished(inner if inner.is_dir() else folder)):
        try:
            return read_checkpoint(candidate)
        except (FileNotFoundError, ValueError) as error:
            # Damaged, or removed meanwhile by the run, which keeps the newest ones only.
            warnings.warn(f"{candidate} is not whole ({error}): took an earlier one", stacklevel=4)
    raise ValueError(f"{folder}: expected a model or a run with a checkpoint, found neither yet")
