"""What the operators compute, in float64 and independently of the package, and how near is right.

Each formula takes the tensors as they are before the call, in float64, and returns what is to be
written or returned: the equations of the paper and of torch's optimizers, not the package's code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.support.tensors import State, accumulation_dtype


class Exact(NamedTuple):
    """A value, and the magnitude of the terms it is a sum of: rounding is relative to that."""

    values: Tensor
    magnitude: Tensor

    def __add__(self, other: Exact) -> Exact:  # type: ignore[override]
        return Exact(self.values + other.values, self.magnitude + other.magnitude)

    def times(self, factor: float | Tensor) -> Exact:
        return Exact(self.values * factor, self.magnitude * abs(factor))


def _term(value: Tensor) -> Exact:
    return Exact(value, value.abs())


Numbers = Mapping[str, Any]  # scalars and options by name
Formula = Callable[[State, Numbers], list[list[Exact]]]  # one list per list that is written


def _square(value: Exact) -> Exact:
    """An error is doubled in the square, whose own size is that of what cancelled before."""
    return Exact(value.values**2, 2 * value.magnitude**2)


# -- Importance ------------------------------------------------------------------------------------
def _reduced(gradient: Exact, n: Numbers) -> Exact:
    if n.get("reduction") == "square":
        return _square(gradient)
    return Exact(gradient.values.abs(), gradient.magnitude)


def importance(s: State, n: Numbers) -> list[list[Exact]]:
    pairs = zip(s.omega, s.grads, strict=True)
    return [[_term(o) + _reduced(_term(g), n).times(n["scale"]) for o, g in pairs]]


def outer(s: State, n: Numbers) -> list[list[Exact]]:
    (omega,), (left,), (right,) = s.omega, s.left, s.right
    products = torch.einsum("btp,btd->bpd", left, right)
    bounds = torch.einsum("btp,btd->bpd", left.abs(), right.abs())
    each = _reduced(Exact(products, bounds), n)
    return [[_term(omega) + Exact(*(part.sum(0) for part in each)).times(n["scale"])]]


# -- The penalty -----------------------------------------------------------------------------------
def penalty_value(state: State, lambda_reg: float | Tensor) -> float:
    """λ/2 Σ Ω(θ−θ*)²."""
    s = state.double()
    energies = (o * (p - a) ** 2 for p, a, o in zip(s.params, s.anchors, s.omega, strict=True))
    return 0.5 * float(lambda_reg) * math.fsum(float(energy.sum()) for energy in energies)


def nothing(s: State, n: Numbers) -> list[list[Exact]]:
    return []


def gradient(s: State, n: Numbers) -> list[list[Exact]]:
    pieces = zip(s.params, s.anchors, s.omega, strict=True)
    return [[_term(n["lambda_reg"] * o * (p - a)) for p, a, o in pieces]]


def added_gradient(s: State, n: Numbers) -> list[list[Exact]]:
    scale = 1.0 if n["grad_scale"] is None else n["grad_scale"]
    (gradients,) = gradient(s, n)
    return [[_term(g) + d.times(scale) for g, d in zip(s.grads, gradients, strict=True)]]


def _pulled(p: Exact, a: Tensor, c: Tensor) -> Exact:
    return Exact((p.values + c * a) / (1 + c), p.magnitude + a.abs())


def proximal(s: State, n: Numbers) -> list[list[Exact]]:
    step = n["lambda_reg"] * n["lr"]
    pieces = zip(s.params, s.anchors, s.omega, strict=True)
    return [[_pulled(_term(p), a, step * o) for p, a, o in pieces]]


def _low_rank(s: State, n: Numbers) -> tuple[Tensor, Exact, Tensor, Tensor]:
    """λΩ, Δ, A and B."""
    (a,), (b,), (omega,) = s.a, s.b, s.omega
    return n["lambda_reg"] * omega, Exact(b @ a, b.abs() @ a.abs()).times(n["scale"]), a, b


def low_rank_gradient(s: State, n: Numbers) -> list[list[Exact]]:
    strength, delta, a, b = _low_rank(s, n)
    weighted = delta.times(strength)
    by_a = Exact(b.mT @ weighted.values, b.mT.abs() @ weighted.magnitude).times(n["scale"])
    by_b = Exact(weighted.values @ a.mT, weighted.magnitude @ a.mT.abs()).times(n["scale"])
    return [[_term(s.grad_a[0]) + by_a], [_term(s.grad_b[0]) + by_b]]


def low_rank_value(state: State, n: Numbers) -> tuple[float, float]:
    """λ/2 Σ ΩΔ², and what an error of Δ, relative to the magnitude of its terms, makes of it."""
    strength, delta, _, _ = _low_rank(state.double(), n)
    doubled = (strength * delta.values.abs() * delta.magnitude).abs().sum()
    dtype = accumulation_dtype(state.a[0].dtype)
    return 0.5 * float((strength * delta.values**2).sum()), ARITHMETIC[dtype] * float(doubled)


# -- Optimizer steps -------------------------------------------------------------------------------
def _sgd(i: int, p: Exact, g: Exact, s: State, n: Numbers) -> list[Exact]:
    g = g + p.times(n.get("weight_decay", 0.0))
    if not s.momentum_buffers:
        return [p + g.times(-n["lr"])]
    buffer = _term(s.momentum_buffers[i]).times(n["momentum"])
    buffer = buffer + g.times(1 - n.get("dampening", 0.0))
    walked = g + buffer.times(n["momentum"]) if n.get("nesterov") else buffer
    return [p + walked.times(-n["lr"]), buffer]


def _adam(i: int, p: Exact, g: Exact, s: State, n: Numbers) -> list[Exact]:
    t, (beta1, beta2) = float(s.steps[0][i]) + 1, n.get("betas", (0.9, 0.999))
    decay, eps = n.get("weight_decay", 0.01), n.get("eps", 1e-8)
    if n.get("decoupled", True):
        p = p.times(1 - n["lr"] * decay)
    else:
        g = g + p.times(decay)
    m = _term(s.exp_avgs[i]).times(beta1) + g.times(1 - beta1)
    v = _term(s.exp_avg_sqs[i]).times(beta2) + _square(g).times(1 - beta2)
    root = (v.values / (1 - beta2**t)).sqrt() + eps
    step = m.times(n["lr"] / (1 - beta1**t) / root)
    step = Exact(step.values, step.magnitude + step.values.abs() * v.magnitude / v.values)
    return [p + step.times(-1.0), m, v]


def _step(rule: Callable[..., list[Exact]], s: State, n: Numbers) -> list[list[Exact]]:
    scale = 1.0 if n["grad_scale"] is None else n["grad_scale"]
    sign, lambda_reg = -1 if n.get("maximize") else 1, n["lambda_reg"]
    results = []
    for i, (p, a, o) in enumerate(zip(s.params, s.anchors, s.omega, strict=True)):
        g = _term(s.grads[i] * (sign / scale))
        if n["mode"] == "gradient":
            g = g + Exact(lambda_reg * o * (p - a), lambda_reg * o * (p - a).abs())
        moved, *moments = rule(i, _term(p), g, s, n)
        if n["mode"] == "proximal":
            moved = _pulled(moved, a, n["lr"] * lambda_reg * o)
        results.append([moved, *moments])
    return [list(column) for column in zip(*results, strict=True)]


def sgd(s: State, n: Numbers) -> list[list[Exact]]:
    return _step(_sgd, s, n)


def adam(s: State, n: Numbers) -> list[list[Exact]]:
    return _step(_adam, s, n)


# -- Tolerances ------------------------------------------------------------------------------------
# Relative errors of a few operations in the accumulation dtype, and of a penalty's sum.
ARITHMETIC = {torch.float32: 1.3e-6, torch.float64: 4e-15}
VALUE = {torch.float32: 1e-6, torch.float64: 1e-13}


def smallest_step(dtype: torch.dtype) -> float:
    """The smallest subnormal number: what an underflow may lose."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


def rounding(dtype: torch.dtype) -> float:
    """One rounding to a dtype narrower than its accumulation; part of ``ARITHMETIC`` otherwise."""
    return 0.0 if dtype in ARITHMETIC else torch.finfo(dtype).eps / 2


def assert_near(
    actual: Tensor, exact: Exact, *, times: float = 1, dust: float | Tensor = 0.0, what: str = ""
) -> None:
    """Each element is within the arithmetic's error and one rounding to its dtype.

    ``times`` allows for more operations, ``dust`` is an absolute error for values that underflow.
    """
    dtype = actual.dtype
    bound = ARITHMETIC[accumulation_dtype(dtype)] * exact.magnitude
    bound = times * (bound + rounding(dtype) * exact.values.abs() + smallest_step(dtype)) + dust
    actual = actual.detach().double()
    error = (actual - exact.values).abs()
    # What float64 puts beyond the dtype's range must be infinite there, with its sign.
    beyond = exact.values.abs() + bound > torch.finfo(dtype).max
    overflown = beyond & (actual == exact.values.sign() * math.inf)
    assert actual.shape == exact.values.shape, what
    right = (error <= bound) | overflown
    assert bool(right.all()), f"{what} off by up to {(error / bound)[~right].max():.3g} x the bound"


def assert_value_near(
    actual: Tensor, exact: float, *, dtype: torch.dtype = torch.float32, dust: float = 0.0
) -> None:
    """A penalty is within the tolerance of sums whose terms are formed in ``dtype``."""
    bound = VALUE[accumulation_dtype(dtype)] * abs(exact) + smallest_step(actual.dtype) + dust
    assert actual.shape == ()
    assert abs(float(actual) - exact) <= bound, f"{float(actual)!r} is not {exact!r}"
