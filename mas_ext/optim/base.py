"""What the optimizers share: which parameters take the fused step, and which take torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from mas_ext import functional
from mas_ext._distributed.shards import full_tensor, local_grads, locals_of
from mas_ext._penalty.grad_scaling import scaled_step
from mas_ext._penalty.parameter_groups import (
    ParameterGroup,
    are_dense,
    largest_penalty_grads,
    to_device_of,
)
from mas_ext._penalty.streaming import total
from mas_ext._strength.auto import update_kind
from mas_ext.quadratic import QuadraticRegularizer

Group = dict[str, Any]
Number = float | Tensor


def _check_group(group: Group) -> None:
    """Raises ValueError for what the fused step does not do. torch checks the other options."""
    if group.get("amsgrad"):
        raise ValueError(
            "amsgrad=True is not available here; use torch's class and mas.attach(optimizer)"
        )
    if group.get("differentiable"):
        raise ValueError(
            "differentiable=True: this step is not; use torch's class and mas.penalty() in the loss"
        )


def _check_implementation(options: Group) -> None:
    if options.get("foreach") or options.get("fused") is False:
        raise ValueError("foreach and fused: this step is always fused; leave both out")


def _check_dense(calls: list[ParameterGroup]) -> None:
    """Raises RuntimeError if the gradient of a protected parameter is sparse."""
    for call in calls:
        if are_dense([p.grad for p in call.params]):
            continue
        for name, p in zip(call.names, call.params, strict=True):
            if p.grad.layout != torch.strided:  # type: ignore[union-attr]
                raise RuntimeError(
                    f"the gradient of {name!r} is not dense (strided); convert it with "
                    "to_dense(), or leave sparse=True out of the layer"
                )


class PenaltyOptimizer(torch.optim.Optimizer):
    """What the classes share: which parameter takes which step.

    Comes before torch's class in the bases.
    """

    _step_supports_amp_scaling = True  # a class attribute: torch's own is lost when pickled
    mas: QuadraticRegularizer
    mode: str
    last_penalty: Tensor | None
    _operator: ClassVar[str]  # what takes the step

    def _set_penalty(self, mas: QuadraticRegularizer, mode: str, options: Group) -> None:
        """Must be called before torch's ``__init__``, which calls :meth:`add_param_group`."""
        if not isinstance(mas, QuadraticRegularizer):
            raise TypeError(f"mas is a {type(mas).__name__}; pass a mas_ext.MAS, EWC or L2SP")
        functional.check_mode(mode)
        if mas.protected.index.adapted:
            raise ValueError(
                'mas: adapters="merged" is not available here; use torch\'s class and '
                "mas.attach(optimizer)"
            )
        _check_implementation(options)
        _check_group(options)
        self.mas, self.mode, self.last_penalty = mas, mode, None

    # -- what keeps every group fused ----------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """As torch's."""
        if isinstance(param_group, dict):  # torch says what else is wrong
            _check_implementation(param_group)
            _check_group(param_group)
        super().add_param_group(param_group)
        self.param_groups[-1].update(fused=True, foreach=None)

    def __getstate__(self) -> dict[str, Any]:
        own = {"mas": self.mas, "mode": self.mode, "last_penalty": self.last_penalty}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From a pickle or :meth:`load_state_dict`; the state may be that of torch's class."""
        for group in state["param_groups"]:
            _check_group(group)
        for group in state["param_groups"]:
            group.update(fused=True, foreach=None)
        super().__setstate__(state)
        for p, values in self.state.items():  # torch keeps them on the CPU when not fused
            if isinstance(values.get("step"), Tensor):
                values["step"] = values["step"].to(p.device, torch.float32)

    # -- the step ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step that includes the penalty.

        Args:
            closure: evaluates the model again and returns the loss; it is called once.

        Returns:
            The closure's loss, without the penalty; see ``last_penalty``.

        Raises:
            RuntimeError: naming the parameter and the remedy, where a gradient cannot be used; the
                parameters of its group stay as they are.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.mode == "gradient":
            self.mas.protected.before_step(self)
        # The parameters that have a gradient: torch's optimizers leave the others alone, too.
        groups = [
            {**group, "params": [p for p in group["params"] if p.grad is not None]}
            for group in self.param_groups
        ]
        if self._overflows([p for group in groups for p in group["params"]]):
            return loss
        values = [value for group in groups for value in self._step_of(group)]
        self.mas.protected.has_acted |= bool(values)
        self.last_penalty = self.mas.protected.sum(values)
        self.mas.protected.after_step(self, self.mode)
        return loss

    def _step_of(self, group: Group) -> Iterator[Tensor]:
        """Takes a group's step; yields the penalty of each operator call."""
        kind = update_kind(self, self.mode)
        parts = [(part, self.mas.protected.groups(part, kind)) for part in self._split(group)]
        for _, calls in parts:  # before the first parameter is written
            _check_dense(calls)
            for call in calls:
                if call.is_elsewhere:
                    call.check(self._operator, grads=local_grads(call.params))
        for part, calls in parts:
            protected = {id(p) for call in calls for p in call.params}
            others = [p for p in part if id(p) not in protected]
            if others:
                self._take_torch_step({**group, "params": others})
            for call in calls:
                values = [
                    self._take_step({**group, "params": piece.params}, piece)
                    for piece in call.pieces(whole=True)
                ]
                yield call.sum_over_shards(total(values))

    def _overflows(self, params: list[Tensor]) -> bool:
        """Whether the penalty's gradient makes a GradScaler skip this step, and we have to as well.

        The step is all or nothing, so this must be known before the first parameter is written:
        under a scaler, and only there, the penalty's gradient is computed twice.
        """
        scaled = scaled_step(self) if self.mode == "gradient" else None
        protected = self.mas.protected.find(params) if scaled is not None else []
        return bool(protected) and scaled.skips(largest_penalty_grads(protected))  # type: ignore[union-attr]

    def _amp(self, like: Tensor) -> dict[str, Tensor | None]:
        """What a GradScaler sets on an optimizer that unscales and skips by itself."""
        scalars = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        return {
            name: None if scalar is None else to_device_of(like, full_tensor(scalar).reshape(()))
            for name, scalar in scalars.items()
        }

    def _arguments(self, group: Group, protected: ParameterGroup) -> dict[str, Any]:
        """The arguments that both operators take."""
        params, lr = protected.params, group["lr"]
        return {
            "params": locals_of(params),
            "grads": local_grads(params),
            **protected.operator_arguments(),
            "lr": to_device_of(params[0], lr.reshape(())) if isinstance(lr, Tensor) else lr,
            "mode": self.mode,
            "weight_decay": float(group["weight_decay"]),
            "maximize": group["maximize"],
            **self._amp(params[0]),
        }

    def _split(self, group: Group) -> Iterator[list[Tensor]]:
        """A group's parameters, split so that each part takes one kind of step."""
        yield group["params"]

    def _take_step(self, group: Group, protected: ParameterGroup) -> Tensor:
        """Takes the fused step of one operator call; returns the penalty of the local parts."""
        raise NotImplementedError

    def _take_torch_step(self, group: Group) -> None:
        """Takes torch's own fused step, for parameters that are not protected."""
        raise NotImplementedError
