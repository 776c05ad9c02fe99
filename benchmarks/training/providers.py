"""Implementations of a training step with MAS, and the step without it.

Each function prepares what a user would prepare once, and returns the step that is timed: forward,
backward and the optimizer's step, with the model's usual optimizer in torch's fused form.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

import mas_ext
from benchmarks import penalty
from benchmarks.training.setting import Setting, with_state_dtype
from mas_ext._penalty.attachment import EVERY


@dataclass(frozen=True)
class Step:
    """A training step in two parts: up to the gradients, and what comes after them.

    Attributes:
        in_the_loss: whether MAS is a term of the loss. If not, the first part is the same with and
            without MAS.
        every: of how many steps one includes MAS, so that only their mean says what it costs.
    """

    backward: Callable[[], None]
    finish: Callable[[], object]
    in_the_loss: bool = False
    every: int = 1

    def __call__(self) -> None:
        self.backward()
        self.finish()


Provider = Callable[[Setting], Step]


def _step(s: Setting, before_step: Callable[[], object] = lambda: None) -> Step:
    def backward() -> None:
        s.optimizer.zero_grad()
        s.loss().backward()

    def finish() -> None:
        before_step()
        s.optimizer.step()

    return Step(backward, finish)


def _with_term(s: Setting, term: Callable[[], Tensor]) -> Step:
    def backward() -> None:
        s.optimizer.zero_grad()
        (s.loss() + term()).backward()

    return Step(backward, lambda: s.optimizer.step(), in_the_loss=True)


def fused_optimizer(s: Setting) -> Step:
    """The penalty in the optimizer's own pass over memory."""
    (group,) = s.optimizer.param_groups
    options = {name: group[name] for name in ("lr", "momentum") if name in group}
    kind = getattr(mas_ext.optim, type(s.optimizer).__name__)
    s.optimizer = kind(s.model.parameters(), mas=s.mas, **options)
    return _step(s)


def fused_optimizer_uint8(s: Setting) -> Step:
    """The same with an Ω of one byte: MAS then reads 5 bytes more per parameter instead of 8."""
    s.mas = with_state_dtype(s.model, s.mas, "uint8")
    return fused_optimizer(s)


def attached(s: Setting, mode: str, every: int = 1) -> Step:
    s.mas.attach(s.optimizer, mode, every)
    return replace(_step(s), every=every)


def compiled_loss(s: Setting) -> Step:
    """The usual loop, compiled, with autograd through it."""
    term = torch.compile(_loop, dynamic=False, fullgraph=True)
    return _with_term(s, lambda: term(*_lists(s), s.lambda_reg))


def _lists(s: Setting) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return s.state.params, s.state.anchors, s.state.omega


def _loop(
    params: list[Tensor], anchors: list[Tensor], omega: list[Tensor], lambda_reg: float
) -> Tensor:
    total = torch.zeros(())
    for p, anchor, o in zip(params, anchors, omega, strict=True):
        total = total + (o * (p - anchor) ** 2).sum()
    return lambda_reg / 2 * total


def avalanche(s: Setting) -> Step:
    """Its own plugin, called as its strategy calls it."""
    plugin = avalanche_plugin(s)
    strategy = SimpleNamespace(model=s.model, clock=SimpleNamespace(train_exp_counter=1), loss=None)

    def backward() -> None:
        s.optimizer.zero_grad()
        strategy.loss = s.loss()
        plugin.before_backward(strategy)
        strategy.loss.backward()

    return Step(backward, lambda: s.optimizer.step(), in_the_loss=True)


def avalanche_plugin(s: Setting) -> object:
    """With the setting's Ω and θ*. Avalanche's penalty has no factor of ½."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about optional parts that are not installed
        from avalanche.training.plugins import MASPlugin
        from avalanche.training.utils import ParamData

    def by_name(tensors: list[Tensor]) -> dict[str, object]:
        pairs = zip(s.names, tensors, strict=True)
        return {name: ParamData(name, init_tensor=t.clone()) for name, t in pairs}

    plugin = MASPlugin(s.lambda_reg / 2)
    plugin.importance, plugin.params = by_name(s.state.omega), by_name(s.state.anchors)
    return plugin


PLAIN = "without MAS"
PROXIMAL = "mas_ext, attach proximal"
SELDOM = f"{PROXIMAL}, every={EVERY}"
PROVIDERS: dict[str, Provider] = {
    PLAIN: _step,
    "mas_ext, optimizer": fused_optimizer,
    "mas_ext, optimizer, Ω in uint8": fused_optimizer_uint8,
    "mas_ext, attach": lambda s: attached(s, "gradient"),
    PROXIMAL: lambda s: attached(s, "proximal"),
    SELDOM: lambda s: attached(s, "proximal", EVERY),
    "mas_ext, penalty() in the loss": lambda s: _with_term(s, s.mas.penalty),
    # Arithmetic on the gradients after backward. Compiled, it is the fastest code to write by hand.
    "torch.compile, gradient": lambda s: _step(s, lambda: penalty.torch_compile(s.state)),
    "torch.compile, in the loss": compiled_loss,
    "torch._foreach, gradient": lambda s: _step(s, lambda: penalty.foreach(s.state)),
    "eager, gradient in place": lambda s: _step(s, lambda: penalty.eager_no_grad(s.state)),
    # As most published code does it: a term of the loss in a loop over the parameters.
    "loop in the loss": lambda s: _with_term(s, lambda: _loop(*_lists(s), s.lambda_reg)),
    "Avalanche": avalanche,
}
