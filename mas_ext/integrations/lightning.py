"""MAS in Lightning's Trainer.

Pass a callback to the Trainer::

    from mas_ext.integrations.lightning import MASCallback

    trainer = L.Trainer(max_epochs=3, callbacks=[MASCallback(lambda_reg=0.1)])
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from mas_ext.integrations._managed import HasRegularizer, ManagedRegularizer, Method
from mas_ext.quadratic import QuadraticRegularizer

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch import callbacks as _callbacks
except ImportError as error:
    raise ImportError(
        f"mas_ext.integrations.lightning needs lightning ({error}): "
        "pip install 'mas_ext[lightning]'"
    ) from error


# The second is new in Lightning 2.6.
_AVERAGING = tuple(
    getattr(_callbacks, name)
    for name in ("StochasticWeightAveraging", "WeightAveraging")
    if hasattr(_callbacks, name)
)


class MASCallback(HasRegularizer, Callback):
    r"""Includes MAS in every optimizer step, and ends a task at the end of ``fit``.

    .. math:: L(\theta) = L_\text{new}(\theta)
        + \frac{\lambda}{2}\sum_i \Omega_i (\theta_i - \theta^*_i)^2

    Pass the same callback to one Trainer per task::

        callback = MASCallback(lambda_reg=0.1)
        for task in tasks:
            L.Trainer(max_epochs=3, callbacks=[callback]).fit(module, task)

    The penalty's gradient is added once per optimizer step, for any ``accumulate_grad_batches`` and
    after clipping, in automatic and manual optimization, and to every optimizer with parameters of
    the model. The loss that the module logs is therefore that of the new task alone. The penalty is
    logged as ``mas_penalty``.

    Every checkpoint of the Trainer contains the state of MAS. ``fit(ckpt_path=…)`` restores it,
    including λ and ``merge``, and the resumed training is bitwise identical. To save the
    consolidated state after the last task, call ``trainer.save_checkpoint(path)`` after ``fit``, or
    ``callback.mas.save(path)``.

    Args:
        lambda_reg: λ, as for :class:`mas_ext.MAS`. None: 1, or ``"auto"`` with a budget.
        mas: a :class:`mas_ext.MAS` of the module, or of a part of it, to use instead of creating
            one with these options.
        mode, every: ``"gradient"`` or ``"proximal"``, and how many steps one proximal step follows,
            as for :meth:`mas_ext.MAS.attach`.
        method: ``"mas"`` (default), ``"ewc"`` or ``"l2sp"``, or the class. Logs are named after it.
        consolidate: whether ``fit``, if it has trained, ends by measuring importance on the
            Trainer's training data and taking θ* ← θ. The data are one epoch, with
            ``limit_train_batches`` and the Trainer's transfer to the device, up to
            ``max_samples``. If False, call :meth:`consolidate` yourself.
        options: further arguments of :class:`mas_ext.MAS` (``merge``, ``params``,
            ``state_dtype``, …) and of :meth:`mas_ext.MAS.consolidate` (``estimator``,
            ``objective``, ``forward``, ``max_samples``, …). Without ``forward``, batches are passed
            to the module as :func:`mas_ext.estimate_importance` describes.

    Attributes:
        mas: the :class:`mas_ext.MAS` of the module; None before the first training.

    Raises:
        TypeError: an option is unknown.
        ValueError: an argument is out of range; or, when training begins, there are several
            dataloaders, data without an end, or weights that a later callback will average.
    """

    def __init__(
        self,
        lambda_reg: Any = None,
        *,
        mas: QuadraticRegularizer | None = None,
        mode: str = "gradient",
        every: int | None = None,
        method: Method | None = None,
        consolidate: bool = True,
        **options: Any,
    ) -> None:
        self._managed = ManagedRegularizer(lambda_reg, mas, mode, every, method, options)
        self._consolidates = consolidate
        self._has_trained = False  # since the last consolidation
        self._restored: Mapping[str, Any] | None = None

    def consolidate(self, data: Iterable[Any], **options: Any) -> None:
        """Ends a task by hand, so that the end of ``fit`` does not; see :class:`HasRegularizer`."""
        super().consolidate(data, **options)
        self._has_trained = False

    # -- what Lightning calls --------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches MAS to the module's optimizers, and restores the state from a checkpoint."""
        self._bind(pl_module)
        if self._consolidates:
            _check_order(trainer, self)
            _check_single(trainer.train_dataloader)
            self._managed.check_ends(math.isfinite(trainer.num_training_batches))
        self._managed.attach(trainer.optimizers)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Records that there is something to consolidate."""
        self._has_trained = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Logs the penalty. Lightning waits for the device only when it writes the logs."""
        for name, value in self._managed.logs.items():
            pl_module.log(name, value, on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the task's importance, merges it, and takes θ* ← θ."""
        self._managed.detach()
        self._end_task(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the task if a checkpoint left nothing to train, when only this hook is called."""
        self._bind(pl_module)
        self._end_task(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Detaches the penalty from the optimizers."""
        self._managed.detach()

    def state_dict(self) -> dict[str, Any]:
        """The callback's state for the Trainer's checkpoint; empty before the first training."""
        if self.mas is None:
            return {}
        return {"mas": self.mas.state_dict(), "has_trained": self._has_trained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Holds a checkpoint's state until the module is known, and is then restored."""
        self._restored = state_dict

    def _bind(self, module: LightningModule) -> None:
        mas = self._managed.bind(module)
        if self._restored is not None:
            mas.load_state_dict(self._restored["mas"])
            self._has_trained = self._restored["has_trained"]
            self._restored = None

    def _end_task(self, trainer: Trainer, module: LightningModule) -> None:
        if self._consolidates and self._has_trained:
            shows = trainer.progress_bar_callback is not None
            self._managed.consolidate(_batches(trainer, module), shows_progress=shows)
            self._has_trained = False


def _check_order(trainer: Any, ours: Callback) -> None:
    """Raises ValueError if the weights are replaced by averages after they have been measured."""
    later = trainer.callbacks[trainer.callbacks.index(ours) + 1 :]
    for callback in later:
        if isinstance(callback, _AVERAGING):
            raise ValueError(
                f"callbacks: {type(callback).__name__} replaces the weights at the end of fit, "
                "after MASCallback has measured them; put MASCallback after it"
            )


def _check_single(loader: Any) -> None:
    if isinstance(loader, (Mapping, list, tuple)):
        raise ValueError(
            "the module trains with several dataloaders at once, and which of them shows what it "
            "has learned is not known: pass consolidate=False, and call "
            "callback.consolidate(data) after fit()"
        )


def _batches(trainer: Trainer, module: LightningModule) -> Iterator[Any]:
    """The batches of one epoch, in the Trainer's precision and on the module's device."""
    loader: Any = trainer.train_dataloader
    count = trainer.num_training_batches
    for batch in islice(loader, int(count) if math.isfinite(count) else None):
        converted = trainer.precision_plugin.convert_input(batch)
        yield trainer.strategy.batch_to_device(converted, module.device)
