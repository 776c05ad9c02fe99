"""What all methods share: a quadratic penalty around the parameters that earlier tasks left.

The work is done in ``importance``, ``_state``, ``_penalty`` and ``_drift``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from mas_ext._adapters.lora import MergedIndex
from mas_ext._distributed.ranks import ProcessGroup
from mas_ext._distributed.topology import check_process_group
from mas_ext._drift.budget import DriftBudget, check_count, check_limit
from mas_ext._drift.references import References
from mas_ext._drift.settling import Settled, check_weights, mean_loss
from mas_ext._drift.tracker import DriftRecord, DriftTracker
from mas_ext._parameters import (
    ParameterIndex,
    Selection,
    reusable,
    select,
    select_measurable,
    select_some,
)
from mas_ext._penalty.attachment import Attachment, unwrapped
from mas_ext._penalty.parameter_groups import Scalar
from mas_ext._penalty.protected_parameters import ProtectedParameters
from mas_ext._penalty.weight_updates import Anchors
from mas_ext._state import checkpoint
from mas_ext._state.importance_state import ImportanceState, check_state_device
from mas_ext._state.merging import check_merge
from mas_ext._state.regularizer_state import RegularizerState
from mas_ext._state.task_accumulator import FLOOR, check_floor
from mas_ext._strength.auto import DEFAULT_DRIFT
from mas_ext._strength.strength import AUTO, Drift, Lambda, RegularizationStrength
from mas_ext.importance import add_importance_
from mas_ext.importance.batches import Forward
from mas_ext.importance.estimation import UNREACHED, SampleStatistics
from mas_ext.importance.measurement_checkpoint import MeasurementCheckpoint, make_checkpoint
from mas_ext.importance.options import (
    CheckpointedMeasurementOptions,
    Measurement,
    check_weighting,
)
from mas_ext.precision import check_state_dtype


class QuadraticRegularizer:
    r"""Base class of :class:`mas_ext.MAS`, :class:`mas_ext.EWC` and :class:`mas_ext.L2SP`.

    .. math:: \frac{\lambda}{2}\sum_i \Omega_i (\theta_i - \theta^*_i)^2

    They differ in how Ω is measured. See :class:`mas_ext.MAS` for the arguments.
    """

    #: The method's name in a saved state.
    method: ClassVar[str] = "MAS"
    #: The options of ``consolidate``, and those by which the method differs from the defaults.
    options: ClassVar[type] = CheckpointedMeasurementOptions
    defaults: ClassVar[Mapping[str, Any]] = {}

    _budget: DriftBudget | None = None  # of an instance that an earlier mas_ext has pickled

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
        drift: Drift = DEFAULT_DRIFT,
        adapters: str = "separate",
        process_group: ProcessGroup = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                "model is a ScriptModule, whose inside autograd does not show; pass "
                "the module that it was made from"
            )
        self._params = reusable(params)
        self._budget = DriftBudget.of(budget)
        if lambda_reg is None:
            lambda_reg = 1.0 if self._budget is None else AUTO
        if floor is None:
            floor = 0.0 if self._budget is None else FLOOR
        if check_state_device(state_device) is not None and adapters == "merged":
            raise ValueError(
                'state_device: with adapters="merged" Ω must be beside the adapters; leave '
                'state_device out, or use adapters="separate"'
            )
        consolidated = ImportanceState(check_state_dtype(state_dtype), state_device)
        strength = RegularizationStrength(lambda_reg, drift)
        group = check_process_group(process_group)
        #: The parameters that the penalty is over; :mod:`mas_ext.optim` works on the same object.
        self.protected = ProtectedParameters(
            _index(model, adapters),
            RegularizerState(
                consolidated,
                strength,
                check_merge(merge),
                method=self.method,
                floor=check_floor(floor),
            ),
            None if self._budget is None else DriftTracker(self._budget, group),
        )
        self._use_strength(strength)
        self._process_group = group
        select_some(self._named(), self._params, self.protected.index.adapted)

    def __repr__(self) -> str:
        state = self._state
        return (
            f"{type(self).__name__}(lambda_reg={state.strength!r}, merge={state.merge!r}, "
            f"state_dtype={state.state_dtype!r}, tasks={state.num_tasks}, "
            f"parameters={len(state.consolidated.anchor)})"
        )

    @property
    def _state(self) -> RegularizerState:
        return self.protected.state

    def _named(self) -> Mapping[str, nn.Parameter]:
        return self.protected.index.named()

    def _selected(self) -> dict[str, nn.Parameter]:
        return select(self._named(), self._params, self.protected.index.adapted)

    # -- properties --------------------------------------------------------------------------------

    @property
    def lambda_reg(self) -> float | str | dict[str, float | str]:
        """λ, or λ by name or glob; may be set at any time, as a whole.

        Where λ is ``"auto"``, the number that was found; ``"auto"`` before the first task ends.
        """
        return self._state.strength.numbers("gradient")

    @lambda_reg.setter
    def lambda_reg(self, value: Lambda) -> None:
        drift = self.drift
        if isinstance(drift, dict):
            automatic = value if isinstance(value, Mapping) else {}
            kept = drift.keys() == {name for name, one in automatic.items() if one == "auto"}
            drift = drift if kept else DEFAULT_DRIFT
        self._use_strength(RegularizationStrength(value, drift))

    @property
    def lambda_proximal(self) -> float | str | dict[str, float | str]:
        """λ of a proximal step after an optimizer that normalizes its updates, such as Adam.

        Differs from ``lambda_reg`` only where λ is ``"auto"``: gradients and normalized updates
        push the parameters by different amounts.
        """
        return self._state.strength.numbers("normalized")

    @property
    def drift(self) -> float | dict[str, float]:
        """ε, or ε by glob; may be set at any time, and λ follows."""
        drift = self._state.strength.drift
        return drift if isinstance(drift, float) else dict(drift)

    @drift.setter
    def drift(self, value: Drift) -> None:
        self._use_strength(RegularizationStrength(self._state.strength.value, value))

    def _use_strength(self, strength: RegularizationStrength) -> None:
        self.protected.follow_steps()  # with the λ that they were taken under
        self._state.use_strength(
            strength, self._named(), self._selected(), predicts=self._budget is not None
        )

    @property
    def state_dtype(self) -> str:
        """The name of the dtype that Ω is stored in."""
        return self._state.state_dtype

    @property
    def state_device(self) -> str | None:
        """``"cpu"`` if Ω and θ* are in host memory; None if they are beside the parameters."""
        return self._state.state_device

    @property
    def num_tasks(self) -> int:
        """How many tasks have been consolidated."""
        return self._state.num_tasks

    @property
    def importance(self) -> Mapping[str, Tensor]:
        """Ω of the consolidated tasks by parameter name; empty before the first.

        The tensors are views; with ``state_dtype="uint8"`` they are float32 copies.
        """
        return self._state.shardings.placed(self._state.consolidated.importance)

    @property
    def anchor(self) -> Mapping[str, Tensor]:
        """Views of θ* by parameter name; empty before the first task is consolidated."""
        anchor = self._state.shardings.placed(self._state.consolidated.anchor)
        updates = self.protected.updates()
        return Anchors(anchor, updates) if updates else anchor

    # -- measuring ---------------------------------------------------------------------------------

    def update_importance(
        self, data: Iterable[Any], **options: Unpack[CheckpointedMeasurementOptions]
    ) -> None:
        """Adds to the current task's Ω from data; θ* and the penalty stay.

        Call it as often as you want, during training or in deployment: every sample counts the
        same, and :meth:`consolidate` ends the task. After an error everything is as it was.

        Args:
            data: as for :func:`mas_ext.estimate_importance`.
            options: the arguments of :func:`mas_ext.estimate_importance` (``estimator``,
                ``criterion``, ``objective``, ``forward``, ``max_samples`` and so on), and
                ``checkpoint`` and ``save_every``:
            checkpoint: a file that the measurement is saved to while it runs; with several
                processes each has its own, with ``.rankN`` appended. If the process is killed, call
                again with the same model, state, data and arguments: the measurement continues
                after the last batch that was saved, and the result is bitwise identical. The file
                is removed when the measurement ends. PyTorch's random state is saved too, so a
                shuffling DataLoader repeats its order; other data must repeat by itself.
            save_every: the number of samples between two writes of the file, which holds 4 bytes
                per parameter. Default: 10,000.
        """
        measurement = self._measurement(options)
        self.protected.follow_steps()
        with self._state.unchanged_after_an_error():
            saved = self._measure(data, measurement)
        saved.remove()

    def consolidate(
        self,
        data: Iterable[Any] | None = None,
        *,
        reference: Iterable[Any] | None = None,
        **options: Unpack[CheckpointedMeasurementOptions],
    ) -> None:
        """Ends a task: measures ``data`` if given, merges the task's Ω, and takes θ* ← θ.

        Args:
            data: as for :func:`mas_ext.estimate_importance`.
            reference: batches to measure the drift of later tasks on, in the form of ``data``; None
                keeps samples of ``data``. On data that the model was trained on
                the drift is often smaller than on new data, so pass some that was held out if there
                is enough.
            options: as for :meth:`update_importance`.

        Raises:
            RuntimeError: there is no data, and nothing was measured since the last task.
            ValueError: ``reference`` without a drift budget.

        Warns if the task has drifted beyond the budget; if :meth:`attach` was called but no step
        has included the penalty since the last task ended, although protected parameters moved;
        and, once for each parameter, if no measured output depends on it.
        """
        measurement = self._measurement(options)
        if reference is not None and self._tracker().budget.reference is not None:
            raise ValueError("reference: the budget has references already; leave one of them out")
        self.protected.follow_steps()
        self.protected.warn_if_never_applied()
        if self.protected.tracker is not None:
            self.protected.tracker.warn_if_over(self.protected)
        with self._state.unchanged_after_an_error():
            saved = MeasurementCheckpoint() if data is None else self._measure(data, measurement)
            self.protected.warn_of_no_importance()
            references = self._next_references(reference, measurement.forward)
            self._state.end_task(self._named(), self._selected(), self.protected.index.adapted)
        self._state.begin_task(references)
        self.protected.has_acted = False
        self.protected.forget_groups()
        saved.remove()

    def _measurement(self, options: Mapping[str, Any]) -> Measurement:
        """The options of one call, over those of the method."""
        return Measurement.from_options({**self.defaults, **options}, self.options)

    def _measure(self, data: Iterable[Any], measurement: Measurement) -> MeasurementCheckpoint:
        """Adds to the task's sums batch by batch, so a state saved between two is complete.

        With several processes all add at once, when all have finished.
        """
        state = self._state
        state.begin_measurement(measurement.reduction_name, predicts=self._budget is not None)
        measurement = replace(measurement, samples_before=state.task.statistics.samples)
        saved = make_checkpoint(measurement, state.num_tasks, state.task.counts)
        named = self._measurable()
        task = state.task.with_room_for(state.local(named), check_weighting(measurement.weighting))

        def counted(more: SampleStatistics) -> None:
            task.count(named, more)
            state.task = task

        with self.protected.index.measurable():
            measured = add_importance_(
                {name: task.sums[name] for name in named},
                self.protected.index.model,
                self._sampled(data, measurement),
                named,
                measurement,
                counted=counted,
                process_group=self._process_group,
                checkpoint=saved,
            )
        state.task.unreached = [n for n, path in measured.coverage.items() if path == UNREACHED]
        return saved

    def _measurable(self) -> dict[str, nn.Parameter]:
        """The parameters that are measured, by name."""
        return select_measurable(self._named(), self._params, self.protected.index.adapted)

    def _sampled(self, data: Iterable[Any], measurement: Measurement) -> Iterable[Any]:
        """The data, of which references are kept when they are read; under a drift budget only."""
        tracker, state = self.protected.tracker, self._state
        if tracker is None or tracker.budget.reference is not None:
            return data
        sampler = state.drift.sampler
        state.drift.sampler = (
            tracker.sampler(self.protected.index.model, state.num_tasks, measurement.forward)
            if sampler is None
            else sampler.copy()
        )
        state.drift.sampler.forward = tracker.budget.forward or measurement.forward
        return state.drift.sampler.watch(data)

    def _next_references(
        self, own: Iterable[Any] | None, forward: Forward | None
    ) -> References | None:
        """What the drift of the next task is measured on; None without a drift budget."""
        tracker = self.protected.tracker
        if tracker is None:
            return None
        return tracker.references(self.protected.index.model, self._state, own, forward)

    # -- the drift ---------------------------------------------------------------------------------

    @property
    def budget(self) -> DriftBudget | None:
        """The drift budget; None if there is none."""
        return self._budget

    @property
    def drift_trace(self) -> list[DriftRecord]:
        """A record of every measurement of the drift during training."""
        return [] if self.protected.tracker is None else list(self.protected.tracker.trace)

    def drift_measured(self) -> float:
        """How far the outputs for the references have moved since the present task began.

        Not to be confused with ``drift``, from which ``lambda_reg="auto"`` predicts λ before
        training: this is measured, in the unit of the budget's metric.

        Returns:
            The mean over all references, nats per prediction for ``"kl"``; Inf if an output is not
            finite; 0 before the first :meth:`consolidate`. With several processes, call it on all.

        Raises:
            ValueError: there is no budget.
        """
        tracker = self._tracker()
        self.protected.follow_steps()
        return tracker.measured(self.protected)

    def drift_loss(self, samples: int | None = None) -> Tensor:
        r"""The drift on some of the references, differentiable: to add to the loss.

        .. math:: L_\text{new}(\theta) + w\,E[\mathrm{KL}(p_\text{before} \Vert p_\theta)]

        A penalty holds the parameters; this term holds what the model says, and leaves the
        parameters free (Buzzega et al., *Dark experience for general continual learning*, NeurIPS
        2020; on inputs of the new task: Li and Hoiem, *Learning without forgetting*, ECCV 2016).
        Every step also runs the references, forward and backward. No :meth:`attach` is needed,
        and both can be used together.

        Args:
            samples: how many references, at most those of one batch. They are chosen at random
                with PyTorch's generator. None: as many as the data's batches have.

        Returns:
            A 0-dim float32 tensor in the unit of the budget's metric, computed in evaluation mode;
            zero before the first :meth:`consolidate`. For ``"kl"``, w = 1 is a good start.

        Raises:
            ValueError: there is no budget; ``samples`` is not a positive whole number; or the model
                is sharded.
        """
        if samples is not None:
            check_count("samples", samples)
        return self._tracker().loss(self.protected, samples)

    def _tracker(self) -> DriftTracker:
        if self.protected.tracker is None:
            raise ValueError(
                "budget: there is none, so no references were kept to measure the drift on; pass "
                f"{type(self).__name__}(model, budget=0.1)"
            )
        return self.protected.tracker

    def settle(
        self,
        budget: float | None = None,
        *,
        weights: str = "importance",
        data: Iterable[Any] | None = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> Settled:
        r"""After training, before :meth:`consolidate`: moves θ until the drift is in the budget.

        .. math:: \theta \leftarrow \frac{\theta + c\,\Omega\,\theta^*}{1 + c\,\Omega}

        with the smallest c found for which the measured drift is within the limit. It is measured
        on all references, about ten times. Floating-point buffers, such as running statistics, are
        moved along; parameters whose λ is 0 and those that are not protected stay. The optimizer's
        state stays as it is: begin the next task with a new optimizer, or expect a few steps in
        which momentum leads back.

        Args:
            budget: the limit; None: that of the budget that this MAS was created with.
            weights: ``"importance"``, as above, or ``"uniform"``: Ω = 1, the straight line from the
                new to the old parameters (Wortsman et al., *Robust fine-tuning of zero-shot
                models*, CVPR 2022). Where importance cannot reach the limit, since parameters whose
                Ω was 0 matter by now, ``"uniform"`` is used.
            data, loss: batches of the new task, and ``callable(model, batch)`` that returns their
                mean loss, to be told what settling has cost there.

        Returns:
            The drift before and after, c (0: nothing had to be moved) and, if asked for, the loss
            before and after.

        Raises:
            ValueError: there is no budget; an argument is out of range; or the drift would be above
                the limit even at θ*, since parameters that are not protected have changed. Then
                everything is as it was.
        """
        check_weights(weights)
        tracker = self._tracker()
        limit = tracker.budget.limit if budget is None else check_limit(budget)
        self.protected.follow_steps()
        if (data is None) != (loss is None):
            raise ValueError("data and loss go together: pass both or neither")
        if data is None or loss is None:
            return tracker.settle(self.protected, limit, weights)
        model, batches = self.protected.index.model, list(data)
        before = mean_loss(model, batches, loss)
        settled = tracker.settle(self.protected, limit, weights)
        return replace(settled, loss_before=before, loss_after=mean_loss(model, batches, loss))

    # -- protecting --------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        r""":math:`\frac{\lambda}{2}\sum_i\Omega_i(\theta_i-\theta^*_i)^2`, differentiable.

        Returns:
            A 0-dim tensor to add to the loss; zero before the first :meth:`consolidate`.
        """
        return self.protected.penalty()

    def add_penalty_grad_(self, grad_scale: Scalar | None = None) -> Tensor:
        r"""After ``backward()``: :math:`p.\text{grad} \mathrel{+}= \lambda\Omega(\theta-\theta^*)`.

        Does what ``(loss + mas.penalty()).backward()`` does, in one pass over memory. A parameter
        whose gradient is None gets one.

        Args:
            grad_scale: the loss scaler's factor, while the gradients still contain it: pass
                ``scaler.get_scale()`` and call this before ``scaler.step`` and ``unscale_``, which
                then also find an Inf in the penalty's gradient. What you add after ``unscale_`` is
                not checked by the scaler; with :meth:`attach`, it is checked.

        Returns:
            The penalty, a 0-dim tensor. Never waits for the device.
        """
        value = self.protected.add_penalty_grad_(grad_scale)
        self.protected.after_step(None, "gradient")
        return value

    def proximal_step_(self, lr: Scalar) -> Tensor:
        r"""After ``optimizer.step()``: the step that is stable at any λ.

        .. math:: \theta \leftarrow \frac{\theta+\eta\lambda\Omega\theta^*}{1+\eta\lambda\Omega}

        Args:
            lr: η, usually the optimizer's learning rate. With ``lambda_reg="auto"`` λ is
                ``lambda_proximal``, which suits normalized updates such as Adam's; :meth:`attach`
                chooses by the optimizer.

        Returns:
            The penalty after the step, a 0-dim tensor. Never waits for the device.
        """
        value = self.protected.proximal_step_(lr)
        self.protected.after_step(None, "proximal")
        return value

    def attach(
        self,
        optimizer: Optimizer | None = None,
        mode: str = "gradient",
        every: int | None = None,
    ) -> Attachment:
        """Includes the penalty in every ``optimizer.step()``; the training loop stays as it is.

        Args:
            optimizer: any torch optimizer that minimizes, with or without a closure: one of several
                per model, ``ZeroRedundancyOptimizer``, an 8-bit optimizer, or a wrapper
                (Accelerate's, Lightning's, SAM, Lookahead), whose inner optimizer is attached.
                None: all optimizers that hold parameters of the model, including those created
                later, until ``remove()``. The penalty acts only on the parameters of the optimizer
                that steps; in gradient mode, only on those that have a gradient, so that
                parameters the optimizer skips (the head of another task) stay as they are.
            mode: ``"gradient"`` adds the penalty's gradient before the step, once per step however
                many backward passes there were, and after clipping (to clip it too, call
                :meth:`add_penalty_grad_` before clipping instead); ``"proximal"`` takes the stable
                step after it, with each group's learning rate.
            every: in proximal mode, how many steps of the optimizer one proximal step follows; its
                η is then the sum of theirs, so it costs that much less and is as stable. Steps that
                are pending are followed before the drift is measured, and before :meth:`settle`,
                :meth:`consolidate` and ``remove()``; a saved state contains them. None: 10 under a
                drift budget, otherwise 1. In compiled optimizers and CUDA graphs, always 1.

        Under a ``torch.amp.GradScaler`` an Inf or NaN in the penalty's gradient counts as one in
        the loss's: the step is skipped and the scale lowered. Only there, gradients are read once
        more. A step that the scaler skips moves nothing in either mode.

        Returns:
            A handle with ``remove()`` and ``last_penalty``.

        Raises:
            ValueError: an unknown mode, or an optimizer that maximizes, that steps in
                ``backward()`` instead of ``step()``, that takes only sparse gradients, that holds
                none of the model's parameters, or whose step includes this penalty already.
            TypeError: not a torch optimizer, nor a wrapper that has one as an attribute.
        """
        chosen = None if optimizer is None else unwrapped(optimizer)
        return Attachment(self.protected, chosen, mode, every)

    # -- saving ------------------------------------------------------------------------------------

    def state_dict(self) -> checkpoint.StateDict:
        """A copy of everything that is remembered, by parameter name.

        It has only tensors (DTensors where the parameters are; settings as the bytes of their
        JSON), so ``torch.distributed.checkpoint`` saves and loads a MAS like a model, with any
        number of processes::

            dcp.save({"model": model, "mas": mas}, storage_writer=HuggingFaceStorageWriter(folder))
            dcp.load({"model": model, "mas": mas}, storage_reader=HuggingFaceStorageReader(folder))

        Parameters that have not been measured get Ω = 0, so that there is room to load into. There
        is room for the sums of an unfinished task only once this MAS has measured something in its
        own: before ``dcp.load`` of a state saved in the middle of a task, call
        :meth:`update_importance` with one batch. Codes (``"uint8"``) are dequantized to float32 and
        are the same again after loading; :meth:`save` writes the codes themselves, unless the model
        is sharded.
        """
        protected = self.protected
        return self._state.to_packed_dict(
            self._selected(), protected.index.adapted, protected.pending_steps()
        )

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Replaces everything that is remembered; also λ, ``drift`` and ``merge``.

        ``model``, ``params``, ``state_dtype``, ``state_device``, ``budget`` and ``floor`` stay; Ω
        is converted to this ``state_dtype``.

        Args:
            state: what :meth:`state_dict` returned, in this version or an earlier one.
            strict: the state must have exactly the parameters that are selected here, unless it has
                none. Otherwise parameters that the state lacks start anew, and those that the model
                lacks are left out.

        Raises:
            ValueError: not a state of this format, of a future version, of another model, or
                without values (on the meta device). Everything is as it was.
        """
        self.protected.use_state(
            RegularizerState.from_dict(
                state,
                self._named(),
                self._selected(),
                strict,
                adapted=self.protected.index.adapted,
                state_dtype=self.state_dtype,
                state_device=self.state_device,
                method=self.method,
                floor=self._state.floor,
                tracker=self.protected.tracker,
            )
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state atomically to a safetensors file with a checksum.

        With a sharded model, call this on every process: one writes, parameter by parameter, and an
        error is raised on all. For very large models ``torch.distributed.checkpoint``
        (:meth:`state_dict`) suits better, where each process writes its part.
        """
        checkpoint.write(self._state.to_dict(self.protected.pending_steps()), path)

    def load(self, path: str | os.PathLike[str], strict: bool = True) -> None:
        """Reads what :meth:`save` wrote; see :meth:`load_state_dict`.

        With a sharded model, call this on every process: each takes its part of the parameters.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, altered, of a future version, or of another model.
                Everything is as it was.
        """
        self.load_state_dict(checkpoint.read(path), strict)


def _index(model: nn.Module, adapters: str) -> ParameterIndex:
    """The model's parameters, as LoRA adapters are to be held."""
    if adapters not in ("separate", "merged"):
        raise ValueError(f"adapters: {adapters!r} is unknown; use 'separate' or 'merged'")
    if adapters == "separate":
        return ParameterIndex(model)
    index = MergedIndex(model)
    if not index.adapted:
        raise ValueError(
            'adapters="merged": the model has no LoRA layers; pass a model of '
            'peft.get_peft_model() with a LoraConfig, or use adapters="separate"'
        )
    return index
