"""What grows, and the ways that are timed along it; each is checked at every point."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.lists import penalty, roofline
from benchmarks.lists.measure import ROOFLINE, bind, check
from benchmarks.lists.shapes import Shapes
from benchmarks.lists.state import State, assert_same, make_state
from benchmarks.per_sample.measure import TOLERANCE, error
from benchmarks.per_sample.providers import batch_mean, in_chunks, ours, vmapped
from benchmarks.per_sample.workloads import Batch, gpt2
from benchmarks.training.models import mlp
from mas_ext import MAS

Calls = dict[str, Callable[[], object]]  # ours first
OURS = "mas_ext"
MOST_COMPILED = 100  # tensors; in a quick run none
SAMPLES = 64  # of a task


@dataclass(frozen=True)
class Axis:
    """``prepare``: from a value and whether the run is quick, the calls to time."""

    title: str
    label: str
    values: tuple[int, ...]
    quick: tuple[int, ...]
    prepare: Callable[[int, bool], Calls]


def one_tensor(numel: int, quick: bool) -> Calls:
    return _penalty([torch.Size([numel])], quick)


def some_tensors(numel: int, quick: bool) -> Calls:
    return _penalty([torch.Size([numel // 25])] * 25, quick)


def tensors(count: int, quick: bool) -> Calls:
    return _penalty([torch.Size([4_000_000 // count])] * count, quick)


def _penalty(shapes: Shapes, quick: bool) -> Calls:
    torch.compiler.reset()
    state, most = make_state(shapes), 0 if quick else MOST_COMPILED
    providers = [
        p
        for p in penalty.JOB.providers
        if not p.flat and (p.most_tensors is None or len(shapes) <= most)
    ]
    check(penalty.JOB, providers, state, state)
    calls: Calls = {p.name: bind(p, state) for p in providers}
    return {**calls, ROOFLINE: roofline.make(penalty.JOB.streams(state))}


def tasks(count: int, quick: bool) -> Calls:
    """Ours merges Ω into one; who keeps a term a task pays for each at every step."""
    torch.manual_seed(0)
    model, data = mlp(), [torch.randn(SAMPLES, 784)]
    mas = MAS(model, lambda_reg=0.1)
    for _ in range(count):
        mas.consolidate(data)
    terms = _terms(model, mas, count)
    _check_terms(mas, terms)
    end = MAS(mlp())
    return {
        OURS: mas.add_penalty_grad_,
        "a term a task, torch._foreach": lambda: [penalty.foreach(term) for term in terms],
        f"mas_ext, the end of a task of {SAMPLES}": lambda: end.consolidate(data),
    }


def _terms(model: nn.Module, mas: MAS, count: int) -> list[State]:
    """The same penalty as a sum over tasks, all of which the parameters have now left."""
    params = list(model.parameters())
    with torch.no_grad():
        for p in params:
            p.add_(0.01 * torch.randn_like(p))
            p.grad = torch.zeros_like(p)
    anchors = [mas.anchor[name].clone() for name, _ in model.named_parameters()]
    return [
        State(
            params,
            anchors,
            [mas.importance[name] / count for name, _ in model.named_parameters()],
            mas.lambda_reg,
        )
        for _ in range(count)
    ]


def _check_terms(mas: MAS, terms: list[State]) -> None:
    params = terms[0].params
    mas.add_penalty_grad_()
    fused = [p.grad.clone() for p in params]
    for p in params:
        p.grad.zero_()
    for term in terms:
        penalty.foreach(term)
    assert any(grad.any() for grad in fused), "there is no penalty"
    assert_same([p.grad for p in params], fused, "a term a task")


def batch(size: int, quick: bool) -> Calls:
    torch.manual_seed(0)
    return _importance(mlp, torch.randn(size, 784))


def length(positions: int, quick: bool) -> Calls:
    torch.manual_seed(0)
    build = partial(gpt2, width=64, layers=2, vocabulary=512, length=positions)
    return _importance(build, {"input_ids": torch.randint(512, (8, positions))})


def _importance(build: Callable[[], nn.Module], data: Batch) -> Calls:
    ways = {
        OURS: ours,
        "batch-mean, inexact": batch_mean,
        "batch size 1": partial(in_chunks, length=1),
        "vmap(grad), unchunked": partial(vmapped, length=sys.maxsize),
    }
    calls, found = {}, {}
    for name, way in ways.items():
        torch.manual_seed(0)
        calls[name] = way(build().eval(), data)
        found[name] = calls[name]()
    for name in (OURS, "vmap(grad), unchunked"):
        _check_omega(name, found[name], found["batch size 1"])
    return calls


def _check_omega(name: str, omega: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    off, worst = error(omega, expected)
    assert off <= TOLERANCE, f"{name}: Ω of {worst} is off by {off:.1%}"


_POWERS = tuple(10**power for power in range(1, 8))  # beyond: the lists of real models
AXES = {
    "parameters": Axis("penalty, one tensor", "parameters", _POWERS, (1000, 1_000_000), one_tensor),
    "parameters_in_tensors": Axis(
        "penalty, 25 tensors", "parameters", _POWERS[2:], (1000, 1_000_000), some_tensors
    ),
    "tensors": Axis(
        "penalty, 4 M parameters", "tensors", (1, 10, 100, 1000, 10_000), (1, 100), tensors
    ),
    "tasks": Axis(
        "penalty after so many tasks, MLP", "tasks", (1, 2, 5, 10, 20, 50), (1, 5), tasks
    ),
    "batch": Axis(
        "Ω of a batch, MLP", "samples", (1, 2, 4, 8, 16, 32, 64, 128, 256), (1, 32), batch
    ),
    "length": Axis(
        "Ω of 8 sequences, a small GPT-2", "positions", (8, 16, 32, 64, 128, 256), (8, 16), length
    ),
}
