"""Loading what `save_pretrained` wrote, from a folder or from the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from exactflow import registry
from exactflow.core.model import GenerativeModel
from exactflow.core.serialization import CLASS_NAMES, CONFIG_FILE, FORMAT_VERSION, WEIGHTS_FILE

ALIGNMENT = 64  # bytes, of tensors that PyTorch allocates


def from_pretrained(
    path_or_hub_id: str | Path, *, device: torch.device | str = "cpu"
) -> GenerativeModel:
    """The model that `save_pretrained` wrote, in evaluation mode.

    Args:
        path_or_hub_id: a folder (a run folder's `model/` is found by itself), or an id
            "owner/name", which needs the extra `hub`.
        device: where to put the model.

    Raises:
        FileNotFoundError: no such folder, and no hub id either.
        ValueError: a folder that holds no model, a damaged one, or one of a newer format.
    """
    folder = _locate(path_or_hub_id)
    description = read_config(folder)
    with torch.device("meta"):
        model = registry.from_config(description["kind"], description["config"])
    try:
        state = load_file(folder / WEIGHTS_FILE, device=str(device))
        model.load_state_dict({name: _aligned(v) for name, v in state.items()}, assign=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} does not hold the weights that {CONFIG_FILE} beside it "
            f"describes: {error}"
        ) from error
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.class_names = _class_names(description, model.num_classes, folder)
    model.home = folder
    return model.eval()


def _class_names(description: dict, count: int, folder: Path) -> tuple[str, ...]:
    """What the card calls the classes of a model; empty if nothing."""
    names = description.get("card", {}).get(CLASS_NAMES, [])
    if names and (len(names) != count or not all(isinstance(name, str) for name in names)):
        raise ValueError(
            f"{folder / CONFIG_FILE}: expected {count} {CLASS_NAMES}, one for each class, got "
            f"{names!r}"
        )
    return tuple(names)


def _aligned(value: Tensor) -> Tensor:
    """The tensor where an allocator would put it: a product's last bit depends on the address.

    Tensors of a mapped file begin wherever its header ends.
    """
    return value.clone() if value.data_ptr() % ALIGNMENT else value


def recorded_data(model: GenerativeModel) -> dict[str, Any]:
    """What the card of a loaded model says of the data it was trained on; empty if nothing."""
    if model.home is None:
        return {}
    return read_config(model.home).get("card", {}).get("training data") or {}


def read_config(folder: Path) -> dict:
    """The contents of config.json: kind, config, card. Raises ValueError if it is none of ours."""
    path = folder / CONFIG_FILE
    try:
        description = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a model's {CONFIG_FILE} at {path}: {error}") from error
    if not isinstance(description, dict) or not {"kind", "config"} <= description.keys():
        raise ValueError(f"{path} is not an exactflow configuration: no 'kind' and 'config'")
    version = description.get("format_version", 0)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, this exactflow reads up to {FORMAT_VERSION}"
        )
    return description


def _locate(path_or_hub_id: str | Path) -> Path:
    path = Path(path_or_hub_id)
    if path.is_dir():
        nested = path / "model"
        return nested if (nested / CONFIG_FILE).exists() else path
    text = str(path_or_hub_id)
    if path.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"expected a model folder or a hub id 'owner/name', got {text!r}: no such folder"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError("hub ids need the extra: pip install 'exactflow[hub]'") from error
    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.md"]))
    except Exception as error:  # the hub client raises dozens of kinds: all mean "not loaded"
        raise FileNotFoundError(
            f"no folder {text!r} here, and the hub did not give it: {error}"
        ) from error
