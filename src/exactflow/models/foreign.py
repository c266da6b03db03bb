"""Foreign files of tensors: PyTorch's and safetensors, and what lies beside the tensors in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor

from exactflow.core.serialization import parse_json
from exactflow.core.tensor_files import read_pickled, read_safetensors

_NESTS = ("model_ema", "model")  # where training checkpoints keep weights; averaged ones first


@final
@dataclass(frozen=True)
class ForeignFile:
    """What a file holds.

    Attributes:
        path: where it lies.
        weights: tensors by name, without the prefix of parallel training.
        config: the run's configuration, where it is in the file.
    """

    path: Path
    weights: dict[str, Tensor]
    config: Mapping[str, Any] | None = None


def read_tensors(path: Path) -> ForeignFile:
    """Read a file of plain tensors: nothing in it is executed.

    A state dict may be bare or under "model_ema" or "model", with a mapping "config" beside it; in
    safetensors the configuration is JSON in the metadata, under "config".

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
    weights = {str(name).removeprefix("module."): value for name, value in state.items()}
    return ForeignFile(path, weights, config)


def _safetensors(path: Path) -> dict[str, Any]:
    weights, metadata = read_safetensors(path)
    if "config" not in metadata:
        return weights
    try:
        return {"model": weights, "config": parse_json(metadata["config"], "its config")}
    except ValueError as error:
        raise ValueError(f"{path} is not a whole file of safetensors: {error}") from error
