"""The autograd graph of a forward pass as a list of nodes, so that two passes can be compared.

After a forward pass, the graph shows exactly which operation used which parameter, and holds the
tensors that the operation saved. Per-sample gradients need nothing else, however the modules are
written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.graph import GradientEdge

Shape = tuple[int, ...]
Grads = tuple[Tensor | None, ...]
Edge = tuple[int, int]  # (position of a node in the graph, which of its outputs)

_LEAF = "torch::autograd::AccumulateGrad"


class NoPlan(Exception):
    """No plan can be made for a graph; the message says why."""


@dataclass(eq=False)
class Node:
    """One operation of the forward pass.

    Attributes:
        fn: autograd's node.
        position: its position in the graph's depth-first order.
        name: autograd's name for it, such as ``"AddmmBackward0"``.
        edges: for each of the operation's inputs, the node and output that made it; None if the
            input needs no gradient.
        leaf: for a leaf that is a measured parameter, its name.
    """

    fn: Any
    position: int
    name: str
    edges: tuple[Edge | None, ...] = ()
    leaf: str | None = None
    _saved: dict[str, Any] = field(default_factory=dict)
    _shapes: tuple[Shape, ...] | None = None

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of the operation's outputs, and so of the gradients that arrive there.

        Raises:
            NoPlan: an output has no plain shape (a nested tensor).
        """
        if self._shapes is None:  # no cached_property, which takes a lock for each of many nodes
            self._shapes = self._read_shapes()
        return self._shapes

    def _read_shapes(self) -> tuple[Shape, ...]:
        try:
            return tuple(tuple(m.shape) if m is not None else () for m in self.fn._input_metadata)
        except RuntimeError as problem:
            raise NoPlan(
                f"{self.name} has an output without a plain shape, as nested tensors have; use "
                "padded tensors and a mask"
            ) from problem

    @property
    def is_leaf(self) -> bool:
        """Whether the node accumulates a gradient: it belongs to a parameter or an input."""
        return self.name == _LEAF

    @property
    def has_hooks(self) -> bool:
        """Whether it is a leaf whose gradient goes through the user's hooks."""
        return self.is_leaf and bool(self.fn.variable._backward_hooks)

    @property
    def operation(self) -> str:
        """The name without the overload's number: AddBackward0 → AddBackward."""
        return self.name.rstrip("0123456789")

    def output(self, index: int) -> GradientEdge:
        """The edge at which the gradient of output ``index`` arrives."""
        return GradientEdge(self.fn, index)

    def saved(self, name: str) -> Any:
        """A value that the operation saved for its backward; it is read only once."""
        if name not in self._saved:
            with _beside_the_backward_pass():
                self._saved[name] = _signed(getattr(self.fn, f"_saved_{name}"))
        return self._saved[name]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """What a custom ``torch.autograd.Function`` passed to ``save_for_backward``."""
        if "tensors" not in self._saved:
            with _beside_the_backward_pass():
                self._saved["tensors"] = self.fn.saved_tensors
        return self._saved["tensors"]

    def constants(self) -> dict[str, Any]:
        """All saved values except floating-point tensors: dimensions, sizes, indices."""
        names = [
            name.removeprefix("_saved_") for name in dir(self.fn) if name.startswith("_saved_")
        ]
        found = {name: self.saved(name) for name in names if "sym_" not in name}
        return {name: value for name, value in found.items() if not _is_values(value)}

    def forget(self) -> None:
        """Releases the saved values that were read."""
        self._saved.clear()

    def backward(self, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Calls the operation's own backward outside a backward pass."""
        if callable(self.fn):
            result = self.fn(*grads)
        else:  # a backward written in Python never gets None: the engine passes zeros instead
            filled = [
                torch.zeros(m.shape, dtype=m.dtype, device=m.device) if grad is None else grad
                for grad, m in zip(grads, self.fn._input_metadata, strict=True)
            ]
            result = self.fn.apply(*filled)
        return result if isinstance(result, tuple) else (result,)


class Graph:
    """The nodes that lead from an output back to the measured parameters and other leaves.

    Args:
        root: the output [B], which requires a gradient.
        names: ``id(parameter)`` → name, of the measured parameters.

    Raises:
        ValueError: reentrant activation checkpointing hides a part of the graph.
    """

    def __init__(self, root: Tensor, names: Mapping[int, str]) -> None:
        self.root = root
        self.nodes: list[Node] = []
        self._visit(root.grad_fn, names)
        if any(node.name == "CheckpointFunctionBackward" for node in self.nodes):
            raise ValueError(
                "the model uses activation checkpointing with use_reentrant=True, which hides the "
                "parameters inside; use use_reentrant=False"
            )

    def _visit(self, root: Any, names: Mapping[int, str]) -> None:
        known: dict[Any, Node] = {}
        stack = [root]
        while stack:
            fn = stack.pop()
            if fn in known:
                continue
            node = known[fn] = Node(fn, len(self.nodes), fn.name())
            self.nodes.append(node)
            if node.is_leaf:
                node.leaf = names.get(id(fn.variable))
            stack.extend(child for child, _ in reversed(fn.next_functions) if child is not None)
        for node in self.nodes:
            node.edges = tuple(
                None if child is None else (known[child].position, output)
                for child, output in node.fn.next_functions
            )

    @cached_property
    def signature(self) -> tuple[Any, ...]:
        """A value that is equal for two passes of one program with any numbers of samples."""
        return tuple((n.name, n.edges, n.leaf, n.has_hooks) for n in self.nodes)

    @cached_property
    def shapes(self) -> tuple[tuple[Shape, ...], ...]:
        """The shapes of all nodes' outputs."""
        return tuple(node.shapes for node in self.nodes)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The least precise of the floating-point dtypes that the pass computed in."""
        dtypes = {m.dtype for node in self.nodes for m in node.fn._input_metadata if m is not None}
        return max((d for d in dtypes if d.is_floating_point), key=lambda d: torch.finfo(d).eps)

    def dtype_at(self, edge: Edge) -> torch.dtype:
        """The dtype of a node's output."""
        position, output = edge
        return self.nodes[position].fn._input_metadata[output].dtype

    def children(self, node: Node) -> list[Node]:
        """The nodes that made the inputs of ``node``."""
        return [self.nodes[edge[0]] for edge in node.edges if edge is not None]

    def reaching(self, targets: Iterable[Node]) -> set[int]:
        """Positions of the targets and of all nodes whose gradient flows into one of them."""
        parents: dict[int, list[int]] = {}
        for node in self.nodes:
            for child in self.children(node):
                parents.setdefault(child.position, []).append(node.position)
        found = {node.position for node in targets}
        stack = list(found)
        while stack:
            for parent in parents.get(stack.pop(), ()):
                if parent not in found:
                    found.add(parent)
                    stack.append(parent)
        return found


def visit_gradients(
    graph: Graph,
    weights: Tensor,
    positions: Iterable[int],
    frontier: Collection[int],
    visitor: Callable[[int, Grads], None],
    keep_graph: bool = False,
) -> None:
    """Runs the backward pass of Σ_k weights_k·s_k and calls the visitor with gradients at nodes.

    Autograd's engine computes only the gradients that lead to these nodes: no gradient of a weight
    is formed, and nothing is accumulated into ``.grad``.

    Args:
        graph: the graph, whose root is s [B].
        weights: [B].
        positions: the nodes to visit.
        frontier: the nodes to visit whose inputs do not depend on another one. The pass ends at
            these; at the others, a hook gets the gradients during the pass.
        visitor: called with a node's position and the gradients of its outputs.
        keep_graph: whether to keep the graph for another pass.
    """
    hooks = [
        graph.nodes[p].fn.register_prehook(partial(visitor, p))
        for p in positions
        if p not in frontier
    ]
    ends = [(p, j) for p in frontier for j in range(len(graph.nodes[p].shapes))]
    try:
        edges = [graph.nodes[p].output(j) for p, j in ends]
        arrived = dict(zip(ends, _backward(graph, weights, edges, keep_graph), strict=True))
    finally:
        for hook in hooks:
            hook.remove()
    for p in frontier:
        count = len(graph.nodes[p].shapes)
        visitor(p, tuple(arrived.pop((p, j)) for j in range(count)))


def _backward(
    graph: Graph, weights: Tensor, edges: list[GradientEdge], keep_graph: bool
) -> list[Tensor | None]:
    if not edges:
        return []
    with torch.enable_grad():
        total = torch.dot(graph.root, weights)
    return list(torch.autograd.grad(total, edges, allow_unused=True, retain_graph=keep_graph))


def _signed(value: Any) -> Any:
    """Undoes the unsigned form in which autograd shows saved integers: −1 as 2⁶⁴ − 1."""
    if isinstance(value, (tuple, list)):
        return tuple(_signed(item) for item in value)
    is_wrapped = isinstance(value, int) and value >= 2**63
    return value - 2**64 if is_wrapped else value


def _is_values(value: Any) -> bool:
    items = value if isinstance(value, (tuple, list)) else [value]
    return any(isinstance(item, Tensor) and item.dtype.is_floating_point for item in items)


def _beside_the_backward_pass() -> AbstractContextManager[Any]:
    """Allows a hook to read a checkpointed activation that the surrounding pass reads as well.

    Activation checkpointing recomputes once per backward pass and returns each tensor once. Inside
    this context, reading counts as a separate pass.
    """
    group = getattr(torch.utils.checkpoint, "GraphExecGroup", _outside_all_passes)
    return group()


@contextmanager
def _outside_all_passes() -> Iterator[None]:
    """What ``GraphExecGroup`` does, for a torch that does not have it, such as 2.7.

    There, checkpointing asks this function which pass it is in. −1 means none: it then recomputes
    for this reading alone.
    """
    core: Any = torch._C
    current = core._current_graph_task_id
    core._current_graph_task_id = lambda: -1
    try:
        yield
    finally:
        core._current_graph_task_id = current
