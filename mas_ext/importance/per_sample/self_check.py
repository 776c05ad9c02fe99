"""Verifies a plan against ordinary autograd before it is used.

A plan assumes that samples do not interact, that the forward pass is deterministic, and that the
graph shows every use of a parameter. To verify this, a few samples of the batch are run one at a
time; outputs and importance must agree with those of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from mas_ext.importance.batches import tensors_in
from mas_ext.importance.isolation import OperatorObserver
from mas_ext.importance.reductions import Reduction

# By how much two computations of the same value may differ, by dtype. Rounding stays well below
# this, and a wrong assumption well above.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-2}
_LOOSE = 0.25  # half precision


def tolerance(dtype: torch.dtype) -> float:
    """The relative tolerance for the sum over a tensor."""
    return _TOLERANCE.get(dtype, _LOOSE)


def agree(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether two vectors of per-sample scalars, computed in ``dtype``, agree up to rounding."""
    scale = torch.maximum(a.abs(), b.abs()).max()
    return bool((a - b).abs().max() <= tolerance(dtype) * scale)


def find_disagreements(
    ours: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    dtype: torch.dtype,
    reduction: Reduction,
) -> list[str]:
    """The parameters whose sums Σ_k f(M_k) differ by more than rounding.

    Where the true gradient is zero, as for the key's bias in softmax attention or a shift that a
    normalisation removes, both sums are rounding noise. The tolerance therefore has a floor: the
    rounding error of the largest sum, amplified as by a few layers.
    """
    largest = max((float(t.max()) for t in exact.values() if t.numel()), default=0.0)
    noise = float(reduction.of(torch.tensor(256 * torch.finfo(dtype).eps, device="cpu"))) * largest
    return [
        name
        for name, total in exact.items()
        if not float((ours[name] - total).abs().sum())
        <= tolerance(dtype) * float(total.sum()) + noise * total.numel()
    ]


_EXPORTS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}


@dataclass
class Decisions:
    """The operations by which a forward pass reads tensor data into Python, and may branch on it.

    What forward makes of nothing but sizes, such as positions, is not data: it is the same for all
    samples.

    Attributes:
        names: the operations' names.
        on_values: whether one of them read something computed from floating-point numbers, rather
            than only masks, lengths and the like.
    """

    names: list[str] = field(default_factory=list)
    on_values: bool = False

    def record(self, name: str, on_values: bool) -> None:
        """Records an operation that reads data."""
        self.names.append(name)
        self.on_values |= on_values


class _MadeHere:
    """The tensors that hold nothing but what forward itself wrote: they were made from no tensor.

    Memory is what is tracked, since a view of a tensor may be written to. It is kept, so that no
    other tensor gets its address.
    """

    def __init__(self) -> None:
        self._kept: dict[int, torch.UntypedStorage] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        return _is_plain(tensor) and tensor.untyped_storage()._cdata in self._kept

    def follow(self, func: Any, inputs: list[Tensor], results: list[Tensor]) -> None:
        """Takes note of an operation that ran."""
        if torch.Tag.nondeterministic_seeded not in func.tags and all(t in self for t in inputs):
            made = [t.untyped_storage() for t in results if _is_plain(t)]
            self._kept.update({memory._cdata: memory for memory in made})
        elif func._schema.is_mutable:
            for tensor in filter(_is_plain, inputs):
                self._kept.pop(tensor.untyped_storage()._cdata, None)


def _is_plain(tensor: Tensor) -> bool:
    """Whether all that a tensor holds is in memory of its own."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided


@contextmanager
def recorded_decisions() -> Iterator[Decisions]:
    """Records the decisions of the forward passes that run inside."""
    found, made_here = Decisions(), _MadeHere()
    with _DecisionRecorder(found, made_here), _ExportRecorder(found, made_here):
        yield found


class _ExportRecorder(TorchFunctionMode):
    """Records what reads a tensor without any operation: ``tolist`` and conversion to NumPy."""

    def __init__(self, found: Decisions, made_here: _MadeHere) -> None:
        super().__init__()
        self._found, self._made_here = found, made_here

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _EXPORTS and args[0] not in self._made_here:
            self._found.record(func.__name__, args[0].is_floating_point())
        return func(*args, **(kwargs or {}))


class _DecisionRecorder(OperatorObserver):
    def __init__(self, found: Decisions, made_here: _MadeHere) -> None:
        super().__init__()
        self._found, self._made_here = found, made_here
        self._from_values = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        inputs = tensors_in((args, kwargs))
        from_values = any(t.is_floating_point() or t in self._from_values for t in inputs)
        if _reads(func, inputs) and not all(t in self._made_here for t in inputs):
            self._found.record(str(func), from_values)
        result = func(*args, **(kwargs or {}))
        results = tensors_in(result)
        self._made_here.follow(func, inputs, results)
        if from_values:
            for tensor in results:
                self._from_values[tensor] = True
        return result


def _reads(func: Any, inputs: list[Tensor]) -> bool:
    if torch.Tag.data_dependent_output in func.tags:
        return True
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    # The shape of an indexing operation's output depends on data only if it indexes with a mask.
    is_index = func.name().startswith("aten::index")
    return not is_index or any(t.dtype in (torch.bool, torch.uint8) for t in inputs[1:])
