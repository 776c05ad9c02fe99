"""The penalty as part of an optimizer's step, so that a training loop stays as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, finalize, ref

import torch
from torch import Tensor
from torch.optim import Optimizer, SparseAdam
from torch.optim.optimizer import register_optimizer_step_post_hook as _everywhere_after
from torch.optim.optimizer import register_optimizer_step_pre_hook as _everywhere_before

from mas_ext._drift.budget import check_count
from mas_ext._penalty.grad_scaling import scaled_step
from mas_ext._penalty.pending_steps import PendingSteps
from mas_ext._penalty.protected_parameters import ProtectedParameters, parameter_ids
from mas_ext.functional import check_mode

EVERY = 10  # steps that one proximal step follows, under a budget; measurements are 20 apart
_STEP = Optimizer.profile_hook_step(lambda optimizer: None).__code__  # around every step


class Attachment:
    """What :meth:`mas_ext.MAS.attach` returns.

    Args:
        protected: the penalty.
        optimizer: its steps include the penalty. None: every optimizer of the model's parameters.
        mode: ``"gradient"`` or ``"proximal"``.
        every: how many steps one proximal step follows; None: :data:`EVERY` under a drift budget,
            and otherwise 1.

    Attributes:
        last_penalty: the penalty of the last step that included it, a 0-dim tensor; None before
            the first.
    """

    def __init__(
        self,
        protected: ProtectedParameters,
        optimizer: Optimizer | None,
        mode: str,
        every: int | None = None,
    ) -> None:
        check_every(every, mode)
        by_default = 1 if mode == "gradient" or protected.tracker is None else EVERY
        self._every = by_default if every is None else every
        if mode == "proximal":
            protected.check_proximal()
        self.last_penalty: Tensor | None = None
        self._reference: Callable[[], ProtectedParameters | None] = lambda: protected
        self._optimizer = optimizer
        self._mode = mode
        self._withheld: list[tuple[Tensor, Tensor]] = []
        self._pending: WeakKeyDictionary[Optimizer, PendingSteps] = WeakKeyDictionary()
        if optimizer is None:
            _check_nothing_is_attached(protected)
            # torch keeps these hooks, and they must not keep the MAS, nor outlive it.
            self._reference = ref(protected)
            self._hooks = self._registered(_everywhere_before, _everywhere_after)
            finalize(protected, _remove, list(self._hooks))
            protected.attached_everywhere = self
        else:
            _check_optimizer(optimizer, protected)
            _check_suits(optimizer, mode)
            before, after = optimizer.register_step_pre_hook, optimizer.register_step_post_hook
            self._hooks = self._registered(before, after)
            protected.optimizers.add(optimizer)
        protected.attachments += 1

    @property
    def _protected(self) -> ProtectedParameters:
        protected = self._reference()
        assert protected is not None, "its hooks have been removed"
        return protected

    def _registered(self, before: Callable[[Any], Any], after: Callable[[Any], Any]) -> list[Any]:
        """The handles of the hooks that this mode needs."""
        if self._mode == "proximal":
            return [after(self._after_proximal_step)]
        return [before(self._before_step), after(self._after_step)]

    def remove(self) -> None:
        """Leaves optimizers as they were before attach(); a second call does nothing."""
        protected, hooks = self._reference(), self._hooks
        self._hooks = []
        if protected is None or not hooks:
            return
        protected.follow_steps()
        _remove(hooks)
        protected.attachments -= 1
        if self._optimizer is None:
            protected.attached_everywhere = None
        else:
            protected.optimizers.discard(self._optimizer)

    def _is_left_alone(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer's step does not take the penalty from here.

        Of wrappers the inner optimizer acts, and :mod:`mas_ext.optim` includes the penalty itself.
        """
        if _is_nested(optimizer) or (self._optimizer is None and not self._takes_in(optimizer)):
            return True
        _check_suits(optimizer, self._mode)  # a group may have been added
        return False

    def _takes_in(self, optimizer: Optimizer) -> bool:
        """Whether an attachment to all optimizers is also one to this optimizer."""
        is_wrapper = _inner(optimizer) is not None or hasattr(optimizer, "_overlap_with_ddp")
        return (
            not is_wrapper
            and self._protected.act_on(optimizer)
            and not _includes(optimizer, self._protected)
        )

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._is_left_alone(optimizer):
            return None
        # After clipping and unscaling, which both come before step().
        is_keyword = "closure" in kwargs
        closure = kwargs["closure"] if is_keyword else args[1] if len(args) > 1 else None
        if not callable(closure):
            self._add_gradient(optimizer)
            return None
        # The closure computes the gradients, maybe several times a step: each needs the penalty's.
        closure = self._with_penalty(optimizer, closure)
        if is_keyword:
            return args, {**kwargs, "closure": closure}
        return (args[0], closure, *args[2:]), kwargs

    def _with_penalty(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        def closure_with_penalty() -> Any:
            loss = closure()
            value = self._add_gradient(optimizer)
            if isinstance(loss, Tensor):
                return loss.detach() + value
            return None if loss is None else loss + float(value)

        return closure_with_penalty

    def _add_gradient(self, optimizer: Optimizer) -> Tensor:
        # A fused optimizer under a GradScaler unscales inside its step: what is added before must
        # carry the scale.
        grad_scale = getattr(optimizer, "grad_scale", None)
        # The optimizer leaves a parameter without a gradient alone, and so do we: a gradient of
        # zero would let weight decay and momentum move it.
        params = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        self._protected.before_step(optimizer)
        self.last_penalty = self._protected.add_penalty_grad_(grad_scale, params)
        scaled = scaled_step(optimizer)
        if scaled is not None and scaled.skips([p.grad for p in params]):
            self._withhold_gradients(params)
        return self.last_penalty

    def _withhold_gradients(self, params: list[Tensor]) -> None:
        """Takes the gradients away until the step is over; without them it does nothing."""
        self._withheld = [(p, p.grad) for p in params if p.grad is not None]
        for p in params:
            p.grad = None

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._is_left_alone(optimizer):
            return
        for p, grad in self._withheld:
            p.grad = grad
        self._withheld = []
        self._protected.after_step(optimizer, self._mode)

    def _after_proximal_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._is_left_alone(optimizer):
            return
        waiting, protected = self._protected.waiting, self._protected
        if _counts_once():  # what is pending must not be followed in each replay
            every, pending = 1, PendingSteps(ref(self))
        else:
            every, pending = self._every, self._pending_of(optimizer)
        waiting.count(pending, optimizer)
        if pending.steps >= every:
            waiting.follow(pending, protected)
        protected.after_step(optimizer, self._mode)

    def _pending_of(self, optimizer: Optimizer) -> PendingSteps:
        """An optimizer's pending steps, which may begin with those of a state that was loaded."""
        pending = self._pending.get(optimizer)
        if pending is None:
            pending = self._pending[optimizer] = PendingSteps(ref(self))
        if not pending.steps:
            self._protected.waiting.take_over(pending, optimizer, self._protected)
        return pending


def check_every(every: int | None, mode: str) -> None:
    """Raises ValueError for a mode that there is not, or what it cannot do."""
    check_mode(mode)
    if every is not None:
        check_count("every", every)
    if mode == "gradient" and every not in (None, 1):
        raise ValueError(
            f"every={every}: the gradient must be added in each step, since a sum over several "
            'would not be stable; use mode="proximal", or leave every out'
        )


def _counts_once() -> bool:
    """Whether this code will not run in the next step: it is compiled, or in a CUDA graph."""
    is_captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return is_captured or torch.compiler.is_compiling()


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()


def _check_optimizer(optimizer: Optimizer, protected: ProtectedParameters) -> None:
    """Raises ValueError if the penalty cannot be part of this optimizer's step, or already is."""
    protected.check_are_in(optimizer)
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise ValueError(
            "optimizer: ZeroRedundancyOptimizer(overlap_with_ddp=True) steps in backward(), "
            "where nothing can be attached; leave overlap_with_ddp out"
        )
    if _includes(optimizer, protected):
        raise ValueError(
            "this optimizer's step includes the penalty already, and it would count twice; "
            "leave attach() out"
        )
    if optimizer in protected.optimizers or protected.attached_everywhere is not None:
        raise ValueError("this optimizer is attached already; remove() the first handle")


def _check_suits(optimizer: Optimizer, mode: str) -> None:
    """Raises ValueError if an optimizer's step cannot include a penalty in this mode."""
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError(
            "optimizer: it maximizes, which would maximize the penalty too; minimize the negative "
            "loss instead"
        )
    if mode == "gradient" and isinstance(optimizer, SparseAdam):
        raise ValueError(
            "optimizer: SparseAdam takes sparse gradients only, and the penalty's is dense; use "
            'mode="proximal"'
        )
    if mode == "proximal" and any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(
            "optimizer: the proximal step needs the learning rate, and a group's lr is missing or "
            "None; pass lr= to the optimizer (Adafactor: relative_step=False, too), or use "
            'mode="gradient"'
        )


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether this is a step inside the same optimizer's step: one that calls ``super().step()``.

    torch runs the hooks of both. The calls in progress tell, also after an error in a step.
    """
    if torch.compiler.is_compiling():
        return False
    frame, steps = sys._getframe(1), 0
    while frame is not None and steps < 2:
        steps += frame.f_code is _STEP and frame.f_locals["args"][0] is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return steps > 1


def _check_nothing_is_attached(protected: ProtectedParameters) -> None:
    if protected.attached_everywhere is not None or protected.optimizers:
        raise ValueError(
            "attach() without an optimizer: something is attached already, and the penalty would "
            "count twice; call remove() on the first handle"
        )


def _includes(optimizer: Optimizer, protected: ProtectedParameters) -> bool:
    """Whether an optimizer of :mod:`mas_ext.optim` takes this penalty."""
    inner = getattr(optimizer, "optim", optimizer)  # the optimizer that ZeroRedundancy shards
    return getattr(getattr(inner, "mas", None), "protected", None) is protected


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer that takes the steps: the one inside wrappers, however many there are.

    Accelerate and Lightning wrap an optimizer, and so do SAM, Lookahead and schedule-free ones,
    whose own ``step()`` need not be what is called.

    Raises:
        TypeError: it is no torch optimizer, and holds none.
    """
    seen = {id(optimizer)}
    while (inner := _inner(optimizer)) is not None and id(inner) not in seen:
        optimizer = inner
        seen.add(id(inner))
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}, which is neither a torch.optim.Optimizer "
            "nor has exactly one as an attribute; call add_penalty_grad_() before each of its steps"
        )
    return optimizer


def _inner(optimizer: Any) -> Optimizer | None:
    """The one optimizer that a wrapper holds, with all parameters that the wrapper has.

    ZeroRedundancyOptimizer counts as no wrapper.
    """
    if hasattr(optimizer, "_overlap_with_ddp"):
        return None
    found = {id(v): v for v in getattr(optimizer, "__dict__", {}).values() if v is not optimizer}
    ours = parameter_ids(optimizer)
    inner = [v for v in found.values() if isinstance(v, Optimizer) and ours <= parameter_ids(v)]
    return inner[0] if len(inner) == 1 else None
