r"""``python -m benchmarks.drift.coherence``: measures the two constants of automatic λ.

After the first task of every problem, the steps of the second task change ‖F(x_k)‖² of an image.
c_k says how much more often those changes agree in sign than not:

.. math:: c_k = \frac1P\sum_i \frac{\partial_i\|F(x_k)\|^2}{\Omega_i}\,\mathrm{sign}\,\delta_i

where δ is how far the parameters have moved. Shown is the root mean square of c_k over 64 images
after some steps; random signs would give 1/√P. ρ is the first batch's ‖∂L/∂θ‖₁ over ΣΩ/2√E. The
steps are taken without a penalty.
"""

from __future__ import annotations

import math

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.drift.learning import Learner, outputs_of
from benchmarks.drift.problems import PROBLEMS
from benchmarks.text import Table, three_digits
from mas_ext import estimate_importance

IMAGES = 64
AFTER = (1, 10, 60, 300)  # steps; a split task has fewer than the last


def _row(name: str) -> list[str]:
    learner = Learner.after_first_task(PROBLEMS[name], seed=0, count=2)
    model, (first, second) = learner.model, learner.tasks
    images = first.train.images[:: len(first.train) // IMAGES][:IMAGES]

    def energy(output: Tensor) -> Tensor:
        return outputs_of(first, output).square().sum(1)

    params = list(model.parameters())
    rows = [torch.autograd.grad(s, params, retain_graph=True) for s in energy(model(images))]
    omega = estimate_importance(model, first.train.images[::4].split(IMAGES), objective=energy)
    shares = [
        torch.where(o > 0, torch.stack(grads) / o, 0.0)
        for o, *grads in zip(omega.values(), *rows, strict=True)
    ]
    numel, start = sum(p.numel() for p in params), [p.detach().clone() for p in params]
    optimizer, found, rho = learner.problem.optimizer(params), {}, 0.0
    for step, (inputs, labels) in enumerate(learner.batches(second, 1), 1):
        optimizer.zero_grad()
        cross_entropy(outputs_of(second, model(inputs)), labels).backward()
        if step == 1:
            gradient = sum(float(p.grad.abs().sum()) for p in params if p.grad is not None)
            mass = float(sum(o.double().sum() for o in omega.values()))
            rho = gradient * 2 * math.sqrt(omega.energy) / mass
        optimizer.step()
        if step in AFTER:
            signs = [(p.detach() - s).sign() for p, s in zip(params, start, strict=True)]
            parts = zip(shares, signs, strict=True)
            c = sum((share * sign).flatten(1).sum(1) for share, sign in parts) / numel
            found[step] = float(c.square().mean().sqrt())
    steps = (three_digits(found[step]) if step in found else "–" for step in AFTER)
    optimizer_name = type(optimizer).__name__
    random_signs = three_digits(1 / math.sqrt(numel))
    return [learner.problem.title, optimizer_name, *steps, random_signs, three_digits(rho)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    names = [name for name, problem in PROBLEMS.items() if problem.scenario != "incremental"]
    headings = ("", "optimizer", *(f"c after {step}" for step in AFTER), "1/√P", "ρ")
    table = Table("After the first task", headings, [_row(name) for name in names])
    Console(width=140).print(table.rich())
