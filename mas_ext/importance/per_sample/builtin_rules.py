r"""The built-in rules: what each kind of operation adds to the gradient of a parameter, per sample.

Positions t run over everything that a sample contains within a batch: pixels, tokens, or both.

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
"""

from __future__ import annotations

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
from mas_ext.importance.per_sample.layout import Layout
from mas_ext.importance.per_sample.rules import VisitedOperation, register_rule, require


# ================================================================================================
# Matrix products
# ================================================================================================
def _product(
    op: VisitedOperation, left: str | None, right: str | None, alpha: float = 1.0
) -> MatrixProduct:
    """C = A·B, where A or B is the parameter; the saved operand, named here, has the samples."""
    grad = op.grad if alpha == 1 else op.grad * alpha
    if left is not None:
        require(op.layout.dim == 0, "the samples are not the rows of the product")
        return MatrixProduct(op.layout.rows(op.saved(left)), op.layout.rows(grad))
    assert right is not None
    require(op.layout.dim == 1, "the samples are not the columns of the product")
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
    """C = βM + αA·B: a linear layer with bias M."""
    if parameter == 0:
        beta = op.saved("beta")
        return op.summed(op.grad if beta == 1 else op.grad * beta)
    alpha = op.saved("alpha")
    if parameter == 2:
        return _product(op, "mat1", None, alpha)
    return _product(op, None, "mat2", alpha)


@register_rule("BmmBackward")
def bmm(op: VisitedOperation, parameter: int) -> Contribution:
    """[H, B·T, d] × [H, d, p]: one product per matrix of the stack."""
    name, dim = ("self", 1) if parameter == 1 else ("mat2", 2)
    require(op.layout.dim == dim, "the matrices of the stack belong to samples")
    rows = Layout(0, op.layout.outer, op.layout.inner).rows
    pairs = zip(op.saved(name), op.grad, strict=True)
    if parameter == 1:
        return StackedMatrixProducts([MatrixProduct(rows(a), rows(g)) for a, g in pairs])
    return StackedMatrixProducts([MatrixProduct(rows(g.t()), rows(b.t())) for b, g in pairs])


@register_rule("MvBackward")
def mv(op: VisitedOperation, parameter: int) -> Contribution:
    """y = A·v: M_k = Σ_t g_kt a_kt."""
    require(parameter == 1, "the matrix is the parameter")
    rows = op.layout.rows
    products = upcast(op.saved("self")) * upcast(op.grad)[:, None]
    return Materialized(rows(products).sum(1))


@register_rule("TrilinearBackward")
def trilinear(op: VisitedOperation, parameter: int) -> Contribution:
    """nn.Bilinear: the weight [o, i, j] times x₁ ⊗ x₂."""
    first, second = op.saved("i1"), op.saved("i3")
    require(
        parameter == 1 and first.dim() == 2 == second.dim() and op.layout.dim == 0,
        "not nn.Bilinear's",
    )
    pairs = (first[:, :, None] * second[:, None, :]).flatten(1)
    rows = op.layout.rows
    return MatrixProduct(rows(op.grad), rows(pairs), op.shape)


@register_rule("LinearBackward")
def linear(op: VisitedOperation, parameter: int) -> Contribution:
    """y = x·Wᵀ + b as one operation, which some backends have."""
    if parameter == 2:
        return op.summed(op.grad)
    require(parameter == 1, "the input is the parameter")
    positions = op.layout.positions
    return MatrixProduct(positions(op.grad), positions(op.saved("input")))


@register_rule("ConvolutionBackward")
def convolution(op: VisitedOperation, parameter: int) -> Contribution:
    """The bias's gradient is the sum over pixels; ConvolutionWeight has the weight's."""
    require(parameter in (1, 2) and op.layout.dim == 0, "dimension 0 is not the batch")
    if parameter == 2:
        return _over_space(op, upcast(op.grad))
    return _convolution_weight(op)


def _convolution_weight(op: VisitedOperation) -> ConvolutionWeight:
    """The weight's contribution; for a transposed convolution, input and output change places."""
    inputs, kernel = op.saved("input"), tuple(op.saved("weight").shape[2:])
    stride, padding, dilation = (
        _per_dimension(op.saved(name), len(kernel)) for name in ("stride", "padding", "dilation")
    )
    pixels, patched = (inputs, op.grad) if op.saved("transposed") else (op.grad, inputs)
    pixels, patched = (op.layout.split(t, 0).flatten(1, 2) for t in (pixels, patched))
    geometry = Geometry(kernel, stride, padding, dilation)
    return ConvolutionWeight(pixels, patched, geometry, op.saved("groups"))


def _per_dimension(values: list[int], dimensions: int) -> tuple[int, ...]:
    """One number per dimension of space; a single number stands for all dimensions."""
    return tuple(values) if len(values) == dimensions else (values[0],) * dimensions


# ================================================================================================
# Look-ups in a table
# ================================================================================================
def _looked_up(op: VisitedOperation, index: Tensor, values: Tensor) -> EmbeddingRows:
    """Gradients ``values`` [*I, *row shape] of the rows ``index`` [*I]; I has the samples."""
    split, row_shape = op.layout.split, op.shape[1:]
    index = split(index)
    return EmbeddingRows(
        index.flatten(1), split(values).reshape(len(index), -1, *row_shape), op.shape
    )


@register_rule("EmbeddingBackward")
def embedding(op: VisitedOperation, parameter: int) -> Contribution:
    """y = table[indices], where the padding row gets no gradient."""
    index = op.saved("indices")
    require(op.layout.dim < index.dim(), "the samples are not among the indices")
    padding = op.saved("padding_idx")
    values = op.grad
    if padding >= 0:
        index = index.masked_fill(index == padding, -1)
    rows = _looked_up(op, index, values)
    return _divided_by_count(rows) if op.saved("scale_grad_by_freq") else rows


def _divided_by_count(rows: EmbeddingRows) -> EmbeddingRows:
    """Divides by the number of times an index occurs in its sample, for scale_grad_by_freq."""
    same = rows.index[:, :, None] == rows.index[:, None, :]
    return EmbeddingRows(
        rows.index, rows.values / same.sum(2)[..., None].to(rows.values), rows.shape
    )


@register_rule("EmbeddingBagBackward")
def embedding_bag(op: VisitedOperation, parameter: int) -> Contribution:
    """Sums and means over bags of equal length, which indices [B, T] give."""
    bags, index, mode = op.grad, op.saved("indices"), op.saved("mode")
    length, rest = divmod(len(index), len(bags))
    equal = op.saved("offsets").equal(torch.arange(len(bags), device=index.device) * length)
    require(parameter == 0 and mode in (0, 1) and rest == 0 and equal, "not sums of equal bags")
    require(op.saved("per_sample_weights") is None, "weighted")
    require(not op.saved("scale_grad_by_freq"), "scaled by frequency")
    index = index.view(len(bags), length)
    padding = op.saved("padding_idx")
    index = index.masked_fill(index == padding, -1) if padding >= 0 else index
    used = (index >= 0).sum(1, keepdim=True).clamp_min(1).to(bags)
    values = (bags / used if mode == 1 else bags)[:, None].expand(-1, length, -1)
    return _looked_up(op, index, values)


@register_rule("IndexBackward")
def index(op: VisitedOperation, parameter: int) -> Contribution:
    """y = ``table[index]`` with one tensor of row numbers."""
    indices = [i for i in op.saved("indices") if i is not None]
    plain = len(indices) == 1 and op.saved("indices")[0] is not None
    require(plain and indices[0].dtype == torch.int64, "not rows by number")
    require(op.layout.dim < indices[0].dim(), "the samples are not among the indices")
    return _looked_up(op, indices[0] % op.shape[0], op.grad)


@register_rule("IndexSelectBackward")
def index_select(op: VisitedOperation, parameter: int) -> Contribution:
    """y = ``table.index_select(0, index)``."""
    require(op.saved("dim") == 0 == op.layout.dim, "not rows by number")
    return _looked_up(op, op.saved("index"), op.grad)


# ================================================================================================
# Normalisation: x̂ is formed in a single buffer, since new memory costs more time than arithmetic
# ================================================================================================
@register_rule("NativeLayerNormBackward")
def layer_norm(op: VisitedOperation, parameter: int) -> Contribution:
    """x̂ comes from the mean and 1/σ, which are saved for every position."""
    require(parameter in (1, 2), "the input is the parameter")
    grad = upcast(op.grad)
    if parameter == 2:
        return op.summed(grad)
    centred = upcast(op.saved("input")) - op.saved("result1")
    return op.summed(centred.mul_(op.saved("result2")).mul_(grad))


@register_rule("FusedRmsNormBackward")
def rms_norm(op: VisitedOperation, parameter: int) -> Contribution:
    """x̂ comes from 1/rms, which is saved for every position."""
    require(parameter == 1, "the input is the parameter")
    scaled = upcast(op.saved("input")) * op.saved("result1")
    return op.summed(scaled.mul_(upcast(op.grad)))


@register_rule("NativeGroupNormBackward")
def group_norm(op: VisitedOperation, parameter: int) -> Contribution:
    """x̂ comes from the mean and 1/σ, which are saved for every sample and group."""
    require(parameter in (1, 2), "the input is the parameter")
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
    """x̂ comes from the running statistics (evaluation mode); 1/σ is the same at all pixels."""
    require(not op.saved("training"), "it normalises by the batch's statistics")
    require(parameter in (1, 2), "the input is the parameter")
    grad = upcast(op.grad)
    if parameter == 2:
        return _over_space(op, grad)
    inputs = upcast(op.saved("input"))
    mean = op.saved("running_mean").view(-1, *[1] * (inputs.dim() - 2))
    summed = _over_space(op, (inputs - mean).mul_(grad))
    return Materialized(summed.values * (upcast(op.saved("running_var")) + op.saved("eps")).rsqrt())


def _over_space(op: VisitedOperation, values: Tensor) -> Materialized:
    """[rows, C, *space] → [B, C]; space, which is contiguous, is summed first."""
    require(op.layout.dim == 0, "dimension 0 is not the batch")
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
    """y = a − αb. The sign matters, since another use of the parameter may be added."""
    return op.summed(op.grad * -op.saved("alpha") if parameter == 1 else op.grad)


@register_rule("MulBackward")
def mul(op: VisitedOperation, parameter: int) -> Contribution:
    """y = a·b."""
    other = op.saved("other" if parameter == 0 else "self")
    return op.summed(upcast(op.grad) * other)


@register_rule("DivBackward")
def div(op: VisitedOperation, parameter: int) -> Contribution:
    """y = a / b, where a is the parameter."""
    require(parameter == 0, "the parameter divides")
    require(op.node.name == "DivBackward0", "the quotient is rounded")
    return op.summed(upcast(op.grad) / op.saved("other"))


@register_rule("ExpandBackward")
def expand(op: VisitedOperation, parameter: int) -> Contribution:
    """The parameter is expanded, to every sample say: M_k is the sum over the repeats."""
    return op.summed(op.grad)


@register_rule("RepeatBackward")
def repeat(op: VisitedOperation, parameter: int) -> Contribution:
    """The parameter is repeated along its dimensions, one of which then has the samples."""
    layout = op.layout
    padded = (1,) * (op.grad.dim() - len(op.shape)) + op.shape
    require(padded[layout.dim] == 1 or layout.outer == 1, "repeats are between the samples")
    parts = layout.split(upcast(op.grad)).flatten(layout.dim + 1, layout.dim + 2)
    pairs = zip(parts.shape[1:], padded, strict=True)
    folded = parts.reshape(len(parts), *(n for size, p in pairs for n in (size // p, p)))
    repeats = list(range(1, folded.dim(), 2))
    return Materialized(folded.sum(repeats).reshape(len(parts), *op.shape))
