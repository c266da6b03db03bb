"""The tensors in a run's checkpoints, by name: weights, their average, the optimizer's moments.

A run whose model is whole in every process writes them in files of their own (see `checkpoint`); a
split one writes a folder of PyTorch's distributed checkpoints, every process its parts. Both are
read whatever the number of processes and the way of training.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from exactflow.core.model import GenerativeModel
from exactflow.core.saved_run import (
    EMA_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    SPLIT_FOLDER,
    Checkpoint,
)
from exactflow.core.split_tensors import load_split, read_layout
from exactflow.core.tensor_files import read_pickled, read_safetensors
from exactflow.training.checkpoint import optimizer_bytes, tensor_bytes
from exactflow.training.optim import MovingAverage

_OPTIMIZER = "optimizer."


@final
class RunTensors:
    """The tensors that a run saves and restores.

    Args:
        model: whole, or split.
        optimizer: of its parameters.
        average: of its weights, if any.
        split: whether the model is split.
    """

    def __init__(
        self,
        model: GenerativeModel,
        optimizer: torch.optim.Optimizer,
        average: MovingAverage | None,
        split: bool,
    ) -> None:
        self._model, self._optimizer, self._average = model, optimizer, average
        self._like: Callable[[Tensor, Tensor], Tensor] = lambda value, _: value
        if split:
            from exactflow.training.split import split_like

            self._like = split_like

    def files(self) -> dict[str, Callable[[], bytes]]:
        """Functions that make the contents of the files of a whole model, by file name."""
        average = self._average
        files = {
            MODEL_FILE: lambda: tensor_bytes(self._model.state_dict()),
            OPTIMIZER_FILE: lambda: optimizer_bytes(self._optimizer.state_dict()),
        }
        if average is not None:
            files[EMA_FILE] = lambda: tensor_bytes(average.state_dict())
        return files

    def named(self) -> dict[str, Tensor]:
        """All tensors, whole or split, by names that begin with model, average or optimizer."""
        tensors = {f"model.{name}": value for name, value in self._model.state_dict().items()}
        if self._average is not None:
            tensors |= {f"average.{name}": value for name, value in self._average.values.items()}
        for name, parameter in self._parameters():
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    def restore(self, found: Checkpoint) -> None:
        """Take over the tensors of a checkpoint, whole or split.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape.
            OSError: it cannot be read.
        """
        if found.is_split:
            self._restore_split(found.folder / SPLIT_FOLDER)
            return
        self._copy(self._model.state_dict(), found.folder / MODEL_FILE)
        if self._average is not None:
            self._copy(self._average.values, found.folder / EMA_FILE)
        moments = _moments(found.folder / OPTIMIZER_FILE)
        self._set_optimizer(moments.get(index, {}) for index, _ in enumerate(self._parameters()))

    def _restore_split(self, folder: Path) -> None:
        layout = read_layout(folder)
        tensors = {n: v for n, v in self.named().items() if not n.startswith(_OPTIMIZER)}
        parameters = dict(self._parameters())
        states: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
        for entry, described in layout.state_dict_metadata.items():
            if not entry.startswith(_OPTIMIZER):
                continue
            key, _, name = entry.removeprefix(_OPTIMIZER).partition(".")
            if name not in parameters or described.size not in ((), parameters[name].shape):
                raise ValueError(
                    f"{folder}: expected moments of parameters and numbers of steps, got {entry} "
                    f"of shape {tuple(described.size)}"
                )
            dtype = described.properties.dtype
            tensors[entry] = states[name][key] = (
                torch.zeros_like(parameters[name], requires_grad=False)
                if described.size == parameters[name].shape
                else torch.zeros((), dtype=dtype)
            )
        load_split(tensors, folder, layout, alone=not torch.distributed.is_initialized())
        self._set_optimizer(iter(states.values()))

    @torch.no_grad()
    def _copy(self, targets: Mapping[str, Tensor], path: Path) -> None:
        values, _ = read_safetensors(path)
        for name, target in targets.items():
            if name not in values or values[name].shape != target.shape:
                found = "none" if name not in values else f"one of {tuple(values[name].shape)}"
                raise ValueError(
                    f"{path}: expected a tensor {name} of shape {tuple(target.shape)}, got {found}"
                )
            target.copy_(self._like(values[name], target))

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters in the optimizer's order."""
        names = {parameter: name for name, parameter in self._model.named_parameters()}
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                yield names[parameter], parameter

    def _set_optimizer(self, states: Iterator[Mapping[str, Tensor]]) -> None:
        """Give the optimizer the states of its parameters, in their order."""
        described = self._optimizer.state_dict()
        parts = {}
        for index, ((name, parameter), state) in enumerate(
            zip(self._parameters(), states, strict=True)
        ):
            for key, value in state.items():
                if value.shape not in (parameter.shape, ()):
                    raise ValueError(
                        f"the optimizer's state: expected {key} of {name} of shape "
                        f"{tuple(parameter.shape)}, got {tuple(value.shape)}"
                    )
            if state:  # none for a parameter that never had a gradient
                parts[index] = {
                    key: self._like(value, parameter) if value.shape == parameter.shape else value
                    for key, value in state.items()
                }
        self._optimizer.load_state_dict({**described, "state": parts})


def _moments(path: Path) -> Mapping[int, Mapping[str, Tensor]]:
    """The optimizer's moments by the indices of parameters, from a file of `torch.save`."""
    content = read_pickled(path)
    state = content.get("state") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(
        isinstance(index, int)
        and isinstance(moments, Mapping)
        and all(isinstance(value, Tensor) for value in moments.values())
        for index, moments in state.items()
    ):
        raise ValueError(f"{path}: expected the state of an optimizer, got something else")
    return {
        index: {key: value.clone() for key, value in moments.items()}  # off the file
        for index, moments in state.items()
    }
