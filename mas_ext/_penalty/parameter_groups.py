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
from mas_ext._distributed.shards import Home, differentiable_part, home_key, locals_of, placed_like

Scalar = float | Tensor


class Held(NamedTuple):
    """A parameter, what is remembered of it, and how strongly it is held.

    Attributes:
        name: its canonical name.
        param: θ, as the model has it.
        anchor: θ*; of a DTensor, of its local part.
        omega: Ω as it is kept (:mod:`mas_ext.precision`); of a DTensor, of its local part.
        scales: of Ω, where it is kept in codes.
        glob: what decides on its λ; parameters that share it share a call.
        lambda_reg: λ, a 0-dim tensor.
    """

    name: str
    param: Parameter
    anchor: Tensor
    omega: Tensor
    scales: Tensor | None
    glob: str
    lambda_reg: Tensor


class Bundle(NamedTuple):
    """Parameters that one call of an operator serves, with what belongs to them.

    Attributes:
        home: the device they are on, and how they are sharded.
        scales: by place in the lists, of each Ω that is kept in codes.
    """

    home: Home
    lambda_reg: Tensor
    names: list[str]
    params: list[Parameter]
    anchors: list[Tensor]
    omega: list[Tensor]
    scales: dict[int, Tensor]

    def state(self) -> dict[str, Any]:
        """θ*, Ω and λ, as the operators take them."""
        state = {"anchors": self.anchors, "omega": self.omega, "lambda_reg": self.lambda_reg}
        if self.scales:
            none = torch.empty(0, device=self.omega[0].device)
            state["omega_scales"] = [self.scales.get(i, none) for i in range(len(self.omega))]
        return state


def bundled(held: Iterable[Held]) -> list[Bundle]:
    """A bundle for each home, of which a model may have several, and each λ."""
    bundles: dict[Any, Bundle] = {}
    for name, p, anchor, omega, scales, glob, lambda_reg in held:
        key = home_key(p), glob
        bundle = bundles.get(key)
        if bundle is None:
            bundle = bundles[key] = Bundle(Home.of(p), lambda_reg, [], [], [], [], {})
        if scales is not None:
            bundle.scales[len(bundle.names)] = scales
        bundle.names.append(name)
        bundle.params.append(p)
        bundle.anchors.append(anchor)
        bundle.omega.append(omega)
    return list(bundles.values())


def penalty(bundle: Bundle) -> Tensor:
    """See :meth:`MAS.penalty`."""
    params = [differentiable_part(p) for p in bundle.params]
    return bundle.home.total(functional.penalty(params, **bundle.state()))


def add_penalty_grad_(bundle: Bundle, grad_scale: Scalar | None) -> Tensor:
    """See :meth:`MAS.add_penalty_grad_`; a gradient that is None becomes one when all went well."""
    params = bundle.params
    with torch.inference_mode(False), torch.no_grad():
        grads = [torch.zeros_like(p) if p.grad is None else placed_like(p.grad, p) for p in params]
    with naming(bundle.names):
        value = functional.add_penalty_grad_(
            locals_of(grads),
            locals_of(params),
            **bundle.state(),
            grad_scale=near(grad_scale, params[0]),
        )
    for p, grad in zip(params, grads, strict=True):
        if p.grad is not grad:
            p.grad = grad
    return bundle.home.total(value)


def largest_pulls(held: Iterable[Held]) -> Iterator[Tensor]:
    """Of every parameter max |λΩ(θ−θ*)|, a 0-dim tensor; one gradient at a time is in memory.

    Of a DTensor, of its local part.
    """
    for one in held:
        (bundle,) = bundled([one])
        with naming(bundle.names):
            _, (pull,) = functional.penalty_and_grad(locals_of(bundle.params), **bundle.state())
        if pull.numel():
            yield torch.linalg.vector_norm(pull, torch.inf)


def proximal_step_(bundle: Bundle, lr: Scalar) -> Tensor:
    """See :meth:`MAS.proximal_step_`."""
    params = bundle.params
    with naming(bundle.names):
        value = functional.proximal_step_(
            locals_of(params), **bundle.state(), lr=near(lr, params[0])
        )
    return bundle.home.total(value)


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
