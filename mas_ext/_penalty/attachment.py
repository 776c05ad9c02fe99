"""The drop-in: MAS inside an optimizer's step, so that a training loop stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from typing import Any, Protocol
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer

from mas_ext._distributed.shards import whole
from mas_ext._penalty.auto_strength import pushed_by
from mas_ext._penalty.grad_scaling import scaled_step
from mas_ext.functional import check_mode


class Penalty(Protocol):
    """What an attachment needs of a regularizer; ``owned`` are the ids of the parameters meant."""

    _attached: WeakSet[Optimizer]

    def _add_penalty_grad(self, grad_scale: Any, owned: Set[int] | None) -> Tensor: ...

    def _proximal_step(self, lr: Any, owned: Set[int] | None, pushed_by: str) -> Tensor: ...

    def _total(self, values: list[Tensor]) -> Tensor: ...


class Attachment:
    """What :meth:`MAS.attach` returns.

    Attributes:
        last_penalty: the penalty of the last step, a 0-dim tensor; None before the first.
    """

    def __init__(self, mas: Penalty, optimizer: Optimizer, mode: str) -> None:
        check_mode(mode)
        if any(group.get("maximize") for group in optimizer.param_groups):
            raise ValueError(
                "optimizer: it maximizes, and would maximize the penalty; minimise the negative"
            )
        if getattr(optimizer, "_overlap_with_ddp", False):
            raise ValueError(
                "optimizer: ZeroRedundancyOptimizer(overlap_with_ddp=True) steps in backward(), "
                "where nothing can be attached; leave overlap_with_ddp out"
            )
        inner = getattr(optimizer, "optim", optimizer)  # what a ZeroRedundancyOptimizer shards
        if getattr(inner, "mas", None) is mas:
            raise ValueError(
                "this optimizer's step includes the penalty already, and it would count twice; "
                "leave attach() out"
            )
        if optimizer in mas._attached:
            raise ValueError("this optimizer is attached already; remove() the first handle")
        self.last_penalty: Tensor | None = None
        self._mas = mas
        self._optimizer = optimizer
        self._pushed_by = pushed_by(optimizer, mode)
        self._withheld: list[tuple[Tensor, Tensor]] = []
        if mode == "gradient":
            self._hooks = [
                optimizer.register_step_pre_hook(self._add_gradient),
                optimizer.register_step_post_hook(self._give_back),
            ]
        else:
            self._hooks = [optimizer.register_step_post_hook(self._step_towards_anchors)]
        self._mas._attached.add(optimizer)

    def remove(self) -> None:
        """Leaves the optimizer as it was before; more than once does no harm."""
        for hook in self._hooks:
            hook.remove()
        self._mas._attached.discard(self._optimizer)

    def _add_gradient(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # After clipping and unscaling, which both come before step().
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._add(optimizer)
            return None
        # The closure computes the gradients, maybe several times a step: each needs the penalty's.
        return args[:1], {**kwargs, "closure": self._with_penalty(optimizer, closure)}

    def _with_penalty(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        def penalised() -> Any:
            loss = closure()
            value = self._add(optimizer)
            if isinstance(loss, Tensor):
                return loss.detach() + value
            return None if loss is None else loss + float(value)

        return penalised

    def _add(self, optimizer: Optimizer) -> Tensor:
        # A fused optimizer under a GradScaler unscales inside its step: what is added before must
        # carry the scale.
        grad_scale = getattr(optimizer, "grad_scale", None)
        # What has no gradient the optimizer leaves alone, and so do we: a zero one would let weight
        # decay and momentum move it.
        params = [p for _, group in _groups(optimizer) for p in group if p.grad is not None]
        self.last_penalty = self._mas._add_penalty_grad(grad_scale, {id(p) for p in params})
        scaled = scaled_step(optimizer)
        if scaled is not None and scaled.skips([p.grad for p in params]):  # type: ignore[misc]
            self._withhold(params)
        return self.last_penalty

    def _withhold(self, params: list[Tensor]) -> None:
        """Takes the gradients away until the step is over: without any, it does nothing."""
        self._withheld = [(p, p.grad) for p in params if p.grad is not None]
        for p in params:
            p.grad = None

    def _give_back(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for p, grad in self._withheld:
            p.grad = grad
        self._withheld = []

    def _step_towards_anchors(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A fused optimizer under a GradScaler skips the step itself where this is 1.
        found_inf = getattr(optimizer, "found_inf", None)
        taken = 1.0 if found_inf is None else 1.0 - whole(found_inf).reshape(())
        values = [
            self._mas._proximal_step(rate * taken, {id(p) for p in params}, self._pushed_by)
            for rate, params in _groups(optimizer)
        ]
        self.last_penalty = self._mas._total(values)


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose step is taken in the end, out of Accelerate's or Lightning's wrapper."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _groups(optimizer: Optimizer) -> Iterator[tuple[Any, list[Tensor]]]:
    """Learning rate and parameters of each group."""
    for group in optimizer.param_groups:
        yield group["lr"], group["params"]
