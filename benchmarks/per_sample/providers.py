"""Implementations of the importance of one batch, Ω = 1/B Σ_k |∂‖F(x_k)‖²/∂θ|.

Each function prepares what a user would prepare once, which is not timed, and returns the call that
is timed. The call makes an Ω of zeros and adds to it, the way importance is accumulated. Every
provider has a model of its own and may add hooks to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.models import Batch
from mas_ext import estimate_importance

Step = Callable[[], Mapping[str, Tensor]]
Prepare = Callable[[nn.Module, Batch], Step]

OURS, BATCH_SIZE_1 = "mas_ext", "batch size 1"
BATCH_MEAN, BATCH = "batch-mean", "batch-mean, mas_ext"
BATCH_MEANS = (BATCH_MEAN, BATCH)  # inexact: what cancels within the batch is lost
VMAP, UNCHUNKED = "vmap(grad)", "vmap(grad), unchunked"
OPACUS, BACKPACK = "Opacus", "BackPACK"


class Unsupported(Exception):
    """Why a provider can't compute the importance of a model."""


def size(batch: Batch) -> int:
    return len(tree_leaves(batch)[0])


def take(batch: Batch, start: int, stop: int) -> Batch:
    return tree_map(lambda t: t[start:stop], batch)


def chunks(batch: Batch, length: int) -> Iterator[Batch]:
    for start in range(0, size(batch), length):
        yield take(batch, start, start + length)


def arguments(batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    return ((), batch) if isinstance(batch, dict) else ((batch,), {})


def total(output: object) -> Tensor:
    """Σ_k ‖F(x_k)‖² of what a model returned."""
    return getattr(output, "logits", output).square().sum()


def objective(model: nn.Module, batch: Batch) -> Tensor:
    args, kwargs = arguments(batch)
    return total(model(*args, **kwargs))


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) for name, p in model.named_parameters()}


def add_abs_of_each(omega: dict[str, Tensor], per_sample: Iterable[Tensor], scale: float) -> None:
    """From gradients [samples, …], which are overwritten."""
    for o, g in zip(omega.values(), per_sample, strict=True):
        o.add_(g.detach().abs_().sum(0), alpha=scale)


def ours(model: nn.Module, batch: Batch, estimator: str = "per_sample") -> Step:
    return lambda: estimate_importance(model, [batch], estimator=estimator)


def in_chunks(model: nn.Module, batch: Batch, length: int) -> Step:
    """The absolute value of each chunk's gradient, as a loop over a DataLoader does it."""
    params = list(model.parameters())

    def step() -> dict[str, Tensor]:
        omega = zeros(model)
        for chunk in chunks(batch, length):
            grads = torch.autograd.grad(objective(model, chunk), params)
            for o, g in zip(omega.values(), grads, strict=True):
                o.add_(g.abs(), alpha=1 / size(batch))
        return omega

    return step


def batch_mean(model: nn.Module, batch: Batch) -> Step:
    return in_chunks(model, batch, size(batch))


def vmapped(model: nn.Module, batch: Batch, length: int) -> Step:
    """Gradients of ``length`` samples at a time."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def of_one(params: dict[str, Tensor], sample: Batch) -> Tensor:
        batch_of_one = tree_map(lambda t: t.unsqueeze(0), sample)
        return total(functional_call(model, params, *arguments(batch_of_one)))

    of_each = vmap(grad(of_one), in_dims=(None, 0))

    @sdpa_kernel(SDPBackend.MATH)  # vmap has no rule for the fused attention and loops
    def step() -> dict[str, Tensor]:
        omega = zeros(model)
        for chunk in chunks(batch, length):
            add_abs_of_each(omega, of_each(params, chunk).values(), 1 / size(batch))
        return omega

    return step


def opacus(model: nn.Module, batch: Batch) -> Step:
    from opacus.grad_sample import GradSampleModule

    refused = GradSampleModule.validate(model)
    if refused:
        raise Unsupported(f"refuses {len(refused)} modules that have buffers, such as BatchNorm")
    # Its hooks do nothing in evaluation mode. No workload has dropout or, here, BatchNorm.
    wrapped = GradSampleModule(model.train(), loss_reduction="sum")
    batch = _with_positions(model, batch)

    def step() -> dict[str, Tensor]:
        objective(wrapped, batch).backward()
        omega = zeros(model)
        add_abs_of_each(omega, (p.grad_sample for p in model.parameters()), 1 / size(batch))
        wrapped.zero_grad(set_to_none=True)  # grad_sample too
        return omega

    return step


def _with_positions(model: nn.Module, batch: Batch) -> Batch:
    """GPT-2 makes positions of shape [1, T], which Opacus takes for a batch of one sample."""
    if getattr(getattr(model, "config", None), "model_type", None) != "gpt2":
        return batch
    ids = batch["input_ids"]
    return {**batch, "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}


def backpack(model: nn.Module, batch: Batch) -> Step:
    from backpack import backpack as extended_backward
    from backpack.extensions import BatchGrad

    extended = _extended(model)

    def step() -> dict[str, Tensor]:
        with extended_backward(BatchGrad()):
            objective(extended, batch).backward()
        _check_each_has(extended, "grad_batch")
        omega = zeros(extended)
        add_abs_of_each(omega, (p.grad_batch for p in extended.parameters()), 1 / size(batch))
        for p in extended.parameters():
            p.grad, p.grad_batch = None, None
        return omega

    return step


def _extended(model: nn.Module) -> nn.Module:
    """BackPACK's converter rewrites in-place operations, which its hooks forbid."""
    from backpack import extend

    if isinstance(model, nn.Sequential):
        return extend(model)
    try:
        return extend(model, use_converter=True)
    except Exception:  # whatever torch.fx raises for a model that it can't trace
        return extend(model)


def _check_each_has(model: nn.Module, attribute: str) -> None:
    missing = [n for n, p in model.named_parameters() if getattr(p, attribute, None) is None]
    if missing:
        count = len(list(model.parameters()))
        raise Unsupported(f"no rule for {len(missing)} of {count} parameters, such as {missing[0]}")


def providers(chunk: int) -> dict[str, Prepare]:
    """Everything that is timed, ours first; ``chunk``: samples per call of vmap."""
    return {
        OURS: ours,
        BATCH_MEAN: batch_mean,
        BATCH: partial(ours, estimator="batch"),
        BATCH_SIZE_1: partial(in_chunks, length=1),
        VMAP: partial(vmapped, length=chunk),
        OPACUS: opacus,
        BACKPACK: backpack,
    }
