"""What MAS remembers between tasks: Ω, θ*, and how a new task's Ω joins the old."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mas_ext.flat import FlatTensors, leading
from mas_ext.reference import accumulation_dtype

Merge = str | tuple[str, float]


def check_lambda(value: Any) -> float:
    """A finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"lambda_reg is {value!r}; pass a number")
    if not value >= 0 or math.isinf(value):
        raise ValueError(f"lambda_reg is {value}; pass a finite number that is not negative")
    return float(value)


_NAMES = ("sum", "mean", "max", "sum_of_sums")
_AVERAGES = ("ema", "ema_from_zero")


def check_merge(merge: Any) -> Merge:
    """One of the policies of :func:`merge_`, with 0 ≤ alpha < 1."""
    if merge in _NAMES:
        return merge
    if isinstance(merge, (tuple, list)) and len(merge) == 2 and merge[0] in _AVERAGES:
        name, alpha = merge
        if isinstance(alpha, (int, float)) and 0 <= alpha < 1:
            return (name, float(alpha))
        raise ValueError(f"merge: alpha of ({name!r}, alpha) is {alpha!r}; it must be in [0, 1)")
    raise ValueError(
        f"merge: {merge!r} is unknown; use 'sum', 'mean', 'max', ('ema', alpha), "
        "('ema_from_zero', alpha) or 'sum_of_sums'"
    )


def merge_(
    old: Tensor, new: Tensor, tasks: int, merge: Merge, earlier: Tensor | None = None
) -> None:
    r"""Joins a task's Ω to what is there, in place.

    Args:
        old: Ω of the ``tasks`` tasks before.
        new: Ω of the task that ends.
        tasks: in how many tasks this parameter was measured before.
        merge: ``"sum"`` :math:`\sum_t\Omega^t`, the paper's; ``"mean"`` over tasks; ``"max"``;
            ``("ema", α)`` :math:`\alpha\Omega + (1-\alpha)\Omega^t`, which starts with the first
            task's Ω; ``("ema_from_zero", α)``, the same from Ω = 0, so that the first task's Ω
            too is multiplied by 1 − α; ``"sum_of_sums"``, the task's Ω and all earlier *merged*
            ones, so that tasks weigh 1, 1, 2, 4, 8, … from the last to the first. A part that a
            parameter grew by counts as Ω = 0 in the tasks before.
        earlier: for ``"sum_of_sums"``, the sum of the merged Ω before ``old``; ``old`` is added.
    """
    if merge == "sum":
        old.add_(new)
    elif merge == "mean":
        old.lerp_(new, 1 / (tasks + 1))
    elif merge == "max":
        torch.maximum(old, new, out=old)
    elif merge == "sum_of_sums":
        assert earlier is not None
        earlier.add_(old)
        torch.add(earlier, new, out=old)
    elif merge[0] == "ema" and tasks == 0:
        old.copy_(new)
    else:
        old.lerp_(new, 1 - float(merge[1]))


def fits(anchor: Tensor, p: Tensor) -> bool:
    """Whether a parameter still is what its anchor was made for."""
    return anchor.shape == p.shape and anchor.dtype == p.dtype and anchor.device == p.device


class Memory:
    """Ω and θ* of the parameters that were measured so far.

    Attributes:
        importance: name → Ω, in float32 (float64 for float64 parameters).
        anchor: name → θ*, in the parameter's dtype.
        tasks: name → in how many tasks the parameter was measured.
        earlier: name → the sum of all former ``importance``; empty unless the merge needs it.
    """

    def __init__(self) -> None:
        self.importance = FlatTensors({}, accumulation_dtype)
        self.anchor = FlatTensors({})
        self.tasks: dict[str, int] = {}
        self.earlier = FlatTensors({}, accumulation_dtype)

    @torch.no_grad()
    def fit(self, params: Mapping[str, Tensor]) -> None:
        """Makes room for parameters that are new, have grown, or moved to another device or dtype.

        What is new has Ω = 0 and its present value for an anchor. What is known and is not in
        ``params`` is kept as it is.

        Raises:
            ValueError: a parameter has shrunk or changed its rank; nothing is changed.
        """
        if all(name in self.anchor and fits(self.anchor[name], p) for name, p in params.items()):
            return
        for name, p in params.items():
            if name in self.anchor:
                _check_growth(name, self.anchor[name], p)
        like = {**self.anchor, **params}
        anchor = FlatTensors(like)
        for name, tensor in like.items():
            anchor[name].copy_(tensor)
            if name in self.anchor:
                leading(anchor[name], self.anchor[name].shape).copy_(self.anchor[name])
        self.anchor = anchor
        self.importance = _grown(self.importance, like)
        if self.earlier:
            self.earlier = _grown(self.earlier, like)
        self.tasks = {name: self.tasks.get(name, 0) for name in like}

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything, by parameter name."""
        return {
            "tasks": dict(self.tasks),
            "importance": _copies(self.importance),
            "anchor": _copies(self.anchor),
            "earlier": _copies(self.earlier),
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], named: Mapping[str, Tensor]) -> Memory:
        """From a state dictionary that has been checked, in the shapes of this model."""
        memory = cls()
        memory.fit({name: named[name] for name in state["anchor"]})
        memory.tasks = dict(state["tasks"])
        _fill(memory.anchor, state["anchor"])
        _fill(memory.importance, state["importance"])
        memory.earlier = _sums(state["earlier"], named)
        return memory

    @torch.no_grad()
    def end_task(
        self, params: Mapping[str, Tensor], omega: Mapping[str, Tensor], merge: Merge
    ) -> None:
        """Joins a task's Ω, and takes θ* ← θ for all of ``params``."""
        self.fit(params)
        if merge == "sum_of_sums" and not self.earlier:
            self.earlier = FlatTensors(self.importance, accumulation_dtype)
        for name, new in omega.items():
            old = leading(self.importance[name], new.shape)
            earlier = leading(self.earlier[name], new.shape) if self.earlier else None
            merge_(old, new.to(old), self.tasks[name], merge, earlier)
            self.tasks[name] += 1
        for name, p in params.items():
            self.anchor[name].copy_(p)


def _grown(tensors: FlatTensors, like: Mapping[str, Tensor]) -> FlatTensors:
    """The same in the shapes of ``like``, zero where there was nothing."""
    grown = FlatTensors(like, accumulation_dtype)
    for name, tensor in tensors.items():
        leading(grown[name], tensor.shape).copy_(tensor)
    return grown


class OpenTask:
    """The raw sums of Ω over the samples that the open task has seen so far.

    Attributes:
        sums: name → Σ over samples, or over batches.
        counts: name → how many samples, or batches; a parameter thawed half-way has seen fewer.
        weighting: which of the two, ``"samples"`` or ``"batches"``.
    """

    def __init__(
        self,
        sums: Mapping[str, Tensor] | None = None,
        counts: Mapping[str, int] | None = None,
        weighting: str = "samples",
    ) -> None:
        self.sums = sums or {}
        self.counts = dict(counts or {})
        self.weighting = weighting

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything, by parameter name."""
        return {
            "num_samples": dict(self.counts),
            "weighting": self.weighting,
            "open": _copies(self.counted()),
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], named: Mapping[str, Tensor]) -> OpenTask:
        """From a state dictionary that has been checked, in the shapes of this model."""
        return cls(_sums(state["open"], named), state["num_samples"], state["weighting"])

    @torch.no_grad()
    def opened(self, params: Mapping[str, Tensor], weighting: str = "samples") -> OpenTask:
        """A copy with room to add to: sums for all of ``params``. This one stays as it is.

        Raises:
            ValueError: a parameter shrank, or what is there was weighted otherwise.
        """
        if self.counts and weighting != self.weighting:
            raise ValueError(
                f"weighting: the open task has been measured with {self.weighting!r} so far, and "
                f"{weighting!r} does not add up with it; keep to one until consolidate()"
            )
        self.check_growth(params)
        sums = FlatTensors(params, accumulation_dtype)
        for name, before in self.sums.items():
            if name in sums:
                leading(sums[name], before.shape).copy_(before)
        return OpenTask({**self.sums, **sums}, self.counts, weighting)

    def count(self, names: Iterable[str], more: int) -> None:
        """Notes that these parameters' sums have so many samples, or batches, more."""
        for name in names:
            self.counts[name] = self.counts.get(name, 0) + more

    def check_growth(self, params: Mapping[str, Tensor]) -> None:
        """Refuses parameters that shrank since they were measured."""
        for name, before in self.sums.items():
            if name in params:
                _check_growth(name, before, params[name])

    @torch.no_grad()
    def omega(self) -> dict[str, Tensor]:
        """Ω: the sums over the number of samples, or of batches."""
        return {name: total / self.counts[name] for name, total in self.counted().items()}

    def counted(self) -> dict[str, Tensor]:
        """The sums that have samples."""
        return {name: total for name, total in self.sums.items() if name in self.counts}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _sums(values: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> FlatTensors:
    sums = FlatTensors({name: named[name] for name in values}, accumulation_dtype)
    _fill(sums, values)
    return sums


@torch.no_grad()
def _fill(views: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        views[name].copy_(value)


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
