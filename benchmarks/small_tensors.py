"""What MAS adds to an optimizer's step with very many small parameters: mostly calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

import mas_ext
from benchmarks import penalty
from benchmarks.benchmark import Benchmark, Options, Result, Results
from benchmarks.measure import interleave, spread
from benchmarks.state import State
from benchmarks.text import Table, minus
from mas_ext import MAS
from mas_ext._penalty.attachment import EVERY

COUNT, WIDTH = 1000, 8
OPTIMIZERS = {"SGD with momentum": ("SGD", {"momentum": 0.9}), "AdamW": ("AdamW", {})}
PLAIN = "torch's fused step"
SELDOM = f"mas_ext, attach proximal, every={EVERY}"
Step = Callable[[], object]


def _model(count: int) -> tuple[nn.Module, MAS]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count)))
    mas = MAS(model)
    mas.consolidate([torch.randn(1, WIDTH)], estimator="batch")
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn_like(p)
    return model, mas


def _steps(name: str, count: int) -> dict[str, Step]:
    kind, options = OPTIMIZERS[name]
    options = {"lr": 1e-5, **options}
    steps: dict[str, Step] = {}

    def plain() -> tuple[torch.optim.Optimizer, MAS, nn.Module]:
        model, mas = _model(count)
        optimizer = getattr(torch.optim, kind)(model.parameters(), fused=True, **options)
        return optimizer, mas, model

    def by_hand(add: Callable[[State], object]) -> Step:
        optimizer, mas, model = plain()
        params = list(model.parameters())
        state = State(params, list(mas.anchor.values()), list(mas.importance.values()))
        return lambda: (add(state), optimizer.step())

    def attached(mode: str, every: int) -> Step:
        optimizer, mas, _ = plain()
        mas.attach(optimizer, mode, every)
        return optimizer.step

    steps[PLAIN] = plain()[0].step
    for mode in ("gradient", "proximal"):
        model, mas = _model(count)
        ours = getattr(mas_ext.optim, kind)
        steps[f"mas_ext, optimizer, {mode}"] = ours(
            model.parameters(), mas=mas, mode=mode, **options
        ).step
        steps[f"mas_ext, attach {mode}"] = attached(mode, 1)
    steps[SELDOM] = attached("proximal", EVERY)
    steps["torch._foreach, gradient"] = by_hand(penalty.foreach)
    steps["eager, gradient in place"] = by_hand(penalty.eager_no_grad)
    return steps


def _repeat(step: Step) -> None:
    """As many steps as one proximal step follows, so that each sample has one."""
    for _ in range(EVERY):
        step()


def run(options: Options) -> Iterator[tuple[str, Result]]:
    """Yields the result of each optimizer."""
    count = COUNT // 10 if options.quick else COUNT
    for name in OPTIMIZERS:
        options.progress(name)
        calls = {way: partial(_repeat, step) for way, step in _steps(name, count).items()}
        found = interleave(calls, options.rounds, budget=options.seconds / 2)
        seconds = {way: [each / EVERY for each in samples] for way, samples in found.items()}
        plain = seconds.pop(PLAIN)
        yield (
            name,
            {
                "tensors": count,
                "elements": WIDTH**2,
                "step": spread([each / count for each in plain]),
                "added": {
                    way: spread([(a - b) / count for a, b in zip(each, plain, strict=True)])
                    for way, each in seconds.items()
                },
            },
        )


def tables(optimizers: Results) -> list[Table]:
    """A column per optimizer: microseconds per tensor."""
    found = list(optimizers.values())
    rows = [
        [way, *(minus(f"{1e6 * each['added'][way]['median']:.2f}") for each in found)]
        for way in found[0]["added"]
    ]
    plain = [PLAIN, *(f"takes {1e6 * each['step']['median']:.2f}" for each in found)]
    return [
        Table(
            f"{found[0]['tensors']:,} parameters with {found[0]['elements']} elements each: what "
            "is added to the optimizer's step, microseconds per parameter.",
            ("", *optimizers),
            [plain, *rows],
            frozenset(way for way in found[0]["added"] if way.startswith("mas_ext")),
        )
    ]


BENCHMARK = Benchmark(
    name="small_tensors",
    title="Many small parameters",
    about=f"What MAS adds to an optimizer's step with {COUNT:,} parameters of {WIDTH**2} elements.",
    run=run,
    seconds=(30, 2),
)
