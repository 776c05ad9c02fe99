"""accumulate_abs_matmul_ beside bmm in chunks, torch.compile, and one product of its FLOPs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import mas_ext
from benchmarks import predict
from tests.abs_matmul import Problem, assert_near, exact
from tests.hardware.gpu import clock, predicted
from tests.hardware.gpu.bandwidth import ROUNDS, ROUNDS_OF_A_REHEARSAL
from tests.hardware.gpu.checks import NeedsGpu, Session, Table

OURS, EAGER, COMPILED, PRODUCT = "mas_ext", "eager", "compile", "torch.mm"
SAMPLES = 32
CHUNKS = (4, 32)  # samples whose products are made at once
TIMES = 4  # of the oracle's bound: library products sum in another order


@dataclass(frozen=True)
class Layer:
    """``conv``: positions lie side by side, as a convolution's do; else rows, as a linear's."""

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
    columns = [
        "p × d, positions",
        predicted.column(session),
        "µs",
        "TFLOP/s",
        "of mm",
        f"best {EAGER}",
        COMPILED,
    ]
    note = f"{SAMPLES} samples, float32. of mm: speed over torch.mm's; the others: time over ours"
    table = session.table("accumulate_abs_matmul_", columns, note)
    for layer in LAYERS_OF_A_REHEARSAL if session.rehearsal else LAYERS:
        session.check(layer.title, beside_others, session, layer, table)


def beside_others(session: Session, layer: Layer, table: Table) -> str:
    seconds = measure(session, layer)
    session.figures[layer.title] = {"flops": layer.flops, "seconds": seconds}
    size = predict.Problem(SAMPLES, layer.positions, layer.p, layer.d)
    expected = predicted.product(session, "float32", size)
    table.rows.append([layer.title, expected, *row(layer, seconds)])
    if session.rehearsal:
        raise NeedsGpu("timed on the CPU")
    return "every provider right, then timed"


def make(layer: Layer, device: str) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def factor(size: int) -> Tensor:
        shape = (size, layer.positions) if layer.conv else (layer.positions, size)
        values = torch.randn(SAMPLES, *shape, device=device, generator=generator)
        return values.mT if layer.conv else values

    return Problem(torch.zeros(layer.p, layer.d, device=device), factor(layer.p), factor(layer.d))


def in_chunks(x: Problem, samples: int) -> None:
    for left, right in zip(x.left.split(samples), x.right.split(samples), strict=True):
        x.omega.add_(torch.bmm(left.mT, right).abs_().sum(0))


def formula(omega: Tensor, left: Tensor, right: Tensor) -> None:
    omega.add_(torch.bmm(left.mT, right).abs().sum(0))


def providers(x: Problem, with_compile: bool) -> dict[str, Callable[[], object]]:
    calls: dict[str, Callable[[], object]] = {
        OURS: lambda: mas_ext.functional.accumulate_abs_matmul_(*x)
    }
    for samples in CHUNKS:
        calls[f"{EAGER}, {samples}"] = lambda samples=samples: in_chunks(x, samples)
    if with_compile:
        torch.compiler.reset()
        compiled = torch.compile(formula, dynamic=False, fullgraph=True)
        calls[COMPILED] = lambda: compiled(*x)
    return calls


def assert_right(x: Problem, call: Callable[[], object], what: str) -> None:
    x.omega.zero_()
    wanted = exact(x, scale=1.0)
    call()
    assert_near(x.omega, wanted._replace(magnitude=TIMES * wanted.magnitude), what)


def measure(session: Session, layer: Layer) -> dict[str, list[float]]:
    x = make(layer, session.device)
    calls = providers(x, layer in COMPILED_LAYERS)
    for name, call in calls.items():
        assert_right(x, call, f"{layer.title}, {name}")
    rows = torch.randn(layer.p, SAMPLES * layer.positions, device=session.device)
    columns = torch.randn(SAMPLES * layer.positions, layer.d, device=session.device)
    calls[PRODUCT] = lambda: torch.mm(rows, columns)
    rounds = ROUNDS_OF_A_REHEARSAL if session.rehearsal else ROUNDS
    return clock.interleaved(calls, rounds, session.device)


def row(layer: Layer, seconds: dict[str, list[float]]) -> list[str]:
    ours = statistics.median(seconds[OURS])
    eager = min(clock.ratio(seconds, f"{EAGER}, {samples}", OURS) for samples in CHUNKS)
    compiled = f"{clock.ratio(seconds, COMPILED, OURS):.2f}" if COMPILED in seconds else "–"
    of_product = clock.ratio(seconds, PRODUCT, OURS)
    return [
        f"{ours * 1e6:.1f}",
        f"{layer.flops / ours / 1e12:.3g}",
        f"{of_product:.2f}",
        f"{eager:.2f}",
        compiled,
    ]
