"""Class MAS: a model's memory of the tasks it has learned."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mas_ext import bundles, checkpoint
from mas_ext.attachment import Attachment
from mas_ext.bundles import Bundle, Held, Scalar
from mas_ext.importance import add_importance_
from mas_ext.importance.batches import Forward
from mas_ext.importance.estimate import Progress
from mas_ext.importance.estimators import check_weighting
from mas_ext.importance.objectives import Objective
from mas_ext.parameters import ParameterIndex, Selection, select, select_some
from mas_ext.reference import accumulation_dtype
from mas_ext.state import Memory, OpenTask, check_lambda, check_merge, fits


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
        model: any module, also wrapped by ``torch.compile`` or by DDP. Importance is not reduced
            over processes: under DDP every rank must measure the same data.
        lambda_reg: λ ≥ 0. It has the ½ of the equation: twice the paper's λ.
        params: which parameters, of those that require gradients: None for all; names or globs; or
            ``callable(name, parameter) -> bool``. Names have no ``module.``, ``_orig_mod.`` or
            ``_checkpoint_wrapped_module.``; tied parameters appear once, under their first name.
        merge: how a task's Ω joins what is there: ``"sum"`` (the paper's), ``"mean"``, ``"max"``,
            or ``("ema", alpha)``, Ω ← αΩ + (1−α)Ω_task, which starts with the first task's Ω;
            ``("ema_from_zero", alpha)``, the same from Ω = 0; or ``"sum_of_sums"``, Ω_task and the
            Ω after every task before. The last two are what others compute
            (:func:`mas_ext.preset`): the one weakens the first task for good, the other doubles
            the weight of every old task with each new one, and holds 4 bytes a parameter more.
        state_dtype: ``"float32"`` (float64 for float64 parameters).

    A parameter that stops requiring gradients keeps its Ω and θ* and is left out of the penalty
    until it requires them again; one that starts to joins at the next measurement. One that grew
    between tasks keeps what is known of its leading part: the rest has Ω = 0.

    Source: Aljundi et al., ECCV 2018, https://arxiv.org/abs/1711.09601.
    """

    def __init__(
        self,
        model: nn.Module,
        lambda_reg: float = 1.0,
        *,
        params: Selection = None,
        merge: str | tuple[str, float] = "sum",
        state_dtype: str = "float32",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
        if state_dtype != "float32":
            raise ValueError(f"state_dtype: {state_dtype!r} is not available; use 'float32'")
        self._index = ParameterIndex(model)
        # An iterator of names would be used up by the first look.
        self._params = params if params is None or callable(params) else _kept(params)
        self.lambda_reg = lambda_reg
        self._merge = check_merge(merge)
        self._memory = Memory()
        self._open = OpenTask()
        self._num_tasks = 0
        self._attached: WeakSet[Optimizer] = WeakSet()
        self._lost: set[str] = set()  # measured once, and gone from the model since
        select_some(self._index.named(), self._params)

    def __repr__(self) -> str:
        return (
            f"MAS(lambda_reg={self.lambda_reg:g}, merge={self._merge!r}, "
            f"tasks={self._num_tasks}, parameters={len(self._memory.anchor)})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_attached": None}  # a copy is attached to nothing

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _attached=WeakSet())

    # -- what can be looked at ---------------------------------------------------------------

    @property
    def lambda_reg(self) -> float:
        """λ; may be changed at any time."""
        return self._lambda_reg

    @lambda_reg.setter
    def lambda_reg(self, value: float) -> None:
        self._lambda_reg = check_lambda(value)

    @property
    def num_tasks(self) -> int:
        """How many tasks have been consolidated."""
        return self._num_tasks

    @property
    def importance(self) -> Mapping[str, Tensor]:
        """Parameter name → Ω of the consolidated tasks: views, empty before the first."""
        return self._memory.importance

    @property
    def anchor(self) -> Mapping[str, Tensor]:
        """Parameter name → θ*: views, empty before the first task is consolidated."""
        return self._memory.anchor

    # -- measuring ---------------------------------------------------------------------------

    def update_importance(
        self,
        data: Iterable[Any],
        *,
        estimator: str = "per_sample",
        objective: Objective = "squared_l2",
        forward: Forward | None = None,
        max_samples: int | None = None,
        progress: Progress = None,
        weighting: str = "samples",
        training: bool = False,
    ) -> None:
        """Adds to the open task's Ω from unlabelled data; the anchors and the penalty stay.

        As often as wanted, in the middle of training or in deployment: every sample counts the
        same, and :meth:`consolidate` ends the task. Arguments and errors are those of
        :func:`mas_ext.estimate_importance`, and a task keeps to one ``weighting``; after an error
        everything is as it was.
        """
        with self._restored_after_an_error():
            self._measure(
                data,
                estimator=estimator,
                objective=objective,
                forward=forward,
                max_samples=max_samples,
                progress=progress,
                weighting=weighting,
                training=training,
            )

    def consolidate(
        self,
        data: Iterable[Any] | None = None,
        *,
        estimator: str = "per_sample",
        objective: Objective = "squared_l2",
        forward: Forward | None = None,
        max_samples: int | None = None,
        progress: Progress = None,
        weighting: str = "samples",
        training: bool = False,
    ) -> None:
        """Ends a task: measures ``data`` if given, merges the task's Ω, and takes θ* ← θ.

        Args:
            data: as for :meth:`update_importance`, like the arguments after it.

        Raises:
            RuntimeError: there is no data and nothing was measured since the last task.
        """
        with self._restored_after_an_error():
            if data is not None:
                self._measure(
                    data,
                    estimator=estimator,
                    objective=objective,
                    forward=forward,
                    max_samples=max_samples,
                    progress=progress,
                    weighting=weighting,
                    training=training,
                )
            self._end_task()

    def _end_task(self) -> None:
        task = self._open
        if not task.counts:
            raise RuntimeError(
                "consolidate() has no importance to merge: pass data, or call "
                "update_importance(data) first"
            )
        named = self._index.named()
        known = {name: p for name, p in named.items() if name in self._memory.anchor}
        params = {**known, **select(named, self._params)}
        task.check_growth(params)
        measured = {name: total for name, total in task.omega().items() if name in params}
        self._memory.end_task(params, measured, self._merge)
        self._open = OpenTask()
        self._num_tasks += 1

    def _measure(self, data: Iterable[Any], **how: Any) -> None:
        """Adds to the open task batch by batch, so that a state taken between two is complete."""
        named = select_some(self._index.named(), self._params)
        self._open = task = self._open.opened(named, check_weighting(how["weighting"]))
        sums = {name: task.sums[name] for name in named}
        add_importance_(
            sums, self._index.model, data, named, counted=partial(task.count, named), **how
        )

    @contextmanager
    def _restored_after_an_error(self) -> Iterator[None]:
        before = self._open
        try:
            yield
        except BaseException:
            self._open = before
            raise

    # -- protecting --------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        r""":math:`\frac{\lambda}{2}\sum_i\Omega_i(\theta_i-\theta^*_i)^2`, differentiable.

        Returns:
            A 0-dim tensor to add to the loss; zero before the first :meth:`consolidate`.
        """
        values = [bundles.penalty(bundle, self._lambda_reg) for bundle in self._bundles()]
        return self._total(values) if values else self._zero(torch.is_grad_enabled())

    def add_penalty_grad_(self, grad_scale: Scalar | None = None) -> Tensor:
        r"""After ``backward()``: :math:`p.\text{grad} \mathrel{+}= \lambda\Omega(\theta-\theta^*)`.

        What ``(loss + mas.penalty()).backward()`` gives, in one pass over memory: a parameter
        whose gradient is None gets one.

        Args:
            grad_scale: the factor that the gradients carry, when a loss scaler's has not been
                divided out yet.

        Returns:
            The penalty, a 0-dim tensor. Never waits for the device.
        """
        return self._add_penalty_grad(grad_scale, owned=None)

    def proximal_step_(self, lr: Scalar) -> Tensor:
        r"""After ``optimizer.step()``: the step that is stable at any strength.

        .. math:: \theta \leftarrow \frac{\theta+\eta\lambda\Omega\theta^*}{1+\eta\lambda\Omega}

        Args:
            lr: η, usually the optimizer's learning rate.

        Returns:
            The penalty after the step, a 0-dim tensor. Never waits for the device.
        """
        return self._proximal_step(lr, owned=None)

    def attach(self, optimizer: Optimizer, mode: str = "gradient") -> Attachment:
        """The drop-in: every ``optimizer.step()`` includes MAS, and the loop stays as it was.

        Args:
            optimizer: any of torch's that minimises, with a closure or without. Only its own
                parameters are touched, and in gradient mode only those that have a gradient:
                what the optimizer would leave alone (the head of another task) stays.
            mode: ``"gradient"`` adds the penalty's gradient before the step, after clipping;
                ``"proximal"`` takes the stable step after it, with each group's learning rate.

        Returns:
            A handle with ``remove()`` and ``last_penalty``.

        Raises:
            ValueError: an unknown mode, an optimizer that maximizes, that holds none of the
                model's parameters, or that has this penalty already (attached, or one of
                :mod:`mas_ext.optim`, whose step includes it).
        """
        self._check_holds_ours(optimizer)
        return Attachment(self, optimizer, mode)

    def _check_holds_ours(self, optimizer: Optimizer) -> None:
        ours = {id(p) for p in self._index.named().values()}
        if not any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("optimizer: it holds none of this model's parameters")

    def _add_penalty_grad(self, grad_scale: Scalar | None, owned: Set[int] | None) -> Tensor:
        return self._total(
            [
                bundles.add_penalty_grad_(bundle, self._lambda_reg, grad_scale)
                for bundle in self._bundles(owned)
            ]
        )

    def _proximal_step(self, lr: Scalar, owned: Set[int] | None) -> Tensor:
        return self._total(
            [
                bundles.proximal_step_(bundle, self._lambda_reg, lr)
                for bundle in self._bundles(owned)
            ]
        )

    def _bundles(self, owned: Set[int] | None = None) -> list[Bundle]:
        """What the penalty is over: known parameters that require gradients, a bundle a device."""
        return bundles.bundled(self._active(owned))

    def _active(self, owned: Set[int] | None = None) -> list[Held]:
        """The same, one by one; ``owned``: ids of the parameters that are meant."""
        active = [
            held
            for held in self._held()
            if held.param.requires_grad and (owned is None or id(held.param) in owned)
        ]
        if all(fits(held.anchor, held.param) for held in active):
            return active
        self._memory.fit({held.name: held.param for held in active})
        return self._active(owned)

    def _held(self) -> list[Held]:
        """The known parameters that the model has."""
        named, memory = self._index.named(), self._memory
        self._warn_of_lost([name for name in memory.anchor if name not in named])
        return [
            Held(name, named[name], anchor, memory.importance[name])
            for name, anchor in memory.anchor.items()
            if name in named
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
        """Everything that is remembered, by parameter name: a copy, which does not change."""
        return {
            "format": checkpoint.FORMAT,
            "version": checkpoint.VERSION,
            "lambda_reg": self._lambda_reg,
            "merge": self._merge,
            "state_dtype": "float32",
            "num_tasks": self._num_tasks,
            **self._memory.state_dict(),
            **self._open.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Takes over a state, λ and ``merge`` included; ``model`` and ``params`` stay this MAS's.

        Args:
            state: what :meth:`state_dict` returned.
            strict: the state's parameters must be exactly those selected here, unless it has none.
                Otherwise those that the state lacks start anew, and those that the model lacks
                are left out.

        Raises:
            ValueError: not a state of this format, a version from the future, or of another model;
                everything is as it was.
        """
        named = self._index.named()
        checkpoint.check_format(state, "the state")
        state = checkpoint.upgraded(state)
        checkpoint.check_contents(state)
        if not strict:
            state = checkpoint.known_parameters(state, named)
        checkpoint.check_parameters(state, named, select(named, self._params), strict)
        merge, lambda_reg = check_merge(state["merge"]), check_lambda(state["lambda_reg"])
        check_weighting(state["weighting"])
        memory, task = Memory.restored(state, named), OpenTask.restored(state, named)
        self._lambda_reg, self._merge = lambda_reg, merge
        self._memory, self._open = memory, task
        self._num_tasks = state["num_tasks"]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state as safetensors with a checksum, all or nothing."""
        checkpoint.write(self.state_dict(), path)

    def load(self, path: str | os.PathLike[str], strict: bool = True) -> None:
        """Reads what :meth:`save` wrote; see :meth:`load_state_dict`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, altered, from the future, or of another model; everything
                is as it was.
        """
        self.load_state_dict(checkpoint.read(path), strict)


def _kept(params: Iterable[str]) -> Selection:
    return params if isinstance(params, str) else list(params)
