"""One backward pass: gradients are used where they pass by, and no weight's gradient is formed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from mas_ext.importance.per_sample.generic import Generic
from mas_ext.importance.per_sample.graph import Graph, backward
from mas_ext.importance.per_sample.groups import Sink
from mas_ext.importance.per_sample.plan import Boundary, Plan, Use
from mas_ext.importance.per_sample.rules import RULES, Grads, NoRule, Rule, Visit


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


class Accumulation:
    """Adds Σ_k |M_k| of one batch to the raw sums.

    Args:
        learn: on the first pass of a plan: an operation that turns out to have no rule is put down
            as generic.
    """

    def __init__(
        self, plan: Plan, graph: Graph, sums: Mapping[str, Tensor], learn: bool = False
    ) -> None:
        self._plan, self._graph, self._learn = plan, graph, learn
        sinks = {group: Sink(group, graph, sums) for group in plan.groups}
        self._sinks = {use: sinks[group] for group in plan.groups for use in group.uses}
        self._later: list[tuple[Use, Generic]] = []

    def run(self, weights: Tensor) -> dict[str, str]:
        """Returns the parameters that could not be served, to which nothing was added, and why."""
        unserved: dict[str, str] = {}
        # The caller's autocast is for the forward pass: sums are formed in Ω's dtype.
        with torch.autocast(weights.device.type, enabled=False), torch.no_grad():
            visit_boundaries(self._plan, self._graph, weights, self._visit, self._keeps_graph)
            for use, generic in self._later:
                self._sinks[use].put(use, generic)
            for sink in dict.fromkeys(self._sinks.values()):
                unserved |= sink.finish()
        return unserved

    @property
    def _keeps_graph(self) -> bool:
        return self._learn or self._plan.keeps_graph

    def _visit(self, position: int, grads: Grads) -> None:
        boundary, node = self._plan.boundaries[position], self._graph.nodes[position]
        uses = [use for use in boundary.uses if use in self._sinks]
        if not uses or not _any_arrived(boundary, grads):
            return
        with torch.no_grad():
            for use in uses:
                self._serve(use, boundary, Visit(node, grads, tuple(boundary.layouts), use.shape))
        if not self._keeps_graph:
            node.forget()

    def _serve(self, use: Use, boundary: Boundary, visit: Visit) -> None:
        sink = self._sinks[use]
        if not any(boundary.layouts):
            sink.fail("no gradient arrived there when its plan was made")
        elif use in self._plan.generic:
            self._later.append((use, Generic(visit, use.input)))
        else:
            try:
                sink.put(use, _rule(visit)(visit, use.input))
            except NoRule:
                if not self._learn:
                    raise
                self._plan.generic.add(use)
                self._later.append((use, Generic(visit, use.input)))


def _any_arrived(boundary: Boundary, grads: Grads) -> bool:
    """Whether a gradient arrived; where none did when the plan was made, one that is not zero."""
    if any(boundary.layouts):
        return any(grad is not None for grad in grads)
    return any(grad is not None and bool(grad.any()) for grad in grads)


def _rule(visit: Visit) -> Rule:
    """The rule for an operation; those of several outputs use the gradient of the first."""
    if visit.node.operation not in RULES or visit.grads[0] is None:
        raise NoRule("none is registered")
    return RULES[visit.node.operation]


def confirm_layouts(plan: Plan, graph: Graph) -> None:
    """Gives up on what is not in the order that a few samples showed, looking at a whole batch.

    Half of the samples, drawn at random, are given no output gradient: their rows must be zero.
    """
    if not plan.boundaries:
        return
    generator = torch.Generator().manual_seed(len(graph.root))
    order = torch.randperm(len(graph.root), generator=generator)
    silent = order[: len(order) // 2].to(graph.root.device)
    weights = torch.ones_like(graph.root).index_fill_(0, silent, 0)

    def check(position: int, grads: Grads) -> None:
        boundary = plan.boundaries[position]
        for grad, layout in zip(grads, boundary.layouts, strict=True):
            if grad is not None and layout is not None and layout.split(grad)[silent].any():
                name = graph.nodes[position].name
                plan.give_up(boundary.names, f"the rows of {name} are not in the samples' order")

    visit_boundaries(plan, graph, weights, check, keep=True)
