"""An Inf that the penalty adds counts for a ``torch.amp.GradScaler`` as the loss's would.

A scaler looks at the gradients before it calls the optimizer's step, and the penalty joins them in
that step, after clipping: what overflows there has to be reported, or it reaches the weights.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from mas_ext._distributed.shards import is_sharded, local

_SCALER_STEP = inspect.unwrap(GradScaler.step).__code__


class ScaledStep(NamedTuple):
    """A step that a scaler takes.

    Attributes:
        optimizer: whose step it is.
        scaler: None where somebody else set ``optimizer.found_inf``.
        stepped: what the scaler was given, which is ``optimizer`` or what wraps it.
    """

    optimizer: Optimizer
    scaler: GradScaler | None
    stepped: Optimizer | None

    def skips(self, grads: Iterable[Tensor]) -> bool:
        """Makes it a step with an Inf if one of ``grads`` is not finite.

        Returns:
            Whether the caller has to leave the step out. Never for a fused optimizer, which reads
            ``found_inf`` on the device; for others this waits, as the scaler itself just did.
        """
        parts = [local(g) for g in grads if g.layout == torch.strided]
        largest = get_total_norm([g for g in parts if g.numel()], torch.inf)
        found = _on_any_rank((~largest.isfinite()).float(), self.optimizer)
        if self.scaler is not None:
            state = self.scaler._per_optimizer_states[id(self.stepped)]
            _raise_to(next(iter(state["found_inf_per_device"].values())), found)
        noted = _found_inf(self.optimizer)
        if noted is None:
            return bool(found)
        _raise_to(noted, found)
        return False


def scaled_step(optimizer: Optimizer) -> ScaledStep | None:
    """The step that is being taken, if a scaler takes it.

    A scaler tells fused optimizers of the Infs that it found and others nothing, and keeps its
    notes to itself. What leads to it without a change to anyone's loop is the call that is under
    way, a few frames up; to look costs microseconds.
    """
    if torch.compiler.is_compiling():  # no scaler's step is ever compiled
        return None
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _SCALER_STEP:
        frame = frame.f_back  # type: ignore[assignment]
    if frame is not None and frame.f_locals["self"].is_enabled():
        return ScaledStep(optimizer, frame.f_locals["self"], frame.f_locals["optimizer"])
    return None if _found_inf(optimizer) is None else ScaledStep(optimizer, None, None)


def _on_any_rank(found: Tensor, optimizer: Optimizer) -> Tensor:
    """The same on all who hold a part of the parameters: they step together, or none does."""
    params = (p for group in optimizer.param_groups for p in group["params"])
    for mesh, device in {p.device_mesh: p.device for p in params if is_sharded(p)}.items():
        found = found.to(device)  # it is on the CPU where a rank has no part of anything
        for group in mesh.get_all_groups():
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group)
    return found


def _raise_to(noted: Tensor, found: Tensor) -> None:
    """Not added to: a fused step is skipped where it finds 1 and nothing else."""
    noted.clamp_(min=found.to(noted.device, non_blocking=True))


def _found_inf(optimizer: Optimizer) -> Tensor | None:
    return getattr(optimizer, "found_inf", None)
