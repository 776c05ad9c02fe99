"""Small networks and data that several tests use, and the oracle for importance."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def convnet(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).to(dtype)
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    return model


def vectors(count: int = 10, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 6, dtype=dtype, generator=torch.Generator().manual_seed(1))


def images(count: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 2, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))


def squared_l2(output: Tensor) -> Tensor:
    return (output**2).sum()


def oracle(
    model: nn.Module, samples: Iterable[Tensor], objective: Callable[[Tensor], Tensor] = squared_l2
) -> dict[str, Tensor]:
    """Ω as it is defined: batch size 1, plain backward, absolute value, mean."""
    was_training = model.training
    model.eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    count = 0
    for sample in samples:
        model.zero_grad()
        objective(model(sample.unsqueeze(0))).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] += p.grad.abs()
        count += 1
    model.zero_grad()
    model.train(was_training)
    return {name: value / count for name, value in total.items()}


def assert_same(actual: dict, expected: dict, rtol: float = 1e-12, atol: float = 1e-14) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
