"""What tests of MAS share: a model that has learned, the penalty by hand, states, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import mas_ext
from mas_ext import MAS
from mas_ext._state.distributed_checkpoint import unpacked
from mas_ext._state.merging import POLICIES
from tests.support.zoo.small import mlp, vectors

MERGES = [(name, 0.3) if policy.has_alpha else name for name, policy in POLICIES.items()]


def learned(
    lambda_reg: Any = 2.0, dtype: torch.dtype = torch.float64, moved: bool = True, **options: Any
) -> tuple[nn.Module, MAS]:
    """A model and its MAS after one task; its parameters have moved since."""
    model = mlp(dtype)
    mas = MAS(model, lambda_reg, **options)
    mas.consolidate([vectors(dtype=dtype)])
    if moved:
        move(model)
    return model, mas


def move(model: nn.Module, by: float = 0.1) -> None:
    """What training would do; always the same."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(i)
            p.add_((by * torch.randn(p.shape, generator=generator)).to(p.dtype))


def train(model: nn.Module, mas: MAS, kind: str, mode: str, is_ours: bool) -> Tensor:
    """Three steps of torch's optimizer or of ours, with the penalty in it; the last penalty."""
    if is_ours:
        ours = getattr(mas_ext.optim, kind)
        optimizer = handle = ours(model.parameters(), lr=0.01, mas=mas, mode=mode)
    else:
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01)
        handle = mas.attach(optimizer, mode, every=1)
    for _ in range(3):
        optimizer.zero_grad()
        model(vectors()).square().mean().backward()
        optimizer.step()
    return handle.last_penalty


def penalty_by_hand(mas: MAS, model: nn.Module, strength: Any = None) -> Tensor:
    """λ/2 Σ Ω(θ−θ*)², differentiable; ``strength``: a number, or a function of the name."""
    strength = mas.lambda_reg if strength is None else strength
    named = dict(model.named_parameters())
    terms = [
        (strength(n) if callable(strength) else strength)
        / 2
        * (mas.importance[n] * (named[n] - anchor) ** 2).sum()
        for n, anchor in mas.anchor.items()
    ]
    return torch.stack(terms).sum()


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def plain_state(mas: MAS) -> dict[str, Any]:
    """The state as plain values and tensors, as a file has it."""
    return unpacked(mas.state_dict())


def assert_states_equal(a: Any, b: Any, path: str = "") -> None:
    """Exactly, of nested mappings and lists; NaN is equal to NaN."""
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=path or None)
    elif isinstance(a, Mapping):
        assert a.keys() == b.keys(), path
        for key, value in a.items():
            assert_states_equal(value, b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_states_equal(one, other, f"{path}/{i}")
    else:
        assert a == b, path


def assert_bits(a: nn.Module, b: nn.Module) -> None:
    assert_states_equal(a.state_dict(), b.state_dict())


class Refusal(NamedTuple):
    """A call that has to fail.

    Attributes:
        call: with the arguments that :func:`assert_refused` is given.
        kind: of the exception.
        words: what its message contains: the parameter's name, and the remedy's key word.
    """

    call: Callable[..., Any]
    kind: type[Exception]
    words: tuple[str, ...]


def refusal(call: Callable[..., Any], kind: type[Exception], *words: str) -> Refusal:
    return Refusal(call, kind, words)


def assert_refused(case: Refusal, *arguments: Any, unchanged: tuple[Any, ...] = ()) -> None:
    """It fails as it should, and what is ``unchanged`` keeps its state."""
    before = [copy.deepcopy(one.state_dict()) for one in unchanged]
    with pytest.raises(case.kind) as caught:
        case.call(*arguments)
    for word in case.words:
        assert word.lower() in str(caught.value).lower(), f"{word!r} is not in: {caught.value}"
    for one, state in zip(unchanged, before, strict=True):
        assert_states_equal(one.state_dict(), state)
