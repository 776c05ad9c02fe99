"""One model: every way checked against plain autograd, then timed in interleaved rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import starmap
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.entry import Tell
from benchmarks.tools import memory
from benchmarks.tools.timing import interleave
from benchmarks.training import task_end
from benchmarks.training.models import MODELS, Model
from benchmarks.training.setting import Setting, make
from benchmarks.training.task_end import AVALANCHE, BATCH, EXACT, SINGLY
from benchmarks.training.ways import PLAIN, PROXIMAL, WAYS, Step
from mas_ext import estimate_importance, preset

TOLERANCE = 1e-3  # float32
EVERY = 3  # rounds, in the first of which batch size 1 takes part: it is slow
TO_COMPILE = ("torch.compile, gradient", "torch.compile, in the loss")


class Seconds(NamedTuple):
    """Of a step: up to the gradients, and what comes after."""

    backward: float
    finish: float


@dataclass
class Measurement:
    """Seconds a step and a task's end, in the order of the rounds."""

    name: str
    parameters: int
    tensors: int
    seconds: dict[str, list[Seconds]] = field(default_factory=dict)
    in_the_loss: dict[str, bool] = field(default_factory=dict)
    task_end: dict[str, list[float]] = field(default_factory=dict)
    bytes: dict[str, int | None] = field(default_factory=dict)  # of a step, at its peak
    skipped: dict[str, str] = field(default_factory=dict)


def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """‖one − other‖ / ‖other‖, over all tensors."""

    def norm(tensors: Sequence[Tensor]) -> float:
        return float(torch.stack([t.detach().double().norm() for t in tensors]).norm())

    return norm([a - b for a, b in zip(one, other, strict=True)]) / norm(other)


def moved(chosen: Model, way: str) -> tuple[list[Tensor], Setting]:
    """How far one step of plain SGD takes the parameters, which tells all of its gradient."""
    s = make(chosen, "SGD", lr=0.1)
    before = [p.detach().clone() for p in s.state.params]
    WAYS[way](s)()
    return [p.detach() - b for p, b in zip(s.state.params, before, strict=True)], s


def expected(chosen: Model) -> tuple[list[Tensor], list[Tensor]]:
    """The same by autograd, of the penalty's gradient and of the proximal step."""
    with_penalty, _ = moved(chosen, "loop in the loss")
    plain, s = moved(chosen, PLAIN)

    def pulled(p: Tensor, step: Tensor, anchor: Tensor, omega: Tensor) -> Tensor:
        strength = 0.1 * s.lambda_reg * omega
        return (p + strength * anchor) / (1 + strength) - (p - step)

    state = s.state
    lists = zip(state.params, plain, state.anchors, state.omega, strict=True)
    with torch.no_grad():
        return with_penalty, list(starmap(pulled, lists))


def check(chosen: Model, ways: Sequence[str]) -> None:
    """Every way takes the step that autograd takes, and the step without MAS is another."""
    gradient, proximal = expected(chosen)
    visible = distance(moved(chosen, PLAIN)[0], gradient)
    assert visible > 10 * TOLERANCE, f"{chosen.title}: the penalty is too weak to be checked"
    for way in ways:
        if way != PLAIN:
            off = distance(moved(chosen, way)[0], proximal if way == PROXIMAL else gradient)
            assert off <= TOLERANCE, f"{chosen.title}, {way}: the step is off by {off:.1%}"


def sample(step: Step, steps: int) -> Seconds:
    """A step's two parts, each with a clock of its own."""
    backward = finish = 0.0
    for _ in range(steps):
        begin = perf_counter()
        step.backward()
        between = perf_counter()
        step.finish()
        backward += between - begin
        finish += perf_counter() - between
    return Seconds(backward / steps, finish / steps)


def ways_for(quick: bool) -> tuple[list[str], dict[str, str]]:
    """Those to time, and why others are not."""
    reason = "compiling is left out of a quick run"
    skipped = dict.fromkeys(TO_COMPILE, reason) if quick else {}
    return [way for way in WAYS if way not in skipped], skipped


def measure(name: str, rounds: int, tell: Tell, budget: float, quick: bool) -> Measurement:
    chosen = MODELS[name]
    torch.compiler.reset()
    parameters = list(chosen.model().parameters())
    result = Measurement(name, sum(p.numel() for p in parameters), len(parameters))
    ways, result.skipped = ways_for(quick)
    tell("checking against autograd, compiling")
    check(chosen, ways)
    settings = {way: make(chosen) for way in ways}
    steps = {way: WAYS[way](s) for way, s in settings.items()}
    tell("timing steps")
    result.seconds = interleave(steps, rounds, budget=0.8 * budget, sample=sample)
    result.in_the_loss = {way: step.in_the_loss for way, step in steps.items()}
    for way, s in settings.items():
        assert all(p.isfinite().all() for p in s.state.params), f"{way}: training diverged"
    result.bytes = {way: memory.growth_of(step) for way, step in steps.items()}
    del settings, steps
    tell("checking and timing the end of a task")
    result.task_end = measure_task_end(chosen, rounds, 0.2 * budget)
    return result


def measure_task_end(chosen: Model, rounds: int, budget: float) -> dict[str, list[float]]:
    dataset = task_end.data(chosen, chosen.task)
    check_task_end(chosen, samples=min(chosen.task, 2 * chosen.batch_size))
    steps = {
        name: way(make(chosen), dataset, chosen.batch_size)[0]
        for name, way in task_end.WAYS.items()
    }
    return interleave(steps, rounds, {SINGLY: EVERY}, budget)


def check_task_end(chosen: Model, samples: int) -> None:
    """Ours is that of batch size 1; Avalanche's is its preset's; a batch's mean is less."""
    dataset, size = task_end.data(chosen, samples), chosen.batch_size
    found = {}
    for name, way in task_end.WAYS.items():
        s = make(chosen)
        step, omega = way(s, dataset, size)
        before = [o.clone() for o in omega()]
        theirs = _as_avalanche(s, dataset, size) if name == AVALANCHE else None
        step()
        if theirs is not None:
            merged = [(b + t) / 2 for b, t in zip(before, theirs, strict=True)]
            assert distance(omega(), merged) <= TOLERANCE, f"{chosen.title}: Avalanche's Ω"
        found[name] = [o - b for o, b in zip(omega(), before, strict=True)]
    assert distance(found[EXACT], found[SINGLY]) <= TOLERANCE, f"{chosen.title}: Ω is not exact"
    share = _mass(found[BATCH]) / _mass(found[EXACT])
    assert 0 < share <= 1 + TOLERANCE, f"{chosen.title}: a batch's mean finds {share} of Ω"


def _as_avalanche(s: Setting, dataset: torch.utils.data.Dataset, size: int) -> list[Tensor]:
    loader = torch.utils.data.DataLoader(dataset, size)
    found = estimate_importance(s.model, loader, **preset("avalanche").importance)
    return [found[name] for name in s.names]


def _mass(omega: Sequence[Tensor]) -> float:
    return float(sum(o.double().sum() for o in omega))
