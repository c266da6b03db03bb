"""Foreign files of tensors: PyTorch's and safetensors, and what lies beside the tensors in them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from exactflow.core.files import parse_json
from exactflow.core.model import GenerativeModel
from exactflow.core.tensor_files import read_pickled, read_safetensors

Model = TypeVar("Model", bound=GenerativeModel)
Hints = Mapping[str, Any]
SIZE = ("channels", "height", "width")  # hints that are no fields of a configuration
_NESTS = ("model_ema", "ema", "model")  # where trainers keep weights; averaged ones first


@final
@dataclass(frozen=True)
class ForeignFile:
    """The tensors of a file, and the configuration beside them.

    Attributes:
        path: of the file.
        weights: tensors by name, without the prefixes of parallel and compiled training.
        config: the run's configuration, if the file holds it.
    """

    path: Path
    weights: dict[str, Tensor]
    config: Mapping[str, Any] | None = None


@final
@dataclass(frozen=True)
class PublishedFiles:
    """How the published files of one family are recognised and read.

    Attributes:
        name: of the family, in messages.
        mark: a key that the files of no other family have.
        read: the model in a file, given what the file does not tell.
        needs: hints that must be given.
        takes: hints that may be given.
    """

    name: str
    mark: str
    read: Callable[[ForeignFile, Hints], GenerativeModel]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


def size_in(hints: Hints) -> tuple[int, int]:
    """Height and width. Raises ValueError where hints have none."""
    if "height" not in hints:
        raise ValueError("the file does not tell height: give it, on the command line --height")
    return hints["height"], hints.get("width", hints["height"])


def without_size(hints: Hints) -> dict[str, Any]:
    """The hints that are fields of a configuration."""
    return {name: value for name, value in hints.items() if name not in SIZE}


def filled(kind: type[Model], config: Any, weights: Mapping[str, Tensor]) -> Model:
    """A model with these tensors for its parameters and buffers, in evaluation mode.

    Raises:
        ValueError: tensors are missing, left over or of another shape.
    """
    with torch.device("meta"):
        model = kind(config)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"not a complete {kind.__name__} checkpoint: {error}") from error
    return model.eval()


def read_tensors(path: Path) -> ForeignFile:
    """Read a file of plain tensors: nothing in it is executed.

    A state dict may be bare or under "model_ema", "ema" or "model", with a mapping "config" beside
    it; in safetensors the configuration is JSON in the metadata, under "config".

    Raises:
        FileNotFoundError: no such file.
        ValueError: anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint file, got {path}: no such file")
    content = _safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)
    state, config = content, None
    if isinstance(content, Mapping):
        nest = next((key for key in _NESTS if isinstance(content.get(key), Mapping)), None)
        state = content if nest is None else content[nest]
        config = None if nest is None else content.get("config")
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected a flat state dict of tensors")
    if config is not None and not isinstance(config, Mapping):
        raise ValueError(f"{path}: expected a mapping under 'config', got {config!r:.80}")
    weights = {_plain(str(name)): value for name, value in state.items()}
    return ForeignFile(path, weights, config)


def _plain(name: str) -> str:
    return name.removeprefix("module.").removeprefix("_orig_mod.")


def _safetensors(path: Path) -> dict[str, Any]:
    weights, metadata = read_safetensors(path)
    if "config" not in metadata:
        return weights
    try:
        return {"model": weights, "config": parse_json(metadata["config"], "its config")}
    except ValueError as error:
        raise ValueError(f"{path} is not a whole file of safetensors: {error}") from error
