"""Models whose parameters are split over processes, by PyTorch's `fully_shard` (FSDP2, HSDP)."""

from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from exactflow.core.model import GenerativeModel
from exactflow.parallel.process_group import Processes


def copy_of(
    model: GenerativeModel, shards: int, group: Processes, *, reduced: bool
) -> GenerativeModel:
    """A copy of the model whose stages, and what is left outside of them, are gathered in turn.

    Args:
        model: whole, the same in every process.
        shards: processes that have the parameters together: all, or those of each node.
        group: all processes.
        reduced: stages are gathered in bfloat16, which rounds the few weights that autocast would
            leave; gradients are added in float32, and what flows between stages keeps its dtype.

    Raises:
        ValueError: the processes do not fall into such groups.
    """
    copy, mesh = deepcopy(model), _mesh(model.device, shards, group)
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if reduced:
        policy = replace(policy, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for stage in copy.stages:
        if next(stage.parameters(), None) is not None:
            fully_shard(stage, mesh=mesh, mp_policy=policy)
    fully_shard(copy, mesh=mesh)
    assert isinstance(copy, FSDPModule)
    return copy


def whole(value: Tensor) -> Tensor:
    """A tensor with all its parts in this process; every process asks."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def split_like(value: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor, the same in every process, split as `pattern` is."""
    value = value.to(pattern.device)
    if not isinstance(pattern, DTensor) or isinstance(value, DTensor):
        return value
    mesh, placements = pattern.device_mesh, pattern.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def _mesh(device: torch.device, shards: int, group: Processes) -> DeviceMesh:
    """All processes; or those of each node, among which parameters are split, side by side."""
    if shards == group.count:
        return init_device_mesh(device.type, (shards,), mesh_dim_names=("shards",))
    if group.count % shards or shards < 2:
        raise ValueError(
            "hsdp splits parameters inside nodes and repeats them over nodes: expected nodes of "
            f"equally many processes, two or more, got {group.count} processes, {shards} on this "
            "node"
        )
    shape, names = (group.count // shards, shards), ("replicas", "shards")
    return init_device_mesh(device.type, shape, mesh_dim_names=names)
