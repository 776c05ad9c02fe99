"""Accumulates a batch's importance in one backward pass, without forming any weight's gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from mas_ext.importance.contributions import (
    Contribution,
    EmbeddingRows,
    Materialized,
    MatrixProduct,
    TiedEmbedding,
    upcast,
)
from mas_ext.importance.per_sample.generic import Generic
from mas_ext.importance.per_sample.graph import Grads, Graph, visit_gradients
from mas_ext.importance.per_sample.parameter_graph import backpropagated
from mas_ext.importance.per_sample.plan import ParameterUse, Plan, UseGroup
from mas_ext.importance.per_sample.rules import RULES, NoRule, Rule, VisitedOperation
from mas_ext.importance.reductions import Reduction


class BatchAccumulator:
    """Adds Σ_k f(M_k) of one batch to the raw sums, where f is the reduction.

    Args:
        plan: the plan for the graph.
        graph: the graph of the batch's forward pass.
        sums: parameter name → the sum to add to.
        reduction: f.
        keep_graph: whether to keep the graph for another pass.
        learn: True for the first pass of a plan, which adds to separate sums. An operation without
            a rule is then recorded in the plan as generic, and an error makes the parameters
            unserved instead of being raised.
    """

    def __init__(
        self,
        plan: Plan,
        graph: Graph,
        sums: Mapping[str, Tensor],
        reduction: Reduction,
        *,
        keep_graph: bool = False,
        learn: bool = False,
    ) -> None:
        self._plan, self._graph, self._learn = plan, graph, learn
        self._keeps_graph = keep_graph or learn or plan.keeps_graph
        accumulators = {
            group: GroupAccumulator(group, graph, sums, reduction) for group in plan.groups
        }
        self._accumulators = {
            use: accumulators[group] for group in plan.groups for use in group.uses
        }
        self._later: list[tuple[ParameterUse, Generic]] = []

    def run(self, weights: Tensor) -> dict[str, str]:
        """Runs the backward pass of Σ_k weights_k·s_k and adds what every sample contributes.

        Args:
            weights: [B], 1 for the samples to add and 0 for the others.

        Returns:
            The parameters to which nothing was added, because they could not be served → the
            reason.
        """
        unserved: dict[str, str] = {}
        # The caller's autocast is meant for the forward pass; sums are formed in Ω's dtype.
        with torch.autocast(weights.device.type, enabled=False), torch.no_grad():
            visit_gradients(
                self._graph,
                weights,
                self._plan.boundaries,
                self._plan.frontier,
                self._visit,
                self._keeps_graph,
            )
            for use, generic in self._later:
                with self._failing(self._accumulators[use]):
                    self._accumulators[use].put(use, generic)
            for accumulator in dict.fromkeys(self._accumulators.values()):
                unserved |= self._finished(accumulator)
        return unserved

    def _finished(self, accumulator: GroupAccumulator) -> dict[str, str]:
        with self._failing(accumulator):
            return accumulator.finish()
        return accumulator.finish()  # an error was caught: this now returns the reason

    def _failing(self, accumulator: GroupAccumulator) -> AbstractContextManager[None]:
        return _failing(accumulator) if self._learn else nullcontext()

    def _visit(self, position: int, grads: Grads) -> None:
        boundary, node = self._plan.boundaries[position], self._graph.nodes[position]
        uses = [use for use in boundary.uses if use in self._accumulators]
        grads = tuple(
            None if layout is None and grad is not None and not grad.any() else grad
            for grad, layout in zip(grads, boundary.layouts, strict=True)
        )
        if all(grad is None for grad in grads):
            return
        for use in uses:
            dtype = self._graph.dtype_at(use.source)
            op = VisitedOperation(node, grads, tuple(boundary.layouts), use.shape, dtype)
            self._serve(use, op)
        if not self._keeps_graph:
            node.forget()

    def _serve(self, use: ParameterUse, op: VisitedOperation) -> None:
        accumulator = self._accumulators[use]
        pairs = zip(op.grads, op.layouts, strict=True)
        if any(grad is not None and layout is None for grad, layout in pairs):
            accumulator.fail(
                "no gradient arrived there when its plan was made; the next batch makes another "
                "plan, so there is nothing to change"
            )
            return
        with self._failing(accumulator):
            contribution = self._contribution(use, op)
            if isinstance(contribution, Generic):
                self._later.append((use, contribution))
            else:
                accumulator.put(use, contribution)

    def _contribution(self, use: ParameterUse, op: VisitedOperation) -> Contribution:
        if use in self._plan.generic:
            return Generic(op, use.input)
        try:
            return _as_contribution(_rule(op)(op, use.input), op)
        except NoRule:
            if not self._learn:
                raise
            self._plan.generic.add(use)
            return Generic(op, use.input)


@contextmanager
def _failing(accumulator: GroupAccumulator) -> Iterator[None]:
    """While learning, turns an error into a failure of this group, which falls back.

    The warning about the fallback then gives the reason.
    """
    try:
        yield
    except Exception as problem:
        accumulator.fail(
            f"its gradient cannot be formed in one pass ({problem}); register a rule for the "
            "operation with mas_ext.importance.register_rule"
        )


def _as_contribution(result: Contribution | Tensor, op: VisitedOperation) -> Contribution:
    """A rule's result as a contribution; a tensor [B, *shape] is the per-sample gradients.

    Raises:
        ValueError: the tensor has another shape.
    """
    if not isinstance(result, Tensor):
        return result
    expected = (len(op.split(op.grad)), *op.shape)
    if result.shape != expected:
        raise ValueError(
            f"the rule for {op.node.operation!r} returned a tensor of shape "
            f"{list(result.shape)}; it must return one gradient per sample, {list(expected)}"
        )
    return Materialized(result)


def _rule(op: VisitedOperation) -> Rule:
    """The rule for an operation.

    Raises:
        NoRule: none is registered, or the first output has no gradient, or a complex one.
    """
    first = op.grads[0]
    if op.node.operation not in RULES or first is None or first.is_complex():
        raise NoRule("none is registered")
    return RULES[op.node.operation]


class GroupAccumulator:
    """Collects a group's contributions as they arrive, and adds Σ_k f(Σ_uses M_k) to the sums."""

    def __init__(
        self, group: UseGroup, graph: Graph, sums: Mapping[str, Tensor], reduction: Reduction
    ) -> None:
        self._group, self._graph, self._reduction = group, graph, reduction
        self._sums = {name: sums[name] for name in group.names}
        self._waiting: dict[ParameterUse, Contribution] = {}
        self._failure: str | None = None

    def fail(self, reason: str) -> None:
        """Records that a use could not be served; nothing is added for the whole group."""
        self._failure = reason

    def put(self, use: ParameterUse, contribution: Contribution) -> None:
        """Takes the contribution of one use; it is added at once if the group has no other use."""
        if self._group.is_direct:
            self._add(use, contribution)
        else:
            self._waiting[use] = contribution

    def _add(self, use: ParameterUse, contribution: Contribution) -> None:
        """Adds Σ_k f(M_k) to the elements of Ω that the use consists of.

        If these elements are not a view of Ω, the sum is formed in a new tensor, and then
        backpropagated to the places that the elements come from. There it is of the parameter's
        dtype, in which a square might be out of range, so its root is backpropagated.
        """
        (omega,) = self._sums.values()
        if use.view is not None:
            contribution.accumulate_(use.view(omega), self._reduction)
            return
        total = omega.new_zeros(use.shape)
        contribution.accumulate_(total, self._reduction)
        roots = [self._reduction.root(total)]
        for _, places in backpropagated(self._graph, [use.source], roots, self._sums):
            omega += self._reduction.of(upcast(places))

    def finish(self) -> dict[str, str]:
        """Adds the contributions that had to wait for each other.

        A use that received no gradient contributes nothing.

        Returns:
            The parameters to which nothing was added → the reason.
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
                whole.accumulate_(self._sums[self._group.names[0]], self._reduction)
            else:
                self._add_sample_by_sample()
        return {}

    def _as_one(self) -> Contribution | None:
        """Joins all contributions into one, if they are matrix products or look-ups.

        The sum of two products is one product over the positions of both; the same holds for
        look-ups in one table. Returns None for other contributions.
        """
        if len(self._sums) != 1:
            return None
        (omega,) = self._sums.values()
        outers, rows = [], []
        for use, part in self._waiting.items():
            turned = None if use.view is None else _orientation(use.view(omega), omega)
            if isinstance(part, MatrixProduct) and part.shape is None and turned is not None:
                outers.append(part.transposed() if turned else part)
            elif isinstance(part, EmbeddingRows) and turned is False:
                rows.append(part)
            else:
                return None
        if not rows:
            return MatrixProduct.joined(outers)
        table = EmbeddingRows.joined(rows)
        return TiedEmbedding(MatrixProduct.joined(outers), table) if outers else table

    def _add_sample_by_sample(self) -> None:
        uses = list(self._waiting)
        totals = {name: torch.zeros_like(omega) for name, omega in self._sums.items()}
        for parts in zip(*(self._waiting[use].samples() for use in uses), strict=True):
            for total in totals.values():
                total.zero_()
            self._sum_uses(dict(zip(uses, parts, strict=True)), totals)
            self._reduction.add_(list(self._sums.values()), list(totals.values()))

    def _sum_uses(self, parts: Mapping[ParameterUse, Tensor], totals: Mapping[str, Tensor]) -> None:
        """M_k of every parameter of the group, from one sample's gradient at every use."""
        made = {}
        for use, part in parts.items():
            if use.view is None:
                made[use] = part
            else:
                (name,) = use.names
                use.view(totals[name]).add_(part.view(use.shape))
        sources = [use.source for use in made]
        for name, grad in backpropagated(self._graph, sources, list(made.values()), self._sums):
            totals[name].add_(grad)


def _orientation(view: Tensor, whole: Tensor) -> bool | None:
    """False if a view is the whole matrix, True if it is its transpose, None if neither."""
    if whole.dim() != 2 or view.data_ptr() != whole.data_ptr():
        return None
    if (view.shape, view.stride()) == (whole.shape, whole.stride()):
        return False
    turned = whole.t()
    return True if (view.shape, view.stride()) == (turned.shape, turned.stride()) else None
