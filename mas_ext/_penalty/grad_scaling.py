"""Reports an Inf in the penalty's gradient to ``torch.amp.GradScaler``, like one in the loss's.

A scaler checks the gradients before it calls the optimizer's step, and the penalty is added inside
that step, after clipping. An overflow there must be reported, or it reaches the weights.
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
    """A step that is taken by a scaler.

    Attributes:
        optimizer: whose step it is.
        scaler: None if something else has set ``optimizer.found_inf``.
        stepped: what ``scaler.step`` was given: ``optimizer`` or its wrapper.
    """

    optimizer: Optimizer
    scaler: GradScaler | None
    stepped: Optimizer | None

    def skips(self, grads: Iterable[Tensor]) -> bool:
        """Reports an Inf if one of ``grads`` is not finite.

        Returns:
            Whether the caller must skip the step. Always False for a fused optimizer, which reads
            ``found_inf`` on the device; for others this waits for the device, as the scaler did.
        """
        parts = [local(g) for g in grads if g.layout == torch.strided]
        largest = get_total_norm([g for g in parts if g.numel()], torch.inf)
        found = _on_any_rank((~largest.isfinite()).float(), self.optimizer)
        if self.scaler is not None:
            state = self.scaler._per_optimizer_states[id(self.stepped)]
            _set_found(next(iter(state["found_inf_per_device"].values())), found)
        flag = _found_inf(self.optimizer)
        if flag is None:
            return bool(found)
        _set_found(flag, found)
        return False


def scaled_step(optimizer: Optimizer) -> ScaledStep | None:
    """The step in progress, if a scaler takes it.

    A scaler passes what it found to fused optimizers only. The one way to reach it without a change
    to the user's loop is through the call in progress, a few frames up; that takes microseconds.
    """
    if torch.compiler.is_compiling():  # a scaler's step is never compiled
        return None
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _SCALER_STEP:
        frame = frame.f_back  # type: ignore[assignment]
    if frame is not None and frame.f_locals["self"].is_enabled():
        return ScaledStep(optimizer, frame.f_locals["self"], frame.f_locals["optimizer"])
    return None if _found_inf(optimizer) is None else ScaledStep(optimizer, None, None)


def _on_any_rank(found: Tensor, optimizer: Optimizer) -> Tensor:
    """Whether any rank that holds a part of the parameters found one: all step, or none."""
    params = (p for group in optimizer.param_groups for p in group["params"])
    for mesh, device in {p.device_mesh: p.device for p in params if is_sharded(p)}.items():
        found = found.to(device)  # on a rank without any part it is on the CPU
        for group in mesh.get_all_groups():
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group)
    return found


def _set_found(flag: Tensor, found: Tensor) -> None:
    """Sets a flag to 1, not more: a fused optimizer skips only where it is exactly 1."""
    flag.clamp_(min=found.to(flag.device, non_blocking=True))


def _found_inf(optimizer: Optimizer) -> Tensor | None:
    return getattr(optimizer, "found_inf", None)
