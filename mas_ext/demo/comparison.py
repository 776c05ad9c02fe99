"""Compares the exact Ω with that of batch-mean gradients, on the network after the first task."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mas_ext
from mas_ext.demo.learning import Tick, forward_of, steps
from mas_ext.demo.scenarios import Task
from mas_ext.demo.settings import Settings

MOST_SAMPLES = 512
BATCH_SIZES = tuple(2**n for n in range(9))  # 1 to 256
TOP = 0.1

LABELS = {
    "mass": "Share of Ω that is left",
    "rank_correlation": "Rank correlation with the exact Ω",
    "top_overlap": f"Overlap of the top {100 * TOP:.0f} %",
}
DEFINITIONS = {
    "mass": "Σ Ω_batch / Σ Ω_exact: 1 at batch size 1, less where gradients cancel.",
    "rank_correlation": "Spearman’s, over the parameters whose exact Ω is above 0; equal values "
    "share the mean of their ranks.",
    "top_overlap": f"Of the {100 * TOP:.0f} % of these parameters with the largest exact Ω, the "
    f"part that is also among the {100 * TOP:.0f} % with the largest Ω_batch.",
}


def work(task: Task, settings: Settings) -> int:
    """The total number of images that :func:`compare` measures, counting every repetition."""
    samples = _sample_count(task, settings)
    return samples * (1 + len(_sizes(samples)))


def compare(network: nn.Module, task: Task, settings: Settings, tick: Tick) -> dict[str, Any]:
    """Measures Ω of the same images exactly, and from batches of every size.

    Returns:
        The content of ``results.json`` under ``"estimators"``: the number of samples, the number
        of parameters whose exact Ω is above 0, and for each batch size the quantities that
        :data:`DEFINITIONS` defines.
    """
    images = _samples(task, settings)

    def measure(estimator: str, batch_size: int) -> np.ndarray:
        omega = mas_ext.estimate_importance(
            network,
            images.split(batch_size),
            estimator=estimator,
            forward=forward_of(task),
            progress=steps(tick, "comparing"),
        )
        return torch.cat([values.flatten() for values in omega.values()]).double().numpy()

    exact = measure("per_sample", settings.batch_size)
    # All estimates agree on Ω = 0, as for the weights of a pixel that is always black.
    counted = exact > 0
    sizes = _sizes(len(images))
    return {
        "task": task.name,
        "samples": len(images),
        "parameters": int(counted.sum()),
        "top_fraction": TOP,
        "batch": [
            {"batch_size": size, **agreement(exact[counted], measure("batch", size)[counted])}
            for size in sizes
        ],
    }


def agreement(exact: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """How similar an estimate is to the exact Ω; see :data:`DEFINITIONS`."""
    top = max(1, round(TOP * len(exact)))
    common = np.intersect1d(np.argsort(exact)[-top:], np.argsort(other)[-top:])
    return {
        "mass": float(other.sum() / exact.sum()),
        "rank_correlation": float(np.corrcoef(ranks(exact), ranks(other))[0, 1]),
        "top_overlap": len(common) / top,
    }


def ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value in ascending order; equal values share the mean of their ranks."""
    _, position, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[position]


def _samples(task: Task, settings: Settings) -> Tensor:
    # In random order: the bundled digits are sorted, and batches of one class would not be typical.
    random = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(task.train), generator=random)
    return task.train.images[order[: _sample_count(task, settings)]]


def _sample_count(task: Task, settings: Settings) -> int:
    return min(MOST_SAMPLES, len(task.train), settings.importance_samples or MOST_SAMPLES)


def _sizes(samples: int) -> list[int]:
    return [size for size in BATCH_SIZES if size <= samples]
