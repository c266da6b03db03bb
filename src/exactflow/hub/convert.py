"""Published checkpoints, read into models of this library.

Only tensors are read (`weights_only=True`). What names and shapes of the tensors tell is taken from
them; what they are silent about must be said.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exactflow.core.model import GenerativeModel
from exactflow.flows import denseflow_published, macow_published, tarflow_published


def convert(
    checkpoint: str | Path,
    *,
    channels: int | None = None,
    height: int | None = None,
    width: int | None = None,
    levels: int | None = None,
    noise_std: float | None = None,
) -> GenerativeModel:
    """The model in a published TarFlow, MaCow or DenseFlow file, in evaluation mode.

    Args:
        checkpoint: a state dict as the authors publish it, bare or under the key "model".
        channels: image channels; TarFlow only, where neither 3 nor 1 fits the weights uniquely.
        height: image height in pixels. TarFlow: for images that are not square; MaCow, DenseFlow:
            always, since convolutions fit any size.
        width: likewise; MaCow, DenseFlow: `height` where absent.
        levels: grey levels; MaCow only, whose weights do not tell.
        noise_std: training noise, 0 for uniform; TarFlow only, where the file name does not tell.

    Raises:
        FileNotFoundError: no such file.
        ValueError: anything that is not such a checkpoint, or a hint that is missing or has no
            meaning for this one, with what was expected.
    """
    path = Path(checkpoint)
    state = _read_tensors(path)
    hints = {
        "channels": channels,
        "height": height,
        "width": width,
        "levels": levels,
        "noise_std": noise_std,
    }
    given = {name: value for name, value in hints.items() if value is not None}
    if tarflow_published.MARK in state:
        _check(path, "TarFlow", given, takes=("channels", "height", "noise_std"))
        return tarflow_published.from_published(state, path.stem, **given)
    if macow_published.MARK in state:
        _check(path, "MaCow", given, needs=("height", "levels"), takes=("width",))
        assert height is not None
        assert levels is not None
        return macow_published.from_published(state, (height, width or height), levels)
    if denseflow_published.MARK in state:
        _check(path, "DenseFlow", given, needs=("height",), takes=("width",))
        assert height is not None
        return denseflow_published.from_published(state, (height, width or height))
    raise ValueError(
        f"{path} is no published checkpoint of TarFlow, MaCow or DenseFlow "
        f"(its first keys: {list(state)[:3]})"
    )


def _check(
    path: Path,
    family: str,
    given: Mapping[str, Any],
    *,
    needs: tuple[str, ...] = (),
    takes: tuple[str, ...] = (),
) -> None:
    """Raise ValueError unless the hints are what the family needs and may take."""
    missing = [name for name in needs if name not in given]
    if missing:
        raise ValueError(f"{path}: the weights of a {family} do not tell its {missing[0]}: give it")
    foreign = [name for name in given if name not in (*needs, *takes)]
    if foreign:
        raise ValueError(f"{path}: {foreign[0]} means nothing for a {family}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint file, got {path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling foreign bytes can fail in any way
        raise ValueError(
            f"{path} is not a PyTorch file of plain tensors (nothing else is loaded): {error}"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        state = state["model"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected a flat state dict of tensors")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
