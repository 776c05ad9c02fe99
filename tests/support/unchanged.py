"""What a measurement must leave as it was: a model with all that surrounds it, and a state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.support.zoo.layers import Net
from tests.support.zoo.small import convnet, images


def _forward(m: Net, x: Tensor) -> Tensor:
    m.calls += 1
    m.sparse.mul_(2)
    m.statistics.running_mean.add_(x.mean((0, 2, 3)))
    m.register_buffer("appeared", x)
    return m.body(x)


def used_model() -> nn.Module:
    """In the middle of its training, with modes, gradients and buffers of every kind.

    It writes to buffers also in evaluation mode, as real models do.
    """
    model = Net(_forward, body=convnet(), statistics=nn.BatchNorm2d(2).double())
    model.register_buffer("calls", torch.zeros(()))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("meta", torch.zeros(3, device="meta"))
    model.train()
    model.body[0].eval()
    model.body[6].bias.requires_grad_(False)
    model(images()).sum().backward()
    del model._buffers["appeared"]
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a measurement could change; objects by identity and by value."""
    buffers = dict(model.named_buffers())
    return {
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [id(p.grad) for p in model.parameters()],
        "gradient values": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "parameters": [p.detach().clone() for p in model.parameters()],
        "buffers": {name: id(b) for name, b in buffers.items()},
        "buffer values": {n: b.to_dense().clone() for n, b in buffers.items() if not b.is_meta},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "random numbers": torch.get_rng_state(),
        "gradient mode": torch.is_grad_enabled(),
        "fused attention": torch.backends.mha.get_fastpath_enabled(),
        "oneDNN": torch.backends.mkldnn.enabled,
    }
