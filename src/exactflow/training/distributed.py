"""One model on several processes: whole in each of them, or with its parameters split over them.

The engine is PyTorch's: `DistributedDataParallel`, or `fully_shard` (FSDP2) over a mesh. A batch
gives the same gradient either way, see `parallel.shared_batch`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from exactflow.core.model import GenerativeModel
from exactflow.parallel.process_group import Processes
from exactflow.parallel.shared_batch import shared_by
from exactflow.training.optim import MovingAverage, TrainConfig

STATE_COPIES = 5  # weights, gradients, two moments, average
STATE_SHARE = 0.5  # of a device's memory that these may take with "auto" before they are split


@final
class DataParallel:
    """A model that the processes of a group train together, each on its rows of every batch.

    Args:
        model: the same in every process. Where its parameters are split, it is without contents
            while the split copy is trained.
        config: `parallel` says whether parameters are split.
        group: the processes; a single one trains the model as it is.

    Raises:
        ValueError: the batch does not fall into equal parts, or the processes do not fit
            `parallel`.

    Attributes:
        home: the model that was given.
        trained: the module whose parameters move: `home`, or a copy of it with split parameters.
        is_split: whether it is such a copy.
    """

    def __init__(self, model: GenerativeModel, config: TrainConfig, group: Processes) -> None:
        config.micro_batch(group.count)  # raises where the batch does not fall into equal parts
        self.home, self.trained, self._group = model, model, group
        self.is_split = False
        self._evaluated: nn.Module = model
        if group.count == 1:
            return
        mode = _chosen(model, config)
        if mode == "ddp":
            on_gpu = model.device.type == "cuda"
            self._evaluated = DistributedDataParallel(
                _WithUnused(model),
                device_ids=[model.device] if on_gpu else None,
                # Buckets are otherwise laid out anew after the first step: a resumed run would add
                # gradients in another order.
                find_unused_parameters=True,
            )
        else:
            from exactflow.training import split  # whose engine takes seconds to import

            shards = processes_of_a_node() if mode == "hsdp" else group.count
            self.is_split = True
            self.trained = self._evaluated = split.copy_of(
                model, shards, group, reduced=config.precision == "bfloat16"
            )
            _empty(model)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Compute loss and gradient of a micro-batch inside; the last one adds up all gradients."""
        evaluated, waiting = self._evaluated, nullcontext()
        if isinstance(evaluated, DistributedDataParallel) and not last:
            waiting = evaluated.no_sync()
        with shared_by(self._group.rank, self._group.count), waiting:
            yield

    def loss(self, images: Tensor, label: Tensor | None, noise: torch.Generator) -> Tensor:
        """Loss of each of this process's images."""
        return self._evaluated(images, label, noise)

    @contextmanager
    def averaged(self, average: MovingAverage | None) -> Iterator[GenerativeModel]:
        """The whole model in every process, with averaged weights where there is an average."""
        if not self.is_split:
            with nullcontext() if average is None else average.applied():
                yield self.home
            return
        self._fill(average)
        try:
            yield self.home
        finally:
            _empty(self.home)

    def whole(self, value: Tensor) -> Tensor:
        """The whole of a tensor of the trained module; all processes call this together."""
        if not self.is_split:
            return value
        from torch.distributed.tensor import DTensor  # takes a while to import

        return value.full_tensor() if isinstance(value, DTensor) else value

    def finish(self, average: MovingAverage | None) -> None:
        """Leave `home` whole for good, with averaged weights where there is an average."""
        if self.is_split:
            self._fill(average)
        elif average is not None:
            average.apply()

    @torch.no_grad()
    def _fill(self, average: MovingAverage | None) -> None:
        """Give `home` whole parameters, and the buffers."""
        values = dict(self.trained.named_parameters()) if average is None else average.values
        for name, value in values.items():
            _set_parameter(self.home, name, self.whole(value).detach())
        for mine, moved in zip(self.home.buffers(), self.trained.buffers(), strict=True):
            mine.copy_(moved)


@final
class _WithUnused(nn.Module):
    """The model beside an unused parameter, without which PyTorch would warn that there is none."""

    def __init__(self, model: GenerativeModel) -> None:
        super().__init__()
        self.model = model
        self.unused = nn.Parameter(torch.zeros(1, device=model.device))

    def forward(self, images: Tensor, label: Tensor | None, noise: torch.Generator) -> Tensor:
        return self.model(images, label, noise)


def _chosen(model: GenerativeModel, config: TrainConfig) -> Literal["ddp", "fsdp", "hsdp"]:
    """The way of sharing; "auto" splits parameters that take too much of a device's memory."""
    if config.unsplit and config.parallel in ("fsdp", "hsdp"):
        raise ValueError(
            f"{config.unsplit} needs all parameters in every process: expected parallel 'auto' or "
            f"'ddp', got {config.parallel!r}"
        )
    match config.parallel:
        case "ddp" | "fsdp" | "hsdp":
            return config.parallel
        case "auto":
            pass
    if config.unsplit or model.device.type != "cuda":
        return "ddp"
    state = STATE_COPIES * sum(p.nbytes for p in model.parameters())
    if state <= STATE_SHARE * torch.cuda.get_device_properties(model.device).total_memory:
        return "ddp"
    count = torch.distributed.get_world_size()
    return "hsdp" if 1 < processes_of_a_node() < count else "fsdp"


def processes_of_a_node() -> int:
    """Processes that torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", torch.distributed.get_world_size()))


def _empty(model: nn.Module) -> None:
    """Replace all parameters by ones without contents."""
    for name, parameter in list(model.named_parameters()):
        _set_parameter(model, name, torch.empty_like(parameter, device="meta"))


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    trained = module.get_parameter(leaf).requires_grad
    module.register_parameter(leaf, nn.Parameter(value, requires_grad=trained))
