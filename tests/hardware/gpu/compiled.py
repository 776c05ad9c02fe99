"""torch.compile(mode="reduce-overhead"): the operators inside inductor's own CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import mas_ext
from tests.hardware.gpu.checks import NeedsGpu, Session
from tests.support import abs_matmul, operators
from tests.support.operators import OPERATORS, Scalars
from tests.support.tensors import State

SHAPES = [(33,), (4, 5), (), (9000,)]
STRENGTHS = (0.5, 2.0, 7.0, 0.25, 3.0)
Lists = dict[str, list[Tensor]]


def run(session: Session) -> None:
    for op in operators.ALL:
        if op not in operators.STEPS:
            session.check(f"{op}, scalars on the device", compiled_is_eager, session.device, op)
    session.check("penalty, and its backward pass", compiled_backward_is_eager, session.device)


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


def inputs(op: str, device: str) -> Lists:
    if OPERATORS[op].takes_lists:
        state = operators.make(op, [torch.float32] * len(SHAPES), SHAPES, device=device)
    else:
        state = abs_matmul.make(abs_matmul.Size(3, 17, 70, 66), device=device)
    return operators.lists_of(op, state)


def compile_for_graphs(function: Callable) -> Callable:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(function, fullgraph=True, mode="reduce-overhead")


def compiled_is_eager(device: str, op: str) -> str:
    function, lists = around(op), inputs(op, device)
    compiled = compile_for_graphs(function)
    for strength in STRENGTHS:
        scalars = [torch.tensor(value, device=device) for value in (strength, strength / 3)]
        results = [t.clone() for t in compiled(lists, *scalars)]  # the next run writes over them
        torch.testing.assert_close(results, function(lists, *scalars))
    return graphs_were_used(device)


def compiled_backward_is_eager(device: str) -> str:
    def loss(params: list[Tensor], anchors: list[Tensor], omega: list[Tensor], strength: Tensor):
        return 3 * mas_ext.functional.penalty(params, anchors, omega, strength)

    compiled, lists = compile_for_graphs(loss), inputs("penalty", device)
    state = lists["params"], lists["anchors"], lists["omega"]
    for strength in STRENGTHS:
        scalar, found = torch.tensor(strength, device=device), []
        for function in (compiled, loss):
            for p in lists["params"]:
                p.requires_grad_().grad = None
            function(*state, scalar).backward()
            found.append([p.grad.clone() for p in lists["params"]])
        torch.testing.assert_close(*found)
    return graphs_were_used(device)


def graphs_were_used(device: str) -> str:
    """Inductor counts where it leaves graphs out, and keeps those it has made in trees."""
    frames = counters["stats"]["unique_graphs"]
    assert frames == 1, f"compiled {frames} times for new values"
    if device == "cpu":
        raise NeedsGpu("compiled and compared, without graphs")
    skips = counters["inductor"]["cudagraph_skips"]
    assert skips == 0, f"inductor left CUDA graphs out {skips} times"
    from torch._inductor.cudagraph_trees import get_container

    manager = get_container(torch.cuda.current_device()).tree_manager
    assert manager is not None, "inductor made no CUDA graph"
    assert any(manager.roots.values()), "inductor recorded no CUDA graph"
    return "in CUDA graphs"
