r"""The paper's local variant: Ω of a layer from its inputs and outputs, without gradients.

The objective of each layer is the squared length of its own output rather than the network's. For
a linear layer followed by ReLU, :math:`y = \mathrm{ReLU}(Wx + b)`, applied at a single position,

.. math:: \Omega_{ji} = \frac{1}{N} \sum_k \left|\frac{\partial \|y_k\|_2^2}{\partial W_{ji}}\right|
    = \frac{1}{N} \sum_k 2\, y_{kj}\, |x_{ki}|, \qquad \Omega_j = \frac{1}{N} \sum_k 2\, y_{kj}

for the weight and the bias. This is Hebb's rule: the weight between neurons that are active
together is important. If a sample has several positions (sequences, convolutions), the sum over
positions is taken before the absolute value, :math:`|\sum_t 2\, y_t x_t^\top|`, and so is the sum
over several calls of the same layer.

Source: Aljundi et al., ECCV 2018, section 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from mas_ext._warnings import warn
from mas_ext.importance.batches import Batch, Inputs
from mas_ext.importance.contributions import (
    Contribution,
    MatrixProduct,
)
from mas_ext.importance.estimation import Estimation
from mas_ext.importance.layer_calls import LayerCall, LayerCallRecorder
from mas_ext.importance.options import Measurement
from mas_ext.importance.reductions import Reduction

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Local:
    r"""Adds :math:`\sum_k |\partial \|y_k\|^2 / \partial\theta|`, with y the output of θ's layer.

    If a ReLU directly follows the layer (``nn.ReLU``, ``relu``, ``clamp(min=0)``, in place or not),
    y is the output of the ReLU. Otherwise, for instance before a normalisation or GELU, y is the
    layer's linear output. Each batch takes one forward pass without an autograd graph. The inputs
    and outputs of all layers stay in memory until the pass has ended, as in training.

    Only the weight and bias of Linear and Conv layers that are called as modules are measured. Any
    other use of such a weight, as in an embedding tied to the last layer, adds nothing.

    Raises:
        ValueError: an objective was chosen, the model is tensor-parallel, or no measured parameter
            belongs to a Linear or Conv layer.
    """

    def __init__(self, estimation: Estimation) -> None:
        _check_criterion(estimation.measurement)
        if estimation.is_tensor_parallel:
            raise ValueError(
                "estimator='local' is not available for a tensor-parallel model, of whose layers "
                "this process sees only a part; use estimator='per_sample'"
            )
        self._estimation = estimation
        self._names = {id(p): name for name, p in estimation.params.items()}
        self._layers = [
            module
            for module in estimation.model.modules()
            if _is_layer(module) and any(id(p) in self._names for p in _own(module))
        ]
        # Whether dimension 0 of every layer's input is the sample; None if not yet known.
        self._samples_first: bool | None = None
        if not self._layers:
            raise ValueError(
                "estimator='local' is defined for Linear and Conv layers, and no parameter that "
                "is measured belongs to one; use estimator='per_sample'"
            )

    def add_batch(self, batch: Batch, limit: int) -> Tensor:
        """One forward pass, or one per sample if a layer's rows are not the samples."""
        with torch.no_grad(), _not_fused():
            if isinstance(batch, Inputs):
                return self._add_inputs(batch)
            return self._add_custom_batch(batch, limit)

    def finish(self) -> None:
        """Records the parameters that no pass has measured, and warns about them."""
        estimation = self._estimation
        left_out = [name for name in estimation.params if name not in estimation.coverage]
        if len(left_out) == len(estimation.params):
            raise ValueError(
                "estimator='local': none of the Linear and Conv layers that are measured was "
                "called as a module by the forward; use estimator='per_sample'"
            )
        estimation.record_paths(dict.fromkeys(left_out, "none"))
        if left_out:
            some = ", ".join(left_out[:5]) + (", …" if len(left_out) > 5 else "")
            warn(
                "estimator='local' is defined for Linear and Conv layers that are called as "
                f"modules: {len(left_out)} of {len(estimation.params)} parameters ({some}) are of "
                "no such layer; their importance is 0 and they are left unprotected. "
                "estimator='per_sample' measures them"
            )

    # -- which rows belong to a sample -----------------------------------------------------------

    def _add_inputs(self, inputs: Inputs) -> Tensor:
        size = inputs.size()
        if size > 1 and self._samples_first is None:
            # A single sample must be one row in every layer; it is not if time comes first or if
            # positions are among the rows. The shapes of the whole batch would not show this if
            # there are as many positions as samples.
            alone, _ = self._recorded(inputs.take([0], size))
            self._samples_first = all(call.rows == 1 for call in alone)
        if size == 1 or self._samples_first:
            calls, every = self._recorded(inputs)
            if size == 1 or all(call.rows == size for call in calls):
                self._add(calls, size)
                return every
        scalars = [self._add_one_by_one(inputs.take([k], size)) for k in range(size)]
        return torch.cat(scalars) if scalars else torch.empty(0, device="cpu")

    def _add_one_by_one(self, sample: Inputs) -> Tensor:
        calls, scalars = self._recorded(sample)
        self._add(calls, 1)
        return scalars

    def _add_custom_batch(self, batch: Batch, limit: int) -> Tensor:
        """Requires dimension 0 to be the sample: how to split a custom batch is not known."""
        calls, scalars = self._recorded(batch)
        size = len(scalars)
        wrong = [call for call in calls if size > 1 and call.rows != size]
        if wrong:
            name = next(self._names[id(p)] for p in _own(wrong[0].layer) if id(p) in self._names)
            raise ValueError(
                f"the layer of parameter {name!r} got an input of shape "
                f"{list(wrong[0].inputs.shape)} for {size} samples; with forward= and "
                "estimator='local' its dimension 0 must be the sample: yield batches of one sample"
            )
        if size > limit:
            for call in calls:
                call.inputs, call.outputs = call.inputs[:limit], call.outputs[:limit]
        self._add(calls, min(size, limit))
        return scalars[:limit]

    def _recorded(self, batch: Batch) -> tuple[list[LayerCall], Tensor]:
        """Runs a forward pass; returns the layers' calls, and ‖F‖² of each sample."""
        with ExitStack() as stack:
            recorder = stack.enter_context(LayerCallRecorder())
            for layer in self._layers:
                # Before all other hooks, since a user's hook may replace the output.
                handle = layer.register_forward_hook(
                    recorder.record, prepend=True, with_kwargs=True
                )
                stack.callback(handle.remove)
            returned = batch.forward(self._estimation.model)
        output = self._estimation.output_in(returned, batch)
        return recorder.calls, self._estimation.scalars_of(output, batch)

    # -- from inputs and outputs to Ω ------------------------------------------------------------

    def _add(self, calls: list[LayerCall], size: int) -> None:
        """Adds ``size`` samples. If there is only one, all rows belong to it."""
        reduction = self._estimation.reduction
        weights: dict[str, list[LayerCall]] = {}
        biases: dict[str, list[LayerCall]] = {}
        for call in calls if size else []:
            for param, found in ((call.layer.weight, weights), (call.layer.bias, biases)):
                if id(param) in self._names:
                    found.setdefault(self._names[id(param)], []).append(call)
        for name, used in weights.items():
            with torch.autocast(used[0].outputs.device.type, enabled=False):
                _add(self._estimation.sums[name], [call.product(size) for call in used], reduction)
        for name, used in biases.items():
            total = torch.stack([call.gradient(size).sum(1) for call in used]).sum(0)
            self._estimation.sums[name].add_(reduction.of(total).sum(0))
        self._estimation.record_paths(dict.fromkeys([*weights, *biases], "local"))


def _check_criterion(measurement: Measurement) -> None:
    """Raises ValueError if one was chosen, since each layer's ‖y‖² is differentiated instead."""
    for name, default in (("objective", "squared_l2"), ("criterion", "mas")):
        value = getattr(measurement, name)
        if value != default:
            raise ValueError(
                f"{name} is {value!r}, but estimator='local' has one of its own, the squared "
                f"length of each layer's output; leave {name} out, or use estimator='per_sample'"
            )


def _is_layer(module: nn.Module) -> bool:
    """Whether a module computes Wx + b. A subclass with its own ``forward`` may not."""
    return any(isinstance(module, k) and type(module).forward is k.forward for k in LAYERS)


def _own(module: nn.Module) -> Iterator[nn.Parameter | None]:
    """The parameters that the module itself holds, without those of a parametrization."""
    return iter(module._parameters.values())


@contextmanager
def _not_fused() -> Iterator[None]:
    """Disables the fused transformer layer, which calls no hooks."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _add(omega: Tensor, parts: list[Contribution], reduction: Reduction) -> None:
    """Ω += Σ_k f(Σ_c M_kc), where c runs over the calls of one weight."""
    products = [part for part in parts if isinstance(part, MatrixProduct)]
    if len(products) == len(parts):
        MatrixProduct.joined(products).accumulate_(omega, reduction)
    elif len(parts) == 1:
        parts[0].accumulate_(omega, reduction)
    else:
        for values in zip(*(part.samples() for part in parts), strict=True):
            reduction.add_([omega], [torch.stack(values).sum(0)])
