"""What is learned in the study: a scenario, a network, an optimizer, and how MAS is applied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from benchmarks.drift.networks import Louder, Transformer, cnn, mlp

# A decade in two steps, over three: the best λ of any two problems may be that far apart.
PROXIMAL = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
GRADIENT = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
DRIFTS = (0.02, 0.06, 0.2, 0.6, 2.0)


_ADAM = partial(Adam, lr=1e-3, fused=True)
_ADAMW = partial(AdamW, lr=1e-3, weight_decay=0.01, fused=True)
_SGD = partial(SGD, lr=0.05, momentum=0.9)


@dataclass(frozen=True)
class Problem:
    """One sequence of tasks, and one way to learn it.

    Attributes:
        scenario: ``"permuted"``, ``"rotated"``, ``"split"`` (each task has two classes and reads
            their outputs) or ``"incremental"`` (the same, and it is tested among all classes
            learned so far).
        network: makes it.
        optimizer: makes one a task, from parameters.
        mode: of :meth:`mas_ext.MAS.attach`.
        lambdas: the grid of fixed λ.
        temperature: what the output is divided by before the loss.
        epochs, images, batch_size: of training, for each task.
    """

    title: str
    scenario: str
    network: Callable[[], nn.Module]
    optimizer: partial[Optimizer] = _ADAM
    mode: str = "proximal"
    lambdas: tuple[float, ...] = PROXIMAL
    temperature: float = 1.0
    epochs: int = 6
    images: int = 4000
    batch_size: int = 64

    @property
    def optimizer_name(self) -> str:
        return self.optimizer.func.__name__


_mlp = partial(mlp, 256, 256)

PROBLEMS = {
    "permuted": Problem("permuted, MLP 256-256", "permuted", _mlp),
    "permuted_small": Problem("permuted, MLP 64", "permuted", partial(mlp, 64)),
    "permuted_deep": Problem("permuted, MLP 6 × 128", "permuted", partial(mlp, *[128] * 6), _ADAMW),
    "permuted_gradient": Problem(
        "permuted, MLP 256-256", "permuted", _mlp, mode="gradient", lambdas=GRADIENT
    ),
    "permuted_sgd": Problem("permuted, MLP 256-256", "permuted", _mlp, _SGD, "gradient", GRADIENT),
    "rotated": Problem("rotated, MLP 256-256", "rotated", _mlp, epochs=8),
    "rotated_wide": Problem(
        "rotated, MLP 1024", "rotated", partial(mlp, 1024), epochs=8, images=2000
    ),
    "rotated_sgd": Problem(
        "rotated, MLP 256-256", "rotated", _mlp, _SGD, "proximal", GRADIENT, epochs=8
    ),
    "rotated_cnn": Problem("rotated, CNN", "rotated", cnn, images=2000, epochs=8),
    "rotated_transformer": Problem(
        "rotated, transformer", "rotated", Transformer, _ADAMW, images=2000, epochs=8
    ),
    "split": Problem("split, MLP 256-256", "split", _mlp),
    "split_cnn": Problem("split, CNN", "split", cnn, _ADAMW, mode="gradient", lambdas=GRADIENT),
    "split_transformer": Problem("split, transformer", "split", Transformer, epochs=10),
    "incremental": Problem("class-incremental, MLP 256-256", "incremental", _mlp),
}


QUICK = ("permuted_small", "split")


def _louder_network(network: Callable[[], nn.Module]) -> nn.Module:
    return Louder(network(), 10.0)


def _louder(problem: Problem) -> Problem:
    return replace(problem, network=partial(_louder_network, problem.network))


def _in_other_units(problem: Problem) -> Problem:
    """The loss sees what it saw before, so all is learned alike; Ω is a hundred times as large."""
    lambdas = tuple(value / 100 for value in problem.lambdas)
    return replace(_louder(problem), temperature=10.0, lambdas=lambdas)


# What should not change how well λ is chosen, on the one scenario and the other.
CHANGES: dict[str, tuple[str, Callable[[Problem], Problem]]] = {
    "base": ("as it is", lambda p: p),
    "units": ("output × 10, loss as before", _in_other_units),
    "louder": ("output × 10", _louder),
    "narrow": ("half the width", lambda p: replace(p, network=partial(mlp, 128, 128))),
    "small_batch": ("batches of 16", lambda p: replace(p, batch_size=16)),
    "large_batch": ("batches of 256", lambda p: replace(p, batch_size=256)),
}
CHANGED = ("permuted", "rotated")


def changed(name: str, change: str) -> Problem:
    """A problem after a change, with what of the grid is about the best λ before it."""
    problem = CHANGES[change][1](PROBLEMS[name])
    return problem if change == "base" else replace(problem, lambdas=problem.lambdas[1:5])
