"""The benchmarks, in the order in which they run and are shown."""

from __future__ import annotations

from benchmarks import (
    accumulate,
    compression,
    demo,
    fisher,
    low_rank,
    narrow,
    optimizer_steps,
    outer,
    penalty,
    per_sample,
    proximal,
    scaling,
    small_tensors,
    training,
)
from benchmarks.benchmark import Benchmark
from benchmarks.drift import every, study
from benchmarks.job import benchmark_of
from benchmarks.retention import study as retention

JOBS = {job.name: job for job in (penalty.JOB, accumulate.JOB, proximal.JOB, *optimizer_steps.JOBS)}
BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        *map(benchmark_of, JOBS.values()),
        scaling.BENCHMARK,
        training.BENCHMARK,
        small_tensors.BENCHMARK,
        per_sample.BENCHMARK,
        fisher.BENCHMARK,
        outer.BENCHMARK,
        low_rank.BENCHMARK,
        demo.BENCHMARK,
        compression.BENCHMARK,
        narrow.BENCHMARK,
        study.BENCHMARK,
        every.BENCHMARK,
        retention.BENCHMARK,
    )
}
