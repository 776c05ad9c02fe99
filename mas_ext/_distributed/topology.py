"""Which processes take part in a measurement: as the model tells, or as the user does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from mas_ext._distributed.ranks import ProcessGroup, Ranks
from mas_ext._distributed.shards import is_sharded


def is_running() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_process_group(group: ProcessGroup) -> ProcessGroup:
    """None, or a process group that this rank is in."""
    if group is None:
        return None
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group is {group!r}; pass a torch.distributed.ProcessGroup that this rank is "
            "in, such as torch.distributed.group.WORLD after init_process_group(), or None"
        )
    return group


def without_ddp(model: nn.Module) -> tuple[nn.Module, ProcessGroup]:
    """The module inside DistributedDataParallel, and the process group that it is replicated on.

    DDP itself would wait for the other ranks in every forward pass.
    """
    inner = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            return inner.module, inner.process_group
        if "_orig_mod" not in inner._modules:  # compiled; DDP may be inside
            return model, None
        inner = inner._modules["_orig_mod"]  # type: ignore[assignment]


def ranks_of_replica(params: Iterable[Tensor], data: ProcessGroup) -> Ranks:
    """The ranks of a model that every data rank has a replica of, tensor-parallel or not."""
    meshes = dict.fromkeys(p.device_mesh for p in params if is_sharded(p))  # type: ignore[attr-defined]
    model = [group for mesh in meshes for group in mesh.get_all_groups()]
    return Ranks(_with_others([data] if data is not None else []), _with_others(model))


def ranks_of_shards(params: Iterable[Any], mesh: Any) -> Ranks:
    """The ranks of a model that is sharded over ``mesh``, and tensor-parallel beyond it or not."""
    meshes = dict.fromkeys(p.device_mesh for p in params if is_sharded(p))
    model = [group for other in meshes for group in other.get_all_groups()[mesh.ndim :]]
    return Ranks(_with_others(mesh.get_all_groups()), _with_others(model))


def leaves_ranks_out(ranks: Ranks) -> bool:
    """Whether there are processes whose role for this model is unknown."""
    if not is_running() or ranks.data:
        return False
    size = 1
    for group in ranks.model:
        size *= dist.get_world_size(group)
    return size < dist.get_world_size()


def _with_others(groups: Iterable[ProcessGroup]) -> tuple[ProcessGroup, ...]:
    return tuple(dict.fromkeys(group for group in groups if dist.get_world_size(group) > 1))
