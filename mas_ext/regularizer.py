"""The methods: Memory Aware Synapses, elastic weight consolidation, and L2-SP."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypedDict

from torch import nn
from typing_extensions import Unpack

from mas_ext._distributed.ranks import ProcessGroup
from mas_ext._drift.budget import DriftBudget
from mas_ext._parameters import Selection
from mas_ext._strength.strength import Lambda
from mas_ext.importance.batches import Forward
from mas_ext.importance.loop import check_data
from mas_ext.importance.measurement_checkpoint import MeasurementCheckpoint
from mas_ext.importance.options import Measurement
from mas_ext.quadratic import QuadraticRegularizer


class MAS(QuadraticRegularizer):
    r"""Memory Aware Synapses: keeps the parameters that matter to a network's output near θ*.

    .. math:: L(\theta) = L_\text{new}(\theta)
        + \frac{\lambda}{2}\sum_i \Omega_i (\theta_i - \theta^*_i)^2

    Ω is how sensitive the output was to each parameter when the last task ended, and θ* the
    parameters at that time. Use::

        mas = mas_ext.MAS(model, lambda_reg=1.0)
        mas.attach(optimizer)             # every optimizer.step() includes the penalty
        for task in tasks:
            train(model, optimizer, task)
            mas.consolidate(task)         # labels are not used

    With a drift budget λ need not be chosen::

        mas = mas_ext.MAS(model, budget=0.08)   # nats per prediction, per task
        mas.attach(optimizer, mode="proximal")  # λ follows the measured drift
        for task in tasks:
            train(model, optimizer, task)
            mas.settle()                        # now the drift is at most 0.08
            mas.consolidate(task)

    Until the first :meth:`consolidate` nothing is protected, and the penalty is zero.

    Args:
        model: any module, also one that is compiled, wrapped in ``DistributedDataParallel``,
            sharded by ``fully_shard`` (FSDP2), tensor-parallel, or both.
        lambda_reg: λ ≥ 0, with the ½ of the equation: twice the paper's λ. ``"auto"``: found from
            ``drift`` when a task ends. Or a mapping from name or glob to either; the first pattern
            that matches a parameter counts: ``{"head.*": 0, "*": 1.0}``. None: 1, or with a budget
            ``"auto"``.
        budget: how far a task may change the outputs for earlier tasks: a number, such as 0.08
            nats, or a :class:`mas_ext.DriftBudget`. ``lambda_reg`` is then only the starting value:
            λ is adjusted to the drift, which is measured on a few kept samples of every task, and
            :meth:`settle` enforces the limit. None: λ is not adjusted.
        floor: added to every Ω of a task, as a fraction of their mean, so that no parameter is free
            to move however far. A parameter tensor without any importance at all gets none. None:
            0, or 0.01 with a budget.
        params: which of the parameters that require gradients: None for all; a name or glob, or
            several; or ``callable(name, parameter) -> bool``. Names have no ``module.``,
            ``_orig_mod.`` or ``_checkpoint_wrapped_module.``; tied parameters appear once, under
            their first name.
        merge: how a task's Ω is merged with that of the tasks before: ``"sum"`` (the paper's),
            ``"mean"``, ``"max"``, ``("ema", alpha)``, Ω ← αΩ + (1−α)Ω_task, starting from the first
            task's Ω, or ``("decay", gamma)``, Ω ← γΩ + Ω_task. Two more exist to reproduce other
            implementations (see :func:`mas_ext.preset`): ``("ema_from_zero", alpha)`` starts from Ω
            = 0, which weakens the first task for good; ``"sum_of_sums"`` adds all former merged Ω,
            which doubles the weight of every old task with each new one and keeps 4 more bytes per
            parameter.
        state_dtype: the dtype of Ω between tasks: ``"float32"`` (float64 for float64 parameters),
            ``"bfloat16"``, or ``"uint8"``, 1.02 bytes per parameter (:mod:`mas_ext.precision`).
            Sums are float32 while a task is measured; θ* has the parameters' dtype.
        state_device: where Ω and θ* are kept. None: on the devices of the parameters. ``"cpu"``: in
            host memory, pinned if the parameters are on a CUDA device. Each step that includes the
            penalty then copies them to the device in pieces of 2²⁴ parameters, the next while one
            is computed, so that two pieces are all of them that is ever there; the results are
            the same. Use it with ``mode="proximal"``, which needs them only in every 8th step. Not
            with ``adapters="merged"``. :meth:`consolidate` merges Ω on the CPU.
        drift: ε, for ``lambda_reg="auto"``: by what fraction of the output's energy E‖F(x)‖² a new
            task may change what was learned. Less means more protection. A number, or one per
            pattern whose λ is ``"auto"``.
        adapters: how LoRA adapters of a PEFT model are protected. ``"separate"``: A and B like any
            other parameters. ``"merged"``: their update of the frozen weight W as a whole,
            λ/2 Σ Ω(W + s·BA − θ*)², with the Ω of W, which is measured although W is frozen.
            :meth:`consolidate` must then be called before the training, too. θ* is W itself, of
            which there is no copy, with the adapters at the end of the last task. Names are those
            of the model without adapters, so that Ω may come from there, and a saved state fits
            every model with the same base; it is refused where the base is another. Needs
            ``mode="gradient"``. Not for DoRA and other variants, whose update is not a product;
            Ω of quantized weights must be measured before they are quantized.
        process_group: the processes that share the data, if the model does not say it. None: those
            of ``DistributedDataParallel`` or of ``fully_shard``'s mesh; otherwise each process
            measures by itself.

    With several processes, give each its own samples, as many as it likes or none, and call
    :meth:`update_importance` and :meth:`consolidate` on all; the ranks of one tensor-parallel group
    get the same samples. Ω, the penalty and its gradient are those of one process with all samples.
    Ω and θ* of a DTensor are DTensors with its placements. An error on one rank is raised on all.

    A parameter that stops requiring gradients keeps its Ω and θ* and is left out of the penalty
    until it requires them again; one that starts to is included from the next measurement on. A
    parameter that grew between tasks keeps Ω and θ* of its leading part; the rest has Ω = 0.

    Source: Aljundi et al., ECCV 2018, https://arxiv.org/abs/1711.09601.
    """


class EWC(QuadraticRegularizer):
    r"""Elastic weight consolidation: keeps the parameters that matter to the predictions near θ*.

    .. math:: L(\theta) = L_\text{new}(\theta)
        + \frac{\lambda}{2}\sum_i F_i (\theta_i - \theta^*_i)^2
        \qquad F_i = \frac1N \sum_{k=1}^N E_{y \sim p(y|x_k)}
        \left(\frac{\partial \log p(y|x_k)}{\partial\theta_i}\right)^2

    F is the diagonal of the Fisher information, from the square of every sample's own gradient.
    Everything else is as in :class:`mas_ext.MAS`, by whose equation F is Ω::

        ewc = mas_ext.EWC(model, budget=0.08)
        ewc.attach(optimizer, mode="proximal")
        for task in tasks:
            train(model, optimizer, task)
            ewc.settle()
            ewc.consolidate(task)   # labels are drawn from the model

    ``consolidate`` and ``update_importance`` take the options of
    :func:`mas_ext.estimate_importance`. By default ``criterion="fisher"`` draws one label per
    sample from the model. ``"exact_fisher"`` goes through all classes, which takes a backward pass
    for each; ``"empirical_fisher"`` uses the labels in the data. Whatever the criterion, gradients
    are squared, unless you pass ``reduction="abs"``.

    Args:
        model, params, budget, floor, state_dtype, state_device, adapters, process_group: see
            :class:`mas_ext.MAS`.
        lambda_reg: λ ≥ 0, with the ½ of the equation, or a mapping from name or glob to numbers.
            None: 1, or with a budget ``"auto"``: found from the mean of F, and then adjusted.
        merge: see :class:`mas_ext.MAS`. ``"sum"`` is Kirkpatrick's, with one θ* for all tasks;
            ``("decay", gamma)``, F ← γF + F_task, is online EWC (Schwarz et al., ICML 2018).

    Source: Kirkpatrick et al., PNAS 2017, https://arxiv.org/abs/1612.00796.
    """

    method: ClassVar[str] = "EWC"
    defaults: ClassVar[Mapping[str, Any]] = {"criterion": "fisher", "reduction": "square"}

    def __init__(
        self,
        model: nn.Module,
        lambda_reg: Lambda | None = None,
        *,
        budget: float | DriftBudget | None = None,
        floor: float | None = None,
        params: Selection = None,
        merge: str | tuple[str, float] = "sum",
        state_dtype: str = "float32",
        state_device: str | None = None,
        adapters: str = "separate",
        process_group: ProcessGroup = None,
    ) -> None:
        super().__init__(
            model,
            lambda_reg,
            budget=budget,
            floor=floor,
            params=params,
            merge=merge,
            state_dtype=state_dtype,
            state_device=state_device,
            adapters=adapters,
            process_group=process_group,
        )


class ReferenceOptions(TypedDict, total=False):
    """How :class:`L2SP` reads data, of which it keeps references for a drift budget.

    Attributes:
        forward: as for :func:`mas_ext.estimate_importance`.
        max_samples: read at most the batches with this many samples. None (default): all.
    """

    forward: Forward | None
    max_samples: int | None


class L2SP(QuadraticRegularizer):
    r"""L2-SP: keeps all parameters near θ*, the starting point of the present task.

    .. math:: L(\theta) = L_\text{new}(\theta)
        + \frac{\lambda}{2}\sum_i (\theta_i - \theta^*_i)^2

    Ω is 1, and nothing is measured: :meth:`consolidate` takes θ* ← θ. It reads data only under a
    drift budget, to keep references. Everything else is as in :class:`mas_ext.MAS`; settling is
    interpolation between the new and the old parameters.

    Args:
        model, params, budget, state_device, adapters, process_group: see :class:`mas_ext.MAS`.
        lambda_reg: λ ≥ 0, with the ½ of the equation, or a mapping from name or glob to numbers.
            None: 1, or with a budget ``"auto"``: begins with a constant and is then adjusted.

    Source: Li et al., ICML 2018, https://arxiv.org/abs/1802.01483.
    """

    method: ClassVar[str] = "L2SP"
    options: ClassVar[type] = ReferenceOptions

    def __init__(
        self,
        model: nn.Module,
        lambda_reg: Lambda | None = None,
        *,
        budget: float | DriftBudget | None = None,
        params: Selection = None,
        state_device: str | None = None,
        adapters: str = "separate",
        process_group: ProcessGroup = None,
    ) -> None:
        super().__init__(
            model,
            lambda_reg,
            budget=budget,
            floor=0.0,
            params=params,
            merge="max",  # of ones
            state_dtype="uint8",  # in which 1 is exact
            state_device=state_device,
            adapters=adapters,
            process_group=process_group,
        )

    def consolidate(  # type: ignore[override]  # no options of a measurement
        self,
        data: Iterable[Any] | None = None,
        *,
        reference: Iterable[Any] | None = None,
        **options: Unpack[ReferenceOptions],
    ) -> None:
        """Ends a task: takes θ* ← θ.

        Args:
            data: under a drift budget, batches to keep references of; otherwise they are not read.
            reference: as for :meth:`mas_ext.MAS.consolidate`.
            options: ``forward`` and ``max_samples``, see :class:`ReferenceOptions`.
        """
        super().consolidate(() if data is None else data, reference=reference, **options)

    def _measure(self, data: Iterable[Any], measurement: Measurement) -> MeasurementCheckpoint:
        """Counts 1 for every parameter."""
        measurement.check()
        check_data(data)
        state = self._state
        state.begin_measurement("none", predicts=self.budget is not None)
        named = self._measurable()
        task = state.task.with_room_for(state.local(named))
        sampled = self._sampled(data, measurement)
        if sampled is not data:
            self._keep_references(sampled, measurement.sample_limit)
        for name in named:
            task.sums[name].fill_(1.0)
            task.counts[name] = 1
        state.task = task
        return MeasurementCheckpoint()

    def _keep_references(self, sampled: Iterable[Any], limit: int) -> None:
        """Reads the data, of which the sampler keeps some."""
        sampler = self._state.drift.sampler
        assert sampler is not None
        before = sampler.samples
        for _ in sampled:
            if sampler.samples - before >= limit:
                break


METHODS: dict[str, type[QuadraticRegularizer]] = {"mas": MAS, "ewc": EWC, "l2sp": L2SP}


def method_of(method: str | type[QuadraticRegularizer]) -> type[QuadraticRegularizer]:
    """The class that a name stands for, or the class itself.

    Raises:
        ValueError: an unknown name.
        TypeError: another class.
    """
    if isinstance(method, str):
        if method not in METHODS:
            names = ", ".join(map(repr, METHODS))
            raise ValueError(f"method: {method!r} is unknown; use {names} or a class")
        return METHODS[method]
    if not (isinstance(method, type) and issubclass(method, QuadraticRegularizer)):
        raise TypeError(f"method is {method!r}; pass a name, or mas_ext.MAS, EWC or L2SP")
    return method
