"""How strong the penalty should be: one drift, or one λ, for many problems."""

from benchmarks.benchmark import Benchmark
from benchmarks.drift.study import run

BENCHMARK = Benchmark(
    name="drift",
    title="How strong: λ, or how far the output may drift",
    about="Sequences of tasks on real digits with every λ of a grid and every drift of another: "
    "several scenarios, networks, optimizers and seeds.",
    run=run,
    on_request=True,
)
