"""What exact importance cannot cost less than, unless products get cheaper than torch's.

A forward pass, a backward pass without gradients of weights, and one matrix product of the FLOPs of
each weight's gradient, added to an Ω of zeros. It forms no Ω: magnitudes, biases, norms and
embeddings cost it nothing, and a convolution's patches are laid out already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import Batch
from benchmarks.per_sample.providers import MAS, Quantity, Step

FLOOR = "floor"
_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1}  # → which argument is the first factor
Sizes = tuple[int, int, int]  # rows, and the two sizes of the weight as a matrix


def backward_alone(model: nn.Module, batches: Sequence[Batch], quantity: Quantity = MAS) -> Step:
    """Forward, and backward to the first layer's output, without gradients of weights."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: object) -> None:
        if not outputs and isinstance(output, Tensor) and output.requires_grad:
            outputs.append(output)

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(keep)

    def step() -> Mapping[str, Tensor]:
        for batch in batches:
            outputs.clear()
            scalar = quantity.of(model, batch)
            torch.autograd.grad(scalar, outputs.pop())
        return {}

    return step


def floor(model: nn.Module, batches: Sequence[Batch], quantity: Quantity = MAS) -> Step:
    """The backward pass, and the products, into matrices that are zeroed before."""
    weights = products(model, batches[0], quantity)
    factors = {
        (rows, columns): torch.randn(rows, columns) for rows, *sizes in weights for columns in sizes
    }
    omegas = {size: torch.zeros(size) for _, *pair in weights for size in [tuple(pair)]}
    passed = backward_alone(model, batches[:1], quantity)

    def step() -> Mapping[str, Tensor]:
        for _ in batches:
            passed()
            for (rows, left, right), times in weights.items():
                for _ in range(times):
                    omega = omegas[left, right].zero_()
                    omega.addmm_(factors[rows, left].t(), factors[rows, right])
        return {}

    return step


def products(model: nn.Module, batch: Batch, quantity: Quantity = MAS) -> Counter[Sizes]:
    """The sizes of the products that form the gradients of weights, and how often each occurs."""
    with _Products(model) as found:
        quantity.of(model, batch)
    return found.sizes


class _Products(TorchDispatchMode):
    """Sees the matrix products and convolutions of a forward pass that involve a parameter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sizes: Counter[Sizes] = Counter()
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            a, b = args[_PRODUCTS[func] :][:2]
            if self._is_weight(b):
                self.sizes[len(a), b.shape[0], b.shape[1]] += 1
        elif func is _aten.convolution.default and self._is_weight(args[1]):
            pixels = args[0] if args[6] else result  # transposed: input and output change places
            weight = args[1]
            rows = len(pixels) * pixels.shape[2:].numel()
            self.sizes[rows, len(weight), prod(weight.shape[1:])] += 1
        return result

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._weights
