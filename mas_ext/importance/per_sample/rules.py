r"""The rules: what each kind of operation adds to the gradient of a parameter, sample by sample.

A rule is one function. It is given a visited operation, with the gradient g of its output and what
it saved in the forward pass, and gives the contributions of all samples to one of its inputs, the
parameter. Positions t run over all that a sample has in one batch: pixels, tokens, both.

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
from typing import Any

import torch
from torch import Tensor

from mas_ext.importance.per_sample.contributions import (
    Blocks,
    Contribution,
    Outer,
    Rows,
    Stacked,
    wide,
)
from mas_ext.importance.per_sample.convolution import Convolution
from mas_ext.importance.per_sample.graph import Node, Shape
from mas_ext.importance.per_sample.layout import Layout

Grads = tuple[Tensor | None, ...]


class NoRule(Exception):
    """A rule does not cover this case of its operation."""


@dataclass
class Visit:
    """An operation while the backward pass goes through it.

    Attributes:
        node: the operation.
        grads: the gradients of its outputs.
        layouts: which entries of these belong to which sample.
        shape, dtype: those of the parameter, as the operation sees it.
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

    def summed(self, values: Tensor) -> Stacked:
        """Values of the output's shape, summed in each sample over what broadcasting repeats."""
        return Stacked(_sum_to(self.layout, wide(values), self.shape))


Rule = Callable[[Visit, int], Contribution]  # (what is visited, which input is the parameter)


def _sum_to(layout: Layout, values: Tensor, shape: Shape) -> Tensor:
    """[…, outer·B·inner, …] → [B, *shape], summed as broadcasting from ``shape`` demands."""
    padded = (1,) * (values.dim() - len(shape)) + shape
    _need(padded[layout.dim] == 1, "the parameter has a row of its own for every sample")
    parts = layout.split(values)  # [B, …, outer, inner, …]
    repeated = [d for d, size in enumerate(padded) if size == 1 and d != layout.dim]
    dims = [d + 1 if d < layout.dim else d + 2 for d in repeated]
    dims = [d for d in (*dims, layout.dim + 1, layout.dim + 2) if parts.shape[d] > 1]
    return (parts.sum(dims) if dims else parts).reshape(len(parts), *shape)


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise NoRule(what)


# ================================================================================================
# Matrix products
# ================================================================================================
def _product(visit: Visit, left: str | None, right: str | None, alpha: float = 1.0) -> Outer:
    """C = A·B with the parameter A or B; the operand that is saved has the samples."""
    grad = visit.grad if alpha == 1 else visit.grad * alpha
    if left is not None:
        _need(visit.layout.dim == 0, "the samples are not the rows of the product")
        return Outer(visit.layout.rows(visit.saved(left)), visit.layout.rows(grad))
    assert right is not None
    _need(visit.layout.dim == 1, "the samples are not the columns of the product")
    columns = Layout(0, visit.layout.outer, visit.layout.inner)
    return Outer(columns.rows(grad.t()), columns.rows(visit.saved(right).t()))


def mm(visit: Visit, parameter: int) -> Contribution:
    """C = A·B: ∂/∂B = Aᵀg, ∂/∂A = gBᵀ."""
    if parameter == 1:
        return _product(visit, "self", None)
    return _product(visit, None, "mat2")


def addmm(visit: Visit, parameter: int) -> Contribution:
    """C = βM + αA·B: a linear layer, whose bias is M."""
    if parameter == 0:
        return visit.summed(visit.grad * visit.saved("beta"))
    alpha = visit.saved("alpha")
    if parameter == 2:
        return _product(visit, "mat1", None, alpha)
    return _product(visit, None, "mat2", alpha)


def bmm(visit: Visit, parameter: int) -> Contribution:
    """[H, B·T, d] × [H, d, p]: one product a matrix."""
    name, dim = ("self", 1) if parameter == 1 else ("mat2", 2)
    _need(visit.layout.dim == dim, "the matrices of the stack belong to samples")
    rows = Layout(0, visit.layout.outer, visit.layout.inner).rows
    pairs = zip(visit.saved(name), visit.grad, strict=True)
    if parameter == 1:
        return Blocks([Outer(rows(a), rows(g)) for a, g in pairs])
    return Blocks([Outer(rows(g.t()), rows(b.t())) for b, g in pairs])


def mv(visit: Visit, parameter: int) -> Contribution:
    """y = A·v: M_k = Σ_t g_kt a_kt."""
    _need(parameter == 1, "the matrix is the parameter")
    rows = visit.layout.rows
    products = wide(visit.saved("self")) * wide(visit.grad)[:, None]
    return Stacked(rows(products).sum(1))


def trilinear(visit: Visit, parameter: int) -> Contribution:
    """nn.Bilinear: the weight [o, i, j] times x₁ ⊗ x₂."""
    first, second = visit.saved("i1"), visit.saved("i3")
    _need(
        parameter == 1 and first.dim() == 2 == second.dim() and visit.layout.dim == 0,
        "not nn.Bilinear's",
    )
    pairs = (first[:, :, None] * second[:, None, :]).flatten(1)
    rows = visit.layout.rows
    return Outer(rows(visit.grad), rows(pairs), visit.shape)


def linear(visit: Visit, parameter: int) -> Contribution:
    """Where a backend has x·Wᵀ + b as one operation."""
    if parameter == 2:
        return visit.summed(visit.grad)
    _need(parameter == 1, "the input is the parameter")
    positions = visit.layout.positions
    return Outer(positions(visit.grad), positions(visit.saved("input")))


def convolution(visit: Visit, parameter: int) -> Contribution:
    """The bias: Σ over pixels. The weight: see :mod:`.convolution`."""
    _need(parameter in (1, 2) and visit.layout.dim == 0, "dimension 0 is not the batch")
    if parameter == 2:
        return _over_space(visit, wide(visit.grad))
    return Convolution.of(visit.saved, visit.grad, visit.layout)


# ================================================================================================
# Tables that are looked up
# ================================================================================================
def _looked_up(visit: Visit, index: Tensor, values: Tensor) -> Rows:
    """Index [*I] and values [*I, *row shape], the samples along one dimension of I."""
    split, row_shape = visit.layout.split, visit.shape[1:]
    index = split(index)
    return Rows(index.flatten(1), split(values).reshape(len(index), -1, *row_shape), visit.shape)


def embedding(visit: Visit, parameter: int) -> Contribution:
    """Rows of a table; the padding row gets no gradient."""
    index = visit.saved("indices")
    _need(visit.layout.dim < index.dim(), "the samples are not among the indices")
    padding = visit.saved("padding_idx")
    values = visit.grad
    if padding >= 0:
        index = index.masked_fill(index == padding, -1)
    rows = _looked_up(visit, index, values)
    return _divided_by_count(rows) if visit.saved("scale_grad_by_freq") else rows


def _divided_by_count(rows: Rows) -> Rows:
    """As scale_grad_by_freq does, counting within each sample."""
    same = rows.index[:, :, None] == rows.index[:, None, :]
    return Rows(rows.index, rows.values / same.sum(2)[..., None].to(rows.values), rows.shape)


def embedding_bag(visit: Visit, parameter: int) -> Contribution:
    """Bags of equal length, as [B, T] indices make them; sums and means."""
    bags, index, mode = visit.grad, visit.saved("indices"), visit.saved("mode")
    length, rest = divmod(len(index), len(bags))
    equal = visit.saved("offsets").equal(torch.arange(len(bags), device=index.device) * length)
    _need(parameter == 0 and mode in (0, 1) and rest == 0 and equal, "not sums of equal bags")
    _need(visit.saved("per_sample_weights") is None, "weighted")
    _need(not visit.saved("scale_grad_by_freq"), "scaled by frequency")
    index = index.view(len(bags), length)
    padding = visit.saved("padding_idx")
    index = index.masked_fill(index == padding, -1) if padding >= 0 else index
    used = (index >= 0).sum(1, keepdim=True).clamp_min(1).to(bags)
    values = (bags / used if mode == 1 else bags)[:, None].expand(-1, length, -1)
    return _looked_up(visit, index, values)


def index(visit: Visit, parameter: int) -> Contribution:
    """``table[index]``."""
    indices = [i for i in visit.saved("indices") if i is not None]
    plain = len(indices) == 1 and visit.saved("indices")[0] is not None
    _need(plain and indices[0].dtype == torch.int64, "not rows by number")
    _need(visit.layout.dim < indices[0].dim(), "the samples are not among the indices")
    return _looked_up(visit, indices[0] % visit.shape[0], visit.grad)


def index_select(visit: Visit, parameter: int) -> Contribution:
    """``table.index_select(0, index)``."""
    _need(visit.saved("dim") == 0 == visit.layout.dim, "not rows by number")
    return _looked_up(visit, visit.saved("index"), visit.grad)


# ================================================================================================
# Normalisation: x̂ is formed in one buffer, since fresh memory costs more than arithmetic
# ================================================================================================
def layer_norm(visit: Visit, parameter: int) -> Contribution:
    """x̂ from the mean and 1/σ that were saved for every position."""
    _need(parameter in (1, 2), "the input is the parameter")
    grad = wide(visit.grad)
    if parameter == 2:
        return visit.summed(grad)
    centred = wide(visit.saved("input")) - visit.saved("result1")
    return visit.summed(centred.mul_(visit.saved("result2")).mul_(grad))


def rms_norm(visit: Visit, parameter: int) -> Contribution:
    """x̂ from the 1/rms that was saved for every position."""
    _need(parameter == 1, "the input is the parameter")
    scaled = wide(visit.saved("input")) * visit.saved("result1")
    return visit.summed(scaled.mul_(wide(visit.grad)))


def group_norm(visit: Visit, parameter: int) -> Contribution:
    """x̂ from the mean and 1/σ that were saved for every sample and group."""
    _need(parameter in (1, 2), "the input is the parameter")
    grad = wide(visit.grad)
    if parameter == 2:
        return _over_space(visit, grad)
    inputs, groups = wide(visit.saved("input")), visit.saved("group")
    mean, rstd = visit.saved("result1"), visit.saved("result2")
    grouped = inputs.reshape(len(inputs), groups, -1) - mean[..., None]
    return _over_space(visit, grouped.mul_(rstd[..., None]).view(inputs.shape).mul_(grad))


def batch_norm(visit: Visit, parameter: int) -> Contribution:
    """x̂ from the running statistics: evaluation mode. 1/σ is the same at all pixels."""
    _need(not visit.saved("training"), "it normalises by the batch's statistics")
    _need(parameter in (1, 2), "the input is the parameter")
    grad = wide(visit.grad)
    if parameter == 2:
        return _over_space(visit, grad)
    inputs = wide(visit.saved("input"))
    mean = visit.saved("running_mean").view(-1, *[1] * (inputs.dim() - 2))
    summed = _over_space(visit, (inputs - mean).mul_(grad))
    return Stacked(summed.values * (wide(visit.saved("running_var")) + visit.saved("eps")).rsqrt())


def _over_space(visit: Visit, values: Tensor) -> Stacked:
    """[rows, C, *space] → [B, C]; space, which lies side by side, is summed first."""
    _need(visit.layout.dim == 0, "dimension 0 is not the batch")
    per_row = values.flatten(2).sum(2) if values.dim() > 2 else values
    return Stacked(visit.layout.rows(per_row).sum(1))


# ================================================================================================
# Broadcasting
# ================================================================================================
def add(visit: Visit, parameter: int) -> Contribution:
    """y = a + αb."""
    alpha = visit.saved("alpha") if parameter == 1 else 1
    return visit.summed(visit.grad if alpha == 1 else visit.grad * alpha)


def sub(visit: Visit, parameter: int) -> Contribution:
    """y = a − αb: by itself only the magnitude matters, but another use may be added to it."""
    return visit.summed(visit.grad * (-visit.saved("alpha") if parameter == 1 else 1))


def mul(visit: Visit, parameter: int) -> Contribution:
    """y = a·b."""
    other = visit.saved("other" if parameter == 0 else "self")
    return visit.summed(wide(visit.grad) * other)


def div(visit: Visit, parameter: int) -> Contribution:
    """y = a / b, with the parameter a."""
    _need(parameter == 0, "the parameter divides")
    _need(visit.node.name == "DivBackward0", "the quotient is rounded")
    return visit.summed(wide(visit.grad) / visit.saved("other"))


def expand(visit: Visit, parameter: int) -> Contribution:
    """Repeated, for every sample say: summed over the repeats."""
    return visit.summed(visit.grad)


def repeat(visit: Visit, parameter: int) -> Contribution:
    """Laid out several times along its dimensions, one of which has the samples."""
    layout = visit.layout
    padded = (1,) * (visit.grad.dim() - len(visit.shape)) + visit.shape
    _need(padded[layout.dim] == 1 or layout.outer == 1, "repeats are between the samples")
    parts = layout.split(wide(visit.grad)).flatten(layout.dim + 1, layout.dim + 2)
    pairs = zip(parts.shape[1:], padded, strict=True)
    folded = parts.reshape(len(parts), *(n for size, p in pairs for n in (size // p, p)))
    repeats = list(range(1, folded.dim(), 2))
    return Stacked(folded.sum(repeats).reshape(len(parts), *visit.shape))


RULES: dict[str, Rule] = {
    "AddBackward": add,
    "AddmmBackward": addmm,
    "BmmBackward": bmm,
    "ConvolutionBackward": convolution,
    "DivBackward": div,
    "EmbeddingBackward": embedding,
    "EmbeddingBagBackward": embedding_bag,
    "ExpandBackward": expand,
    "FusedRmsNormBackward": rms_norm,
    "IndexBackward": index,
    "IndexSelectBackward": index_select,
    "LinearBackward": linear,
    "MmBackward": mm,
    "MulBackward": mul,
    "MvBackward": mv,
    "NativeBatchNormBackward": batch_norm,
    "CudnnBatchNormBackward": batch_norm,
    "NativeGroupNormBackward": group_norm,
    "NativeLayerNormBackward": layer_norm,
    "RepeatBackward": repeat,
    "SubBackward": sub,
    "TrilinearBackward": trilinear,
}
