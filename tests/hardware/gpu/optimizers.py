"""Optimizer steps with the penalty in them, beside the penalty followed by torch's own step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mas_ext import functional
from tests.hardware.gpu import bandwidth, clock, jobs
from tests.hardware.gpu.checks import Session, Table

FUSED, FOREACH = "fused", "foreach"  # torch's implementations
SIZE = 25_000_000
RATE, STEPS_TAKEN = 1e-3, 100.0


@dataclass(frozen=True)
class Rule:
    """An optimizer: torch's class, our operator, the options of both, and the moments."""

    torchs: type[torch.optim.Optimizer]
    op: str
    options: dict[str, Any] = field(default_factory=dict)
    moments: dict[str, str] = field(default_factory=dict)  # our argument: torch's state


MOMENTUM = {"momentum_buffers": "momentum_buffer"}
ADAM = {"exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq"}
RULES = {
    "SGD": Rule(torch.optim.SGD, "sgd_step_"),
    "SGD, momentum": Rule(torch.optim.SGD, "sgd_step_", {"momentum": 0.9}, MOMENTUM),
    "AdamW": Rule(torch.optim.AdamW, "adamw_step_", {"weight_decay": 0.01}, ADAM),
}


def run(session: Session) -> None:
    lists = {f"one tensor of {SIZE:,}": lambda: [(SIZE,)], **bandwidth.LISTS}
    for title, shapes in (bandwidth.LISTS_OF_A_REHEARSAL if session.rehearsal else lists).items():
        columns = ["step", *bandwidth.FIGURES, FUSED, FOREACH]
        note = "fused, foreach: the penalty's operator and then torch's step, their time over ours"
        table = session.table(f"Steps with the penalty in them, {title}", columns, note)
        for name, rule in RULES.items():
            for mode in ("gradient", "proximal"):
                row = f"{name}, {mode}"
                check = f"{row}, {title}"
                session.check(check, beside_torch, session, table, row, rule, mode, shapes())


class Training:
    """Tensors of one way to take a step; every way begins with the same values."""

    def __init__(self, rule: Rule, mode: str, shapes: list[tuple[int, ...]], device: str) -> None:
        self.rule, self.mode = rule, mode
        self.state = jobs.make_state(shapes, device)
        self.moments = {
            name: [g * g if "sq" in name else 0.5 * g for g in self.state.grads]
            for name in rule.moments
        }
        self.steps = torch.full((len(shapes),), STEPS_TAKEN, device=device)

    @property
    def known(self) -> tuple[Any, ...]:
        return self.state.params, self.state.anchors, self.state.omega, jobs.LAMBDA

    def written(self) -> list[list[Tensor]]:
        return [self.state.params, *self.moments.values()]

    def bytes_moved(self) -> int:
        """By one pass: everything is read, and what the rule writes is written."""
        read = [*self.written(), self.state.grads, self.state.anchors, self.state.omega]
        return sum(t.numel() * t.element_size() for ts in [*read, *self.written()] for t in ts)


def beside_torch(
    session: Session, table: Table, row: str, rule: Rule, mode: str, shapes: bandwidth.Shapes
) -> str:
    makers = {clock.OURS: ours, FUSED: with_torch(FUSED), FOREACH: with_torch(FOREACH)}
    trainings = {how: Training(rule, mode, shapes, session.device) for how in makers}
    steps = {how: make(trainings[how]) for how, make in makers.items()}
    assert_alike({how: (step(), trainings[how]) for how, step in steps.items()})
    moved = trainings[clock.OURS].bytes_moved()
    clock.beside_a_copy(session, table, [row], steps, moved)
    return clock.timed(session)


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
            kept = {theirs: training.moments[mine][i] for mine, theirs in rule.moments.items()}
            if rule.op == "adamw_step_":
                steps = training.steps[i]
                kept["step"] = steps.clone() if how == FUSED else steps.cpu()
            optimizer.state[param] = kept

        def gradient() -> Tensor:
            value = functional.add_penalty_grad_(state.grads, *training.known)
            optimizer.step()
            return value

        def proximal() -> Tensor:
            optimizer.step()
            return functional.proximal_step_(*training.known, RATE)

        return gradient if training.mode == "gradient" else proximal

    return make


def assert_alike(results: dict[str, tuple[Tensor, Training]]) -> None:
    """`equivalence` verifies our step against float64; here all ways must do the same job."""
    value, mine = results[clock.OURS]
    for how in (FUSED, FOREACH):
        other, theirs = results[how]
        torch.testing.assert_close(value, other, rtol=jobs.VALUE_TOLERANCE, atol=0.0)
        for tensors, others in zip(mine.written(), theirs.written(), strict=True):
            torch.testing.assert_close(tensors, others, rtol=1e-4, atol=1e-2 * RATE)
