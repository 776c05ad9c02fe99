"""What MAS remembers between tasks: Ω, θ*, and how a new task's Ω joins the old."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mas_ext.flat import FlatTensors, leading
from mas_ext.reference import accumulation_dtype

Merge = str | tuple[str, float]


def check_merge(merge: Any) -> Merge:
    """``"sum"``, ``"mean"``, ``"max"`` or ``("ema", alpha)`` with 0 ≤ alpha < 1."""
    if merge in ("sum", "mean", "max"):
        return merge
    if isinstance(merge, (tuple, list)) and len(merge) == 2 and merge[0] == "ema":
        alpha = merge[1]
        if isinstance(alpha, (int, float)) and 0 <= alpha < 1:
            return ("ema", float(alpha))
        raise ValueError(f"merge: alpha of ('ema', alpha) is {alpha!r}; it must be in [0, 1)")
    raise ValueError(f"merge: {merge!r} is unknown; use 'sum', 'mean', 'max' or ('ema', alpha)")


def merge_(old: Tensor, new: Tensor, tasks: int, merge: Merge) -> None:
    r"""Joins a task's Ω to what is there, in place.

    Args:
        old: Ω of the ``tasks`` tasks before.
        new: Ω of the task that ends.
        tasks: in how many tasks this parameter was measured before.
        merge: ``"sum"`` :math:`\sum_t\Omega^t`, the paper's; ``"mean"`` over tasks; ``"max"``;
            ``("ema", α)`` :math:`\alpha\Omega + (1-\alpha)\Omega^t`, which starts with the first
            task's Ω. A part that a parameter grew by counts as Ω = 0 in the tasks before.
    """
    if merge == "sum":
        old.add_(new)
    elif merge == "mean":
        old.lerp_(new, 1 / (tasks + 1))
    elif merge == "max":
        torch.maximum(old, new, out=old)
    elif tasks == 0:
        old.copy_(new)
    else:
        old.lerp_(new, 1 - float(merge[1]))


class Memory:
    """Ω and θ* of the parameters that were measured so far.

    Attributes:
        importance: name → Ω, in float32 (float64 for float64 parameters).
        anchor: name → θ*, in the parameter's dtype.
        tasks: name → in how many tasks the parameter was measured.
    """

    def __init__(self) -> None:
        self.importance = FlatTensors({}, accumulation_dtype)
        self.anchor = FlatTensors({})
        self.tasks: dict[str, int] = {}

    @torch.no_grad()
    def fit(self, params: Mapping[str, Tensor]) -> None:
        """Makes room for parameters that are new, have grown, or moved to another device or dtype.

        What is new has Ω = 0 and its present value for an anchor. What is known and is not in
        ``params`` is kept as it is.

        Raises:
            ValueError: a parameter has shrunk or changed its rank; nothing is changed.
        """
        if all(self._fits(name, p) for name, p in params.items()):
            return
        for name, p in params.items():
            if name in self.anchor:
                _check_growth(name, self.anchor[name], p)
        like = {**self.anchor, **params}
        importance, anchor = FlatTensors(like, accumulation_dtype), FlatTensors(like)
        for name, tensor in like.items():
            anchor[name].copy_(tensor)
            if name in self.anchor:
                shape = self.anchor[name].shape
                leading(anchor[name], shape).copy_(self.anchor[name])
                leading(importance[name], shape).copy_(self.importance[name])
        self.importance, self.anchor = importance, anchor
        self.tasks = {name: self.tasks.get(name, 0) for name in like}

    def _fits(self, name: str, p: Tensor) -> bool:
        anchor = self.anchor.get(name)
        return (
            anchor is not None
            and anchor.shape == p.shape
            and anchor.dtype == p.dtype
            and anchor.device == p.device
        )

    @torch.no_grad()
    def end_task(
        self, params: Mapping[str, Tensor], omega: Mapping[str, Tensor], merge: Merge
    ) -> None:
        """Joins a task's Ω, and takes θ* ← θ for all of ``params``."""
        self.fit(params)
        for name, new in omega.items():
            old = leading(self.importance[name], new.shape)
            merge_(old, new.to(old), self.tasks[name], merge)
            self.tasks[name] += 1
        for name, p in params.items():
            self.anchor[name].copy_(p)


class OpenTask:
    """The raw sums of Ω over the samples that the open task has seen so far.

    Attributes:
        sums: name → Σ over samples.
        counts: name → how many samples; a parameter thawed half-way has seen fewer.
    """

    def __init__(
        self, sums: Mapping[str, Tensor] | None = None, counts: Mapping[str, int] | None = None
    ) -> None:
        self.sums = sums or {}
        self.counts = dict(counts or {})

    @torch.no_grad()
    def opened(self, params: Mapping[str, Tensor]) -> OpenTask:
        """A copy with room to add to: sums for all of ``params``. This one stays as it is."""
        self.check_growth(params)
        sums = FlatTensors(params, accumulation_dtype)
        for name, before in self.sums.items():
            if name in sums:
                leading(sums[name], before.shape).copy_(before)
        return OpenTask({**self.sums, **sums}, self.counts)

    def count(self, names: Iterable[str], samples: int) -> None:
        """Notes that these parameters' sums have so many samples more."""
        for name in names:
            self.counts[name] = self.counts.get(name, 0) + samples

    def check_growth(self, params: Mapping[str, Tensor]) -> None:
        """Refuses parameters that shrank since they were measured."""
        for name, before in self.sums.items():
            if name in params:
                _check_growth(name, before, params[name])

    @torch.no_grad()
    def omega(self) -> dict[str, Tensor]:
        """Ω: the sums over the number of samples."""
        return {name: total / self.counts[name] for name, total in self.counted().items()}

    def counted(self) -> dict[str, Tensor]:
        """The sums that have samples."""
        return {name: total for name, total in self.sums.items() if name in self.counts}


def _check_growth(name: str, old: Tensor, new: Tensor) -> None:
    grown = old.dim() == new.dim() and all(
        a <= b for a, b in zip(old.shape, new.shape, strict=True)
    )
    if not grown:
        raise ValueError(
            f"parameter {name!r} had shape {list(old.shape)} and now has {list(new.shape)}: it may "
            "grow between tasks, not shrink or change its rank; start a new MAS, or leave it out "
            "with params="
        )
