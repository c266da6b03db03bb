"""The tensors that a run carries on, by name: weights, their average, the optimizer's moments.

A run whose model is whole in every process writes them in files of their own (see `checkpoint`); a
split one writes a folder of PyTorch's distributed checkpoints, every process its parts. Either is
read by any number of processes and either way of training.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from exactflow.core.model import GenerativeModel
from exactflow.training import checkpoint as disk
from exactflow.training.optim import MovingAverage


@final
class RunTensors:
    """What is saved and restored.

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
        self._alike: Callable[[Tensor, Tensor], Tensor] = _same
        if split:
            from exactflow.training.split import split_like

            self._alike = split_like

    def files(self) -> dict[str, Callable[[], bytes]]:
        """Contents of files by their names; of a whole model."""
        average = self._average
        files = {
            disk.MODEL_FILE: lambda: disk.tensor_bytes(self._model.state_dict()),
            disk.OPTIMIZER_FILE: lambda: disk.optimizer_bytes(self._optimizer.state_dict()),
        }
        if average is not None:
            files[disk.EMA_FILE] = lambda: disk.tensor_bytes(average.state_dict())
        return files

    def named(self) -> dict[str, Tensor]:
        """All tensors by name, with a prefix for what they are; whole or split."""
        tensors = {f"model.{name}": value for name, value in self._model.state_dict().items()}
        if self._average is not None:
            tensors |= {f"average.{name}": value for name, value in self._average.values.items()}
        for name, parameter in self._parameters():
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    def restore(self, found: disk.Checkpoint) -> None:
        """Take over what a checkpoint has, however it was written."""
        if found.is_split:
            self._restore_split(found.folder / disk.SPLIT_FOLDER)
            return
        self._copy(self._model.state_dict(), found.tensors(disk.MODEL_FILE))
        if self._average is not None:
            self._copy(self._average.values, found.tensors(disk.EMA_FILE))
        moments = found.optimizer()["state"]
        self._set_optimizer(moments.get(index, {}) for index, _ in enumerate(self._parameters()))

    def _restore_split(self, folder: Path) -> None:
        from torch.distributed import checkpoint as dcp  # takes seconds to import

        keys = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        tensors = {name: value for name, value in self.named().items() if name in keys}
        parameters = dict(self._parameters())
        states: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
        for entry, described in keys.items():
            if not entry.startswith("optimizer."):
                continue
            _, key, name = entry.split(".", 2)
            assert isinstance(described, dcp.metadata.TensorStorageMetadata)
            alike = described.size == parameters[name].shape
            tensors[entry] = states[name][key] = (
                torch.zeros_like(parameters[name], requires_grad=False)
                if alike
                else torch.zeros(described.size, dtype=described.properties.dtype)
            )
        dcp.load(tensors, checkpoint_id=folder)
        self._set_optimizer(iter(states.values()))

    @torch.no_grad()
    def _copy(self, targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        for name, target in targets.items():
            target.copy_(self._alike(values[name], target))

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """In the optimizer's order."""
        names = {parameter: name for name, parameter in self._model.named_parameters()}
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                yield names[parameter], parameter

    def _set_optimizer(self, states: Iterator[Mapping[str, Tensor]]) -> None:
        """Give the optimizer the states of its parameters, in their order."""
        described = self._optimizer.state_dict()
        parts = {}
        for index, ((_, parameter), state) in enumerate(
            zip(self._parameters(), states, strict=True)
        ):
            if state:  # none for a parameter that never had a gradient
                parts[index] = {
                    key: self._alike(value, parameter) if value.shape == parameter.shape else value
                    for key, value in state.items()
                }
        self._optimizer.load_state_dict({**described, "state": parts})


def _same(value: Tensor, pattern: Tensor) -> Tensor:
    return value
