"""The drift during training: when it is measured, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mas_ext._distributed.ranks import ProcessGroup
from mas_ext._distributed.shards import full_tensor, is_sharded
from mas_ext._drift.budget import DriftBudget
from mas_ext._drift.controller import step_is_stable_up_to
from mas_ext._drift.metrics import resolve
from mas_ext._drift.references import References, TaskReferences
from mas_ext._drift.sampling import ReferenceSampler
from mas_ext._drift.settling import Path, Settled, search
from mas_ext._drift.stored import DriftState
from mas_ext._strength.auto import UpdateKind, normalizes_updates, update_kind
from mas_ext._warnings import warn
from mas_ext.importance.batches import Forward
from mas_ext.importance.data_parallel import placement_of

if TYPE_CHECKING:
    from mas_ext._penalty.protected_parameters import ProtectedParameters
    from mas_ext._state.regularizer_state import RegularizerState

LOWEST = 0.03  # of a predicted λ: a task that needs less of the budget does not spend it all
OVER = 1.01  # times the limit: what rounding may add after settling
REGULAR = 20  # steps between measurements: a forward pass for 20 that are also differentiated


class DriftRecord(NamedTuple):
    """One measurement of the drift during training.

    Attributes:
        step: how many steps the optimizer had taken since the present task began.
        drift: since the task began, on as many references as a training batch has samples.
        lambda_reg: λ from the next step on.
        penalty: λ/2 Σ Ω(θ−θ*)² with the λ of this step.
        task: the number of tasks that had ended.
    """

    step: int
    drift: float
    lambda_reg: Any
    penalty: float
    task: int


class DriftTracker:
    """Measures the drift of a model, and makes λ follow it.

    Args:
        budget: the limit, and how the drift is measured.
        process_group: the processes that share the data, if the model does not say it.

    Attributes:
        comparison: the budget's metric.
        trace: a record for each measurement during training.
    """

    def __init__(self, budget: DriftBudget, process_group: ProcessGroup = None) -> None:
        self.budget = budget
        self.comparison = resolve(budget.metric)
        self.trace: list[DriftRecord] = []
        self._process_group = process_group
        self._fixed: list[TaskReferences] | None = None  # of budget.reference, once they are read
        # The optimizers that have taken this step, and those that took the last one.
        self._round: WeakSet[Optimizer] = WeakSet()
        self._last_round: WeakSet[Optimizer] = WeakSet()
        self._rate = 0.0  # the largest learning rate that λ has been limited for
        self._largest: tuple[Any, int, float] = (None, 0, 0.0)  # λ, task, and max λΩ / factor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_round": None, "_last_round": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "_round": WeakSet(), "_last_round": WeakSet()})

    # -- the references ------------------------------------------------------------------------

    def sampler(self, model: nn.Module, task: int, forward: Forward | None) -> ReferenceSampler:
        """For this process's data of a task, which is run by ``forward``."""
        rank, _ = self._placement(model).ranks.place
        forward = self.budget.forward or forward
        return ReferenceSampler(self.budget.samples, forward, seed=(task, rank))

    def references(
        self,
        model: nn.Module,
        state: RegularizerState,
        own: Iterable[Any] | None,
        forward: Forward | None,
    ) -> References | None:
        """The references for the next task, which begins with the model as it is now.

        Args:
            state: with the references of earlier tasks, and the sampler of the one that has ended.
            own: batches to keep instead of samples of the task's data.
            forward: runs the model on ``own``.

        Returns:
            None if there are none, since the state was loaded without them.

        Raises:
            ValueError: the data or ``own`` is empty, or the outputs cannot be used.
        """
        placement = self._placement(model)
        before, sampler = state.drift.references, state.drift.sampler
        tasks = [] if before is None else before.tasks
        forward = self.budget.forward or forward
        if self.budget.reference is not None:
            if self._fixed is None:
                self._fixed = [self._given(self.budget.reference, (), forward, placement)]
            tasks = self._fixed
        elif own is not None:
            seed = (state.num_tasks,)
            tasks = [*tasks, self._given(own, seed, forward, placement)]
        elif sampler is not None:
            parts = sampler.gathered(placement.ranks)
            tasks = [*tasks, _checked(TaskReferences(parts, sampler.largest), "data")]
        if not tasks:
            return None
        return self._recorded(tasks, placement)

    def _given(
        self, data: Iterable[Any], seed: tuple[int, ...], forward: Forward | None, placement: Any
    ) -> TaskReferences:
        """Samples of what the user has passed as references; whole batches if they do not run."""
        seed = (*seed, placement.ranks.place[0])
        samplers = [ReferenceSampler(self.budget.samples, forward, seed, w) for w in (False, True)]
        for batch in data:
            for sampler in samplers:
                sampler.add(batch)
        samples, batches = (
            _checked(TaskReferences(each.gathered(placement.ranks), each.largest), "reference")
            for each in samplers
        )
        try:
            self._recorded([samples], placement)
        except ValueError:
            return batches
        return samples

    def _recorded(self, tasks: list[TaskReferences], placement: Any) -> References:
        """With the outputs of the model as it is now; an error on one rank is raised on all."""
        recorded: list[References] = []
        placement.ranks.attempt(
            lambda: recorded.append(References.of(placement.model, tasks, self.comparison))
        )
        return recorded[0]

    def _placement(self, model: nn.Module) -> Any:
        return placement_of(model, self._process_group)

    def restored(self, state: Mapping[str, Any]) -> DriftState:
        """The part of a state dictionary that is for a drift budget.

        Raises:
            ValueError: it is damaged, or needs ``DriftBudget(forward=...)``.
        """
        budget = self.budget
        found = DriftState.from_state_dict(
            state["control"], state["references"], self.comparison, budget.samples, budget.forward
        )
        if found.references is None and state["num_tasks"] > 0:
            warn(
                "the state has no references for the drift budget: until the next task ends, the "
                "drift cannot be measured, and λ stays as it is"
            )
        return found

    # -- the drift -----------------------------------------------------------------------------

    def measured(self, protected: ProtectedParameters, some: int | None = None) -> float:
        """The drift since the task began, on all references, or on the next ``some``."""
        state, references = protected.state, self._kept(protected)
        if references is None:
            return 0.0
        placement = self._placement(protected.index.model)
        window = None
        if some is not None:
            count = max(1, some // len(references.tasks))
            window = (state.drift.controller.measured * count, count)
        return references.drift(placement.model, placement.ranks, window)

    def loss(self, protected: ProtectedParameters, samples: int | None) -> Tensor:
        """See :meth:`mas_ext.MAS.drift_loss`."""
        model, references = protected.index.model, self._kept(protected)
        if references is None:
            warn(
                "drift_loss() is 0 until the first consolidate(): to keep what a pretrained model "
                "does, call consolidate(data) before training"
            )
            return torch.zeros((), device=next(model.parameters()).device)
        if any(is_sharded(param) for param in model.parameters()):
            raise ValueError(
                "drift_loss: the model is sharded, and all processes would have to run the same "
                "references; use the penalty, which runs none"
            )
        return references.loss(model, samples or references.batch_size)

    def _kept(self, protected: ProtectedParameters) -> References | None:
        """The references; None before the first task has ended."""
        state = protected.state
        references = state.drift.references
        if references is None and state.num_tasks > 0:
            raise RuntimeError(
                "the drift cannot be measured: the loaded state has no references. They are kept "
                "again when the next task ends; torch.distributed.checkpoint does not load "
                "them, and a MAS without a budget does not keep them"
            )
        return references

    def warn_if_over(self, protected: ProtectedParameters) -> None:
        """Warns if a task is about to end above the limit."""
        if protected.state.drift.references is None:
            return
        limit = self.budget.limit
        try:
            drift = self.measured(protected)
        except ValueError as problem:  # an output has shrunk: the next task has new references
            warn(f"the drift of this task could not be measured: {problem}")
            return
        if drift > OVER * limit:
            warn(
                f"budget: this task has drifted by {drift:.3g}, and the limit is {limit:g}; call "
                "mas.settle() before consolidate(). During training, λ steers the drift "
                "towards DriftBudget's slack times the limit"
            )

    def after_step(
        self, protected: ProtectedParameters, optimizer: Optimizer | None, mode: str
    ) -> None:
        """Counts a step of an optimizer; if it is time, measures the drift and changes λ.

        None: the user takes the steps, with one call in each.
        """
        drift = protected.state.drift
        if drift.references is None:
            return
        if optimizer is not None:
            if self._round and optimizer not in self._round:
                self._round.add(optimizer)  # one of several that together take a step
                return
            self._last_round, self._round = self._round, WeakSet([optimizer])
        drift.controller.steps += 1
        if drift.controller.is_due(self.budget.every or REGULAR):
            self._follow(protected, optimizer, mode)

    def before_step(self, protected: ProtectedParameters, optimizer: Optimizer) -> None:
        """Lowers λ where a gradient step diverges, now that the learning rate has grown."""
        if protected.state.drift.references is None or normalizes_updates(optimizer):
            return
        rate = max(float(group["lr"]) for group in optimizer.param_groups)
        if rate > self._rate:
            self._rate = rate
            self._limit(protected, {optimizer})

    def _limit(self, protected: ProtectedParameters, optimizers: Iterable[Optimizer]) -> None:
        state = protected.state
        state.drift.controller.limit_factor(self._stable_factor(protected, optimizers))
        state.follow_controller()

    @torch.no_grad()
    def _follow(
        self, protected: ProtectedParameters, optimizer: Optimizer | None, mode: str
    ) -> None:
        state = protected.state
        controller, references = state.drift.controller, state.drift.references
        assert references is not None
        protected.follow_steps()
        drift = self.measured(protected, references.batch_size)
        kind = _kind(optimizer, mode)
        penalty, limit = float(protected.penalty(kind)), self.budget.limit * self.budget.slack
        size = penalty / state.strength.factor
        if controller.steps == 1 and state.strength.is_auto and mode == "gradient" and optimizer:
            work = self._placement(protected.index.model).ranks.largest(_work(optimizer))
            controller.start_from(work, drift, 2 * size, limit)
        controller.follow(drift, size, limit)
        if state.strength.is_auto:
            controller.keep_above(LOWEST)
        state.follow_controller()
        if mode == "gradient" and optimizer is not None:
            self._limit(protected, {optimizer, *self._last_round})
        numbers = state.strength.numbers(kind)
        self.trace.append(DriftRecord(controller.steps, drift, numbers, penalty, state.num_tasks))

    def _stable_factor(
        self, protected: ProtectedParameters, optimizers: Iterable[Optimizer]
    ) -> float:
        """Up to which factor of λ the steps of these optimizers do not diverge."""
        plain = [one for one in optimizers if not normalizes_updates(one)]
        rates = [float(group["lr"]) for one in plain for group in one.param_groups]
        if not rates:
            return math.inf
        state = protected.state
        if self._largest[:2] != (state.strength, state.num_tasks):
            ranks = self._placement(protected.index.model).ranks
            sizes = [one.largest() for one in protected.find()]
            sizes += [one.largest() for one in protected.updates()]
            largest = ranks.largest(max(sizes, default=0.0))
            self._largest = state.strength, state.num_tasks, largest / state.strength.factor
        return step_is_stable_up_to(max(rates) * self._largest[2])

    @torch.no_grad()
    def settle(self, protected: ProtectedParameters, limit: float, weights: str) -> Settled:
        """See :meth:`mas_ext.MAS.settle`."""
        before = self.measured(protected)
        if before <= limit:
            return Settled(before, before, 0.0)
        references = protected.state.drift.references
        assert references is not None
        # Where Ω is 0, importance moves nothing, though it may matter by now.
        for weighted in dict.fromkeys((weights, "uniform")):
            path = Path(
                protected.find(),
                protected.updates(),
                protected.index.model,
                references.buffers,
                weighted,
            )
            found = None
            try:
                found = search(path, lambda: self.measured(protected), limit, before)
            finally:
                if found is None:
                    path.put(0.0)
            if found is not None:
                return Settled(before, found.drift, found.c)
        raise ValueError(
            f"budget: with every protected parameter back at θ* the drift would still be above "
            f"{limit:g}. Either parameters that are not protected have changed: protect them with "
            "params= and λ above 0; or the limit is below what can be measured, about 1e-5 nats, "
            "since outputs are kept in float16. Nothing was changed"
        )


def _kind(optimizer: Optimizer | None, mode: str) -> UpdateKind:
    """For which updates λ is, where a step is taken by an optimizer, or by hand."""
    if optimizer is None:
        return "normalized" if mode == "proximal" else "gradient"
    return update_kind(optimizer, mode)


def _work(optimizer: Optimizer) -> float:
    """Σ|gᵢδᵢ| of an optimizer's first step, which it has just taken: later ones have momentum.

    0 if it does not tell its learning rate.
    """
    power = 1 if normalizes_updates(optimizer) else 2
    sums = [
        float(group.get("lr") or 0.0) * float(full_tensor(p.grad.abs().pow(power).sum()))
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None
    ]
    return sum(sums) / float(getattr(optimizer, "grad_scale", None) or 1.0)


def _checked(task: TaskReferences, argument: str) -> TaskReferences:
    if not task.parts:
        raise ValueError(
            f"{argument}: it gave no samples to keep as references of the drift budget"
        )
    return task
