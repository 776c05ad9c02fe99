"""The parts of a graph that depend on parameters only: what computes the tensors that are used."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from mas_ext.importance.per_sample.graph import Edge, Graph


def leaves_behind(graph: Graph, positions: Collection[int]) -> dict[int, frozenset[str]]:
    """For nodes that depend on parameters only: which measured ones."""
    result: dict[int, frozenset[str]] = {}
    # Reversed, the depth-first order has most nodes after those they are made from.
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


def pulled(
    graph: Graph, sources: Sequence[Edge], values: Sequence[Tensor], names: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """Gradients at what is used, pulled through to the parameters it is computed from."""
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
