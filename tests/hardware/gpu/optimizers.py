"""Optimizer steps with the penalty in them, beside the penalty and then torch's own step."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mas_ext import functional
from tests.hardware.gpu import clock, jobs, lists
from tests.hardware.gpu.bandwidth import COPY, ROUNDS, ROUNDS_OF_A_REHEARSAL, make_copy, over
from tests.hardware.gpu.checks import NeedsGpu, Session, Table

FUSED, FOREACH = "fused", "foreach"  # torch's implementations
SIZE = 25_000_000
LISTS = {f"one tensor of {SIZE:,}": lambda: [(SIZE,)], **lists.LISTS}
LISTS_OF_A_REHEARSAL = lists.LISTS_OF_A_REHEARSAL
RATE, STEPS_TAKEN = 1e-3, 100.0


@dataclass(frozen=True)
class Rule:
    """An optimizer: torch's class, our operator, the options of both, and the moments."""

    torchs: type[torch.optim.Optimizer]
    op: str
    options: dict[str, Any] = field(default_factory=dict)
    moments: tuple[tuple[str, str], ...] = ()  # our argument, torch's state


ADAM = (("exp_avgs", "exp_avg"), ("exp_avg_sqs", "exp_avg_sq"))
RULES = {
    "SGD": Rule(torch.optim.SGD, "sgd_step_"),
    "SGD, momentum": Rule(
        torch.optim.SGD,
        "sgd_step_",
        {"momentum": 0.9},
        moments=(("momentum_buffers", "momentum_buffer"),),
    ),
    "AdamW": Rule(torch.optim.AdamW, "adamw_step_", {"weight_decay": 0.01}, moments=ADAM),
}


def run(session: Session) -> None:
    for title, shapes in (LISTS_OF_A_REHEARSAL if session.rehearsal else LISTS).items():
        columns = ["step", "µs", "of a copy", FUSED, FOREACH]
        note = "fused, foreach: the penalty's operator and then torch's step, their time over ours"
        table = session.table(f"Steps with the penalty in them, {title}", columns, note)
        for name in RULES:
            for mode in ("gradient", "proximal"):
                check = f"{name}, {mode}, {title}"
                session.check(check, beside_torch, session, name, mode, shapes(), table)


def beside_torch(
    session: Session, name: str, mode: str, shapes: list[tuple[int, ...]], table: Table
) -> str:
    makers = {jobs.OURS: ours, **{how: with_torch(how) for how in (FUSED, FOREACH)}}
    trainings = {how: Training(RULES[name], mode, shapes, session.device) for how in makers}
    steps = {how: make(trainings[how]) for how, make in makers.items()}
    assert_alike({how: (step(), trainings[how]) for how, step in steps.items()})
    moved = trainings[jobs.OURS].bytes_moved()
    copy = make_copy(moved, session.device)
    rounds = ROUNDS_OF_A_REHEARSAL if session.rehearsal else ROUNDS
    seconds = clock.interleaved({COPY: copy, **steps}, rounds, session.device)
    session.figures[f"{name}, {mode}, {table.title}"] = {"bytes": moved, "seconds": seconds}
    mine = statistics.median(seconds[jobs.OURS])
    fraction = f"{clock.ratio(seconds, COPY, jobs.OURS):.2f}"
    others = [over(seconds, FUSED), over(seconds, FOREACH)]
    table.rows.append([f"{name}, {mode}", f"{mine * 1e6:.1f}", fraction, *others])
    if session.rehearsal:
        raise NeedsGpu("timed on the CPU")
    return "all three alike, then timed"


class Training:
    """Tensors of one way to take a step; every way begins with the same values."""

    def __init__(self, rule: Rule, mode: str, shapes: list[tuple[int, ...]], device: str) -> None:
        self.rule, self.mode = rule, mode
        self.state = jobs.make_state(shapes, device, torch.float32)
        self.moments = {
            ours: [(g * g if "sq" in ours else 0.5 * g) for g in self.state.grads]
            for ours, _ in rule.moments
        }
        self.steps = torch.full((len(shapes),), STEPS_TAKEN, device=device)

    @property
    def known(self) -> tuple[Any, ...]:
        return self.state.params, self.state.anchors, self.state.omega, jobs.LAMBDA

    def written(self) -> list[list[Tensor]]:
        return [self.state.params, *self.moments.values()]

    def bytes_moved(self) -> int:
        """By one pass: everything is read, and what a rule writes is written."""
        every = [*self.written(), self.state.grads, self.state.anchors, self.state.omega]
        tensors = [t for lists in (every, self.written()) for ts in lists for t in ts]
        return sum(t.numel() * t.element_size() for t in tensors)


def ours(training: Training) -> Callable[[], Tensor]:
    rule, state = training.rule, training.state
    keep = {**training.moments, **rule.options}
    if rule.op == "adamw_step_":
        keep["steps"] = training.steps
    function = getattr(functional, rule.op)
    arguments = state.params, state.grads, state.anchors, state.omega, jobs.LAMBDA, RATE
    return lambda: function(*arguments, mode=training.mode, **keep)


def with_torch(how: str) -> Callable[[Training], Callable[[], Tensor]]:
    def make(training: Training) -> Callable[[], Tensor]:
        rule, state = training.rule, training.state
        for param, grad in zip(state.params, state.grads, strict=True):
            param.grad = grad
        optimizer = rule.torchs(state.params, lr=RATE, **rule.options, **{how: True})
        for i, param in enumerate(state.params):
            kept = {theirs: training.moments[mine][i] for mine, theirs in rule.moments}
            if rule.op == "adamw_step_":
                kept["step"] = (
                    training.steps[i].clone() if how == FUSED else training.steps[i].cpu()
                )
            optimizer.state[param] = kept

        def step() -> Tensor:
            if training.mode == "gradient":
                value = functional.add_penalty_grad_(state.grads, *training.known)
                optimizer.step()
                return value
            optimizer.step()
            return functional.proximal_step_(*training.known, RATE)

        return step

    return make


def assert_alike(results: dict[str, tuple[Tensor, Training]]) -> None:
    """Our step is held against float64 elsewhere (`equivalence`); here they must do one job."""
    value, mine = results[jobs.OURS]
    for how in (FUSED, FOREACH):
        other, theirs = results[how]
        torch.testing.assert_close(value, other, rtol=jobs.VALUE_TOLERANCE, atol=0.0)
        for tensors, others in zip(mine.written(), theirs.written(), strict=True):
            torch.testing.assert_close(tensors, others, rtol=1e-4, atol=1e-2 * RATE)
