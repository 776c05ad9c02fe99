"""Implementations of the end of a task: Ω of the task's samples, merged, and new anchors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.models import Workload
from benchmarks.training.providers import avalanche_plugin
from benchmarks.training.setting import Setting

EXACT, BATCH = "mas_ext, exact", "mas_ext, batch"
BATCH_SIZE_1, AVALANCHE = "batch size 1", "Avalanche"
Omega = Callable[[], list[Tensor]]  # the merged Ω as it is now
End = Callable[[], None]
TaskEnd = Callable[[Setting, TensorDataset, int], tuple[End, Omega]]


def data(workload: Workload, samples: int) -> TensorDataset:
    """Inputs, labels and task labels, as Avalanche has them."""
    inputs, targets = workload.batch(samples)
    return TensorDataset(inputs, targets, torch.zeros(samples, dtype=torch.long))


def ours(
    s: Setting, dataset: TensorDataset, batch_size: int, estimator: str = "per_sample"
) -> tuple[End, Omega]:
    loader = DataLoader(dataset, batch_size)

    def step() -> None:
        s.mas.consolidate(loader, estimator=estimator)

    return step, lambda: [s.mas.importance[name] for name in s.names]


def batch_size_1(s: Setting, dataset: TensorDataset, batch_size: int) -> tuple[End, Omega]:
    """Also exact: a forward and a backward pass per sample, by hand."""
    state, share = s.state, 1 / len(dataset)
    loader = DataLoader(dataset, 1)

    def step() -> None:
        s.model.eval()
        measured = [torch.zeros_like(p) for p in state.params]
        for inputs, *_ in loader:
            grads = torch.autograd.grad(s.model(inputs).square().sum(), state.params)
            for omega, grad in zip(measured, grads, strict=True):
                omega.add_(grad.abs(), alpha=share)
        torch._foreach_add_(state.omega, measured)
        state.anchors = [p.detach().clone() for p in state.params]

    return step, lambda: state.omega


def avalanche(s: Setting, dataset: TensorDataset, batch_size: int) -> tuple[End, Omega]:
    """Its plugin's hook, which takes the absolute value of each batch's gradient."""
    plugin = avalanche_plugin(s)
    strategy = SimpleNamespace(
        model=s.model,
        optimizer=s.optimizer,
        device=torch.device("cpu"),
        train_mb_size=batch_size,
        clock=SimpleNamespace(train_exp_counter=1),
        experience=SimpleNamespace(dataset=dataset),
    )

    def step() -> None:
        plugin.after_training_exp(strategy)

    return step, lambda: [plugin.importance[name].data for name in s.names]


PROVIDERS: dict[str, TaskEnd] = {
    EXACT: ours,
    BATCH: partial(ours, estimator="batch"),
    AVALANCHE: avalanche,
    BATCH_SIZE_1: batch_size_1,
}
