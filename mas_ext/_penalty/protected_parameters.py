"""The penalty on a model's parameters: what MAS, ``attach`` and :mod:`mas_ext.optim` share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from mas_ext._distributed.shards import local
from mas_ext._drift.tracker import DriftTracker
from mas_ext._parameters import ParameterIndex
from mas_ext._penalty.kept_groups import KeptGroups
from mas_ext._penalty.parameter_groups import (
    ParameterGroup,
    ProtectedParameter,
    Scalar,
    grouped,
)
from mas_ext._penalty.pending_steps import WaitingSteps
from mas_ext._penalty.weight_updates import ProtectedUpdate
from mas_ext._state.pending_steps import StoredSteps
from mas_ext._state.regularizer_state import RegularizerState
from mas_ext._strength.auto import UpdateKind
from mas_ext._warnings import warn
from mas_ext.reference import accumulation_dtype


class ProtectedParameters:
    """The parameters that were measured, are in the model and require gradients.

    Methods that take ``only`` are about the parameters in it; None means all.

    Attributes:
        index: the model's parameters by name.
        state: what is remembered of them.
        optimizers: those that are attached.
        attachments: how many have not been removed, also of optimizers that no longer exist.
        waiting: the steps that the proximal step has yet to follow.
        attached_everywhere: the one that all optimizers share, if there is one.
        has_acted: whether a step has included the penalty since the last task ended.
        tracker: makes λ follow the drift, under a drift budget; otherwise None.
    """

    def __init__(
        self, index: ParameterIndex, state: RegularizerState, tracker: DriftTracker | None = None
    ) -> None:
        self.index = index
        self.state = state
        self.tracker = tracker
        self.optimizers: WeakSet[Optimizer] = WeakSet()
        self.waiting = WaitingSteps()
        self.attachments = 0
        self.attached_everywhere: Any = None
        self.has_acted = False
        self._warned_of: set[str] = set()  # names that the user has been warned about
        self._kept = KeptGroups()

    def __getstate__(self) -> dict[str, Any]:
        # A copy is attached to nothing. That its original was is enough to warn about it.
        of_the_original = ("optimizers", "waiting", "attached_everywhere", "_kept")
        return {**self.__dict__, **dict.fromkeys(of_the_original)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        defaults = {
            "attachments": 0,
            "attached_everywhere": None,
            "has_acted": False,
            "tracker": None,
        }
        of_this = {"optimizers": WeakSet(), "waiting": WaitingSteps(), "_kept": KeptGroups()}
        self.__dict__.update({**defaults, **state, **of_this})

    # -- the penalty -------------------------------------------------------------------------------

    def penalty(self, update: UpdateKind = "gradient") -> Tensor:
        """See :meth:`mas_ext.MAS.penalty`; with λ for this kind of update."""
        values = [group.penalty() for group in self.groups(update=update)]
        values += [one.penalty() for one in self.updates(update=update)]
        return self.sum(values) if values else self._zero(torch.is_grad_enabled())

    def add_penalty_grad_(
        self, grad_scale: Scalar | None = None, only: Sequence[Tensor] | None = None
    ) -> Tensor:
        """See :meth:`mas_ext.MAS.add_penalty_grad_`."""
        groups, updates = self.groups(only), self.updates(only)
        self.has_acted |= bool(groups or updates)
        values = [group.add_penalty_grad_(grad_scale) for group in groups]
        return self.sum(values + [one.add_penalty_grad_(grad_scale, only) for one in updates])

    def proximal_step_(
        self,
        lr: Scalar,
        only: Sequence[Tensor] | None = None,
        update: UpdateKind = "normalized",
    ) -> Tensor:
        """See :meth:`mas_ext.MAS.proximal_step_`."""
        self.check_proximal()
        groups = self.groups(only, update)
        self.has_acted |= bool(groups)
        return self.sum([group.proximal_step_(lr) for group in groups])

    def before_step(self, optimizer: Optimizer) -> None:
        """To be called before each step that adds the penalty's gradient."""
        if self.tracker is not None:
            before_step = self.tracker.before_step
            if torch.compiler.is_compiling():
                before_step = torch.compiler.disable(before_step)
            before_step(self, optimizer)

    def after_step(self, optimizer: Optimizer | None, mode: str) -> None:
        """To be called after each step that includes the penalty: λ follows the drift."""
        if self.tracker is None:
            return
        after_step = self.tracker.after_step
        if torch.compiler.is_compiling():  # counting and measuring stay outside of compiled code
            after_step = torch.compiler.disable(after_step)
        after_step(self, optimizer, mode)

    def follow_steps(self) -> None:
        """Takes the proximal steps that are pending: before anything depends on where θ is."""
        self.waiting.follow_all(self)

    def pending_steps(self) -> dict[str, StoredSteps]:
        """What is pending, for a state."""
        return self.waiting.stored(self)

    def use_state(self, state: RegularizerState) -> None:
        """Replaces everything that is remembered."""
        self.state = state
        self.has_acted = True  # it may have, before the state was saved
        self.forget_groups()
        self.waiting.forget()

    def sum(self, values: list[Tensor]) -> Tensor:
        """The sum of 0-dim values, which may be on several devices; zero for none."""
        if not values:
            return self._zero()
        total = values[0]
        for value in values[1:]:
            total = total + value.to(total.device, non_blocking=True)
        return total

    def _zero(self, requires_grad: bool = False) -> Tensor:
        p = next(iter(self.index.named().values()))
        dtype = accumulation_dtype(p.dtype)
        return torch.zeros((), dtype=dtype, device=p.device, requires_grad=requires_grad)

    # -- which parameters --------------------------------------------------------------------------

    def groups(
        self, only: Sequence[Tensor] | None = None, update: UpdateKind = "gradient"
    ) -> list[ParameterGroup]:
        """The protected parameters, by operator call; kept while nothing about them changes."""
        if torch.compiler.is_compiling():
            return grouped(self.find(only, update))
        key = update, None if only is None else tuple(map(id, only))
        groups = self._kept.get(key, self._sources())
        if groups is None:
            groups = grouped(self.find(only, update))
            candidates = [p for _, p in self._candidates(only)]
            self._kept.put(key, self._sources(), only, candidates, groups)
        lambda_of = self.state.strength.lambda_of  # which finding "auto" anew has replaced
        return [g._replace(lambda_reg=lambda_of(g.names[0], update)) for g in groups]

    def _sources(self) -> tuple[Any, ...]:
        """What groups are made from: objects that are replaced, not changed, by other groups."""
        remembered = self.state.consolidated
        return self.index.named(), remembered.anchor, remembered.importance, self.state.strength

    def forget_groups(self) -> None:
        """Lets go of the tensors that groups hold on to, once the state has been replaced."""
        self._kept.clear()

    def find(
        self, only: Sequence[Tensor] | None = None, update: UpdateKind = "gradient"
    ) -> list[ProtectedParameter]:
        """The protected parameters, with λ for this kind of update.

        The state follows first if one of them grew, or moved to another device or dtype.
        """
        found = self._find(only, update)
        matches = self.state.consolidated.matches
        if all(matches(one.anchor, local(one.param)) for one in found):
            return found
        params = self.state.local({one.name: one.param for one in found})
        self.state.consolidated.make_room(params)
        return self._find(only, update)

    def _find(self, only: Sequence[Tensor] | None, update: UpdateKind) -> list[ProtectedParameter]:
        remembered, strength = self.state.consolidated, self.state.strength
        self._warn_of_missing(self._missing())
        return [
            ProtectedParameter(
                name,
                param,
                remembered.anchor[name],
                *remembered.importance.stored(name),
                strength.pattern_of(name),
                strength.lambda_of(name, update),
            )
            for name, param in self._candidates(only)
            if param.requires_grad
        ]

    def _candidates(self, only: Sequence[Tensor] | None) -> list[tuple[str, Parameter]]:
        """The parameters that are protected if they require gradients, in the model's order.

        A file does not keep that order, on which sums depend in their last bit.
        """
        remembered, ids = self.state.consolidated, None if only is None else set(map(id, only))
        return [
            (name, p)
            for name, p in self.index.named().items()
            if name in remembered.anchor
            and (ids is None or id(p) in ids)
            and name not in remembered.adapted
        ]

    def updates(
        self, only: Sequence[Tensor] | None = None, update: UpdateKind = "gradient"
    ) -> list[ProtectedUpdate]:
        """The weights that are trained through their adapters, with λ for this kind of update."""
        remembered, strength = self.state.consolidated, self.state.strength
        if not remembered.adapted:
            return []
        adapted = {n: w for n, w in self.index.adapted.items() if n in remembered.adapted}
        ids = None if only is None else set(map(id, only))
        remembered.make_room({n: w.weight for n, w in adapted.items()}, adapted)
        return [
            ProtectedUpdate(
                weight,
                self.state.adapters.adapters.get(name, {}),
                *remembered.importance.stored(name),
                strength.lambda_of(name, update),
            )
            for name, weight in adapted.items()
            if ids is None or not ids.isdisjoint(map(id, weight.params()))
        ]

    def _missing(self) -> list[str]:
        """What was measured and is no longer in the model, or no longer has an adapter."""
        named, remembered = self.index.named(), self.state.consolidated
        gone = remembered.adapted - self.index.adapted.keys() if remembered.adapted else ()
        return [name for name in remembered.anchor if name not in named or name in gone]

    def check_proximal(self) -> None:
        """Raises ValueError if there is no proximal step for what is protected."""
        if self.index.adapted:
            raise ValueError(
                'mode: the proximal step is not available with adapters="merged"; use '
                'mode="gradient"'
            )

    def _warn_of_missing(self, names: list[str]) -> None:
        """Warns once per name: a head may have been removed, but a renamed layer is unprotected."""
        new = [name for name in names if name not in self._warned_of]
        if new:
            self._warned_of.update(new)
            warn(
                f"parameter {new[0]!r} ({len(new)} in all) was measured and is no longer in the "
                "model under that name, so it is not protected; if it was renamed, by a "
                "parametrization for example, measure it again with consolidate()"
            )

    def warn_of_no_importance(self) -> None:
        """Warns once per name of parameters that no measured output of any task depends on."""
        new = [name for name in self.state.without_importance() if name not in self._warned_of]
        if new:
            self._warned_of.update(new)
            warn(
                f"the importance of {new[0]!r} ({len(new)} parameters in all) is 0, because no "
                "measured output depends on it: it is not protected. If it belongs to an output "
                "that was not measured, measure that output too, with forward=; if it belongs to "
                "a later task, you need not do anything; to exclude it, use params="
            )

    # -- which optimizers --------------------------------------------------------------------------

    def are_in(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer holds any parameter of the model."""
        ours = self._ids(self.index.named())
        return not ours.isdisjoint(parameter_ids(optimizer))

    def act_on(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer holds any parameter that has an importance."""
        ours = self._ids(self.state.consolidated.anchor)
        return not ours.isdisjoint(parameter_ids(optimizer))

    def _ids(self, names: Iterable[str]) -> set[int]:
        """The ids of parameters that are in the model, or of their adapters'."""
        named, adapted = self.index.named(), self.index.adapted
        ours = {id(named[name]) for name in names if name in named and name not in adapted}
        return ours.union(id(p) for n in names if n in adapted for p in adapted[n].params())

    def check_are_in(self, optimizer: Optimizer) -> None:
        """Raises ValueError if an optimizer holds no parameter of the model."""
        if not self.are_in(optimizer):
            raise ValueError("optimizer: it holds none of this model's parameters")

    def warn_if_never_applied(self) -> None:
        """Warns if something was attached, and parameters moved without it since the last task."""
        if self.has_acted or not self.attachments or not self._have_moved():
            return
        warn(
            "attach() was called, but no step has included the penalty since the last task ended, "
            "although protected parameters have moved: nothing held them in place. If the training "
            "uses a new optimizer, attach that one too, or remove() the handle and call "
            "mas.attach() once without an optimizer, which holds for all optimizers; if it steps "
            "through a wrapper, attach the optimizer inside; if mas.penalty() is in the loss "
            "instead, remove() the handle"
        )

    @torch.no_grad()
    def _have_moved(self) -> bool:
        """Whether a protected parameter is not at its anchor. Waits for the device."""
        moved = any(not torch.equal(local(one.param), one.anchor_beside()) for one in self.find())
        return moved or any(bool(one.square() > 0) for one in self.updates())


def parameter_ids(optimizer: Any) -> set[int]:
    """The ids of an optimizer's parameters; none of a wrapper without groups."""
    groups = getattr(optimizer, "param_groups", ())
    return {id(p) for group in groups for p in group["params"]}
