"""Ω and θ* of the parameters that were measured: what is remembered between tasks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mas_ext._distributed.shards import Placement
from mas_ext._state.merging import Merge, accumulates, merge_, needs_earlier, total_weight
from mas_ext._state.stored_importance import StoredImportance, Thresholds
from mas_ext._state.task_accumulator import TaskAccumulator
from mas_ext._storage.flat_tensors import (
    FlatTensors,
    check_growth,
    copies,
    is_pinned,
    is_to_be_pinned,
    leading,
)
from mas_ext._strength.auto import GroupStatistics
from mas_ext.precision import in_memory_order, rounding_thresholds

_PIECE = 2**20  # elements of Ω that are merged at a time; a multiple of precision.BLOCK


def check_state_device(device: object) -> str | None:
    """Returns None or ``"cpu"``; raises ValueError for anything else."""
    if device is None or (isinstance(device, str) and device == "cpu"):
        return device
    raise ValueError(
        f"state_device: {device!r} is not available; use 'cpu' to keep Ω and θ* in host memory, or "
        "None to keep them beside the parameters"
    )


class ImportanceState:
    """Ω and θ*, by parameter name.

    Attributes:
        importance: name → Ω, stored in the state's dtype.
        anchor: name → θ*, in the parameter's dtype. For ``adapted`` a stand-in without memory, of
            the weight's shape, dtype and device.
        adapted: the names of weights that are trained through their adapters.
        state_device: None: Ω and θ* are on the parameters' devices; ``"cpu"``: in host memory.
        tasks: name → in how many tasks the parameter was measured.
        earlier: name → Σ of all former ``importance``; empty unless the merge policy needs it.
    """

    adapted: frozenset[str] = frozenset()
    state_device: str | None = None  # also of an instance that an earlier mas_ext has pickled

    def __init__(self, state_dtype: str = "float32", state_device: str | None = None) -> None:
        self.state_device = state_device
        self.importance = StoredImportance({}, state_dtype)
        self.anchor: Mapping[str, Tensor] = {}
        self.tasks: dict[str, int] = {}
        self.earlier = StoredImportance({}, state_dtype)

    def matches(self, anchor: Tensor, p: Tensor) -> bool:
        """Whether a parameter still has the shape, dtype and device that its θ* was made for."""
        if anchor.shape != p.shape or anchor.dtype != p.dtype:
            return False
        if self.state_device is None:
            return anchor.device == p.device
        # A copy of a MAS is not pinned, nor is what was made before the model moved to the device.
        return anchor.device.type == "cpu" and (not is_to_be_pinned(p) or is_pinned(anchor))

    @torch.no_grad()
    def make_room(self, params: Mapping[str, Tensor], adapted: Collection[str] = ()) -> None:
        """Adds parameters that are new, and follows those that grew or changed device or dtype.

        What is new gets Ω = 0 and its present value as its anchor. Parameters that are remembered
        and not in ``params`` stay as they are.

        Args:
            params: by name.
            adapted: the names of those that are trained through their adapters.

        Raises:
            ValueError: a parameter has shrunk or changed its rank; nothing is changed.
        """
        adapted = frozenset(params).intersection(adapted)
        matches = all(
            name in self.anchor
            and self.matches(self.anchor[name], p)
            and (name in self.adapted) == (name in adapted)
            for name, p in params.items()
        )
        if matches:
            return
        for name, p in params.items():
            if name in self.anchor:
                check_growth(name, self.anchor[name], p)
        like = {**self.anchor, **params}
        adapted |= self.adapted - params.keys()
        anchor = FlatTensors(
            {name: tensor for name, tensor in like.items() if name not in adapted},
            in_host_memory=self.state_device == "cpu",
        )
        for name in anchor:
            anchor[name].copy_(like[name])
            if name in self.anchor and name not in self.adapted:
                leading(anchor[name], self.anchor[name].shape).copy_(self.anchor[name])
        self.anchor = {n: anchor[n] if n in anchor else _stand_in(t) for n, t in like.items()}
        self.adapted = adapted
        self.importance = self._grown(self.importance, like)
        if self.earlier:
            self.earlier = self._grown(self.earlier, like)
        self.tasks = {name: self.tasks.get(name, 0) for name in like}

    def _stored(self, like: Mapping[str, Tensor], state_dtype: str) -> StoredImportance:
        return StoredImportance(like, state_dtype, self.state_device)

    def _grown(self, stored: StoredImportance, like: Mapping[str, Tensor]) -> StoredImportance:
        """The same in the shapes of ``like``, zero where there was nothing."""
        grown = self._stored(like, stored.state_dtype)
        for name in stored:
            before, scales = stored.stored(name)
            if before.shape == like[name].shape:
                grown.put(name, before, scales)
            else:
                omega = grown[name]
                leading(omega, before.shape).copy_(stored[name])
                grown.put(name, omega)
        return grown

    @torch.no_grad()
    def statistics(self, params: Mapping[str, Tensor], merge: Merge) -> dict[str, GroupStatistics]:
        """The size and Σ Ω of the mean task, by name.

        For DTensors every process must call this. It waits for the device.
        """
        totals = {
            n: Placement.of(p).sum_over_shards(self._total(n).to(p.device))
            for n, p in params.items()
        }
        weights = {n: total_weight(merge, self.tasks[n]) if self.tasks[n] else 1.0 for n in params}
        return {
            name: GroupStatistics(p.numel(), totals[name].item() / weights[name])
            for name, p in params.items()
        }

    def _total(self, name: str) -> Tensor:
        """Σ Ω in float64. Codes are dequantized a piece at a time."""
        stored, scales = self.importance.stored(name)
        if scales is None:
            return stored.sum(dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64, device=stored.device)
        for start in range(0, stored.numel(), _PIECE):
            part = self.importance.read(name, slice(start, start + _PIECE))
            total += part.sum(dtype=torch.float64)
        return total

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything, by parameter name."""
        importance, importance_scales = _stored_copies(self.importance)
        earlier, earlier_scales = _stored_copies(self.earlier)
        return {
            "tasks": dict(self.tasks),
            "importance": importance,
            "importance_scales": importance_scales,
            "anchor": copies({n: a for n, a in self.anchor.items() if n not in self.adapted}),
            "earlier": earlier,
            "earlier_scales": earlier_scales,
        }

    @classmethod
    @torch.no_grad()
    def from_state_dict(
        cls,
        state: Mapping[str, Any],
        params: Mapping[str, Tensor],
        state_dtype: str = "float32",
        adapted: Collection[str] = (),
        state_device: str | None = None,
    ) -> ImportanceState:
        """From a state dictionary that has been checked, in the layout of this model.

        Its Ω may have been stored in another dtype.
        """
        restored = cls(state_dtype, state_device)
        restored.make_room({name: params[name] for name in state["importance"]}, adapted)
        restored.tasks = dict(state["tasks"])
        for name, value in state["anchor"].items():
            if name not in restored.adapted:
                restored.anchor[name].copy_(value)
        restored.earlier = restored._stored({n: params[n] for n in state["earlier"]}, state_dtype)
        for stored, group in ((restored.importance, "importance"), (restored.earlier, "earlier")):
            for name, value in state[group].items():
                stored.put(name, value, state[f"{group}_scales"].get(name))
        return restored

    @torch.no_grad()
    def end_task(
        self,
        params: Mapping[str, Tensor],
        task: TaskAccumulator,
        merge: Merge,
        floors: Mapping[str, float] | None = None,
        adapted: Collection[str] = (),
    ) -> None:
        """Merges a task's Ω, plus ``floors``, and takes θ* ← θ for all of ``params``."""
        self.make_room(params, adapted)
        floors = floors or {}
        if needs_earlier(merge) and not self.earlier:
            self.earlier = self._stored(self.anchor, self.importance.state_dtype)
        measured = {n: t for n, t in task.measured_sums().items() if n in params}
        for name, total in measured.items():
            self._merge(name, total, task.counts[name], floors.get(name, 0.0), merge)
            self.tasks[name] += 1
        for name, p in params.items():
            if name not in self.adapted:
                self.anchor[name].copy_(p)

    def _merge(self, name: str, total: Tensor, count: int, floor: float, merge: Merge) -> None:
        """Merges Ω = total/count + floor, a piece at a time.

        So there is never a second Ω in float32 beside the sums, unless the parameter grew or
        changed its strides. It is merged where Ω is: the sums may be on another device.
        """
        stored, _ = self.importance.stored(name)
        if total.shape != stored.shape or total.stride() != stored.stride():
            self._merge_grown(name, total / count + floor, merge)
            return
        flat = in_memory_order(total)
        for start in range(0, len(flat), _PIECE):
            piece = slice(start, start + _PIECE)
            old = self.importance.read(name, piece)
            earlier = self.earlier.read(name, piece) if self.earlier else None
            new = flat[piece].to(old) / count + floor
            thresholds = self._thresholds(name, new, merge)
            merge_(old, new, self.tasks[name], merge, earlier)
            self.importance.write(name, piece, old, thresholds)
            if earlier is not None:
                self.earlier.write(name, piece, earlier, thresholds)

    def _merge_grown(self, name: str, omega: Tensor, merge: Merge) -> None:
        old, earlier = self.importance[name], self.earlier.get(name)
        part = leading(old, omega.shape)
        part_earlier = None if earlier is None else leading(earlier, omega.shape)
        new = torch.zeros_like(old)
        leading(new, omega.shape).copy_(omega)
        thresholds = self._thresholds(name, new, merge)
        merge_(part, leading(new, omega.shape), self.tasks[name], merge, part_earlier)
        self.importance.put(name, old, thresholds=thresholds)
        if earlier is not None:
            self.earlier.put(name, earlier, thresholds=thresholds)

    def _thresholds(self, name: str, new: Tensor, merge: Merge) -> Thresholds | None:
        """For stochastic rounding of a merged Ω; None where rounding to the nearest is right."""
        if self.tasks[name] == 0 or not accumulates(merge):
            return None
        return partial(rounding_thresholds, new, self.tasks[name])


def _stand_in(tensor: Tensor) -> Tensor:
    """In the shape, dtype and device of a tensor, and without memory."""
    return torch.empty(1, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _stored_copies(stored: StoredImportance) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Ω as it is stored, and the scales of codes."""
    pairs = {name: stored.stored(name) for name in stored}
    scales = {name: scales for name, (_, scales) in pairs.items() if scales is not None}
    return copies({name: omega for name, (omega, _) in pairs.items()}), copies(scales)
