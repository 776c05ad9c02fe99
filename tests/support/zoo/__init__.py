"""Layers and models with data, on which exact importance has to be exact.

To add one, add a row to ``LAYERS`` (``layers.py``) or ``MODELS`` (``models.py``): a name, and a
function that returns ``(model, batch)``, or ``(model, batch, forward)`` where the model needs a
``forward=`` of its own. ``paths.py`` says which path computes each of its parameters.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from tests.support.zoo.layers import LAYERS
from tests.support.zoo.models import LARGE_MODELS, MODELS

__all__ = ["LARGE_MODELS", "LAYERS", "MODELS", "Specimen", "build"]


class Specimen(NamedTuple):
    model: nn.Module
    batch: Any
    forward: Callable[[nn.Module, Any], Any] | None = None


def build(name: str) -> Specimen:
    """The model of that name in float64 and evaluation mode; the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(name.encode()))
        specimen = Specimen(*{**LAYERS, **MODELS, **LARGE_MODELS}[name]())
        randomize_constants(specimen.model.double().eval())
    return specimen


@torch.no_grad()
def randomize_constants(model: nn.Module) -> None:
    """A parameter that starts as zeros (LoRA's B) would hide the gradient of what follows it."""
    for p in model.parameters():
        if p.numel() > 0 and bool((p == p.flatten()[0]).all()):
            p.add_(torch.randn_like(p), alpha=0.3)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
