"""Adding a gradient's magnitude to the importance: Ω += |g| / N, and Ω += g² / N as a variant."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.job import OURS, Job, Provider, compiled
from benchmarks.state import State, in_float64
from mas_ext import functional


def fused(s: State) -> None:
    functional.accumulate_importance_(s.omega, s.grads, 1 / s.num_samples)


def notebook_loop(s: State) -> None:
    """As published notebooks write it, with |g| = √g²."""
    for omega, p in zip(s.omega, s.params, strict=True):
        omega.data += torch.sqrt(p.grad.data**2) / s.num_samples


@torch.no_grad()
def eager_in_place(s: State) -> None:
    for omega, grad in zip(s.omega, s.grads, strict=True):
        omega.add_(grad.abs(), alpha=1 / s.num_samples)


@torch.no_grad()
def foreach(s: State) -> None:
    torch._foreach_add_(s.omega, torch._foreach_abs(s.grads), alpha=1 / s.num_samples)


@compiled
@torch.no_grad()
def by_formula(omega: list[Tensor], grads: list[Tensor], scale: float) -> None:
    """Plain arithmetic for torch.compile to fuse."""
    for o, grad in zip(omega, grads, strict=True):
        o.add_(scale * grad.abs())


def torch_compile(s: State) -> Tensor | None:
    return by_formula(s.omega, s.grads, 1 / s.num_samples)


def square(s: State) -> None:
    functional.accumulate_importance_(s.omega, s.grads, 1 / s.num_samples, "square")


@torch.no_grad()
def eager_square(s: State) -> None:
    for omega, grad in zip(s.omega, s.grads, strict=True):
        omega.addcmul_(grad, grad, value=1 / s.num_samples)


@torch.no_grad()
def foreach_square(s: State) -> None:
    torch._foreach_addcmul_(s.omega, s.grads, s.grads, value=1 / s.num_samples)


def _expected(
    s: State, magnitude: Callable[[Tensor], Tensor] = torch.abs
) -> tuple[list[Tensor], None]:
    return [
        in_float64(lambda o, g: o + magnitude(g) / s.num_samples, omega, grad).float()
        for omega, grad in zip(s.omega, s.grads, strict=True)
    ], None


SQUARE = partial(_expected, magnitude=torch.square)


JOB = Job(
    name="accumulate",
    title="Importance: Ω += |g| / N",
    about="Add the magnitude of a gradient to the importance, or its square.",
    bytes_per_parameter=12,
    providers=(
        Provider(OURS, fused, 12),
        Provider("mas_ext, flat", fused, 12, flat=True),
        Provider("torch.compile, flat", torch_compile, 12, flat=True),
        Provider("torch.compile, list", torch_compile, 12, most_tensors=50),
        Provider("eager, in place", eager_in_place, 20),
        Provider("torch._foreach", foreach, 20),
        Provider("notebook loop", notebook_loop, 36),
        Provider("mas_ext, square", square, 12, expected=SQUARE),
        Provider("addcmul_, square", eager_square, 12, expected=SQUARE),
        Provider("torch._foreach, square", foreach_square, 12, expected=SQUARE),
    ),
    written=lambda s: s.omega,
    expected=_expected,
    streams=lambda s: [s.omega, s.grads],
)
