"""Plans how to compute per-sample gradients for a graph, from two forward passes.

Two forward passes with different numbers of samples show which operations carry samples: those
whose output grows with the batch. All other operations depend on parameters only. An operation on
samples that takes an input made from parameters *uses* these parameters; its backward is where
their per-sample gradients can be formed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mas_ext.importance.per_sample.graph import Graph, Node, NoPlan, Shape
from mas_ext.importance.per_sample.layout import Extent, Layout, extent
from mas_ext.importance.per_sample.parameter_graph import (
    View,
    backpropagated,
    is_placement,
    parameters_behind,
    view_of,
)
from mas_ext.importance.per_sample.rules import RULES, Rule

LARGE, SMALL = 3, 2  # the fewest samples of the larger pass, and the samples of the smaller one
# Operations whose data decides where rows go: the sample of a row may change from batch to batch.
ROW_MOVING_OPERATIONS = {
    f"{name}Backward"
    for name in (
        "Gather", "Index", "IndexAdd", "IndexCopy", "IndexFill", "IndexPut", "IndexSelect",
        "MaskedScatter", "MaskedSelect", "PackPaddedSequence", "Scatter", "ScatterAdd",
        "ScatterReduce", "Sort", "Take", "Topk",
    )
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class ParameterUse:
    """An input of an operation on samples that is a parameter, or is made from parameters only.

    Attributes:
        position: the operation's position in the graph.
        input: the index of the input among the operation's inputs.
        shape: the shape of the input.
        source: the node and output that produce the input.
        names: the measured parameters that the input is made from.
        view: if the input is a view of a parameter, the function that takes this view of Ω;
            otherwise None.
        is_placement: whether the input consists of elements of one parameter, each at most once.
    """

    position: int
    input: int
    shape: Shape
    source: tuple[int, int]
    names: frozenset[str]
    view: View | None
    is_placement: bool


@dataclass
class Boundary:
    """An operation on samples that uses parameters.

    Attributes:
        uses: the inputs that are made from parameters.
        extents: for each output, how it grows with the batch; None if it has no gradient or does
            not grow in proportion.
        layouts: for each output, which entries belong to which sample; None if that is not known.
    """

    uses: list[ParameterUse]
    extents: list[Extent | None]
    layouts: list[Layout | None] = field(default_factory=list)

    @property
    def names(self) -> set[str]:
        """The parameters that are used."""
        return {name for use in self.uses for name in use.names}


@dataclass(eq=False)
class UseGroup:
    """Uses whose gradients must be summed before the absolute value, because they share parameters.

    Attributes:
        names: the parameters that they share.
        uses: the uses.
        may_fail: whether the layout of some use is unknown, so that nothing may be added to Ω
            before the backward pass has ended.
    """

    names: list[str]
    uses: list[ParameterUse]
    may_fail: bool = False

    @property
    def is_direct(self) -> bool:
        """Whether a contribution can be added to Ω as soon as it arrives."""
        return len(self.uses) == 1 and self.uses[0].is_placement and not self.may_fail


@dataclass
class Plan:
    """How to compute the importance for graphs like this one in one backward pass.

    Attributes:
        signature: the :attr:`Graph.signature` of the graphs that the plan is for.
        extents: for each node and output, how it grows with the batch; None if it does not.
        shapes: for each node, the shapes of its outputs in the pass that the plan was made from.
        boundaries: the operations that use parameters, by position in the graph.
        frontier: the boundaries whose inputs do not depend on another boundary.
        groups: the uses to sum. Every parameter that the plan serves is in one group, or in several
            groups whose uses are different elements of it.
        fallbacks: parameters that are measured one sample at a time → the reason.
        generic: the uses whose operation has no rule.
        constants: the non-floating-point values, such as dimensions and indices, by which uses are
            made from parameters: (position, name, value).
        may_move_rows: whether the data may decide which rows belong to which sample.
        rules: the rules that were registered when the plan was made and checked.
        decides: an operation by which the forward pass reads its data into Python, if there is one.
        decides_on_values: whether that data was computed from floating-point numbers.
        batches: how many it has served.
    """

    signature: object
    extents: list[tuple[Extent | None, ...]]
    shapes: tuple[tuple[Shape, ...], ...]
    boundaries: dict[int, Boundary] = field(default_factory=dict)
    frontier: set[int] = field(default_factory=set)
    groups: list[UseGroup] = field(default_factory=list)
    fallbacks: dict[str, str] = field(default_factory=dict)
    generic: set[ParameterUse] = field(default_factory=set)
    constants: list[tuple[int, str, Any]] = field(default_factory=list)
    may_move_rows: bool = False
    rules: dict[str, Rule] = field(default_factory=lambda: dict(RULES))
    decides: str | None = None
    decides_on_values: bool = False
    batches: int = 0

    def matches(self, graph: Graph, samples: int) -> bool:
        """Whether the plan is valid for a graph with ``samples`` samples: all shapes must agree."""
        if (
            self.rules != RULES
            or graph.signature != self.signature
            or not self._same_constants(graph)
        ):
            return False
        expected = zip(self.shapes, self.extents, graph.shapes, strict=True)
        return all(
            shape == (like if grows is None else grows.shape(like, samples))
            for likes, grow, shapes in expected
            for like, grows, shape in zip(likes, grow, shapes, strict=True)
        )

    def _same_constants(self, graph: Graph) -> bool:
        return all(
            _same(value, graph.nodes[position].saved(name))
            for position, name, value in self.constants
        )

    @property
    def keeps_graph(self) -> bool:
        """Whether the graph is still needed after the backward pass."""
        return bool(self.generic)

    def without(self, reasons: Mapping[str, str]) -> Plan:
        """A copy for one batch, with these parameters measured one sample at a time instead."""
        copy = replace(self, groups=list(self.groups), fallbacks=dict(self.fallbacks))
        for name, reason in reasons.items():
            copy.fall_back([name], reason)
        return copy

    def defer_unassigned(self, graph: Graph) -> None:
        """Marks groups with a use of unknown layout: they add to Ω only after the backward pass."""
        arriving = {edge for node in graph.nodes for edge in node.edges if edge is not None}
        arriving.add((0, 0))
        unknown = {
            name
            for position, boundary in self.boundaries.items()
            if any(
                layout is None and (position, j) in arriving
                for j, layout in enumerate(boundary.layouts)
            )
            for name in boundary.names
        }
        for name in unknown:
            sharing = [group for group in self.groups if name in group.names]
            if sharing:
                names = sorted({n for group in sharing for n in group.names})
                uses = [use for group in sharing for use in group.uses]
                others = [group for group in self.groups if group not in sharing]
                self.groups = [*others, UseGroup(names, uses, may_fail=True)]

    def fall_back(self, names: Iterable[str], reason: str) -> None:
        """Measures these parameters, and all that share a group with them, one sample at a time."""
        wanted = set(names)
        while lost := [g for g in self.groups if wanted & set(g.names)]:
            self.groups = [g for g in self.groups if g not in lost]
            wanted |= {name for group in lost for name in group.names}
        for name in wanted:
            self.fallbacks.setdefault(name, reason)

    def coverage(self) -> dict[str, str]:
        """Parameter name → the path that computes it, for all parameters that the graph reaches."""
        result: dict[str, str] = {}
        for path in ("direct", "generic", "subgraph"):  # the slowest path of a parameter wins
            for group in self.groups:
                if path == self._path(group):
                    result |= dict.fromkeys(group.names, path)
        return result | dict.fromkeys(self.fallbacks, "one sample at a time")

    def _path(self, group: UseGroup) -> str:
        if not all(use.is_placement for use in group.uses):
            return "subgraph"
        return "generic" if any(use in self.generic for use in group.uses) else "direct"


def another_course(some: int, others: int) -> str:
    """The reason where the operations are not the same for some samples as for others."""
    return (
        f"forward runs other operations for {some} samples of the batch than for {others}, as a "
        "loop over samples or packed sequences do; use operations on the whole batch, with padding "
        "and a mask, to measure it in one pass"
    )


def make_plan(large: Graph, small: Graph, params: Mapping[str, Tensor]) -> Plan:
    """The plan for graphs like these, which come from different numbers of samples.

    Raises:
        NoPlan: the graphs differ by more than shapes, or some operation mixes samples.
    """
    more, few = len(large.root), len(small.root)
    if large.signature != small.signature:
        raise NoPlan(another_course(few, more))
    sample_nodes = _sample_nodes(large, small)
    extents = [
        tuple(
            extent(less, few, larger, more) for less, larger in zip(a.shapes, b.shapes, strict=True)
        )
        for a, b in zip(small.nodes, large.nodes, strict=True)
    ]
    _check_nothing_mixes(large, sample_nodes)
    plan = Plan(large.signature, extents, large.shapes)
    for use in _uses(large, sample_nodes, params):
        boundary = Boundary([], list(extents[use.position]))
        plan.boundaries.setdefault(use.position, boundary).uses.append(use)
    plan.frontier = _frontier(large, plan.boundaries)
    uses = [use for boundary in plan.boundaries.values() for use in boundary.uses]
    plan.groups = list(_grouped(large, uses, params))
    plan.constants = _constants(large, uses)
    plan.may_move_rows = any(_may_move_rows(large.nodes[p], sample_nodes) for p in sample_nodes)
    return plan


def _may_move_rows(node: Node, sample_nodes: set[int]) -> bool:
    """Whether the data may decide in which rows of its output a sample is."""
    if node.operation in ROW_MOVING_OPERATIONS:
        return True
    # A table, or the second factor of a product, whose rows are samples.
    rows = {"EmbeddingBackward": 0, "MmBackward": 1, "AddmmBackward": 2}.get(node.operation)
    edge = None if rows is None or rows >= len(node.edges) else node.edges[rows]
    return edge is not None and edge[0] in sample_nodes


def _sample_nodes(large: Graph, small: Graph) -> set[int]:
    """Positions of the operations that carry samples: an output's shape changes with the batch."""
    pairs = zip(large.nodes, small.nodes, strict=True)
    return {a.position for a, b in pairs if a.shapes != b.shapes}


def _check_nothing_mixes(graph: Graph, sample_nodes: set[int]) -> None:
    """Raises NoPlan if something computed from samples has no sample dimension: it mixes them."""
    made_from_samples = graph.reaching(graph.nodes[p] for p in sample_nodes)
    for position in made_from_samples - sample_nodes:
        raise NoPlan(
            f"an operation ({graph.nodes[position].name}) on the way to the output has no "
            "dimension that grows with the batch; keep the sample as dimension 0 of what forward "
            "computes, and do not loop over samples or time steps of different batch sizes"
        )


def _uses(graph: Graph, sample_nodes: set[int], params: Mapping[str, Tensor]) -> list[ParameterUse]:
    leaves = [node for node in graph.nodes if node.leaf is not None]
    measured = graph.reaching(leaves)
    behind = parameters_behind(graph, measured - sample_nodes)
    uses = []
    for position in sorted(sample_nodes & measured):
        for i, edge in enumerate(graph.nodes[position].edges):
            if edge is not None and edge[0] in behind:
                uses.append(_use(graph, (position, i), edge, behind[edge[0]], params))
    return uses


def _use(
    graph: Graph,
    place: tuple[int, int],
    source: tuple[int, int],
    names: frozenset[str],
    params: Mapping[str, Tensor],
) -> ParameterUse:
    node = graph.nodes[source[0]]
    shape = node.shapes[source[1]]
    name, view = view_of(graph, node, source[1]) or (None, None)
    if name is not None and not _applies(view, params[name], shape):
        view = None
    return ParameterUse(*place, shape, source, names, view, is_placement(graph, node))


def _applies(view: View | None, param: Tensor, shape: Shape) -> bool:
    """Whether the view can be taken of Ω, which has the parameter's strides."""
    assert view is not None
    try:
        return tuple(view(torch.empty_like(param, device="meta")).shape) == shape
    except RuntimeError:
        return False


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _constants(graph: Graph, uses: list[ParameterUse]) -> list[tuple[int, str, Any]]:
    """Saved slices, indices and the like, which may differ in the next batch for an equal graph."""
    behind, stack = set(), [use.source[0] for use in uses]
    while stack:
        position = stack.pop()
        if position not in behind:
            behind.add(position)
            stack.extend(child.position for child in graph.children(graph.nodes[position]))
    return [
        (position, name, value)
        for position in sorted(behind)
        for name, value in graph.nodes[position].constants().items()
    ]


def _frontier(graph: Graph, boundaries: Mapping[int, Boundary]) -> set[int]:
    leading = graph.reaching(graph.nodes[p] for p in boundaries)
    return {
        p
        for p in boundaries
        if not any(child.position in leading for child in graph.children(graph.nodes[p]))
    }


# ================================================================================================
# Groups
# ================================================================================================
def _grouped(
    graph: Graph, uses: list[ParameterUse], params: Mapping[str, Tensor]
) -> Iterable[UseGroup]:
    """Groups the uses that share a parameter, unless they use different elements of it."""
    for group in _connected(uses):
        if len(group.names) == 1 and _disjoint(graph, group, params[group.names[0]]):
            yield from (UseGroup(group.names, [use]) for use in group.uses)
        else:
            yield group


def _connected(uses: list[ParameterUse]) -> list[UseGroup]:
    groups: list[UseGroup] = []
    for use in uses:
        touching = [g for g in groups if use.names & set(g.names)]
        groups = [g for g in groups if g not in touching]
        names = set(use.names).union(*(g.names for g in touching))
        groups.append(UseGroup(sorted(names), [u for g in touching for u in g.uses] + [use]))
    return groups


def _disjoint(graph: Graph, group: UseGroup, param: Tensor) -> bool:
    """Whether no element of the parameter is in more than one use."""
    if not all(use.is_placement for use in group.uses):
        return False
    if len(group.uses) == 1:
        return True
    seen = torch.zeros_like(param)
    for use in group.uses:
        ones = torch.ones(use.shape, device=param.device)
        for _, places in backpropagated(graph, [use.source], [ones], group.names):
            seen += places
        if float(seen.max()) > 1:
            return False
    return True
