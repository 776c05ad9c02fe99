"""MAS through the training runs of another library: what its callbacks have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mas_ext._distributed.shards import is_sharded
from mas_ext._distributed.topology import is_running
from mas_ext._penalty.attachment import Attachment, unwrapped
from mas_ext._penalty.auto_strength import DEFAULT as DEFAULT_DRIFT
from mas_ext._penalty.strength import Strength
from mas_ext.functional import check_mode
from mas_ext.importance.options import CheckpointedMeasurementOptions, Measurement
from mas_ext.regularizer import MAS


def _keywords(function: Callable[..., Any]) -> frozenset[str]:
    """What may be given by name."""
    return frozenset(inspect.signature(function).parameters) - {"self", "model", "data"}


_OF_MAS = _keywords(MAS.__init__)
_OF_IMPORTANCE = frozenset(CheckpointedMeasurementOptions.__annotations__)


class Guard:
    """A :class:`MAS`, made once there is a model, and inside its optimizers while they train.

    Args:
        lambda_reg: λ, or None for the default of :class:`MAS`.
        mas: one that exists already, instead of one that is made here.
        mode: as for :meth:`MAS.attach`.
        options: keyword arguments of :class:`MAS` and of :meth:`MAS.consolidate`, in any order.

    Attributes:
        mas: None before :meth:`bind`, unless it was given.

    Raises:
        TypeError: an option that neither of the two has.
        ValueError: one out of range or unknown; or one of MAS's beside ``mas``.
    """

    def __init__(
        self, lambda_reg: Any, mas: MAS | None, mode: str, options: Mapping[str, Any]
    ) -> None:
        check_mode(mode)
        self._mode = mode
        self._regularizer, self._importance = _sorted_out(lambda_reg, options)
        if mas is not None and self._regularizer:
            raise ValueError(
                f"mas: it has settings of its own; leave {', '.join(self._regularizer)} out"
            )
        _check_early(self._regularizer, self._importance)
        self.mas = mas
        self._made_here = mas is None
        self._model: nn.Module | None = None
        self._steps: list[Any] = []  # what includes the penalty, and knows the last one

    # -- a run -----------------------------------------------------------------------------------

    def bind(self, model: nn.Module) -> MAS:
        """The regularizer of this model; what is known follows when the model was made anew."""
        if self._made_here and (self.mas is None or self._model is not model):
            mas = MAS(model, **{**_processes(model), **self._regularizer})
            if self.mas is not None:
                mas.load_state_dict(self.mas.state_dict())
            self.mas = mas
        self._model = model
        assert self.mas is not None
        return self.mas

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Includes the penalty in their steps, in place of those of a run that was broken off.

        One of :mod:`mas_ext.optim` that was made with this MAS has it already.
        """
        self.detach()
        assert self.mas is not None
        try:
            for optimizer in self._ours(optimizers):
                self._steps.append(self._attached(self.mas, optimizer))
        except BaseException:
            self.detach()
            raise

    def _attached(self, mas: MAS, optimizer: Optimizer) -> Any:
        """An attachment; or the optimizer, if its step includes this penalty already."""
        has_it = getattr(optimizer, "mas", None) is mas
        return optimizer if has_it else mas.attach(optimizer, self._mode)

    def _ours(self, optimizers: Iterable[Optimizer]) -> list[Optimizer]:
        """Those that hold parameters of the model; all if none does, for attach() to refuse."""
        assert self.mas is not None
        everyone = [unwrapped(optimizer) for optimizer in optimizers]
        params = {id(p) for p in self.mas._index.named().values()}
        ours = [
            optimizer
            for optimizer in everyone
            if any(id(p) in params for group in optimizer.param_groups for p in group["params"])
        ]
        return ours or everyone

    def detach(self) -> None:
        """Leaves the optimizers as they were; more than once does no harm."""
        for step in self._steps:
            if isinstance(step, Attachment):
                step.remove()
        self._steps = []

    @property
    def penalty(self) -> Tensor | None:
        """Of the last step, over all optimizers; None while there is none."""
        if self.mas is None or not self.mas.num_tasks:
            return None
        values = [step.last_penalty for step in self._steps if step.last_penalty is not None]
        return sum(values[1:], values[0]) if values else None

    def save(self, path: Path, writes: bool) -> None:
        """:meth:`MAS.save` by the process that ``writes``; of a sharded state all take part."""
        if self.mas is not None and (writes or any(map(is_sharded, self.mas.anchor.values()))):
            self.mas.save(path)

    # -- the end of a task -----------------------------------------------------------------------

    def check_ends(self, has_length: bool) -> None:
        """Refuses, before a run, data that could not be measured after it."""
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
        """:meth:`MAS.consolidate`; ``how`` wins over the options, which win over its defaults."""
        if self.mas is None:
            raise RuntimeError(
                "consolidate() before the first training: there is no model yet; train first, or "
                "pass mas="
            )
        self.mas.consolidate(data, **{"progress": shows_progress, **self._importance, **how})


class Guarded:
    """What a callback shows of its guard, whatever the library."""

    _guard: Guard

    @property
    def mas(self) -> MAS | None:
        """The regularizer of the trained model; None before it is first trained."""
        return self._guard.mas

    def consolidate(self, data: Iterable[Any], **options: Any) -> None:
        """Ends a task by hand: :meth:`mas_ext.MAS.consolidate` with this callback's options.

        Args:
            data: as for :func:`mas_ext.estimate_importance`.
            options: arguments of :meth:`mas_ext.MAS.consolidate` that win over this callback's.

        Raises:
            RuntimeError: before the first training, when there is no model yet.
        """
        self._guard.consolidate(data, **options)


def _processes(model: nn.Module) -> dict[str, Any]:
    """The option that tells who shares the data out, where the model does not.

    Trainers pass the model without the DistributedDataParallel around it; a mesh is in it.
    """
    if not is_running() or any(map(is_sharded, model.parameters())):
        return {}
    return {"process_group": dist.group.WORLD}


def _sorted_out(
    lambda_reg: Any, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that are MAS's, λ with them, and those that are of importance."""
    for name in options:
        if name not in _OF_MAS | _OF_IMPORTANCE:
            known = ", ".join(sorted(_OF_MAS | _OF_IMPORTANCE))
            raise TypeError(f"{name!r} is no option; use {known}")
    regularizer = {} if lambda_reg is None else {"lambda_reg": lambda_reg}
    regularizer |= {name: value for name, value in options.items() if name in _OF_MAS}
    return regularizer, {n: value for n, value in options.items() if n in _OF_IMPORTANCE}


def _check_early(regularizer: Mapping[str, Any], importance: Mapping[str, Any]) -> None:
    """Refuses here what would otherwise be refused when training begins, or when it has ended."""
    Strength(regularizer.get("lambda_reg", 1.0), regularizer.get("drift", DEFAULT_DRIFT))
    # By a model of one parameter, but for what is about the names of the real one's.
    named = ("lambda_reg", "drift", "params")
    MAS(nn.Linear(1, 1), **{n: value for n, value in regularizer.items() if n not in named})
    Measurement.from_options(importance, CheckpointedMeasurementOptions).check()
