"""Finds how an operation's input is made from parameters, and takes the same view of Ω.

If an operation uses a transposed, sliced, split or cast parameter, the importance belongs to the
same elements, so that a rule can add to the same view of Ω.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from mas_ext.importance.per_sample.graph import Edge, Graph, Node

View = Callable[[Tensor], Tensor]


def _same(node: Node, output: int) -> View:
    return lambda tensor: tensor


def _reshape(node: Node, output: int) -> View:
    shape = node.shapes[output]
    return lambda tensor: tensor.view(shape)


def _t(node: Node, output: int) -> View:
    return lambda tensor: tensor.t()


def _transpose(node: Node, output: int) -> View:
    dims = node.saved("dim0"), node.saved("dim1")
    return lambda tensor: tensor.transpose(*dims)


def _permute(node: Node, output: int) -> View:
    dims = node.saved("dims")
    return lambda tensor: tensor.permute(dims)


def _slice(node: Node, output: int) -> View:
    dim = node.saved("dim")
    index = slice(node.saved("start"), node.saved("end"), node.saved("step"))
    return lambda tensor: tensor.movedim(dim, 0)[index].movedim(0, dim)


def _select(node: Node, output: int) -> View:
    where = node.saved("dim"), node.saved("index")
    return lambda tensor: tensor.select(*where)


def _split(node: Node, output: int) -> View:
    size, dim = node.saved("split_size"), node.saved("dim")
    return lambda tensor: tensor.split(size, dim)[output]


def _split_with_sizes(node: Node, output: int) -> View:
    sizes, dim = list(node.saved("split_sizes")), node.saved("dim")
    return lambda tensor: tensor.split(sizes, dim)[output]


def _unbind(node: Node, output: int) -> View:
    dim = node.saved("dim")
    return lambda tensor: tensor.unbind(dim)[output]


# For each operation, the function that takes the view that its output is of its input.
VIEWS: dict[str, Callable[[Node, int], View]] = {
    "AliasBackward": _same,
    "CloneBackward": _same,
    "PermuteBackward": _permute,
    "ReshapeAliasBackward": _reshape,
    "SelectBackward": _select,
    "SliceBackward": _slice,
    "SplitBackward": _split,
    "SplitWithSizesBackward": _split_with_sizes,
    "SqueezeBackward": _reshape,
    "TBackward": _t,
    "ToCopyBackward": _same,
    "TransposeBackward": _transpose,
    "UnbindBackward": _unbind,
    "UnsafeSplitBackward": _split,
    "UnsafeViewBackward": _reshape,
    "UnsqueezeBackward": _reshape,
    "ViewBackward": _reshape,
}


def is_placement(graph: Graph, node: Node) -> bool:
    """Whether a node's output consists of a parameter's elements, each at most once, in any order.

    If so, magnitudes may be summed over samples first and backpropagated to the parameter after.
    """
    while not node.is_leaf:
        edges = [edge for edge in node.edges if edge is not None]
        if len(edges) != 1 or not (node.operation in VIEWS or _selects_distinct_rows(node)):
            return False
        node = graph.nodes[edges[0][0]]
    return node.leaf is not None


def _selects_distinct_rows(node: Node) -> bool:
    if node.operation == "EmbeddingBackward":
        index, padding = node.saved("indices"), node.saved("padding_idx")
        plain = not node.saved("scale_grad_by_freq") and not bool((index == padding).any())
        return plain and _is_distinct(index)
    if node.operation == "IndexSelectBackward":
        return _is_distinct(node.saved("index"))
    return False


def _is_distinct(index: Tensor) -> bool:
    return len(index.unique()) == index.numel()


def view_of(graph: Graph, node: Node, output: int) -> tuple[str, View] | None:
    """The parameter that a node's output is a view of, and the view; None if it is not one."""
    steps: list[View] = []
    while not node.is_leaf:
        edges = [edge for edge in node.edges if edge is not None]
        if node.operation not in VIEWS or len(edges) != 1:
            return None
        steps.append(VIEWS[node.operation](node, output))
        node, output = graph.nodes[edges[0][0]], edges[0][1]
    return None if node.leaf is None else (node.leaf, _chain(steps[::-1]))


def _chain(steps: list[View]) -> View:
    def view(tensor: Tensor) -> Tensor:
        for step in steps:
            tensor = step(tensor)
        return tensor

    return view


def parameters_behind(graph: Graph, positions: Collection[int]) -> dict[int, frozenset[str]]:
    """For nodes that depend on parameters only, the measured parameters that they depend on."""
    result: dict[int, frozenset[str]] = {}
    # In reversed depth-first order, most nodes come after the nodes that they are made from.
    for position in sorted(positions, reverse=True):
        stack = [graph.nodes[position]]
        while stack:
            node = stack[-1]
            children = [c for c in graph.children(node) if c.position in positions]
            waiting = [c for c in children if c.position not in result]
            if waiting:
                stack.extend(waiting)
                continue
            own = frozenset[str]() if node.leaf is None else frozenset([node.leaf])
            result[node.position] = own.union(*(result[c.position] for c in children))
            stack.pop()
    return result


def backpropagated(
    graph: Graph, sources: Sequence[Edge], values: Sequence[Tensor], names: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """Backpropagates gradients from ``sources`` to the parameters that these are computed from.

    Args:
        sources: nodes' outputs, as (position, output).
        values: the gradient of each of them.
        names: the parameters to backpropagate to.

    Yields:
        The name of each parameter that is reached, and its gradient.
    """
    if not sources:
        return
    leaves = {node.leaf: node.fn.variable for node in graph.nodes if node.leaf in names}
    nodes = [graph.nodes[position] for position, _ in sources]
    edges = [node.output(output) for node, (_, output) in zip(nodes, sources, strict=True)]
    cast = [value.to(graph.dtype_at(source)) for value, source in zip(values, sources, strict=True)]
    grads = torch.autograd.grad(
        edges, list(leaves.values()), cast, allow_unused=True, retain_graph=True
    )
    for name, grad in zip(leaves, grads, strict=True):
        if grad is not None:
            yield str(name), grad
