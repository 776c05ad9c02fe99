"""What storing Ω in fewer bytes changes: in Ω itself, and in what a network remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.benchmark import Benchmark, Options, Result
from benchmarks.models import TRAINING
from mas_ext import estimate_importance
from mas_ext._state.stored_importance import StoredImportance
from mas_ext.demo import Settings
from mas_ext.demo.learning import Batches
from mas_ext.precision import STATE_DTYPES

Omega = Mapping[str, Tensor]

SAMPLES = 32
METHODS = ("mas", "mas_proximal")
QUICK = {"tasks": 2, "epochs": 1}


# -- Ω ---------------------------------------------------------------------------------------------
def learned(**short: int) -> tuple[nn.Module, Batches, Settings]:
    """The demo's network after its first task, and the batches that Ω is measured on."""
    from mas_ext.demo.learning import learn, measured_batches
    from mas_ext.demo.run import tasks_of

    settings = Settings(**short | {"tasks": 1})
    (task,) = tasks_of(settings)
    network = learn("finetune", [task], settings, lambda *_: None).first_network
    assert network is not None
    return network, measured_batches(task, settings), settings


def of_demo(**short: int) -> tuple[nn.Module, Omega]:
    network, batches, _ = learned(**short)
    return network, estimate_importance(network, batches)


def of_model(name: str, **short: int) -> tuple[nn.Module, Omega]:
    model, (inputs, _) = TRAINING[name].model().train(), TRAINING[name].batch(SAMPLES)
    return model, estimate_importance(model, inputs.split(8))


SOURCES: dict[str, tuple[str, Callable[..., tuple[nn.Module, Omega]]]] = {
    "demo": ("the demo's MLP, one task learned", of_demo),
    "resnet18": ("ResNet-18, random weights", partial(of_model, "resnet18")),
    "gpt2": ("GPT-2 of width 256, random weights", partial(of_model, "gpt2")),
}


def quality(model: nn.Module, omega: Omega, state_dtype: str) -> dict[str, float]:
    """How close Ω stored in ``state_dtype`` comes to Ω, over all parameters together.

    ``bytes`` per parameter; ``mass_error`` Σ|Ω̂−Ω|/ΣΩ; ``root_error`` the worst tensor's
    max|√Ω̂−√Ω|/√max Ω; ``lost`` the share of ΣΩ that becomes zero; ``rank_correlation`` Spearman's.
    """
    from scipy.stats import spearmanr

    stored = StoredImportance(dict(model.named_parameters()), state_dtype)
    for name, tensor in omega.items():
        stored.put(name, tensor)
    pairs = [(tensor.double(), stored[name].double()) for name, tensor in omega.items()]
    exact, found = (torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1))
    tensors = [t for name in omega for t in stored.stored(name) if t is not None]
    return {
        "bytes": sum(t.nbytes for t in tensors) / len(exact),
        "mass_error": float((found - exact).abs().sum() / exact.sum()),
        "root_error": max(
            float((b.sqrt() - a.sqrt()).abs().max() / a.max().sqrt()) for a, b in pairs if a.any()
        ),
        "lost": float(exact[found == 0].sum() / exact.sum()),
        "rank_correlation": float(spearmanr(exact, found).statistic),
    }


# -- learning --------------------------------------------------------------------------------------
def of_learning(options: Options) -> Result:
    """The demo's tasks with every state dtype, once per seed."""
    from mas_ext.demo import Settings
    from mas_ext.demo.learning import learn
    from mas_ext.demo.methods import METHODS as LEARNERS
    from mas_ext.demo.metrics import average_accuracy, forgetting
    from mas_ext.demo.run import tasks_of

    short = QUICK if options.quick else {}
    runs: dict[str, dict[str, Any]] = {d: {m: [] for m in METHODS} for d in STATE_DTYPES}
    for seed in options.seeds:
        for state_dtype, found in runs.items():
            options.progress(f"learning with Ω in {state_dtype}, seed {seed}")
            settings = Settings(seed=seed, methods=METHODS, state_dtype=state_dtype, **short)
            for method in METHODS:
                matrix = learn(
                    method, tasks_of(settings), settings, lambda *_: None
                ).accuracy_matrix
                found[method].append(
                    {"average_accuracy": average_accuracy(matrix), "forgetting": forgetting(matrix)}
                )
    labels = {method: LEARNERS[method].label for method in METHODS}
    seeds = list(options.seeds)
    return {"seeds": seeds, "tasks": settings.tasks, "labels": labels, "runs": runs}


def _run(options: Options) -> Iterator[tuple[str, Result]]:
    short = QUICK if options.quick else {}
    for name in ["demo"] if options.quick else SOURCES:
        title, source = SOURCES[name]
        options.progress(f"Ω of {title}")
        model, omega = source(**short)
        parameters = sum(tensor.numel() for tensor in omega.values())
        found = {d: quality(model, omega, d) for d in STATE_DTYPES}
        yield name, {"title": title, "parameters": parameters, "quality": found}
    yield "learning", of_learning(options)


BENCHMARK = Benchmark(
    name="compression",
    title="Ω in fewer bytes: what is lost",
    about="The same exact Ω stored in bfloat16, and in one byte with a scale per 256 values; then "
    "the demo's five tasks learned with each, with several seeds.",
    run=_run,
)
