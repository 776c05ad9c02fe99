"""Exact importance of a weight used at many positions: Ω += Σ_samples |Σ_positions leftᵀ·right|.

This is bound by arithmetic, not by memory, so the yardstick is PyTorch's own product of the same
FLOPs, which takes no absolute values and knows nothing of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.benchmark import Benchmark, Options, Result
from benchmarks.measure import interleave, median_ratio
from mas_ext import functional

SAMPLES = 32
CHUNKS = (1, 4, 8, 32)
OURS, PRODUCT = "mas_ext", "torch.mm"


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


def make(case: Case, device: str = "cpu") -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def factor(size: int) -> Tensor:
        shape = (size, case.positions) if case.conv else (case.positions, size)
        values = torch.randn(SAMPLES, *shape, generator=generator, device=device)
        return values.mT if case.conv else values

    return Problem(torch.zeros(case.p, case.d, device=device), factor(case.p), factor(case.d))


def fused(x: Problem) -> None:
    functional.accumulate_outer_(x.omega, x.left, x.right)


def in_chunks(x: Problem, samples: int) -> None:
    """The fastest plain PyTorch: products by BLAS, which are written and read again."""
    for left, right in zip(x.left.split(samples), x.right.split(samples), strict=True):
        x.omega.add_(torch.bmm(left.mT, right).abs_().sum(0))


PROVIDERS: dict[str, Callable[[Problem], None]] = {
    OURS: fused,
    **{f"bmm, {samples}": partial(in_chunks, samples=samples) for samples in CHUNKS},
}


def check(x: Problem, step: Callable[[Problem], None], what: str) -> None:
    """Verifies against float64, one sample at a time."""
    expected = torch.zeros_like(x.omega, dtype=torch.float64)
    for left, right in zip(x.left.double(), x.right.double(), strict=True):
        expected += (left.mT @ right).abs()
    x.omega.zero_()
    step(x)
    torch.testing.assert_close(
        x.omega.double(), expected, rtol=1e-5, atol=1e-4, msg=lambda text: f"{what}: {text}"
    )


def measure(case: Case, rounds: int, budget: float | None = None, device: str = "cpu") -> Result:
    """Every provider is verified, then all are timed in interleaved rounds."""
    x = make(case, device)
    for name, step in PROVIDERS.items():
        check(x, step, f"{case.title}, {name}")
    rows = torch.randn(case.p, SAMPLES * case.positions, device=device)
    columns = torch.randn(SAMPLES * case.positions, case.d, device=device)
    calls = {name: partial(step, x) for name, step in PROVIDERS.items()}
    seconds = interleave({PRODUCT: lambda: torch.mm(rows, columns), **calls}, rounds, budget=budget)
    medians = {name: median(values) for name, values in seconds.items()}
    best = min((name for name in PROVIDERS if name != OURS), key=medians.__getitem__)
    return {
        "title": case.title,
        "rounds": len(seconds[OURS]),
        "seconds": medians,
        "gigaflops": case.flops / medians[OURS] / 1e9,
        "fraction_of_product": median_ratio(seconds[PRODUCT], seconds[OURS]),
        "best_bmm": best,
        "best_bmm_over_ours": median_ratio(seconds[best], seconds[OURS]),
    }


def _run(options: Options) -> Iterator[tuple[str, Result]]:
    cases = QUICK if options.quick else CASES
    for case in cases:
        options.progress(case.title)
        yield case.title, measure(case, options.rounds, options.seconds / len(cases))


BENCHMARK = Benchmark(
    name="outer",
    title="The exact importance of a weight that is used at many positions",
    about="Ω += Σ|leftᵀ·right| over samples, next to torch.bmm, abs_ and sum over chunks of "
    "samples. torch.mm of the same FLOPs is the yardstick.",
    run=_run,
    seconds=(20, 1),
)
