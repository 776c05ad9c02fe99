"""Times of every operator, by the benchmarks' own jobs: beside a copy and other ways to do them.

A job verifies every way against float64 before it times it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import (
    accumulate,
    job,
    low_rank,
    narrow,
    optimizer_steps,
    outer,
    penalty,
    proximal,
)
from benchmarks.benchmark import Options, Result
from benchmarks.job import OURS, Job, Provider
from benchmarks.state import SIZES, Size, State, linear
from mas_ext import functional
from tests.hardware.gpu.device import DEVICE, REHEARSAL
from tests.hardware.gpu.steps import NOT_HERE

ROUNDS, SECONDS = (2, 0.0) if REHEARSAL else (7, 0.5)  # of an item
OPTIONS = Options(quick=REHEARSAL, rounds=ROUNDS, seconds=SECONDS, device=DEVICE)
BYTES_PER_PARAMETER = 128  # of all lists, of what other ways need, and of the checks in float64


def value_alone(name: str, moved: int, step: job.Step) -> Job:
    """An operator that returns the penalty and writes to nothing that it is given."""
    expected = penalty.JOB.expected
    return replace(
        penalty.JOB,
        name=name,
        bytes_per_parameter=moved,
        providers=(Provider(OURS, torch.no_grad()(step), moved),),
        written=lambda s: [],
        expected=lambda s: ([], expected(s)[1]),
    )


def penalty_alone(s: State) -> Tensor:
    return functional.penalty(s.params, s.anchors, s.omega, s.lambda_reg)


def penalty_and_grad(s: State) -> Tensor:
    return functional.penalty_and_grad(s.params, s.anchors, s.omega, s.lambda_reg)[0]


JOBS = [
    value_alone("penalty", 12, penalty_alone),
    value_alone("penalty_and_grad", 16, penalty_and_grad),
    replace(penalty.JOB, name="add_penalty_grad_"),
    replace(accumulate.JOB, name="accumulate_importance_"),
    replace(proximal.JOB, name="proximal_step_"),
    *optimizer_steps.JOBS,
]
COUNTS = (10, 1000) if REHEARSAL else (1_000, 100_000, 10_000_000, 100_000_000)
LISTS = {f"{count:,}": Size("one tensor", lambda n=count: [torch.Size([n])]) for count in COUNTS}
LISTS |= {
    "1,000 tensors of 64": SIZES["small"],
    "24 linear layers, 25 M": Size("", lambda: linear(*[20 if REHEARSAL else 1024] * 25)),
}


@pytest.mark.parametrize("size", LISTS)
@pytest.mark.parametrize("chosen", JOBS, ids=lambda each: each.name)
def test_lists(chosen: Job, size: str, add_row: Callable[..., None]) -> None:
    free, _ = torch.cuda.mem_get_info()
    if sum(shape.numel() for shape in LISTS[size].shapes()) * BYTES_PER_PARAMETER > free:
        pytest.skip(f"{NOT_HERE}: {free / 1e9:.0f} GB are too few for {size} parameters")
    found = job.measure(chosen, LISTS[size], OPTIONS, SECONDS)["providers"]
    others = [provider.name for provider in chosen.providers if provider.name != OURS]
    ours = found[OURS]
    add_row(
        chosen.name,
        ["parameters", "µs", "GB/s", "of a copy", *(f"{name} / ours" for name in others)],
        size,
        f"{ours['seconds']['median'] * 1e6:.1f}",
        f"{ours['gigabytes_per_second']:.3g}",
        f"{ours['fraction_of_roofline']['median']:.2f}",
        *(over_ours(found.get(name)) for name in others),
    )


def over_ours(found: Result | None) -> str:
    return "–" if found is None else f"{found['time_over_ours']['median']:.2f}"


def test_fewer_bytes(add_row: Callable[..., None]) -> None:
    """add_penalty_grad_ over bfloat16 values, and over an Ω in fewer bytes."""
    size = narrow.QUICK_SIZE if REHEARSAL else narrow.SIZES["64m"]
    found = narrow.measure(size, ROUNDS, SECONDS, DEVICE)
    for kind, row in found["kinds"].items():
        add_row(
            f"add_penalty_grad_, {size:,} parameters in fewer bytes",
            ["values, Ω", "bytes per parameter", "µs", "of a copy", "torch.compile / ours"],
            kind,
            f"{row['bytes_per_parameter']:.2f}",
            f"{row['seconds'] * 1e6:.1f}",
            f"{row['fraction_of_roofline']:.2f}",
            f"{row['times_ours']['torch.compile']:.2f}",
        )


CASES = outer.QUICK if REHEARSAL else outer.CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_outer(case: outer.Case, add_row: Callable[..., None]) -> None:
    found = outer.measure(case, ROUNDS, SECONDS, DEVICE)
    add_row(
        f"accumulate_outer_, {outer.SAMPLES} samples",
        [
            *("p × d, positions", "µs", "TFLOP/s", "speed / mm", "best bmm", "best bmm / ours"),
            *("square / abs", "best square", "best square / ours"),
        ],
        case.title,
        f"{found['seconds'][OURS] * 1e6:.1f}",
        f"{found['gigaflops'] / 1e3:.3g}",
        f"{found['fraction_of_product']:.2f}",
        found["best_bmm"],
        f"{found['best_bmm_over_ours']:.2f}",
        f"{found['square_over_abs']:.2f}",
        found["best_square"],
        f"{found['best_square_over_ours']:.2f}",
    )


@pytest.mark.parametrize(
    "case", low_rank.QUICK if REHEARSAL else low_rank.CASES, ids=lambda case: case.title
)
def test_low_rank(case: low_rank.Case, add_row: Callable[..., None]) -> None:
    found = low_rank.measure(case, ROUNDS, SECONDS, DEVICE)
    add_row(
        "low_rank_penalty_grad_",
        ["weight", "µs", "TFLOP/s", *(f"{n} / ours" for n in low_rank.STEPS if n != OURS)],
        case.title,
        f"{found['seconds'][OURS] * 1e6:.1f}",
        f"{found['gigaflops'] / 1e3:.3g}",
        *(f"{ratio:.2f}" for n, ratio in found["time_over_ours"].items() if n != OURS),
    )
