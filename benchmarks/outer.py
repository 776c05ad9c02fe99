"""Exact importance of a weight used at many positions: Ω += Σ_samples |Σ_positions leftᵀ·right|.

The square in place of the absolute value is timed beside it. This is bound by arithmetic, not by
memory, so the yardstick is PyTorch's own product of the same FLOPs, which takes no absolute values
and knows nothing of samples.
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
from benchmarks.measure import interleave, median_ratio
from mas_ext import functional

SAMPLES = 32
CHUNKS = (1, 4, 8, 32)
MOST_PAIRED = 8  # positions; with more, their pairs take longer than any other way
OURS, SQUARE, PRODUCT = "mas_ext", "mas_ext, square", "torch.mm"


@dataclass(frozen=True)
class Case:
    """``conv``: positions are adjacent in memory, as a convolution's are; otherwise rows are."""

    p: int
    d: int
    positions: int
    conv: bool

    @property
    def title(self) -> str:
        return f"{self.p} × {self.d}, T={self.positions}, {'conv' if self.conv else 'linear'}"

    @property
    def flops(self) -> int:
        return 2 * SAMPLES * self.positions * self.p * self.d


CASES = [
    *[Case(512, 512, t, conv) for conv in (False, True) for t in (4, 16, 64, 256)],
    Case(64, 576, 256, True),  # ResNet-18's layers at 64 × 64 pixels
    Case(128, 1152, 64, True),
    Case(256, 2304, 16, True),
    Case(512, 4608, 4, True),
    Case(768, 768, 65, False),  # a ViT's
    Case(256, 1024, 64, False),
    Case(8192, 256, 64, False),  # a language model's head
    Case(10, 64, 16, False),
    Case(64, 64, 64, False),
]
QUICK = [Case(64, 576, 16, True), Case(64, 64, 64, False)]


class Problem(NamedTuple):
    omega: Tensor
    left: Tensor
    right: Tensor


Step = Callable[[Problem], None]


def make(case: Case, device: str = "cpu") -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def factor(size: int) -> Tensor:
        shape = (size, case.positions) if case.conv else (case.positions, size)
        values = torch.randn(SAMPLES, *shape, generator=generator, device=device)
        return values.mT if case.conv else values

    return Problem(torch.zeros(case.p, case.d, device=device), factor(case.p), factor(case.d))


def fused(x: Problem) -> None:
    functional.accumulate_outer_(x.omega, x.left, x.right)


def fused_square(x: Problem) -> None:
    functional.accumulate_outer_(x.omega, x.left, x.right, reduction="square")


def in_chunks(
    x: Problem, samples: int, magnitude_: Callable[[Tensor], Tensor] = Tensor.abs_
) -> None:
    """The fastest plain PyTorch: products by BLAS, which are written and read again."""
    for left, right in zip(x.left.split(samples), x.right.split(samples), strict=True):
        x.omega.add_(magnitude_(torch.bmm(left.mT, right)).sum(0))


def by_pairs(x: Problem) -> None:
    """(Σ_t l_t r_t)² = Σ_tu l_t l_u r_t r_u: one product over the pairs of a sample's positions."""
    first, second = torch.triu_indices(*[x.left.shape[1]] * 2, device=x.left.device)
    left, right = (f[:, first] * f[:, second] for f in (x.left, x.right))
    left *= (1.0 + (first != second))[:, None]  # t ≠ u occurs twice
    x.omega.addmm_(left.flatten(0, 1).mT, right.flatten(0, 1))


def of_abs() -> dict[str, Step]:
    chunks = {f"bmm, {samples}": partial(in_chunks, samples=samples) for samples in CHUNKS}
    return {OURS: fused, **chunks}


def of_square(case: Case) -> dict[str, Step]:
    chunks = {
        f"bmm, {samples}, square": partial(in_chunks, samples=samples, magnitude_=Tensor.square_)
        for samples in CHUNKS
    }
    pairs = {"pairs, square": by_pairs} if case.positions <= MOST_PAIRED else {}
    return {SQUARE: fused_square, **chunks, **pairs}


def check(x: Problem, steps: dict[str, Step], magnitude: Callable[[Tensor], Tensor]) -> None:
    """Verifies against float64, one sample at a time."""
    expected = torch.zeros_like(x.omega, dtype=torch.float64)
    for left, right in zip(x.left.double(), x.right.double(), strict=True):
        expected += magnitude(left.mT @ right)
    for name, step in steps.items():
        x.omega.zero_()
        step(x)
        torch.testing.assert_close(
            x.omega.double(), expected, rtol=1e-5, atol=1e-4, msg=f"{name}: {{}}".format
        )


def measure(case: Case, rounds: int, budget: float | None = None, device: str = "cpu") -> Result:
    """Every provider is verified, then all are timed in interleaved rounds."""
    x = make(case, device)
    absolute, square = of_abs(), of_square(case)
    check(x, absolute, torch.abs)
    check(x, square, torch.square)
    rows = torch.randn(case.p, SAMPLES * case.positions, device=device)
    columns = torch.randn(SAMPLES * case.positions, case.d, device=device)
    calls = {name: partial(step, x) for name, step in (absolute | square).items()}
    seconds = interleave({PRODUCT: lambda: torch.mm(rows, columns), **calls}, rounds, budget=budget)
    medians = {name: median(values) for name, values in seconds.items()}
    best = min(absolute.keys() - {OURS}, key=medians.__getitem__)
    best_square = min(square.keys() - {SQUARE}, key=medians.__getitem__)
    return {
        "title": case.title,
        "rounds": len(seconds[OURS]),
        "seconds": medians,
        "gigaflops": case.flops / medians[OURS] / 1e9,
        "fraction_of_product": median_ratio(seconds[PRODUCT], seconds[OURS]),
        "best_bmm": best,
        "best_bmm_over_ours": median_ratio(seconds[best], seconds[OURS]),
        "square_over_abs": median_ratio(seconds[SQUARE], seconds[OURS]),
        "best_square": best_square,
        "best_square_over_ours": median_ratio(seconds[best_square], seconds[SQUARE]),
    }


BENCHMARK = Benchmark(
    name="outer",
    title="The exact importance of a weight that is used at many positions",
    about="Ω += Σ|leftᵀ·right| over samples, next to torch.bmm, abs_ and sum over chunks of "
    "samples. torch.mm of the same FLOPs is the yardstick.",
    run=of_cases(CASES, QUICK, measure),
    seconds=(20, 1),
)
