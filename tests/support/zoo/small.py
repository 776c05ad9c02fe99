"""Small networks and data that many tests use."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

B = 5  # samples in a batch of the zoo


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


def noise(*shape: int) -> Tensor:
    return torch.randn(B, *shape, dtype=torch.float64)


def ids(*shape: int, below: int = 7) -> Tensor:
    return torch.randint(below, (B, *shape))


def padding(t: int) -> Tensor:
    """1 for a token, 0 for padding after it; one sample is full, one is a single token."""
    lengths = torch.tensor([t, 1, *torch.randint(1, t, (B - 2,)).tolist()])
    return (torch.arange(t) < lengths[:, None]).long()


def assert_same(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    rtol: float = 1e-12,
    atol: float = 1e-14,
) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
