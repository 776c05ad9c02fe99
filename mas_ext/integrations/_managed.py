"""What the callbacks for other libraries share: a regularizer that lives through several runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mas_ext._distributed.shards import is_sharded
from mas_ext._distributed.topology import is_running
from mas_ext._drift.budget import DriftBudget
from mas_ext._drift.settling import Settled
from mas_ext._penalty.attachment import Attachment, check_every, unwrapped
from mas_ext._strength.auto import DEFAULT_DRIFT
from mas_ext._strength.strength import AUTO, RegularizationStrength
from mas_ext.importance.options import Measurement
from mas_ext.quadratic import QuadraticRegularizer
from mas_ext.regularizer import MAS, method_of

Method = str | type[QuadraticRegularizer]


class ManagedRegularizer:
    """Creates a regularizer when the model is known, and attaches it while the model trains.

    Args:
        lambda_reg: λ, or None for the method's default.
        mas: an existing regularizer to use instead of creating one, or None.
        mode, every: as for :meth:`MAS.attach`.
        method: the class to create, or its name.
        options: keyword arguments of that class and of its ``consolidate``, mixed.

    Attributes:
        mas: the regularizer; None before :meth:`bind`, unless one was passed.
        settled: what settling did when the last task ended, if there is a budget.

    Raises:
        TypeError: neither the class nor its ``consolidate`` has such an option.
        ValueError: an option is out of range, or an option of the class was passed along with
            ``mas``.
    """

    def __init__(
        self,
        lambda_reg: Any,
        mas: QuadraticRegularizer | None,
        mode: str,
        every: int | None,
        method: Method | None,
        options: Mapping[str, Any],
    ) -> None:
        if mas is not None and method is not None:
            raise ValueError("method: mas= has a method of its own; leave one of them out")
        check_every(every, mode)
        self._mode, self._every = mode, every
        self._method = type(mas) if mas is not None else method_of(method or MAS)
        self._regularizer, self._importance = _split_options(self._method, lambda_reg, options)
        if mas is not None and self._regularizer:
            raise ValueError(
                f"mas: it has settings of its own; leave {', '.join(self._regularizer)} out"
            )
        _check_options(self._method, self._regularizer, self._importance)
        self._regularizer |= _budget(self._regularizer, self._importance)
        self.mas = mas
        self._made_here = mas is None
        self.settled: Settled | None = None
        self._model: nn.Module | None = None
        self._steps: list[Any] = []  # attachments, and optimizers whose step includes the penalty

    # -- a run -----------------------------------------------------------------------------------

    def bind(self, model: nn.Module) -> QuadraticRegularizer:
        """Returns the regularizer of this model; that of a new model object gets the old state."""
        if self._made_here and (self.mas is None or self._model is not model):
            mas = self._method(model, **{**_processes(model), **self._regularizer})
            if self.mas is not None:
                mas.load_state_dict(self.mas.state_dict())
                mas.protected.tracker = self.mas.protected.tracker  # which has the trace
            self.mas = mas
        self._model = model
        assert self.mas is not None
        return self.mas

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Attaches the penalty to the optimizers, after detaching it from those of an earlier run.

        An optimizer of :mod:`mas_ext.optim` that was created with this regularizer includes the
        penalty already and is left as it is.

        Raises:
            ValueError: no optimizer has a parameter that this regularizer protects.
        """
        self.detach()
        assert self.mas is not None
        try:
            for optimizer in self._ours(optimizers):
                self._steps.append(self._attached(self.mas, optimizer))
        except BaseException:
            self.detach()
            raise

    def _attached(self, mas: QuadraticRegularizer, optimizer: Optimizer) -> Any:
        """An attachment, or the optimizer itself if its step already includes this penalty."""
        has_it = getattr(optimizer, "mas", None) is mas
        return optimizer if has_it else mas.attach(optimizer, self._mode, self._every)

    def _ours(self, optimizers: Iterable[Optimizer]) -> list[Optimizer]:
        """The optimizers with protected parameters; if there are none, all (attach() raises)."""
        assert self.mas is not None
        unwrapped_ones = [unwrapped(optimizer) for optimizer in optimizers]
        ours = [one for one in unwrapped_ones if self.mas.protected.are_in(one)]
        return ours or unwrapped_ones

    def detach(self) -> None:
        """Detaches the penalty from all optimizers. A second call does nothing."""
        for step in self._steps:
            if isinstance(step, Attachment):
                step.remove()
        self._steps = []

    @property
    def penalty(self) -> Tensor | None:
        """The penalty of the last step, over all optimizers; None before the first."""
        if self.mas is None or not self.mas.num_tasks:
            return None
        values = [step.last_penalty for step in self._steps if step.last_penalty is not None]
        return sum(values[1:], values[0]) if values else None

    @property
    def logs(self) -> dict[str, Any]:
        """What is logged: the penalty of the last step, and the last drift and λ under a budget."""
        if self.penalty is None:
            return {}
        logs: dict[str, Any] = {"penalty": self.penalty}
        if self.mas is not None and (trace := self.mas.drift_trace):
            logs["drift"] = trace[-1].drift
            if isinstance(trace[-1].lambda_reg, float):
                logs["lambda"] = trace[-1].lambda_reg
        prefix = self._method.__name__.lower()
        return {f"{prefix}_{name}": value for name, value in logs.items()}

    def save(self, path: Path, writes: bool) -> None:
        """Calls :meth:`MAS.save` on the process that ``writes``; on all for a sharded state."""
        if self.mas is not None and (writes or any(map(is_sharded, self.mas.anchor.values()))):
            self.mas.save(path)

    # -- the end of a task -----------------------------------------------------------------------

    def check_ends(self, has_length: bool) -> None:
        """Raises ValueError before a run if the importance of its data could not be measured."""
        if not has_length and self._importance.get("max_samples") is None:
            raise ValueError(
                "the training data has no length, and measuring importance at the end of training "
                "might not end: pass max_samples=, or consolidate=False"
            )

    @property
    def has_forward(self) -> bool:
        """Whether the user's own ``forward`` reads the batches."""
        return self._importance.get("forward") is not None

    def consolidate(self, data: Iterable[Any], *, shows_progress: bool = False, **how: Any) -> None:
        """Calls :meth:`MAS.consolidate`, and before it :meth:`MAS.settle` under a drift budget.

        ``how`` overrides the options that were given before.

        Raises:
            RuntimeError: there is no model yet.
        """
        if self.mas is None:
            raise RuntimeError(
                "consolidate() before the first training: there is no model yet; train first, or "
                "pass mas="
            )
        if self.mas.budget is not None:
            self.settled = self.mas.settle()
        options = {**self._importance, **how}
        if "progress" in self.mas.options.__annotations__:
            options.setdefault("progress", shows_progress)
        self.mas.consolidate(data, **options)


class HasRegularizer:
    """The public members of every callback."""

    _managed: ManagedRegularizer

    @property
    def mas(self) -> QuadraticRegularizer | None:
        """The regularizer of the trained model; None before it is first trained."""
        return self._managed.mas

    @property
    def settled(self) -> Settled | None:
        """What settling did when the last task ended; None before that, and without a budget."""
        return self._managed.settled

    def consolidate(self, data: Iterable[Any], **options: Any) -> None:
        """Ends a task by hand: :meth:`mas_ext.MAS.consolidate` with this callback's options.

        Args:
            data: as for :func:`mas_ext.estimate_importance`.
            options: arguments of :meth:`mas_ext.MAS.consolidate`; they override this callback's.

        Raises:
            RuntimeError: no model was trained yet.
        """
        self._managed.consolidate(data, **options)


def _processes(model: nn.Module) -> dict[str, Any]:
    """The ``process_group`` option, for models that do not show which processes share the data.

    Trainers pass the model without its DistributedDataParallel wrapper. A sharded model shows the
    processes by its mesh.
    """
    if not is_running() or any(map(is_sharded, model.parameters())):
        return {}
    return {"process_group": dist.group.WORLD}


def _split_options(
    method: type[QuadraticRegularizer], lambda_reg: Any, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divides the options into those of the class, with λ, and of its ``consolidate``."""
    ours = inspect.signature(method).parameters.keys() - {"model"}
    measurement = method.options.__annotations__.keys()
    for name in options:
        if name not in ours | measurement:
            known = ", ".join(sorted(ours | measurement))
            raise TypeError(f"{name!r} is not an option of {method.__name__}; use {known}")
    regularizer = {} if lambda_reg is None else {"lambda_reg": lambda_reg}
    regularizer |= {name: value for name, value in options.items() if name in ours}
    return regularizer, {n: value for n, value in options.items() if n in measurement}


def _budget(regularizer: Mapping[str, Any], importance: Mapping[str, Any]) -> dict[str, Any]:
    """The budget with the ``forward`` of all tasks, which a checkpoint cannot hold."""
    budget = DriftBudget.of(regularizer.get("budget"))
    if budget is None or budget.forward is not None:
        return {}
    return {"budget": replace(budget, forward=importance.get("forward"))}


def _check_options(
    method: type[QuadraticRegularizer],
    regularizer: Mapping[str, Any],
    importance: Mapping[str, Any],
) -> None:
    """Checks the options now, rather than when training begins or has ended."""
    automatic = AUTO if regularizer.get("budget") is not None else 1.0
    RegularizationStrength(
        regularizer.get("lambda_reg", automatic), regularizer.get("drift", DEFAULT_DRIFT)
    )
    # A small model serves to check all options but those that are about the real one's parameters.
    named = {"drift", "params", "adapters"}
    if isinstance(regularizer.get("lambda_reg"), Mapping):
        named.add("lambda_reg")
    method(nn.Linear(1, 1), **{n: value for n, value in regularizer.items() if n not in named})
    Measurement(**{**method.defaults, **importance}).check()
