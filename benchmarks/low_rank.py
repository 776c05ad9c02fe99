"""The penalty of a LoRA adapter's update: λ/2 Σ Ω∘(s·BA)², with its gradients added to A and B's.

Alternatives form the update, which is as large as the weight, and write and read it several times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.benchmark import Benchmark, Result, of_cases
from benchmarks.job import OURS, VALUE_TOLERANCE
from benchmarks.measure import (
    can_measure_memory,
    interleave,
    median_ratio,
    peak_of,
    resident_bytes,
    return_free_memory,
)
from mas_ext import functional

LAMBDA, SCALE = 0.7, 0.5
AUTOGRAD, BY_HAND = "autograd", "by hand"


@dataclass(frozen=True)
class Case:
    rows: int
    columns: int
    rank: int

    @property
    def title(self) -> str:
        return f"{self.rows} × {self.columns}, rank {self.rank}"

    @property
    def flops(self) -> int:
        """Of B·A, and of the products that are the gradients."""
        return 3 * 2 * self.rows * self.columns * self.rank


CASES = [Case(2048, columns, rank) for columns in (2048, 8192) for rank in (8, 16, 64)]
QUICK = [Case(130, 200, 8)]


class Problem(NamedTuple):
    """A and B with their gradients in ``grad``, and Ω."""

    a: Tensor
    b: Tensor
    omega: Tensor


Step = Callable[[Problem], Tensor]


def make(case: Case, device: str = "cpu") -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def factor(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        tensor = values.div_(case.rank**0.5).requires_grad_()
        tensor.grad = torch.zeros_like(values)
        return tensor

    omega = torch.rand(case.rows, case.columns, generator=generator, device=device)
    return Problem(factor(case.rank, case.columns), factor(case.rows, case.rank), omega)


def fused(x: Problem) -> Tensor:
    return functional.low_rank_penalty_grad_(x.a.grad, x.b.grad, *x, LAMBDA, SCALE)


def by_autograd(x: Problem) -> Tensor:
    value = LAMBDA / 2 * (x.omega * (SCALE * (x.b @ x.a)) ** 2).sum()
    value.backward()
    return value.detach()


@torch.no_grad()
def by_hand(x: Problem) -> Tensor:
    """Three products, one of them weighted in place, and BLAS for the sum."""
    delta = x.b @ x.a
    weighted = x.omega * delta
    energy = torch.dot(weighted.view(-1), delta.view(-1))
    strength = LAMBDA * SCALE**2
    x.a.grad.addmm_(x.b.mT, weighted, alpha=strength)
    x.b.grad.addmm_(weighted, x.a.mT, alpha=strength)
    return strength / 2 * energy


STEPS: dict[str, Step] = {OURS: fused, AUTOGRAD: by_autograd, BY_HAND: by_hand}


def check(x: Problem, step: Step, what: str) -> None:
    """Verifies against plain autograd in float64, from gradients of zero."""
    exact = Problem(*(t.detach().double().requires_grad_(t.requires_grad) for t in x))
    value = by_autograd(exact)
    x.a.grad.zero_()
    x.b.grad.zero_()
    torch.testing.assert_close(step(x).double(), value, rtol=VALUE_TOLERANCE, atol=0.0, msg=what)
    for actual, expected in ((x.a.grad, exact.a.grad), (x.b.grad, exact.b.grad)):
        largest = float(expected.abs().max())
        torch.testing.assert_close(
            actual.double(), expected, rtol=1e-5, atol=1e-5 * largest, msg=what
        )


def extra_share(x: Problem, step: Step) -> float | None:
    """Bytes in use at the peak that were not before, relative to those of the weight."""
    if not can_measure_memory() or x.omega.device.type != "cpu":
        return None
    return_free_memory()
    before = resident_bytes()
    return (peak_of(partial(step, x)) - before) / x.omega.nbytes


def measure(case: Case, rounds: int, budget: float | None = None, device: str = "cpu") -> Result:
    """Every provider is verified and its memory measured, then all are timed in turns."""
    x = make(case, device)
    for name, step in STEPS.items():
        check(x, step, f"{case.title}, {name}")
    extra = {name: extra_share(x, step) for name, step in STEPS.items()}
    calls = {name: partial(step, x) for name, step in STEPS.items()}
    seconds = interleave(calls, rounds, budget=budget)
    medians = {name: median(values) for name, values in seconds.items()}
    return {
        "title": case.title,
        "rounds": len(seconds[OURS]),
        "seconds": medians,
        "gigaflops": case.flops / medians[OURS] / 1e9,
        "time_over_ours": {n: median_ratio(s, seconds[OURS]) for n, s in seconds.items()},
        "extra_share": extra,
    }


BENCHMARK = Benchmark(
    name="low_rank",
    title="The penalty of a LoRA adapter's update",
    about="λ/2 Σ Ω∘(s·BA)², with its gradients added to those of A and B, next to plain autograd "
    "and to three products by hand.",
    run=of_cases(CASES, QUICK, measure),
    seconds=(30, 1),
)
