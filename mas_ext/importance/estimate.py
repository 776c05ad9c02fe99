"""The importance of a model's parameters, by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from mas_ext._distributed.ranks import ProcessGroup
from mas_ext._distributed.shards import Shardings, local_parts
from mas_ext._parameters import ParameterIndex, Selection, select_measurable
from mas_ext._storage.flat_tensors import FlatTensors
from mas_ext.importance.data_parallel import add_importance_
from mas_ext.importance.estimation import SampleStatistics
from mas_ext.importance.options import Measurement, MeasurementOptions
from mas_ext.reference import accumulation_dtype


class Importance(Mapping[str, Tensor]):
    """Ω by parameter name, in float32 (float64 for float64 parameters).

    Of a parameter that is a DTensor, Ω is one that is placed as it is.

    Attributes:
        num_samples: N, how many samples it is the mean of.
        energy: E‖F(x)‖², the objective's mean over them.
        coverage: parameter name → which path computed it; ``"none"`` where none could, and Ω is 0.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], statistics: SampleStatistics, coverage: dict[str, str]
    ) -> None:
        self._tensors = tensors
        self.num_samples = statistics.samples
        self.energy = statistics.mean_energy
        self.coverage = coverage

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Importance({len(self)} parameters, num_samples={self.num_samples})"


def estimate_importance(
    model: nn.Module,
    data: Iterable[Any],
    *,
    params: Selection = None,
    process_group: ProcessGroup = None,
    **options: Unpack[MeasurementOptions],
) -> Importance:
    r"""Measures how sensitive the model's output is to each parameter, without labels.

    .. math:: \Omega_i = \frac{1}{N} \sum_{k=1}^{N}
        \left| \frac{\partial\, \|F(x_k; \theta)\|_2^2}{\partial \theta_i} \right|

    Runs in evaluation mode (in training mode if told to), and leaves modes, gradients,
    ``requires_grad``, buffers and random number generators as they were, also when it fails
    half-way.

    Args:
        model: the network F, which is not changed.
        data: an iterable of batches. A tensor is passed to the model; of a tuple or list the first
            item (labels are never needed); a mapping as keyword arguments, without ``labels`` or
            ``label``. Tensors are moved to the model's device (not with ``forward``). Since random
            numbers are put back, a shuffling DataLoader draws the same order each time, unless it
            has a ``generator`` of its own.
        estimator: ``"per_sample"``, exact, or ``"batch"``, the absolute value of each batch's mean
            gradient weighted by batch size, which loses what cancels within a batch; or
            ``"local"``, the paper's Hebbian variant, one forward pass a batch: of a Linear or Conv
            layer followed by ReLU it takes ‖·‖² of that layer's own output instead of the network's
            (without ReLU, of its linear output). Other parameters get 0, coverage ``"none"``, and
            a warning. Or ``"per_sample_sharded"``, ``"per_sample"`` for a model that
            ``fully_shard`` has cut up and that would not fit one process: one sample a rank and
            pass; with ``forward``, batches of one sample.
        objective: ``"squared_l2"`` ‖F‖², ``"l2"`` ‖F‖, ``"l1"`` Σ|F|, each over all but
            dimension 0, or a callable from the output [B, …] to scalars [B].
        forward: ``callable(model, batch) -> Tensor`` for batches of another form; its output has
            one row a sample. It is given the module inside ``DistributedDataParallel``.
        params: which parameters, of those that require gradients: None for all, names or globs,
            or ``callable(name, parameter) -> bool``.
        max_samples: stop after so many samples, the first ones: shuffle data that is sorted. Of
            several processes each has as many.
        progress: True for a bar (of the first process), or a callable given the number of samples
            done (by this process).
        weighting: of ``"batch"``, what counts the same: ``"samples"``, each batch by its size, or
            ``"batches"``, also a short last one,
            :math:`\Omega_i = \frac1K\sum_{b=1}^K |\frac{1}{B_b}\sum_{k\in b} g_{ki}|`.
        training: measure ``"batch"`` with every module in training mode, as several
            implementations do: of dropout's random networks, and with the batch's own statistics.
            Running statistics are put back. For comparisons (:func:`mas_ext.preset`).
        process_group: the processes that share the data out; None: as the model says. See
            :class:`mas_ext.MAS`.

    Returns:
        Ω, with the number of samples and the path that served each parameter.

    Raises:
        ValueError: no data, no parameters, an output without a sample dimension, or a NaN or Inf,
            naming the parameter.
        TypeError: a batch, output or argument of a kind that cannot be used.

    Source: Aljundi et al., ECCV 2018, equations 1 and 2.
    """
    measurement = Measurement.from_options(options)
    named = select_measurable(ParameterIndex(model).named(), params)
    sums = FlatTensors(local_parts(named), accumulation_dtype)
    statistics, coverage = add_importance_(
        sums,
        model,
        data,
        named,
        measurement,
        process_group=process_group,
        counted=lambda more: None,
    )
    for total in sums.values():
        total.div_(statistics.weight)
    return Importance(Shardings().joined_by(named).placed(sums), statistics, coverage)
