"""What must hold of every kernel in the library. This is the file to change with csrc/cuda."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product

ARCHITECTURES = (80, 90, 100, 120)
VECTOR_BYTES = 16


@dataclass(frozen=True)
class Dtype:
    """Bytes of a parameter's element, and what its Ω is accumulated in."""

    title: str
    value: int
    accumulates: str


DTYPES = {
    "float": Dtype("float32", 4, "float"),
    "double": Dtype("float64", 8, "double"),
    "c10::BFloat16": Dtype("bfloat16", 2, "float"),
    "c10::Half": Dtype("float16", 2, "float"),
}


@dataclass(frozen=True)
class Kept:
    """Bytes of an element of Ω as memory keeps it, and of the scales that a vector looks up."""

    title: str
    value: int
    scales: tuple[int, ...] = ()


KEPT = {
    "float": Kept("float32", 4),
    "double": Kept("float64", 8),
    "c10::BFloat16": Kept("bfloat16", 2),
    "unsigned char": Kept("uint8", 1, scales=(4, 4)),  # its first element's and its last one's
}


@dataclass(frozen=True)
class Streams:
    """Memory that the hot loop reads and writes from end to end, by accesses of 16 bytes; Ω, where
    it is kept in less than the parameters, by as much less."""

    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()
    work = "16-byte accesses"


@dataclass(frozen=True)
class Product:
    """A hot loop that multiplies what lies in shared memory, read by accesses of 16 bytes."""

    instruction: str  # that does it
    in_vectors: bool = True  # whether the factors are brought there by 16-byte accesses as well

    @property
    def work(self) -> str:
        return self.instruction


@dataclass(frozen=True)
class Expectation:
    """A kernel of the library. `hot` is None where nothing is asked of its loops."""

    name: str
    dtype: str
    pattern: str  # of its C++ name, up to the arguments
    hot: Streams | Product | None
    kept: str = ""  # Ω's type; "" where it is what the dtype accumulates in

    @property
    def title(self) -> str:
        title = f"{self.name} {DTYPES[self.dtype].title}"
        return f"{title}, Ω {KEPT[self.kept].title}" if self.kept else title

    @property
    def omega(self) -> Kept:
        return KEPT[self.kept or DTYPES[self.dtype].accumulates]

    def matches(self, name: str) -> bool:
        return re.match(rf"void mas_ext::cuda::{self.pattern}\(", name) is not None


STREAMING = {
    "AccumulateImportance": Streams(("grads", "omega"), ("omega",)),
    "AccumulateSquare": Streams(("grads", "omega"), ("omega",)),
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
MAGNITUDES = {"outer": "MagnitudeAbs", "outer square": "MagnitudeSquare"}


# How an Ω that is only read may be kept, by the dtype beside it.
READ_ONLY = [
    (dtype, kept)
    for dtype, known in DTYPES.items()
    for kept in (("",) if known.accumulates == "double" else ("", "c10::BFloat16", "unsigned char"))
]


def streaming(
    title: str, operation: str, dtype: str, streams: Streams, kept: str = ""
) -> Expectation:
    types = f"{dtype}, {kept or DTYPES[dtype].accumulates}"
    return Expectation(title, dtype, rf"chunk_kernel<{operation}, {types}>", streams, kept)


def step_by(rule: str, proximal: bool, dtype: str, kept: str) -> Expectation:
    """A step reads all its streams, whatever the rule, and writes the rule's."""
    options, moments = RULES[rule]
    operation = (
        rf"mas_ext::cuda::StepBy<mas_ext::{rule}, mas_ext::{options}, {str(proximal).lower()}>"
    )
    streams = Streams(
        ("params", *moments, "grads", "anchors", "omega"), writes=("params", *moments)
    )
    title = f"{rule.removesuffix('Rule')} step, {'proximal' if proximal else 'gradient'}"
    return streaming(title, f"{operation}::Operation", dtype, streams, kept)


EXPECTATIONS = [
    *(
        streaming(name, f"mas_ext::cuda::{name}", dtype, streams, kept)
        for name, streams in STREAMING.items()
        for dtype, kept in READ_ONLY
        if not ("omega" in streams.writes and kept)
    ),
    *(step_by(*of, *how) for of in product(RULES, (False, True)) for how in READ_ONLY),
    *(
        Expectation(title, dtype, rf"outer_kernel<{dtype}, mas_ext::{magnitude}>", product)
        for title, magnitude in MAGNITUDES.items()
        for dtype, product in PRODUCTS.items()
    ),
    # Factors and Ω of any type are converted where they are read, an element at a time.
    *(
        Expectation(
            "low rank",
            dtype,
            rf"low_rank_kernel<{dtype}>",
            replace(PRODUCTS[dtype], in_vectors=False),
        )
        for dtype in ("float", "double")
    ),
    # One block that adds a number for every 8,192 elements; a thread an element of a small Ω, or of
    # a low-rank gradient; and a thread a parameter's number of steps, which is of this dtype.
    *(
        Expectation(name, dtype, rf"{name}<{dtype}>", None)
        for name in ("finish_penalty", "add_parts", "add_low_rank", "bias_corrections")
        for dtype in ("float", "double")
    ),
]


def expectation_of(name: str) -> Expectation | None:
    """By the C++ name; None for a kernel that nobody has said anything about."""
    return next((e for e in EXPECTATIONS if e.matches(name)), None)


def accesses(streams: tuple[str, ...], dtype: Dtype, omega: Kept) -> Counter[int]:
    """How many, by their bytes, for one vector of parameters. A vector of Ω may be several."""
    elements = VECTOR_BYTES // dtype.value
    found: Counter[int] = Counter()
    for stream in streams:
        if stream != "omega":
            found[VECTOR_BYTES] += 1
            continue
        width = elements * omega.value
        found[min(width, VECTOR_BYTES)] += max(width // VECTOR_BYTES, 1)
        found.update(omega.scales)
    return found
