"""low_rank_penalty: its gradients, what it refuses, its memory, and the sizes of its tiles.

Its results for all samples are in test_results.py.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import mas_ext
from mas_ext import functional, reference
from tests.support.low_rank import KINDS, LAYOUTS, SIZES, SMALL, Size, make
from tests.support.operators import (
    LOW_RANK_OPS,
    Outcome,
    Scalars,
    assert_right,
    call,
    raw,
    raw_arguments,
)
from tests.support.tensors import DTYPES, KEPT, State
from tests.unit.operators.test_refusals import SUPPORTED, refused

PENALTY, GRAD = LOW_RANK_OPS
MODULES = (functional, reference)
each_op = pytest.mark.parametrize("op", LOW_RANK_OPS)
each_module = pytest.mark.parametrize("module", MODULES, ids=["op", "reference"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
native = pytest.mark.skipif(not mas_ext.build_info()["native"], reason="this is about the kernels")


def check(op: str, state: State, module: Any = functional, scalars: Scalars = Scalars()) -> Outcome:  # noqa: B008
    before = state.copy()
    outcome = call(module, op, state, scalars)
    assert_right(op, before, outcome, scalars)
    return outcome


# -- Gradients -------------------------------------------------------------------------------------
LEAVES = ("a", "b", "omega", "lambda_reg")
SUBSETS = [("a",), ("b",), ("omega",), ("lambda_reg",), ("a", "lambda_reg"), ("b", "omega"), LEAVES]


def leaves_of(state: State, wanting: tuple[str, ...] = LEAVES) -> dict[str, Tensor]:
    """A, B, Ω and λ, of which those in codes have no gradient."""
    (a,), (b,), (omega,) = state.a, state.b, state.omega
    lambda_reg = torch.tensor(0.7, dtype=torch.float64)
    leaves = {"a": a, "b": b, "omega": omega, "lambda_reg": lambda_reg}
    return {
        name: leaf.detach().requires_grad_(name in wanting and leaf.is_floating_point())
        for name, leaf in leaves.items()
    }


@pytest.mark.parametrize("size", [SMALL, Size(1, 3, 4), Size(3, 0, 2), Size(2, 3, 0)], ids=str)
@pytest.mark.parametrize("wanting", SUBSETS, ids="-".join)
def test_gradcheck(wanting: tuple[str, ...], size: Size) -> None:
    leaves = leaves_of(make(size, torch.float64), wanting)

    def value(*tensors: Tensor) -> Tensor:
        return functional.low_rank_penalty(*tensors, 0.6)

    assert gradcheck(value, [*leaves.values()])
    assert gradgradcheck(value, [*leaves.values()])


@pytest.mark.parametrize("wanting", SUBSETS, ids="-".join)
@pytest.mark.parametrize("with_grads", [False, True])
def test_opcheck_with_gradients(wanting: tuple[str, ...], with_grads: bool) -> None:
    a, b, omega, lambda_reg = leaves_of(make(SMALL), wanting).values()
    opcheck(raw(PENALTY), (a, b, omega, None, lambda_reg, 0.6, with_grads))


def plain(leaves: dict[str, Tensor], scale: float) -> Tensor:
    """The formula, for autograd."""
    delta = scale * (leaves["b"] @ leaves["a"])
    return leaves["lambda_reg"] / 2 * (leaves["omega"] * delta**2).sum()


@pytest.mark.parametrize(
    ("dtype", "agreement"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [SIZES[-1], Size(70, 300, 16)], ids=str)
def test_gradients_are_those_of_plain_autograd(
    size: Size, layout: str, dtype: torch.dtype, agreement: float
) -> None:
    """In float64, by both operators; errors are relative to the largest gradient."""
    state = make(size, dtype, layout)
    state.grad_a, state.grad_b = ([torch.zeros_like(t[0])] for t in (state.a, state.b))
    exact = leaves_of(state.double())
    value = plain(exact, 0.6)
    value.backward()
    mine = leaves_of(state)
    functional.low_rank_penalty(*mine.values(), 0.6).backward()
    added = call(functional, GRAD, state)
    pairs = [(mine[name].grad, exact[name].grad) for name in LEAVES]
    pairs += [*zip(added.tensors, (exact["a"].grad, exact["b"].grad), strict=True)]
    for actual, expected in [*pairs, (added.value, value.detach())]:
        largest = float(expected.abs().max())
        torch.testing.assert_close(
            actual.double(), expected, rtol=agreement, atol=agreement * largest
        )


@pytest.mark.parametrize(("dtype", "kept"), KINDS)
def test_both_orders_are_those_of_the_reference(dtype: str, kept: str | None) -> None:
    def both_orders(module: ModuleType) -> list[Tensor]:
        state = make(Size(33, 20, 9), DTYPES[dtype], kept=kept)
        leaves = leaves_of(state)
        scales = state.omega_scales[0] if state.omega_scales else None
        value = module.low_rank_penalty(*leaves.values(), 0.6, omega_scales=scales)
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
        first = torch.autograd.grad(3 * value, wanted, create_graph=True)
        total = sum(grad.to(value.dtype).square().sum() for grad in first)
        return [*first, *torch.autograd.grad(total, wanted)]

    bounds = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 2**-5, "float16": 2**-8}
    bound = max(bounds[dtype], bounds["bfloat16"] if kept == "bfloat16" else 0)
    for mine, theirs in zip(both_orders(functional), both_orders(reference), strict=True):
        assert mine.dtype == theirs.dtype
        largest = float(theirs.detach().abs().max())
        torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound * largest)


def test_gradients_are_formed_only_where_they_are_wanted() -> None:
    for wanting, shape in ((("omega", "lambda_reg"), (0,)), (("b",), (3, 6))):
        leaves = leaves_of(make(SMALL), wanting)
        value = functional.low_rank_penalty(*leaves.values(), 0.6)
        assert value.grad_fn is not None
        _, by_a, _ = raw(PENALTY)(
            *[*leaves.values()][:3], None, leaves["lambda_reg"], 0.6, shape != (0,)
        )
        assert by_a.shape == shape
        value.backward()
        assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(wanting)


@each_dtype
def test_gradients_are_returned_in_the_accumulation_dtype(dtype: torch.dtype) -> None:
    state = make(SMALL, dtype)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    for result in raw(PENALTY)(*raw_arguments(PENALTY, state)):
        assert result.dtype == accumulated


@each_module
def test_a_negative_strength_in_a_tensor(module: Any) -> None:
    """A backward pass with a negative incoming gradient calls the operator with one."""
    check(PENALTY, make(SMALL), module, Scalars(torch.tensor(-0.5)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_backward_is_that_of_autograd(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda leaves: 3 * functional.low_rank_penalty(*leaves.values(), 0.6),
        fullgraph=True,
        backend=backend,
    )
    mine, theirs = (leaves_of(make(Size(9, 20, 4))) for _ in range(2))
    compiled(mine).backward()
    (3 * plain(theirs, 0.6)).backward()
    for name in LEAVES:
        torch.testing.assert_close(mine[name].grad, theirs[name].grad, rtol=1e-5, atol=1e-6)


# -- The kernels' blocks ---------------------------------------------------------------------------
LARGE = Size(530, 1100, 20)


@each_op
@each_module
@pytest.mark.parametrize("kept", [None, *KEPT])
def test_parts_of_a_large_omega(op: str, module: Any, kept: str | None) -> None:
    check(op, make(LARGE, layout="transposed_omega", kept=kept), module)


@each_op
@each_module
def test_factors_may_share_memory_and_be_expanded(op: str, module: Any) -> None:
    base = torch.randn(60, 60)
    state = make(Size(40, 50, 9))
    state.a, state.b = [base[5:14, :50]], [base[:40, 3:12]]
    check(op, state, module)
    state = make(Size(40, 50, 9))
    state.a, state.b = [state.a[0][:1].expand(9, 50)], [state.b[0][:1].expand(40, 9)]
    state.omega = [state.omega[0][:, :1].expand(40, 50)]
    check(op, state, module)


def results(state: State) -> list[Tensor]:
    value, tensors = call(functional, GRAD, state)
    return [value, *tensors, call(functional, PENALTY, state).value]


@native
@pytest.mark.parametrize(("dtype", "kept"), KINDS)
def test_same_bits_for_any_number_of_threads(dtype: str, kept: str | None) -> None:
    by_threads = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        by_threads.append(results(make(LARGE, DTYPES[dtype], kept=kept)))
    for others in by_threads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(by_threads[0], others, strict=True))


@native
@pytest.mark.parametrize("layout", ["transposed_factors", "windows", "sliced"])
@pytest.mark.parametrize("size", [Size(70, 131, 10), Size(64, 128, 70)], ids=str)
def test_same_bits_for_any_layout(size: Size, layout: str) -> None:
    """But for a transposed Ω, whose sums run the other way."""
    mine, plain_ = results(make(size, layout=layout)), results(make(size))
    assert all(torch.equal(a, b) for a, b in zip(mine, plain_, strict=True))


def test_sizes_cover_every_remainder() -> None:
    """Of the tiles' widths: otherwise the table has lost its point."""
    assert {size.out % 8 for size in SIZES} == set(range(8))
    assert any(size.rank > max(size.out, size.into) for size in SIZES)
    assert {min(size) for size in SIZES} >= {0, 1}


# -- What is not finite, or beyond float32 ---------------------------------------------------------
@each_module
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["a", "b", "omega"])
def test_what_is_not_finite_is_seen(module: Any, name: str, bad: float) -> None:
    """Where the formula gives NaN or infinity, and nowhere else."""
    state = make(Size(9, 70, 5))
    state.omega[0].fill_(1.0)
    getattr(state, name)[0][2, 3] = bad
    (a,), (b,), (omega,) = state.double().a, state.double().b, state.double().omega
    weighted = omega * (b @ a)
    value, (grad_a, grad_b) = call(module, GRAD, state)
    assert not math.isfinite(value)
    assert torch.equal(grad_a.isfinite(), (b.mT @ weighted).isfinite())
    assert torch.equal(grad_b.isfinite(), (weighted @ a.mT).isfinite())


@each_module
def test_a_product_beyond_float32(module: Any) -> None:
    """An infinite element of B·A without importance is NaN, as the formula says."""
    state = make(Size(9, 40, 2))
    state.a[0].fill_(1.0)
    state.b[0].fill_(1.0)
    state.omega[0].fill_(1.0)
    state.a[0][:, 5], state.b[0][3] = 1e20, 1e20
    state.omega[0][3, 5] = 0.0
    value, (grad_a, grad_b) = call(module, GRAD, state)
    assert math.isnan(value)
    assert grad_a.isnan().any(0).nonzero().flatten().tolist() == [5]
    assert grad_b.isnan().any(1).nonzero().flatten().tolist() == [3]


@each_module
@pytest.mark.parametrize("in_tensor", [False, True])
def test_a_strength_beyond_float32_leaves_what_has_no_importance(
    module: Any, in_tensor: bool
) -> None:
    state = make(Size(6, 7, 2))
    state.omega[0].zero_()
    before = state.copy()
    strength = torch.tensor(1e38, dtype=torch.float64) if in_tensor else 1e38
    value, tensors = call(module, GRAD, state, Scalars(strength, scale=1e10))
    assert float(value) == 0
    assert all(map(torch.equal, tensors, (before.grad_a[0], before.grad_b[0])))


@each_module
def test_no_strength_changes_nothing(module: Any) -> None:
    for scalars in (Scalars(0.0), Scalars(scale=0.0)):
        state = make(SMALL)
        before = state.copy()
        value, tensors = call(module, GRAD, state, scalars)
        assert float(value) == 0
        assert all(map(torch.equal, tensors, (before.grad_a[0], before.grad_b[0])))


# -- What is refused -------------------------------------------------------------------------------
Spoil = Callable[[State], None]


def replace(name: str, function: Callable[[Tensor], Tensor]) -> Spoil:
    def spoil(state: State) -> None:
        setattr(state, name, [function(getattr(state, name)[0])])

    return spoil


def share(name: str, other: str) -> Spoil:
    """The first of a name's elements are the last of the other's."""

    def spoil(state: State) -> None:
        (tensor,), (another,) = getattr(state, name), getattr(state, other)
        base = torch.rand(tensor.numel() + another.numel() - 1)
        setattr(state, other, [base[: another.numel()].view(another.shape)])
        setattr(state, name, [base[another.numel() - 1 :].view(tensor.shape)])

    return spoil


SHAPES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "a_1d": (replace("a", lambda t: t[0]), ("a ", "[rank, in]")),
    "b_3d": (replace("b", lambda t: t[None]), ("b ", "[out, rank]")),
    "omega_1d": (replace("omega", lambda t: t[0]), ("omega ", "[out, in]")),
    "rank": (replace("b", lambda t: t[:, :2]), ("b ", "a ", "the rank")),
    "out": (replace("omega", lambda t: t[:4]), ("omega ", "b ", "out")),
    "in": (replace("omega", lambda t: t[:, :4]), ("omega ", "a ", "in")),
    "b_bfloat16": (replace("b", Tensor.bfloat16), ("b ", "convert")),
    "omega_float64": (replace("omega", Tensor.double), ("omega ", "convert")),
    "omega_float16": (replace("omega", Tensor.half), ("omega ", "convert")),
    "a_int64": (replace("a", Tensor.long), ("a |b ", SUPPORTED + "|convert")),
}
ALWAYS = SHAPES | {
    "a_sparse": (replace("a", Tensor.to_sparse), ("a ", "to_dense()")),
    "omega_sparse": (replace("omega", Tensor.to_sparse), ("omega ", "to_dense()")),
    "meta": (replace("b", lambda t: t.to("meta")), ("b ", "one device")),
    "codes_without_scales": (replace("omega", Tensor.byte), ("omega has uint8", "scales")),
    "scales_without_codes": (
        lambda s: s.omega_scales.append(torch.ones(1)),
        ("omega_scales has", "without elements"),
    ),
}
SHAPES_OF_GRADS: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "grad_a_shape": (replace("grad_a", lambda t: t.mT), ("grad_a ", "in its shape")),
    "grad_b_shape": (replace("grad_b", lambda t: t[:4]), ("grad_b ", "in its shape")),
    "grad_b_float64": (replace("grad_b", Tensor.double), ("grad_b ", "convert")),
}
WRITTEN = SHAPES_OF_GRADS | {
    "grad_a_expanded": (
        replace("grad_a", lambda t: t[:1].expand(3, 6)),
        ("grad_a is written but overlaps itself", "clone()"),
    ),
    **{
        f"{written}_and_{other}": (
            share(written, other),
            (written, other, "shares memory", "clone()"),
        )
        for written, other in [
            ("grad_a", "grad_b"),
            ("grad_a", "a"),
            ("grad_a", "b"),
            ("grad_b", "a"),
            ("grad_b", "b"),
            ("grad_b", "omega"),
        ]
    },
}
CASES = [(op, kind) for op in LOW_RANK_OPS for kind in (*ALWAYS, *(WRITTEN if op == GRAD else ()))]


@pytest.mark.parametrize(("op", "kind"), CASES)
def test_refused(op: str, kind: str) -> None:
    spoil, words = {**ALWAYS, **WRITTEN}[kind]
    state = make(SMALL)
    spoil(state)
    refused(op, state, *words)
    if kind in {**SHAPES, **SHAPES_OF_GRADS}:  # fake tensors, too
        with pytest.raises(RuntimeError, match=words[0].split("|")[0]):
            call(functional, op, state.map(lambda t: t.to("meta")))


SCALES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "a_block_more": (replace("omega_scales", lambda t: torch.ones(4)), ("omega_scales ", "[3]")),
    "float64": (replace("omega_scales", Tensor.double), ("omega_scales ", "pass float32")),
    "strided": (
        replace("omega_scales", lambda t: t.repeat_interleave(2)[::2]),
        ("omega_scales ", "contiguous()"),
    ),
    "meta": (replace("omega_scales", lambda t: t.to("meta")), ("omega_scales ", "move it")),
    "gaps": (replace("omega", lambda t: t.repeat(1, 2)[:, ::2]), ("omega ", "dense")),
}


@each_op
@pytest.mark.parametrize("kind", SCALES)
def test_codes_and_scales(op: str, kind: str) -> None:
    spoil, words = SCALES[kind]
    state = make(Size(20, 30, 3), kept="uint8")
    call(functional, op, state)  # else it could be refused for another reason
    spoil(state)
    refused(op, state, *words)


def test_a_gradient_shares_memory_with_scales() -> None:
    state = make(Size(20, 30, 3), kept="uint8")
    base = torch.ones(62)
    state.grad_b, state.omega_scales = [base[:60].view(20, 3)], [base[59:62]]
    refused(GRAD, state, "grad_b is written", "omega_scales", "clone()")


@each_op
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_strength_out_of_range(op: str, value: float) -> None:
    number, tensor = Scalars(lambda_reg=value), Scalars(lambda_reg=torch.tensor(value))
    refused(op, make(SMALL), "lambda_reg", "finite", scalars=number, error=ValueError)
    if op == GRAD:  # the other takes any in a tensor: its backward pass calls it with λ times g
        refused(op, make(SMALL), "lambda_reg", "finite", scalars=tensor)


# -- Memory ----------------------------------------------------------------------------------------
MEASURED = """
import torch
from benchmarks.measure import peak_of, resident_bytes, return_free_memory
from mas_ext import functional
torch.set_num_threads(2)
def tensors(m, n, r):
    shapes = (r, n), (m, r), (r, n), (m, r), (m, n)
    return [torch.rand(shape).mul_(0.1) for shape in shapes]
functional.low_rank_penalty_grad_(*tensors(512, 512, {rank}), 0.7)  # starts the threads
given = tensors(4096, 4096, {rank})
return_free_memory()
before = resident_bytes()
print(peak_of(lambda: functional.low_rank_penalty_grad_(*given, 0.7)) - before)
"""


@native
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the peak of resident memory")
@pytest.mark.parametrize("rank", [8, 64])
def test_nothing_of_the_size_of_omega_is_allocated(rank: int) -> None:
    line = [sys.executable, "-c", MEASURED.format(rank=rank)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 0.01 * 4 * 4096**2
