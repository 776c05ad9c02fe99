"""The penalty as part of an optimizer's step, so that a training loop stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from mas_ext._distributed.shards import full_tensor
from mas_ext._penalty.grad_scaling import scaled_step
from mas_ext._penalty.protected_parameters import ProtectedParameters
from mas_ext._strength.auto import update_kind
from mas_ext.functional import check_mode


class Attachment:
    """What :meth:`mas_ext.MAS.attach` returns.

    Attributes:
        last_penalty: the penalty of the last step, a 0-dim tensor; None before the first.
    """

    def __init__(self, protected: ProtectedParameters, optimizer: Optimizer, mode: str) -> None:
        check_mode(mode)
        _check_optimizer(optimizer, protected)
        self.last_penalty: Tensor | None = None
        self._protected = protected
        self._optimizer = optimizer
        self._update = update_kind(optimizer, mode)
        self._withheld: list[tuple[Tensor, Tensor]] = []
        if mode == "gradient":
            self._hooks = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._restore_gradients),
            ]
        else:
            self._hooks = [optimizer.register_step_post_hook(self._take_proximal_step)]
        protected.optimizers.add(optimizer)

    def remove(self) -> None:
        """Leaves the optimizer as it was before attach(); a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._protected.optimizers.discard(self._optimizer)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # After clipping and unscaling, which both come before step().
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._add_gradient(optimizer)
            return None
        # The closure computes the gradients, maybe several times a step: each needs the penalty's.
        return args[:1], {**kwargs, "closure": self._with_penalty(optimizer, closure)}

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
        params = [p for _, group in _groups(optimizer) for p in group if p.grad is not None]
        self.last_penalty = self._protected.add_penalty_grad_(grad_scale, {id(p) for p in params})
        scaled = scaled_step(optimizer)
        if scaled is not None and scaled.skips([p.grad for p in params]):  # type: ignore[misc]
            self._withhold_gradients(params)
        return self.last_penalty

    def _withhold_gradients(self, params: list[Tensor]) -> None:
        """Takes the gradients away until the step is over; without them it does nothing."""
        self._withheld = [(p, p.grad) for p in params if p.grad is not None]
        for p in params:
            p.grad = None

    def _restore_gradients(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for p, grad in self._withheld:
            p.grad = grad
        self._withheld = []

    def _take_proximal_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A fused optimizer under a GradScaler skips the step itself where this is 1.
        found_inf = getattr(optimizer, "found_inf", None)
        taken = 1.0 if found_inf is None else 1.0 - full_tensor(found_inf).reshape(())
        values = [
            self._protected.proximal_step_(lr * taken, {id(p) for p in params}, self._update)
            for lr, params in _groups(optimizer)
        ]
        self.last_penalty = self._protected.sum(values)


def _check_optimizer(optimizer: Optimizer, protected: ProtectedParameters) -> None:
    """Raises ValueError if the penalty cannot be part of this optimizer's step, or already is."""
    protected.check_are_in(optimizer)
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError(
            "optimizer: it maximizes, and would maximize the penalty; minimise the negative"
        )
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise ValueError(
            "optimizer: ZeroRedundancyOptimizer(overlap_with_ddp=True) steps in backward(), "
            "where nothing can be attached; leave overlap_with_ddp out"
        )
    inner = getattr(optimizer, "optim", optimizer)  # the optimizer that ZeroRedundancy shards
    if getattr(getattr(inner, "mas", None), "protected", None) is protected:
        raise ValueError(
            "this optimizer's step includes the penalty already, and it would count twice; "
            "leave attach() out"
        )
    if optimizer in protected.optimizers:
        raise ValueError("this optimizer is attached already; remove() the first handle")


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside Accelerate's or Lightning's wrapper."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _groups(optimizer: Optimizer) -> Iterator[tuple[Any, list[Tensor]]]:
    """Learning rate and parameters of each group."""
    for group in optimizer.param_groups:
        yield group["lr"], group["params"]
