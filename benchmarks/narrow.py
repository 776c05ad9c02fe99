"""add_penalty_grad_ where values and Ω take fewer bytes, beside the same in PyTorch.

Gradients, parameters and anchors in float32 or bfloat16; Ω in float32, bfloat16 or uint8 codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.entry import Entry, Options, Result, Results
from benchmarks.lists import roofline
from benchmarks.lists.providers import compiled
from benchmarks.show.table import Table
from benchmarks.show.text import three
from benchmarks.tools.timing import interleave, quartiles, ratios
from mas_ext import functional
from mas_ext.precision import BLOCK, compress_, expanded, num_scales

SIZES = {"64m": 64 * 2**20, "4m": 4 * 2**20}  # parameters, in one tensor of whole blocks
QUICK = ("4m",)
PIECE = 2**20  # elements that are judged in float64 at a time
KINDS = {
    "float32, Ω float32": (torch.float32, torch.float32),
    "float32, Ω uint8": (torch.float32, torch.uint8),
    "bfloat16, Ω bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16, Ω uint8": (torch.bfloat16, torch.uint8),
}
WIDE = next(iter(KINDS))
LAMBDA = 1e-3
ROOFLINE = "roofline"


@dataclass
class State:
    """θ's gradient, θ, θ* and Ω with its scales, which has none unless it is in codes."""

    grads: Tensor
    params: Tensor
    anchors: Tensor
    omega: Tensor
    scales: Tensor

    @property
    def bytes_moved(self) -> int:
        """Of one pass: gradients are read and written, all others read."""
        every = [self.grads, self.grads, self.params, self.anchors, self.omega, self.scales]
        return sum(t.numel() * t.element_size() for t in every)


def make(numel: int, values: torch.dtype, kept: torch.dtype) -> State:
    generator = torch.Generator().manual_seed(0)
    grads, params, anchors = (
        torch.empty(numel).normal_(generator=generator).to(values) for _ in range(3)
    )
    omega, scales = torch.rand(numel, generator=generator), torch.empty(0)
    if kept == torch.uint8:
        codes, scales = torch.empty(numel, dtype=kept), torch.empty(num_scales(numel))
        compress_(codes, scales, omega)
        return State(grads, params, anchors, codes, scales)
    return State(grads, params, anchors, omega.to(kept), scales)


def fused(s: State) -> Tensor:
    return functional.add_penalty_grad_(
        [s.grads], [s.params], [s.anchors], [s.omega], LAMBDA, omega_scales=[s.scales]
    )


def _wide(omega: Tensor, scales: Tensor) -> Tensor:
    if omega.dtype != torch.uint8:
        return omega.float()
    roots = omega.view(-1, BLOCK).float()
    return (roots * roots * (scales / 65025).unsqueeze(1)).view(-1)


@torch.no_grad()
def eager(s: State) -> Tensor:
    delta = s.params.float() - s.anchors.float()
    weighted = _wide(s.omega, s.scales) * delta
    energy = torch.dot(weighted, delta)
    s.grads.add_(weighted, alpha=LAMBDA)
    return LAMBDA / 2 * energy


@torch.no_grad()
def by_formula(
    grads: Tensor, params: Tensor, anchors: Tensor, omega: Tensor, scales: Tensor
) -> Tensor:
    """Plain arithmetic for torch.compile to fuse."""
    delta = params.float() - anchors.float()
    weighted = _wide(omega, scales) * delta
    grads.copy_(grads.float() + LAMBDA * weighted)
    return LAMBDA / 2 * (weighted * delta).sum()


_compiled = compiled(by_formula)


def torch_compile(s: State) -> Tensor | None:
    return _compiled(s.grads, s.params, s.anchors, s.omega, s.scales)


OURS = "mas_ext"
WAYS: dict[str, Callable[[State], Tensor | None]] = {
    OURS: fused,
    "torch.compile": torch_compile,
    "eager": eager,
}
OTHERS = tuple(way for way in WAYS if way != OURS)
# Beyond, it takes thirty times as long and gigabytes of temporaries: what follows it in a round
# then finds its own memory cold, and is measured to take up to twice its time.
EAGER_UP_TO = 8 * 2**20


def check(s: State, step: Callable[[State], Tensor | None], what: str) -> None:
    """Against float64, piece by piece; the gradients are put back."""
    start, value = s.grads.clone(), step(s)
    omega = expanded(s.omega, s.scales) if s.scales.numel() else s.omega
    energy, lists = 0.0, (start, s.grads, s.params, s.anchors, omega)
    # One rounding to the gradients' dtype, or of a few operations in float32.
    bound = 2**-8 if s.grads.dtype == torch.bfloat16 else 1e-6
    for before, after, p, a, o in zip(*(t.split(PIECE) for t in lists), strict=True):
        delta = p.double() - a.double()
        energy += float((o.double() * delta * delta).sum())
        expected = before.double() + LAMBDA * o.double() * delta
        torch.testing.assert_close(
            after.double(), expected, rtol=bound, atol=1e-6, msg=lambda text: f"{what}: {text}"
        )
    assert value is not None, f"{what}: no value"
    wanted = LAMBDA / 2 * energy
    # Wide: a float32 BLAS dot over so many numbers is off by 1e-3.
    assert abs(float(value) - wanted) <= 1e-2 * wanted, f"{what}: {float(value)}, not {wanted}"
    s.grads.copy_(start)


def measure(numel: int, rounds: int, budget: float | None = None) -> Result:
    """Every way of every kind checked first, then timed by turns in one process."""
    torch.compiler.reset()
    calls: dict[str, Callable[[], object]] = {}
    states = {name: make(numel, *dtypes) for name, dtypes in KINDS.items()}
    for kind, state in states.items():
        for way, step in _ways(numel).items():
            check(state, step, f"{kind}, {way}")
            calls[f"{kind}: {way}"] = lambda state=state, step=step: step(state)
    wide = states[WIDE]
    calls[ROOFLINE] = roofline.make([[wide.grads], [wide.params], [wide.anchors], [wide.omega]])
    seconds = interleave(calls, rounds, budget=budget)
    return _summary(numel, states, seconds)


def _ways(numel: int) -> dict[str, Callable[[State], Tensor | None]]:
    return {w: step for w, step in WAYS.items() if step is not eager or numel <= EAGER_UP_TO}


def _summary(numel: int, states: dict[str, State], seconds: dict[str, list[float]]) -> Result:
    """Ratios are medians of per-round ratios."""

    def over(name: str, other: str) -> float:
        return quartiles(ratios(seconds[name], seconds[other]))[1]

    wide, rows = f"{WIDE}: {OURS}", {}
    for kind, state in states.items():
        ours = f"{kind}: {OURS}"
        others = {way: over(f"{kind}: {way}", ours) for way in _ways(numel) if way != OURS}
        share = state.bytes_moved / states[WIDE].bytes_moved
        rows[kind] = {
            "seconds": quartiles(seconds[ours])[1],
            "bytes_per_parameter": state.bytes_moved / numel,
            "speedup_over_float32": over(wide, ours),
            "fraction_of_roofline": over(ROOFLINE, ours) * share,
            "times_ours": others,
        }
    return {"parameters": numel, "rounds": len(seconds[ROOFLINE]), "kinds": rows}


def _run(options: Options) -> Iterator[tuple[str, Result]]:
    names = [n for n in options.sizes if n in SIZES] or (QUICK if options.quick else tuple(SIZES))
    for name in names:
        options.tell(f"{SIZES[name] / 2**20:.0f} Mi parameters")
        yield name, measure(SIZES[name], options.rounds, options.seconds / len(names))


def _row(kind: str, row: Result) -> list[str]:
    return [
        kind,
        f"{row['bytes_per_parameter']:.2f}",
        three(row["seconds"] * 1e3),
        f"{row['speedup_over_float32']:.2f}",
        f"{row['fraction_of_roofline']:.2f}",
        *(f"{row['times_ours'][w]:.1f}" if w in row["times_ours"] else "–" for w in OTHERS),
    ]


def _overview(results: Results) -> list[Table]:
    headings = ("values, Ω", "bytes", "ms", "of float32's speed", "of roofline", *OTHERS)
    note = (
        "bytes: that one pass moves, a parameter; of roofline: the speed at which they are moved, "
        f"as a fraction of the float32 roofline's; {', '.join(OTHERS)}: time over ours"
    )
    return [
        Table(
            f"add_penalty_grad_, {result['parameters'] / 2**20:.0f} Mi parameters",
            headings,
            [_row(kind, row) for kind, row in result["kinds"].items()],
            note=note,
        )
        for result in results.values()
    ]


ENTRY = Entry(
    name="narrow",
    title="The penalty's pass over values and an Ω of fewer bytes",
    about="add_penalty_grad_ where gradients, parameters and anchors are bfloat16 and Ω is "
    "bfloat16 or uint8 codes, beside float32, and beside the same arithmetic in PyTorch, compiled "
    "and eager.",
    run=_run,
    detail=lambda result: [],
    overview=_overview,
    seconds=(20, 3),
)
