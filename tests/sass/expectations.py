"""What must hold of every kernel in the library. This is the file to change with csrc/cuda."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product

ARCHITECTURES = (80, 90, 100, 120)
VECTOR_BYTES = 16


@dataclass(frozen=True)
class Dtype:
    """Bytes of a parameter's element, and of its Ω."""

    title: str
    value: int
    omega: int


DTYPES = {
    "float": Dtype("float32", 4, 4),
    "double": Dtype("float64", 8, 8),
    "c10::BFloat16": Dtype("bfloat16", 2, 4),
    "c10::Half": Dtype("float16", 2, 4),
}


@dataclass(frozen=True)
class Streams:
    """Memory that the hot loop reads and writes from end to end, each by accesses of 16 bytes."""

    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()
    work = "16-byte accesses"


@dataclass(frozen=True)
class Product:
    """A hot loop that multiplies what lies in shared memory, read by accesses of 16 bytes."""

    instruction: str  # that does it

    @property
    def work(self) -> str:
        return self.instruction


@dataclass(frozen=True)
class Expectation:
    """A kernel of the library. `hot` is None where nothing is asked of its loops."""

    title: str
    dtype: str
    pattern: str  # of its C++ name, up to the arguments
    hot: Streams | Product | None

    def matches(self, name: str) -> bool:
        return re.match(rf"void mas_ext::cuda::{self.pattern}\(", name) is not None


STREAMING = {
    "AccumulateImportance": Streams(("grads", "omega"), ("omega",)),
    "PenaltyEnergy": Streams(("params", "anchors", "omega")),
    "PenaltyGradient": Streams(("params", "anchors", "omega"), ("grads",)),
    "AddPenaltyGradient": Streams(("grads", "params", "anchors", "omega"), ("grads",)),
    "ProximalStep": Streams(("params", "anchors", "omega"), ("params",)),
}
# The rules of optimizer steps, their options, and what they move besides parameters.
RULES = {
    "SgdRule": ("SgdOptions", ()),
    "MomentumRule": ("SgdOptions", ("momentum_buffers",)),
    "AdamRule": ("AdamOptions", ("exp_avgs", "exp_avg_sqs")),
}
PRODUCTS = {
    "float": Product("FFMA"),
    "double": Product("DFMA"),
    "c10::BFloat16": Product("HMMA"),
    "c10::Half": Product("HMMA"),
}


def step_by(rule: str, proximal: bool, dtype: str) -> Expectation:
    """A step reads all its streams, whatever the rule, and writes the rule's."""
    options, moments = RULES[rule]
    operation = (
        rf"mas_ext::cuda::StepBy<mas_ext::{rule}, mas_ext::{options}, {str(proximal).lower()}>"
    )
    streams = Streams(
        ("params", *moments, "grads", "anchors", "omega"), writes=("params", *moments)
    )
    title = f"{rule.removesuffix('Rule')} step, {'proximal' if proximal else 'gradient'}"
    return Expectation(title, dtype, rf"chunk_kernel<{operation}::Operation, {dtype}>", streams)


EXPECTATIONS = [
    *(
        Expectation(name, dtype, rf"chunk_kernel<mas_ext::cuda::{name}, {dtype}>", streams)
        for name, streams in STREAMING.items()
        for dtype in DTYPES
    ),
    *(step_by(*of, dtype) for of in product(RULES, (False, True)) for dtype in DTYPES),
    *(
        Expectation("abs_matmul", dtype, rf"abs_matmul_kernel<{dtype}>", product)
        for dtype, product in PRODUCTS.items()
    ),
    # One block that adds a number for every 8,192 elements; a thread an element of a small Ω; and a
    # thread a parameter's number of steps, which is of this dtype.
    *(
        Expectation(name, dtype, rf"{name}<{dtype}>", None)
        for name in ("finish_penalty", "add_parts", "bias_corrections")
        for dtype in ("float", "double")
    ),
]


def expectation_of(name: str) -> Expectation | None:
    """By the C++ name; None for a kernel that nobody has said anything about."""
    return next((e for e in EXPECTATIONS if e.matches(name)), None)


def accesses(streams: tuple[str, ...], dtype: Dtype) -> int:
    """Of 16 bytes each, for one vector of parameters. A vector of Ω may be wider than that."""
    return sum(dtype.omega // dtype.value if stream == "omega" else 1 for stream in streams)
