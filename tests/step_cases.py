"""The optimizer steps as cases: rules, the tensors they need, and what they should do in float64.

A rule is an operator with options; ``RULES`` is the place to add one. Shapes, dtypes, layouts and
tolerances are those of ``cases.py``.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.cases import (
    LAYOUTS,
    Case,
    Exact,
    State,
    assert_near,
    assert_value_near,
    exact_penalty,
    make_state,
)

MODES = ("gradient", "proximal")

# Twenty operations in a row, where assert_near's bounds are those of a few.
TIMES = 2


@dataclass(frozen=True)
class Rule:
    op: str
    moments: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def written(self) -> tuple[str, ...]:
        return ("params", *self.moments)

    @property
    def lists(self) -> tuple[str, ...]:
        """What the operator checks, in its order."""
        return (*self.written, "grads", "anchors", "omega")


_MOMENTUM, _ADAM = ("momentum_buffers",), ("exp_avgs", "exp_avg_sqs")
# Numbers that float32 cannot hold exactly, so that a rounding too many is seen.
RULES = {
    "sgd": Rule("sgd_step_", (), {"weight_decay": 0.03}),
    "momentum": Rule(
        "sgd_step_", _MOMENTUM, {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.03}
    ),
    "nesterov": Rule("sgd_step_", _MOMENTUM, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    "adamw": Rule("adamw_step_", _ADAM, {"weight_decay": 0.07, "betas": (0.9, 0.99)}),
    "adam": Rule(
        "adamw_step_", _ADAM, {"weight_decay": 0.07, "decoupled": False, "maximize": True}
    ),
}
OPS = {rule.op for rule in RULES.values()}


class Strengths(NamedTuple):
    lambda_reg: float | Tensor = 0.7
    lr: float | Tensor = 0.3
    grad_scale: float | Tensor | None = 1.9
    found_inf: float | Tensor | None = None

    def as_tensors(self, dtype: torch.dtype = torch.float64) -> Strengths:
        return Strengths(*(None if v is None else torch.tensor(v, dtype=dtype) for v in self))


@dataclass
class Problem:
    """A state, a rule, and the tensors that the rule keeps from step to step."""

    rule: Rule
    state: State
    moments: dict[str, list[Tensor]]
    steps: Tensor

    def lists(self) -> dict[str, list[Tensor]]:
        return {**self.moments, **self.state.lists()}

    def written(self) -> list[Tensor]:
        return [tensor for name in self.rule.written for tensor in self.lists()[name]]

    def cpu(self) -> Problem:
        """A copy to be judged by, or the same tensors where they are there already."""
        moments = {k: [t.cpu() for t in ts] for k, ts in self.moments.items()}
        state = State(*([t.cpu() for t in ts] for ts in self.state.lists().values()))
        return Problem(self.rule, state, moments, self.steps.cpu())

    def double(self) -> Problem:
        moments = {k: [t.double().clone() for t in ts] for k, ts in self.moments.items()}
        return Problem(self.rule, self.state.double(), moments, self.steps.double())


def make_problem(
    rule: Rule,
    dtypes: list[torch.dtype],
    shapes: list[tuple[int, ...]],
    layout: str = "contiguous",
    seed: int = 0,
    device: str = "cpu",
    kept: str | None = None,
) -> Problem:
    """As ``make_state``; second moments are positive, and every parameter is at another step."""
    generator = torch.Generator().manual_seed(seed + 1)
    moments = {}
    for k, name in enumerate(rule.moments):
        where = LAYOUTS[layout][k + 1]  # in "each_differently" not as the parameters
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        values = [v.square() + 0.1 if name == "exp_avg_sqs" else v for v in values]
        moments[name] = [where(v.to(d).to(device)) for v, d in zip(values, dtypes, strict=True)]
    state = make_state(dtypes, shapes, LAYOUTS[layout], seed, device, kept)
    steps = torch.arange(len(shapes), dtype=torch.float32).to(device)
    return Problem(rule, state, moments, steps)


def from_case(rule: Rule, case: Case, device: str = "cpu") -> Problem:
    seed = zlib.crc32(f"{case.dtype_name}-{case.shapes_name}".encode())
    dtypes = [case.dtype] * len(case.shapes)
    return make_problem(rule, dtypes, case.shapes, case.layout_name, seed, device, case.kept)


def call(
    module: ModuleType,
    problem: Problem,
    mode: str = "gradient",
    strengths: Strengths = Strengths(),  # noqa: B008
    **more: Any,
) -> Tensor:
    """Runs the rule's function of mas_ext.functional or mas_ext.reference."""
    keep: dict[str, Any] = dict(problem.moments)
    if problem.rule.op == "adamw_step_":
        keep["steps"] = problem.steps
    s = problem.state
    return getattr(module, problem.rule.op)(
        s.params,
        s.grads,
        s.anchors,
        s.omega,
        strengths.lambda_reg,
        strengths.lr,
        omega_scales=s.omega_scales,
        mode=mode,
        **{
            **keep,
            **problem.rule.options,
            "grad_scale": strengths.grad_scale,
            "found_inf": strengths.found_inf,
            **more,
        },
    )


def raw_arguments(
    problem: Problem,
    mode: str = "gradient",
    strengths: Strengths = Strengths(),  # noqa: B008
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """For ``torch.ops.mas_ext``, where scalars are tensors."""
    s, options = problem.state, dict(problem.rule.options)
    scalars = strengths.as_tensors()
    options |= {"grad_scale": scalars.grad_scale, "found_inf": scalars.found_inf}
    options["proximal"] = mode == "proximal"
    if problem.rule.op == "sgd_step_":
        kept = [problem.moments.get("momentum_buffers", [])]
    else:
        kept = [*problem.moments.values(), problem.steps]
        options |= dict(zip(("beta1", "beta2"), options.pop("betas", (0.9, 0.999)), strict=True))
    state = s.anchors, s.omega, s.omega_scales
    return (s.params, s.grads, *kept, *state, scalars.lambda_reg, scalars.lr), options


# ================================================================================================
# The oracle: the rules as torch's documentation has them, in float64
# ================================================================================================
class _Sum(NamedTuple):
    """A value, and the magnitude of the terms it is the sum of: rounding is relative to that."""

    value: Tensor
    size: Tensor

    def __add__(self, other: _Sum) -> _Sum:  # type: ignore[override]
        return _Sum(self.value + other.value, self.size + other.size)

    def times(self, factor: float | Tensor) -> _Sum:
        return _Sum(self.value * factor, self.size * abs(factor))


def _term(value: Tensor) -> _Sum:
    return _Sum(value, value.abs())


def _sgd(i: int, p: _Sum, g: _Sum, problem: Problem, lr: float) -> list[_Sum]:
    o = problem.rule.options
    g = g + p.times(o.get("weight_decay", 0.0))
    if not problem.moments:
        return [p + g.times(-lr)]
    buffer = _term(problem.moments["momentum_buffers"][i]).times(o["momentum"])
    buffer = buffer + g.times(1 - o.get("dampening", 0.0))
    walked = g + buffer.times(o["momentum"]) if o.get("nesterov") else buffer
    return [p + walked.times(-lr), buffer]


def _adam(i: int, p: _Sum, g: _Sum, problem: Problem, lr: float) -> list[_Sum]:
    o, t = problem.rule.options, float(problem.steps[i]) + 1
    beta1, beta2 = o.get("betas", (0.9, 0.999))
    decay, eps = o.get("weight_decay", 0.01), o.get("eps", 1e-8)
    if o.get("decoupled", True):
        p = p.times(1 - lr * decay)
    else:
        g = g + p.times(decay)
    m = _term(problem.moments["exp_avgs"][i]).times(beta1) + g.times(1 - beta1)
    # An error in g is doubled in g², whose own size is that of what cancelled in g.
    square = _Sum(g.value**2, 2 * g.size**2)
    v = _term(problem.moments["exp_avg_sqs"][i]).times(beta2) + square.times(1 - beta2)
    root = (v.value / (1 - beta2**t)).sqrt() + eps
    step = m.times(lr / (1 - beta1**t) / root)
    step = _Sum(step.value, step.size + step.value.abs() * v.size / v.value)
    return [p + step.times(-1.0), m, v]


def exact(
    problem: Problem,
    mode: str,
    strengths: Strengths = Strengths(),  # noqa: B008
) -> list[Exact]:
    """What is written, in the order of ``rule.written``, from the tensors before the call."""
    problem = problem.double()
    lambda_reg, lr = float(strengths.lambda_reg), float(strengths.lr)
    scale = 1.0 if strengths.grad_scale is None else float(strengths.grad_scale)
    sign = -1 if problem.rule.options.get("maximize") else 1
    rule = _sgd if problem.rule.op == "sgd_step_" else _adam
    results = []
    s = problem.state
    for i, (p, a, o) in enumerate(zip(s.params, s.anchors, s.omega, strict=True)):
        g = _term(s.grads[i] * (sign / scale))
        if mode == "gradient":
            g = g + _Sum(lambda_reg * o * (p - a), lambda_reg * o * (p - a).abs())
        moved, *moments = rule(i, _term(p), g, problem, lr)
        if mode == "proximal":
            c = lr * lambda_reg * o
            moved = _Sum((moved.value + c * a) / (1 + c), moved.size + a.abs())
        results.append([moved, *moments])
    by_list = zip(*results, strict=True)
    return [Exact(*element) for elements in by_list for element in elements]


def exact_value(before: Problem, after: Problem, mode: str, lambda_reg: float | Tensor) -> float:
    return exact_penalty((before if mode == "gradient" else after).state, lambda_reg)


def assert_right(
    before: Problem, after: Problem, value: Tensor, mode: str, strengths: Strengths
) -> None:
    """What a step wrote and returned, from the tensors before it and after it, on the CPU."""
    for actual, wanted in zip(after.written(), exact(before, mode, strengths), strict=True):
        assert_near(actual, wanted, times=TIMES)
    params = after.state.params
    all_double = bool(params) and all(t.dtype == torch.float64 for t in params)
    terms = torch.float64 if all_double else torch.float32
    wanted_value = exact_value(before, after, mode, strengths.lambda_reg)
    assert_value_near(value, wanted_value, dtype=terms)
