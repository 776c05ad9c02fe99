"""What ``fully_shard`` does to a model (FSDP2), and its parameters made whole for a measurement.

The only file that reads PyTorch's private attributes: FSDP2 has setters for its settings and none
to read them, which is needed to put them back.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_UNREDUCED = {"reduce_grads": False, "all_reduce_grads": False, "reshard_after_backward": True}
# No rank ever waits for another one, so each may have as many batches as it likes.
_QUIET = {
    **_UNREDUCED,
    "reshard_after_backward": False,
    "post_forward_mesh_info": None,  # what reshard_after_forward sets
}


def _states(model: nn.Module) -> list[Any]:
    """FSDP's states of a model's modules, parents first."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    found = [
        module._get_fsdp_state()
        for module in (model.modules() if kind else ())
        if isinstance(module, kind)  # type: ignore[arg-type]
    ]
    if not all(hasattr(state, "_fsdp_param_groups") for state in found):
        raise RuntimeError("a model that is sharded with fully_shard needs torch 2.13 or later")
    return list(dict.fromkeys(found))  # one may be of several modules


def _groups(model: nn.Module) -> list[Any]:
    return [group for state in _states(model) for group in state._fsdp_param_groups]


def sharded_stand_ins(model: nn.Module) -> dict[int, nn.Parameter]:
    """id of the tensor that stands in a module for now → the sharded parameter that it is made of.

    After a forward pass the root's parameters are whole: other objects, which no optimizer knows.
    """
    return {
        id(param._module_info.module._parameters[param._module_info.param_name]): (
            param.sharded_param
        )
        for group in _groups(model)
        if not group.is_sharded
        for param in group.fsdp_params
    }


class ShardedModel:
    """A model that ``fully_shard`` has cut up, and that is to be measured.

    Attributes:
        mesh: the ranks between which data is shared out.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._params = {
            id(param.sharded_param): param
            for group in _groups(model)
            for param in group.fsdp_params
        }
        meshes = list(dict.fromkeys(param.mesh_info.mesh for param in self._params.values()))
        if len(meshes) > 1:
            raise ValueError(
                "the model is sharded with fully_shard over different meshes, so the ranks that "
                "share the data out cannot be told; use one mesh"
            )
        self.mesh = meshes[0]

    @property
    def sharded_parameters(self) -> list[Tensor]:
        """Those that FSDP holds, as the optimizer knows them."""
        return [param.sharded_param for param in self._params.values()]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(iter(self._params.values())).device

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """All parameters whole and no communication; afterwards sharded, and FSDP as it was.

        Memory: the model in the dtype it computes in, on every process.
        """
        with self._put_back(_QUIET) as modules:
            for module in modules:
                module.unshard()
            yield

    @contextmanager
    def in_training(self) -> Iterator[None]:
        """Parameters whole where and when they are needed; gradients are left to hooks."""
        with self._put_back(_UNREDUCED) as modules, ExitStack() as stack:
            for module in modules:  # after the first time they always are the same objects
                module.unshard()
                module.reshard()
            for param in self._params.values():
                stack.callback(setattr, param.unsharded_param, "grad", param.unsharded_param.grad)
                param.unsharded_param.grad = None
            yield

    @contextmanager
    def _put_back(self, settings: Mapping[str, Any]) -> Iterator[list[Any]]:
        """FSDP's modules; afterwards all are sharded, with settings as before, also on an error."""
        states, groups = _states(self.model), _groups(self.model)
        for state in states:
            state._lazy_init()  # which decides, once, what the root's settings are
        modules = [module for state in states for module in state._modules]
        with _order_kept(states, groups), _set_to(groups, settings):
            try:
                yield modules
            except BaseException:
                _recover(states)
                raise
            finally:
                for module in modules:
                    module.reshard()

    def whole(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What stands in the modules for these parameters, for as long as they are whole."""
        return {
            name: self._params[id(p)].unsharded_param if id(p) in self._params else p
            for name, p in params.items()
        }

    def summed_part(self, param: Tensor, total: Tensor) -> Tensor:
        """Of the sum of ``total`` over the data ranks, the part that a parameter has here.

        Args:
            param: the sharded parameter, or a plain one that FSDP leaves alone.
            total: in the local shape of the whole parameter.
        """
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        mesh = self.mesh
        parts = DTensor.from_local(total, mesh, [Partial()] * mesh.ndim, run_check=False)
        placements: list[Any] = [Replicate()] * mesh.ndim
        if id(param) in self._params:
            # The data's dimensions come first; with tensor parallelism after them, what is sharded
            # over the data is the local part of that.
            data = param.placements[: mesh.ndim]  # type: ignore[attr-defined]
            placements = [p if p.is_replicate() else Shard(p.dim) for p in data]
        return parts.redistribute(mesh, placements).to_local()


@contextmanager
def _set_to(groups: list[Any], settings: Mapping[str, Any]) -> Iterator[None]:
    before = [{key: getattr(group, key) for key in settings} for group in groups]
    try:
        for group in groups:
            _set(group, settings)
        yield
    finally:
        for group, former in zip(groups, before, strict=True):
            _set(group, former)


def _set(group: Any, settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        setattr(group, key, value)


@contextmanager
def _order_kept(states: list[Any], groups: list[Any]) -> Iterator[None]:
    """In which order a backward pass gathers parameters ahead follows from the forward passes.

    Ranks that have measured more than others would do so in another order, and wait for ever.
    """
    orders = [state._comm_ctx.post_forward_order for state in states]
    lists = [*orders, *(group._post_forward_indices for group in groups)]
    before = [list(items) for items in lists]
    try:
        yield
    finally:
        for items, content in zip(lists, before, strict=True):
            items[:] = content


def _recover(states: list[Any]) -> None:
    """After a pass that was broken off, FSDP would take the next for its continuation."""
    for state in states:
        if state._is_root and hasattr(state, "_reset_iter_state"):
            state._reset_iter_state()


def find(model: nn.Module) -> ShardedModel | None:
    """The model's, if ``fully_shard`` holds some of its parameters."""
    return ShardedModel(model) if any(group.fsdp_params for group in _groups(model)) else None


def refuse_older(model: nn.Module) -> None:
    """FSDP1 flattens parameters: there are none that a name could be given to."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()):
        raise ValueError(
            "the model is wrapped by FullyShardedDataParallel, which flattens its parameters; use "
            "torch.distributed.fsdp.fully_shard (FSDP2)"
        )
