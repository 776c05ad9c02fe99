"""Steps of optimizers that the proximal step has yet to follow: one for several of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import ref

from torch import Tensor
from torch.optim import Optimizer

from mas_ext._distributed.shards import full_tensor
from mas_ext._penalty.parameter_groups import Scalar
from mas_ext._state.pending_steps import StoredSteps
from mas_ext._strength.auto import UpdateKind, update_kind
from mas_ext._warnings import warn

if TYPE_CHECKING:
    from mas_ext._penalty.attachment import Attachment
    from mas_ext._penalty.protected_parameters import ProtectedParameters


@dataclass(eq=False)
class PendingSteps:
    """Of one optimizer, which may be gone before they are followed.

    Attributes:
        attachment: which is told the penalty after the proximal step, unless it is gone.
        steps: how many.
        groups: the parameters of each group.
        rates: Σ η of each group.
        update: the kind of update that the optimizer makes.
    """

    attachment: ref[Attachment]
    steps: int = 0
    groups: list[list[Tensor]] = field(default_factory=list)
    rates: list[Scalar] = field(default_factory=list)
    update: UpdateKind = "normalized"

    def add(self, optimizer: Optimizer) -> None:
        """A step that the optimizer has taken."""
        # A fused optimizer under a GradScaler skips the step itself where this is 1.
        found_inf = getattr(optimizer, "found_inf", None)
        taken = 1.0 if found_inf is None else 1.0 - full_tensor(found_inf).reshape(())
        self.groups = [group["params"] for group in optimizer.param_groups]
        self.rates += [0.0] * (len(self.groups) - len(self.rates))
        for i, group in enumerate(optimizer.param_groups):
            self.rates[i] = self.rates[i] + group["lr"] * taken
        self.update = update_kind(optimizer, "proximal")
        self.steps += 1

    def clear(self) -> None:
        """Begins anew."""
        self.steps, self.groups, self.rates = 0, [], []


class WaitingSteps:
    """All pending steps of the optimizers that one penalty is attached to."""

    def __init__(self) -> None:
        self._all: dict[PendingSteps, None] = {}  # in the order of their first step

    def take_over(
        self, pending: PendingSteps, optimizer: Optimizer, protected: ProtectedParameters
    ) -> None:
        """Begins with what a loaded state has pending for an optimizer's parameters."""
        if not protected.state.pending:
            return
        names = _first_names([group["params"] for group in optimizer.param_groups], protected)
        none = StoredSteps(0, 0.0, "normalized")
        found = [protected.state.pending.pop(name, none) for name in names]
        pending.steps = max(one.steps for one in found)
        pending.rates = [one.rate for one in found]

    def count(self, pending: PendingSteps, optimizer: Optimizer) -> None:
        """Adds a step that the optimizer has taken."""
        pending.add(optimizer)
        self._all[pending] = None

    def follow(self, pending: PendingSteps, protected: ProtectedParameters) -> None:
        """Takes one proximal step for all of an optimizer's."""
        values = [
            protected.proximal_step_(rate, params, pending.update)
            for rate, params in zip(pending.rates, pending.groups, strict=True)
        ]
        self._all.pop(pending, None)
        pending.clear()
        if (attachment := pending.attachment()) is not None:
            attachment.last_penalty = protected.sum(values)

    def follow_all(self, protected: ProtectedParameters) -> None:
        """Leaves nothing pending, also not what a loaded state has and no optimizer took over."""
        for pending in list(self._all):
            self.follow(pending, protected)
        loaded, protected.state.pending = protected.state.pending, {}
        if len(ways := {(one.rate, one.update) for one in loaded.values()}) > 1:
            warn(
                "the state was saved with proximal steps pending, of groups with different "
                "learning rates, and they are left out, since no optimizer has the groups: "
                "attach() it and take a step first, or save after a number of steps that "
                "attach(every=...) divides"
            )
        elif ways:  # the same for all: it need not be known which group a parameter is in
            ((rate, update),) = ways
            protected.proximal_step_(rate, update=update)

    def stored(self, protected: ProtectedParameters) -> dict[str, StoredSteps]:
        """For a state; also what was loaded, until its optimizers step."""
        stored = dict(protected.state.pending)
        for pending in self._all:
            names = _first_names(pending.groups, protected)
            for name, rate in zip(names, pending.rates, strict=True):
                stored[name] = StoredSteps(pending.steps, float(rate), pending.update)
        stored.pop("", None)
        return stored

    def forget(self) -> None:
        """Drops all, as another state takes the place of the one they were taken under."""
        for pending in self._all:
            pending.clear()
        self._all = {}


def _first_names(groups: list[list[Tensor]], protected: ProtectedParameters) -> list[str]:
    """Of each group, the first protected parameter; "" if there is none."""
    found = [protected.groups(params) for params in groups]
    return [calls[0].names[0] if calls else "" for calls in found]
