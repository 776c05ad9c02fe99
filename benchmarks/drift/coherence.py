r"""``python -m benchmarks.drift.coherence``: the two constants of automatic λ, measured.

For every problem, after its first task: c, how much more often the changes that the next task's
steps make to an image's ‖F‖² agree in sign than not,

.. math:: c_k = \frac1P\sum_i \frac{\partial_i\|F(x_k)\|^2}{\Omega_i}\,\mathrm{sign}\,\delta_i

of which the root mean square over 64 images is shown, δ being how far parameters have moved after
so many steps; 1/√P is what random signs would give. And ρ at the start: the first batch's
‖∂L/∂θ‖₁ over ΣΩ/2√E. Nothing is held in place, and nothing is written.
"""

from __future__ import annotations

import math

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.drift.learning import Learner, read
from benchmarks.drift.problems import PROBLEMS
from benchmarks.show.table import Table
from benchmarks.show.text import three
from mas_ext import estimate_importance

IMAGES = 64
AFTER = (1, 10, 60, 300)  # steps; a split task has fewer than the last


def changes(learner: Learner) -> tuple[list[Tensor], float, float]:
    """∂‖F‖²/∂θ over Ω, [images, …] a parameter; ΣΩ and E. Of the first task."""
    task, model = learner.tasks[0], learner.model
    images = task.train.images[:: len(task.train) // IMAGES][:IMAGES]

    def energy(output: Tensor) -> Tensor:
        return read(output, task).square().sum(1)

    params = list(model.parameters())
    rows = [torch.autograd.grad(s, params, retain_graph=True) for s in energy(model(images))]
    omega = estimate_importance(model, task.train.images[::4].split(IMAGES), objective=energy)
    shares = [
        torch.where(o > 0, torch.stack(each) / o, 0.0)
        for o, *each in zip(omega.values(), *rows, strict=True)
    ]
    return shares, float(sum(o.double().sum() for o in omega.values())), omega.energy


def agreement(shares: list[Tensor], moved: list[Tensor]) -> float:
    """The root mean square of c over images."""
    numel = sum(m.numel() for m in moved)
    c = sum((s * m.sign()).flatten(1).sum(1) for s, m in zip(shares, moved, strict=True)) / numel
    return float(c.square().mean().sqrt())


def row(name: str) -> list[str]:
    """Of one problem, seed 0."""
    learner = Learner.started(PROBLEMS[name], seed=0, count=2)
    shares, total, energy = changes(learner)
    params, task = list(learner.model.parameters()), learner.tasks[1]
    start = [p.detach().clone() for p in params]
    optimizer = learner.problem.optimizer(params)
    found, first = {}, 0.0
    for step, (images, labels) in enumerate(learner.batches(task, 1), 1):
        optimizer.zero_grad()
        cross_entropy(read(learner.model(images), task), labels).backward()
        first = first or sum(float(p.grad.abs().sum()) for p in params if p.grad is not None)
        optimizer.step()
        if step in AFTER:
            moved = [p.detach() - s for p, s in zip(params, start, strict=True)]
            found[step] = agreement(shares, moved)
    numel = sum(p.numel() for p in params)
    return [
        learner.problem.title,
        learner.problem.optimizer_name,
        *(three(found[step]) if step in found else "–" for step in AFTER),
        three(1 / math.sqrt(numel)),
        three(first * 2 * math.sqrt(energy) / total),
    ]


def table() -> Table:
    names = [n for n, problem in PROBLEMS.items() if problem.scenario != "incremental"]
    return Table(
        "After the first task",
        ("", "optimizer", *(f"c after {step}" for step in AFTER), "1/√P", "ρ"),
        [row(name) for name in names],
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    Console(width=140).print(table().rich())
