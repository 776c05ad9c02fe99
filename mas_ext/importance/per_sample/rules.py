"""Registration of the rules that form per-sample gradients, and the types that a rule works with.

A rule belongs to one kind of operation. It takes a visited operation, which carries the gradient g
of the operation's output and the tensors saved in the forward pass, and returns what every sample
contributes to the gradient of one of the operation's inputs, the parameter. The built-in rules are
in :mod:`.builtin_rules`; users add theirs with :func:`register_rule`. An operation without a rule
takes the generic path (:mod:`.generic`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mas_ext.importance.contributions import Contribution, Materialized, upcast
from mas_ext.importance.per_sample.graph import Grads, Node, Shape
from mas_ext.importance.per_sample.layout import Layout


class NoRule(Exception):
    """Raised by a rule that does not cover the case at hand; the generic path then serves it."""


@dataclass
class VisitedOperation:
    """An operation during the backward pass, as it is passed to a rule.

    Attributes:
        node: the operation's node in the graph.
        grads: the gradients of its outputs.
        layouts: for each gradient, which entries belong to which sample.
        shape, dtype: the shape and dtype of the operation's input that is the parameter.
    """

    node: Node
    grads: Grads
    layouts: tuple[Layout | None, ...]
    shape: Shape
    dtype: torch.dtype

    @property
    def grad(self) -> Tensor:
        """The gradient of the first output."""
        grad = self.grads[0]
        assert grad is not None
        return grad

    @property
    def layout(self) -> Layout:
        """Which entries of :attr:`grad` belong to which sample."""
        layout = self.layouts[0]
        assert layout is not None
        return layout

    def saved(self, name: str) -> Any:
        """A value that a built-in operation saved in the forward pass, such as ``"mat1"``.

        Raises:
            AttributeError: the operation saved nothing of this name.
        """
        return self.node.saved(name)

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """The tensors that a ``torch.autograd.Function`` passed to ``save_for_backward``."""
        return self.node.saved_tensors

    def split(self, tensor: Tensor) -> Tensor:
        """Views a tensor as [B, …, outer, inner, …]; its samples must be where ``grad`` has them.

        The dimension of ``grad`` that grows with the batch has outer × B × inner entries. If the
        batch has a dimension of its own, outer and inner are 1.
        """
        return self.layout.split(tensor)

    def summed(self, values: Tensor) -> Materialized:
        """Sums values of the output's shape, within each sample, over all broadcast dimensions.

        Args:
            values: a tensor of the shape of ``grad``.

        Returns:
            The per-sample gradients [B, \\*shape].

        Raises:
            NoRule: the parameter has a row of its own for every sample.
        """
        return Materialized(_sum_to(self.layout, upcast(values), self.shape))


Rule = Callable[[VisitedOperation, int], Contribution | Tensor]
RULES: dict[str, Rule] = {}  # by the name of the backward node
_R = TypeVar("_R", bound=Rule)


def register_rule(node_name: str, *, override: bool = False) -> Callable[[_R], _R]:
    r"""Registers a function that gives the per-sample gradients of an operation's parameter.

    With a rule, the exact estimator measures a parameter of this operation in the one backward
    pass over the batch (``coverage`` is ``"direct"``). Without one, it calls the operation's own
    backward function once per sample (``"generic"``), which is exact as well, but slower. For an
    operation y = f(x, θ) with gradient :math:`g = \partial s / \partial y`, the rule returns

    .. math:: M_k = \frac{\partial s_k}{\partial\theta}
        = \sum_{t} \left(\frac{\partial y_{kt}}{\partial\theta}\right)^{\!T} g_{kt}

    for every sample k, summed over the positions t (tokens, pixels) of the sample.

    A rule is a function ``rule(op, input)``:

    - ``op`` is the operation during the backward pass (:class:`VisitedOperation`). ``op.grad`` is
      g; ``op.saved_tensors`` is what a ``torch.autograd.Function`` saved, and ``op.saved(name)``
      what a built-in operation saved; ``op.shape`` is the parameter's shape.
      ``op.split(tensor)`` turns a tensor of g's shape into [B, …], and ``op.summed(tensor)`` adds
      it up over everything that broadcasting a tensor of ``op.shape`` repeats.
    - ``input`` is the index of the parameter among the operation's inputs.
    - It returns M, a floating-point tensor [B, \*op.shape], or a contribution that does not store
      M, such as :class:`MatrixProduct(left, right) <mas_ext.importance.MatrixProduct>`, which
      stands for :math:`M_k = \sum_t l_{kt} r_{kt}^T` of ``left`` [B, T, p] and ``right``
      [B, T, d].
    - It raises :class:`NoRule` for a case that it does not cover, which is then measured as if
      there were no rule.

    Rules are verified: on the first batch of every model and shape, the importance of two samples
    is compared with ordinary autograd. A parameter for which the rule is wrong, or raises an
    error, is measured one sample at a time instead, which is exact, and a warning names it.

    Example::

        class Scale(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, weight):
                ctx.save_for_backward(x, weight)
                return x * weight

            @staticmethod
            def backward(ctx, grad):
                x, weight = ctx.saved_tensors
                return grad * weight, (grad * x).sum_to_size(weight.shape)

        @mas_ext.importance.register_rule("ScaleBackward")
        def scale(op, input):
            x, _ = op.saved_tensors
            return op.summed(op.grad * x)

    Args:
        node_name: the name of the operation's backward node, ``output.grad_fn.name()``, without
            the number at its end: ``"ScaleBackward"``, ``"AddmmBackward"``.
        override: whether to replace the rule that is registered for this operation, if any.

    Returns:
        A decorator that registers a rule and returns it unchanged.

    Raises:
        TypeError: ``node_name`` is not a string, or what is decorated is not callable.
        ValueError: ``node_name`` is not the name of a node, or it has a rule and ``override`` is
            False.
    """
    if not isinstance(node_name, str):
        raise TypeError(f"node_name is {node_name!r}; pass the name of a backward node, a string")
    if not node_name or node_name != node_name.strip() or node_name[-1].isdigit():
        raise ValueError(
            f"node_name is {node_name!r}; pass output.grad_fn.name() without the number at its end"
        )

    def register(rule: _R) -> _R:
        if not callable(rule):
            raise TypeError(f"the rule for {node_name!r} is {rule!r}; decorate a function")
        if node_name in RULES and not override:
            raise ValueError(
                f"node_name: {node_name!r} has a rule; pass override=True to replace it"
            )
        RULES[node_name] = rule
        return rule

    return register


def _sum_to(layout: Layout, values: Tensor, shape: Shape) -> Tensor:
    """[…, outer·B·inner, …] → [B, *shape], summed as broadcasting from ``shape`` demands."""
    if (layout.dim, layout.outer, layout.inner) == (0, 1, 1) and values.shape[1:] == shape:
        return values
    padded = (1,) * (values.dim() - len(shape)) + shape
    require(padded[layout.dim] == 1, "the parameter has a row of its own for every sample")
    parts = layout.split(values)  # [B, …, outer, inner, …]
    repeated = [d for d, size in enumerate(padded) if size == 1 and d != layout.dim]
    dims = [d + 1 if d < layout.dim else d + 2 for d in repeated]
    dims = [d for d in (*dims, layout.dim + 1, layout.dim + 2) if parts.shape[d] > 1]
    return (parts.sum(dims) if dims else parts).reshape(len(parts), *shape)


def require(condition: bool, what: str) -> None:
    """Raises NoRule if a rule does not cover the case at hand; ``what`` says why."""
    if not condition:
        raise NoRule(what)
