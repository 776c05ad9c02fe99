"""accumulate_abs_matmul_ beside bmm in chunks, torch.compile, and one product of its FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import mas_ext
from tests.hardware.gpu import clock
from tests.hardware.gpu.checks import Session, Table
from tests.hardware.gpu.jobs import OnDevice
from tests.support.exact import Exact, assert_near
from tests.support.operators import OPERATORS, Scalars, exact_tensors

OP = "accumulate_abs_matmul_"
COMPILED, PRODUCT = "compile", "torch.mm"
CHUNKS = {f"bmm of {samples}": samples for samples in (4, 32)}  # samples multiplied at once
SAMPLES = 32
ONCE = Scalars(scale=1.0)
TIMES = 4 * OPERATORS[OP].times  # library products sum in another order


@dataclass(frozen=True)
class Layer:
    """``conv``: positions are contiguous, as a convolution has them; else rows, as a linear has."""

    p: int
    d: int
    positions: int
    conv: bool

    @property
    def title(self) -> str:
        return f"{self.p} × {self.d}, {self.positions} {'pixels' if self.conv else 'tokens'}"

    @property
    def flops(self) -> int:
        return 2 * SAMPLES * self.positions * self.p * self.d


LAYERS = [
    Layer(64, 576, 256, True),
    Layer(128, 1152, 64, True),
    Layer(512, 4608, 4, True),
    Layer(768, 768, 65, False),
    Layer(512, 512, 256, False),
    Layer(8192, 256, 64, False),
    Layer(512, 512, 1, False),
    Layer(10, 64, 16, False),
]
LAYERS_OF_A_REHEARSAL = [Layer(10, 64, 16, False), Layer(16, 20, 9, True)]
COMPILED_LAYERS = (LAYERS[3], LAYERS[4], LAYERS_OF_A_REHEARSAL[0])  # compiling takes seconds


def run(session: Session) -> None:
    columns = ["p × d, positions", "µs", "TFLOP/s", "of mm", *CHUNKS, COMPILED]
    note = f"{SAMPLES} samples, float32. of mm: speed over torch.mm's; the others: time over ours"
    table = session.table(OP, columns, note)
    for layer in LAYERS_OF_A_REHEARSAL if session.rehearsal else LAYERS:
        session.check(layer.title, beside_others, session, layer, table)


def beside_others(session: Session, layer: Layer, table: Table) -> str:
    x = make(layer, session.device)
    ways = ways_of(x, layer in COMPILED_LAYERS)
    (wanted,) = exact_tensors(OP, OnDevice(omega=[x.omega], left=[x.left], right=[x.right]), ONCE)
    for name, call in ways.items():
        assert_right(x, call, wanted, f"{layer.title}, {name}")
    left = torch.randn(layer.p, SAMPLES * layer.positions, device=session.device)
    right = torch.randn(SAMPLES * layer.positions, layer.d, device=session.device)
    ways[PRODUCT] = lambda: torch.mm(left, right)
    seconds = clock.measure(session, layer.title, ways, flops=layer.flops)
    mine = clock.ours(seconds)
    figures = [f"{mine * 1e6:.1f}", f"{layer.flops / mine / 1e12:.3g}"]
    others = [clock.ratio(seconds, way) for way in (PRODUCT, *CHUNKS, COMPILED)]
    table.rows.append([layer.title, *figures, *others])
    return clock.timed(session)


class Problem(NamedTuple):
    """The positional arguments; every way adds to the same Ω."""

    omega: Tensor
    left: Tensor
    right: Tensor


def make(layer: Layer, device: str) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def factor(size: int) -> Tensor:
        shape = (size, layer.positions) if layer.conv else (layer.positions, size)
        values = torch.randn(SAMPLES, *shape, device=device, generator=generator)
        return values.mT if layer.conv else values

    return Problem(torch.zeros(layer.p, layer.d, device=device), factor(layer.p), factor(layer.d))


def in_chunks(omega: Tensor, left: Tensor, right: Tensor, samples: int = SAMPLES) -> None:
    for lefts, rights in zip(left.split(samples), right.split(samples), strict=True):
        omega.add_(torch.bmm(lefts.mT, rights).abs().sum(0))


def ways_of(x: Problem, with_compile: bool) -> dict[str, Callable[[], object]]:
    ways: dict[str, Callable[[], object]] = {
        clock.OURS: lambda: mas_ext.functional.accumulate_abs_matmul_(*x)
    }
    for name, samples in CHUNKS.items():
        ways[name] = lambda samples=samples: in_chunks(*x, samples)
    if with_compile:
        torch.compiler.reset()
        compiled = torch.compile(in_chunks, dynamic=False, fullgraph=True)
        ways[COMPILED] = lambda: compiled(*x)
    return ways


def assert_right(x: Problem, call: Callable[[], object], wanted: Exact, what: str) -> None:
    x.omega.zero_()
    call()
    assert_near(x.omega, wanted, times=TIMES, what=what)
