"""What the operators refuse: which error, what it says, and that nothing was touched."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mas_ext import functional
from tests.cases import (
    OPS,
    PENALTY_OPS,
    WRITING_OPS,
    Scalars,
    State,
    call,
    compressed,
    list_arguments,
    make_state,
    raw_arguments,
    written_argument,
)

# ================================================================================================
# Refusals
# ================================================================================================
Snapshot = list[tuple[Tensor, Tensor]]


def sound_state() -> State:
    return make_state([torch.float32] * 2, [(4, 5), (6,)])


def snapshot(state: State) -> Snapshot:
    """Every tensor that has readable values, and a copy of them."""
    tensors = itertools.chain(*state.lists().values())
    readable = [t for t in tensors if t.device.type == "cpu"]
    return [(t, t.detach().to_dense().clone()) for t in readable]


def assert_untouched(before: Snapshot) -> None:
    for tensor, copy in before:
        assert torch.equal(tensor.detach().to_dense(), copy)


def refused(
    op: str, state: State, message: str, scalars: Scalars | None = None, error: type = RuntimeError
) -> None:
    before = snapshot(state)
    with pytest.raises(error, match=message):
        call(functional, op, state, scalars or Scalars())
    assert_untouched(before)


@pytest.mark.parametrize("op", OPS)
def test_the_sound_state_is_accepted(op: str) -> None:
    """Otherwise the tests below could be refused for another reason than the one they plant."""
    call(functional, op, sound_state())


# ================================================================================================
# One bad tensor
# ================================================================================================
ANYWHERE = [(op, name) for op in OPS for name in list_arguments(op)]
BUT_FIRST = [(op, name) for op, name in ANYWHERE if name != list_arguments(op)[0]]

# Each replaces the second tensor of a list; {name} and {first} are arguments of the operator.
UNSUPPORTED = "{name}\\[1\\] has dtype .*not supported; pass float32, float64, bfloat16 or float16"
WRONG_ANYWHERE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "int64": (lambda t: t.to(torch.int64), UNSUPPORTED),
    "uint8": (lambda t: t.to(torch.uint8), UNSUPPORTED),
    "bool": (lambda t: t > 0, UNSUPPORTED),
    "complex64": (lambda t: t.to(torch.complex64), UNSUPPORTED),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), UNSUPPORTED),
    "sparse": (
        lambda t: t.to_sparse(),
        r"{name}\[1\] is not a dense \(strided\) tensor; convert it with to_dense\(\)",
    ),
    "meta": (
        lambda t: t.to("meta"),
        r"{name}\[1\] is on meta but {first}\[0\] is on cpu; all tensors of one call must be on "
        "one device",
    ),
}
WRONG_BESIDE_THE_FIRST: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "longer": (
        lambda t: t.new_zeros(7),
        r"{name}\[1\] has shape \[7\] but {first}\[1\] has shape \[6\]; "
        "tensors at one position must have one shape",
    ),
    "more_dimensions": (
        lambda t: t.view(1, 6),
        r"{name}\[1\] has shape \[1, 6\] but {first}\[1\] has shape \[6\]; "
        "tensors at one position must have one shape",
    ),
    "broadcastable": (
        lambda t: t.new_zeros(()),
        r"{name}\[1\] has shape \[\] but {first}\[1\] has shape \[6\]; "
        "tensors at one position must have one shape",
    ),
    "float64": (
        lambda t: t.double(),
        r"\[1\] has dtype \w+ where .* is expected beside \w+ values; convert it",
    ),
    "float16": (
        lambda t: t.half(),
        r"{name}\[1\] has dtype float16 where float32.* is expected beside \w+ values; convert it "
        r"\(omega is float64 beside float64 values and float32 beside others, or, where it is only "
        r"read, bfloat16 or uint8\)",
    ),
}


def check_one_bad_tensor(op: str, name: str, spoil: Callable, message: str) -> None:
    state = sound_state()
    tensors = state.lists()[name]
    tensors[1] = spoil(tensors[1])
    message = message.replace("{name}", name).replace("{first}", list_arguments(op)[0])
    refused(op, state, f"mas_ext::{op}: .*{message}")


BAD_TENSORS = [
    (op, name, kind)
    for op, name in ANYWHERE
    for kind in WRONG_ANYWHERE
    # Of an Ω that is only read these are codes, which want scales.
    if (name, kind) != ("omega", "uint8") or op not in PENALTY_OPS
]


@pytest.mark.parametrize(("op", "name", "kind"), BAD_TENSORS)
def test_bad_tensor(op: str, name: str, kind: str) -> None:
    check_one_bad_tensor(op, name, *WRONG_ANYWHERE[kind])


UNLIKE_THE_FIRST = [
    (op, name, kind)
    for op, name in BUT_FIRST
    for kind in WRONG_BESIDE_THE_FIRST
    # Gradients in float16 beside Ω in float32 are what this operator is for.
    if (op, kind) != ("accumulate_importance_", "float16")
]


@pytest.mark.parametrize(("op", "name", "kind"), UNLIKE_THE_FIRST)
def test_tensor_unlike_the_first(op: str, name: str, kind: str) -> None:
    check_one_bad_tensor(op, name, *WRONG_BESIDE_THE_FIRST[kind])


def test_an_importance_that_accumulates_in_a_low_precision() -> None:
    """In bfloat16 beside bfloat16 it would stall."""
    state = make_state([torch.float32, torch.bfloat16], [(4, 5), (6,)])
    state.omega[1] = state.omega[1].bfloat16()
    message = r"omega\[1\] has dtype bfloat16 where float32 is expected beside bfloat16 values"
    refused("accumulate_importance_", state, message)


@pytest.mark.parametrize("op", PENALTY_OPS)
def test_omega_in_a_low_precision_beside_float64(op: str) -> None:
    for kept in (torch.bfloat16, torch.uint8):
        state = make_state([torch.float32, torch.float64], [(4, 5), (6,)])
        state.omega[1] = state.omega[1].to(kept)
        refused(
            op,
            state,
            r"omega\[1\] has dtype \w+(, which is not supported| where float64 is expected)",
        )


@pytest.mark.parametrize("op", OPS)
def test_omega_narrower_than_float64_parameters(op: str) -> None:
    state = make_state([torch.float32, torch.float64], [(4, 5), (6,)])
    state.omega[1] = state.omega[1].float()
    message = r"omega\[1\] has dtype float32 where float64 is expected beside float64 values"
    refused(op, state, message)


@pytest.mark.parametrize("change", ["one_less", "one_more", "none"])
@pytest.mark.parametrize(("op", "name"), BUT_FIRST)
def test_list_lengths(op: str, name: str, change: str) -> None:
    state = sound_state()
    tensors = state.lists()[name]
    tensors[:] = {"one_less": tensors[:1], "one_more": [*tensors, torch.ones(3)], "none": []}[
        change
    ]
    first = list_arguments(op)[0]
    message = f"{name} has {len(tensors)} tensors but {first} has 2; pass one of each per parameter"
    refused(op, state, message)


@pytest.mark.parametrize("op", OPS)
def test_empty_first_list(op: str) -> None:
    state = sound_state()
    first, second = list_arguments(op)[:2]
    state.lists()[first].clear()
    refused(op, state, f"{second} has 2 tensors but {first} has 0; pass one of each per parameter")


# ================================================================================================
# Ω in codes, and their scales
# ================================================================================================
WRONG_SCALES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "another_block": (
        lambda s: torch.ones(4),
        r"omega_scales\[1\] has shape \[4\] where \[3\] is expected, a scale for every 256 codes "
        r"of omega\[1\]; pass those it was compressed with",
    ),
    "a_block_less": (lambda s: s[:2], r"omega_scales\[1\] has shape \[2\] where \[3\] is expected"),
    "none": (lambda s: s[:0], r"omega_scales\[1\] has shape \[0\] where \[3\] is expected"),
    "a_column": (
        lambda s: s[:, None],
        r"omega_scales\[1\] has shape \[3, 1\] where \[3\] is expected",
    ),
    "float64": (lambda s: s.double(), r"omega_scales\[1\] has dtype float64; pass float32"),
    "strided": (
        lambda s: s.repeat_interleave(2)[::2],
        r"omega_scales\[1\] is not contiguous; pass contiguous\(\)",
    ),
    "sparse": (lambda s: s.to_sparse(), r"omega_scales\[1\] is not a dense \(strided\) tensor"),
    "meta": (
        lambda s: s.to("meta"),
        r"omega_scales\[1\] is on meta but omega\[1\] is on cpu; move it there",
    ),
}
each_penalty_op = pytest.mark.parametrize("op", PENALTY_OPS)


def state_in_codes() -> State:
    """The first Ω is wide, the second in codes of three blocks."""
    state = make_state([torch.float32, torch.bfloat16], [(4, 5), (30, 20)])
    state.omega[1], scales = compressed(state.omega[1])
    state.omega_scales = [torch.empty(0), scales]
    return state


@each_penalty_op
def test_codes_are_accepted(op: str) -> None:
    call(functional, op, state_in_codes())


@pytest.mark.parametrize(("spoil", "message"), WRONG_SCALES.values(), ids=WRONG_SCALES)
@each_penalty_op
def test_bad_scales(op: str, spoil: Callable, message: str) -> None:
    state = state_in_codes()
    state.omega_scales[1] = spoil(state.omega_scales[1])
    refused(op, state, f"mas_ext::{op}: {message}")


@each_penalty_op
def test_codes_without_scales_and_scales_without_codes(op: str) -> None:
    state = state_in_codes()
    state.omega_scales = []
    refused(
        op, state, r"omega\[1\] has uint8 codes but omega_scales is empty; pass the scales it was"
    )
    state = state_in_codes()
    state.omega_scales.pop()
    refused(op, state, "omega_scales has 1 tensors but omega has 2; pass one for each, without el")
    state = state_in_codes()
    state.omega_scales[0] = torch.ones(1)
    refused(
        op, state, r"omega_scales\[0\] has shape \[1\] but omega\[0\] is float32, which has no scal"
    )


@each_penalty_op
def test_codes_that_do_not_fill_their_memory(op: str) -> None:
    for spoil in (lambda t: t.repeat(1, 2)[:, ::2], lambda t: t[:, :1].expand(30, 20)):
        state = state_in_codes()
        state.omega[1] = spoil(state.omega[1])
        refused(op, state, r"omega\[1\] has uint8 codes that do not fill their memory")


@pytest.mark.parametrize("op", [op for op in WRITING_OPS if op in PENALTY_OPS])
def test_written_tensor_shares_memory_with_scales(op: str) -> None:
    state = state_in_codes()
    base = torch.ones(25)
    written = state.lists()[written_argument(op)]
    written[0], state.omega_scales[1] = base[:20].view(4, 5), base[19:22]
    refused(op, state, shares(op, "omega_scales"))


# ================================================================================================
# Shared memory
# ================================================================================================
def shares(op: str, other: str) -> str:
    """The message; which of two written tensors is named first is not settled."""
    written = written_argument(op)
    return (
        rf"{written}\[\d\] is written but shares memory with {other}\[\d\]; "
        r"pass a clone\(\) of one of them"
    )


# Two windows of 6 elements into a base of 16 that have at least one in common.
OVERLAPS = {
    "same": lambda base: (base[:6], base[:6]),
    "shifted": lambda base: (base[:6], base[5:11]),
    "reaching_back": lambda base: (base[3:9], base[:6]),
    "one_is_strided": lambda base: (base[:6], base[4:16:2]),
    "both_are_strided": lambda base: (base[0:12:2], base[10:16].as_strided((6,), (1,))),
    "another_stride": lambda base: (base[0:12:2], base[1:16:3].as_strided((6,), (3,), 0)),
    "expanded": lambda base: (base[:6], base[5:6].expand(6)),
}
WRITTEN_AND_READ = [(op, name) for op, name in ANYWHERE if op in WRITING_OPS]


@pytest.mark.parametrize("windows", OVERLAPS.values(), ids=OVERLAPS)
@pytest.mark.parametrize(("op", "name"), [pair for pair in WRITTEN_AND_READ if pair in BUT_FIRST])
def test_written_tensor_shares_memory_with_a_read_one(
    op: str, name: str, windows: Callable
) -> None:
    """So Ω on a gradient's memory, or parameters on it, or anchors on the parameters'."""
    state = make_state([torch.float32] * 3, [(4, 5), (6,), (6,)])
    written, read = windows(torch.rand(16))
    state.lists()[written_argument(op)][1] = written
    state.lists()[name][2] = read
    refused(op, state, shares(op, name))


@pytest.mark.parametrize("windows", list(OVERLAPS.values())[:-1], ids=list(OVERLAPS)[:-1])
@pytest.mark.parametrize("op", WRITING_OPS)
def test_two_written_tensors_share_memory(op: str, windows: Callable) -> None:
    state = make_state([torch.float32] * 3, [(4, 5), (6,), (6,)])
    state.lists()[written_argument(op)][1:] = windows(torch.rand(16))
    refused(op, state, shares(op, written_argument(op)))


# On a base of 16 float32: where Ω lies, which bfloat16 halves are written, whether they meet.
HALVES = {
    "range": (slice(0, 12, 2), slice(3, 9), True),
    "second_halves": (slice(0, 12, 2), slice(1, 24, 4), True),
    "second_halves_from_before": (slice(3, 15, 2), slice(3, 24, 4), True),
    "gaps": (slice(0, 12, 2), slice(2, 24, 4), False),
    "second_halves_of_gaps": (slice(0, 12, 2), slice(3, 24, 4), False),
    "gaps_from_before": (slice(3, 15, 2), slice(5, 28, 4), False),
}


@pytest.mark.parametrize(("omega", "window", "meets"), HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("op", ["add_penalty_grad_", "proximal_step_"])
def test_memory_of_two_dtypes(op: str, omega: slice, window: slice, meets: bool) -> None:
    """Elements of unequal size share memory where any of their bytes do."""
    base = torch.ones(16)
    state = make_state([torch.bfloat16], [(6,)])
    state.omega[0] = base[omega]
    state.lists()[written_argument(op)][0] = base.view(torch.bfloat16)[window][:6]
    if meets:
        refused(op, state, shares(op, "omega"))
    else:
        call(functional, op, state)
        assert torch.equal(state.omega[0], torch.ones(6))


SELF_OVERLAPS = {
    "expanded": lambda: torch.rand(1).expand(6),
    "expanded_rows": lambda: torch.rand(3).expand(2, 3),
    "sliding_windows": lambda: torch.rand(9).unfold(0, 3, 2),
}


@pytest.mark.parametrize("make", SELF_OVERLAPS.values(), ids=SELF_OVERLAPS)
@pytest.mark.parametrize("op", WRITING_OPS)
def test_written_tensor_overlaps_itself(op: str, make: Callable) -> None:
    tensor = make()
    state = make_state([torch.float32] * 2, [(4, 5), tuple(tensor.shape)])
    state.lists()[written_argument(op)][1] = tensor
    message = r"\[1\] is written but overlaps itself in memory \(an expanded tensor\?\); pass a "
    refused(op, state, written_argument(op) + message + r"clone\(\)")


# ================================================================================================
# Scalars
# ================================================================================================
NAMES = {
    "penalty": ["lambda_reg"],
    "penalty_and_grad": ["lambda_reg"],
    "add_penalty_grad_": ["lambda_reg", "grad_scale"],
    "proximal_step_": ["lambda_reg", "lr"],
}
SCALARS = [(op, name) for op, names in NAMES.items() for name in names]
OUT_OF_RANGE = {"negative": -1.0, "tiny": -1e-30, "nan": math.nan, "inf": math.inf}
RANGE = r"{} is \S+; pass a finite number that is not negative"

each_out_of_range = pytest.mark.parametrize("value", OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)


@each_out_of_range
@pytest.mark.parametrize(("op", "name"), SCALARS)
def test_number_out_of_range(op: str, name: str, value: float) -> None:
    scalars = Scalars()._replace(**{name: value})
    refused(op, sound_state(), RANGE.format(name), scalars, ValueError)


@each_out_of_range
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in SCALARS if op in WRITING_OPS])
def test_tensor_out_of_range(op: str, name: str, dtype: torch.dtype, value: float) -> None:
    """The differentiable operators take any: a backward pass hands them λ times a gradient."""
    scalars = Scalars()._replace(**{name: torch.tensor(value, dtype=dtype)})
    refused(op, sound_state(), f"mas_ext::{op}: " + RANGE.format(name), scalars)


@each_out_of_range
def test_scale_out_of_range(value: float) -> None:
    refused("accumulate_importance_", sound_state(), RANGE.format("scale"), Scalars(scale=value))


BAD_SCALAR_TENSORS = {
    "one_element": (torch.ones(1), r"has shape \[1\]; pass a number or a 0-dim tensor"),
    "matrix": (torch.ones(2, 3), r"has shape \[2, 3\]; pass a number or a 0-dim tensor"),
    "int64": (torch.tensor(1), r"has dtype \w+; pass a float32 or float64 tensor"),
    "bool": (torch.tensor(True), r"has dtype \w+; pass a float32 or float64 tensor"),
    "bfloat16": (
        torch.tensor(1.0).bfloat16(),
        "has dtype bfloat16; pass a float32 or float64 tensor",
    ),
    "meta": (
        torch.tensor(1.0, device="meta"),
        "is on meta but the tensors are on cpu; keep it on the CPU or on their device",
    ),
}


@pytest.mark.parametrize(("tensor", "message"), BAD_SCALAR_TENSORS.values(), ids=BAD_SCALAR_TENSORS)
@pytest.mark.parametrize(("op", "name"), SCALARS)
def test_bad_scalar_tensor(op: str, name: str, tensor: Tensor, message: str) -> None:
    scalars = Scalars()._replace(**{name: tensor})
    refused(op, sound_state(), f"mas_ext::{op}: {name} {message}", scalars)


# ================================================================================================
# The raw operators, and version counters
# ================================================================================================
@pytest.mark.parametrize("op", OPS)
def test_raw_operators_make_the_same_checks(op: str) -> None:
    """No entry point skips them."""
    state, first = sound_state(), list_arguments(op)[0]
    name = list_arguments(op)[1]
    state.lists()[name].pop()
    with pytest.raises(RuntimeError, match=f"mas_ext::{op}: {name} has 1 tensors but {first} has"):
        getattr(torch.ops.mas_ext, op)(*raw_arguments(op, state))


@pytest.mark.parametrize("op", PENALTY_OPS)
def test_fake_tensors_are_checked_too(op: str) -> None:
    """torch.compile then reports the mistake while it traces."""
    state = sound_state()
    state.anchors[1] = torch.zeros(7)
    on_meta = State(*([t.to("meta") for t in tensors] for tensors in state.lists().values()))
    with pytest.raises(RuntimeError, match=r"anchors\[1\] has shape \[7\] but \w+\[1\] has shape"):
        call(functional, op, on_meta)


@pytest.mark.parametrize("op", WRITING_OPS)
def test_a_refused_call_leaves_version_counters_alone(op: str) -> None:
    """Nothing was written, so what autograd saved is still good."""
    state = sound_state()
    state.lists()[list_arguments(op)[1]][1] = torch.zeros(7)
    weight = torch.ones(4, 5, requires_grad=True)
    written = state.lists()[written_argument(op)][0]
    result = (weight * written).sum()
    refused(op, state, r"\[1\] has shape \[7\]")
    assert written._version == 0
    result.backward()
    assert torch.equal(weight.grad, written)
