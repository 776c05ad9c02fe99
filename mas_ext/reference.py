r"""The operators in plain PyTorch: the fallback where no kernel is compiled, and the tests' oracle.

The formulas are those of ``csrc/formulas.h``, in the same order of operations. Every function has
the signature of its namesake in :mod:`mas_ext.functional`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = Sequence[Tensor]
Scalar = float | Tensor

_ROW = 16384
_ROWS, _PRODUCTS = 512, 1 << 22  # of Ω at a time; elements of its samples' products in one buffer


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which Ω is kept and sums are formed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def value_dtype(tensors: Tensors) -> torch.dtype:
    """The dtype of a penalty over the list: that of its widest accumulation."""
    wide = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def displacement(param: Tensor, anchor: Tensor) -> Tensor:
    """δ = θ − θ*, in the accumulation dtype."""
    dtype = accumulation_dtype(param.dtype)
    return param.to(dtype) - anchor.to(dtype)


def _factor(scalar: Scalar, like: Tensor, times: Scalar = 1.0) -> Tensor:
    """A product of scalars, formed in float64, in ``like``'s dtype; finite, so that 0·it = 0."""
    product = torch.as_tensor(scalar, dtype=torch.float64) * times
    return product.clamp_max(torch.finfo(like.dtype).max).to(like.dtype)


def _sum(terms: Tensor) -> Tensor:
    """In float64, a row of fixed size at a time: the same bits for any number of threads."""
    flat = terms.reshape(-1)
    rows = len(flat) // _ROW
    whole = flat[: rows * _ROW].view(rows, _ROW).sum(1, dtype=torch.float64)
    return whole.sum() + flat[rows * _ROW :].sum(dtype=torch.float64)


def accumulate_importance_(omega: Tensors, grads: Tensors, scale: float = 1.0) -> None:
    """See :func:`mas_ext.functional.accumulate_importance_`."""
    for o, g in zip(omega, grads, strict=True):
        o.add_(g.to(o.dtype).abs(), alpha=scale)


def accumulate_abs_matmul_(omega: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """See :func:`mas_ext.functional.accumulate_abs_matmul_`."""
    if left.shape[1] == 1:  # |l·r| = |l|·|r|, and one product sums the samples
        rows, columns = (factor[:, 0].to(omega.dtype).abs() for factor in (left, right))
        omega.add_(rows.mT @ columns, alpha=scale)
        return
    for o, rows in zip(omega.split(_ROWS), left.split(_ROWS, dim=2), strict=True):
        samples = max(1, _PRODUCTS // max(1, o.numel()))
        for mine, theirs in zip(rows.split(samples), right.split(samples), strict=True):
            products = torch.bmm(mine.to(o.dtype).mT, theirs.to(o.dtype))
            o.add_(products.abs_().sum(0), alpha=scale)


def penalty(params: Tensors, anchors: Tensors, omega: Tensors, lambda_reg: Scalar) -> Tensor:
    """See :func:`mas_ext.functional.penalty`."""
    if not params:
        device = lambda_reg.device if isinstance(lambda_reg, Tensor) else None
        return torch.zeros((), device=device)
    energy = torch.zeros((), dtype=torch.float64, device=params[0].device)
    for p, a, o in zip(params, anchors, omega, strict=True):
        delta = displacement(p, a)
        energy = energy + _sum(o * delta * delta)
    return (0.5 * lambda_reg * energy).to(value_dtype(params))


def penalty_and_grad(
    params: Tensors, anchors: Tensors, omega: Tensors, lambda_reg: Scalar
) -> tuple[Tensor, list[Tensor]]:
    """See :func:`mas_ext.functional.penalty_and_grad`."""
    grads = [
        (_factor(lambda_reg, o) * o * displacement(p, a)).to(p.dtype)
        for p, a, o in zip(params, anchors, omega, strict=True)
    ]
    return penalty(params, anchors, omega, lambda_reg), grads


def add_penalty_grad_(
    grads: Tensors,
    params: Tensors,
    anchors: Tensors,
    omega: Tensors,
    lambda_reg: Scalar,
    grad_scale: Scalar | None = None,
) -> Tensor:
    """See :func:`mas_ext.functional.add_penalty_grad_`."""
    scale = 1.0 if grad_scale is None else grad_scale
    for g, p, a, o in zip(grads, params, anchors, omega, strict=True):
        g.copy_(g.to(o.dtype) + _factor(lambda_reg, o, scale) * o * displacement(p, a))
    return penalty(params, anchors, omega, lambda_reg)


def proximal_step_(
    params: Tensors, anchors: Tensors, omega: Tensors, lambda_reg: Scalar, lr: Scalar
) -> Tensor:
    """See :func:`mas_ext.functional.proximal_step_`."""
    for p, a, o in zip(params, anchors, omega, strict=True):
        c = (_factor(lambda_reg, o, lr) * o).clamp_max(torch.finfo(o.dtype).max)
        moved = p.to(o.dtype) - displacement(p, a) * (c / (1 + c))
        p.copy_(torch.where(o == 0, p, moved.to(p.dtype)))
    return penalty(params, anchors, omega, lambda_reg)
