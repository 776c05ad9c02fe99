"""Models sharded by ``fully_shard`` (FSDP2), and how to unshard them for a measurement.

The only file that reads PyTorch's private attributes: FSDP2 has methods that change its settings
and none that read them, and they must be read to be restored.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_NO_REDUCTION = {"reduce_grads": False, "all_reduce_grads": False, "reshard_after_backward": True}
# Without communication no rank waits for another, so each may have as many batches as it likes.
_NO_COMMUNICATION = {
    **_NO_REDUCTION,
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
    return list(dict.fromkeys(found))  # several modules may share one


def _groups(model: nn.Module) -> list[Any]:
    return [group for state in _states(model) for group in state._fsdp_param_groups]


def sharded_by_current_id(model: nn.Module) -> dict[int, nn.Parameter]:
    """id of the unsharded tensor that is in a module at present → its sharded parameter.

    After a forward pass the root's parameters are unsharded: other objects than the optimizer's.
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
    """A model that ``fully_shard`` has sharded.

    Attributes:
        mesh: the ranks that share the data.
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
                "the model is sharded with fully_shard over different meshes, so it is unknown "
                "which ranks share the data; use one mesh"
            )
        self.mesh = meshes[0]

    @property
    def sharded_parameters(self) -> list[Tensor]:
        """The parameters that FSDP holds, as the optimizer has them."""
        return [param.sharded_param for param in self._params.values()]

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return next(iter(self._params.values())).device

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Unshards all parameters and stops communication; afterwards everything is as it was.

        Takes the memory of the whole model, in its compute dtype, on every process.
        """
        with self._restored(_NO_COMMUNICATION) as modules:
            for module in modules:
                module.unshard()
            yield

    @contextmanager
    def in_training(self) -> Iterator[None]:
        """Unshards parameters when they are needed, as in training; hooks handle the gradients."""
        with self._restored(_NO_REDUCTION) as modules, ExitStack() as stack:
            for module in modules:  # so that the unsharded parameters exist
                module.unshard()
                module.reshard()
            for param in self._params.values():
                stack.callback(setattr, param.unsharded_param, "grad", param.unsharded_param.grad)
                param.unsharded_param.grad = None
            yield

    @contextmanager
    def in_evaluation(self) -> Iterator[None]:
        """Unshards parameters when they are needed, in forward passes alone."""
        with self._restored({}):
            yield

    @contextmanager
    def _restored(self, settings: Mapping[str, Any]) -> Iterator[list[Any]]:
        """FSDP's modules with these settings; afterwards, also after an error, all as before."""
        states, groups = _states(self.model), _groups(self.model)
        for state in states:
            state._lazy_init()  # sets the root's settings, once
        modules = [module for state in states for module in state._modules]
        with _prefetch_order_restored(states, groups), _with_settings(groups, settings):
            try:
                yield modules
            except BaseException:
                _recover(states)
                raise
            finally:
                for module in modules:
                    module.reshard()

    def unsharded_parameters(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The unsharded parameters that are in the modules while :meth:`unsharded` is active."""
        return {
            name: self._params[id(p)].unsharded_param if id(p) in self._params else p
            for name, p in params.items()
        }

    def summed_part(self, param: Tensor, total: Tensor) -> Tensor:
        """The sum of ``total`` over the data ranks: this rank's shard of it.

        Args:
            param: the sharded parameter, or a plain one that FSDP leaves alone.
            total: in the local shape of the unsharded parameter.
        """
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        mesh = self.mesh
        parts = DTensor.from_local(total, mesh, [Partial()] * mesh.ndim, run_check=False)
        placements: list[Any] = [Replicate()] * mesh.ndim
        if id(param) in self._params:
            # The data's mesh dimensions come first. With tensor parallelism after them, FSDP shards
            # the tensor-parallel local part.
            data = param.placements[: mesh.ndim]  # type: ignore[attr-defined]
            placements = [p if p.is_replicate() else Shard(p.dim) for p in data]
        return parts.redistribute(mesh, placements).to_local()


@contextmanager
def _with_settings(groups: list[Any], settings: Mapping[str, Any]) -> Iterator[None]:
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
def _prefetch_order_restored(states: list[Any], groups: list[Any]) -> Iterator[None]:
    """Restores the order in which a backward pass prefetches parameters.

    It follows from the forward passes: ranks that have measured more batches than others would
    prefetch in another order, and wait for each other forever.
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
    """After an interrupted pass, FSDP would take the next one for its continuation."""
    for state in states:
        if state._is_root and hasattr(state, "_reset_iter_state"):
            state._reset_iter_state()


def find_sharded_model(model: nn.Module) -> ShardedModel | None:
    """The model as a :class:`ShardedModel`, if ``fully_shard`` holds some of its parameters."""
    return ShardedModel(model) if any(group.fsdp_params for group in _groups(model)) else None


def check_not_fsdp1(model: nn.Module) -> None:
    """Raises ValueError for FSDP1, which flattens parameters so that they have no names."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()):
        raise ValueError(
            "the model is wrapped by FullyShardedDataParallel, which flattens its parameters; use "
            "torch.distributed.fsdp.fully_shard (FSDP2)"
        )
