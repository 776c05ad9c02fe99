"""The operators and the codec on what hypothesis draws: shapes, strides, aliases, magnitudes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mas_ext import functional, precision
from tests.support import outer, tensors
from tests.support.exact import smallest_step
from tests.support.operators import (
    MODES,
    OPERATORS,
    OPS,
    OUTER_OPS,
    PENALTY_OPS,
    RULES,
    STEPS,
    WRITING,
    Scalars,
    assert_right,
    call,
    list_arguments,
    make,
    step_operator,
    written_argument,
)
from tests.support.tensors import DTYPES, KEPT, Sample, State, accumulation_dtype, compressed

PROFILE = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
WRITING_OPS = [op for op in OPS if op in WRITING]

# -- Strategies ------------------------------------------------------------------------------------
LAYOUTS = {
    name: getattr(tensors, name)
    for name in ("contiguous", "transposed", "channels_last", "sliced", "unaligned")
}
NAMES = ["params", "anchors", "omega", "grads"]
NARROW = torch.float16  # overflows at 65504, so its magnitudes are drawn from fewer powers of ten

small_shapes = st.lists(st.integers(0, 5), max_size=4)
# Around the 16 lanes and the chunks of 16384 elements that the kernels cut by.
long_shapes = st.sampled_from([15, 16, 17, 31, 33, 257, 16383, 16384, 16385]).map(lambda n: [n])
shapes = st.one_of(*[small_shapes] * 7, long_shapes)
seeds = st.integers(0, 2**31 - 1)


def magnitudes(dtype: torch.dtype) -> st.SearchStrategy[dict[str, int]]:
    """Powers of ten that values are multiplied by."""
    wide, importance = st.integers(-20, 10), st.integers(-20, 10)
    if dtype == NARROW:
        wide, importance = st.integers(-4, 1), st.integers(-6, 0)
    return st.fixed_dictionaries({n: importance if n == "omega" else wide for n in NAMES})


@dataclass
class Draw:
    """One parameter's tensors, to be made as often as wanted."""

    dtype: torch.dtype
    shape: list[int]
    seed: int
    magnitudes: dict[str, int]
    layouts: dict[str, str]
    expanded: set[str] = field(default_factory=set)  # lists that hold one value, expanded

    def tensor(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + NAMES.index(name))
        value = torch.rand(self.shape, generator=generator, dtype=torch.float64)
        value = value if name == "omega" else 2 * value - 1
        if name == "omega":
            value[torch.rand(self.shape, generator=generator) < 0.2] = 0
        value = value * 10.0 ** self.magnitudes[name]
        value = value.to(accumulation_dtype(self.dtype) if name == "omega" else self.dtype)
        if name in self.expanded and value.numel() > 0:
            return value.flatten()[0].expand(self.shape)
        return LAYOUTS[self.layouts[name]](value)


def draws(op: str) -> st.SearchStrategy[Draw]:
    readable = [name for name in NAMES if name != written_argument(op)]
    layouts = st.fixed_dictionaries({name: st.sampled_from(list(LAYOUTS)) for name in NAMES})
    expanded = st.one_of(st.just(set()), st.sets(st.sampled_from(readable)))
    return st.sampled_from(list(DTYPES.values())).flatmap(
        lambda dtype: st.builds(
            Draw, st.just(dtype), shapes, seeds, magnitudes(dtype), layouts, expanded
        )
    )


scalars = st.builds(
    Scalars,
    lambda_reg=st.one_of(st.just(0.0), st.floats(1e-3, 1e3)),
    grad_scale=st.one_of(st.none(), st.floats(1e-3, 16)),
    lr=st.one_of(st.just(0.0), st.floats(1e-4, 10)),
    scale=st.one_of(st.just(0.0), st.floats(1e-3, 1e3)),
    found_inf=st.none(),
)


# -- What is asserted: float64's result, less what underflow may take ------------------------------
def dust(param: Tensor, anchor: Tensor) -> Tensor:
    """A product that underflows loses up to a smallest step, which δ then multiplies."""
    delta = (param.double() - anchor.double()).abs()
    return 4 * smallest_step(accumulation_dtype(param.dtype)) * (delta + 1)


def check(op: str, make: Callable[[], State], given: Scalars = Scalars()) -> None:  # noqa: B008
    """Runs ``op`` on one copy of what ``make`` makes and judges it by another."""
    before, state = make(), make()
    outcome = call(functional, op, state, given)
    times = max(1.0, given.scale) if "scale" in OPERATORS[op].arguments else 1.0
    lost = [times * dust(p, a) for p, a in zip(before.params, before.anchors, strict=True)]
    value_lost = float(given.lambda_reg) * sum(float(piece.sum()) for piece in lost)
    uses_dust = lost if op in OPS and outcome.tensors else None
    assert_right(op, before, outcome, given, uses_dust, value_lost)


# -- The operators on lists ------------------------------------------------------------------------
@pytest.mark.parametrize("op", OPS)
@settings(PROFILE, max_examples=100)
@given(data=st.data(), given=scalars, kind=st.sampled_from([None, torch.float32, torch.float64]))
def test_float64_oracle(op: str, data: st.DataObject, given: Scalars, kind: Any) -> None:
    drawn = data.draw(st.lists(draws(op), max_size=4))

    def make_drawn() -> State:
        return State(**{name: [draw.tensor(name) for draw in drawn] for name in NAMES})

    check(op, make_drawn, given.as_tensors(kind) if kind else given)


@pytest.mark.parametrize("op", [*OPS, *STEPS[::4]])
@settings(PROFILE, max_examples=40)
@given(size=st.integers(1, 70), shift=st.integers(0, 70), equal=st.booleans(), seed=seeds)
def test_read_only_arguments_may_share_memory(
    op: str, size: int, shift: int, equal: bool, seed: int
) -> None:
    """Each list argument that is only read is a window into one base, shifted or the very same."""

    def make_aliased() -> State:
        state = make(op, [torch.float32] * 2, [(size,)] * 2, seed=seed)
        base = torch.rand(size + 3 * shift, generator=torch.Generator().manual_seed(seed))
        readable = [n for n in list_arguments(op) if n not in OPERATORS[op].written]
        for k, name in enumerate(readable):
            window = base[:size] if equal else base[k * shift :][:size]
            getattr(state, name)[:] = [window, window]
        return state

    check(op, make_aliased)


@pytest.mark.parametrize("op", WRITING_OPS)
@settings(PROFILE, max_examples=40)
@given(
    rows=st.integers(1, 90),
    count=st.integers(1, 4),
    width=st.integers(1, 3),
    dtype=st.sampled_from(list(DTYPES.values())),
    seed=seeds,
)
@example(rows=20_000, count=3, width=1, dtype=torch.float32, seed=0)
def test_interleaved_columns_are_written_apart(
    op: str, rows: int, count: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    """Tensor k holds the columns k, k + count, … of one base: ranges meet, elements do not."""

    def make_interleaved() -> State:
        state = make(op, [dtype] * count, [(rows, width)] * count, seed=seed)
        written = getattr(state, written_argument(op) or "")
        base = torch.stack(written, dim=2).flatten(1)
        written[:] = [base[:, k::count] for k in range(count)]
        return state

    check(op, make_interleaved)


@pytest.mark.parametrize("op", PENALTY_OPS)
@settings(PROFILE, max_examples=40)
@given(
    shape=shapes,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kept=st.sampled_from(list(KEPT)),
    layouts=st.tuples(*[st.sampled_from(list(LAYOUTS.values()))] * 4),
    shared=st.booleans(),
    seed=seeds,
)
def test_an_omega_that_is_stored_in_less(
    op: str, shape: list[int], dtype: torch.dtype, kept: str, layouts: Any, shared: bool, seed: int
) -> None:
    """Any shape, any strides of each; one memory for two parameters' codes and scales."""

    def make_kept() -> State:
        more = {"layouts": layouts, "seed": seed, "kept": kept}
        state = make(op, [dtype] * 2, [tuple(shape)] * 2, **more)
        if shared:
            state.omega[1] = state.omega[0]
            state.omega_scales[1:] = state.omega_scales[:1]
        return state

    check(op, make_kept)


windows = st.tuples(
    st.integers(0, 12),  # offset
    st.tuples(st.integers(1, 4), st.integers(1, 4)),  # shape
    st.tuples(st.integers(0, 9), st.integers(0, 9)),  # strides
)
Window = tuple[int, tuple[int, int], tuple[int, int]]


def places(window: Window) -> list[int]:
    """Which elements of the base a window covers."""
    offset, (n, m), (down, right) = window
    return [offset + i * down + j * right for i in range(n) for j in range(m)]


def are_apart(written: Window, read: Window) -> bool:
    covered = places(written)
    return len(set(covered)) == len(covered) and not set(covered) & set(places(read))


@pytest.mark.parametrize("op", WRITING_OPS)
@settings(PROFILE, max_examples=150)
@given(written=windows, read=windows, seed=seeds)
def test_shared_memory_is_refused_exactly_where_there_is_some(
    op: str, written: Window, read: Window, seed: int
) -> None:
    read = (read[0], written[1], read[2])

    def make_windows() -> State:
        state = make(op, [torch.float32], [written[1]], seed=seed)
        base = torch.rand(80, generator=torch.Generator().manual_seed(seed))
        first, second = list_arguments(op)[:2]
        for name, (offset, shape, strides) in [(first, written), (second, read)]:
            getattr(state, name)[:] = [base.as_strided(shape, strides, offset)]
        return state

    if are_apart(written, read):
        check(op, make_windows)
    else:
        with pytest.raises(RuntimeError, match=r"is written but (shares memory|overlaps itself)"):
            call(functional, op, make_windows())


# -- The optimizer steps with any options ----------------------------------------------------------
OPTIONS = {
    "momentum": st.fixed_dictionaries(
        {
            "momentum": st.sampled_from([0.3, 0.99]),
            "dampening": st.sampled_from([0.0, 0.7, 1.0]),
            "weight_decay": st.sampled_from([0.0, 0.2]),
            "maximize": st.booleans(),
        }
    ),
    "adamw": st.fixed_dictionaries(
        {
            "betas": st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.0, 0.999])),
            "eps": st.sampled_from([1e-8, 1e-3, 1.0]),
            "weight_decay": st.sampled_from([0.0, 0.2]),
            "decoupled": st.booleans(),
            "maximize": st.booleans(),
        }
    ),
}
STEP_SAMPLES = [
    sample
    for sample in [*tensors.SAMPLES, *tensors.KEPT_SAMPLES]
    if sample.shapes in ("odd", "15_16_17", "mixed")
]


@pytest.mark.parametrize("rule", OPTIONS)
@settings(PROFILE, max_examples=100)
@given(
    data=st.data(),
    sample=st.sampled_from(STEP_SAMPLES),
    mode=st.sampled_from(MODES),
    given=st.builds(
        Scalars,
        lambda_reg=st.one_of(st.just(0.0), st.floats(1e-3, 1e2)),
        lr=st.one_of(st.just(0.0), st.floats(1e-4, 1.0)),
        grad_scale=st.one_of(st.none(), st.floats(0.1, 16)),
        scale=st.just(1.0),
        found_inf=st.none(),
    ),
)
def test_any_options(
    rule: str, data: st.DataObject, sample: Sample, mode: str, given: Scalars
) -> None:
    function, moments, _ = RULES[rule]
    op = f"{rule} {mode} as drawn"
    OPERATORS[op] = step_operator(function, moments, data.draw(OPTIONS[rule]), mode)
    try:
        check(op, lambda: sample.make(OPERATORS[op].moments), given)
    finally:
        del OPERATORS[op]


# -- accumulate_outer_ and the codec ----------------------------------------------------------
sizes = st.builds(
    outer.Size, st.integers(0, 9), st.integers(0, 40), st.integers(0, 50), st.integers(0, 80)
)


@pytest.mark.parametrize("op", OUTER_OPS)
@settings(PROFILE, max_examples=100)
@given(
    size=sizes,
    dtype=st.sampled_from(list(DTYPES.values())),
    orders=st.tuples(*[st.permutations(range(n)) for n in (2, 3, 3)]),
    steps=st.tuples(*[st.integers(1, 3)] * 3),
    scale=st.floats(0, 100),
    seed=seeds,
)
def test_outer_of_any_size_and_strides(
    op: str, size: outer.Size, dtype: torch.dtype, orders: Any, steps: Any, scale: float, seed: int
) -> None:
    def lay(tensor: Tensor, order: list[int], step: int) -> Tensor:
        """The dimensions lie in memory in any order, with gaps in the innermost."""
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return tensor.permute(order).repeat_interleave(step, -1)[..., ::step].permute(inverse)

    def make_strided() -> State:
        plain = outer.make(size, dtype, seed=seed)
        lists = zip(("omega", "left", "right"), orders, steps, strict=True)
        return State(**{n: [lay(getattr(plain, n)[0], order, step)] for n, order, step in lists})

    check(op, make_strided, Scalars(scale=scale))


@settings(PROFILE, max_examples=100)
@given(size=st.integers(0, 1100), decades=st.floats(0, 30), seed=seeds)
def test_what_is_compressed_again_is_the_same(size: int, decades: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    omega = 10 ** (-decades * torch.rand(size, generator=generator))
    codes, scales = compressed(omega * (torch.rand(size, generator=generator) > 0.25))
    again, scales_again = compressed(precision.dequantize(codes, scales))
    assert torch.equal(scales_again, scales)
    assert torch.equal(again, codes)
