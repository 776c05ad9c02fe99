"""What MAS remembers between tasks: Ω, θ*, and how a new task's Ω joins the old."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mas_ext._distributed.shards import Home
from mas_ext._penalty.auto_strength import Group
from mas_ext._state.flat_tensors import FlatTensors, leading
from mas_ext.importance.estimation import SampleStatistics
from mas_ext.precision import KeptImportance
from mas_ext.reference import accumulation_dtype, in_memory_order

Merge = str | tuple[str, float]


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


def merged_weight(merge: Merge, tasks: int) -> float:
    """What the weights add up to that a merged Ω gives its tasks."""
    if merge == "sum":
        return float(tasks)
    if merge == "sum_of_sums":
        return 2.0 ** (tasks - 1)
    if merge[0] == "ema_from_zero":
        return 1 - float(merge[1]) ** tasks
    return 1.0


def fits(anchor: Tensor, p: Tensor) -> bool:
    """Whether a parameter still is what its anchor was made for."""
    return anchor.shape == p.shape and anchor.dtype == p.dtype and anchor.device == p.device


_PIECE = 2**20  # elements of Ω that are merged at a time; a multiple of precision.BLOCK


class Memory:
    """Ω and θ* of the parameters that were measured so far.

    Attributes:
        importance: name → Ω, kept in the state's dtype.
        anchor: name → θ*, in the parameter's dtype.
        tasks: name → in how many tasks the parameter was measured.
        earlier: name → the sum of all former ``importance``; empty unless the merge needs it.
    """

    def __init__(self, state_dtype: str = "float32") -> None:
        self.importance = KeptImportance({}, state_dtype)
        self.anchor = FlatTensors({})
        self.tasks: dict[str, int] = {}
        self.earlier = KeptImportance({}, state_dtype)

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

    @torch.no_grad()
    def sizes(self, params: Mapping[str, Tensor], merge: Merge) -> dict[str, Group]:
        """How many parameters there are, and Σ Ω of a task's mean Ω, by name.

        Of DTensors every process calls this; it waits for the device.
        """
        totals = {name: Home.of(p).total(self._total(name)) for name, p in params.items()}
        return {
            name: Group(p.numel(), totals[name].item() / self._weight(name, merge))
            for name, p in params.items()
        }

    def _total(self, name: str) -> Tensor:
        """Σ Ω, in float64; what is kept in codes is expanded a piece at a time."""
        kept, scales = self.importance.kept(name)
        if scales is None:
            return kept.sum(dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64, device=kept.device)
        for start in range(0, kept.numel(), _PIECE):
            part = self.importance.read(name, slice(start, start + _PIECE))
            total += part.sum(dtype=torch.float64)
        return total

    def _weight(self, name: str, merge: Merge) -> float:
        return merged_weight(merge, tasks) if (tasks := self.tasks[name]) else 1.0

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything, by parameter name."""
        importance, importance_scales = _kept_copies(self.importance)
        earlier, earlier_scales = _kept_copies(self.earlier)
        return {
            "tasks": dict(self.tasks),
            "importance": importance,
            "importance_scales": importance_scales,
            "anchor": _copies(self.anchor),
            "earlier": earlier,
            "earlier_scales": earlier_scales,
        }

    @classmethod
    def restored(
        cls, state: Mapping[str, Any], named: Mapping[str, Tensor], state_dtype: str = "float32"
    ) -> Memory:
        """From a state dictionary that has been checked, in the shapes of this model.

        Its Ω may be kept otherwise than here.
        """
        memory = cls(state_dtype)
        memory.fit({name: named[name] for name in state["anchor"]})
        memory.tasks = dict(state["tasks"])
        _fill(memory.anchor, state["anchor"])
        _put_all(memory.importance, state["importance"], state["importance_scales"])
        memory.earlier = KeptImportance({n: named[n] for n in state["earlier"]}, state_dtype)
        _put_all(memory.earlier, state["earlier"], state["earlier_scales"])
        return memory

    @torch.no_grad()
    def end_task(self, params: Mapping[str, Tensor], task: OpenTask, merge: Merge) -> None:
        """Joins a task's Ω, and takes θ* ← θ for all of ``params``."""
        self.fit(params)
        if merge == "sum_of_sums" and not self.earlier:
            self.earlier = KeptImportance(self.anchor, self.importance.state_dtype)
        for name, total in task.counted().items():
            if name in params:
                self._join(name, total, task.counts[name], merge)
                self.tasks[name] += 1
        for name, p in params.items():
            self.anchor[name].copy_(p)

    def _join(self, name: str, total: Tensor, count: int, merge: Merge) -> None:
        """Merges Ω = total/count into what is there.

        A piece at a time, so that next to the sums there never is a second Ω in float32, unless the
        parameter grew or changed its strides.
        """
        kept, _ = self.importance.kept(name)
        if total.shape != kept.shape or total.stride() != kept.stride():
            old, earlier = self.importance[name], self.earlier.get(name)
            part = leading(old, total.shape)
            before = None if earlier is None else leading(earlier, total.shape)
            merge_(part, total.to(old) / count, self.tasks[name], merge, before)
            self.importance.put(name, old)
            if earlier is not None:
                self.earlier.put(name, earlier)
            return
        flat = in_memory_order(total)
        for start in range(0, len(flat), _PIECE):
            piece = slice(start, start + _PIECE)
            old = self.importance.read(name, piece)
            before = self.earlier.read(name, piece) if self.earlier else None
            merge_(old, flat[piece].to(old) / count, self.tasks[name], merge, before)
            self.importance.write(name, piece, old)
            if before is not None:
                self.earlier.write(name, piece, before)


def _grown(kept: KeptImportance, like: Mapping[str, Tensor]) -> KeptImportance:
    """The same in the shapes of ``like``, zero where there was nothing."""
    grown = KeptImportance(like, kept.state_dtype)
    for name in kept:
        before, scales = kept.kept(name)
        if before.shape == like[name].shape:
            grown.put(name, before, scales)
        else:
            omega = grown[name]
            leading(omega, before.shape).copy_(kept[name])
            grown.put(name, omega)
    return grown


def _kept_copies(kept: KeptImportance) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Ω as it is kept, and the scales of what is kept in codes."""
    pairs = {name: kept.kept(name) for name in kept}
    scales = {name: scales for name, (_, scales) in pairs.items() if scales is not None}
    return _copies({name: omega for name, (omega, _) in pairs.items()}), _copies(scales)


def _put_all(
    kept: KeptImportance, values: Mapping[str, Tensor], scales: Mapping[str, Tensor]
) -> None:
    for name, value in values.items():
        kept.put(name, value, scales.get(name))


class OpenTask:
    """The raw sums of Ω over the samples that the open task has seen so far.

    Attributes:
        sums: name → Σ over samples, or over batches.
        counts: name → how many samples, or batches; a parameter thawed half-way has seen fewer.
        weighting: which of the two, ``"samples"`` or ``"batches"``.
        seen: all samples, whichever parameters they were measured for.
    """

    def __init__(
        self,
        sums: Mapping[str, Tensor] | None = None,
        counts: Mapping[str, int] | None = None,
        weighting: str = "samples",
        seen: SampleStatistics | None = None,
    ) -> None:
        self.sums = sums or {}
        self.counts = dict(counts or {})
        self.weighting = weighting
        self.seen = seen or SampleStatistics()

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything, by parameter name."""
        return {
            "num_samples": dict(self.counts),
            "weighting": self.weighting,
            "seen": asdict(self.seen),
            "open": _copies(self.counted()),
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], named: Mapping[str, Tensor]) -> OpenTask:
        """From a state dictionary that has been checked, in the shapes of this model."""
        sums, seen = _sums(state["open"], named), SampleStatistics(**state["seen"])
        return cls(sums, state["num_samples"], state["weighting"], seen)

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
        return OpenTask({**self.sums, **sums}, self.counts, weighting, self.seen)

    def count(self, names: Iterable[str], more: SampleStatistics) -> None:
        """Notes that these parameters' sums have so many samples, or batches, more."""
        for name in names:
            self.counts[name] = self.counts.get(name, 0) + more.weight
        self.seen += more

    def check_growth(self, params: Mapping[str, Tensor]) -> None:
        """Refuses parameters that shrank since they were measured."""
        for name, before in self.sums.items():
            if name in params:
                _check_growth(name, before, params[name])

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
