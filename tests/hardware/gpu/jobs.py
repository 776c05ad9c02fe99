"""Each operator on lists beside other ways to do its job, all held against float64 before they are
timed: ours, a loop in eager mode, torch._foreach, and torch.compile of the plain formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

import mas_ext
from mas_ext.reference import BLOCK
from tests import cases
from tests.cases import State

LAMBDA, RATE, SCALE = 0.1, 0.01, 1 / 128
SCALARS = cases.Scalars(LAMBDA, None, RATE, SCALE)
OURS, EAGER, FOREACH, COMPILED = "mas_ext", "eager", "foreach", "compile"
OTHERS = (EAGER, FOREACH, COMPILED)

Result = tuple[Tensor | None, list[Tensor]]  # as cases.Outcome has it
Job = Callable[[State], Result]


def ours(op: str) -> Job:
    return lambda s: cases.call(mas_ext.functional, op, s, SCALARS)


# ================================================================================================
# In eager mode, tensor by tensor
# ================================================================================================
def eager_accumulate(s: State) -> Result:
    for omega, grad in zip(s.omega, s.grads, strict=True):
        omega.add_(grad.abs(), alpha=SCALE)
    return None, s.omega


def energy(param: Tensor, anchor: Tensor, omega: Tensor) -> Tensor:
    return (omega * (param - anchor).square()).sum()


def total(energies: list[Tensor]) -> Tensor:
    return LAMBDA / 2 * (energies[0] if len(energies) == 1 else torch.stack(energies).sum())


def eager_penalty(s: State) -> Result:
    return total([energy(*x) for x in zip(s.params, s.anchors, s.omega, strict=True)]), []


def eager_penalty_and_grad(s: State) -> Result:
    energies, grads = [], []
    for param, anchor, omega in zip(s.params, s.anchors, s.omega, strict=True):
        delta = param - anchor
        weighted = omega * delta
        energies.append((weighted * delta).sum())
        grads.append(LAMBDA * weighted)
    return total(energies), grads


def eager_add(s: State) -> Result:
    energies = []
    for grad, param, anchor, omega in zip(s.grads, s.params, s.anchors, s.omega, strict=True):
        delta = param - anchor
        grad.addcmul_(omega, delta, value=LAMBDA)
        energies.append((delta.square_().mul_(omega)).sum())
    return total(energies), s.grads


def eager_proximal(s: State) -> Result:
    energies = []
    for param, anchor, omega in zip(s.params, s.anchors, s.omega, strict=True):
        c = (LAMBDA * RATE) * omega
        param.addcmul_(c, anchor).div_(c.add_(1))
        energies.append(energy(param, anchor, omega))
    return total(energies), s.params


# ================================================================================================
# torch._foreach
# ================================================================================================
def foreach_accumulate(s: State) -> Result:
    torch._foreach_add_(s.omega, torch._foreach_abs(s.grads), alpha=SCALE)
    return None, s.omega


def foreach_energy(deltas: list[Tensor], omega: list[Tensor]) -> Tensor:
    torch._foreach_mul_(deltas, deltas)
    torch._foreach_mul_(deltas, omega)
    return total([d.sum() for d in deltas])


def foreach_penalty(s: State) -> Result:
    return foreach_energy(list(torch._foreach_sub(s.params, s.anchors)), s.omega), []


def foreach_penalty_and_grad(s: State) -> Result:
    deltas = list(torch._foreach_sub(s.params, s.anchors))
    grads = list(torch._foreach_mul(deltas, s.omega))
    torch._foreach_mul_(grads, LAMBDA)
    return foreach_energy(deltas, s.omega), grads


def foreach_add(s: State) -> Result:
    deltas = list(torch._foreach_sub(s.params, s.anchors))
    torch._foreach_addcmul_(s.grads, s.omega, deltas, value=LAMBDA)
    return foreach_energy(deltas, s.omega), s.grads


def foreach_proximal(s: State) -> Result:
    factors = torch._foreach_mul(s.omega, LAMBDA * RATE)
    torch._foreach_addcmul_(s.params, factors, s.anchors)
    torch._foreach_add_(factors, 1)
    torch._foreach_div_(s.params, factors)
    del factors
    return foreach_energy(list(torch._foreach_sub(s.params, s.anchors)), s.omega), s.params


EAGER_JOBS: dict[str, Job] = {
    "accumulate_importance_": eager_accumulate,
    "penalty": eager_penalty,
    "penalty_and_grad": eager_penalty_and_grad,
    "add_penalty_grad_": eager_add,
    "proximal_step_": eager_proximal,
}
FOREACH_JOBS: dict[str, Job] = {
    "accumulate_importance_": foreach_accumulate,
    "penalty": foreach_penalty,
    "penalty_and_grad": foreach_penalty_and_grad,
    "add_penalty_grad_": foreach_add,
    "proximal_step_": foreach_proximal,
}


# ================================================================================================
# torch.compile
# ================================================================================================
@cache
def compiled_on_lists(op: str) -> Callable[..., Result]:
    """The eager loop's formulas, for inductor to fuse; for fixed shapes, the most it can do."""
    job = EAGER_JOBS[op]

    def on_lists(
        params: list[Tensor], anchors: list[Tensor], omega: list[Tensor], grads: list[Tensor]
    ) -> Result:
        return job(State(params, anchors, omega, grads))

    return torch.compile(on_lists, dynamic=False, fullgraph=True)


def compiled(op: str) -> Job:
    function = compiled_on_lists(op)
    return lambda s: function(s.params, s.anchors, s.omega, s.grads)


def providers(op: str, with_compile: bool) -> dict[str, Job]:
    jobs = {OURS: ours(op), EAGER: EAGER_JOBS[op], FOREACH: FOREACH_JOBS[op]}
    return {**jobs, COMPILED: compiled(op)} if with_compile else jobs


# ================================================================================================
# State, bytes, correctness
# ================================================================================================
def make_state(
    shapes: list[tuple[int, ...]], device: str, dtype: torch.dtype, kept: str | None = None
) -> State:
    """Values of the magnitude that training gives them, made on the device; Ω ``kept`` in less."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: tuple[int, ...], std: float) -> Tensor:
        empty = torch.empty(shape, device=device, dtype=dtype)
        return empty.normal_(0, std, generator=generator)

    state = State([], [], [], [])
    for shape in shapes:
        state.anchors.append(normal(shape, 0.02))
        state.params.append(normal(shape, 0.01).add_(state.anchors[-1]))
        state.grads.append(normal(shape, 0.01))
        omega = torch.empty(shape, device=device, dtype=cases.accumulation_dtype(dtype))
        state.omega.append(omega.uniform_(generator=generator))
    if kept == "uint8":
        pairs = [cases.compressed(omega) for omega in state.omega]
        state.omega, state.omega_scales = (list(tensors) for tensors in zip(*pairs, strict=True))
    elif kept is not None:
        state.omega = [omega.to(cases.KEPT[kept]) for omega in state.omega]
    return state


def flattened(state: State) -> State:
    """One tensor a list: the form in which torch.compile does best."""
    return State(*([torch.cat([t.reshape(-1) for t in ts])] for ts in state.lists().values()))


# What one pass has to read and to write.
READ = {op: cases.list_arguments(op) for op in cases.OPS}
WRITTEN = {op: "params" if op == "penalty_and_grad" else cases.written_argument(op) for op in READ}


def bytes_moved(op: str, state: State) -> int:
    lists = state.lists()
    names = [*READ[op], *filter(None, [WRITTEN[op]])]
    tensors = [t for name in names for t in lists[name]] + state.omega_scales
    return sum(t.numel() * t.element_size() for t in tensors)


SLICE = 1 << 24
TIMES = 4  # other orders of the same operations round a little differently
VALUE_TOLERANCE = 1e-4  # of a sum that eager mode forms in float32


def slices(tensors: list[Tensor], size: int = SLICE) -> Iterator[Tensor]:
    for tensor in tensors:
        yield from tensor.reshape(-1).split(size)


def pieces(lists: dict[str, list[Tensor]]) -> Iterator[State]:
    """Slice by slice, scales with the codes that they are of."""
    sizes = {"omega_scales": SLICE // BLOCK}
    for piece in zip(*(slices(ts, sizes.get(n, SLICE)) for n, ts in lists.items()), strict=True):
        yield State(*([tensor] for tensor in piece))


def assert_right(op: str, job: Job, state: State, what: str) -> None:
    """A job's result from the same start, slice by slice; what it wrote is put back."""
    written = cases.written_argument(op)
    before = [t.clone() for t in state.lists()[written]] if written else []
    value, tensors = job(state)
    start = {**state.lists(), **({written: before} if written else {})}
    results, energies = slices(tensors), []
    for piece in pieces(start):
        actual = next(results, None)
        if actual is not None:
            (exact,) = cases.exact_tensors(op, piece, SCALARS)
            cases.assert_near(actual, exact, times=TIMES)
        if op == "proximal_step_":
            piece.params = [actual]
        energies.append(cases.exact_penalty(piece, LAMBDA))
    if op != "accumulate_importance_":
        expected = math.fsum(energies)
        assert abs(float(value) - expected) <= VALUE_TOLERANCE * expected, f"{what}: {value}"
    for tensor, start_value in zip(state.lists()[written] if written else [], before, strict=True):
        tensor.copy_(start_value)
