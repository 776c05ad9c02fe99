"""Finds out which sample each row of a gradient belongs to, from two backward passes.

The first pass differentiates Σ s_k, the second Σ 2^k·s_k. Multiplying by a power of two commutes
with rounding, so a row that belongs to sample k is exactly 2^k times as large in the second pass.
For a row that mixes several samples, the ratio is not a power of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mas_ext.importance.per_sample.graph import Grads, Graph, visit_gradients
from mas_ext.importance.per_sample.layout import MIXED, NO_GRADIENT, find_layout, has_enough_samples
from mas_ext.importance.per_sample.plan import Plan
from mas_ext.reference import accumulation_dtype

_KEEP_TOGETHER = (
    "are not in the order of the samples; make the sample dimension 0, or keep each sample's rows "
    "together"
)
_AT_A_TIME = 1 << 20  # elements of a gradient, so that their magnitudes stay in the cache
Place = tuple[int, int]  # (position of an operation, which of its outputs)


def assign_samples(plan: Plan, graph: Graph) -> dict[Place, Tensor]:
    """For each output that grows with the batch, the sample of each entry of that dimension.

    An entry is NO_GRADIENT if no gradient arrives there, and MIXED if it belongs to several
    samples.
    """
    samples = len(graph.root)
    base = 8 if graph.dtype == torch.float16 else 64  # 2^base must be within the dtype's range
    numbers = torch.arange(samples, device=graph.root.device)
    plain = _row_sums(plan, graph, torch.ones_like(graph.root))
    assignment = {place: torch.zeros_like(sums, dtype=torch.int64) for place, sums in plain.items()}
    unit = 1
    while unit < samples or unit == 1:  # one digit of the sample's number per pass
        weights = torch.exp2((numbers // unit % base).to(graph.root.dtype))
        scaled = _row_sums(plan, graph, weights)
        for place, sums in plain.items():
            digits = _digits(sums, scaled[place])
            mixed = (assignment[place] == MIXED) | (digits == MIXED)
            assignment[place] = torch.where(mixed, MIXED, assignment[place] + digits * unit)
        unit *= base
    return {
        p: torch.where(plain[p] == 0, NO_GRADIENT, found).cpu() for p, found in assignment.items()
    }


def _row_sums(plan: Plan, graph: Graph, weights: Tensor) -> dict[Place, Tensor]:
    """Σ |g| over all dimensions except the one that grows with the batch."""
    sums: dict[Place, Tensor] = {}

    def look(position: int, grads: Grads) -> None:
        for j, (grad, extent) in enumerate(
            zip(grads, plan.boundaries[position].extents, strict=True)
        ):
            if grad is not None and extent is not None:
                total = _magnitudes(grad.movedim(extent.dim, 0))
                # A smaller sum may have lost digits, so its ratio means nothing; it counts as zero.
                sums[position, j] = torch.where(total < _smallest(grad.dtype), 0.0, total)

    with torch.autocast(weights.device.type, enabled=False), torch.no_grad():
        visit_gradients(graph, weights, plan.boundaries, plan.frontier, look, keep_graph=True)
    return sums


def _magnitudes(rows: Tensor) -> Tensor:
    """Σ |g| of every row. All sums are formed in the same order, so powers of two stay exact."""
    rows = rows if rows.dim() > 1 else rows[:, None]
    length = max(1, _AT_A_TIME // max(1, rows[:1].numel()))
    dtype = accumulation_dtype(rows.real.dtype)
    sums = [part.abs().flatten(1).sum(1, dtype=dtype) for part in rows.split(length)]
    return torch.cat(sums).double()


def _smallest(dtype: torch.dtype) -> float:
    """The smallest sum that surely has all its digits, with a margin except in float16."""
    limits = torch.finfo(dtype)
    return limits.tiny if dtype == torch.float16 else limits.tiny / limits.eps


def _digits(plain: Tensor, scaled: Tensor) -> Tensor:
    """log₂ of the ratio where that is a whole number, otherwise MIXED."""
    ratio = (scaled / plain).nan_to_num(0.0, 0.0, 0.0)
    digits = ratio.clamp_min(0.5).log2().round()
    exact = (ratio - digits.exp2()).abs() <= 1e-6 * ratio
    return torch.where(exact | (plain == 0), digits, MIXED).to(torch.int64)


def assign_layouts(plan: Plan, graph: Graph) -> None:
    """Finds the layout of every boundary's outputs; parameters of those without one fall back."""
    assignment = assign_samples(plan, graph)
    for position, boundary in plan.boundaries.items():
        name = graph.nodes[position].name
        for j, extent in enumerate(boundary.extents):
            found = assignment.get((position, j))
            arrived = found is not None and bool((found != NO_GRADIENT).any())
            layout = None
            if extent is not None and found is not None and arrived:
                layout = find_layout(extent, found)
                if layout is None and _has_no_layout(found):
                    plan.fall_back(boundary.names, f"the rows of {name} {_KEEP_TOGETHER}")
            boundary.layouts.append(layout)
        if all(extent is None for extent in boundary.extents):
            plan.fall_back(
                boundary.names,
                f"{name} does not grow in proportion to the batch; keep the sample as a dimension",
            )
    plan.defer_unassigned(graph)


def _has_no_layout(assignment: Tensor) -> bool:
    """Whether no layout exists, rather than too few samples having a gradient to find it."""
    return bool((assignment == MIXED).any()) or has_enough_samples(assignment)


def find_moved_rows(plan: Plan, graph: Graph) -> dict[str, str]:
    """The parameters for which this batch's rows contradict the plan's layouts → the reason."""
    reasons: dict[str, str] = {}
    assignment = assign_samples(plan, graph)
    for (position, j), found in assignment.items():
        boundary = plan.boundaries[position]
        layout = boundary.layouts[j]
        if layout is not None and not layout.agrees_with(found):
            why = (
                f"the data decides where the rows of {graph.nodes[position].name} are; index, sort "
                "and select within each sample, not over the whole batch"
            )
            reasons |= dict.fromkeys(boundary.names, why)
    return reasons
