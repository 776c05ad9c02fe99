"""What MAS adds to a training step, and what the end of a task costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import starmap
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.benchmark import Benchmark, Options, Result
from benchmarks.measure import interleave, ratios, spread
from benchmarks.models import TRAINING, Workload
from benchmarks.training import following, task_end
from benchmarks.training.providers import PLAIN, PROVIDERS, PROXIMAL, SELDOM, Step
from benchmarks.training.setting import Setting, make
from benchmarks.training.task_end import AVALANCHE, BATCH, BATCH_SIZE_1, EXACT
from mas_ext import estimate_importance, preset

QUICK = ("mlp",)
TOLERANCE = 1e-3  # float32
EVERY = 3  # batch size 1 is slow, and only takes part in every third round
COMPILED = ("torch.compile, gradient", "torch.compile, in the loss")  # not in a quick run


# -- verification ----------------------------------------------------------------------------------
def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """‖one − other‖ / ‖other‖, over all tensors."""

    def norm(tensors: Sequence[Tensor]) -> float:
        return float(torch.stack([t.detach().double().norm() for t in tensors]).norm())

    return norm([a - b for a, b in zip(one, other, strict=True)]) / norm(other)


def moved(workload: Workload, provider: str) -> tuple[list[Tensor], Setting]:
    """How far one step of plain SGD moves the parameters, which reveals the whole gradient."""
    s = make(workload, "SGD", lr=0.1)
    before = [p.detach().clone() for p in s.state.params]
    PROVIDERS[provider](s)()
    s.mas.protected.follow_steps()
    return [p.detach() - b for p, b in zip(s.state.params, before, strict=True)], s


def expected(workload: Workload) -> tuple[list[Tensor], list[Tensor]]:
    """The same by autograd, with the penalty's gradient and with the proximal step."""
    with_penalty, _ = moved(workload, "loop in the loss")
    plain, s = moved(workload, PLAIN)

    def proximal(p: Tensor, step: Tensor, anchor: Tensor, omega: Tensor) -> Tensor:
        strength = 0.1 * s.lambda_reg * omega
        return (p + strength * anchor) / (1 + strength) - (p - step)

    lists = zip(s.state.params, plain, s.state.anchors, s.state.omega, strict=True)
    with torch.no_grad():
        return with_penalty, list(starmap(proximal, lists))


def check(workload: Workload, providers: Sequence[str]) -> None:
    """Asserts that every provider takes autograd's step, and that MAS changes the step at all."""
    gradient, proximal = expected(workload)
    visible = distance(moved(workload, PLAIN)[0], gradient)
    assert visible > 10 * TOLERANCE, f"{workload.title}: the penalty is too weak to be verified"
    for name in providers:
        if name != PLAIN:
            right = proximal if name in (PROXIMAL, SELDOM) else gradient
            off = distance(moved(workload, name)[0], right)
            assert off <= TOLERANCE, f"{workload.title}, {name}: the step is off by {off:.1%}"


def check_task_end(workload: Workload, samples: int) -> None:
    """Asserts that ours agrees with batch size 1, Avalanche with our preset of it, and that the
    batch-mean finds a part of Ω.
    """
    dataset, size = task_end.data(workload, samples), workload.batch_size
    found = {}
    for name, provider in task_end.PROVIDERS.items():
        s = make(workload)
        step, omega = provider(s, dataset, size)
        before = [o.clone() for o in omega()]
        avalanche = _as_avalanche(s, dataset, size) if name == AVALANCHE else None
        step()
        if avalanche is not None:
            merged = [(b + a) / 2 for b, a in zip(before, avalanche, strict=True)]
            assert distance(omega(), merged) <= TOLERANCE, f"{workload.title}: Avalanche's Ω"
        found[name] = [o - b for o, b in zip(omega(), before, strict=True)]
    off = distance(found[EXACT], found[BATCH_SIZE_1])
    assert off <= TOLERANCE, f"{workload.title}: Ω is not exact"
    share = _mass(found[BATCH]) / _mass(found[EXACT])
    assert 0 < share <= 1 + TOLERANCE, f"{workload.title}: the batch-mean finds {share} of Ω"


def _as_avalanche(s: Setting, dataset: torch.utils.data.Dataset, size: int) -> list[Tensor]:
    loader = torch.utils.data.DataLoader(dataset, size)
    found = estimate_importance(s.model, loader, **preset("avalanche").importance)
    return [found[name] for name in s.names]


def _mass(omega: Sequence[Tensor]) -> float:
    return float(sum(o.double().sum() for o in omega))


# -- timing ----------------------------------------------------------------------------------------
class Seconds(NamedTuple):
    """Of a step: up to the gradients, and what comes after them."""

    backward: float
    finish: float


def sample(step: Step, steps: int) -> Seconds:
    """Times the two parts of a step separately."""
    backward = finish = 0.0
    steps = math.ceil(steps / step.every) * step.every
    for _ in range(steps):
        begin = perf_counter()
        step.backward()
        between = perf_counter()
        step.finish()
        backward += between - begin
        finish += perf_counter() - between
    return Seconds(backward / steps, finish / steps)


def added(step: list[Seconds], plain: list[Seconds], in_the_loss: bool) -> list[float]:
    """The difference within each round, of those parts of the step that MAS changes.

    If MAS is not in the loss, that is what comes after the gradients. The rest is the same code,
    whose noise is larger than the difference.
    """
    if in_the_loss:
        return [sum(a) - sum(b) for a, b in zip(step, plain, strict=True)]
    return [a.finish - b.finish for a, b in zip(step, plain, strict=True)]


def measure(name: str, options: Options, budget: float) -> Result:
    workload = TRAINING[name]
    torch.compiler.reset()
    skipped = dict.fromkeys(COMPILED, "no compilation in a quick run") if options.quick else {}
    names = [provider for provider in PROVIDERS if provider not in skipped]
    options.progress(f"{workload.title}: verifying against autograd, compiling")
    check(workload, names)
    settings = {provider: make(workload) for provider in names}
    steps = {provider: PROVIDERS[provider](s) for provider, s in settings.items()}
    options.progress(f"{workload.title}: timing steps")
    # More rounds than elsewhere, because what is added is small compared with a step.
    seconds = interleave(steps, 3 * options.rounds, budget=0.7 * budget, sample=sample)
    for provider, s in settings.items():
        assert all(p.isfinite().all() for p in s.state.params), f"{provider}: training diverged"
    params = settings[PLAIN].state.params
    options.progress(f"{workload.title}: verifying and timing the end of a task")
    return {
        "title": workload.title,
        "batch_size": workload.batch_size,
        "parameters": sum(p.numel() for p in params),
        "rounds": len(seconds[PLAIN]),
        "providers": {
            provider: _summary(seconds[provider], seconds[PLAIN], step.in_the_loss)
            for provider, step in steps.items()
        },
        "following": following.measure(workload, options.rounds, 0.1 * budget),
        "task_end": measure_task_end(workload, options.rounds, 0.2 * budget),
        "skipped": skipped,
    }


def _summary(mine: list[Seconds], plain: list[Seconds], in_the_loss: bool) -> dict[str, Any]:
    more = added(mine, plain, in_the_loss)
    return {
        "seconds": spread([sum(s) for s in mine]),
        "added_seconds": spread(more),
        "added_share": spread(ratios(more, [sum(s) for s in plain])),
    }


def measure_task_end(workload: Workload, rounds: int, budget: float) -> Result:
    check_task_end(workload, samples=min(workload.task, 2 * workload.batch_size))
    dataset = task_end.data(workload, workload.task)
    calls = {
        name: provider(make(workload), dataset, workload.batch_size)[0]
        for name, provider in task_end.PROVIDERS.items()
    }
    seconds = interleave(calls, rounds, {BATCH_SIZE_1: EVERY}, budget)
    return {
        "samples": workload.task,
        "rounds": len(seconds[EXACT]),
        "providers": {
            name: {
                "seconds": spread(each),
                "time_over_ours": spread(
                    ratios(each, seconds[EXACT][:: EVERY if name == BATCH_SIZE_1 else 1])
                ),
            }
            for name, each in seconds.items()
        },
    }


def _run(options: Options) -> Iterator[tuple[str, Result]]:
    names = QUICK if options.quick else tuple(TRAINING)
    for name in names:
        yield name, measure(name, options, options.seconds / len(names))


BENCHMARK = Benchmark(
    name="training",
    title="Training: a step, and the end of a task",
    about="A training step (forward, backward, optimizer) with MAS and without; then the end of a "
    "task: importance, merging, new anchors. Avalanche and “batch” take the absolute value of the "
    "mean gradient of a batch, which loses what cancels within the batch.",
    run=_run,
    seconds=(80, 3),
)
