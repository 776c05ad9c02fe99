r"""The paper's local variant: Ω of a layer from what goes in and what comes out, no gradients.

Each layer is measured by the length of its own output, not of the network's. For a linear layer
followed by ReLU, :math:`y = \mathrm{ReLU}(Wx + b)`, and a single position,

.. math:: \Omega_{ji} = \frac{1}{N} \sum_k \left|\frac{\partial \|y_k\|_2^2}{\partial W_{ji}}\right|
    = \frac{1}{N} \sum_k 2\, y_{kj}\, |x_{ki}|, \qquad \Omega_j = \frac{1}{N} \sum_k 2\, y_{kj}

(the bias): neurons that fire together are wired together, Hebb's rule. With more positions in a
sample (sequences, convolutions) the sum over positions comes before the absolute value,
:math:`|\sum_t 2\, y_t x_t^\top|`, and so does the sum over several uses of the same weights.

Source: Aljundi et al., ECCV 2018, section 4.3.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mas_ext.importance.batches import Inputs, check_rows, output_tensor, placed

if TYPE_CHECKING:
    from mas_ext.importance.estimators import Estimation

CHUNK = 2**22  # elements of what is held at once per step: 16 MiB in float32
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_aten = torch.ops.aten
_RELU = {_aten.relu.default, _aten.relu_.default}
_CLAMP = {getattr(_aten, name).default for name in ("clamp", "clamp_", "clamp_min", "clamp_min_")}


def local(estimation: Estimation, batch: Any, limit: int) -> int:
    r"""Adds :math:`\sum_k |\partial \|y_k\|^2 / \partial\theta|`, y the parameter's layer's output.

    y is after the ReLU where one follows directly (``nn.ReLU``, ``relu``, ``clamp(min=0)``, in
    place or not), else the layer's own linear output: before a normalisation, GELU or the end.
    One forward pass a batch, no graph. It holds the inputs and outputs of all layers until the
    pass has ended, as training would.

    What is neither weight nor bias of a Linear or Conv layer that was called adds nothing; nor
    does the use of such a weight elsewhere, as in an embedding tied to the last layer.
    """
    layers = _layers_of(estimation)
    with torch.no_grad(), _not_fused():
        if estimation.forward is not None:
            return _add_custom_batch(estimation, layers, batch, limit)
        inputs = placed(Inputs.of(batch), estimation.input_device())
        count = min(inputs.size(), limit)
        if count == 0:
            return 0
        if inputs.size() > 1 and layers.samples_first is None:
            layers.samples_first = _samples_come_first(estimation, layers, inputs)
        if layers.samples_first is not False:
            uses = _pass(estimation, layers, inputs)
            if inputs.size() == 1 or all(use.rows == inputs.size() for use in uses):
                _add(estimation, uses, inputs.size(), count)
                return count
        for sample in inputs.samples(count):
            _add(estimation, _pass(estimation, layers, sample), 1, 1)
    return count


def check_objective(objective: Any) -> None:
    """There is nothing to choose: each layer's ‖y‖² is what the variant is."""
    if objective != "squared_l2":
        raise ValueError(
            f"objective is {objective!r}, but estimator='local' has one of its own, the squared "
            "length of each layer's output; leave objective out, or use estimator='per_sample'"
        )


def report_coverage(estimation: Estimation) -> None:
    """After the last batch: says which parameters no layer's pass has measured, and warns."""
    served = estimation.state.served
    if not served:
        raise ValueError(
            "estimator='local': none of the Linear and Conv layers that are measured was called "
            "as a module by the forward; use estimator='per_sample'"
        )
    estimation.coverage |= {n: "local" if n in served else "none" for n in estimation.params}
    left_out = [name for name in estimation.params if name not in served]
    if left_out:
        some = ", ".join(left_out[:5]) + (", …" if len(left_out) > 5 else "")
        warnings.warn(
            f"estimator='local' is defined for Linear and Conv layers that are called as modules: "
            f"{len(left_out)} of {len(estimation.params)} parameters ({some}) are of no such "
            "layer; their importance is 0 and they are left unprotected. estimator='per_sample' "
            "measures them",
            UserWarning,
            stacklevel=4,
        )


# -- a forward pass, watched ---------------------------------------------------------------------


@dataclass
class _Use:
    """One call of a layer.

    Attributes:
        inputs, outputs: x [rows, …, in] and y [rows, …, out]; channels second for convolutions.
        rectified: whether a ReLU was applied to y.
    """

    layer: Any
    inputs: Tensor
    outputs: Tensor
    rectified: bool = False

    @property
    def rows(self) -> int | None:
        """The size of dimension 0 where the shape leaves room for a sample dimension."""
        smallest = 2 if isinstance(self.layer, nn.Linear) else self.layer.weight.dim()
        return len(self.inputs) if self.inputs.dim() >= smallest else None


@dataclass
class _Layers:
    """What stays the same from batch to batch.

    Attributes:
        layers: the Linear and Conv layers that hold a measured parameter.
        names: of the measured parameters, by identity.
        served: the names of those that a pass has measured.
        samples_first: whether dimension 0 of every layer's input is the sample; None: not known.
    """

    layers: list[nn.Module]
    names: dict[int, str]
    served: set[str]
    samples_first: bool | None = None


def _layers_of(estimation: Estimation) -> _Layers:
    if estimation.state is None:
        names = {id(p): name for name, p in estimation.params.items()}
        layers = [
            module
            for module in estimation.model.modules()
            if _is_layer(module) and any(id(p) in names for p in module._parameters.values())
        ]
        if not layers:
            raise ValueError(
                "estimator='local' is defined for Linear and Conv layers, and no parameter that "
                "is measured belongs to one; use estimator='per_sample'"
            )
        estimation.state = _Layers(layers, names, set())
    return estimation.state


def _is_layer(module: nn.Module) -> bool:
    """Not a subclass that computes something else: its output is not Wx + b."""
    return any(isinstance(module, k) and type(module).forward is k.forward for k in LAYERS)


class _Watch(TorchDispatchMode):
    """Keeps every call of the layers as it was, and sees which outputs a ReLU is applied to.

    Below autograd and autocast it meets every operation, whichever way it was called. A tensor
    that is about to be overwritten is copied first; from then on it is not a layer's output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.uses: list[_Use] = []
        self._by_output: dict[int, _Use] = {}
        self._by_storage: dict[int, list[_Use]] = {}

    def record(self, layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """A forward hook."""
        use = _Use(layer, args[0] if args else kwargs["input"], output)
        self.uses.append(use)
        self._by_output[id(output)] = use
        for tensor in (use.inputs, use.outputs):
            self._by_storage.setdefault(_storage(tensor), []).append(use)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_relu(func, args, kwargs) and id(args[0]) in self._by_output:
            self._by_output[id(args[0])].rectified = True
        if func._schema.is_mutable:
            for tensor in _overwritten(func, args, kwargs):
                self._rescue(_storage(tensor))
        return func(*args, **kwargs)

    def _rescue(self, storage: int) -> None:
        for use in self._by_storage.pop(storage, []):
            if _storage(use.inputs) == storage:
                use.inputs = use.inputs.clone()
            if _storage(use.outputs) == storage:
                self._by_output.pop(id(use.outputs), None)
                use.outputs = use.outputs.clone()


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
            for leaf in tree_leaves(value):
                if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                    yield leaf


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _watched(layers: _Layers, forward: Callable[[], Tensor]) -> tuple[list[_Use], Tensor]:
    with ExitStack() as stack:
        watch = stack.enter_context(_Watch())
        for layer in layers.layers:
            # First of the hooks: a user's may replace the output.
            handle = layer.register_forward_hook(watch.record, prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        output = forward()
    return watch.uses, output


def _pass(estimation: Estimation, layers: _Layers, inputs: Inputs) -> list[_Use]:
    def forward() -> Tensor:
        output = output_tensor(estimation.model(*inputs.args, **inputs.kwargs))
        return check_rows(output, inputs.size())

    return _watched(layers, forward)[0]


def _add_custom_batch(estimation: Estimation, layers: _Layers, batch: Any, limit: int) -> int:
    """How to cut such a batch into samples is not known: dimension 0 has to be the sample."""
    forward = estimation.forward
    assert forward is not None
    uses, output = _watched(layers, lambda: output_tensor(forward(estimation.model, batch)))
    size = len(output)
    wrong = [use for use in uses if size > 1 and use.rows != size]
    if wrong:
        name = next(
            layers.names[id(p)] for p in wrong[0].layer.parameters() if id(p) in layers.names
        )
        raise ValueError(
            f"the layer of parameter {name!r} got an input of shape "
            f"{list(wrong[0].inputs.shape)} for {size} samples; with forward= and "
            "estimator='local' its dimension 0 must be the sample: yield batches of one sample"
        )
    count = min(size, limit)
    _add(estimation, uses, size, count)
    return count


def _samples_come_first(estimation: Estimation, layers: _Layers, inputs: Inputs) -> bool:
    """One sample alone must be one row everywhere: not time first, not positions among the rows.

    With as many positions as samples, shapes of the whole batch would not tell.
    """
    sample = next(inputs.samples(1))
    return all(use.rows == 1 for use in _pass(estimation, layers, sample))


@contextmanager
def _not_fused() -> Iterator[None]:
    """A fused transformer layer calls no hooks. (A compiled model needs no care: under a dispatch
    mode torch runs it uncompiled.)
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# -- from inputs and outputs to Ω ----------------------------------------------------------------


def _add(estimation: Estimation, uses: list[_Use], size: int, count: int) -> None:
    """Adds the first ``count`` of ``size`` samples; ``size`` 1: all rows belong to one sample."""
    state: _Layers = estimation.state
    weights: dict[tuple[str, int], list[_Use]] = {}
    biases: dict[str, list[_Use]] = {}
    for use in uses:
        weight, bias = (state.names.get(id(p)) for p in (use.layer.weight, use.layer.bias))
        if weight is not None:
            weights.setdefault((weight, getattr(use.layer, "groups", 1)), []).append(use)
        if bias is not None:
            biases.setdefault(bias, []).append(use)
    for (name, _), used in weights.items():
        with torch.autocast(used[0].outputs.device.type, enabled=False):
            _add_weight(estimation.sums[name], used, size, count)
    for name, used in biases.items():
        omega = estimation.sums[name]
        total = sum(_left(use, omega.dtype, size, slice(count)).sum(1) for use in used)
        omega.add_(torch.as_tensor(total).abs().sum(0))
    state.served |= {name for name, _ in weights} | biases.keys()
    estimation.found_gradient = True


def _add_weight(omega: Tensor, uses: list[_Use], size: int, count: int) -> None:
    matrix = omega.flatten(1)  # [out, in / groups · kernel]; a copy if memory is channels-last
    for part in _parts(uses, size, count):
        left = torch.cat([_left(use, omega.dtype, size, part) for use in uses], dim=1)
        right = torch.cat([_right(use, omega.dtype, size, part) for use in uses], dim=1)
        groups = right.shape[2]
        rows = zip(matrix.chunk(groups), left.chunk(groups, dim=2), strict=True)
        for g, (omega_of_group, left_of_group) in enumerate(rows):
            add_abs_matmul(omega_of_group, left_of_group, right[:, :, g])
    if matrix.data_ptr() != omega.data_ptr():
        omega.copy_(matrix.view(omega.shape))


def _parts(uses: list[_Use], size: int, count: int) -> Iterator[slice]:
    """Samples at a time: a convolution's columns are several times its input."""
    elements = 0  # of what the products are made from, for all samples
    for use in uses:
        out, *rest = use.layer.weight.shape
        columns = math.prod(rest) * getattr(use.layer, "groups", 1)
        elements += use.outputs.numel() // max(1, out) * max(columns, out)
    step = max(1, CHUNK * size // max(1, elements))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _left(use: _Use, dtype: torch.dtype, size: int, part: slice) -> Tensor:
    """2y by sample and position: [B, T, out]."""
    y, samples = _cut(use.outputs, size, part)
    y = y.to(dtype).clamp(min=0) if use.rectified else y.to(dtype)
    if not isinstance(use.layer, nn.Linear):
        y = _with_batch(y, use.layer).movedim(1, -1)
    return 2 * y.reshape(samples, -1, use.layer.weight.shape[0])


def _right(use: _Use, dtype: torch.dtype, size: int, part: slice) -> Tensor:
    """What each y was computed from, by sample, position and group: [B, T, groups, d]."""
    x, samples = _cut(use.inputs, size, part)
    if isinstance(use.layer, nn.Linear):
        return x.to(dtype).reshape(samples, -1, 1, x.shape[-1])
    columns = _columns(_with_batch(x.to(dtype), use.layer), use.layer)
    return columns.reshape(samples, -1, use.layer.groups, math.prod(use.layer.weight.shape[1:]))


def _cut(tensor: Tensor, size: int, part: slice) -> tuple[Tensor, int]:
    """The rows of some of the samples, and how many samples they are."""
    return (tensor, 1) if size == 1 else (tensor[part], len(range(size)[part]))


def _with_batch(tensor: Tensor, conv: Any) -> Tensor:
    return tensor if tensor.dim() == conv.weight.dim() else tensor.unsqueeze(0)


def _columns(x: Tensor, conv: Any) -> Tensor:
    """The patch under each output position: [B, C, …] → [B, positions…, groups, C/groups, k…]."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    spatial = x.dim() - 2
    for n in range(spatial):
        reach = conv.dilation[n] * (conv.kernel_size[n] - 1) + 1
        x = x.unfold(2 + n, reach, conv.stride[n])[..., :: conv.dilation[n]]
    return x.unflatten(1, (conv.groups, -1)).movedim((1, 2), (1 + spatial, 2 + spatial))


def add_abs_matmul(omega: Tensor, left: Tensor, right: Tensor) -> None:
    r"""Ω[p, d] += Σ_b | Σ_t left[b, t, p] · right[b, t, d] |, in place.

    Args:
        omega: [p, d].
        left: [B, T, p], of Ω's dtype.
        right: [B, T, d], of Ω's dtype.

    Memory: about :data:`CHUNK` elements beside the arguments, whatever B, p and d are.
    """
    samples, positions, _ = left.shape
    if positions == 1:  # |l r| = |l||r|
        omega.addmm_(left[:, 0].abs().T, right[:, 0].abs())
        return
    width = max(1, right.shape[2])
    rows = max(1, CHUNK // width)
    step = max(1, CHUNK // (min(rows, len(omega)) * width)) if len(omega) else 1
    for b in range(0, samples, step):
        for p in range(0, len(omega), rows):
            products = left[b : b + step, :, p : p + rows].mT @ right[b : b + step]
            omega[p : p + rows] += products.abs_().sum(0)
