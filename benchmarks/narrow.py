"""``add_penalty_grad_`` with values and Ω in fewer bytes, next to the same arithmetic in PyTorch.

Gradients, parameters and anchors are float32 or bfloat16; Ω is float32, bfloat16 or uint8 codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.benchmark import Benchmark, Options, Result
from benchmarks.job import OURS, compiled
from benchmarks.measure import interleave, median_ratio
from mas_ext import functional
from mas_ext.precision import BLOCK, dequantize, num_scales, quantize_

SIZES = {"64m": 64 * 2**20, "4m": 4 * 2**20}  # parameters, in one tensor of whole blocks
QUICK_SIZE = 2**18
PIECE = 2**20  # elements that are verified in float64 at a time
DTYPES = {
    "float32, Ω float32": (torch.float32, torch.float32),
    "float32, Ω uint8": (torch.float32, torch.uint8),
    "bfloat16, Ω bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16, Ω uint8": (torch.bfloat16, torch.uint8),
}
FLOAT32 = next(iter(DTYPES))
LAMBDA = 1e-3
# Larger tensors take eager code thirty times as long and gigabytes of temporaries: what follows it
# in a round finds its own memory cold and takes up to twice its time.
EAGER_UP_TO = 8 * 2**20


@dataclass
class Tensors:
    """g, θ, θ* and Ω with its scales, which are empty unless Ω is stored as codes."""

    grads: Tensor
    params: Tensor
    anchors: Tensor
    omega: Tensor
    scales: Tensor

    @property
    def bytes_moved(self) -> int:
        """By one pass: gradients are read and written, all others read."""
        every = [self.grads, self.grads, self.params, self.anchors, self.omega, self.scales]
        return sum(t.nbytes for t in every)


def make(numel: int, values: torch.dtype, stored: torch.dtype, device: str = "cpu") -> Tensors:
    generator = torch.Generator(device).manual_seed(0)
    grads, params, anchors = (
        torch.empty(numel, device=device).normal_(generator=generator).to(values) for _ in range(3)
    )
    omega = torch.rand(numel, generator=generator, device=device)
    if stored == torch.uint8:
        codes, scales = omega.new_empty(numel, dtype=stored), omega.new_empty(num_scales(numel))
        quantize_(codes, scales, omega)
        return Tensors(grads, params, anchors, codes, scales)
    return Tensors(grads, params, anchors, omega.to(stored), omega.new_empty(0))


def fused(s: Tensors) -> Tensor:
    return functional.add_penalty_grad_(
        [s.grads], [s.params], [s.anchors], [s.omega], LAMBDA, omega_scales=[s.scales]
    )


def _in_float32(omega: Tensor, scales: Tensor) -> Tensor:
    if omega.dtype != torch.uint8:
        return omega.float()
    roots = omega.view(-1, BLOCK).float()
    return (roots * roots * (scales / 65025).unsqueeze(1)).view(-1)


@torch.no_grad()
def eager(s: Tensors) -> Tensor:
    delta = s.params.float() - s.anchors.float()
    weighted = _in_float32(s.omega, s.scales) * delta
    energy = torch.dot(weighted, delta)
    s.grads.add_(weighted, alpha=LAMBDA)
    return LAMBDA / 2 * energy


@compiled
@torch.no_grad()
def by_formula(
    grads: Tensor, params: Tensor, anchors: Tensor, omega: Tensor, scales: Tensor
) -> Tensor:
    """Plain arithmetic for torch.compile to fuse."""
    delta = params.float() - anchors.float()
    weighted = _in_float32(omega, scales) * delta
    grads.copy_(grads.float() + LAMBDA * weighted)
    return LAMBDA / 2 * (weighted * delta).sum()


def torch_compile(s: Tensors) -> Tensor:
    return by_formula(s.grads, s.params, s.anchors, s.omega, s.scales)


Step = Callable[[Tensors], Tensor]
PROVIDERS: dict[str, Step] = {OURS: fused, "torch.compile": torch_compile, "eager": eager}


def check(s: Tensors, step: Step, what: str) -> None:
    """Verifies against float64, piece by piece, and restores the gradients."""
    start, value = s.grads.clone(), step(s)
    omega = dequantize(s.omega, s.scales) if s.scales.numel() else s.omega
    energy, lists = 0.0, (start, s.grads, s.params, s.anchors, omega)
    # One rounding to the gradients' dtype, or that of a few operations in float32.
    bound = 2**-8 if s.grads.dtype == torch.bfloat16 else 1e-6
    for before, after, p, a, o in zip(*(t.split(PIECE) for t in lists), strict=True):
        delta = p.double() - a.double()
        energy += float((o.double() * delta * delta).sum())
        expected = before.double() + LAMBDA * o.double() * delta
        torch.testing.assert_close(
            after.double(), expected, rtol=bound, atol=1e-6, msg=lambda text: f"{what}: {text}"
        )
    wanted = LAMBDA / 2 * energy
    # Wide: a float32 BLAS dot over so many numbers is off by 1e-3.
    assert abs(float(value) - wanted) <= 1e-2 * wanted, f"{what}: {float(value)}, not {wanted}"
    s.grads.copy_(start)


def measure(numel: int, rounds: int, budget: float | None = None, device: str = "cpu") -> Result:
    """All providers with all dtypes are verified, then timed in interleaved rounds."""
    torch.compiler.reset()
    providers = {n: step for n, step in PROVIDERS.items() if n != "eager" or numel <= EAGER_UP_TO}
    tensors = {name: make(numel, *dtypes, device) for name, dtypes in DTYPES.items()}
    calls: dict[str, Callable[[], object]] = {}
    for dtypes, each in tensors.items():
        for name, step in providers.items():
            check(each, step, f"{dtypes}, {name}")
            calls[f"{dtypes}: {name}"] = partial(step, each)
    wide = tensors[FLOAT32]
    if device == "cpu":
        streams = [[wide.grads], [wide.params], [wide.anchors], [wide.omega]]
        calls[roofline.NAME] = roofline.make(streams)
    else:
        calls[roofline.NAME] = roofline.copy_of(wide.bytes_moved, torch.device(device))
    seconds = interleave(calls, rounds, budget=budget)

    def over(one: str, other: str) -> float:
        return median_ratio(seconds[one], seconds[other])

    def summary(dtypes: str) -> Result:
        ours, moved = f"{dtypes}: {OURS}", tensors[dtypes].bytes_moved
        others = [name for name in providers if name != OURS]
        return {
            "seconds": median(seconds[ours]),
            "bytes_per_parameter": moved / numel,
            "speedup_over_float32": over(f"{FLOAT32}: {OURS}", ours),
            "fraction_of_roofline": over(roofline.NAME, ours) * moved / wide.bytes_moved,
            "times_ours": {name: over(f"{dtypes}: {name}", ours) for name in others},
        }

    kinds = {dtypes: summary(dtypes) for dtypes in tensors}
    return {"parameters": numel, "rounds": len(seconds[roofline.NAME]), "kinds": kinds}


def _run(options: Options) -> Iterator[tuple[str, Result]]:
    sizes = {"quick": QUICK_SIZE} if options.quick else SIZES
    for name, numel in sizes.items():
        options.progress(f"{numel:,} parameters")
        yield name, measure(numel, options.rounds, options.seconds / len(sizes))


BENCHMARK = Benchmark(
    name="narrow",
    title="The penalty's pass over bfloat16 values, and over Ω in fewer bytes",
    about="add_penalty_grad_ with bfloat16 gradients, parameters and anchors and an Ω in bfloat16 "
    "or uint8 codes, next to float32, and next to the same arithmetic in PyTorch, compiled and "
    "eager.",
    run=_run,
    seconds=(20, 1),
)
