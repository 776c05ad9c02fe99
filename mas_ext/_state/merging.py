"""How a task's Ω is merged with that of the tasks before: a policy is a row of ``POLICIES``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Merge = str | tuple[str, float]


@dataclass
class _Merging:
    """One parameter's Ω, or a piece of it, while a task is merged.

    Attributes:
        old: Ω of the tasks before, zeros if there are none or where the parameter has grown since;
            the merged Ω is written here.
        new: Ω of the task that ends.
        tasks: in how many tasks the parameter was measured before.
        alpha: of policies that have one.
        earlier: Σ of the merged Ω before ``old``, for the policy that needs it.
    """

    old: Tensor
    new: Tensor
    tasks: int
    alpha: float
    earlier: Tensor | None


@dataclass(frozen=True)
class MergePolicy:
    """How tasks are merged.

    Attributes:
        merge_: writes the merged Ω to ``old``.
        total_weight: ``(tasks, alpha)`` → the sum of the weights that the merged Ω gives its tasks.
        has_alpha: whether the policy is written ``(name, alpha)``.
        needs_earlier: whether ``earlier`` is kept for it.
        accumulates: whether Ω moves in steps that add up, so that rounding all of them to the
            nearest would lose the small ones.
    """

    merge_: Callable[[_Merging], Any]
    total_weight: Callable[[int, float], float] = lambda tasks, alpha: 1.0
    has_alpha: bool = False
    needs_earlier: bool = False
    accumulates: bool = True


def _ema_(m: _Merging) -> None:
    if m.tasks == 0:
        m.old.copy_(m.new)
    else:
        m.old.lerp_(m.new, 1 - m.alpha)


def _sum_of_sums_(m: _Merging) -> None:
    assert m.earlier is not None
    m.earlier.add_(m.old)
    torch.add(m.earlier, m.new, out=m.old)


POLICIES: dict[str, MergePolicy] = {
    # Σ Ω_t: the paper's.
    "sum": MergePolicy(lambda m: m.old.add_(m.new), lambda tasks, alpha: float(tasks)),
    "mean": MergePolicy(lambda m: m.old.lerp_(m.new, 1 / (m.tasks + 1))),
    "max": MergePolicy(lambda m: torch.maximum(m.old, m.new, out=m.old), accumulates=False),
    # αΩ + (1−α)Ω_t, which starts with the first task's Ω.
    "ema": MergePolicy(_ema_, has_alpha=True),
    # The same from Ω = 0, so that the first task's Ω too is multiplied by 1−α.
    "ema_from_zero": MergePolicy(
        lambda m: m.old.lerp_(m.new, 1 - m.alpha),
        lambda tasks, alpha: 1 - alpha**tasks,
        has_alpha=True,
    ),
    # αΩ + Ω_t: online EWC's.
    "decay": MergePolicy(
        lambda m: m.old.mul_(m.alpha).add_(m.new),
        lambda tasks, alpha: (1 - alpha**tasks) / (1 - alpha),
        has_alpha=True,
    ),
    # Ω_t and all earlier *merged* Ω: from the last to the first, tasks weigh 1, 1, 2, 4, 8, …
    "sum_of_sums": MergePolicy(
        _sum_of_sums_, lambda tasks, alpha: 2.0 ** min(tasks - 1, 1023), needs_earlier=True
    ),
}


def check_merge(merge: Any) -> Merge:
    """Returns a name of ``POLICIES``, or ``(name, alpha)`` with 0 ≤ alpha < 1."""
    if isinstance(merge, str) and merge in POLICIES and not POLICIES[merge].has_alpha:
        return merge
    if isinstance(merge, (tuple, list)) and len(merge) == 2 and _has_alpha(merge[0]):
        name, alpha = merge
        if isinstance(alpha, (int, float)) and 0 <= alpha < 1:
            return (name, float(alpha))
        raise ValueError(f"merge: alpha of ({name!r}, alpha) is {alpha!r}; it must be in [0, 1)")
    known = [f"({n!r}, alpha)" if p.has_alpha else repr(n) for n, p in POLICIES.items()]
    raise ValueError(f"merge: {merge!r} is unknown; use {', '.join(known[:-1])} or {known[-1]}")


def _has_alpha(name: Any) -> bool:
    return isinstance(name, str) and name in POLICIES and POLICIES[name].has_alpha


def _split(merge: Merge) -> tuple[MergePolicy, float]:
    name, alpha = (merge, 0.0) if isinstance(merge, str) else merge
    return POLICIES[name], float(alpha)


def merge_(
    old: Tensor, new: Tensor, tasks: int, merge: Merge, earlier: Tensor | None = None
) -> None:
    r"""Merges a task's Ω into the Ω of the tasks before, in place.

    A part that a parameter has grown by counts as Ω = 0 in the tasks before.

    Args:
        old: Ω of the ``tasks`` tasks before; written.
        new: Ω of the task that ends.
        tasks: in how many tasks this parameter was measured before.
        merge: a policy, as :func:`check_merge` returns it.
        earlier: for ``"sum_of_sums"``, Σ of the merged Ω before ``old``; written.
    """
    policy, alpha = _split(merge)
    policy.merge_(_Merging(old, new, tasks, alpha, earlier))


def total_weight(merge: Merge, tasks: int) -> float:
    """The sum of the weights that a merged Ω gives its tasks."""
    policy, alpha = _split(merge)
    return policy.total_weight(tasks, alpha)


def needs_earlier(merge: Merge) -> bool:
    """Whether the policy needs the sum of all former merged Ω."""
    return _split(merge)[0].needs_earlier


def accumulates(merge: Merge) -> bool:
    """Whether the policy's Ω moves in steps that add up."""
    return _split(merge)[0].accumulates
