"""A layer's weight at many positions: Ω += Σ_samples |Σ_positions leftᵀ·right|.

Bound by arithmetic and not by memory, so the measure is PyTorch's own product of the same FLOPs,
which takes no magnitudes and knows nothing of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.entry import Entry, Options, Result, Results
from benchmarks.show.table import Table
from benchmarks.show.text import three
from benchmarks.tools.timing import interleave, quartiles, ratios
from mas_ext import functional

SAMPLES = 32
CHUNKS = (1, 4, 8, 32)
OURS, PRODUCT = "mas_ext", "torch.mm"


@dataclass(frozen=True)
class Case:
    """``conv``: positions lie side by side, as a convolution's do; else rows, as a linear's."""

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
QUICK = [Case(512, 512, 16, True), Case(64, 64, 64, False)]


class Problem(NamedTuple):
    omega: Tensor
    left: Tensor
    right: Tensor


def make(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def factor(size: int) -> Tensor:
        if case.conv:
            return torch.randn(SAMPLES, size, case.positions, generator=generator).mT
        return torch.randn(SAMPLES, case.positions, size, generator=generator)

    return Problem(torch.zeros(case.p, case.d), factor(case.p), factor(case.d))


def fused(x: Problem) -> None:
    functional.accumulate_abs_matmul_(x.omega, x.left, x.right)


def in_chunks(x: Problem, samples: int) -> None:
    """The strongest plain PyTorch: BLAS for the products, which are made and read again."""
    for left, right in zip(x.left.split(samples), x.right.split(samples), strict=True):
        x.omega.add_(torch.bmm(left.mT, right).abs_().sum(0))


def _expected(x: Problem) -> Tensor:
    """In float64, one sample at a time."""
    expected = torch.zeros_like(x.omega, dtype=torch.float64)
    for left, right in zip(x.left.double(), x.right.double(), strict=True):
        expected += (left.mT @ right).abs()
    return expected


def _check(x: Problem, step: Callable[[Problem], None], expected: Tensor, what: str) -> None:
    x.omega.zero_()
    step(x)
    torch.testing.assert_close(
        x.omega.double(), expected, rtol=1e-5, atol=1e-4, msg=lambda text: f"{what}: {text}"
    )


def measure(case: Case, rounds: int, budget: float | None = None) -> dict[str, list[float]]:
    """Seconds a call for each round: every provider checked first, then timed by turns."""
    x = make(case)
    steps: dict[str, Callable[[Problem], None]] = {OURS: fused}
    for samples in CHUNKS:
        steps[f"bmm, {samples}"] = lambda x, samples=samples: in_chunks(x, samples)
    expected = _expected(x)
    for name, step in steps.items():
        _check(x, step, expected, f"{case.title}, {name}")
    calls = {name: lambda step=step: step(x) for name, step in steps.items()}
    rows = torch.randn(case.p, SAMPLES * case.positions)
    columns = torch.randn(SAMPLES * case.positions, case.d)
    return interleave({PRODUCT: lambda: torch.mm(rows, columns), **calls}, rounds, budget=budget)


def _summary(case: Case, seconds: dict[str, list[float]]) -> Result:
    """Ratios are medians of per-round ratios."""

    def over(name: str, other: str) -> float:
        return quartiles(ratios(seconds[name], seconds[other]))[1]

    medians = {name: quartiles(values)[1] for name, values in seconds.items()}
    best = min((f"bmm, {samples}" for samples in CHUNKS), key=medians.__getitem__)
    return {
        "title": case.title,
        "rounds": len(seconds[OURS]),
        "seconds": medians,
        "gigaflops": case.flops / medians[OURS] / 1e9,
        "fraction_of_product": over(PRODUCT, OURS),
        "best_bmm": best,
        "best_bmm_over_ours": over(best, OURS),
    }


def _run(options: Options) -> Iterator[tuple[str, Result]]:
    cases = QUICK if options.quick else CASES
    for case in cases:
        options.tell(case.title)
        yield (
            case.title,
            _summary(case, measure(case, options.rounds, options.seconds / len(cases))),
        )


def _row(row: Result) -> list[str]:
    best = row["best_bmm"]
    return [
        row["title"],
        three(row["seconds"][OURS] * 1e3),
        f"{row['gigaflops']:.0f}",
        f"{row['fraction_of_product']:.2f}",
        three(row["seconds"][best] * 1e3),
        best.removeprefix("bmm, "),
        f"{row['best_bmm_over_ours']:.1f}",
    ]


def _overview(results: Results) -> list[Table]:
    headings = ("p × d, positions", "ms", "GFLOP/s", "of mm", "bmm, ms", "chunk", "bmm / ours")
    return [
        Table(
            f"Ω += Σ|leftᵀ·right|, {SAMPLES} samples",
            headings,
            [_row(row) for row in results.values()],
            note="of mm: the speed, as a fraction of torch.mm's at the same FLOPs; bmm: torch.bmm, "
            f"abs, sum, with the best chunk of {', '.join(map(str, CHUNKS))} samples",
        )
    ]


ENTRY = Entry(
    name="abs_matmul",
    title="The exact importance of a weight that is used at many positions",
    about="Bound by arithmetic: the measure is torch.mm of the same FLOPs, which knows nothing of "
    "samples; the alternative in plain PyTorch is torch.bmm, abs_ and sum over chunks of samples.",
    run=_run,
    detail=lambda result: [],
    overview=_overview,
    seconds=(20, 3),
)
