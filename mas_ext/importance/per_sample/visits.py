"""A backward pass that stops by at the boundaries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from mas_ext.importance.per_sample.graph import Graph, backward
from mas_ext.importance.per_sample.plan import Plan
from mas_ext.importance.per_sample.rules import Grads


def visit_boundaries(
    plan: Plan,
    graph: Graph,
    weights: Tensor,
    visitor: Callable[[int, Grads], None],
    keep: bool = False,
) -> None:
    """Runs the backward pass of Σ_k weights_k·s_k and shows the visitor what arrives where.

    The frontier, behind which nothing is needed, is where the pass is told to end; at the other
    boundaries a hook sees the gradients as they pass.
    """
    hooks = [
        graph.nodes[p].fn.register_prehook(partial(visitor, p))
        for p in plan.boundaries
        if p not in plan.frontier
    ]
    ends = [(p, j) for p in plan.frontier for j in range(len(plan.boundaries[p].extents))]
    try:
        edges = [graph.nodes[p].output(j) for p, j in ends]
        arrived = dict(zip(ends, backward(graph, weights, edges, keep), strict=True))
    finally:
        for hook in hooks:
            hook.remove()
    for p in plan.frontier:
        count = len(plan.boundaries[p].extents)
        visitor(p, tuple(arrived.pop((p, j)) for j in range(count)))
