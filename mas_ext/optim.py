r"""Optimizers whose step includes the penalty: one pass over memory for both.

One line of a training loop changes, and there is nothing to attach::

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = mas_ext.optim.AdamW(model.parameters(), lr=1e-3, mas=mas)

They are torch's classes in all but :meth:`step`: the arguments and their order, parameter groups,
schedulers, ``state_dict()`` (a checkpoint of torch's loads here and the other way round), pickling,
and ``torch.amp.GradScaler``, under which they behave as torch's fused optimizers do. What the MAS
holds in place takes the fused step; all else (before the first task is consolidated, everything)
takes torch's own, also fused. A parameter without a gradient is left alone, in either mode.

The penalty's gradient is added inside the step, after any clipping and unscaling, as by
``mas.attach(optimizer)``. Two differences: ``p.grad`` is only read, so that it holds the loss's
gradient after the step as before (under a ``GradScaler``, still scaled); and with ``maximize=True``
the loss is ascended and the penalty descended. Under a ``GradScaler`` the penalty's gradient is
looked at before the step, in one more pass, so that an Inf in it skips the step and lowers the
scale.

=============  =================================================================================
``mas``        the :class:`mas_ext.MAS`; what it remembers and its λ are looked at in every step
``mode``       ``"gradient"`` or ``"proximal"``, as in :meth:`mas_ext.MAS.attach`
``foreach``    not for these: None or False
``fused``      what they are: None or True
=============  =================================================================================

``optimizer.last_penalty`` is the penalty of the last step over what it moved, a 0-dim tensor (at θ
before the step; for ``"proximal"`` after it); None before the first. Nothing waits for the device,
so a step can be captured in a CUDA graph; a learning rate that changes has to be a tensor there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from mas_ext import functional
from mas_ext._distributed.shards import local_grads, locals_of, whole
from mas_ext._penalty.auto_strength import pushed_by
from mas_ext._penalty.grad_scaling import scaled_step
from mas_ext._penalty.parameter_groups import Bundle, Held, bundled, largest_pulls, naming, near
from mas_ext.regularizer import MAS

__all__ = ["SGD", "Adam", "AdamW"]

Group = dict[str, Any]
Number = float | Tensor


def _check_group(group: Group) -> None:
    """Refuses what the fused step does not do; options that are torch's own business are let by."""
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


class _IncludesPenalty(torch.optim.Optimizer):
    """What the classes share: who takes which step. Comes before torch's class in the bases."""

    _step_supports_amp_scaling = True  # of the class: torch's, of the object, is lost in a pickle
    mas: MAS
    mode: str
    last_penalty: Tensor | None

    def _include(self, mas: MAS, mode: str, options: Group) -> None:
        """Before torch's ``__init__``, which calls :meth:`add_param_group`."""
        if not isinstance(mas, MAS):
            raise TypeError(f"mas is a {type(mas).__name__}; pass a mas_ext.MAS")
        functional.check_mode(mode)
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
        """From a pickle, or from :meth:`load_state_dict`: then maybe of an optimizer of torch's."""
        for group in state["param_groups"]:
            _check_group(group)
        for group in state["param_groups"]:
            group.update(fused=True, foreach=None)
        super().__setstate__(state)
        for p, values in self.state.items():  # torch's own keeps them on the CPU when not fused
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
        held = self._held()
        if self._overflows(held):
            return loss
        values = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            others = [p for p in params if id(p) not in held]
            if others:
                self._take_torch_step({**group, "params": others})
            for part in self._alike({**group, "params": [p for p in params if id(p) in held]}):
                for bundle in bundled(held[id(p)] for p in part):
                    value = self._take_step({**group, "params": bundle.params}, bundle)
                    values.append(bundle.home.total(value))
        self.last_penalty = self.mas._total(values)
        return loss

    def _held(self) -> dict[int, Held]:
        """Those of our parameters that have a gradient and that the MAS holds, by id."""
        owned = {id(p) for g in self.param_groups for p in g["params"] if p.grad is not None}
        active = self.mas._active(owned, pushed_by(self, self.mode))
        for held in active:
            if held.param.grad.layout != torch.strided:  # type: ignore[union-attr]
                raise RuntimeError(
                    f"the gradient of {held.name!r} is not dense (strided); convert it with "
                    "to_dense(), or leave sparse=True out of the layer"
                )
        return {id(held.param): held for held in active}

    def _overflows(self, held: dict[int, Held]) -> bool:
        """Whether a GradScaler has to skip this step for the penalty's sake, and we for it.

        All or nothing, so it is known before the first parameter is written: under a scaler, and
        only there, the penalty's gradient is taken twice.
        """
        scaled = scaled_step(self) if self.mode == "gradient" and held else None
        if scaled is None:
            return False
        return scaled.skips(largest_pulls(held.values()))

    def _amp(self, like: Tensor) -> dict[str, Tensor | None]:
        """What a GradScaler leaves here for a step that unscales and skips by itself."""
        scalars = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        return {
            name: None if scalar is None else near(whole(scalar).reshape(()), like)
            for name, scalar in scalars.items()
        }

    def _arguments(self, group: Group, bundle: Bundle) -> dict[str, Any]:
        """What every operator is told of a group whose parameters are those of a bundle."""
        params, lr = bundle.params, group["lr"]
        return {
            "params": locals_of(params),
            "grads": local_grads(params),
            **bundle.state(),
            "lr": near(lr.reshape(()), params[0]) if isinstance(lr, Tensor) else lr,
            "mode": self.mode,
            "weight_decay": float(group["weight_decay"]),
            "maximize": group["maximize"],
            **self._amp(params[0]),
        }

    def _alike(self, group: Group) -> Iterator[list[Tensor]]:
        """A group's parameters, by what their step has to be told."""
        yield group["params"]

    def _take_step(self, group: Group, bundle: Bundle) -> Tensor:
        """The fused step of a group whose parameters are those of a bundle; returns its penalty.

        Of DTensors, the local parts: a step is element by element.
        """
        raise NotImplementedError

    def _take_torch_step(self, group: Group) -> None:
        """torch's own fused step, of all others."""
        raise NotImplementedError


def _is_narrow_on_cpu(p: Tensor) -> bool:
    """torch's fused SGD is wrong for these before torch 2.14."""
    return p.device.type == "cpu" and p.dtype in (torch.bfloat16, torch.float16)


class SGD(_IncludesPenalty, torch.optim.SGD):
    r"""``torch.optim.SGD`` whose step includes the penalty.

    20 bytes of memory traffic a float32 parameter (28 with momentum), where
    ``mas.attach(optimizer)`` and torch's fused step take 32 (40). See the module for what is common
    to its classes, and :func:`mas_ext.functional.sgd_step_` for the equations.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as torch's.
        mas, mode, foreach, fused: see :mod:`mas_ext.optim`.
        differentiable: refused.

    Raises:
        ValueError: an option that is not available, or none of the model's parameters.
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: Number = 0,
        nesterov: bool = False,
        *,
        mas: MAS,
        mode: str = "gradient",
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        options = {"foreach": foreach, "differentiable": differentiable, "fused": fused}
        self._include(mas, mode, options)
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, fused=True
        )
        mas._check_holds_ours(self)

    def _alike(self, group: Group) -> Iterator[list[Tensor]]:
        for part, _ in self._by_history(group):
            yield part["params"]

    def _take_step(self, group: Group, bundle: Bundle) -> Tensor:
        buffers = [] if group["momentum"] == 0 else self._buffers(group)
        is_first = self._kept(group)[0] is None
        arguments = self._arguments(group, bundle)
        with naming(bundle.names):
            value = functional.sgd_step_(
                **arguments,
                momentum_buffers=locals_of(buffers),
                momentum=group["momentum"],
                dampening=0.0 if is_first else group["dampening"],
                nesterov=group["nesterov"],
            )
        if is_first:
            self._keep(group["params"], buffers)
        return value

    def _take_torch_step(self, group: Group) -> None:
        for part, is_first in self._by_history(group):
            narrow = [p for p in part["params"] if _is_narrow_on_cpu(p)]
            wide = [p for p in part["params"] if not _is_narrow_on_cpu(p)]
            amp: dict[str, Any] = {
                name: getattr(self, name, None) for name in ("grad_scale", "found_inf")
            }
            if wide:
                self._sgd({**part, "params": wide}, is_first, fused=True, **amp)
            if narrow and not (amp["found_inf"] is not None and amp["found_inf"]):
                scale = 1.0 if amp["grad_scale"] is None else float(amp["grad_scale"])
                self._sgd({**part, "params": narrow}, is_first, scale)

    def _sgd(self, group: Group, is_first: bool, scale: float = 1.0, **how: Any) -> None:
        params, grads = group["params"], local_grads(group["params"])
        # Made here: torch's are not set to anything where the first step is skipped.
        buffers: list[Any] = [None] * len(params)
        if group["momentum"] != 0:
            buffers = self._buffers(group)
        sgd(
            locals_of(params),
            grads if scale == 1 else [g / scale for g in grads],
            locals_of(buffers),
            has_sparse_grad=any(g.is_sparse for g in grads),
            dampening=0.0 if is_first else group["dampening"],
            **{name: group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")},
            maximize=group["maximize"],
            **how,
        )
        if group["momentum"] != 0:
            self._keep(params, buffers)

    def _by_history(self, group: Group) -> Iterator[tuple[Group, bool]]:
        """Those with a momentum buffer, and those for which it is the first step."""
        has_history = [b is not None for b in self._kept(group)]
        if all(has_history):
            yield group, False
            return
        for is_first in (False, True):
            pairs = zip(group["params"], has_history, strict=True)
            chosen = [p for p, known in pairs if known != is_first]
            if chosen:
                yield {**group, "params": chosen}, is_first

    def _kept(self, group: Group) -> list[Tensor | None]:
        return [self.state.get(p, {}).get("momentum_buffer") for p in group["params"]]

    def _buffers(self, group: Group) -> list[Tensor]:
        return [
            torch.zeros_like(p) if b is None else b
            for p, b in zip(group["params"], self._kept(group), strict=True)
        ]

    def _keep(self, params: list[Tensor], buffers: list[Any]) -> None:
        for p, buffer in zip(params, buffers, strict=bool(buffers)):
            self.state[p]["momentum_buffer"] = buffer


class Adam(_IncludesPenalty, torch.optim.Adam):
    r"""``torch.optim.Adam`` whose step includes the penalty.

    36 bytes of memory traffic a float32 parameter, where ``mas.attach(optimizer)`` and torch's
    fused step take 48. See the module for what is common to its classes, and
    :func:`mas_ext.functional.adamw_step_` for the equations (``decoupled=False`` is this one's).

    Args:
        params, lr, betas, eps, weight_decay, maximize: as torch's.
        mas, mode, foreach, fused: see :mod:`mas_ext.optim`.
        capturable: taken and without effect: the step always is.
        amsgrad, differentiable: refused.

    Raises:
        ValueError: an option that is not available, or none of the model's parameters.
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        mas: MAS,
        mode: str = "gradient",
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **more: Any,
    ) -> None:
        options = {"foreach": foreach, "fused": fused}
        self._include(mas, mode, {**options, "amsgrad": amsgrad, "differentiable": differentiable})
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            maximize=maximize,
            capturable=capturable,
            fused=True,
            **more,
        )
        mas._check_holds_ours(self)

    def _take_step(self, group: Group, bundle: Bundle) -> Tensor:
        _, _, exp_avgs, exp_avg_sqs, steps = self._state_of(group)
        arguments = self._arguments(group, bundle)
        with naming(bundle.names):
            value = functional.adamw_step_(
                **arguments,
                exp_avgs=locals_of(exp_avgs),
                exp_avg_sqs=locals_of(exp_avg_sqs),
                steps=torch.stack(steps),
                betas=(float(group["betas"][0]), float(group["betas"][1])),
                eps=group["eps"],
                decoupled=group["decoupled_weight_decay"],
            )
        found_inf = arguments["found_inf"]
        taken = 1.0 if found_inf is None else (found_inf == 0).float()
        torch._foreach_add_(steps, taken)
        return value

    def _take_torch_step(self, group: Group) -> None:
        params, _, exp_avgs, exp_avg_sqs, steps = self._state_of(group)
        adam(
            locals_of(params),
            local_grads(params),
            locals_of(exp_avgs),
            locals_of(exp_avg_sqs),
            [],
            steps,
            fused=True,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            **{name: group[name] for name in ("lr", "weight_decay", "eps", "maximize")},
            decoupled_weight_decay=group["decoupled_weight_decay"],
        )

    def _state_of(self, group: Group) -> tuple[list[Tensor], ...]:
        """θ, g, m, v and steps taken, made as torch makes them."""
        lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
        self._init_group(group, *lists)
        params, grads, exp_avgs, exp_avg_sqs, _, steps = lists
        return params, grads, exp_avgs, exp_avg_sqs, steps


class AdamW(Adam, torch.optim.AdamW):
    r"""``torch.optim.AdamW`` whose step includes the penalty.

    36 bytes of memory traffic a float32 parameter, where ``mas.attach(optimizer)`` and torch's
    fused step take 48. See the module for what is common to its classes, and
    :func:`mas_ext.functional.adamw_step_` for the equations.

    Arguments and errors are those of :class:`Adam`.
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        mas: MAS,
        mode: str = "gradient",
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, mas=mas, mode=mode, **options
        )
