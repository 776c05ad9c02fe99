"""The cases that the operators' tests run through, and the float64 oracle they are judged by.

THE place to add a case: a dtype to ``DTYPES``, a list of shapes to ``SHAPES``, a memory layout to
``LAYOUTS``, a way to keep Ω to ``KEPT``. Every operator then meets it in ``test_functional.py``,
``test_steps.py`` and ``test_ops.py``.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mas_ext.precision import compress_, num_scales

# ================================================================================================
# The table
# ================================================================================================
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Beside float64 values Ω is always wide, in the accumulation dtype.
KEPT = {"bfloat16": torch.bfloat16, "uint8": torch.uint8}

# The CPU kernels keep 16 partial sums (of bfloat16 twice as many), cut tensors into chunks of 16384
# elements and wake threads from 131072 elements on (test_functional.py has larger ones); 256 codes
# of Ω share a scale, and 1024 are expanded at a time. The CUDA kernels cut tensors into chunks of
# 8192. Below, at and above each.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "empty_list": [],
    "zero_size": [(0,), (3, 0, 2)],
    "0_dim": [()],
    "one_element": [(1,)],
    "odd": [(3,), (7, 5), (13,)],
    "15_16_17": [(15,), (16,), (17,)],
    "31_32_33": [(31,), (32,), (33,)],
    "255_256_257": [(255,), (256,), (257,)],
    "1023_1024_1025": [(1023,), (1024,), (1025,)],
    "8191_8192_8193": [(8191,), (8192,), (8193,)],
    "16383": [(16383,)],
    "16384": [(16384,)],
    "16385": [(16385,)],
    "several_chunks": [(16383,), (128, 128), (16385,)],
    "matrix": [(31, 17)],
    "conv": [(8, 3, 5, 5), (4, 8, 1, 1)],
    "mixed": [(5,), (), (0, 4), (33, 7), (1,), (8, 3, 3, 3), (17,)],
}


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def transposed(tensor: Tensor) -> Tensor:
    """The same values, the first dimension fastest."""
    reverse = list(reversed(range(tensor.dim())))
    return contiguous(tensor.permute(reverse)).permute(reverse)


def channels_last(tensor: Tensor) -> Tensor:
    if tensor.dim() != 4:
        return contiguous(tensor)
    return tensor.clone(memory_format=torch.channels_last)


def sliced(tensor: Tensor) -> Tensor:
    """The same values, every second place of its memory: not dense."""
    base = tensor.new_full((*tensor.shape, 2), math.nan)
    base[..., 0] = tensor
    return base[..., 0]


def behind(tensor: Tensor, elements: int) -> Tensor:
    """The same values, so many elements behind an aligned address, with as many after them."""
    around = math.nan if tensor.is_floating_point() else 255
    base = tensor.new_full((tensor.numel() + 2 * elements,), around)
    view = base[elements : elements + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


def unaligned(tensor: Tensor) -> Tensor:
    return behind(tensor, 1)


Layout = Callable[[Tensor], Tensor]

# How params, anchors, omega and grads lie in memory.
LAYOUTS: dict[str, tuple[Layout, Layout, Layout, Layout]] = {
    "contiguous": (contiguous,) * 4,
    "transposed": (transposed,) * 4,
    "channels_last": (channels_last,) * 4,
    "sliced": (sliced,) * 4,
    "unaligned": (unaligned,) * 4,
    "params_transposed": (transposed, contiguous, contiguous, contiguous),
    "each_differently": (channels_last, transposed, sliced, unaligned),
}

# Layouts that change nothing below this number of dimensions.
_NEEDS_DIMENSIONS = {"transposed": 2, "params_transposed": 2, "channels_last": 4}


# ================================================================================================
# From a case to tensors
# ================================================================================================
def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class State:
    """One tensor a parameter in every list."""

    params: list[Tensor]
    anchors: list[Tensor]
    omega: list[Tensor]
    grads: list[Tensor]
    omega_scales: list[Tensor] = field(default_factory=list)  # where Ω may be in codes

    def lists(self) -> dict[str, list[Tensor]]:
        return {k: ts for k, ts in vars(self).items() if ts or k != "omega_scales"}

    def double(self) -> State:
        """A float64 copy, exact, of Ω as it is meant."""
        lists = {k: [t.detach().double().clone() for t in ts] for k, ts in self.lists().items()}
        for omega, kept, scales in zip(lists["omega"], self.omega, self.omega_scales, strict=False):
            if kept.dtype == torch.uint8:
                _expand(omega, kept, scales)
        return State(*list(lists.values())[:4])


def _expand(omega: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Ω = s·(q/255)², where 256 neighbours in the codes' memory share s."""
    flat = codes.as_strided((codes.numel(),), (1,))
    scale = scales.double().repeat_interleave(256)[: codes.numel()]
    memory = torch.empty_like(codes, dtype=torch.float64)
    memory.as_strided((codes.numel(),), (1,)).copy_(scale * (flat.double() / 255) ** 2)
    omega.copy_(memory)


def compressed(omega: Tensor, layout: Layout = contiguous) -> tuple[Tensor, Tensor]:
    """Its codes, dense in the order of ``layout``, and their scales."""
    codes = (contiguous if layout is sliced else layout)(torch.zeros_like(omega, dtype=torch.uint8))
    scales = omega.new_empty(num_scales(omega.numel()), dtype=torch.float32)
    compress_(codes, scales, omega)
    return codes, scales


def make_state(
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[tuple[int, ...]],
    layouts: tuple[Layout, Layout, Layout, Layout] = LAYOUTS["contiguous"],
    seed: int = 0,
    device: str | torch.device = "cpu",
    kept: str | None = None,
) -> State:
    """Normal values; Ω ≥ 0 with a quarter of exact zeros, as a network with dead units has.

    The same values on every device, where they are then laid out. Ω is in the accumulation dtype,
    or beside values other than float64 as one of ``KEPT``.
    """
    generator = torch.Generator().manual_seed(seed)
    state, all_scales = State([], [], [], []), []
    for dtype, shape in zip(dtypes, shapes, strict=True):
        params, anchors, omega, grads = torch.randn(4, *shape, generator=generator).unbind()
        omega = omega.abs() * (torch.rand(shape, generator=generator) > 0.25)
        values = [params.to(dtype), anchors.to(dtype), omega, grads.to(dtype)]
        keeps = kept is not None and dtype != torch.float64
        values[2] = omega.to(KEPT["bfloat16"] if keeps else accumulation_dtype(dtype))
        for tensors, value, layout in zip(state.lists().values(), values, layouts, strict=True):
            tensors.append(layout(value.to(device)))
        if kept == "uint8":
            scales = torch.empty(0, device=device)
            if keeps:
                state.omega[-1], scales = compressed(omega.to(device), layouts[2])
            all_scales.append(scales)
    state.omega_scales = all_scales
    return state


@dataclass(frozen=True)
class Case:
    dtype_name: str
    shapes_name: str
    layout_name: str
    kept: str | None = None

    def __str__(self) -> str:
        name = f"{self.dtype_name}-{self.shapes_name}-{self.layout_name}"
        return f"{name}-{self.kept}_omega" if self.kept else name

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return SHAPES[self.shapes_name]

    def state(self, device: str = "cpu") -> State:
        """The case's tensors; the same values at every call, in every layout, on every device."""
        seed = zlib.crc32(f"{self.dtype_name}-{self.shapes_name}".encode())
        dtypes = [self.dtype] * len(self.shapes)
        return make_state(dtypes, self.shapes, LAYOUTS[self.layout_name], seed, device, self.kept)


def _is_worthwhile(case: Case) -> bool:
    dimensions = max((len(shape) for shape in case.shapes), default=0)
    if not case.shapes:
        return case.layout_name == "contiguous"
    return dimensions >= _NEEDS_DIMENSIONS.get(case.layout_name, 0)


CASES = [
    case
    for dtype in DTYPES
    for shapes in SHAPES
    for layout in LAYOUTS
    if _is_worthwhile(case := Case(dtype, shapes, layout))
]

# Where Ω is only read it may be kept in less: what that has to do with.
_KEPT_SHAPES = [
    "empty_list",
    "zero_size",
    "255_256_257",
    "1023_1024_1025",
    "16385",
    "conv",
    "mixed",
]
_KEPT_LAYOUTS = ["contiguous", "transposed", "unaligned", "params_transposed", "each_differently"]
KEPT_CASES = [
    case
    for dtype, kept in [
        ("float32", "uint8"),
        ("float32", "bfloat16"),
        ("bfloat16", "uint8"),
        ("bfloat16", "bfloat16"),
        ("float16", "uint8"),
    ]
    for shapes in _KEPT_SHAPES
    for layout in _KEPT_LAYOUTS
    if _is_worthwhile(case := Case(dtype, shapes, layout, kept))
]


# ================================================================================================
# The operators, called alike
# ================================================================================================
class Scalars(NamedTuple):
    """Numbers that float32 cannot hold exactly, so that a rounding too many is seen."""

    lambda_reg: float | Tensor = 0.7
    grad_scale: float | Tensor | None = 1.9
    lr: float | Tensor = 0.3
    scale: float = 0.6

    def as_tensors(self, dtype: torch.dtype = torch.float64) -> Scalars:
        """λ, s and η as 0-dim tensors; the scale of the importance is always a number."""
        tensors = [torch.as_tensor(value, dtype=dtype) for value in self[:3]]
        return Scalars(*tensors, scale=self.scale)


# What an operator takes, in order.
ARGUMENTS = {
    "accumulate_importance_": ("omega", "grads", "scale"),
    "penalty": ("params", "anchors", "omega", "lambda_reg"),
    "penalty_and_grad": ("params", "anchors", "omega", "lambda_reg"),
    "add_penalty_grad_": ("grads", "params", "anchors", "omega", "lambda_reg", "grad_scale"),
    "proximal_step_": ("params", "anchors", "omega", "lambda_reg", "lr"),
}
OPS = list(ARGUMENTS)
WRITING_OPS = [op for op in OPS if op.endswith("_")]
PENALTY_OPS = [op for op in OPS if "lambda_reg" in ARGUMENTS[op]]
READING_OPS = [op for op in OPS if not op.endswith("_")]
OP_CASES = [(op, case) for op in OPS for case in CASES]
OP_CASES += [(op, case) for op in PENALTY_OPS for case in KEPT_CASES]


def list_arguments(op: str) -> list[str]:
    return [name for name in ARGUMENTS[op] if name not in Scalars._fields]


def written_argument(op: str) -> str | None:
    return ARGUMENTS[op][0] if op in WRITING_OPS else None


def arguments(op: str, state: State, scalars: Scalars = Scalars()) -> list:  # noqa: B008
    known = {**state.lists(), **scalars._asdict()}
    return [known[name] for name in ARGUMENTS[op]]


def raw_arguments(op: str, state: State, scalars: Scalars = Scalars()) -> list:  # noqa: B008
    """For ``torch.ops.mas_ext``, where scalars are tensors and Ω's scales come behind it."""
    inputs = arguments(op, state, scalars.as_tensors())
    if op in PENALTY_OPS:
        inputs.insert(ARGUMENTS[op].index("omega") + 1, state.omega_scales)
    return inputs


class Outcome(NamedTuple):
    value: Tensor | None
    tensors: list[Tensor]  # what was written or, for penalty_and_grad, returned


def call(module: ModuleType, op: str, state: State, scalars: Scalars = Scalars()) -> Outcome:  # noqa: B008
    """Runs ``module.op``, module being mas_ext.functional or mas_ext.reference."""
    scales = {"omega_scales": state.omega_scales} if state.omega_scales else {}
    result = getattr(module, op)(*arguments(op, state, scalars), **scales)
    if op == "penalty_and_grad":
        return Outcome(*result)
    written = written_argument(op)
    return Outcome(result, state.lists()[written] if written else [])


# ================================================================================================
# The oracle: the formulas as the paper has them, in float64
# ================================================================================================
def exact_penalty(state: State, lambda_reg: float | Tensor) -> float:
    state = state.double()
    pieces = zip(state.params, state.anchors, state.omega, strict=True)
    return (
        0.5 * float(lambda_reg) * math.fsum(float((o * (p - a) ** 2).sum()) for p, a, o in pieces)
    )


class Exact(NamedTuple):
    values: Tensor
    magnitude: Tensor  # of the terms they are the sum of: rounding errors are relative to it


def _exact_accumulate(state: State, scalars: Scalars) -> list[Exact]:
    results = [o + scalars.scale * g.abs() for o, g in zip(state.omega, state.grads, strict=True)]
    return [Exact(result, result) for result in results]


def _exact_gradient(state: State, scalars: Scalars) -> list[Exact]:
    pieces = zip(state.params, state.anchors, state.omega, strict=True)
    results = [float(scalars.lambda_reg) * o * (p - a) for p, a, o in pieces]
    return [Exact(result, result.abs()) for result in results]


def _exact_add_gradient(state: State, scalars: Scalars) -> list[Exact]:
    scale = 1.0 if scalars.grad_scale is None else float(scalars.grad_scale)
    gradient = [scale * exact.values for exact in _exact_gradient(state, scalars)]
    pairs = list(zip(state.grads, gradient, strict=True))
    return [Exact(g + d, g.abs() + d.abs()) for g, d in pairs]


def _exact_proximal(state: State, scalars: Scalars) -> list[Exact]:
    step = float(scalars.lambda_reg) * float(scalars.lr)
    results = []
    for p, a, o in zip(state.params, state.anchors, state.omega, strict=True):
        c = step * o
        results.append(Exact((p + c * a) / (1 + c), p.abs() + a.abs()))
    return results


_EXACT = {
    "accumulate_importance_": _exact_accumulate,
    "penalty": lambda state, scalars: [],
    "penalty_and_grad": _exact_gradient,
    "add_penalty_grad_": _exact_add_gradient,
    "proximal_step_": _exact_proximal,
}


def exact_tensors(op: str, state: State, scalars: Scalars = Scalars()) -> list[Exact]:  # noqa: B008
    """What ``op`` should write or return, from the tensors as they are before the call."""
    return _EXACT[op](state.double(), scalars)


# ================================================================================================
# Tolerances
# ================================================================================================
# Relative errors of a few operations in the accumulation dtype, and of a penalty's sum.
ARITHMETIC = {torch.float32: 1.3e-6, torch.float64: 4e-15}
VALUE = {torch.float32: 1e-6, torch.float64: 1e-13}


def smallest_step(dtype: torch.dtype) -> float:
    """The smallest subnormal: what underflow may cost."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


def rounding(dtype: torch.dtype) -> float:
    """One rounding to a dtype narrower than its accumulation; part of ``ARITHMETIC`` otherwise."""
    return 0.0 if dtype in ARITHMETIC else torch.finfo(dtype).eps / 2


def assert_near(
    actual: Tensor, exact: Exact, *, times: float = 1, dust: float | Tensor = 0.0
) -> None:
    """Each element within the arithmetic's error and one rounding to its dtype.

    ``dust`` is an absolute error for values that may underflow on the way.
    """
    dtype = actual.dtype
    bound = ARITHMETIC[accumulation_dtype(dtype)] * exact.magnitude
    bound = times * (bound + rounding(dtype) * exact.values.abs() + smallest_step(dtype)) + dust
    actual = actual.detach().double()
    error = (actual - exact.values).abs()
    # What float64 puts beyond the dtype's range must be infinite there, with its sign.
    beyond = exact.values.abs() + bound > torch.finfo(dtype).max
    overflown = beyond & (actual == exact.values.sign() * math.inf)
    assert actual.shape == exact.values.shape
    right = (error <= bound) | overflown
    assert bool(right.all()), f"off by up to {(error / bound)[~right].max():.3g} x the bound"


def assert_value_near(
    actual: Tensor, exact: float, *, dtype: torch.dtype = torch.float32, dust: float = 0.0
) -> None:
    """A penalty within the tolerance of sums formed in ``dtype``."""
    bound = VALUE[accumulation_dtype(dtype)] * abs(exact) + smallest_step(actual.dtype) + dust
    assert actual.shape == ()
    assert abs(float(actual) - exact) <= bound, f"{float(actual)!r} is not {exact!r}"
