"""The penalty's operators on a model's parameters: one call a device, errors with names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from mas_ext import functional

Scalar = float | Tensor


class Held(NamedTuple):
    """A parameter and what is remembered of it."""

    name: str
    param: Parameter
    anchor: Tensor
    omega: Tensor


class Bundle(NamedTuple):
    """The parameters of one device, with what belongs to them."""

    names: list[str]
    params: list[Parameter]
    anchors: list[Tensor]
    omega: list[Tensor]


def bundled(held: Iterable[Held]) -> list[Bundle]:
    """A bundle a device; a model may span several."""
    bundles: dict[torch.device, Bundle] = {}
    for name, p, anchor, omega in held:
        bundle = bundles.get(p.device)
        if bundle is None:
            bundle = bundles[p.device] = Bundle([], [], [], [])
        bundle.names.append(name)
        bundle.params.append(p)
        bundle.anchors.append(anchor)
        bundle.omega.append(omega)
    return list(bundles.values())


def penalty(bundle: Bundle, lambda_reg: float) -> Tensor:
    """See :meth:`MAS.penalty`."""
    return functional.penalty(bundle.params, bundle.anchors, bundle.omega, lambda_reg)


def add_penalty_grad_(bundle: Bundle, lambda_reg: float, grad_scale: Scalar | None) -> Tensor:
    """See :meth:`MAS.add_penalty_grad_`; a gradient that is None becomes one when all went well."""
    names, params, anchors, omega = bundle
    with torch.inference_mode(False):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    with naming(names):
        value = functional.add_penalty_grad_(
            grads, params, anchors, omega, lambda_reg, near(grad_scale, params[0])
        )
    for p, grad in zip(params, grads, strict=True):
        if p.grad is None:
            p.grad = grad
    return value


def proximal_step_(bundle: Bundle, lambda_reg: float, lr: Scalar) -> Tensor:
    """See :meth:`MAS.proximal_step_`."""
    names, params, anchors, omega = bundle
    with naming(names):
        return functional.proximal_step_(params, anchors, omega, lambda_reg, near(lr, params[0]))


def near(scalar: Any, tensor: Tensor) -> Any:
    """A scalar of another device, where a model spans several, on the tensor's."""
    elsewhere = isinstance(scalar, Tensor) and scalar.device.type != "cpu"
    return scalar.to(tensor.device, non_blocking=True) if elsewhere else scalar


@contextmanager
def naming(names: list[str]) -> Iterator[None]:
    """Gives an operator's error the parameter's name beside its place in the list."""
    try:
        yield
    except RuntimeError as error:
        text = re.sub(r"\[(\d+)\] (has|is)", _place_named(names), str(error))
        if text == str(error):
            raise
        raise RuntimeError(text) from None


def _place_named(names: list[str]) -> Callable[[re.Match[str]], str]:
    return lambda found: f"[{found[1]}] ({names[int(found[1])]!r}) {found[2]}"
