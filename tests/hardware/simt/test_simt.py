"""The CUDA kernels on the host, under sanitizers: see README.md in this folder."""

from __future__ import annotations

import re
import sys
from typing import NamedTuple

import pytest

from tests.hardware.simt import build
from tests.hardware.simt.mutants import MUTANTS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the shim waits by futex")


class Run(NamedTuple):
    program: str
    sanitizer: str
    prefix: str  # of the cases' names
    minimum: int  # cases
    shard: str = "0/1"

    def __str__(self) -> str:
        return f"{self.program}-{self.sanitizer}-{self.prefix.replace('/', '-')}"

    def arguments(self) -> list[str]:
        return ["--shard", self.shard, self.prefix]


# Under ThreadSanitizer every eighth case: what it looks for does not depend on values.
OPERATIONS = ("accumulate_importance/", "penalty/", "penalty_gradient/", "add_penalty_gradient/")
ALIKE = "accumulate_square/"  # walks memory as the first does: every fourth case
# One of the steps sees all of them, the others every fourth: they walk memory by the same code.
STEPS = tuple(
    f"{rule}_step/{mode}/"
    for rule in ("sgd", "momentum", "adam")
    for mode in ("gradient", "proximal")
)
WALKED = "adam_step/gradient/"
NARROW = ("penalty/", "proximal_step/", WALKED)  # of a narrow Ω, beside the one that sees all cases
DTYPES = ("float32", "float64", "bfloat16", "float16")
RUNS = [
    *(Run("multi_tensor", "address", op, 400) for op in (*OPERATIONS, "proximal_step/")),
    *(Run("multi_tensor", "thread", op, 50, "3/8") for op in (*OPERATIONS, "proximal_step/")),
    Run("multi_tensor", "address", ALIKE, 100, "1/4"),
    Run("compressed", "address", "add_penalty_gradient/", 550),
    *(Run("compressed", "address", op, 60, "1/4") for op in NARROW),
    Run("compressed", "thread", "", 30, "3/8"),
    Run("steps", "address", WALKED, 500),
    *(Run("steps", "address", step, 125, "1/4") for step in STEPS if step != WALKED),
    Run("steps", "address", "bias_corrections/", 28),
    Run("steps", "thread", WALKED, 50, "3/8"),
    Run("steps", "thread", "bias_corrections/", 14),
    *(Run("outer", "address", f"outer/{d}", 90) for d in DTYPES),
    Run("outer", "thread", "", 90, "3/8"),
    Run("low_rank", "address", "low_rank/float32", 140),
    *(Run("low_rank", "address", f"low_rank/{d}", 50, "1/2") for d in DTYPES[1:]),
    Run("low_rank", "thread", "", 60, "3/8"),
    Run("vast", "address", "", 22),
    Run("tables", "address", "", 250),
    Run("tables", "thread", "finish/", 20, "3/4"),
]


def number_of_cases(output: str) -> int:
    (count,) = re.findall(r"^(\d+) cases, 0 failed$", output, re.MULTILINE)
    return int(count)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_kernels(run: Run) -> None:
    status, output = build.run(build.build(run.program, run.sanitizer), *run.arguments())
    assert status == 0, output[-4000:]
    assert number_of_cases(output) >= run.minimum


# ================================================================================================
# What the shim finds
# ================================================================================================
MEETING = "wait for each other at different places: .*"
FAULTS = {
    "different_barriers": MEETING + r"__syncthreads .* thread \d+ at __syncthreads",
    "early_exit": MEETING + "the end of the kernel",
    "another_round": MEETING + "the end of the kernel",
    "lane_stays_away": MEETING + "thread 40 at __syncthreads",
    "part_of_a_mask": r"__shfl_down_sync .* with mask 0xffff, which is not its warp",
    "part_of_a_warp": r"thread \d+ calls __shfl_down_sync .*, which is not its warp",
    "never_ends": "took too long",
    "misaligned_pack": "misaligned address .* requires 16 byte alignment",
    "misaligned_fragment": "misaligned load_matrix_sync",
    "lanes_disagree_on_matrix": "lanes disagree on the matrix of load_matrix_sync",
    "fragments_diverge": MEETING + "load_matrix_sync",
    "beyond_shared_memory": "AddressSanitizer: global-buffer-overflow",
    "behind_memory": "AddressSanitizer: heap-buffer-overflow",
    "in_front_of_memory": "AddressSanitizer: use-after-poison",
    "memory_of_another_block": "AddressSanitizer: use-after-poison",
}
RACES = (
    "no_barrier",
    "two_write_one",
    "shuffle_is_no_barrier",
    "fragment_before_barrier",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault: str) -> None:
    status, output = build.run(build.build("faults", "address"), fault)
    assert status != 0
    assert re.search(FAULTS[fault], output), output[-4000:]


@pytest.mark.parametrize("race", RACES)
def test_race_is_found(race: str) -> None:
    status, output = build.run(build.build("faults", "thread"), race)
    assert status != 0
    assert "ThreadSanitizer: data race" in output, output[-4000:]


def test_what_is_right_is_not_a_fault() -> None:
    status, output = build.run(build.build("faults", "address"), "aligned_pack")
    assert (status, output) == (0, "nothing was found\n")


def test_every_mutant_has_a_name_and_its_text_is_in_the_kernels() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 173
    for mutant in MUTANTS:
        assert mutant.planted()
