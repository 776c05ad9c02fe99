"""The parts of a graph that depend on parameters only: what computes the tensors that are used."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from mas_ext.importance.per_sample.graph import Edge, Graph


def pulled(
    graph: Graph, sources: Sequence[Edge], values: Sequence[Tensor], names: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """Gradients at what is used, pulled through to the parameters it is computed from."""
    if not sources:
        return
    leaves = {node.leaf: node.fn.variable for node in graph.nodes if node.leaf in names}
    nodes = [graph.nodes[position] for position, _ in sources]
    edges = [node.output(output) for node, (_, output) in zip(nodes, sources, strict=True)]
    cast = [value.to(_dtype(graph, source)) for value, source in zip(values, sources, strict=True)]
    grads = torch.autograd.grad(
        edges, list(leaves.values()), cast, allow_unused=True, retain_graph=True
    )
    for name, grad in zip(leaves, grads, strict=True):
        if grad is not None:
            yield str(name), grad


def _dtype(graph: Graph, source: Edge) -> torch.dtype:
    position, output = source
    return graph.nodes[position].fn._input_metadata[output].dtype
