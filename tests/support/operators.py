"""The record of operators: what each takes, writes and computes, and how it is called.

To test a new operator, add a row to ``OPERATORS`` and its formula to :mod:`tests.support.exact`.
Its results, registration, refusals, compilation and CUDA kernels are then tested with every sample
of :mod:`tests.support.tensors`. An optimizer step has a row for each rule and mode.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.support import exact, low_rank, outer, tensors
from tests.support.exact import Exact, Formula, assert_near, assert_value_near
from tests.support.tensors import STATE_LISTS, State, make_state


class Scalars(NamedTuple):
    """Numbers that float32 cannot hold exactly, so that a rounding too many is noticed."""

    lambda_reg: float | Tensor = 0.7
    grad_scale: float | Tensor | None = 1.9
    lr: float | Tensor = 0.3
    scale: float = 0.6
    found_inf: float | Tensor | None = None

    def as_tensors(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Scalars:
        """As 0-dim tensors, but for the scale of the importance, which is always a number."""
        return Scalars(
            **{
                name: value
                if value is None or name == "scale"
                else torch.as_tensor(value, dtype=dtype).to(device)
                for name, value in self._asdict().items()
            }
        )

    def by_name(self) -> dict[str, Any]:
        """What ``_asdict()`` gives, which torch 2.7 does not compile."""
        return {name: getattr(self, name) for name in SCALARS}

    def numbers(self) -> dict[str, float | None]:
        return {k: None if v is None else float(v) for k, v in self._asdict().items()}


SCALARS = Scalars._fields


@dataclass(frozen=True, eq=False)
class Operator:
    function: str  # in mas_ext.functional, mas_ext.reference and torch.ops.mas_ext
    arguments: tuple[str, ...]  # positional, in order
    formula: Formula
    written: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    differentiable: bool = False
    times: float = 1  # how much more it may err than a few operations do

    @property
    def lists(self) -> list[str]:
        """The list arguments, without the scales of Ω; what is written comes first."""
        names = [n for n in (*self.arguments, *self.keywords) if n in STATE_LISTS and n != "steps"]
        return sorted(names, key=lambda name: name not in self.written)

    @property
    def moments(self) -> list[str]:
        return [name for name in self.keywords if name in STATE_LISTS]

    @property
    def scalars(self) -> list[str]:
        """Those that may be 0-dim tensors."""
        names = (*self.arguments, *self.keywords)
        return [name for name in names if name in Scalars._fields and name != "scale"]

    @property
    def has_penalty(self) -> bool:
        """Whether Ω is only read, may be stored in less, and the penalty is returned."""
        return "lambda_reg" in self.arguments

    @property
    def takes_lists(self) -> bool:
        return self.function not in SINGLE


# Operators on single tensors, and where their inputs are made.
SINGLE = {
    "accumulate_outer_": outer,
    "low_rank_penalty": low_rank,
    "low_rank_penalty_grad_": low_rank,
}


_ADAPTER = ("a", "b", "omega", "lambda_reg", "scale")
_STATE = ("params", "anchors", "omega", "lambda_reg")
_IMPORTANCE = Operator(
    "accumulate_importance_", ("omega", "grads", "scale"), exact.importance, ("omega",)
)
_OUTER = Operator(
    "accumulate_outer_", ("omega", "left", "right", "scale"), exact.outer, ("omega",), times=2.5
)
SQUARE = {"options": {"reduction": "square"}}
OPERATORS = {
    "accumulate_importance_": _IMPORTANCE,
    "accumulate_importance_ square": replace(_IMPORTANCE, **SQUARE),
    "accumulate_outer_": _OUTER,
    "accumulate_outer_ square": replace(_OUTER, **SQUARE),
    "penalty": Operator("penalty", _STATE, exact.nothing, differentiable=True),
    "penalty_and_grad": Operator("penalty_and_grad", _STATE, exact.gradient, differentiable=True),
    "add_penalty_grad_": Operator(
        "add_penalty_grad_",
        ("grads", *_STATE, "grad_scale"),
        exact.added_gradient,
        ("grads",),
    ),
    "proximal_step_": Operator("proximal_step_", (*_STATE, "lr"), exact.proximal, ("params",)),
    "low_rank_penalty": Operator("low_rank_penalty", _ADAPTER, exact.nothing),
    "low_rank_penalty_grad_": Operator(
        "low_rank_penalty_grad_",
        ("grad_a", "grad_b", *_ADAPTER),
        exact.low_rank_gradient,
        ("grad_a", "grad_b"),
        times=2.5,
    ),
}

MODES = ("gradient", "proximal")
# Rule → function, moments and options; a row for each mode.
RULES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "sgd": ("sgd_step_", (), {"weight_decay": 0.03}),
    "momentum": (
        "sgd_step_",
        ("momentum_buffers",),
        {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.03},
    ),
    "nesterov": (
        "sgd_step_",
        ("momentum_buffers",),
        {"momentum": 0.9, "nesterov": True, "maximize": True},
    ),
    "adamw": (
        "adamw_step_",
        ("exp_avgs", "exp_avg_sqs"),
        {"weight_decay": 0.07, "betas": (0.9, 0.99)},
    ),
    "adam": (
        "adamw_step_",
        ("exp_avgs", "exp_avg_sqs"),
        {"decoupled": False, "maximize": True},
    ),
}


def step_operator(
    function: str, moments: tuple[str, ...], options: dict[str, Any], mode: str
) -> Operator:
    steps = ("steps",) if function == "adamw_step_" else ()
    return Operator(
        function,
        ("params", "grads", "anchors", "omega", "lambda_reg", "lr"),
        exact.adam if steps else exact.sgd,
        ("params", *moments),
        (*moments, *steps, "grad_scale", "found_inf"),
        {**options, "mode": mode},
        times=2,  # twenty operations in a row
    )


OPERATORS |= {
    f"{rule} {mode}": step_operator(*row, mode) for rule, row in RULES.items() for mode in MODES
}
STEPS = [f"{rule} {mode}" for rule in RULES for mode in MODES]
ALL = list(OPERATORS)
OPS = [op for op in ALL if op not in STEPS and OPERATORS[op].takes_lists]  # steps are apart
OUTER_OPS = [op for op in ALL if OPERATORS[op].function == "accumulate_outer_"]
LOW_RANK_OPS = [op for op in ALL if SINGLE.get(OPERATORS[op].function) is low_rank]
PENALTY_OPS = [op for op in OPS if OPERATORS[op].has_penalty]
WRITING = [op for op in ALL if OPERATORS[op].written]
DIFFERENTIABLE = [op for op in ALL if OPERATORS[op].differentiable]


def samples(op: str) -> list[tensors.Sample] | list[outer.Sample] | list[low_rank.Sample]:
    """All for the operators on lists; every second one for each row of the optimizer steps."""
    if not OPERATORS[op].takes_lists:
        return SINGLE[OPERATORS[op].function].SAMPLES
    every = tensors.SAMPLES + (tensors.KEPT_SAMPLES if OPERATORS[op].has_penalty else [])
    return every[(STEPS.index(op) + 1) // 2 % 2 :: 2] if op in STEPS else every


def make(op: str, dtypes: list[torch.dtype], shapes: list[tuple[int, ...]], **more: Any) -> State:
    """As ``make_state``, with the operator's moments."""
    return make_state(dtypes, shapes, moments=OPERATORS[op].moments, **more)


def small(op: str, dtype: torch.dtype = torch.float32, **more: Any) -> State:
    """A few tensors of any operator."""
    if not OPERATORS[op].takes_lists:
        inputs = SINGLE[OPERATORS[op].function]
        return inputs.make(inputs.SMALL, dtype, **more)
    return make(op, [dtype] * 2, [(33,), (4, 5)], **more)


def medium(op: str, dtype: torch.dtype = torch.float32, **more: Any) -> State:
    """Single tensors of more than one tile of the CUDA kernels."""
    inputs = SINGLE[OPERATORS[op].function]
    return inputs.make(inputs.MEDIUM, dtype, **more)


def lists_of(op: str, state: State) -> dict[str, list[Tensor]]:
    """All that the operator is given, by name."""
    names = [*OPERATORS[op].lists, "steps", "omega_scales"]
    return {name: getattr(state, name) for name in names if getattr(state, name)}


def written(op: str, state: State) -> list[Tensor]:
    return [t for name in OPERATORS[op].written for t in getattr(state, name)]


def written_argument(op: str) -> str | None:
    return next(iter(OPERATORS[op].written), None)


def list_arguments(op: str) -> list[str]:
    return OPERATORS[op].lists


# -- Calls -----------------------------------------------------------------------------------------
def _given(op: str, state: State) -> dict[str, Any]:
    """The lists, or the single tensors that the operator takes in their place."""
    # Not vars(), which torch 2.7 does not compile.
    lists = {name: getattr(state, name) for name in STATE_LISTS}
    if OPERATORS[op].takes_lists:
        return {**lists, "steps": state.steps[0] if state.steps else []}
    return {name: ts[0] if ts else None for name, ts in lists.items()}


def arguments(op: str, state: State, scalars: Scalars = Scalars()) -> list[Any]:  # noqa: B008
    """The positional ones."""
    known = {**_given(op, state), **scalars.by_name()}
    return [known[name] for name in OPERATORS[op].arguments]


def raw_arguments(op: str, state: State, scalars: Scalars = Scalars()) -> list[Any]:  # noqa: B008
    """For ``torch.ops.mas_ext``, in the schema's order; scalars are tensors there."""
    options = OPERATORS[op].options
    known = {**_given(op, state), **scalars.as_tensors()._asdict(), **options}
    known["proximal"] = options.get("mode") == "proximal"
    known["square"] = options.get("reduction") == "square"
    known["beta1"], known["beta2"] = options.get("betas", (0.9, 0.999))
    return [known.get(a.name, a.default_value) for a in raw(op)._schema.arguments]


def raw(op: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.mas_ext, OPERATORS[op].function).default


class Outcome(NamedTuple):
    value: Tensor | None
    tensors: list[Tensor]  # what was written or, for penalty_and_grad, returned


def call(
    module: ModuleType,
    op: str,
    state: State,
    scalars: Scalars = Scalars(),  # noqa: B008
    **more: Any,
) -> Outcome:
    """Runs the function of ``module``, which is mas_ext.functional or mas_ext.reference."""
    row = OPERATORS[op]
    known = {**_given(op, state), **scalars.by_name()}
    keywords = {**{name: known[name] for name in row.keywords}, **row.options}
    if state.omega_scales:
        keywords["omega_scales"] = known["omega_scales"]
    positional = arguments(op, state, scalars)
    result = getattr(module, row.function)(*positional, **{**keywords, **more})
    if op == "penalty_and_grad":
        return Outcome(*result)
    return Outcome(result, written(op, state))


# -- The oracle ------------------------------------------------------------------------------------
def exact_tensors(op: str, before: State, scalars: Scalars = Scalars()) -> list[Exact]:  # noqa: B008
    """What is to be written or returned, from the tensors as they are before the call."""
    row = OPERATORS[op]
    columns = row.formula(before.double(), {**scalars.numbers(), **row.options})
    return [element for column in columns for element in column]


def exact_value(op: str, before: State, outcome: Outcome, scalars: Scalars) -> tuple[float, float]:
    """The penalty before the call or, where the operator is proximal, after it; and how far from it
    its terms may be."""
    if op in LOW_RANK_OPS:
        return exact.low_rank_value(before, scalars.numbers())
    state = State(before.params, before.anchors, before.omega, [], before.omega_scales)
    if "proximal" in op:
        state.params = [t.cpu() for t in outcome.tensors[: len(before.params)]]
    return exact.penalty_value(state, scalars.lambda_reg), 0.0


def terms_dtype(state: State) -> torch.dtype:
    """The loosest in which terms of the penalty are formed."""
    doubles = [p.dtype == torch.float64 for p in (*state.params, *state.a)]
    return torch.float64 if doubles and all(doubles) else torch.float32


def assert_right(
    op: str,
    before: State,
    outcome: Outcome,
    scalars: Scalars = Scalars(),  # noqa: B008
    dust: list[Tensor] | None = None,
    value_dust: float = 0.0,
    what: str = "",
) -> None:
    """Judges all that came of a call, from the tensors as they were before it."""
    wanted = exact_tensors(op, before, scalars)
    lost = dust or [0.0] * len(wanted)
    for actual, one, less in zip(outcome.tensors, wanted, lost, strict=True):
        assert_near(actual.cpu(), one, times=OPERATORS[op].times, dust=less, what=what)
    assert (outcome.value is not None) == OPERATORS[op].has_penalty
    if outcome.value is not None:
        double = any(p.dtype == torch.float64 for p in (*before.params, *before.a))
        assert outcome.value.dtype == (torch.float64 if double else torch.float32)
        value, off = exact_value(op, before, outcome, scalars)
        dtype = terms_dtype(before)
        assert_value_near(outcome.value.cpu(), value, dtype=dtype, dust=value_dust + off)
