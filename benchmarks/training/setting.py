"""The middle of a second task: a model off its anchors, with Ω of the first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.lists.state import State
from benchmarks.training.models import Model, loss
from mas_ext import MAS

SAMPLES = 8  # of the first task; Ω's values do not change what a step costs
MOVED = 0.01  # of a tensor's root mean square: how far the parameters are off their anchors
SHARE = 0.1  # of the task's gradient: how large the penalty's is


@dataclass
class Setting:
    """Each way to train has one of its own, with the same values."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    optimizer: torch.optim.Optimizer
    mas: MAS
    names: list[str]
    state: State  # θ, θ* and Ω as lists, for those who keep them so

    @property
    def lambda_reg(self) -> float:
        return self.state.lambda_reg

    def loss(self) -> Tensor:
        return loss(self.model(self.inputs), self.targets)


def make(chosen: Model, optimizer: str | None = None, **options: float) -> Setting:
    """``optimizer`` and its options: other ones than the model's own."""
    model, (inputs, targets) = chosen.model(), chosen.batch()
    mas = MAS(model)
    mas.consolidate([inputs[:SAMPLES]], estimator="batch")
    # As codes hold it: so that a state in fewer bytes has the same Ω as all others.
    mas.load_state_dict(kept_in(model, mas, "uint8").state_dict())
    _move(model)
    named = {name: p for name, p in model.named_parameters() if name in mas.anchor}
    state = State(
        list(named.values()),
        [mas.anchor[name].clone() for name in named],
        [mas.importance[name].clone() for name in named],
    )
    mas.lambda_reg = state.lambda_reg = _strength(model, inputs, targets, state)
    made = getattr(torch.optim, optimizer or chosen.optimizer)(
        model.parameters(), fused=True, **(options or chosen.options)
    )
    return Setting(model, inputs, targets, made, mas, list(named), state)


def kept_in(model: nn.Module, mas: MAS, state_dtype: str) -> MAS:
    """Another of the same model, with the same memory in another dtype."""
    other = MAS(model, state_dtype=state_dtype)
    other.load_state_dict(mas.state_dict())
    return other


@torch.no_grad()
def _move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        size = MOVED * p.square().mean().sqrt().clamp_min(0.01)
        p.add_(size * torch.randn(p.shape, generator=generator))


def _strength(model: nn.Module, inputs: Tensor, targets: Tensor, state: State) -> float:
    """λ under which the penalty's gradient is a share of the task's, so that a check sees it."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    grads = torch.autograd.grad(loss(model(inputs), targets), state.params)
    for name, b in model.named_buffers():
        b.copy_(buffers[name])  # running statistics
    pairs = zip(state.params, state.anchors, state.omega, strict=True)
    pulls = [(omega * (p - anchor)).detach() for p, anchor, omega in pairs]
    return float(SHARE * torch.stack(torch._foreach_norm(grads)).norm()) / float(
        torch.stack(torch._foreach_norm(pulls)).norm()
    )
