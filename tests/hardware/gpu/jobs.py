"""Ways to do the job of each operator: ours, eager mode, torch._foreach, torch.compile.

All are verified against float64 before they are timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import torch
from torch import Tensor

import mas_ext
from mas_ext.precision import BLOCK
from tests.hardware.gpu.clock import OURS
from tests.support.exact import assert_near, penalty_value
from tests.support.operators import OPERATORS, Scalars, call, exact_tensors, written_argument
from tests.support.tensors import KEPT, State, accumulation_dtype, compressed

LAMBDA, RATE, SCALE = 0.1, 0.01, 1 / 128
SCALARS = Scalars(LAMBDA, None, RATE, SCALE)
EAGER, FOREACH, COMPILED = "eager", "foreach", "compile"
OTHERS = (EAGER, FOREACH, COMPILED)

Result = tuple[Tensor | None, list[Tensor]]  # as Outcome has it
Job = Callable[[State], Result]


def ours(op: str) -> Job:
    return lambda s: call(mas_ext.functional, op, s, SCALARS)


# ================================================================================================
# In eager mode, tensor by tensor. Values are lists of energies, which `total` adds up.
# ================================================================================================
def total(energies: Iterable[Tensor]) -> Tensor:
    return LAMBDA / 2 * torch.stack(list(energies)).sum()


def each(s: State, formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
    return list(map(formula, s.params, s.anchors, s.omega))


def energy(param: Tensor, anchor: Tensor, omega: Tensor) -> Tensor:
    return (omega * (param - anchor).square()).sum()


def eager_accumulate(s: State) -> Result:
    for omega, grad in zip(s.omega, s.grads, strict=True):
        omega.add_(grad.abs(), alpha=SCALE)
    return None, s.omega


def eager_add(s: State) -> Result:
    energies = []
    for grad, param, anchor, omega in zip(s.grads, s.params, s.anchors, s.omega, strict=True):
        delta = param - anchor
        grad.addcmul_(omega, delta, value=LAMBDA)
        energies.append((delta.square_().mul_(omega)).sum())
    return total(energies), s.grads


def eager_proximal(s: State) -> Result:
    for param, anchor, omega in zip(s.params, s.anchors, s.omega, strict=True):
        c = (LAMBDA * RATE) * omega
        param.addcmul_(c, anchor).div_(c.add_(1))
    return total(each(s, energy)), s.params


EAGER_JOBS: dict[str, Job] = {
    "accumulate_importance_": eager_accumulate,
    "penalty": lambda s: (total(each(s, energy)), []),
    "penalty_and_grad": lambda s: (
        total(each(s, energy)),
        each(s, lambda param, anchor, omega: LAMBDA * omega * (param - anchor)),
    ),
    "add_penalty_grad_": eager_add,
    "proximal_step_": eager_proximal,
}


# ================================================================================================
# torch._foreach
# ================================================================================================
def deltas_of(s: State) -> list[Tensor]:
    return list(torch._foreach_sub(s.params, s.anchors))


def foreach_energy(deltas: list[Tensor], omega: list[Tensor]) -> Tensor:
    torch._foreach_mul_(deltas, deltas)
    torch._foreach_mul_(deltas, omega)
    return total(d.sum() for d in deltas)


def foreach_accumulate(s: State) -> Result:
    torch._foreach_add_(s.omega, torch._foreach_abs(s.grads), alpha=SCALE)
    return None, s.omega


def foreach_penalty_and_grad(s: State) -> Result:
    deltas = deltas_of(s)
    grads = list(torch._foreach_mul(deltas, s.omega))
    torch._foreach_mul_(grads, LAMBDA)
    return foreach_energy(deltas, s.omega), grads


def foreach_add(s: State) -> Result:
    deltas = deltas_of(s)
    torch._foreach_addcmul_(s.grads, s.omega, deltas, value=LAMBDA)
    return foreach_energy(deltas, s.omega), s.grads


def foreach_proximal(s: State) -> Result:
    factors = torch._foreach_mul(s.omega, LAMBDA * RATE)
    torch._foreach_addcmul_(s.params, factors, s.anchors)
    torch._foreach_add_(factors, 1)
    torch._foreach_div_(s.params, factors)
    del factors
    return foreach_energy(deltas_of(s), s.omega), s.params


FOREACH_JOBS: dict[str, Job] = {
    "accumulate_importance_": foreach_accumulate,
    "penalty": lambda s: (foreach_energy(deltas_of(s), s.omega), []),
    "penalty_and_grad": foreach_penalty_and_grad,
    "add_penalty_grad_": foreach_add,
    "proximal_step_": foreach_proximal,
}


@cache
def compiled(op: str) -> Job:
    """The eager formulas, for inductor to fuse; for fixed shapes, the most that it can do."""
    job = EAGER_JOBS[op]

    def on_lists(*lists: list[Tensor]) -> Result:
        return job(State(*lists))

    function = torch.compile(on_lists, dynamic=False, fullgraph=True)
    return lambda s: function(s.params, s.anchors, s.omega, s.grads)


def ways(op: str, with_compile: bool) -> dict[str, Job]:
    jobs = {OURS: ours(op), EAGER: EAGER_JOBS[op], FOREACH: FOREACH_JOBS[op]}
    return {**jobs, COMPILED: compiled(op)} if with_compile else jobs


# ================================================================================================
# State, bytes, correctness
# ================================================================================================
def make_state(
    shapes: list[tuple[int, ...]],
    device: str,
    dtype: torch.dtype = torch.float32,
    kept: str | None = None,
) -> State:
    """Values as large as in training, made on the device; Ω stored as ``kept`` in fewer bytes."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: tuple[int, ...], std: float) -> Tensor:
        empty = torch.empty(shape, device=device, dtype=dtype)
        return empty.normal_(0, std, generator=generator)

    state = State()
    for shape in shapes:
        state.anchors.append(normal(shape, 0.02))
        state.params.append(normal(shape, 0.01).add_(state.anchors[-1]))
        state.grads.append(normal(shape, 0.01))
        omega = torch.empty(shape, device=device, dtype=accumulation_dtype(dtype))
        state.omega.append(omega.uniform_(generator=generator))
    if kept == "uint8":
        pairs = [compressed(omega) for omega in state.omega]
        state.omega, state.omega_scales = (list(tensors) for tensors in zip(*pairs, strict=True))
    elif kept is not None:
        state.omega = [omega.to(KEPT[kept]) for omega in state.omega]
    return state


def flattened(state: State) -> State:
    """One tensor a list: the form in which torch.compile does best."""
    lists = state.lists().items()
    return State(**{name: [torch.cat([t.reshape(-1) for t in ts])] for name, ts in lists})


def bytes_moved(op: str, state: State) -> int:
    """What one pass has to read and to write; a new gradient is as large as its parameter."""
    written = ["params"] if op == "penalty_and_grad" else OPERATORS[op].written
    names = [*OPERATORS[op].lists, "omega_scales", *written]
    return sum(t.numel() * t.element_size() for name in names for t in getattr(state, name))


SLICE = 1 << 24
TIMES = 4  # other orders of the same operations round a little differently
VALUE_TOLERANCE = 1e-4  # of a sum that eager mode forms in float32


def slices(tensors: list[Tensor], size: int = SLICE) -> Iterator[Tensor]:
    for tensor in tensors:
        yield from tensor.reshape(-1).split(size)


class OnDevice(State):
    """Its float64 copy stays where it is: a billion parameters would take the CPU minutes."""

    def double(self) -> State:
        copy = self.map(lambda t: t.detach().double())
        for i, scales in enumerate(copy.omega_scales):  # Ω = s·(q/255)²; 256 neighbours share s
            codes = copy.omega[i]
            copy.omega[i] = scales.repeat_interleave(BLOCK)[: codes.numel()] * (codes / 255) ** 2
        return copy


def pieces(lists: dict[str, list[Tensor]]) -> Iterator[OnDevice]:
    """Slice by slice, scales with the codes that they are of."""
    sizes = {"omega_scales": SLICE // BLOCK}
    for piece in zip(*(slices(ts, sizes.get(n, SLICE)) for n, ts in lists.items()), strict=True):
        yield OnDevice(**{name: [tensor] for name, tensor in zip(lists, piece, strict=True)})


def assert_right(op: str, job: Job, state: State, what: str) -> None:
    """A job's result from the same start, slice by slice; what it wrote is put back."""
    written = written_argument(op)
    before = [t.clone() for t in state.lists()[written]] if written else []
    value, tensors = job(state)
    start = {**state.lists(), **({written: before} if written else {})}
    results, energies = slices(tensors), []
    for piece in pieces(start):
        for exact in exact_tensors(op, piece, SCALARS):
            actual = next(results)
            assert_near(actual, exact, times=TIMES, what=what)
            if op == "proximal_step_":  # its value is the penalty after the step
                piece.params = [actual]
        energies.append(penalty_value(piece, LAMBDA))
    if OPERATORS[op].has_penalty:
        expected = math.fsum(energies)
        assert abs(float(value) - expected) <= VALUE_TOLERANCE * expected, f"{what}: {value}"
    for tensor, start_value in zip(state.lists()[written] if written else [], before, strict=True):
        tensor.copy_(start_value)
