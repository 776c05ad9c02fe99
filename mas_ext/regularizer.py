"""Class MAS: a model's memory of the tasks it has learned."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from mas_ext._distributed.ranks import ProcessGroup
from mas_ext._distributed.shards import Shardings, local, local_parts
from mas_ext._distributed.topology import check_process_group
from mas_ext._parameters import (
    ParameterIndex,
    Selection,
    check_materialised,
    select,
    select_measurable,
    select_some,
)
from mas_ext._penalty import parameter_groups as bundles
from mas_ext._penalty.attachment import Attachment, unwrapped
from mas_ext._penalty.auto_strength import DEFAULT as DEFAULT_DRIFT
from mas_ext._penalty.auto_strength import Energy, check_energy
from mas_ext._penalty.parameter_groups import Bundle, Held, Scalar
from mas_ext._penalty.strength import Drift, Lambda, Strength
from mas_ext._state import checkpoint
from mas_ext._state import distributed_checkpoint as packing
from mas_ext._state.importance_state import Memory, OpenTask, check_merge, fits
from mas_ext.importance import add_importance_
from mas_ext.importance.estimation import SampleStatistics
from mas_ext.importance.measurement_checkpoint import MeasurementCheckpoint, make_checkpoint
from mas_ext.importance.options import (
    CheckpointedMeasurementOptions,
    Measurement,
    check_weighting,
)
from mas_ext.precision import check_state_dtype
from mas_ext.reference import accumulation_dtype


class MAS:
    r"""Memory Aware Synapses: holds in place what the network's output depends on.

    .. math:: L(\theta) = L_\text{new}(\theta)
        + \frac{\lambda}{2}\sum_i \Omega_i (\theta_i - \theta^*_i)^2

    Ω is how sensitive the output was to each parameter when the last task ended, and θ* where the
    parameters were then. Use::

        mas = mas_ext.MAS(model, lambda_reg=1.0)
        for task in tasks:
            for x, y in task:
                loss(model(x), y).backward()
                mas.add_penalty_grad_()        # or once, before the loop: mas.attach(optimizer)
                optimizer.step()
                optimizer.zero_grad()
            mas.consolidate(task)              # labels are not used

    Until the first :meth:`consolidate` there is nothing to protect, and the penalty is zero.

    Args:
        model: any module, also wrapped by ``torch.compile`` or ``DistributedDataParallel``,
            sharded by ``fully_shard`` (FSDP2), tensor-parallel, or both.
        lambda_reg: λ ≥ 0. It has the ½ of the equation: twice the paper's λ. Or ``"auto"``: found
            when a task ends, from ``drift``. Or a mapping from name or glob to either, of which the
            first that matches a parameter counts: ``{"head.*": 0, "*": 1.0}``.
        params: which parameters, of those that require gradients: None for all; names or globs; or
            ``callable(name, parameter) -> bool``. Names have no ``module.``, ``_orig_mod.`` or
            ``_checkpoint_wrapped_module.``; tied parameters appear once, under their first name.
        merge: how a task's Ω joins what is there: ``"sum"`` (the paper's), ``"mean"``, ``"max"``,
            or ``("ema", alpha)``, Ω ← αΩ + (1−α)Ω_task, which starts with the first task's Ω;
            ``("ema_from_zero", alpha)``, the same from Ω = 0; or ``"sum_of_sums"``, Ω_task and the
            Ω after every task before. The last two are what others compute
            (:func:`mas_ext.preset`): the one weakens the first task for good, the other doubles
            the weight of every old task with each new one, and holds 4 bytes a parameter more.
        state_dtype: what Ω is kept in between tasks: ``"float32"`` (float64 for float64
            parameters), ``"bfloat16"``, or ``"uint8"``, 1.02 bytes a parameter
            (:mod:`mas_ext.precision`). While a task is measured its sums are float32; θ* has the
            parameters' dtype.
        drift: ε, by what fraction of the output's energy E‖F(x)‖² a new task may change what was
            learned, for ``lambda_reg="auto"`` (see the documentation): less holds
            more. A number, or one for each glob that is ``"auto"``, of its own part of the model.
        process_group: the processes that share the data out, where the model does not say it.
            None: those of ``DistributedDataParallel``, or of the mesh of ``fully_shard``, else
            each process measures by itself.

    On several processes each is given its own samples, as many as it likes or none, and all call
    :meth:`update_importance` and :meth:`consolidate`; the ranks of one tensor-parallel group are
    given the same ones. Ω is exact per sample and the same as on one process, and so are the
    penalty and its gradient. What is remembered of a DTensor is a DTensor, placed as it is. An
    error on one rank is raised on all.

    A parameter that stops requiring gradients keeps its Ω and θ* and is left out of the penalty
    until it requires them again; one that starts to joins at the next measurement. One that grew
    between tasks keeps what is known of its leading part: the rest has Ω = 0.

    Source: Aljundi et al., ECCV 2018, https://arxiv.org/abs/1711.09601.
    """

    def __init__(
        self,
        model: nn.Module,
        lambda_reg: Lambda = 1.0,
        *,
        params: Selection = None,
        merge: str | tuple[str, float] = "sum",
        state_dtype: str = "float32",
        drift: Drift = DEFAULT_DRIFT,
        process_group: ProcessGroup = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
        self._index = ParameterIndex(model)
        # An iterator of names would be used up by the first look.
        self._params = params if params is None or callable(params) else _kept(params)
        self._merge = check_merge(merge)
        self._memory = Memory(check_state_dtype(state_dtype))
        self._energy = Energy()
        self._strength = self._checked(Strength(lambda_reg, drift))
        self._shardings = Shardings()
        self._process_group = check_process_group(process_group)
        self._open = OpenTask()
        self._num_tasks = 0
        self._attached: WeakSet[Optimizer] = WeakSet()
        self._lost: set[str] = set()  # measured once, and gone from the model since
        select_some(self._index.named(), self._params)

    def __repr__(self) -> str:
        return (
            f"MAS(lambda_reg={self._strength!r}, merge={self._merge!r}, "
            f"state_dtype={self.state_dtype!r}, tasks={self._num_tasks}, "
            f"parameters={len(self._memory.anchor)})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_attached": None}  # a copy is attached to nothing

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _attached=WeakSet())

    # -- what can be looked at ---------------------------------------------------------------

    @property
    def lambda_reg(self) -> float | str | dict[str, float | str]:
        """λ, or λ by name or glob; may be changed (as a whole) at any time.

        Of what is ``"auto"`` the number that was found, or ``"auto"`` before the first task ends.
        """
        return self._strength.shown("gradient")

    @lambda_reg.setter
    def lambda_reg(self, value: Lambda) -> None:
        drift = self.drift if isinstance(self.drift, float) else DEFAULT_DRIFT
        self._strength = self._checked(Strength(value, drift))

    @property
    def lambda_proximal(self) -> float | str | dict[str, float | str]:
        """λ of a proximal step after an optimizer whose steps have one size, such as Adam's.

        ``lambda_reg``, but where that is ``"auto"``: what a gradient pushes and what a step pushes
        are held by different λ (:mod:`mas_ext._penalty.auto_strength`).
        """
        return self._strength.shown("step")

    @property
    def drift(self) -> float | dict[str, float]:
        """ε, or ε by glob; may be changed at any time, and λ follows."""
        drift = self._strength.drift
        return drift if isinstance(drift, float) else dict(drift)

    @drift.setter
    def drift(self, value: Drift) -> None:
        self._strength = self._checked(Strength(self._strength.value, value))

    def _checked(self, strength: Strength) -> Strength:
        """A strength that goes with this model, and has found what there is to find."""
        named = self._index.named()
        strength.check(select(named, self._params))
        strength.check_patterns(named)
        self._settle(strength, named)
        return strength

    def _settle(self, strength: Strength, named: Mapping[str, Tensor]) -> None:
        if not strength.is_auto or not self._memory.anchor:
            return
        if not self._energy.tasks:
            raise ValueError(
                "lambda_reg='auto': this state is of an earlier mas_ext, which kept no energy to "
                "find λ from; pass a number, and 'auto' after the next consolidate()"
            )
        check_energy(self._energy.mean)
        known = {name: named[name] for name in self._memory.anchor if name in named}
        strength.settle(self._memory.sizes(known, self._merge), self._energy.mean)

    @property
    def state_dtype(self) -> str:
        """What Ω is kept in."""
        return self._memory.importance.state_dtype

    @property
    def num_tasks(self) -> int:
        """How many tasks have been consolidated."""
        return self._num_tasks

    @property
    def importance(self) -> Mapping[str, Tensor]:
        """Parameter name → Ω of the consolidated tasks, empty before the first.

        Views; of ``state_dtype="uint8"`` copies, expanded to float32 one by one.
        """
        return self._shardings.placed(self._memory.importance)

    @property
    def anchor(self) -> Mapping[str, Tensor]:
        """Parameter name → θ*: views, empty before the first task is consolidated."""
        return self._shardings.placed(self._memory.anchor)

    # -- measuring ---------------------------------------------------------------------------

    def update_importance(
        self,
        data: Iterable[Any],
        **options: Unpack[CheckpointedMeasurementOptions],
    ) -> None:
        """Adds to the open task's Ω from unlabelled data; the anchors and the penalty stay.

        As often as wanted, in the middle of training or in deployment: every sample counts the
        same, and :meth:`consolidate` ends the task. Arguments and errors are those of
        :func:`mas_ext.estimate_importance`, and a task keeps to one ``weighting``; after an error
        everything is as it was.

        Args:
            checkpoint: a file in which the measurement is kept while it runs; each process of
                several has its own, with ``.rankN`` after the name. Called again after the process
                was killed, with the same model, state, data and arguments, it goes on after the
                last batch that was kept, and ends with the same bits. The file is gone when the
                measurement has ended. PyTorch's random numbers are kept too, so a shuffling
                DataLoader repeats its order; other data must give the same batches by itself.
            save_every: after how many samples the file is written again. It holds 4 bytes a
                parameter.
        """
        measurement = Measurement.from_options(options, CheckpointedMeasurementOptions)
        with self._restored_after_an_error():
            checkpoint = self._measure(data, measurement)
        checkpoint.remove()

    def consolidate(
        self,
        data: Iterable[Any] | None = None,
        **options: Unpack[CheckpointedMeasurementOptions],
    ) -> None:
        """Ends a task: measures ``data`` if given, merges the task's Ω, and takes θ* ← θ.

        Args:
            data: as for :meth:`update_importance`, like the arguments after it.

        Raises:
            RuntimeError: there is no data and nothing was measured since the last task.
        """
        measurement = Measurement.from_options(options, CheckpointedMeasurementOptions)
        with self._restored_after_an_error():
            checkpoint = MeasurementCheckpoint()
            if data is not None:
                checkpoint = self._measure(data, measurement)
            self._end_task()
        checkpoint.remove()

    def _end_task(self) -> None:
        task = self._open
        if not task.counts:
            raise RuntimeError(
                "consolidate() has no importance to merge: pass data, or call "
                "update_importance(data) first"
            )
        named = self._index.named()
        known = {name: p for name, p in named.items() if name in self._memory.anchor}
        params = self._local({**known, **select(named, self._params)})
        task.check_growth(params)
        self._strength.check(params)
        energy = self._energy.joined_by(task.seen)
        if self._strength.is_auto:
            check_energy(energy.mean)
        self._memory.end_task(params, task, self._merge)
        self._energy = energy
        self._settle(self._strength, named)
        self._open = OpenTask()
        self._num_tasks += 1

    def _measure(self, data: Iterable[Any], measurement: Measurement) -> MeasurementCheckpoint:
        """Adds to the open task batch by batch, so that a state taken between two is complete.

        On several processes, all of them add at the end, when all have finished.
        """
        checkpoint = make_checkpoint(measurement, self._num_tasks, self._open.counts)
        named = select_measurable(self._index.named(), self._params)
        task = self._open.opened(self._local(named), check_weighting(measurement.weighting))
        add_importance_(
            {name: task.sums[name] for name in named},
            self._index.model,
            data,
            named,
            measurement,
            counted=partial(self._count, task, named),
            process_group=self._process_group,
            checkpoint=checkpoint,
        )
        return checkpoint

    def _count(self, task: OpenTask, names: Iterable[str], more: SampleStatistics) -> None:
        """What was added to a task's sums belongs to it from now on."""
        task.count(names, more)
        self._open = task

    def _local(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's parts, which are what is remembered; ValueError if they were others."""
        self._shardings = self._shardings.joined_by(params)
        return local_parts(params)

    @contextmanager
    def _restored_after_an_error(self) -> Iterator[None]:
        before = self._open, self._shardings
        try:
            yield
        except BaseException:
            self._open, self._shardings = before
            raise

    # -- protecting --------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        r""":math:`\frac{\lambda}{2}\sum_i\Omega_i(\theta_i-\theta^*_i)^2`, differentiable.

        Returns:
            A 0-dim tensor to add to the loss; zero before the first :meth:`consolidate`.
        """
        values = [bundles.penalty(bundle) for bundle in self._bundles()]
        return self._total(values) if values else self._zero(torch.is_grad_enabled())

    def add_penalty_grad_(self, grad_scale: Scalar | None = None) -> Tensor:
        r"""After ``backward()``: :math:`p.\text{grad} \mathrel{+}= \lambda\Omega(\theta-\theta^*)`.

        What ``(loss + mas.penalty()).backward()`` gives, in one pass over memory: a parameter
        whose gradient is None gets one.

        Args:
            grad_scale: the factor that the gradients carry, when a loss scaler's has not been
                divided out yet: ``scaler.get_scale()``, before ``scaler.step`` or ``unscale_``,
                which then find an Inf of the penalty's as any other. What is added after
                ``unscale_`` no scaler looks at; :meth:`attach` does.

        Returns:
            The penalty, a 0-dim tensor. Never waits for the device.
        """
        return self._add_penalty_grad(grad_scale, owned=None)

    def proximal_step_(self, lr: Scalar) -> Tensor:
        r"""After ``optimizer.step()``: the step that is stable at any strength.

        .. math:: \theta \leftarrow \frac{\theta+\eta\lambda\Omega\theta^*}{1+\eta\lambda\Omega}

        Args:
            lr: η, usually the optimizer's learning rate. With ``lambda_reg="auto"`` λ is
                ``lambda_proximal``, which supposes steps as Adam's; :meth:`attach` looks at the
                optimizer.

        Returns:
            The penalty after the step, a 0-dim tensor. Never waits for the device.
        """
        return self._proximal_step(lr, owned=None)

    def attach(self, optimizer: Optimizer, mode: str = "gradient") -> Attachment:
        """The drop-in: every ``optimizer.step()`` includes MAS, and the loop stays as it was.

        Args:
            optimizer: any of torch's that minimises, with a closure or without; also one a
                parameter, a ``ZeroRedundancyOptimizer``, one that keeps its state in 8 bits, or
                one in Accelerate's or Lightning's wrapper. Only its own parameters are touched, and
                in gradient mode only those that have a gradient: what the optimizer would leave
                alone (the head of another task) stays.
            mode: ``"gradient"`` adds the penalty's gradient before the step, once however many
                backward passes there were, and after clipping (to clip it too, call
                :meth:`add_penalty_grad_` before clipping instead); ``"proximal"`` takes the stable
                step after it, with each group's learning rate.

        Under a ``torch.amp.GradScaler`` an Inf or NaN that the penalty's gradient brings in is
        treated as the loss's: the step is skipped, and the scale lowered. To know it, gradients
        are read once more there, and only there. A step that the scaler skips moves nothing in
        either mode.

        Returns:
            A handle with ``remove()`` and ``last_penalty``.

        Raises:
            ValueError: an unknown mode, an optimizer that maximizes, that steps in ``backward()``
                and not in ``step()``, that holds none of the model's parameters, or that has this
                penalty already (attached, or one of :mod:`mas_ext.optim`, whose step includes it).
        """
        optimizer = unwrapped(optimizer)
        self._check_holds_ours(optimizer)
        return Attachment(self, optimizer, mode)

    def _check_holds_ours(self, optimizer: Optimizer) -> None:
        ours = {id(p) for p in self._index.named().values()}
        if not any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("optimizer: it holds none of this model's parameters")

    def _add_penalty_grad(self, grad_scale: Scalar | None, owned: Set[int] | None) -> Tensor:
        return self._total(
            [bundles.add_penalty_grad_(bundle, grad_scale) for bundle in self._bundles(owned)]
        )

    def _proximal_step(self, lr: Scalar, owned: Set[int] | None, pushed_by: str = "step") -> Tensor:
        active = self._bundles(owned, pushed_by)
        return self._total([bundles.proximal_step_(bundle, lr) for bundle in active])

    def _bundles(self, owned: Set[int] | None = None, pushed_by: str = "gradient") -> list[Bundle]:
        """What the penalty is over: known parameters that require gradients, a call a bundle."""
        return bundles.bundled(self._active(owned, pushed_by))

    def _active(self, owned: Set[int] | None = None, pushed_by: str = "gradient") -> list[Held]:
        """The same, one by one.

        Args:
            owned: ids of the parameters that are meant.
            pushed_by: whose λ, of :class:`mas_ext._penalty.auto_strength.Lambdas`.
        """
        active = self._held(owned, pushed_by)
        if all(fits(held.anchor, local(held.param)) for held in active):
            return active
        self._memory.fit(self._local({held.name: held.param for held in active}))
        return self._active(owned, pushed_by)

    def _held(self, owned: Set[int] | None, pushed_by: str) -> list[Held]:
        named, memory = self._index.named(), self._memory
        kept, strength = memory.importance.kept, self._strength
        self._warn_of_lost([name for name in memory.anchor if name not in named])
        # Who is meant comes first: an optimizer a parameter asks for one, as often as there are.
        meant = [
            name
            for name in memory.anchor
            if name in named
            and named[name].requires_grad
            and (owned is None or id(named[name]) in owned)
        ]
        return [
            Held(
                name,
                named[name],
                memory.anchor[name],
                *kept(name),
                strength.glob_of(name),
                strength.of(name, pushed_by),
            )
            for name in meant
        ]

    def _warn_of_lost(self, names: list[str]) -> None:
        """Once a name: its head may have been removed, but if it was renamed it is unprotected."""
        new = [name for name in names if name not in self._lost]
        if new:
            self._lost.update(new)
            warnings.warn(
                f"parameter {new[0]!r} ({len(new)} in all) was measured and is no longer in the "
                "model under that name, so nothing holds it in place; if it was renamed, by a "
                "parametrization say, measure it again with consolidate()",
                stacklevel=6,
            )

    def _total(self, values: list[Tensor]) -> Tensor:
        if not values:
            return self._zero()
        total = values[0]
        for value in values[1:]:  # maybe of other devices
            total = total + value.to(total.device, non_blocking=True)
        return total

    def _zero(self, requires_grad: bool = False) -> Tensor:
        p = next(iter(self._index.named().values()))
        dtype = accumulation_dtype(p.dtype)
        return torch.zeros((), dtype=dtype, device=p.device, requires_grad=requires_grad)

    # -- keeping -----------------------------------------------------------------------------

    def state_dict(self) -> checkpoint.StateDict:
        """Everything that is remembered, by parameter name: a copy, which does not change.

        Tensors only, DTensors where the parameters are, settings as the bytes of their JSON, so
        that ``torch.distributed.checkpoint`` saves and loads a MAS like a model, with any number of
        processes::

            dcp.save({"model": model, "mas": mas}, storage_writer=HuggingFaceStorageWriter(folder))
            dcp.load({"model": model, "mas": mas}, storage_reader=HuggingFaceStorageReader(folder))

        Parameters that have not been measured yet are there with Ω = 0, as room to load into; the
        sums of an open task only if one is open, so what was saved inside one is loaded inside one.
        Codes are expanded to float32 (:meth:`save` writes them as they are, unless the model is
        sharded), and are the same again when they are loaded where they were.
        """
        selected = select(self._index.named(), self._params)
        unmeasured = {name: p for name, p in selected.items() if name not in self._memory.anchor}
        return packing.packed(self._state(), unmeasured)

    def _state(self) -> checkpoint.StateDict:
        """The same as plain values and tensors, and only what has been measured."""
        state = {
            "format": checkpoint.FORMAT,
            "version": checkpoint.VERSION,
            "lambda_reg": self._strength.value,
            "drift": self.drift,
            "energy": asdict(self._energy),
            "merge": self._merge,
            "state_dtype": self.state_dtype,
            "num_tasks": self._num_tasks,
            **self._memory.state_dict(),
            **self._open.state_dict(),
        }
        state = checkpoint.with_expanded(state, self._shardings.names())
        placed = {group: dict(self._shardings.placed(state[group])) for group in checkpoint.GROUPS}
        return {**state, **placed}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Takes over a state, λ, ``drift`` and ``merge`` included.

        ``model``, ``params`` and ``state_dtype`` stay this MAS's: an Ω that was kept otherwise is
        converted.

        Args:
            state: what :meth:`state_dict` returned, of this version or an earlier one.
            strict: the state's parameters must be exactly those selected here, unless it has none.
                Otherwise those that the state lacks start anew, and those that the model lacks
                are left out.

        Raises:
            ValueError: not a state of this format, a version from the future, or of another model,
                or one without values (on the meta device); everything is as it was.
        """
        named = self._index.named()
        if packing.is_packed(state):
            state = packing.unpacked(state)
        checkpoint.check_format(state, "the state")
        state = checkpoint.upgraded(state)
        checkpoint.check_contents(state)
        if not strict:
            state = checkpoint.known_parameters(state, named)
        checkpoint.check_parameters(state, named, select(named, self._params), strict)
        check_materialised({name: named[name] for name in {**state["anchor"], **state["open"]}})
        merge, strength = check_merge(state["merge"]), Strength(state["lambda_reg"], state["drift"])
        energy = Energy(**state["energy"])
        if strength.is_auto and state["anchor"]:
            check_energy(energy.mean)
        strength.check(state["anchor"])
        check_weighting(state["weighting"])
        shardings = Shardings().joined_by(named)
        state = checkpoint.with_expanded(state, shardings.names())
        parts = {group: shardings.parts(state[group]) for group in checkpoint.GROUPS}
        state, params = {**state, **parts}, local_parts(named)
        memory = Memory.restored(state, params, self.state_dtype)
        task = OpenTask.restored(state, params)
        self._shardings = shardings
        self._strength, self._merge = strength, merge
        self._memory, self._open = memory, task
        self._energy, self._num_tasks = energy, state["num_tasks"]
        self._settle(strength, named)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state as safetensors with a checksum, all or nothing.

        Of a sharded model every process calls this: one writes, parameter by parameter, and an
        error is raised on all of them. With ``torch.distributed.checkpoint`` (:meth:`state_dict`)
        each process writes its part, which suits very large models better.
        """
        checkpoint.write(self._state(), path)

    def load(self, path: str | os.PathLike[str], strict: bool = True) -> None:
        """Reads what :meth:`save` wrote; see :meth:`load_state_dict`.

        Of a sharded model every process reads the file, and takes its part of each parameter.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, altered, from the future, or of another model; everything
                is as it was.
        """
        self.load_state_dict(checkpoint.read(path), strict)


def _kept(params: Iterable[str]) -> Selection:
    return params if isinstance(params, str) else list(params)
