r"""The rules: what each kind of operation adds to the gradient of a parameter, sample by sample.

A rule is a function of a visited operation, which has the gradient g of the operation's output and
what it saved in the forward pass. It returns the contributions of all samples to one of the
operation's inputs, the parameter. Positions t run over everything that a sample has within a batch:
pixels, tokens, or both. All rules are registered by :func:`register_rule`, as a user's are.

=====================  ==========================  ===============================================
operation              parameter                   M_k
=====================  ==========================  ===============================================
Mm, Addmm, Bmm         matrix                      :math:`\sum_t a_{kt} g_{kt}^T`
Mv                     vector                      :math:`\sum_t g_{kt} a_{kt}`
Convolution            weight                      :math:`\sum_t g_{kt}\, \text{patch}_{kt}^T`
Embedding(Bag), Index  table                       :math:`\sum_{t: i_{kt}=i} g_{kt}` in row i
Layer-, group-, batch  scale, shift                :math:`\sum_t g\odot\hat x`, :math:`\sum_t g`
norm
Add, Sub, Mul, Div,    any, by broadcasting        :math:`\sum_t g` times the other operand
Expand, Repeat
=====================  ==========================  ===============================================

An operation without a rule takes the generic path (:mod:`.generic`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mas_ext.importance.contributions import (
    Contribution,
    EmbeddingRows,
    Materialized,
    MatrixProduct,
    StackedMatrixProducts,
    upcast,
)
from mas_ext.importance.convolution import ConvolutionWeight, Geometry
from mas_ext.importance.per_sample.graph import Grads, Node, Shape
from mas_ext.importance.per_sample.layout import Layout


class NoRule(Exception):
    """Raised by a rule that does not cover the case at hand; the generic path serves it."""


@dataclass
class VisitedOperation:
    """An operation during the backward pass: what a rule works with.

    Attributes:
        node: the operation's node in the graph.
        grads: the gradients of its outputs.
        layouts: for each of them, which entries belong to which sample.
        shape, dtype: the parameter's, as the operation sees it.
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
        """Which entries of it belong to which sample."""
        layout = self.layouts[0]
        assert layout is not None
        return layout

    def saved(self, name: str) -> Any:
        """What the operation saved in the forward pass."""
        return self.node.saved(name)

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """What a ``torch.autograd.Function`` passed to ``save_for_backward``."""
        return self.node.saved_tensors

    def split(self, tensor: Tensor) -> Tensor:
        """A tensor with the samples where ``grad`` has them, as [B, …, outer, inner, …], a view.

        The dimension of ``grad`` that grows with the batch has outer × B × inner entries; where
        the batch has a dimension of its own, outer and inner are 1.
        """
        return self.layout.split(tensor)

    def summed(self, values: Tensor) -> Materialized:
        """Values of the output's shape, summed in each sample over what broadcasting repeats."""
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
    padded = (1,) * (values.dim() - len(shape)) + shape
    _require(padded[layout.dim] == 1, "the parameter has a row of its own for every sample")
    parts = layout.split(values)  # [B, …, outer, inner, …]
    repeated = [d for d, size in enumerate(padded) if size == 1 and d != layout.dim]
    dims = [d + 1 if d < layout.dim else d + 2 for d in repeated]
    dims = [d for d in (*dims, layout.dim + 1, layout.dim + 2) if parts.shape[d] > 1]
    return (parts.sum(dims) if dims else parts).reshape(len(parts), *shape)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise NoRule(what)


# ================================================================================================
# Matrix products
# ================================================================================================
def _product(
    op: VisitedOperation, left: str | None, right: str | None, alpha: float = 1.0
) -> MatrixProduct:
    """C = A·B with the parameter A or B; the operand that is saved has the samples."""
    grad = op.grad if alpha == 1 else op.grad * alpha
    if left is not None:
        _require(op.layout.dim == 0, "the samples are not the rows of the product")
        return MatrixProduct(op.layout.rows(op.saved(left)), op.layout.rows(grad))
    assert right is not None
    _require(op.layout.dim == 1, "the samples are not the columns of the product")
    columns = Layout(0, op.layout.outer, op.layout.inner)
    return MatrixProduct(columns.rows(grad.t()), columns.rows(op.saved(right).t()))


@register_rule("MmBackward")
def mm(op: VisitedOperation, parameter: int) -> Contribution:
    """C = A·B: ∂/∂B = Aᵀg, ∂/∂A = gBᵀ."""
    if parameter == 1:
        return _product(op, "self", None)
    return _product(op, None, "mat2")


@register_rule("AddmmBackward")
def addmm(op: VisitedOperation, parameter: int) -> Contribution:
    """C = βM + αA·B: a linear layer, whose bias is M."""
    if parameter == 0:
        return op.summed(op.grad * op.saved("beta"))
    alpha = op.saved("alpha")
    if parameter == 2:
        return _product(op, "mat1", None, alpha)
    return _product(op, None, "mat2", alpha)


@register_rule("BmmBackward")
def bmm(op: VisitedOperation, parameter: int) -> Contribution:
    """[H, B·T, d] × [H, d, p]: one product a matrix."""
    name, dim = ("self", 1) if parameter == 1 else ("mat2", 2)
    _require(op.layout.dim == dim, "the matrices of the stack belong to samples")
    rows = Layout(0, op.layout.outer, op.layout.inner).rows
    pairs = zip(op.saved(name), op.grad, strict=True)
    if parameter == 1:
        return StackedMatrixProducts([MatrixProduct(rows(a), rows(g)) for a, g in pairs])
    return StackedMatrixProducts([MatrixProduct(rows(g.t()), rows(b.t())) for b, g in pairs])


@register_rule("MvBackward")
def mv(op: VisitedOperation, parameter: int) -> Contribution:
    """y = A·v: M_k = Σ_t g_kt a_kt."""
    _require(parameter == 1, "the matrix is the parameter")
    rows = op.layout.rows
    products = upcast(op.saved("self")) * upcast(op.grad)[:, None]
    return Materialized(rows(products).sum(1))


@register_rule("TrilinearBackward")
def trilinear(op: VisitedOperation, parameter: int) -> Contribution:
    """nn.Bilinear: the weight [o, i, j] times x₁ ⊗ x₂."""
    first, second = op.saved("i1"), op.saved("i3")
    _require(
        parameter == 1 and first.dim() == 2 == second.dim() and op.layout.dim == 0,
        "not nn.Bilinear's",
    )
    pairs = (first[:, :, None] * second[:, None, :]).flatten(1)
    rows = op.layout.rows
    return MatrixProduct(rows(op.grad), rows(pairs), op.shape)


@register_rule("LinearBackward")
def linear(op: VisitedOperation, parameter: int) -> Contribution:
    """Where a backend has x·Wᵀ + b as one operation."""
    if parameter == 2:
        return op.summed(op.grad)
    _require(parameter == 1, "the input is the parameter")
    positions = op.layout.positions
    return MatrixProduct(positions(op.grad), positions(op.saved("input")))


@register_rule("ConvolutionBackward")
def convolution(op: VisitedOperation, parameter: int) -> Contribution:
    """The bias: Σ over pixels. The weight: see :mod:`.convolution`."""
    _require(parameter in (1, 2) and op.layout.dim == 0, "dimension 0 is not the batch")
    if parameter == 2:
        return _over_space(op, upcast(op.grad))
    return _convolution_weight(op)


def _convolution_weight(op: VisitedOperation) -> ConvolutionWeight:
    """A transposed convolution is one with input and output exchanged."""
    inputs, kernel = op.saved("input"), tuple(op.saved("weight").shape[2:])
    stride, padding, dilation = (
        _per_dimension(op.saved(name), len(kernel)) for name in ("stride", "padding", "dilation")
    )
    pixels, patched = (inputs, op.grad) if op.saved("transposed") else (op.grad, inputs)
    pixels, patched = (op.layout.split(t, 0).flatten(1, 2) for t in (pixels, patched))
    geometry = Geometry(kernel, stride, padding, dilation)
    return ConvolutionWeight(pixels, patched, geometry, op.saved("groups"))


def _per_dimension(values: list[int], dimensions: int) -> tuple[int, ...]:
    """One number per dimension of space, where one number may stand for all."""
    return tuple(values) if len(values) == dimensions else (values[0],) * dimensions


# ================================================================================================
# Tables that are looked up
# ================================================================================================
def _looked_up(op: VisitedOperation, index: Tensor, values: Tensor) -> EmbeddingRows:
    """Index [*I] and values [*I, *row shape], the samples along one dimension of I."""
    split, row_shape = op.layout.split, op.shape[1:]
    index = split(index)
    return EmbeddingRows(
        index.flatten(1), split(values).reshape(len(index), -1, *row_shape), op.shape
    )


@register_rule("EmbeddingBackward")
def embedding(op: VisitedOperation, parameter: int) -> Contribution:
    """Rows of a table; the padding row gets no gradient."""
    index = op.saved("indices")
    _require(op.layout.dim < index.dim(), "the samples are not among the indices")
    padding = op.saved("padding_idx")
    values = op.grad
    if padding >= 0:
        index = index.masked_fill(index == padding, -1)
    rows = _looked_up(op, index, values)
    return _divided_by_count(rows) if op.saved("scale_grad_by_freq") else rows


def _divided_by_count(rows: EmbeddingRows) -> EmbeddingRows:
    """As scale_grad_by_freq does, counting within each sample."""
    same = rows.index[:, :, None] == rows.index[:, None, :]
    return EmbeddingRows(
        rows.index, rows.values / same.sum(2)[..., None].to(rows.values), rows.shape
    )


@register_rule("EmbeddingBagBackward")
def embedding_bag(op: VisitedOperation, parameter: int) -> Contribution:
    """Bags of equal length, as [B, T] indices make them; sums and means."""
    bags, index, mode = op.grad, op.saved("indices"), op.saved("mode")
    length, rest = divmod(len(index), len(bags))
    equal = op.saved("offsets").equal(torch.arange(len(bags), device=index.device) * length)
    _require(parameter == 0 and mode in (0, 1) and rest == 0 and equal, "not sums of equal bags")
    _require(op.saved("per_sample_weights") is None, "weighted")
    _require(not op.saved("scale_grad_by_freq"), "scaled by frequency")
    index = index.view(len(bags), length)
    padding = op.saved("padding_idx")
    index = index.masked_fill(index == padding, -1) if padding >= 0 else index
    used = (index >= 0).sum(1, keepdim=True).clamp_min(1).to(bags)
    values = (bags / used if mode == 1 else bags)[:, None].expand(-1, length, -1)
    return _looked_up(op, index, values)


@register_rule("IndexBackward")
def index(op: VisitedOperation, parameter: int) -> Contribution:
    """``table[index]``."""
    indices = [i for i in op.saved("indices") if i is not None]
    plain = len(indices) == 1 and op.saved("indices")[0] is not None
    _require(plain and indices[0].dtype == torch.int64, "not rows by number")
    _require(op.layout.dim < indices[0].dim(), "the samples are not among the indices")
    return _looked_up(op, indices[0] % op.shape[0], op.grad)


@register_rule("IndexSelectBackward")
def index_select(op: VisitedOperation, parameter: int) -> Contribution:
    """``table.index_select(0, index)``."""
    _require(op.saved("dim") == 0 == op.layout.dim, "not rows by number")
    return _looked_up(op, op.saved("index"), op.grad)


# ================================================================================================
# Normalisation: x̂ is formed in one buffer, since fresh memory costs more than arithmetic
# ================================================================================================
@register_rule("NativeLayerNormBackward")
def layer_norm(op: VisitedOperation, parameter: int) -> Contribution:
    """x̂ from the mean and 1/σ that were saved for every position."""
    _require(parameter in (1, 2), "the input is the parameter")
    grad = upcast(op.grad)
    if parameter == 2:
        return op.summed(grad)
    centred = upcast(op.saved("input")) - op.saved("result1")
    return op.summed(centred.mul_(op.saved("result2")).mul_(grad))


@register_rule("FusedRmsNormBackward")
def rms_norm(op: VisitedOperation, parameter: int) -> Contribution:
    """x̂ from the 1/rms that was saved for every position."""
    _require(parameter == 1, "the input is the parameter")
    scaled = upcast(op.saved("input")) * op.saved("result1")
    return op.summed(scaled.mul_(upcast(op.grad)))


@register_rule("NativeGroupNormBackward")
def group_norm(op: VisitedOperation, parameter: int) -> Contribution:
    """x̂ from the mean and 1/σ that were saved for every sample and group."""
    _require(parameter in (1, 2), "the input is the parameter")
    grad = upcast(op.grad)
    if parameter == 2:
        return _over_space(op, grad)
    inputs, groups = upcast(op.saved("input")), op.saved("group")
    mean, rstd = op.saved("result1"), op.saved("result2")
    grouped = inputs.reshape(len(inputs), groups, -1) - mean[..., None]
    return _over_space(op, grouped.mul_(rstd[..., None]).view(inputs.shape).mul_(grad))


@register_rule("NativeBatchNormBackward")
@register_rule("CudnnBatchNormBackward")
def batch_norm(op: VisitedOperation, parameter: int) -> Contribution:
    """x̂ from the running statistics: evaluation mode. 1/σ is the same at all pixels."""
    _require(not op.saved("training"), "it normalises by the batch's statistics")
    _require(parameter in (1, 2), "the input is the parameter")
    grad = upcast(op.grad)
    if parameter == 2:
        return _over_space(op, grad)
    inputs = upcast(op.saved("input"))
    mean = op.saved("running_mean").view(-1, *[1] * (inputs.dim() - 2))
    summed = _over_space(op, (inputs - mean).mul_(grad))
    return Materialized(summed.values * (upcast(op.saved("running_var")) + op.saved("eps")).rsqrt())


def _over_space(op: VisitedOperation, values: Tensor) -> Materialized:
    """[rows, C, *space] → [B, C]; space, which lies side by side, is summed first."""
    _require(op.layout.dim == 0, "dimension 0 is not the batch")
    per_row = values.flatten(2).sum(2) if values.dim() > 2 else values
    return Materialized(op.layout.rows(per_row).sum(1))


# ================================================================================================
# Broadcasting
# ================================================================================================
@register_rule("AddBackward")
def add(op: VisitedOperation, parameter: int) -> Contribution:
    """y = a + αb."""
    alpha = op.saved("alpha") if parameter == 1 else 1
    return op.summed(op.grad if alpha == 1 else op.grad * alpha)


@register_rule("SubBackward")
def sub(op: VisitedOperation, parameter: int) -> Contribution:
    """y = a − αb: by itself only the magnitude matters, but another use may be added to it."""
    return op.summed(op.grad * (-op.saved("alpha") if parameter == 1 else 1))


@register_rule("MulBackward")
def mul(op: VisitedOperation, parameter: int) -> Contribution:
    """y = a·b."""
    other = op.saved("other" if parameter == 0 else "self")
    return op.summed(upcast(op.grad) * other)


@register_rule("DivBackward")
def div(op: VisitedOperation, parameter: int) -> Contribution:
    """y = a / b, with the parameter a."""
    _require(parameter == 0, "the parameter divides")
    _require(op.node.name == "DivBackward0", "the quotient is rounded")
    return op.summed(upcast(op.grad) / op.saved("other"))


@register_rule("ExpandBackward")
def expand(op: VisitedOperation, parameter: int) -> Contribution:
    """Repeated, for every sample say: summed over the repeats."""
    return op.summed(op.grad)


@register_rule("RepeatBackward")
def repeat(op: VisitedOperation, parameter: int) -> Contribution:
    """Laid out several times along its dimensions, one of which has the samples."""
    layout = op.layout
    padded = (1,) * (op.grad.dim() - len(op.shape)) + op.shape
    _require(padded[layout.dim] == 1 or layout.outer == 1, "repeats are between the samples")
    parts = layout.split(upcast(op.grad)).flatten(layout.dim + 1, layout.dim + 2)
    pairs = zip(parts.shape[1:], padded, strict=True)
    folded = parts.reshape(len(parts), *(n for size, p in pairs for n in (size // p, p)))
    repeats = list(range(1, folded.dim(), 2))
    return Materialized(folded.sum(repeats).reshape(len(parts), *op.shape))
