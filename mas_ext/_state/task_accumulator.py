"""The sums that become a task's Ω when the task ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mas_ext._distributed.shards import Placement
from mas_ext._storage.flat_tensors import FlatTensors, check_growth, copies, leading
from mas_ext._storage.stored_numbers import restored
from mas_ext.importance.estimation import SampleStatistics
from mas_ext.reference import accumulation_dtype

FLOOR = 0.01  # with a drift budget


def check_floor(floor: Any) -> float:
    """Returns a floor as a float; raises if it is not a finite number ≥ 0."""
    if isinstance(floor, bool) or not isinstance(floor, (int, float)):
        raise TypeError(f"floor is {floor!r}; pass a number")
    if not 0 <= floor < math.inf:
        raise ValueError(f"floor is {floor}; pass a finite number that is not negative")
    return float(floor)


class TaskAccumulator:
    """Σ |∂s/∂θ| over the samples that the current task has measured so far.

    Attributes:
        sums: name → Σ over samples, or over batches.
        counts: name → how many samples, or batches. A parameter that was frozen at first has fewer.
        weighting: which of the two, ``"samples"`` or ``"batches"``.
        statistics: of all samples, whichever parameters they were measured for.
        unreached: the parameters that the last measurement's output did not depend on.
    """

    def __init__(
        self,
        sums: Mapping[str, Tensor] | None = None,
        counts: Mapping[str, int] | None = None,
        weighting: str = "samples",
        statistics: SampleStatistics | None = None,
    ) -> None:
        self.sums = sums or {}
        self.counts = dict(counts or {})
        self.weighting = weighting
        self.statistics = statistics or SampleStatistics()
        self.unreached: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything, by parameter name."""
        return {
            "num_samples": dict(self.counts),
            "weighting": self.weighting,
            "seen": asdict(self.statistics),
            "open": copies(self.measured_sums()),
        }

    @classmethod
    @torch.no_grad()
    def from_state_dict(
        cls, state: Mapping[str, Any], params: Mapping[str, Tensor]
    ) -> TaskAccumulator:
        """From a state dictionary that has been checked, in the layout of this model."""
        sums = FlatTensors({name: params[name] for name in state["open"]}, accumulation_dtype)
        for name, value in state["open"].items():
            sums[name].copy_(value)
        seen = restored(SampleStatistics, state["seen"], "'seen'")
        return cls(sums, state["num_samples"], state["weighting"], seen)

    @torch.no_grad()
    def with_room_for(
        self, params: Mapping[str, Tensor], weighting: str = "samples"
    ) -> TaskAccumulator:
        """A copy with sums for all of ``params``; this accumulator stays as it is.

        Raises:
            ValueError: a parameter shrank, or the sums so far were weighted otherwise.
        """
        if self.counts and weighting != self.weighting:
            raise ValueError(
                f"weighting: this task has been measured with {self.weighting!r} so far, and "
                f"{weighting!r} does not add up with it; use one of them until consolidate()"
            )
        self.check_growth(params)
        sums = FlatTensors(params, accumulation_dtype)
        for name, before in self.sums.items():
            if name in sums:
                leading(sums[name], before.shape).copy_(before)
        return TaskAccumulator({**self.sums, **sums}, self.counts, weighting, self.statistics)

    def count(self, names: Iterable[str], more: SampleStatistics) -> None:
        """Notes what was added to these parameters' sums."""
        for name in names:
            self.counts[name] = self.counts.get(name, 0) + more.weight
        self.statistics += more

    def check_growth(self, params: Mapping[str, Tensor]) -> None:
        """Raises ValueError if a parameter has shrunk since it was measured."""
        for name, before in self.sums.items():
            if name in params:
                check_growth(name, before, params[name])

    def floors(self, fraction: float, named: Mapping[str, Tensor]) -> dict[str, float]:
        """``fraction`` of the mean Ω, for each parameter that has any importance at all.

        For DTensors every process must call this. It waits for the device.
        """
        if not fraction:
            return {}
        measured = self.measured_sums()
        sums = {name: measured[name] for name in named if name in measured}  # in the model's order
        omega = {
            name: float(Placement.of(named[name]).sum_over_shards(total.sum(dtype=torch.float64)))
            / self.counts[name]
            for name, total in sums.items()
        }
        numel = sum(named[name].numel() for name, total in omega.items() if total > 0)
        mean = sum(omega.values()) / max(numel, 1)
        return {name: fraction * mean for name, total in omega.items() if total > 0}

    def measured_sums(self) -> dict[str, Tensor]:
        """The sums that at least one sample was added to."""
        return {name: total for name, total in self.sums.items() if name in self.counts}
