"""The middle of a second task: a model away from its anchors, with Ω of the first task."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.models import Workload
from benchmarks.state import State
from mas_ext import MAS

LR = 1e-4  # small, so that thousands of steps on one batch stay ordinary
SAMPLES = 8  # of the first task; the values of Ω don't change what a step costs
MOVED = 0.01  # the parameters' distance from their anchors, over a tensor's root mean square
SHARE = 0.1  # the norm of the penalty's gradient over that of the task's


@dataclass
class Setting:
    """Every provider has one of its own, with the same values."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    optimizer: torch.optim.Optimizer
    mas: MAS
    names: list[str]
    state: State  # θ, θ* and Ω as lists, for providers that keep them so

    @property
    def lambda_reg(self) -> float:
        return self.state.lambda_reg

    def loss(self) -> Tensor:
        return loss(self.model(self.inputs), self.targets)


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy, at every position if the target has positions."""
    return cross_entropy(output.view(target.numel(), -1), target.flatten())


def make(workload: Workload, optimizer: str | None = None, **options: float) -> Setting:
    """With the model's own optimizer, unless another one and its options are given."""
    model, (inputs, targets) = workload.model().train(), workload.batch()
    mas = MAS(model)
    mas.consolidate([inputs[:SAMPLES]], estimator="batch")
    # Rounded to uint8 and back, so that a provider with Ω in uint8 has the same Ω as the others.
    mas.load_state_dict(with_state_dtype(model, mas, "uint8").state_dict())
    _move(model)
    named = {name: p for name, p in model.named_parameters() if name in mas.anchor}
    state = State(
        list(named.values()),
        [mas.anchor[name].clone() for name in named],
        [mas.importance[name].clone() for name in named],
    )
    mas.lambda_reg = state.lambda_reg = _strength(model, inputs, targets, state)
    usual = {"lr": LR} | ({"momentum": workload.momentum} if workload.momentum else {})
    made = getattr(torch.optim, optimizer or workload.optimizer)(
        model.parameters(), fused=True, **(options or usual)
    )
    return Setting(model, inputs, targets, made, mas, list(named), state)


def with_state_dtype(model: nn.Module, mas: MAS, state_dtype: str) -> MAS:
    """Another MAS of the same model, with the same Ω in another dtype."""
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
    """The λ for which the penalty's gradient is large enough to be verified."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    grads = torch.autograd.grad(loss(model(inputs), targets), state.params)
    for name, b in model.named_buffers():
        b.copy_(buffers[name])  # running statistics
    pairs = zip(state.params, state.anchors, state.omega, strict=True)
    pulls = [(omega * (p - anchor)).detach() for p, anchor, omega in pairs]
    return float(SHARE * torch.stack(torch._foreach_norm(grads)).norm()) / float(
        torch.stack(torch._foreach_norm(pulls)).norm()
    )
