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
    """A copy of the model with split parameters, which are gathered for one stage at a time.

    Args:
        model: whole, the same in every process.
        shards: processes over which each parameter is split: all, or those of each node.
        group: all processes.
        reduced: gather stages in bfloat16, which also rounds the few weights that autocast would
            leave in float32. Gradients are added in float32; activations keep their dtype.

    Raises:
        ValueError: the number of processes is no multiple of `shards`.
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


def split_like(value: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor, the same in every process, split as `pattern` is."""
    value = value.to(pattern.device)
    if not isinstance(pattern, DTensor) or isinstance(value, DTensor):
        return value
    mesh, placements = pattern.device_mesh, pattern.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def _mesh(device: torch.device, shards: int, group: Processes) -> DeviceMesh:
    """A mesh of all processes, or one of nodes times the processes of a node."""
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
