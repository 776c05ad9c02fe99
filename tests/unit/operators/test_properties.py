"""The operators on what hypothesis thinks of: shapes, strides, aliases, magnitudes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mas_ext import functional
from tests.cases import (
    DTYPES,
    KEPT,
    OPS,
    PENALTY_OPS,
    WRITING_OPS,
    Outcome,
    Scalars,
    State,
    accumulation_dtype,
    assert_near,
    assert_value_near,
    call,
    channels_last,
    contiguous,
    exact_penalty,
    exact_tensors,
    list_arguments,
    make_state,
    sliced,
    smallest_step,
    transposed,
    unaligned,
    written_argument,
)

PROFILE = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])

# ================================================================================================
# Strategies
# ================================================================================================
LAYOUTS = {f.__name__: f for f in (contiguous, transposed, channels_last, sliced, unaligned)}
NARROW = torch.float16  # overflows at 65504, so its magnitudes are drawn from fewer powers of ten

small_shapes = st.lists(st.integers(0, 5), max_size=4)
# Around the 16 lanes and the chunks of 16384 elements that the kernels cut by.
long_shapes = st.sampled_from([15, 16, 17, 31, 33, 257, 16383, 16384, 16385]).map(lambda n: [n])
shapes = st.one_of(*[small_shapes] * 7, long_shapes)
seeds = st.integers(0, 2**32 - 1)


@dataclass
class Magnitudes:
    """Powers of ten that values are multiplied by."""

    params: int
    anchors: int
    omega: int
    grads: int

    @staticmethod
    def of(dtype: torch.dtype) -> st.SearchStrategy[Magnitudes]:
        wide, importance = st.integers(-20, 10), st.integers(-20, 10)
        if dtype == NARROW:
            wide, importance = st.integers(-4, 1), st.integers(-6, 0)
        return st.builds(Magnitudes, wide, wide, importance, wide)


@dataclass
class Draw:
    """One parameter's tensors, to be made as often as wanted."""

    dtype: torch.dtype
    shape: list[int]
    seed: int
    magnitudes: Magnitudes
    layouts: dict[str, str]
    expanded: set[str] = field(default_factory=set)  # lists that hold one value, expanded

    def value(self, name: str) -> Tensor:
        names = list(self.layouts)
        generator = torch.Generator().manual_seed(self.seed + names.index(name))
        value = torch.rand(self.shape, generator=generator, dtype=torch.float64)
        value = value if name == "omega" else 2 * value - 1
        if name == "omega":
            value[torch.rand(self.shape, generator=generator) < 0.2] = 0
        value = value * 10.0 ** getattr(self.magnitudes, name)
        return value.to(accumulation_dtype(self.dtype) if name == "omega" else self.dtype)

    def tensor(self, name: str) -> Tensor:
        value = self.value(name)
        if name in self.expanded and value.numel() > 0:
            return value.flatten()[0].expand(self.shape)
        return LAYOUTS[self.layouts[name]](value)


def draws(op: str) -> st.SearchStrategy[Draw]:
    names = ["params", "anchors", "omega", "grads"]
    readable = [name for name in names if name != written_argument(op)]
    layouts = st.fixed_dictionaries({name: st.sampled_from(list(LAYOUTS)) for name in names})
    expanded = st.one_of(st.just(set()), st.sets(st.sampled_from(readable)))
    return st.sampled_from(list(DTYPES.values())).flatmap(
        lambda dtype: st.builds(
            Draw, st.just(dtype), shapes, seeds, Magnitudes.of(dtype), layouts, expanded
        )
    )


def make(drawn: list[Draw]) -> State:
    names = ["params", "anchors", "omega", "grads"]
    return State(*([draw.tensor(name) for draw in drawn] for name in names))


scalars = st.builds(
    Scalars,
    lambda_reg=st.one_of(st.just(0.0), st.floats(1e-3, 1e3)),
    grad_scale=st.one_of(st.none(), st.floats(1e-3, 16)),
    lr=st.one_of(st.just(0.0), st.floats(1e-4, 10)),
    scale=st.one_of(st.just(0.0), st.floats(1e-3, 1e3)),
)


# ================================================================================================
# What is asserted: float64's result, less what underflow may take
# ================================================================================================
def dust(params: Tensor, anchors: Tensor) -> Tensor:
    """A product that underflows loses up to a smallest step, which δ then multiplies."""
    delta = (params.double() - anchors.double()).abs()
    return 4 * smallest_step(accumulation_dtype(params.dtype)) * (delta + 1)


def all_dust(state: State) -> list[Tensor]:
    return [dust(p, a) for p, a in zip(state.params, state.anchors, strict=True)]


def assert_value_right(value: Tensor, state: State, strength: float) -> None:
    dtypes = {accumulation_dtype(param.dtype) for param in state.params}
    loosest = torch.float64 if dtypes == {torch.float64} else torch.float32
    lost = strength * sum(float(piece.sum()) for piece in all_dust(state))
    assert_value_near(value, exact_penalty(state, strength), dtype=loosest, dust=lost)


def assert_right(op: str, before: State, after: State, outcome: Outcome, scalars: Scalars) -> None:
    exact = exact_tensors(op, before, scalars)
    assert len(outcome.tensors) == len(exact)
    if exact:
        for actual, wanted, lost in zip(outcome.tensors, exact, all_dust(before), strict=True):
            assert_near(actual, wanted, dust=lost)
    if outcome.value is not None:
        assert_value_right(outcome.value, after, float(scalars.lambda_reg))


def check(op: str, make: Callable[[], State], scalars: Scalars) -> None:
    """Runs ``op`` on one copy of what ``make`` makes and compares with another."""
    state = make()
    assert_right(op, make(), state, call(functional, op, state, scalars), scalars)


# ================================================================================================
# The properties
# ================================================================================================
@pytest.mark.parametrize("op", OPS)
@settings(PROFILE, max_examples=600)
@given(data=st.data(), scalars=scalars)
def test_float64_oracle(op: str, data: st.DataObject, scalars: Scalars) -> None:
    drawn = data.draw(st.lists(draws(op), max_size=4))
    check(op, lambda: make(drawn), scalars)


@pytest.mark.parametrize("op", OPS)
@settings(PROFILE, max_examples=250)
@given(size=st.integers(1, 70), shift=st.integers(0, 70), equal=st.booleans(), seed=seeds)
def test_read_only_arguments_may_share_memory(
    op: str, size: int, shift: int, equal: bool, seed: int
) -> None:
    """Each list argument that is only read is a window into one base, shifted or the very same."""

    def make_aliased() -> State:
        state = make_state([torch.float32] * 2, [(size,)] * 2, seed=seed)
        base = torch.rand(size + 3 * shift, generator=torch.Generator().manual_seed(seed))
        readable = [name for name in list_arguments(op) if name != written_argument(op)]
        for k, name in enumerate(readable):
            window = base[:size] if equal else base[k * shift :][:size]
            state.lists()[name][:] = [window, window]
        return state

    check(op, make_aliased, Scalars())


@pytest.mark.parametrize("op", WRITING_OPS)
@settings(PROFILE, max_examples=300)
@given(
    rows=st.integers(1, 90),
    count=st.integers(1, 4),
    width=st.integers(1, 3),
    dtype=st.sampled_from(list(DTYPES.values())),
    seed=seeds,
)
def test_interleaved_columns_are_written_apart(
    op: str, rows: int, count: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    """Tensor k holds the columns k, k + count, k + 2·count, … of one base."""

    def make_interleaved() -> State:
        state = make_state([dtype] * count, [(rows, width)] * count, seed=seed)
        written = state.lists()[written_argument(op)]
        base = torch.stack(written, dim=2).flatten(1)
        written[:] = [base[:, k::count] for k in range(count)]
        return state

    check(op, make_interleaved, Scalars())


@pytest.mark.parametrize("op", PENALTY_OPS)
@settings(PROFILE, max_examples=150)
@given(
    shape=shapes,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kept=st.sampled_from(list(KEPT)),
    layouts=st.tuples(*[st.sampled_from(list(LAYOUTS.values()))] * 4),
    shared=st.booleans(),
    seed=seeds,
)
def test_an_omega_that_is_kept_in_less(
    op: str,
    shape: list[int],
    dtype: torch.dtype,
    kept: str,
    layouts: tuple,
    shared: bool,
    seed: int,
) -> None:
    """Any shape, any strides of each; one memory for two parameters' codes and scales."""

    def make_kept() -> State:
        state = make_state([dtype] * 2, [tuple(shape)] * 2, layouts, seed % 2**31, kept=kept)
        if shared:
            state.omega[1] = state.omega[0]
            state.omega_scales[1:] = state.omega_scales[:1]
        return state

    check(op, make_kept, Scalars())


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
@settings(PROFILE, max_examples=400)
@given(written=windows, read=windows, seed=seeds)
def test_shared_memory_is_refused_exactly_where_there_is_some(
    op: str, written: Window, read: Window, seed: int
) -> None:
    read = (read[0], written[1], read[2])

    def make_windows() -> State:
        state = make_state([torch.float32], [written[1]], seed=seed)
        base = torch.rand(80, generator=torch.Generator().manual_seed(seed))
        first, second = list_arguments(op)[:2]
        for name, (offset, shape, strides) in [(first, written), (second, read)]:
            state.lists()[name][:] = [base.as_strided(shape, strides, offset)]
        return state

    if are_apart(written, read):
        check(op, make_windows, Scalars())
    else:
        with pytest.raises(RuntimeError, match=r"is written but (shares memory|overlaps itself)"):
            call(functional, op, make_windows())


@pytest.mark.parametrize("op", PENALTY_OPS)
@settings(PROFILE, max_examples=150)
@given(data=st.data(), scalars=scalars, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_scalars_as_tensors(
    op: str, data: st.DataObject, scalars: Scalars, dtype: torch.dtype
) -> None:
    drawn = data.draw(st.lists(draws(op), max_size=3))
    if scalars.grad_scale is None:
        scalars = scalars._replace(grad_scale=1.0)
    check(op, lambda: make(drawn), scalars.as_tensors(dtype))
