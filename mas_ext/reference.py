r"""The operators in plain PyTorch: the fallback where there are no compiled kernels.

The formulas are those of ``csrc/formulas.h``, in the same order of operations. Every function has
the signature of its namesake in :mod:`mas_ext.functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mas_ext.precision import accumulation_dtype, to_accumulation_dtype

__all__ = [
    "accumulate_abs_matmul_",
    "accumulate_importance_",
    "accumulate_outer_",
    "accumulation_dtype",
    "adamw_step_",
    "add_penalty_grad_",
    "check_reduction",
    "displacement",
    "low_rank_penalty",
    "low_rank_penalty_grad_",
    "magnitude_of",
    "penalty",
    "penalty_and_grad",
    "proximal_step_",
    "sgd_step_",
    "value_dtype",
]

Tensors = Sequence[Tensor]
Scalar = float | Tensor

_ROW = 16384
_ROWS = 512  # of Ω at a time
_PRODUCTS = 1 << 22  # elements in a buffer of the samples' products


def value_dtype(tensors: Tensors) -> torch.dtype:
    """The dtype of a penalty over the list: float64 if any tensor is, else float32."""
    any_double = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if any_double else torch.float32


def displacement(param: Tensor, anchor: Tensor) -> Tensor:
    """δ = θ − θ*, in the accumulation dtype."""
    dtype = accumulation_dtype(param.dtype)
    return param.to(dtype) - anchor.to(dtype)


def _factor(scalar: Scalar, like: Tensor, times: Scalar = 1.0) -> Tensor:
    """A product of scalars, formed in float64, in ``like``'s dtype; finite, so that 0 × it is 0."""
    product = torch.as_tensor(scalar, dtype=torch.float64) * times
    return product.clamp_max(torch.finfo(like.dtype).max).to(like.dtype)


def _sum(terms: Tensor) -> Tensor:
    """The sum in float64, by rows of fixed size: the same bits for any number of threads."""
    flat = terms.reshape(-1)
    rows = len(flat) // _ROW
    whole = flat[: rows * _ROW].view(rows, _ROW).sum(1, dtype=torch.float64)
    return whole.sum() + flat[rows * _ROW :].sum(dtype=torch.float64)


# Each must be multiplicative, f(xy) = f(x)f(y), which `accumulate_outer_` relies on.
_MAGNITUDES: Mapping[str, Callable[[Tensor], Tensor]] = {"abs": torch.abs, "square": torch.square}


def check_reduction(reduction: str) -> None:
    """Raises ValueError unless the reduction is ``"abs"`` or ``"square"``."""
    if reduction not in _MAGNITUDES:
        names = " or ".join(map(repr, _MAGNITUDES))
        raise ValueError(f"reduction: {reduction!r} is unknown; use {names}")


def magnitude_of(reduction: str) -> Callable[[Tensor], Tensor]:
    """How a gradient counts towards Ω: by its absolute value or by its square."""
    check_reduction(reduction)
    return _MAGNITUDES[reduction]


def accumulate_importance_(
    omega: Tensors, grads: Tensors, scale: float = 1.0, reduction: str = "abs"
) -> None:
    """See :func:`mas_ext.functional.accumulate_importance_`."""
    magnitude = magnitude_of(reduction)
    for o, g in zip(omega, grads, strict=True):
        o.add_(magnitude(g.to(o.dtype)), alpha=scale)


def accumulate_outer_(
    omega: Tensor, left: Tensor, right: Tensor, scale: float = 1.0, reduction: str = "abs"
) -> None:
    """See :func:`mas_ext.functional.accumulate_outer_`."""
    magnitude = magnitude_of(reduction)
    if omega.dim() > 2 or left.dim() > 3:  # several dimensions of columns or positions
        right = right.flatten(left.dim() - 1).flatten(1, -2)
        total = omega.new_zeros(len(omega), right.shape[-1])
        accumulate_outer_(total, left.flatten(1, -2), right, scale, reduction)
        omega.add_(total.view_as(omega))
        return
    if left.shape[1] == 1:  # f(l·r) = f(l)·f(r), so one product sums over the samples
        rows, columns = (magnitude(factor[:, 0].to(omega.dtype)) for factor in (left, right))
        omega.add_(rows.mT @ columns, alpha=scale)
        return
    for o, rows in zip(omega.split(_ROWS), left.split(_ROWS, dim=2), strict=True):
        samples = max(1, _PRODUCTS // max(1, o.numel()))
        for mine, theirs in zip(rows.split(samples), right.split(samples), strict=True):
            products = torch.bmm(mine.to(o.dtype).mT, theirs.to(o.dtype))
            o.add_(magnitude(products).sum(0), alpha=scale)


def accumulate_abs_matmul_(omega: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """The old name of :func:`accumulate_outer_` with the reduction ``"abs"``."""
    accumulate_outer_(omega, left, right, scale)


def penalty(
    params: Tensors,
    anchors: Tensors,
    omega: Tensors,
    lambda_reg: Scalar,
    *,
    omega_scales: Tensors = (),
) -> Tensor:
    """See :func:`mas_ext.functional.penalty`."""
    if not params:
        device = lambda_reg.device if isinstance(lambda_reg, Tensor) else None
        return torch.zeros((), device=device)
    energy = torch.zeros((), dtype=torch.float64, device=params[0].device)
    for p, a, o in zip(params, anchors, to_accumulation_dtype(omega, omega_scales), strict=True):
        delta = displacement(p, a)
        energy = energy + _sum(o * delta * delta)
    return (0.5 * lambda_reg * energy).to(value_dtype(params))


def penalty_and_grad(
    params: Tensors,
    anchors: Tensors,
    omega: Tensors,
    lambda_reg: Scalar,
    *,
    omega_scales: Tensors = (),
) -> tuple[Tensor, list[Tensor]]:
    """See :func:`mas_ext.functional.penalty_and_grad`."""
    grads = [
        (_factor(lambda_reg, o) * o * displacement(p, a)).to(p.dtype)
        for p, a, o in zip(params, anchors, to_accumulation_dtype(omega, omega_scales), strict=True)
    ]
    return penalty(params, anchors, omega, lambda_reg, omega_scales=omega_scales), grads


def add_penalty_grad_(
    grads: Tensors,
    params: Tensors,
    anchors: Tensors,
    omega: Tensors,
    lambda_reg: Scalar,
    grad_scale: Scalar | None = None,
    *,
    omega_scales: Tensors = (),
) -> Tensor:
    """See :func:`mas_ext.functional.add_penalty_grad_`."""
    scale = 1.0 if grad_scale is None else grad_scale
    for g, p, a, o in zip(
        grads, params, anchors, to_accumulation_dtype(omega, omega_scales), strict=True
    ):
        g.copy_(g.to(o.dtype) + _factor(lambda_reg, o, scale) * o * displacement(p, a))
    return penalty(params, anchors, omega, lambda_reg, omega_scales=omega_scales)


def proximal_step_(
    params: Tensors,
    anchors: Tensors,
    omega: Tensors,
    lambda_reg: Scalar,
    lr: Scalar,
    *,
    omega_scales: Tensors = (),
) -> Tensor:
    """See :func:`mas_ext.functional.proximal_step_`."""
    for p, a, o in zip(params, anchors, to_accumulation_dtype(omega, omega_scales), strict=True):
        c = (_factor(lambda_reg, o, lr) * o).clamp_max(torch.finfo(o.dtype).max)
        moved = p.to(o.dtype) - displacement(p, a) * (c / (1 + c))
        p.copy_(torch.where(o == 0, p, moved.to(p.dtype)))
    return penalty(params, anchors, omega, lambda_reg, omega_scales=omega_scales)


def _stored(omega: Tensor, omega_scales: Tensor | None) -> Tensor:
    (weights,) = to_accumulation_dtype([omega], [] if omega_scales is None else [omega_scales])
    return weights


def low_rank_penalty(
    a: Tensor,
    b: Tensor,
    omega: Tensor,
    lambda_reg: Scalar,
    scale: float = 1.0,
    *,
    omega_scales: Tensor | None = None,
) -> Tensor:
    """See :func:`mas_ext.functional.low_rank_penalty`."""
    weights = _stored(omega, omega_scales)
    delta = scale * (b.to(weights.dtype) @ a.to(weights.dtype))
    return (0.5 * lambda_reg * _sum(weights * delta * delta)).to(value_dtype([a]))


def low_rank_penalty_grad_(
    grad_a: Tensor,
    grad_b: Tensor,
    a: Tensor,
    b: Tensor,
    omega: Tensor,
    lambda_reg: Scalar,
    scale: float = 1.0,
    *,
    omega_scales: Tensor | None = None,
) -> Tensor:
    """See :func:`mas_ext.functional.low_rank_penalty_grad_`."""
    weights = _stored(omega, omega_scales)
    left, right = b.to(weights.dtype), a.to(weights.dtype)
    coefficient = _factor(lambda_reg, weights, scale * scale)
    by_a, energy = torch.zeros_like(right), torch.zeros((), dtype=torch.float64, device=a.device)
    for w, rows, grad in zip(*(t.split(_ROWS) for t in (weights, left, grad_b)), strict=True):
        product = rows @ right
        weighted = w * product
        by_a += rows.mT @ weighted
        grad.copy_(grad.to(w.dtype) + coefficient * (weighted @ right.mT))
        energy += _sum(weighted * product)
    grad_a.copy_(grad_a.to(by_a.dtype) + coefficient * by_a)
    return (0.5 * lambda_reg * (scale * scale * energy)).to(value_dtype([a]))


# The order within a step: ±g/s, the penalty's gradient, weight decay, the optimizer's rule.
def _step_gradient(
    p: Tensor, g: Tensor, pull: Tensor | float, maximize: bool, grad_scale: Scalar | None, l2: float
) -> Tensor:
    g, theta = g.to(accumulation_dtype(p.dtype)), p.to(accumulation_dtype(p.dtype))
    factor = 1 / torch.as_tensor(1.0 if grad_scale is None else grad_scale, dtype=torch.float64)
    return g * (-factor if maximize else factor).to(g.dtype) + pull + l2 * theta


class _Step:
    """What optimizer steps share: the penalty's part in them, and skipping.

    ``skipped`` is a 0-dim tensor, so that nothing waits for the device.
    """

    def __init__(
        self,
        state: tuple[Tensors, Tensors, Tensors, Tensors],
        strengths: tuple[Scalar, Scalar],
        mode: str,
        found_inf: Scalar | None,
    ) -> None:
        self.params, self.anchors, self.omega, self.omega_scales = state
        self.lambda_reg, self.lr = strengths
        self.proximal = mode == "proximal"
        self.skipped = None if found_inf is None else torch.as_tensor(found_inf) != 0
        self.before = None if self.proximal else self._penalty()

    def _state(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        (omega,) = to_accumulation_dtype(self.omega[i : i + 1], self.omega_scales[i : i + 1])
        return self.params[i], self.anchors[i], omega

    def _penalty(self) -> Tensor:
        state = self.params, self.anchors, self.omega
        return penalty(*state, self.lambda_reg, omega_scales=self.omega_scales)

    def pull(self, i: int) -> Tensor | float:
        """The penalty's gradient if the step descends it; 0 for a proximal step."""
        if self.proximal:
            return 0.0
        p, a, o = self._state(i)
        return _factor(self.lambda_reg, o) * o * displacement(p, a)

    def write(self, i: int, moved: Tensor, *moments: tuple[Tensor, Tensor]) -> None:
        """Writes θ, pulled towards θ* if the step is proximal, and the moments."""
        p = self.params[i]
        if self.proximal:
            _, a, o = self._state(i)
            c = (_factor(self.lambda_reg, o, self.lr) * o).clamp_max(torch.finfo(o.dtype).max)
            moved = torch.where(o == 0, moved, moved - (moved - a.to(o.dtype)) * (c / (1 + c)))
        for old, new in [(p, moved), *moments]:
            new = new.to(old.dtype)
            old.copy_(new if self.skipped is None else torch.where(self.skipped, old, new))

    def value(self) -> Tensor:
        """The penalty before the step, or for a proximal step after it."""
        return self._penalty() if self.before is None else self.before


def sgd_step_(
    params: Tensors,
    grads: Tensors,
    anchors: Tensors,
    omega: Tensors,
    lambda_reg: Scalar,
    lr: Scalar,
    *,
    omega_scales: Tensors = (),
    mode: str = "gradient",
    momentum_buffers: Tensors = (),
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
) -> Tensor:
    """See :func:`mas_ext.functional.sgd_step_`."""
    step = _Step((params, anchors, omega, omega_scales), (lambda_reg, lr), mode, found_inf)
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        g = _step_gradient(p, g, step.pull(i), maximize, grad_scale, weight_decay)
        rate = torch.as_tensor(lr, dtype=torch.float64).to(g.dtype)
        if momentum == 0:
            step.write(i, p.to(g.dtype) - rate * g)
            continue
        buffer = momentum * momentum_buffers[i].to(g.dtype) + (1 - dampening) * g
        direction = g + momentum * buffer if nesterov else buffer
        step.write(i, p.to(g.dtype) - rate * direction, (momentum_buffers[i], buffer))
    return step.value()


def adamw_step_(
    params: Tensors,
    grads: Tensors,
    anchors: Tensors,
    omega: Tensors,
    lambda_reg: Scalar,
    lr: Scalar,
    *,
    omega_scales: Tensors = (),
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensor,
    mode: str = "gradient",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    decoupled: bool = True,
    maximize: bool = False,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
) -> Tensor:
    """See :func:`mas_ext.functional.adamw_step_`."""
    step = _Step((params, anchors, omega, omega_scales), (lambda_reg, lr), mode, found_inf)
    rate = torch.as_tensor(lr, dtype=torch.float64)
    shrink, l2 = (1 - rate * weight_decay, 0.0) if decoupled else (torch.ones(()), weight_decay)
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        g = _step_gradient(p, g, step.pull(i), maximize, grad_scale, l2)
        m = betas[0] * exp_avgs[i].to(g.dtype) + (1 - betas[0]) * g
        v = betas[1] * exp_avg_sqs[i].to(g.dtype) + (1 - betas[1]) * g * g
        first, second = (1 - beta ** (steps[i].double() + 1) for beta in betas)
        root = v.sqrt() * second.rsqrt().to(g.dtype) + eps
        moved = shrink.to(g.dtype) * p.to(g.dtype) - (rate / first).to(g.dtype) * (m / root)
        step.write(i, moved, (exp_avgs[i], m), (exp_avg_sqs[i], v))
    return step.value()
