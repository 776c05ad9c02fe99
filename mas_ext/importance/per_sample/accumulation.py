"""One backward pass: gradients are used where they pass by, and no weight's gradient is formed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from mas_ext.importance.per_sample.contributions import Contribution
from mas_ext.importance.per_sample.generic import Generic
from mas_ext.importance.per_sample.graph import Graph
from mas_ext.importance.per_sample.groups import Sink
from mas_ext.importance.per_sample.plan import Plan, Use
from mas_ext.importance.per_sample.rules import RULES, Grads, NoRule, Rule, Visit
from mas_ext.importance.per_sample.visits import visit_boundaries


class Accumulation:
    """Adds Σ_k |M_k| of one batch to the raw sums.

    Args:
        learn: on the first pass of a plan, to sums of its own: an operation that turns out to have
            no rule is put down as generic, and what raises an error is not served.
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
                with self._failing(self._sinks[use]):
                    self._sinks[use].put(use, generic)
            for sink in dict.fromkeys(self._sinks.values()):
                unserved |= self._finished(sink)
        return unserved

    def _finished(self, sink: Sink) -> dict[str, str]:
        with self._failing(sink):
            return sink.finish()
        return sink.finish()  # now it says what failed

    @contextmanager
    def _failing(self, sink: Sink) -> Iterator[None]:
        """While learning, an error is the end of one way only, and a warning will tell of it."""
        try:
            yield
        except Exception as problem:
            if not self._learn:
                raise
            sink.fail(f"its gradient cannot be formed here ({problem})")

    @property
    def _keeps_graph(self) -> bool:
        return self._learn or self._plan.keeps_graph

    def _visit(self, position: int, grads: Grads) -> None:
        boundary, node = self._plan.boundaries[position], self._graph.nodes[position]
        uses = [use for use in boundary.uses if use in self._sinks]
        grads = tuple(
            None if layout is None and grad is not None and not grad.any() else grad
            for grad, layout in zip(grads, boundary.layouts, strict=True)
        )
        if all(grad is None for grad in grads):
            return
        for use in uses:
            dtype = self._graph.dtype_at(use.source)
            visit = Visit(node, grads, tuple(boundary.layouts), use.shape, dtype)
            self._serve(use, visit)
        if not self._keeps_graph:
            node.forget()

    def _serve(self, use: Use, visit: Visit) -> None:
        sink = self._sinks[use]
        pairs = zip(visit.grads, visit.layouts, strict=True)
        if any(grad is not None and layout is None for grad, layout in pairs):
            sink.fail("no gradient arrived there when its plan was made")
            return
        with self._failing(sink):
            contribution = self._contribution(use, visit)
            if isinstance(contribution, Generic):
                self._later.append((use, contribution))
            else:
                sink.put(use, contribution)

    def _contribution(self, use: Use, visit: Visit) -> Contribution:
        if use in self._plan.generic:
            return Generic(visit, use.input)
        try:
            return _rule(visit)(visit, use.input)
        except NoRule:
            if not self._learn:
                raise
            self._plan.generic.add(use)
            return Generic(visit, use.input)


def _rule(visit: Visit) -> Rule:
    """The rule for an operation; those of several outputs use the gradient of the first."""
    first = visit.grads[0]
    if visit.node.operation not in RULES or first is None or first.is_complex():
        raise NoRule("none is registered")
    return RULES[visit.node.operation]
