"""Implementations of a quantity of a few batches, Ω = 1/N Σ_k f(∂s_k/∂θ).

MAS has s = ‖F(x)‖² and f = |·|; the empirical Fisher information's diagonal has s = −log p(y|x) and
f = (·)². Each function prepares what a user would prepare once, which is not timed, and returns the
call that is timed. The call makes an Ω of zeros and adds to it, the way importance is accumulated.
Every provider has a model of its own and may add hooks to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.models import Batch
from mas_ext import estimate_importance

Step = Callable[[], Mapping[str, Tensor]]
Prepare = Callable[[nn.Module, Sequence[Batch]], Step]

OURS, OUR_SQUARE, BATCH_SIZE_1 = "mas_ext", "mas_ext, square", "batch size 1"
BATCH_MEAN, BATCH = "batch-mean", "batch-mean, mas_ext"
BATCH_MEANS = (BATCH_MEAN, BATCH)  # inexact: what cancels within the batch is lost
VMAP, UNCHUNKED = "vmap(grad)", "vmap(grad), unchunked"
OPACUS, BACKPACK, NNGEOMETRY = "Opacus", "BackPACK", "nngeometry"


class Unsupported(Exception):
    """Why a provider can't compute the importance of a model."""


def size(batch: Batch) -> int:
    return len(tree_leaves(batch)[0])


def total_size(batches: Sequence[Batch]) -> int:
    return sum(map(size, batches))


def take(batch: Batch, start: int, stop: int) -> Batch:
    return tree_map(lambda t: t[start:stop], batch)


def chunks(batch: Batch, length: int) -> Iterator[Batch]:
    for start in range(0, size(batch), length):
        yield take(batch, start, start + length)


def chunks_of(batches: Sequence[Batch], length: int) -> Iterator[Batch]:
    for batch in batches:
        yield from chunks(batch, length)


def arguments(batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Of the model, which gets no labels."""
    if isinstance(batch, dict):
        return (), {name: value for name, value in batch.items() if name != "labels"}
    return (batch[0] if isinstance(batch, tuple) else batch,), {}


# -- quantities ------------------------------------------------------------------------------------
def squared_norms(output: Tensor, batch: Batch) -> Tensor:
    """Σ_k ‖F(x_k)‖²."""
    return output.square().sum()


def negative_log_likelihoods(output: Tensor, batch: Batch) -> Tensor:
    """−Σ_k log p(y_k|x_k); of a language model, of each sequence's next tokens."""
    if isinstance(batch, dict):
        output, labels = output[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    else:
        labels = batch[1]
    return cross_entropy(output, labels, reduction="sum")


@dataclass(frozen=True)
class Quantity:
    """Ω = 1/N Σ_k f(∂s_k/∂θ).

    Attributes:
        total: (output, batch) → Σ_k s_k.
        reduce: f. Gradients of two parameters may share memory, so that only an f that changes
            nothing the second time may overwrite them.
        options: of estimate_importance, for this quantity.
    """

    total: Callable[[Tensor, Batch], Tensor]
    reduce: Callable[[Tensor], Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def of(self, model: nn.Module, batch: Batch) -> Tensor:
        """Σ_k s_k."""
        return self.of_output(self.call(model, batch), batch)

    def of_output(self, output: Any, batch: Batch) -> Tensor:
        return self.total(getattr(output, "logits", output), batch)

    @staticmethod
    def call(model: nn.Module, batch: Batch) -> Any:
        args, kwargs = arguments(batch)
        return model(*args, **kwargs)

    def add_each(
        self, omega: Mapping[str, Tensor], per_sample: Iterable[Tensor], scale: float
    ) -> None:
        """Adds f of gradients [samples, …], which may be overwritten."""
        for o, g in zip(omega.values(), per_sample, strict=True):
            o.add_(self.reduce(g.detach()).sum(0), alpha=scale)


MAS = Quantity(squared_norms, torch.Tensor.abs_)
MAS_SQUARE = Quantity(squared_norms, torch.square, {"reduction": "square"})
FISHER = Quantity(negative_log_likelihoods, torch.square, {"criterion": "empirical_fisher"})


# -- providers -------------------------------------------------------------------------------------


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) for name, p in model.named_parameters()}


def ours(
    model: nn.Module,
    batches: Sequence[Batch],
    quantity: Quantity = MAS,
    estimator: str = "per_sample",
) -> Step:
    return lambda: estimate_importance(model, batches, estimator=estimator, **quantity.options)


def in_chunks(
    model: nn.Module, batches: Sequence[Batch], quantity: Quantity = MAS, *, length: int
) -> Step:
    """f of each chunk's mean gradient, as a loop over a DataLoader does it."""
    params, total = list(model.parameters()), total_size(batches)

    def step() -> dict[str, Tensor]:
        omega = zeros(model)
        for chunk in chunks_of(batches, length):
            grads = torch.autograd.grad(quantity.of(model, chunk) / size(chunk), params)
            for o, g in zip(omega.values(), grads, strict=True):
                o.add_(quantity.reduce(g), alpha=size(chunk) / total)
        return omega

    return step


def batch_mean(model: nn.Module, batches: Sequence[Batch], quantity: Quantity = MAS) -> Step:
    return in_chunks(model, batches, quantity, length=size(batches[0]))


def vmapped(
    model: nn.Module, batches: Sequence[Batch], quantity: Quantity = MAS, *, length: int
) -> Step:
    """Gradients of ``length`` samples at a time."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def of_one(params: dict[str, Tensor], sample: Batch) -> Tensor:
        batch_of_one = tree_map(lambda t: t.unsqueeze(0), sample)
        output = functional_call(model, params, *arguments(batch_of_one))
        return quantity.of_output(output, batch_of_one)

    of_each = vmap(grad(of_one), in_dims=(None, 0))

    @sdpa_kernel(SDPBackend.MATH)  # vmap has no rule for the fused attention and loops
    def step() -> dict[str, Tensor]:
        omega = zeros(model)
        for chunk in chunks_of(batches, length):
            quantity.add_each(omega, of_each(params, chunk).values(), 1 / total_size(batches))
        return omega

    return step


def opacus(model: nn.Module, batches: Sequence[Batch], quantity: Quantity = MAS) -> Step:
    from opacus.grad_sample import GradSampleModule

    refused = GradSampleModule.validate(model)
    if refused:
        raise Unsupported(f"refuses {len(refused)} modules that have buffers, such as BatchNorm")
    # Its hooks do nothing in evaluation mode. No workload has dropout or, here, BatchNorm.
    wrapped = GradSampleModule(model.train(), loss_reduction="sum")
    batches = [_with_positions(model, batch) for batch in batches]

    def step() -> dict[str, Tensor]:
        omega, scale = zeros(model), 1 / total_size(batches)
        for batch in batches:
            quantity.of(wrapped, batch).backward()
            quantity.add_each(omega, (p.grad_sample for p in model.parameters()), scale)
            wrapped.zero_grad(set_to_none=True)  # grad_sample too
        return omega

    return step


def _with_positions(model: nn.Module, batch: Batch) -> Batch:
    """GPT-2 makes positions of shape [1, T], which Opacus takes for a batch of one sample."""
    if getattr(getattr(model, "config", None), "model_type", None) != "gpt2":
        return batch
    ids = batch["input_ids"]
    return {**batch, "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}


def backpack(model: nn.Module, batches: Sequence[Batch], quantity: Quantity = MAS) -> Step:
    """It can sum the squares itself, without a gradient per sample."""
    from backpack import backpack as extended_backward
    from backpack.extensions import BatchGrad, SumGradSquared

    extended = _extended(model)
    extension = BatchGrad() if quantity is MAS else SumGradSquared()

    def add(omega: Mapping[str, Tensor], batch: Batch, scale: float) -> None:
        with extended_backward(extension):
            quantity.of(extended, batch).backward()
        _check_each_has(extended, extension.savefield)
        saved = [getattr(p, extension.savefield) for p in extended.parameters()]
        if quantity is MAS:
            quantity.add_each(omega, saved, scale)
        else:
            for o, squares in zip(omega.values(), saved, strict=True):
                o.add_(squares, alpha=scale)
        for p in extended.parameters():
            p.grad = None
            delattr(p, extension.savefield)

    def step() -> dict[str, Tensor]:
        omega = zeros(extended)
        for batch in batches:
            add(omega, batch, 1 / total_size(batches))
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


def nngeometry(model: nn.Module, batches: Sequence[Batch], quantity: Quantity) -> Step:
    """The diagonal of E[JᵀJ], where J is that of the one number −log p(y|x)."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatDiag, PVector
    from torch.utils.data import DataLoader

    layers = LayerCollection.from_model(model)
    if not isinstance(batches[0], tuple):
        raise Unsupported("differentiates with respect to the inputs, and tokens have no gradient")
    count = size(batches[0])

    def batch_of(samples: list[int]) -> list[Tensor]:  # its own loader would stack them one by one
        return [t.detach() for t in batches[samples[0] // count]]

    loader = DataLoader(range(total_size(batches)), count, collate_fn=batch_of)
    backend = TorchHooksJacobianBackend(
        model, lambda x, y: cross_entropy(model(x), y, reduction="none"), layer_collection=layers
    )

    def step() -> dict[str, Tensor]:
        found = PVector(layers, vector_repr=PMatDiag(backend, examples=loader).get_diag())
        omega = {
            f"{layer}.{part}": values
            for layer, parts in found.to_dict().items()
            for part, values in zip(("weight", "bias"), parts, strict=False)
        }
        for name, o in (result := zeros(model)).items():
            o.add_(omega[name])
        return result

    return step


def providers(chunk: int, quantity: Quantity = MAS) -> dict[str, Prepare]:
    """Everything that is timed, ours first; ``chunk``: samples per call of vmap."""
    every: dict[str, Callable[..., Step]] = {
        OURS: ours,
        BATCH_MEAN: batch_mean,
        BATCH: partial(ours, estimator="batch"),
        BATCH_SIZE_1: partial(in_chunks, length=1),
        VMAP: partial(vmapped, length=chunk),
        OPACUS: opacus,
        BACKPACK: backpack,
    }
    if quantity is FISHER:
        every[NNGEOMETRY] = nngeometry  # has no absolute value
    prepared: dict[str, Prepare] = {n: partial(p, quantity=quantity) for n, p in every.items()}
    if quantity is MAS:  # the same scalar, so that only f differs
        prepared[OUR_SQUARE] = partial(ours, quantity=MAS_SQUARE)
    return prepared
