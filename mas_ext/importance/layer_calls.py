"""Records the inputs and outputs of layers during a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mas_ext.importance.batches import tensors_in
from mas_ext.importance.contributions import Contribution, MatrixProduct, upcast
from mas_ext.importance.convolution import ConvolutionWeight, Geometry
from mas_ext.importance.isolation import OperatorObserver

_aten = torch.ops.aten
_RELU = {_aten.relu.default, _aten.relu_.default}
_CLAMP = {getattr(_aten, name).default for name in ("clamp", "clamp_", "clamp_min", "clamp_min_")}


@dataclass
class LayerCall:
    """One call of a layer.

    Attributes:
        layer: the Linear or Conv module.
        inputs, outputs: x [rows, …, in] and y [rows, …, out]; channels are second for convolutions.
        rectified: whether a ReLU was applied to y.
    """

    layer: Any
    inputs: Tensor
    outputs: Tensor
    rectified: bool = False

    @property
    def rows(self) -> int | None:
        """The size of dimension 0; None if the input has no sample dimension."""
        smallest = 2 if isinstance(self.layer, nn.Linear) else self.layer.weight.dim()
        return len(self.inputs) if self.inputs.dim() >= smallest else None

    def gradient(self, size: int) -> Tensor:
        """∂‖y‖²/∂(Wx + b) = 2y by sample and position, [B, T, out], for B = ``size``."""
        y = self._doubled() if isinstance(self.layer, nn.Linear) else self._pixels().movedim(1, -1)
        return y.reshape(size, -1, y.shape[-1])

    def product(self, size: int) -> Contribution:
        """This call's contribution to ∂‖y‖²/∂W of each of ``size`` samples."""
        if isinstance(self.layer, nn.Linear):
            x = upcast(self.inputs)
            return MatrixProduct(self.gradient(size), x.reshape(size, -1, x.shape[-1]))
        layer, space = self.layer, self.layer.weight.dim() - 2
        x = self._with_rows(upcast(self.inputs))
        if any(layer._reversed_padding_repeated_twice):
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        pixels, x = (t.unflatten(0, (size, -1)) for t in (self._pixels(), x))
        geometry = Geometry(layer.kernel_size, layer.stride, (0,) * space, layer.dilation)
        return ConvolutionWeight(pixels, x, geometry, layer.groups)

    def _doubled(self) -> Tensor:
        y = upcast(self.outputs)
        return 2 * (y.clamp(min=0) if self.rectified else y)

    def _pixels(self) -> Tensor:
        """2y of a convolution, [rows, out, …]."""
        return self._with_rows(self._doubled())

    def _with_rows(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() == self.layer.weight.dim() else tensor.unsqueeze(0)


class LayerCallRecorder(OperatorObserver):
    """Records every call of the layers, and which of their outputs a ReLU is applied to.

    It sees every operation, no matter how the model called it. If an operation overwrites a
    recorded tensor, the recorder copies the tensor first; a later ReLU on the overwritten tensor no
    longer counts as one on the layer's output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LayerCall] = []
        self._by_output: dict[int, LayerCall] = {}
        self._by_storage: dict[int, list[LayerCall]] = {}

    def record(self, layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """The forward hook that records a call."""
        call = LayerCall(layer, args[0] if args else kwargs["input"], output)
        self.calls.append(call)
        self._by_output[id(output)] = call
        for tensor in (call.inputs, call.outputs):
            self._by_storage.setdefault(_storage(tensor), []).append(call)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_relu(func, args, kwargs) and id(args[0]) in self._by_output:
            self._by_output[id(args[0])].rectified = True
        if func._schema.is_mutable:
            for tensor in _overwritten(func, args, kwargs):
                self._rescue(_storage(tensor))
        return func(*args, **kwargs)

    def _rescue(self, storage: int) -> None:
        for call in self._by_storage.pop(storage, []):
            if _storage(call.inputs) == storage:
                call.inputs = call.inputs.clone()
            if _storage(call.outputs) == storage:
                self._by_output.pop(id(call.outputs), None)
                call.outputs = call.outputs.clone()


def _is_relu(func: Any, args: Any, kwargs: Any) -> bool:
    if func not in _CLAMP:  # x.clamp(min=0) is ReLU too
        return func in _RELU
    low = args[1] if len(args) > 1 else kwargs.get("min")
    high = args[2] if len(args) > 2 else kwargs.get("max")
    return low == 0 and high is None


def _overwritten(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    for n, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[n] if n < len(args) else kwargs.get(argument.name)
            yield from (t for t in tensors_in(value) if t.layout == torch.strided)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
