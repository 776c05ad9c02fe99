"""Measures the importance of a model's parameters and returns it by parameter name."""

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
from mas_ext.importance.loop import Measured
from mas_ext.importance.options import Measurement, MeasurementOptions
from mas_ext.reference import accumulation_dtype


class Importance(Mapping[str, Tensor]):
    """A mapping from parameter name to Ω, in float32 (float64 for float64 parameters).

    Each Ω has the shape of its parameter. For a DTensor parameter, Ω is a DTensor with the same
    placements.

    Attributes:
        num_samples: N, the number of samples that Ω is the mean over.
        energy: the mean over these samples of what was differentiated: E‖F(x)‖² for ``"mas"``;
            for the Fisher criteria, the mean of −log p(y|x).
        coverage: parameter name → the path that computed its Ω; ``"none"`` if no path could, in
            which case Ω is 0.
        outputs: which of the model's outputs were measured: ``("output",)`` for a model that
            returns a tensor, otherwise ``("output.logits",)``, ``("output[0]", "output[1]")`` and
            the like.
    """

    def __init__(self, tensors: Mapping[str, Tensor], measured: Measured) -> None:
        self._tensors = tensors
        self.num_samples = measured.statistics.samples
        self.energy = measured.statistics.mean_energy
        self.coverage = measured.coverage
        self.outputs = measured.outputs

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
    r"""Measures how much each parameter matters, from every sample's own gradient.

    .. math:: \Omega_i = \frac{1}{N} \sum_{k=1}^{N}
        \left| \frac{\partial\, \|F(x_k; \theta)\|_2^2}{\partial \theta_i} \right|

    With another ``criterion``, another scalar :math:`s_k` takes the place of ``‖F‖²``, and with
    another ``reduction`` the square takes the place of the absolute value: the diagonal of the
    Fisher information, for instance, is
    :math:`\frac1N\sum_k E_{y\sim p(y|x_k)}(\partial\log p(y|x_k)/\partial\theta_i)^2`.

    The measurement runs in evaluation mode (or in training mode, with ``training=True``). Module
    modes, gradients, ``requires_grad``, buffers and random number generators are restored at the
    end, and also after an error.

    F(x) is the tensor that the model returns. If the model returns an object or mapping with
    ``logits`` (or ``last_hidden_state``), only that field is measured; if it returns another tuple,
    list or mapping, all floating-point tensors with one row per sample are, side by side.
    ``Importance.outputs`` says which were measured; to choose others, pass ``forward``.

    Args:
        model: the network F, which is not changed.
        data: an iterable of batches. A batch may be a tensor, which is passed to the model; a tuple
            or list, whose first item is passed; or a mapping, which is passed as keyword arguments
            without ``labels`` and ``label``. Labels, which only ``"empirical_fisher"`` needs, are
            these, or the second of two items. Tensors are moved to the
            model's device, unless you pass ``forward``. Because random states are restored, a
            shuffling DataLoader draws the same order in every measurement, unless it has a
            ``generator`` of its own.
        estimator: how Ω is computed.

            - ``"per_sample"`` (default) is exact.
            - ``"batch"`` reduces each batch's mean gradient, weighted by batch size. Gradients of
              opposite sign cancel within a batch, so Ω is too small.
            - ``"local"`` is the paper's Hebbian variant and needs only one forward pass per batch.
              For a Linear or Conv layer followed by ReLU, it uses ‖·‖² of that layer's own output
              in place of the network's (of the linear output, if no ReLU follows). All other
              parameters get Ω = 0, coverage ``"none"``, and a warning.
            - ``"per_sample_sharded"`` is ``"per_sample"`` for a model that was sharded by
              ``fully_shard`` and does not fit in one process. Each pass measures one sample per
              rank. With ``forward``, yield batches of one sample.
        criterion: the scalar per sample that is differentiated.

            - ``"mas"`` (default): ``objective``, a function of the output alone.
            - ``"fisher"``: −log p(y|x), with labels y drawn from the model's own probabilities. Its
              square is an unbiased estimate of the Fisher information's diagonal.
            - ``"exact_fisher"``: the same for each class, weighted by its probability. Takes one
              backward pass per class, and one prediction per sample.
            - ``"empirical_fisher"``: −log p(y|x), with the labels in the data.
            - ``"gauss_newton"``: vᵀF(x), with v of standard normal numbers. Its square is an
              unbiased estimate of the diagonal of E[JᵀJ], the Gauss–Newton matrix of ½‖F − y‖²,
              for outputs that are not logits.
            - ``callable(output, batch) -> [B]``, where ``batch`` is what ``data`` yielded, on the
              model's device.

            Logits have their classes in the last dimension, [B, C] or [B, T, C], and in dimension 1
            of images, [B, C, H, W]; transpose [B, C, T] with ``forward``. A sample is a row of the
            batch: a sequence's log-probabilities are summed over its predictions, without those
            whose label is −100 or, where there are no labels, whose ``attention_mask`` is 0. Of
            causal language models of transformers, each position predicts the next token's label.
        reduction: how each sample's gradient g counts: ``"abs"``, :math:`|g|`, or ``"square"``,
            :math:`g^2`. None: ``"abs"`` for ``"mas"`` and callables, ``"square"`` for the others.
        objective: for ``criterion="mas"``: ``"squared_l2"`` (‖F‖², default), ``"l2"`` (‖F‖) or
            ``"l1"`` (Σ|F|), each over all dimensions but the first; ``"probabilities"``
            (‖softmax F‖²); or a callable from the output [B, …] to scalars [B]. Of several outputs
            it gets the rows side by side.
        draws: how many labels, or v, to draw per sample; each takes a backward pass. The error of
            a Fisher information falls as 1/√draws, and as 1/√N.
        seed: of these draws. They depend on the seed, the number of the process and the position
            of the batch in the data, so also on the batch size. PyTorch's generators stay as they
            are.
        forward: ``callable(model, batch) -> Tensor``, for batches that the model cannot take as
            they are. It gets the model (the inner module, if the model is wrapped in
            ``DistributedDataParallel``) and a batch as ``data`` yielded it, and must return the
            floating-point output tensor [B, …] with one row per sample, connected to the
            parameters by autograd.
        params: the parameters to measure, among those that require gradients: None for all, a name
            or glob or several, or ``callable(name, parameter) -> bool``.
        max_samples: stop after this many samples. The first ones are used, so shuffle data that is
            sorted. With several processes, the limit holds for each of them.
        progress: True for a progress bar (on the first process), or a callable that is given the
            number of samples that this process has measured.
        weighting: for ``"batch"``, what counts equally: ``"samples"`` (each batch counts by its
            size) or ``"batches"`` (a short last batch counts as much as the others),
            :math:`\Omega_i = \frac1K\sum_{b=1}^K |\frac{1}{B_b}\sum_{k\in b} g_{ki}|`.
        training: for ``"batch"``, whether to measure with every module in training mode, as several
            other implementations do. Dropout is then active, and batch normalisation uses the
            batch's statistics; running statistics are restored. Meant for comparisons
            (:func:`mas_ext.preset`).
        process_group: the processes among which the data is divided. None: the group that the
            model was wrapped or sharded with. See :class:`mas_ext.MAS`.

    Returns:
        Ω by parameter name, with the number of samples and the path that computed each parameter.

    Raises:
        ValueError: there is no data or no parameter to measure, the output has no sample dimension,
            importance per sample is not defined for the model, or a value is NaN or Inf (the
            message names the parameter).
        TypeError: a batch, the model's output or an argument has an unsupported type.

    Sources: Aljundi et al., ECCV 2018, equations 1 and 2; for the Fisher information, Kirkpatrick
    et al., PNAS 2017; on how its empirical form differs from it, Kunstner et al., NeurIPS 2019.
    """
    measurement = Measurement.from_options(options)
    named = select_measurable(ParameterIndex(model).named(), params)
    sums = FlatTensors(local_parts(named), accumulation_dtype)
    measured = add_importance_(
        sums,
        model,
        data,
        named,
        measurement,
        process_group=process_group,
        counted=lambda more: None,
    )
    for total in sums.values():
        total.div_(measured.statistics.weight)
    return Importance(Shardings().joined_by(named).placed(sums), measured)
