"""From contributions to Ω: added at once, or summed over a parameter's uses first."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mas_ext import functional
from mas_ext.importance.per_sample.contributions import Contribution, Outer, Rows, Tied
from mas_ext.importance.per_sample.graph import Graph
from mas_ext.importance.per_sample.plan import Group, Use
from mas_ext.importance.per_sample.subgraph import pulled


class Sink:
    """Takes a group's contributions as they come, and adds Σ_k |Σ_uses M_k| to the raw sums."""

    def __init__(self, group: Group, graph: Graph, sums: Mapping[str, Tensor]) -> None:
        self._group, self._graph = group, graph
        self._sums = {name: sums[name] for name in group.names}
        self._waiting: dict[Use, Contribution] = {}
        self._failure: str | None = None

    def fail(self, reason: str) -> None:
        """A use could not be served: nothing is added."""
        self._failure = reason

    def put(self, use: Use, contribution: Contribution) -> None:
        """What one use contributes; added at once where it is the only one."""
        if self._group.is_direct:
            self._add(use, contribution)
        else:
            self._waiting[use] = contribution

    def _add(self, use: Use, contribution: Contribution) -> None:
        """Where no view of Ω lies as what is used does, it is summed there and then put back."""
        (omega,) = self._sums.values()
        if use.view is not None:
            contribution.add_magnitudes_(use.view(omega))
            return
        total = omega.new_zeros(use.shape)
        contribution.add_magnitudes_(total)
        for _, places in pulled(self._graph, [use.source], [total], self._sums):
            omega += places

    def finish(self) -> dict[str, str]:
        """Adds what had to wait for the other uses; one without a gradient contributes nothing.

        Returns:
            The parameters to which nothing was added, and why.
        """
        if self._failure is not None:
            return dict.fromkeys(self._group.names, self._failure)
        if len(self._waiting) == 1 and len(self._sums) == 1:
            ((use, contribution),) = self._waiting.items()
            if use.is_placement:
                self._add(use, contribution)
                return {}
        if self._waiting:
            whole = self._as_one()
            if whole is not None:
                whole.add_magnitudes_(self._sums[self._group.names[0]])
            else:
                self._add_sample_by_sample()
        return {}

    def _as_one(self) -> Contribution | None:
        """Products with one matrix are one product at more positions, and so are look-ups."""
        if len(self._sums) != 1:
            return None
        (omega,) = self._sums.values()
        outers, rows = [], []
        for use, part in self._waiting.items():
            turned = None if use.view is None else _orientation(use.view(omega), omega)
            if isinstance(part, Outer) and part.shape is None and turned is not None:
                outers.append(part.transposed() if turned else part)
            elif isinstance(part, Rows) and turned is False:
                rows.append(part)
            else:
                return None
        if not rows:
            return Outer.joined(outers)
        table = Rows.joined(rows)
        return Tied(Outer.joined(outers), table) if outers else table

    def _add_sample_by_sample(self) -> None:
        uses = list(self._waiting)
        totals = {name: torch.zeros_like(omega) for name, omega in self._sums.items()}
        for parts in zip(*(self._waiting[use].samples() for use in uses), strict=True):
            for total in totals.values():
                total.zero_()
            self._sum_uses(dict(zip(uses, parts, strict=True)), totals)
            functional.accumulate_importance_(list(self._sums.values()), list(totals.values()))

    def _sum_uses(self, parts: Mapping[Use, Tensor], totals: Mapping[str, Tensor]) -> None:
        """M_k of every parameter of the group, from one sample's gradient at every use."""
        made = {}
        for use, part in parts.items():
            if use.view is None:
                made[use] = part
            else:
                (name,) = use.names
                use.view(totals[name]).add_(part.view(use.shape))
        sources = [use.source for use in made]
        for name, grad in pulled(self._graph, sources, list(made.values()), self._sums):
            totals[name].add_(grad)


def _orientation(view: Tensor, whole: Tensor) -> bool | None:
    """False if a view is the whole matrix, True if it is its transpose, None if neither."""
    if whole.dim() != 2 or view.data_ptr() != whole.data_ptr():
        return None
    if (view.shape, view.stride()) == (whole.shape, whole.stride()):
        return False
    turned = whole.t()
    return True if (view.shape, view.stride()) == (turned.shape, turned.stride()) else None
