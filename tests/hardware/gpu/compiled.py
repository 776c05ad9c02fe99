"""torch.compile(mode="reduce-overhead"): the operators inside inductor's own CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import mas_ext
from tests.hardware.gpu.device import DEVICE, REHEARSAL
from tests.support import operators
from tests.support.operators import OPERATORS, Scalars
from tests.support.tensors import State

SHAPES = [(33,), (4, 5), (), (9000,)]
STRENGTHS = (0.5, 2.0, 7.0, 0.25, 3.0)
Lists = dict[str, list[Tensor]]


def around(op: str) -> Callable[[Lists, Tensor, Tensor], list[Tensor]]:
    """An operator with work before and after it, which writes only to what it made itself.

    Inductor does not put into a graph what writes to a function's inputs.
    """

    def function(lists: Lists, strength: Tensor, other: Tensor) -> list[Tensor]:
        state = State(**{name: [t * 1.5 for t in tensors] for name, tensors in lists.items()})
        scalars = Scalars(2 * strength, other, other)
        value, tensors = operators.call(mas_ext.functional, op, state, scalars)
        return [t + 1 for t in tensors] + ([] if value is None else [value * 2])

    return function


def inputs(op: str) -> Lists:
    if OPERATORS[op].takes_lists:
        state = operators.make(op, [torch.float32] * len(SHAPES), SHAPES, device=DEVICE)
    else:
        state = operators.medium(op, device=DEVICE)
    return operators.lists_of(op, state)


def compile_for_graphs(function: Callable) -> Callable:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(function, fullgraph=True, mode="reduce-overhead")


@pytest.mark.parametrize("op", [op for op in operators.ALL if op not in operators.STEPS])
def test_compiled_is_eager(op: str) -> None:
    function, lists = around(op), inputs(op)
    compiled = compile_for_graphs(function)
    for strength in STRENGTHS:
        scalars = [torch.tensor(value, device=DEVICE) for value in (strength, strength / 3)]
        results = [t.clone() for t in compiled(lists, *scalars)]  # the next run writes over them
        torch.testing.assert_close(results, function(lists, *scalars))
    assert_graphs_were_used()


def test_compiled_backward_is_eager() -> None:
    def loss(params: list[Tensor], anchors: list[Tensor], omega: list[Tensor], strength: Tensor):
        return 3 * mas_ext.functional.penalty(params, anchors, omega, strength)

    compiled, lists = compile_for_graphs(loss), inputs("penalty")
    state = lists["params"], lists["anchors"], lists["omega"]
    for strength in STRENGTHS:
        scalar, found = torch.tensor(strength, device=DEVICE), []
        for function in (compiled, loss):
            for p in lists["params"]:
                p.requires_grad_().grad = None
            function(*state, scalar).backward()
            found.append([p.grad.clone() for p in lists["params"]])
        torch.testing.assert_close(*found)
    assert_graphs_were_used()


def assert_graphs_were_used() -> None:
    """Inductor counts where it leaves graphs out, and keeps those it has made in trees."""
    frames = counters["stats"]["unique_graphs"]
    assert frames == 1, f"compiled {frames} times for new values"
    skips = counters["inductor"]["cudagraph_skips"]
    assert skips == int(REHEARSAL), f"inductor left CUDA graphs out {skips} times"
    if not REHEARSAL:
        from torch._inductor.cudagraph_trees import get_container

        manager = get_container(torch.cuda.current_device()).tree_manager
        assert manager is not None, "inductor made no CUDA graph"
        assert any(manager.roots.values()), "inductor recorded no CUDA graph"
