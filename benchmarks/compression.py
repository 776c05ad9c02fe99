"""What keeping Ω in fewer bytes does to Ω, and to what a network remembers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.entry import Entry, Options, Result, Results
from benchmarks.show.table import Table
from benchmarks.show.text import count, percent
from benchmarks.tools.seeds import deviation
from benchmarks.training.models import MODELS
from mas_ext import estimate_importance
from mas_ext.precision import STATE_DTYPES, KeptImportance

Omega = Mapping[str, Tensor]

SAMPLES = 32
NARROW = tuple(name for name in STATE_DTYPES if name != "float32")
METHODS = ("mas", "mas_proximal")
FIGURES = ("average_accuracy", "forgetting")


# -- what it does to Ω -----------------------------------------------------------------------------
def of_demo() -> tuple[nn.Module, Omega]:
    """The demo's network after its first task, and its Ω."""
    from mas_ext.demo import Settings
    from mas_ext.demo.learning import learn, measured_batches
    from mas_ext.demo.run import tasks_of

    (task,) = tasks_of(settings := Settings(tasks=1))
    network = learn("finetune", [task], settings, _silently).first_network
    assert network is not None
    return network, estimate_importance(network, measured_batches(task, settings))


def _silently(doing: str, step: int) -> None:
    """A run in a run: its own progress is not shown."""


def of_model(name: str) -> Callable[[], tuple[nn.Module, Omega]]:
    def measured() -> tuple[nn.Module, Omega]:
        model, (inputs, _) = MODELS[name].model(), MODELS[name].batch(SAMPLES)
        return model, estimate_importance(model, inputs.split(8))

    return measured


SOURCES = {
    "demo": ("the demo's MLP, one task learned", of_demo),
    "resnet18": ("ResNet-18, random weights", of_model("resnet18")),
    "gpt2": ("GPT-2 of width 256, random weights", of_model("gpt2")),
}


def kept(model: nn.Module, omega: Omega, state_dtype: str) -> KeptImportance:
    result = KeptImportance(dict(model.named_parameters()), state_dtype)
    for name, tensor in omega.items():
        result.put(name, tensor)
    return result


def quality(omega: Omega, narrow: KeptImportance) -> dict[str, float]:
    """Of all parameters together, as the penalty adds them up.

    ``mass_error`` Σ|Ω̂−Ω|/ΣΩ; ``root_error`` max |√Ω̂−√Ω|/√max Ω over a tensor's own largest, the
    worst tensor's; ``lost`` the share of ΣΩ that became zero; ``rank_correlation`` Spearman's;
    ``bytes`` a parameter.
    """
    from scipy.stats import spearmanr

    pairs = {name: (tensor.double(), narrow[name].double()) for name, tensor in omega.items()}
    exact, found = (torch.cat([p[i].flatten() for p in pairs.values()]) for i in (0, 1))
    held = [t for name in omega for t in narrow.kept(name) if t is not None]
    return {
        "bytes": sum(t.nbytes for t in held) / len(exact),
        "mass_error": float((found - exact).abs().sum() / exact.sum()),
        "root_error": max(
            float((b.sqrt() - a.sqrt()).abs().max() / a.max().sqrt())
            for a, b in pairs.values()
            if a.any()
        ),
        "lost": float(exact[found == 0].sum() / exact.sum()),
        "rank_correlation": float(spearmanr(exact, found).statistic),
    }


def of_importance(options: Options) -> Iterator[tuple[str, Result]]:
    for name in ["demo"] if options.quick else SOURCES:
        title, source = SOURCES[name]
        options.tell(f"Ω of {title}")
        model, omega = source()
        yield (
            name,
            {
                "title": title,
                "parameters": sum(tensor.numel() for tensor in omega.values()),
                "quality": {d: quality(omega, kept(model, omega, d)) for d in STATE_DTYPES},
            },
        )


# -- what it does to a network ---------------------------------------------------------------------
def of_learning(options: Options) -> Iterator[tuple[str, Result]]:
    """The demo's tasks with each kind of state, once a seed; a quick run: two short tasks."""
    from mas_ext.demo import Settings
    from mas_ext.demo.learning import learn
    from mas_ext.demo.metrics import average_accuracy, forgetting
    from mas_ext.demo.run import tasks_of

    short = {"tasks": 2, "epochs": 1} if options.quick else {}
    runs: dict[str, dict[str, Any]] = {d: {m: [] for m in METHODS} for d in STATE_DTYPES}
    for seed in options.seeds:
        for state_dtype, found in runs.items():
            options.tell(f"learning with Ω in {state_dtype}, seed {seed}")
            settings = Settings(seed=seed, methods=METHODS, state_dtype=state_dtype, **short)
            for method in METHODS:
                matrix = learn(method, tasks_of(settings), settings, _silently).accuracy_matrix
                values = average_accuracy(matrix), forgetting(matrix)
                found[method].append(dict(zip(FIGURES, values, strict=True)))
    yield "learning", {"seeds": list(options.seeds), "tasks": settings.tasks, "runs": runs}


def _run(options: Options) -> Iterator[tuple[str, Result]]:
    yield from of_importance(options)
    yield from of_learning(options)


# -- tables ----------------------------------------------------------------------------------------
def _importance_row(title: str, state_dtype: str, found: dict[str, float]) -> list[str]:
    return [
        title,
        state_dtype,
        f"{found['bytes']:.3f}",
        percent(found["mass_error"], 3),
        percent(found["root_error"], 3),
        percent(found["lost"], 4),
        f"{found['rank_correlation']:.6f}",
    ]


def _importance_table(results: Results) -> Table:
    return Table(
        "What is left of Ω: bytes a parameter, Σ|error|/ΣΩ, the largest error of √Ω over a "
        "tensor's largest √Ω, the part of ΣΩ that becomes zero, Spearman's rank correlation",
        ("Ω of", "kept in", "bytes", "error", "error of √Ω", "lost", "rank correlation"),
        [
            _importance_row(f"{r['title']} ({count(r['parameters'])})", d, r["quality"][d])
            for r in results.values()
            for d in NARROW
        ],
        frozenset(),
    )


def _cell(found: list[dict[str, float]], figure: str) -> str:
    values = [run[figure] for run in found]
    return f"{statistics.mean(values):.4f} ± {deviation(values):.4f}"


def _learning_table(result: Result) -> Table:
    from mas_ext.demo.learning import METHODS as LEARNERS

    rows = [
        [LEARNERS[method].label, state_dtype, *(_cell(found[method], f) for f in FIGURES)]
        for method in METHODS
        for state_dtype, found in result["runs"].items()
    ]
    return Table(
        f"What is left of {result['tasks']} tasks of permuted digits: mean ± standard deviation "
        f"over seeds {', '.join(map(str, result['seeds']))}",
        ("", "Ω kept in", *(figure.replace("_", " ") for figure in FIGURES)),
        rows,
        frozenset(),
    )


def _overview(results: Results) -> list[Table]:
    importance = {name: r for name, r in results.items() if name != "learning"}
    tables = [_importance_table(importance)] if importance else []
    return tables + ([_learning_table(results["learning"])] if "learning" in results else [])


def _detail(result: Result) -> list[Table]:
    return _overview({"learning" if "runs" in result else "one": result})


ENTRY = Entry(
    name="compression",
    title="Ω in fewer bytes: what is lost",
    about="The same exact Ω kept in bfloat16, and in one byte with a scale for 256; then the "
    "demo's five tasks learned with each, several seeds.",
    run=_run,
    detail=_detail,
    overview=_overview,
    seconds=(0, 0),  # of seeds, not of rounds
)
