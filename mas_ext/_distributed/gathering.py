"""Writing one file from many processes: each contributes its parts, one writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mas_ext._distributed.ranks import Ranks
from mas_ext._distributed.shards import full_tensor, is_sharded

Fetch = Callable[[str], Tensor]


def write_once(tensors: Mapping[str, Tensor], write: Callable[[Fetch], None]) -> None:
    """Writes a file from one of the processes that hold parts of its tensors; all must call this.

    Args:
        tensors: by name. DTensors are gathered one at a time, to bound memory.
        write: writes the file; its argument returns the tensor of a name, to be called in the
            order of names.

    Raises:
        Exception: if writing fails, on all of them.
    """
    meshes = list({id(t.device_mesh): t.device_mesh for t in _sharded(tensors)}.values())
    if not meshes:
        write(tensors.__getitem__)
        return
    is_writer = dist.get_rank() == min(int(mesh.mesh.min()) for mesh in meshes)
    groups = dict.fromkeys(group for mesh in meshes for group in mesh.get_all_groups())
    Ranks(model=tuple(groups)).attempt(lambda: _bring(tensors, write if is_writer else None))


def _sharded(tensors: Mapping[str, Tensor]) -> list[Any]:
    return [tensor for tensor in tensors.values() if is_sharded(tensor)]


def _bring(tensors: Mapping[str, Tensor], write: Callable[[Fetch], None] | None) -> None:
    """Takes part in gathering every tensor, even if writing fails: the other processes wait."""
    left = dict.fromkeys(sorted(tensors))

    def fetch(name: str) -> Tensor:
        del left[name]
        tensor: Any = tensors[name]
        if is_sharded(tensor):  # and maybe in host memory
            tensor = tensor.to(tensor.device_mesh.device_type)
        return full_tensor(tensor)

    try:
        if write is not None:
            write(fetch)
    finally:
        for name in list(left):
            fetch(name)
