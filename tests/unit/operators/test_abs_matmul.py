"""accumulate_abs_matmul_: against float64, what its formula implies, and what it refuses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from mas_ext import functional, reference
from mas_ext._operators import list_operators as _ops
from tests.abs_matmul import (
    LAYOUTS,
    SCALE,
    SIZES,
    Problem,
    Size,
    assert_gaps_untouched,
    assert_near,
    call,
    exact,
    make,
)
from tests.cases import DTYPES

each_module = pytest.mark.parametrize("module", [functional, reference], ids=["op", "reference"])
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@each_module
@each_dtype
@each_layout
def test_float64_oracle(module, dtype: torch.dtype, layout: str) -> None:
    for size in SIZES:  # one test: 26 a layout would take longer to set up than to run
        problem, untouched = make(size, dtype, layout), make(size, dtype, layout)
        wanted = exact(problem)
        assert_near(call(problem, module=module), wanted, str(size))
        assert torch.equal(problem.left, untouched.left)
        assert torch.equal(problem.right, untouched.right)
        assert_gaps_untouched(problem.omega)


@each_module
def test_blocks_of_a_large_omega(module) -> None:
    problem = make(Size(3, 20, 700, 1100), layout="positions_last")
    wanted = exact(problem)
    assert_near(call(problem, module=module), wanted)


@each_module
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded_factors(module, dim: int) -> None:
    omega, left, right = make(Size(5, 6, 21, 34))
    for problem in [
        Problem(omega.clone(), left.narrow(dim, 0, 1).expand_as(left), right),
        Problem(omega.clone(), left, right.narrow(dim, 0, 1).expand_as(right)),
        Problem(omega.clone(), left, torch.tensor(0.7).expand_as(right)),
    ]:
        wanted = exact(problem)
        assert_near(call(problem, module=module), wanted)


@each_module
def test_factors_may_share_memory(module) -> None:
    base = torch.randn(4, 7, 20)
    problem = Problem(torch.zeros(15, 15), base[..., :15], base[..., 5:])
    wanted = exact(problem)
    assert_near(call(problem, module=module), wanted)


# ================================================================================================
# What the formula implies
# ================================================================================================
@each_module
def test_by_hand(module) -> None:
    """Two positions that cancel within the first sample, and do not across samples."""
    left = torch.tensor([[[1.0], [1.0]], [[2.0], [0.0]]])
    right = torch.tensor([[[3.0], [-3.0]], [[-5.0], [7.0]]])
    omega = torch.tensor([[100.0]])
    module.accumulate_abs_matmul_(omega, left, right, 0.5)
    assert omega.item() == 105.0


@each_module
def test_scale_is_one_by_default(module) -> None:
    omega = torch.zeros(1, 1)
    module.accumulate_abs_matmul_(omega, torch.tensor([[[-2.0]]]), torch.tensor([[[3.0]]]))
    assert omega.item() == 6.0


@each_module
@pytest.mark.parametrize("scale", [0.0, 1.0, 1 / 3, 1e-8, 1e8])
def test_scale(module, scale: float) -> None:
    problem = make(Size(7, 5, 13, 29))
    wanted = exact(problem, scale)
    assert_near(call(problem, scale, module), wanted)


def test_magnitudes_after_the_sum_are_less_than_before() -> None:
    omega, left, right = make(Size(6, 30, 40, 50))
    bound = torch.einsum("btp,btd->pd", left.abs(), right.abs())
    value = call(Problem(torch.zeros_like(omega), left, right), 1.0)
    assert bool((value <= bound).all())
    assert float(value.sum()) < 0.5 * float(bound.sum())


def test_one_position_attains_the_bound() -> None:
    omega, left, right = make(Size(30, 1, 40, 50))
    bound = left[:, 0].abs().T @ right[:, 0].abs()
    value = call(Problem(torch.zeros_like(omega), left, right), 1.0)
    torch.testing.assert_close(value, bound)


@pytest.mark.parametrize("t", [1, 4, 40])
def test_samples_in_one_call_or_in_several(t: int) -> None:
    omega, left, right = make(Size(19, t, 20, 70))
    wanted = exact(Problem(omega, left, right))
    for mine, theirs in zip(left.split(6), right.split(6), strict=True):
        call(Problem(omega, mine, theirs))
    assert_near(omega, wanted)


def test_agrees_with_autograd_sample_by_sample() -> None:
    layer = torch.nn.Conv1d(3, 8, 5)
    images = torch.randn(4, 3, 20)
    output = layer(images)
    columns = (
        images.unfold(2, 5, 1).transpose(2, 3).flatten(1, 2)
    )  # [sample, channel·tap, position]
    omega = torch.zeros(8, 15)
    functional.accumulate_abs_matmul_(omega, 2 * output.detach().mT, columns.mT)
    wanted = torch.zeros(8, 15)
    for one in output:
        (grad,) = torch.autograd.grad(one.square().sum(), layer.weight, retain_graph=True)
        wanted += grad.flatten(1).abs()
    torch.testing.assert_close(omega, wanted)


@each_dtype
@pytest.mark.parametrize("size", [Size(32, 16, 130, 300), Size(700, 1, 90, 300)], ids=str)
def test_same_bits_for_any_number_of_threads(size: Size, dtype: torch.dtype) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(call(make(size, dtype, "positions_last")))
    assert all(torch.equal(results[0], other) for other in results[1:])


@each_layout
def test_same_bits_for_any_layout(layout: str) -> None:
    size = Size(5, 20, 37, 61)
    assert torch.equal(call(make(size, layout=layout)), call(make(size)))


@each_module
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(module, bad: float) -> None:
    omega, left, right = make(Size(3, 5, 6, 40))
    left[1, 2, 3] = bad
    value = call(Problem(omega, left, right), module=module)
    assert not bool(value[3].isfinite().any())
    assert bool(value[[0, 1, 2, 4, 5]].isfinite().all())


sizes = st.builds(
    Size, st.integers(0, 9), st.integers(0, 40), st.integers(0, 50), st.integers(0, 80)
)


@settings(deadline=None, print_blob=True, max_examples=300)
@given(
    size=sizes,
    dtype=st.sampled_from(list(DTYPES.values())),
    orders=st.tuples(*[st.permutations(range(n)) for n in (2, 3, 3)]),
    steps=st.tuples(*[st.integers(1, 3)] * 3),
    scale=st.floats(0, 100),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_size_and_strides(size, dtype, orders, steps, scale, seed) -> None:
    def lay(tensor: Tensor, order: list[int], step: int) -> Tensor:
        """The dimensions lie in memory in any order, with gaps in the innermost."""
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return tensor.permute(order).repeat_interleave(step, -1)[..., ::step].permute(inverse)

    plain = make(size, dtype, seed=seed)
    problem = Problem(*(lay(t, o, s) for t, o, s in zip(plain, orders, steps, strict=True)))
    wanted = exact(plain, scale)
    assert_near(call(problem, scale), wanted)


# ================================================================================================
# As PyTorch sees it
# ================================================================================================
op = torch.ops.mas_ext.accumulate_abs_matmul_.default


@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "transposed_omega", "samples_last"])
@pytest.mark.parametrize("size", [Size(3, 4, 5, 6), Size(0, 4, 5, 6), Size(3, 1, 1, 6)], ids=str)
def test_opcheck(size: Size, layout: str, dtype: torch.dtype) -> None:
    problem = make(size, dtype, layout)
    opcheck(op, tuple(problem))
    opcheck(op, (*problem, 0.5))


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiled_equals_eager(backend: str) -> None:
    def step(omega: Tensor, left: Tensor, right: Tensor) -> Tensor:
        functional.accumulate_abs_matmul_(omega, 2 * left, right + 1, 0.3)
        return omega * 2

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    mine, theirs = make(Size(3, 4, 5, 6)), make(Size(3, 4, 5, 6))
    torch.testing.assert_close(compiled(*mine), step(*theirs))
    torch.testing.assert_close(mine.omega, theirs.omega)
    assert counter.frame_count == 1


def test_the_version_counter_is_bumped() -> None:
    omega, left, right = make(Size(3, 4, 5, 6))
    weight = torch.ones(5, 6, requires_grad=True)
    result = (weight * omega).sum()
    call(Problem(omega, left, right))
    assert omega._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_nothing_is_recorded() -> None:
    problem = make(Size(3, 4, 5, 6))
    for tensor in problem:
        tensor.requires_grad_()
    assert call(problem).grad_fn is None


# ================================================================================================
# What it refuses
# ================================================================================================
def raw_default(omega: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """The default kernel, as it runs where nothing is compiled."""
    _ops._accumulate_abs_matmul(omega, left, right, scale)


each_side = pytest.mark.parametrize(
    "run", [functional.accumulate_abs_matmul_, raw_default], ids=["op", "default"]
)

ONE_DEVICE = "{0} is on meta but {1} is on cpu; all tensors of one call must be on one device"
CONVERT = (
    r"; convert it \(omega is float64 beside float64 values and float32 beside others, or, where "
    r"it is only read, bfloat16 or uint8\)"
)
BAD: dict[str, tuple[Callable[[Problem], dict[str, Tensor]], str]] = {
    "omega_1d": (lambda x: {"omega": x.omega[0]}, r"omega has shape \[6\]; pass a matrix \[p, d\]"),
    "left_2d": (
        lambda x: {"left": x.left[0]},
        r"left has shape \[4, 5\]; pass \[samples, positions, p\]",
    ),
    "right_4d": (
        lambda x: {"right": x.right[None]},
        r"right has shape \[1, 3, 4, 6\]; pass \[samples, positions, d\]",
    ),
    "samples": (
        lambda x: {"right": x.right[:2]},
        r"right has shape \[2, 4, 6\] but left has shape \[3, 4, 5\]; size 0 of right and size 0 "
        "of left are both the samples",
    ),
    "positions": (
        lambda x: {"right": x.right[:, :1]},
        r"right has shape \[3, 1, 6\] but left has shape \[3, 4, 5\]; size 1 of right and size 1 "
        "of left are both the positions",
    ),
    "rows": (
        lambda x: {"omega": x.omega.mT},
        r"left has shape \[3, 4, 5\] but omega has shape \[6, 5\]; size 2 of left and size 0 of "
        "omega are both p",
    ),
    "columns": (
        lambda x: {"right": x.right[..., :1]},
        r"right has shape \[3, 4, 1\] but omega has shape \[5, 6\]; size 2 of right and size 1 of "
        "omega are both d",
    ),
    "omega_float64": (
        lambda x: {"omega": x.omega.double()},
        f"omega has dtype float64 where float32 is expected beside float32 values{CONVERT}",
    ),
    "right_bfloat16": (
        lambda x: {"right": x.right.bfloat16()},
        f"right has dtype bfloat16 where float32 is expected beside float32 values{CONVERT}",
    ),
    "int64": (
        lambda x: {"left": x.left.long()},
        "omega has dtype float32|left has dtype int64, which is not supported; "
        "pass float32, float64, bfloat16 or float16",
    ),
    "sparse_left": (
        lambda x: {"left": x.left.to_sparse()},
        r"left is not a dense \(strided\) tensor; convert it with to_dense\(\)",
    ),
    "sparse_omega": (
        lambda x: {"omega": x.omega.to_sparse()},
        r"omega is not a dense \(strided\) tensor; convert it with to_dense\(\)",
    ),
    "meta": (lambda x: {"left": x.left.to("meta")}, ONE_DEVICE.format("left", "omega")),
    "expanded_omega": (
        lambda x: {"omega": x.omega[0].expand(5, 6)},
        r"omega is written but overlaps itself in memory \(an expanded tensor\?\); pass a clone",
    ),
    "folded_omega": (
        lambda x: {"omega": x.left.as_strided((5, 6), (2, 1))},
        r"omega is written but (overlaps itself|shares memory)",
    ),
    "aliased_left": (
        lambda x: {"omega": x.left.view(-1)[:30].view(5, 6)},
        r"omega is written but shares memory with left; pass a clone\(\) of one of them",
    ),
    "aliased_right": (
        lambda x: {"omega": x.right.view(-1)[7:37].view(5, 6)},
        r"omega is written but shares memory with right; pass a clone\(\) of one of them",
    ),
}


@each_side
@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_refused(run, spoil: Callable, message: str) -> None:
    problem = make(Size(3, 4, 5, 6))
    spoilt = problem._replace(**spoil(problem))
    before = [t.to_dense().clone() if t.device.type == "cpu" else None for t in spoilt]
    with pytest.raises(RuntimeError, match=f"mas_ext::accumulate_abs_matmul_: ({message})"):
        run(*spoilt, SCALE)
    for tensor, copy in zip(spoilt, before, strict=True):
        assert copy is None or torch.equal(tensor.to_dense(), copy)
    assert spoilt.omega._version == problem.omega._version


@each_side
@pytest.mark.parametrize("scale", [-1.0, -1e-300, math.nan, math.inf])
def test_scale_out_of_range(run, scale: float) -> None:
    problem = make(Size(3, 4, 5, 6))
    message = "scale is .*; pass a finite number that is not negative"
    with pytest.raises(RuntimeError, match=message):
        run(*problem, scale)
    assert torch.equal(problem.omega, make(Size(3, 4, 5, 6)).omega)


@each_side
def test_interleaved_memory_is_fine(run) -> None:
    """Ω and a factor in one base, place by place, which never meet."""
    base = torch.randn(4, 5, 2, 6)
    omega, left = base[0, :, 0], base[:3, :, 1]
    problem = Problem(omega, left[..., :5], torch.randn(3, 5, 6))
    wanted = exact(problem)
    run(*problem, SCALE)
    assert_near(omega, wanted)


def test_fake_tensors_are_checked_too() -> None:
    problem = make(Size(3, 4, 5, 6), device="meta")
    with pytest.raises(RuntimeError, match=r"right has shape \[2, 4, 6\]"):
        call(problem._replace(right=problem.right[:2]))


def test_wrong_in_the_same_words_everywhere() -> None:
    for spoil, _ in BAD.values():
        problem = make(Size(3, 4, 5, 6))
        spoilt = problem._replace(**spoil(problem))
        words = []
        for run in (functional.accumulate_abs_matmul_, raw_default):
            with pytest.raises(RuntimeError) as refusal:
                run(*spoilt, SCALE)
            words.append(str(refusal.value).split("\n")[0])
        assert words[0] == words[1]


def test_sizes_cover_every_remainder() -> None:
    """Of the tiles' widths: otherwise the table has lost its point."""
    assert {size.p % 8 for size in SIZES} == set(range(8))
    for width in (4, 8):
        assert len({size.d % width for size in SIZES}) == width
    assert any(a.t == b.t - 1 for a, b in itertools.product(SIZES, SIZES))
