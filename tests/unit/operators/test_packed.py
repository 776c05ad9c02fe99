"""Lists of tensors that reach a kernel packed, and those that cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mas_ext import build_info, functional, reference
from mas_ext._operators import native
from tests.support.operators import ALL, OPERATORS, arguments, call, lists_of, samples, small
from tests.support.tensors import DTYPES, assert_same_bits

pytestmark = pytest.mark.skipif(not build_info()["native"], reason="this is about the kernels")
WRITING = [op for op in ALL if OPERATORS[op].takes_lists and OPERATORS[op].written]


@pytest.mark.parametrize(
    ("op", "sample"), [(op, sample) for op in WRITING for sample in samples(op)[::6]], ids=str
)
def test_both_ways_give_the_same_bits(op: str, sample: Any, monkeypatch: Any) -> None:
    packed, listed = (sample.make(OPERATORS[op].moments) for _ in range(2))
    values = [call(functional, op, packed).value]
    monkeypatch.setattr(native, "pack", lambda lists: None)
    values.append(call(functional, op, listed).value)
    for one, other in zip(
        lists_of(op, packed).values(), lists_of(op, listed).values(), strict=True
    ):
        for a, b in zip(one, other, strict=True):
            assert_same_bits(a, b)
    if values[0] is not None:
        assert_same_bits(*values)


class Subclass(Tensor):
    pass


PLAIN = {
    "parameter": lambda: nn.Parameter(torch.ones(3)),
    "transposed": lambda: torch.ones(3, 4).t(),
    "strided": lambda: torch.ones(3, 4)[:, ::2],
    "one element": lambda: torch.ones(1, 1),
    "no dimension": lambda: torch.ones(()),
    "no element": lambda: torch.ones(0, 3),
    "expanded": lambda: torch.ones(1).expand(4),
    "codes": lambda: torch.ones(3, dtype=torch.uint8),
    **{name: lambda dtype=dtype: torch.ones(3, dtype=dtype) for name, dtype in DTYPES.items()},
}
HIDDEN = {
    "negated": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    "negated, one element": lambda: torch.ones(1, dtype=torch.complex64).conj().imag,
    "negated, no dimension": lambda: torch.ones((), dtype=torch.complex64).conj().imag,
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "whole numbers": lambda: torch.ones(3, dtype=torch.int64),
    "sparse": lambda: torch.ones(3).to_sparse(),
    "without memory": lambda: torch.ones(3, device="meta"),
    "subclass": lambda: torch.ones(3).as_subclass(Subclass),
    "not a tensor": lambda: 1.0,
}


@pytest.mark.parametrize("kind", PLAIN)
def test_what_is_packed(kind: str) -> None:
    assert native.pack([[PLAIN[kind](), torch.ones(2)], []]) is not None


@pytest.mark.parametrize("kind", HIDDEN)
def test_what_is_not(kind: str) -> None:
    assert native.pack([[torch.ones(2)], [torch.ones(2), HIDDEN[kind]()]]) is None


@pytest.mark.parametrize("shape", [(3,), (1,), ()])
def test_a_tensor_that_holds_its_negative_is_read_as_its_values(shape: tuple[int, ...]) -> None:
    """Its memory has the other sign."""
    negated = torch.full(shape, 2.0, dtype=torch.complex64).mul(1j).conj().imag
    assert negated.is_neg()
    grads = [torch.zeros(shape)]
    anchors, omega = [torch.zeros(shape)], [torch.ones(shape)]
    functional.add_penalty_grad_(grads, [negated], anchors, omega, 1.0)
    torch.testing.assert_close(grads[0], torch.full(shape, -2.0))


@pytest.mark.parametrize("op", WRITING)
def test_a_list_that_is_packed_once_is_read_in_each_call(op: str) -> None:
    state, plain = small(op), small(op)
    state.omega = native.FixedList(state.omega)
    for _ in range(2):
        call(functional, op, state)
        call(reference, op, plain)
        for name in OPERATORS[op].written:
            for a, b in zip(lists_of(op, state)[name], lists_of(op, plain)[name], strict=True):
                torch.testing.assert_close(a, b)
        for omega in (*state.omega, *plain.omega):
            omega.mul_(2)


def test_bytes_are_not_read_after_the_call() -> None:
    """Tensors may come to be elsewhere between two calls."""
    args = arguments("proximal_step_", small("proximal_step_"))
    (params, *others), before = args, args[0][0].clone()
    moved = params[0].clone()
    functional.proximal_step_(params, *others)
    stepped = params[0].clone()
    assert not torch.equal(stepped, before)
    params[0].data = moved
    functional.proximal_step_(params, *others)
    assert_same_bits(params[0], stepped)


@pytest.mark.parametrize("compiled", [True, False])
def test_changes_of_dictionaries_are_seen(compiled: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(native, "_IS_NATIVE", compiled)
    weight, other = torch.ones(2), torch.ones(2)
    owner: dict[str, Any] = {"weight": weight, "bias": None}
    entries, sizes = [(owner, "weight", weight), (owner, "bias", None)], [(owner, 2)]
    assert native.are_as_before(entries, sizes)
    for change in ({"weight": other}, {"bias": other}, {"new": None}):
        changed = {**owner, **change}
        renamed = [(changed, key, value) for _, key, value in entries]
        assert not native.are_as_before(renamed, [(changed, 2)])
    del owner["bias"]
    assert not native.are_as_before(entries, sizes)
