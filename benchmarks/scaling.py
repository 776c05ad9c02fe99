"""How time grows with parameters, tensors, tasks, the batch and the length of a sequence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import penalty, roofline
from benchmarks.benchmark import Benchmark, Options, Result
from benchmarks.job import OURS, check
from benchmarks.measure import interleave, ratios, spread
from benchmarks.models import Batch, gpt2, mlp
from benchmarks.per_sample import TOLERANCE, error
from benchmarks.per_sample.providers import batch_mean, in_chunks, ours, vmapped
from benchmarks.state import State, assert_same, make_state
from mas_ext import MAS

Calls = dict[str, Callable[[], object]]  # ours first
MOST_ROUNDS = 9
MOST_COMPILED = 100  # tensors; a quick run compiles nothing
SAMPLES = 64  # of a task


# -- the penalty -----------------------------------------------------------------------------------
def _penalty(tensors: int, numel: int, quick: bool) -> Calls:
    torch.compiler.reset()
    shapes = [torch.Size([numel // tensors])] * tensors
    state, most = make_state(shapes), 0 if quick else MOST_COMPILED
    providers = [
        p
        for p in penalty.JOB.providers
        if not p.flat and (p.most_tensors is None or len(shapes) <= most)
    ]
    check(penalty.JOB, providers, state, state)
    calls: Calls = {p.name: partial(p.step, state) for p in providers}
    return {**calls, roofline.NAME: roofline.make(penalty.JOB.streams(state))}


# -- tasks -----------------------------------------------------------------------------------------
small_mlp = partial(mlp, 784, 256, 256, 10)


def tasks(count: int, quick: bool) -> Calls:
    """Ours merges Ω of all tasks; the alternative is a term per task, which every step pays for."""
    torch.manual_seed(0)
    model, data = small_mlp(), [torch.randn(SAMPLES, 784)]
    mas = MAS(model, lambda_reg=0.1)
    for _ in range(count):
        mas.consolidate(data)
    terms = _terms(model, mas, count)
    _check_terms(mas, terms)
    end = MAS(small_mlp())
    return {
        OURS: mas.add_penalty_grad_,
        "a term a task, torch._foreach": lambda: [penalty.foreach(term) for term in terms],
        f"mas_ext, the end of a task of {SAMPLES}": lambda: end.consolidate(data),
    }


def _terms(model: nn.Module, mas: MAS, count: int) -> list[State]:
    """The same penalty as a sum over tasks, with the parameters moved away from the anchors."""
    params = list(model.parameters())
    with torch.no_grad():
        for p in params:
            p.add_(0.01 * torch.randn_like(p))
            p.grad = torch.zeros_like(p)
    names = [name for name, _ in model.named_parameters()]
    anchors = [mas.anchor[name].clone() for name in names]
    return [
        State(params, anchors, [mas.importance[name] / count for name in names], mas.lambda_reg)
        for _ in range(count)
    ]


def _check_terms(mas: MAS, terms: list[State]) -> None:
    params = terms[0].params
    mas.add_penalty_grad_()
    fused = [p.grad.clone() for p in params]
    for p in params:
        p.grad.zero_()
    for term in terms:
        penalty.foreach(term)
    assert any(grad.any() for grad in fused), "there is no penalty"
    assert_same([p.grad for p in params], fused, "a term a task")


# -- importance ------------------------------------------------------------------------------------
def batch(size: int, quick: bool) -> Calls:
    torch.manual_seed(0)
    return _importance(small_mlp, torch.randn(size, 784))


def length(positions: int, quick: bool) -> Calls:
    torch.manual_seed(0)
    build = partial(gpt2, width=64, layers=2, vocabulary=512, length=positions)
    return _importance(build, {"input_ids": torch.randint(512, (8, positions))})


def _importance(build: Callable[[], nn.Module], data: Batch) -> Calls:
    providers = {
        OURS: ours,
        "batch-mean, inexact": batch_mean,
        "batch size 1": partial(in_chunks, length=1),
        "vmap(grad), unchunked": partial(vmapped, length=sys.maxsize),
    }
    calls, found = {}, {}
    for name, provider in providers.items():
        torch.manual_seed(0)
        calls[name] = provider(build().eval(), [data])
        found[name] = calls[name]()
    for name in (OURS, "vmap(grad), unchunked"):
        _check_omega(name, found[name], found["batch size 1"])
    return calls


def _check_omega(name: str, omega: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    off, worst = error(omega, expected)
    assert off <= TOLERANCE, f"{name}: Ω of {worst} is off by {off:.1%}"


# -- axes ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Axis:
    """``prepare``: from a value and whether the run is quick, the calls to time, all verified."""

    title: str
    label: str
    values: tuple[int, ...]
    quick: tuple[int, ...]
    prepare: Callable[[int, bool], Calls]


_POWERS = tuple(10**power for power in range(1, 8))
AXES = {
    "parameters": Axis(
        "penalty, one tensor", "parameters", _POWERS, (1000, 10**5), partial(_penalty, 1)
    ),
    "parameters_in_tensors": Axis(
        "penalty, 25 tensors", "parameters", _POWERS[2:], (1000, 10**5), partial(_penalty, 25)
    ),
    "tensors": Axis(
        "penalty, 4 M parameters",
        "tensors",
        (1, 10, 100, 1000, 10_000),
        (1, 100),
        lambda tensors, quick: _penalty(tensors, 4_000_000, quick),
    ),
    "tasks": Axis(
        "penalty after so many tasks, MLP", "tasks", (1, 2, 5, 10, 20, 50), (1, 5), tasks
    ),
    "batch": Axis("Ω of a batch, MLP", "samples", tuple(2**n for n in range(9)), (1, 8), batch),
    "length": Axis(
        "Ω of 8 sequences, a small GPT-2", "positions", (8, 16, 32, 64, 128, 256), (4, 8), length
    ),
}


def _run(options: Options) -> Iterator[tuple[str, Result]]:
    for name, axis in AXES.items():
        values = axis.quick if options.quick else axis.values
        budget, points = options.seconds / len(AXES) / len(values), []
        for value in values:
            options.progress(f"{axis.title}: {value:,} {axis.label}")
            calls = axis.prepare(value, options.quick)
            seconds = interleave(calls, min(MOST_ROUNDS, options.rounds), budget=budget)
            points.append(_point(value, seconds))
        yield name, {"title": axis.title, "label": axis.label, "points": points}


def _point(value: int, seconds: dict[str, list[float]]) -> Result:
    return {
        "value": value,
        "rounds": len(seconds[OURS]),
        "seconds": {name: spread(each) for name, each in seconds.items()},
        "time_over_ours": {
            name: spread(ratios(each, seconds[OURS])) for name, each in seconds.items()
        },
    }


BENCHMARK = Benchmark(
    name="scaling",
    title="How time grows",
    about="With the number of parameters, the number of tensors they are in, tasks, the batch and "
    "the length of a sequence. Both axes are logarithmic: time proportional to the axis is a line "
    "of slope one.",
    run=_run,
    seconds=(60, 2),
)
