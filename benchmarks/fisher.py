"""What the square of a batch's mean gradient leaves of the Fisher information's diagonal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.benchmark import Benchmark, Options, Result
from benchmarks.compression import learned
from benchmarks.models import WORKLOADS, Batch
from benchmarks.per_sample.providers import FISHER, chunks, in_chunks, size
from mas_ext import estimate_importance, preset
from mas_ext.demo.comparison import agreement

BATCHES = 4
DRAWS = 4  # of labels, where classes are too many to go through
EXACT, DRAWN = {"criterion": "exact_fisher"}, {"criterion": "fisher", "draws": DRAWS}
TOLERANCE = 1e-3  # float32

Source = Callable[..., tuple[nn.Module, Batch, int]]  # → model, samples, batch size


def of_demo(**short: int) -> tuple[nn.Module, Batch, int]:
    """The demo's network after its first task, and digits of that task."""
    network, batches, settings = learned(**short)
    images, labels = map(torch.cat, zip(*batches, strict=True))
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = chosen[: BATCHES * settings.batch_size]
    return network, (images[chosen], labels[chosen]), settings.batch_size


def of_workload(name: str, **short: int) -> tuple[nn.Module, Batch, int]:
    workload = WORKLOADS[name]
    return workload.model(), workload.batch(BATCHES * workload.batch_size), workload.batch_size


SOURCES: dict[str, tuple[str, Source, dict[str, Any]]] = {
    "demo": ("the demo's MLP, one task learned", of_demo, EXACT),
    **{
        name: (
            f"{WORKLOADS[name].title}, random weights and labels",
            partial(of_workload, name),
            of,
        )
        for name, of in (("mlp", EXACT), ("cnn", EXACT), ("gpt2", DRAWN))
    },
}


def flat(omega: Mapping[str, Tensor]) -> np.ndarray:
    return torch.cat([values.flatten() for values in omega.values()]).double().numpy()


def compare(source: Source, of_model: dict[str, Any], **short: int) -> Result:
    """The batches' squares, the preset and the model's own Fisher, with the empirical Fisher."""
    model, samples, length = source(**short)
    batches = list(chunks(samples, length))

    def ours(**options: Any) -> np.ndarray:
        return flat(estimate_importance(model, batches, **options))

    empirical, theirs = ours(**FISHER.options), ours(**preset("avalanche_ewc").importance)
    batch = flat(in_chunks(model, batches, FISHER, length=length)())
    off = float(np.abs(theirs - batch).sum() / batch.sum())
    assert off <= TOLERANCE, f"preset('avalanche_ewc') differs from the loop by {off:.1%}"
    counted = empirical > 0
    return {
        "samples": size(samples),
        "batch_size": length,
        "parameters": len(counted),
        "batch": agreement(empirical[counted], batch[counted]),
        "preset": agreement(empirical[counted], theirs[counted]),
        "preset_error": off,
        "of_model": {**of_model, **agreement(empirical[counted], ours(**of_model)[counted])},
    }


def _run(options: Options) -> Iterator[tuple[str, Result]]:
    short = {"epochs": 1} if options.quick else {}
    for name in ["demo"] if options.quick else SOURCES:
        title, source, of_model = SOURCES[name]
        options.progress(title)
        yield name, {"title": title, **compare(source, of_model, **short)}


BENCHMARK = Benchmark(
    name="fisher",
    title="What a batch's mean gradient leaves of the Fisher information",
    about="The diagonal of the empirical Fisher information, compared with the square of each "
    "batch's mean gradient, which Avalanche's EWCPlugin takes, and with the Fisher information of "
    "the model's own labels.",
    run=_run,
)
