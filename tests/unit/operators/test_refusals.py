"""What the operators refuse: the kind of error, the argument it names, and the remedy's key word.

Every refused call is made twice, through mas_ext.functional and to the default kernel, which is
what runs where nothing was compiled. Neither may change a tensor or its version counter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mas_ext import functional, reference
from tests.support.operators import (
    ALL,
    OPERATORS,
    OPS,
    PENALTY_OPS,
    STEPS,
    Scalars,
    call,
    make,
    raw,
    raw_arguments,
    small,
)
from tests.support.tensors import State, compressed

# Every signature: of the optimizer steps one row for each set of moments.
ROWS = [*OPS, "sgd gradient", "momentum gradient", "adamw proximal"]
WRITING_ROWS = [op for op in ROWS if OPERATORS[op].written]
PENALTY_ROWS = [op for op in ROWS if OPERATORS[op].has_penalty]


def sound(op: str) -> State:
    if not OPERATORS[op].takes_lists:
        return small(op)
    return make(op, [torch.float32] * 3, [(4, 5), (6,), (6,)])


def default_kernel(op: str, state: State, scalars: Scalars) -> None:
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    with torch.no_grad():
        raw(op)._op_dk(key, *raw_arguments(op, state, scalars))


def tensors_of(state: State) -> Iterable[Tensor]:
    return (t for tensors in vars(state).values() for t in tensors)


def assert_refuses(run: Callable[[], Any], state: State, error: type, words: list[str]) -> None:
    """Each word is in the message; where one offers alternatives (``a|b``), one of them."""
    readable = [t for t in tensors_of(state) if t.device.type == "cpu"]
    before = [(t.detach().to_dense().clone(), t._version) for t in readable]
    with pytest.raises(error) as refusal:
        run()
    message = str(refusal.value).split("\nException raised from")[0]
    for word in words:
        assert any(one in message for one in word.split("|")), f"{word!r} is not in {message!r}"
    for tensor, (copy, version) in zip(readable, before, strict=True):
        assert torch.equal(tensor.detach().to_dense(), copy)
        assert tensor._version == version


def refused(
    op: str,
    state: State,
    *words: str,
    scalars: Scalars = Scalars(),  # noqa: B008
    error: type = RuntimeError,
    **more: Any,
) -> None:
    words_of_operators = [f"mas_ext::{OPERATORS[op].function}"] if error is RuntimeError else []
    found = [*words_of_operators, *words]
    assert_refuses(lambda: call(functional, op, state, scalars, **more), state, error, found)
    if not more and error is RuntimeError:
        assert_refuses(lambda: default_kernel(op, state, scalars), state, RuntimeError, found)


@pytest.mark.parametrize("op", ALL)
def test_the_sound_state_is_accepted(op: str) -> None:
    """Otherwise what follows could be refused for another reason than the one that is planted."""
    call(functional, op, sound(op))
    default_kernel(op, sound(op), Scalars())


# -- One bad tensor, which replaces the second of a list -------------------------------------------
Spoil = Callable[[Tensor], Tensor]
SUPPORTED = "pass float32, float64, bfloat16 or float16"
ANYWHERE: dict[str, tuple[Spoil, str]] = {
    "int64": (lambda t: t.to(torch.int64), SUPPORTED),
    "uint8": (lambda t: t.to(torch.uint8), f"{SUPPORTED}|scales"),
    "bool": (lambda t: t > 0, SUPPORTED),
    "complex64": (lambda t: t.to(torch.complex64), SUPPORTED),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), SUPPORTED),
    "sparse": (lambda t: t.to_sparse(), "to_dense()"),
    "meta": (lambda t: t.to("meta"), "one device"),
}
UNLIKE_THE_FIRST: dict[str, tuple[Spoil, str]] = {
    "longer": (lambda t: t.new_zeros(7), "one shape"),
    "more_dimensions": (lambda t: t.view(1, 6), "one shape"),
    "broadcastable": (lambda t: t.new_zeros(()), "one shape"),
    "float16": (lambda t: t.half(), "convert"),
}
BAD_TENSORS = [
    (op, name, kind)
    for op in ROWS
    for k, name in enumerate(OPERATORS[op].lists)
    for kind in (*ANYWHERE, *(UNLIKE_THE_FIRST if k else ()))
    # Gradients in float16 beside Ω in float32 are what this operator is for.
    if (OPERATORS[op].function, kind) != ("accumulate_importance_", "float16")
]


@pytest.mark.parametrize(("op", "name", "kind"), BAD_TENSORS)
def test_bad_tensor(op: str, name: str, kind: str) -> None:
    spoil, remedy = {**ANYWHERE, **UNLIKE_THE_FIRST}[kind]
    state = sound(op)
    tensors = getattr(state, name)
    tensors[1] = spoil(tensors[1])
    refused(op, state, f"{name}[1]", remedy)
    if kind in UNLIKE_THE_FIRST:  # then fake tensors, too: torch.compile reports it while it traces
        on_meta = state.map(lambda t: t.to("meta"))
        with pytest.raises(RuntimeError) as refusal:
            call(functional, op, on_meta)
        assert f"{name}[1]" in str(refusal.value)


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in ROWS for name in OPERATORS[op].lists[1:]]
)
def test_float64_beside_float32(op: str, name: str) -> None:
    state = sound(op)
    getattr(state, name)[1] = getattr(state, name)[1].double()
    refused(op, state, "[1]", "convert")


OMEGA_DTYPES = [  # op, dtype of the values, dtype of Ω
    ("accumulate_importance_", torch.bfloat16, torch.bfloat16),  # sums would stall
    *[(op, torch.float64, torch.float32) for op in ROWS],
    *[(op, torch.float64, kept) for op in PENALTY_ROWS for kept in (torch.bfloat16, torch.uint8)],
]


@pytest.mark.parametrize(("op", "dtype", "omega"), OMEGA_DTYPES, ids=str)
def test_dtype_of_omega(op: str, dtype: torch.dtype, omega: torch.dtype) -> None:
    state = make(op, [torch.float32, dtype], [(4, 5), (6,)])
    state.omega[1] = state.omega[1].to(omega)
    refused(op, state, "omega[1]", "convert|pass float32")


@pytest.mark.parametrize("change", ["one_less", "one_more", "none"])
@pytest.mark.parametrize(
    ("op", "k"), [(op, k) for op in ROWS for k in range(len(OPERATORS[op].lists))]
)
def test_list_lengths(op: str, k: int, change: str) -> None:
    state, name = sound(op), OPERATORS[op].lists[k]
    tensors = getattr(state, name)
    changed = {"one_less": tensors[:1], "one_more": [*tensors, torch.ones(3)], "none": []}[change]
    setattr(state, name, changed)
    # Lists are compared with the first: if that is the wrong one, any other may be named.
    blamed = name if k else "|".join([*OPERATORS[op].lists[1:], "steps"])
    refused(op, state, blamed, "pass one|pass them")
    on_meta = state.map(lambda t: t.to("meta"))
    with pytest.raises(RuntimeError, match=blamed):
        call(functional, op, on_meta)


# -- Ω in codes, and their scales ------------------------------------------------------------------
def in_codes(op: str) -> State:
    """The first Ω is float32, the second in codes of three blocks."""
    state = make(op, [torch.float32, torch.bfloat16], [(4, 5), (30, 20)])
    state.omega[1], scales = compressed(state.omega[1])
    state.omega_scales = [torch.empty(0), scales]
    return state


def replace(name: str, i: int, spoil: Spoil) -> Callable[[State], None]:
    def change(state: State) -> None:
        tensors = getattr(state, name)
        tensors[i] = spoil(tensors[i])

    return change


SCALES: dict[str, tuple[Callable[[State], None], tuple[str, str]]] = {
    name: (replace("omega_scales", 1, spoil), ("omega_scales[1]", remedy))
    for name, spoil, remedy in [
        ("a_block_more", lambda s: torch.ones(4), "compressed with"),
        ("a_block_less", lambda s: s[:2], "compressed with"),
        ("none", lambda s: s[:0], "compressed with"),
        ("a_column", lambda s: s[:, None], "compressed with"),
        ("float64", lambda s: s.double(), "pass float32"),
        ("strided", lambda s: s.repeat_interleave(2)[::2], "contiguous()"),
        ("sparse", lambda s: s.to_sparse(), "dense"),
        ("meta", lambda s: s.to("meta"), "move it"),
    ]
}
SCALES |= {
    "no_list": (lambda s: s.omega_scales.clear(), ("omega[1]", "scales")),
    "one_less": (lambda s: s.omega_scales.pop(), ("omega_scales", "pass one")),  # type: ignore[dict-item,func-returns-value]
    "without_codes": (
        replace("omega_scales", 0, lambda s: torch.ones(1)),
        ("omega_scales[0]", "without elements"),
    ),
    "gaps_in_codes": (
        replace("omega", 1, lambda t: t.repeat(1, 2)[:, ::2]),
        ("omega[1]", "dense"),
    ),
    "expanded_codes": (
        replace("omega", 1, lambda t: t[:, :1].expand(30, 20)),
        ("omega[1]", "dense"),
    ),
}


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("op", PENALTY_ROWS)
def test_codes_and_scales(op: str, kind: str) -> None:
    spoil, words = SCALES[kind]
    state = in_codes(op)
    call(functional, op, in_codes(op))  # else it could be refused for another reason
    spoil(state)
    refused(op, state, *words)


# -- Shared memory ---------------------------------------------------------------------------------
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
PAIRS = [
    (op, w, n) for op in WRITING_ROWS for w in OPERATORS[op].written for n in OPERATORS[op].lists
]


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize(("op", "written", "other"), PAIRS)
def test_written_tensor_shares_memory(op: str, written: str, other: str, overlap: str) -> None:
    """With one that is read, or one that is written, of the same list or another."""
    if overlap == "expanded" and other in OPERATORS[op].written:
        return  # that overlaps itself
    state = sound(op)
    one, two = OVERLAPS[overlap](torch.rand(16))
    getattr(state, written)[1], getattr(state, other)[2] = one, two
    refused(op, state, f"{written}[1]|{other}[2]", f"{other}[2]", "clone()")


@pytest.mark.parametrize("op", [op for op in WRITING_ROWS if op in PENALTY_ROWS])
def test_written_tensor_shares_memory_with_scales(op: str) -> None:
    state, base = in_codes(op), torch.ones(25)
    getattr(state, OPERATORS[op].written[0])[0] = base[:20].view(4, 5)
    state.omega_scales[1] = base[19:22]
    refused(op, state, f"{OPERATORS[op].written[0]}[0]", "omega_scales[1]", "clone()")


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
    (written,), base = OPERATORS[op].written, torch.ones(16)
    state = make(op, [torch.bfloat16], [(6,)])
    state.omega[0] = base[omega]
    getattr(state, written)[0] = base.view(torch.bfloat16)[window][:6]
    if meets:
        refused(op, state, f"{written}[0]", "omega[0]", "clone()")
    else:
        call(functional, op, state)
        default_kernel(op, state, Scalars())
        assert torch.equal(state.omega[0], torch.ones(6))


SELF_OVERLAPS = {
    "expanded": lambda: torch.rand(1).expand(6),
    "expanded_rows": lambda: torch.rand(3).expand(2, 3),
    "sliding_windows": lambda: torch.rand(9).unfold(0, 3, 2),
}


@pytest.mark.parametrize("kind", SELF_OVERLAPS)
@pytest.mark.parametrize(
    ("op", "name"), [(o, n) for o in WRITING_ROWS for n in OPERATORS[o].written]
)
def test_written_tensor_overlaps_itself(op: str, name: str, kind: str) -> None:
    tensor = SELF_OVERLAPS[kind]()
    state = make(op, [torch.float32] * 2, [(4, 5), tuple(tensor.shape)])
    getattr(state, name)[1] = tensor
    refused(op, state, f"{name}[1]", "overlaps itself", "clone()")


# -- Scalars and options ---------------------------------------------------------------------------
OUT_OF_RANGE = {"negative": -1.0, "tiny": -1e-30, "nan": math.nan, "inf": math.inf}
SCALARS = [(op, n) for op in ROWS for n in OPERATORS[op].scalars if n != "found_inf"]


@pytest.mark.parametrize("value", OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
@pytest.mark.parametrize(("op", "name"), SCALARS)
def test_scalar_out_of_range(op: str, name: str, value: float) -> None:
    scalars = Scalars()._replace(**{name: value})
    refused(op, sound(op), name, "finite", scalars=scalars, error=ValueError)
    # The differentiable take any in a tensor: a backward pass hands them λ times a gradient.
    for dtype in (torch.float32, torch.float64):
        if OPERATORS[op].written:
            scalars = Scalars()._replace(**{name: torch.tensor(value, dtype=dtype)})
            refused(op, sound(op), name, "finite", scalars=scalars)


BAD_SCALARS = {
    "one_element": (torch.ones(1), "0-dim"),
    "matrix": (torch.ones(2, 3), "0-dim"),
    "int64": (torch.tensor(1), "float32 or float64"),
    "bool": (torch.tensor(True), "float32 or float64"),
    "bfloat16": (torch.tensor(1.0).bfloat16(), "float32 or float64"),
    "meta": (torch.tensor(1.0, device="meta"), "device"),
}


@pytest.mark.parametrize("kind", BAD_SCALARS)
@pytest.mark.parametrize(("op", "name"), [(op, n) for op in ROWS for n in OPERATORS[op].scalars])
def test_bad_scalar_tensor(op: str, name: str, kind: str) -> None:
    tensor, remedy = BAD_SCALARS[kind]
    scalars = Scalars()._replace(**{name: tensor})
    with pytest.raises(RuntimeError) as refusal:  # raw_arguments would convert it
        call(functional, op, sound(op), scalars)
    message = str(refusal.value)
    assert f"mas_ext::{OPERATORS[op].function}: {name} " in message
    assert remedy in message


@pytest.mark.parametrize("value", OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
@pytest.mark.parametrize("op", [op for op in ALL if "scale" in OPERATORS[op].arguments])
def test_scale_out_of_range(op: str, value: float) -> None:
    refused(op, sound(op), "scale", "finite", scalars=Scalars(scale=value))


OPTIONS: list[tuple[str, dict[str, Any], str, str]] = [
    ("momentum gradient", {"momentum": -0.1}, "momentum", "not negative"),
    ("momentum gradient", {"dampening": math.inf}, "dampening", "finite"),
    ("sgd gradient", {"weight_decay": -1.0}, "weight_decay", "not negative"),
    ("sgd gradient", {"nesterov": True}, "nesterov", "momentum above zero"),
    ("momentum gradient", {"nesterov": True}, "nesterov", "no dampening"),
    ("momentum gradient", {"momentum": 0.0}, "momentum_buffers", "leave"),
    ("sgd gradient", {"momentum": 0.9}, "momentum_buffers", "pass one"),
    ("adamw gradient", {"betas": (1.0, 0.9)}, "beta1", "up to but not including 1"),
    ("adamw gradient", {"betas": (0.9, -0.5)}, "beta2", "from 0"),
    ("adamw gradient", {"eps": -1.0}, "eps", "not negative"),
    ("adamw gradient", {"weight_decay": -1.0}, "weight_decay", "not negative"),
    ("adamw gradient", {"steps": torch.ones(2)}, "steps", "pass one"),
    ("adamw gradient", {"steps": torch.ones(3, 1)}, "steps", "pass one"),
    ("adamw gradient", {"steps": torch.ones(3).int()}, "steps", "float32 or float64"),
    ("adamw gradient", {"steps": torch.tensor([1.0, -1.0, 2.0])}, "steps[1]", "not negative"),
    ("adamw gradient", {"steps": torch.ones(3, device="meta")}, "steps", "move it|device"),
]
OPTIONS += [
    (op, {"grad_scale": torch.tensor(0.0)}, "grad_scale", "above zero") for op in STEPS[::4]
]


@pytest.mark.parametrize(("op", "options", "name", "remedy"), OPTIONS)
def test_options_of_a_step(op: str, options: dict[str, Any], name: str, remedy: str) -> None:
    refused(op, sound(op), name, remedy, **options)


MODES, REDUCTIONS = ("mode", "'gradient' or 'proximal'"), ("reduction", "'abs' or 'square'")


@pytest.mark.parametrize(
    ("op", "words"),
    [
        ("sgd gradient", MODES),
        ("adamw gradient", MODES),
        ("accumulate_importance_", REDUCTIONS),
        ("accumulate_outer_", REDUCTIONS),
    ],
)
def test_an_unknown_name(op: str, words: tuple[str, str]) -> None:
    refused(op, sound(op), *words, error=ValueError, **{words[0]: "newton"})


@pytest.mark.parametrize("op", ["accumulate_importance_", "accumulate_outer_"])
def test_the_reference_refuses_an_unknown_reduction(op: str) -> None:
    state = sound(op)
    unknown = partial(call, reference, op, state, reduction="newton")
    assert_refuses(unknown, state, ValueError, [*REDUCTIONS])


# -- accumulate_outer_ ------------------------------------------------------------------------
OUTER: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]], tuple[str, ...]]] = {
    "omega_1d": (lambda o, x, y: {"omega": o[0]}, ("omega", "[p, d]")),
    "left_2d": (lambda o, x, y: {"left": x[0]}, ("left", "[samples, positions, p]")),
    "right_4d": (lambda o, x, y: {"right": y[None]}, ("right", "[samples, positions, d]")),
    "samples": (lambda o, x, y: {"right": y[:2]}, ("right", "left", "samples")),
    "left_4d": (lambda o, x, y: {"left": x[:, None]}, ("right", "[samples, positions, d]")),
    "omega_3d": (lambda o, x, y: {"omega": o[:, None]}, ("right", "[samples, positions, d]")),
    "more_positions": (
        lambda o, x, y: {"left": x[:, None], "right": y[:, :, None]},
        ("right", "left", "positions"),
    ),
    "more_columns": (
        lambda o, x, y: {"omega": o[:, None], "right": y[..., None]},
        ("right", "omega", "both d"),
    ),
    "positions": (lambda o, x, y: {"right": y[:, :1]}, ("right", "left", "positions")),
    "rows": (lambda o, x, y: {"omega": o.mT}, ("left", "omega", "both p")),
    "columns": (lambda o, x, y: {"right": y[..., :1]}, ("right", "omega", "both d")),
    "omega_float64": (lambda o, x, y: {"omega": o.double()}, ("omega", "convert")),
    "omega_bfloat16": (lambda o, x, y: {"omega": o.bfloat16()}, ("omega", "convert")),
    "right_bfloat16": (lambda o, x, y: {"right": y.bfloat16()}, ("right", "convert")),
    "int64": (lambda o, x, y: {"left": x.long()}, ("left|omega", SUPPORTED + "|convert")),
    "sparse_left": (lambda o, x, y: {"left": x.to_sparse()}, ("left", "to_dense()")),
    "sparse_omega": (lambda o, x, y: {"omega": o.to_sparse()}, ("omega", "to_dense()")),
    "meta": (lambda o, x, y: {"left": x.to("meta")}, ("left", "one device")),
    "expanded": (lambda o, x, y: {"omega": o[0].expand(5, 6)}, ("omega", "itself", "clone()")),
    "folded": (lambda o, x, y: {"omega": x.as_strided((5, 6), (2, 1))}, ("omega", "clone()")),
    "aliased_left": (
        lambda o, x, y: {"omega": x.view(-1)[:30].view(5, 6)},
        ("omega", "left", "clone()"),
    ),
    "aliased_right": (
        lambda o, x, y: {"omega": y.view(-1)[7:37].view(5, 6)},
        ("omega", "right", "clone()"),
    ),
}


@pytest.mark.parametrize("kind", OUTER)
def test_outer(kind: str) -> None:
    op = "accumulate_outer_"
    spoil, words = OUTER[kind]
    state = sound(op)
    for name, tensor in spoil(*state.omega, *state.left, *state.right).items():
        getattr(state, name)[0] = tensor
    refused(op, state, *words)
    if kind in ("samples", "positions", "rows", "columns", "omega_float64", "right_bfloat16"):
        with pytest.raises(RuntimeError, match=f"mas_ext::{op}: .*{words[0]}"):
            call(functional, op, state.map(lambda t: t.to("meta")))


def test_fake_tensors_on_two_devices() -> None:
    with torch._subclasses.FakeTensorMode():
        for op in PENALTY_OPS:
            state = sound(op).map(lambda t: torch.empty_like(t, device="cuda:0"))
            state.anchors[1] = state.anchors[1].cpu()
            with pytest.raises(RuntimeError, match=r"anchors\[1\].* one device"):
                call(functional, op, state)
