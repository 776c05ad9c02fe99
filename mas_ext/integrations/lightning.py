"""MAS in Lightning's Trainer, in one line::

from mas_ext.integrations.lightning import MASCallback

trainer = L.Trainer(max_epochs=3, callbacks=[MASCallback(lambda_reg=0.1)])
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from mas_ext.integrations._managed import HasMAS, ManagedMAS
from mas_ext.regularizer import MAS

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        f"mas_ext.integrations.lightning needs lightning ({error}): "
        "pip install 'mas_ext[lightning]'"
    ) from error


class MASCallback(HasMAS, Callback):
    r"""Every optimizer step includes MAS, and the end of ``fit`` is the end of a task.

    .. math:: L(\theta) = L_\text{new}(\theta)
        + \frac{\lambda}{2}\sum_i \Omega_i (\theta_i - \theta^*_i)^2

    The same callback goes from Trainer to Trainer, a task each::

        callback = MASCallback(lambda_reg=0.1)
        for task in tasks:
            L.Trainer(max_epochs=3, callbacks=[callback]).fit(module, task)

    The penalty is added to the gradients once an optimizer step, whatever
    ``accumulate_grad_batches`` is, after clipping, in automatic and in manual optimization, and for
    each optimizer that holds parameters of the model; what the module logs as its loss is the new
    task's alone. The penalty is logged as ``mas_penalty``.

    Every checkpoint of the Trainer has the state in it, and ``fit(ckpt_path=…)`` takes it up from
    there, λ and ``merge`` included, to the same bits. ``trainer.save_checkpoint(path)`` after
    ``fit``, or ``callback.mas.save(path)``, keeps what the last task's end has added.

    Args:
        lambda_reg: λ, as for :class:`mas_ext.MAS`; 1 by default.
        mas: a :class:`mas_ext.MAS` of the module or of a part of it, instead of one made with these
            options.
        mode: ``"gradient"`` or ``"proximal"``, as for :meth:`mas_ext.MAS.attach`.
        consolidate: at the end of ``fit``, if it has trained, measure importance with the Trainer's
            own data and take θ* ← θ. The data are those of one epoch, moved as the Trainer moves
            them, ``limit_train_batches`` included; ``max_samples`` bounds them. Otherwise it is up
            to :meth:`consolidate`.
        options: further arguments of :class:`mas_ext.MAS` (``merge``, ``params``,
            ``state_dtype``, …) and of :meth:`mas_ext.MAS.consolidate` (``estimator``,
            ``objective``, ``forward``, ``max_samples``, …). Without ``forward`` the module's own
            ``forward`` gets a batch as :func:`mas_ext.estimate_importance` says.

    Attributes:
        mas: the :class:`mas_ext.MAS` of the module; None before it is first trained.

    Raises:
        ValueError, TypeError: an argument that is out of range or unknown; when training begins,
            several dataloaders or data without an end.
    """

    def __init__(
        self,
        lambda_reg: Any = None,
        *,
        mas: MAS | None = None,
        mode: str = "gradient",
        consolidate: bool = True,
        **options: Any,
    ) -> None:
        self._managed = ManagedMAS(lambda_reg, mas, mode, options)
        self._consolidates = consolidate
        self._has_trained = False  # since the last consolidation
        self._restored: Mapping[str, Any] | None = None

    def consolidate(self, data: Iterable[Any], **options: Any) -> None:
        """As every callback's of ours; nothing is then left for the end of ``fit`` to do."""
        super().consolidate(data, **options)
        self._has_trained = False

    # -- what Lightning calls --------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the module and its optimizers, and takes up what a checkpoint knows."""
        self._bind(pl_module)
        if self._consolidates:
            _check_single(trainer.train_dataloader)
            self._managed.check_ends(math.isfinite(trainer.num_training_batches))
        self._managed.attach(trainer.optimizers)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """There is something to consolidate."""
        self._has_trained = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Logs the penalty; Lightning waits for its value when it writes the logs."""
        if (penalty := self._managed.penalty) is not None:
            pl_module.log("mas_penalty", penalty, on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the task's importance, merges it, and takes θ* ← θ."""
        self._managed.detach()
        self._end_task(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same where a checkpoint had nothing left to train, and no other hook is called."""
        self._bind(pl_module)
        self._end_task(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Leaves the optimizers as they were."""
        self._managed.detach()

    def state_dict(self) -> dict[str, Any]:
        """For the Trainer's checkpoint: what :meth:`mas_ext.MAS.state_dict` returns, and more."""
        if self.mas is None:
            return {}
        return {"mas": self.mas.state_dict(), "has_trained": self._has_trained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps what a checkpoint knows until there is a module with its parameters."""
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


def _check_single(loader: Any) -> None:
    if isinstance(loader, (Mapping, list, tuple)):
        raise ValueError(
            "the module trains with several dataloaders at once, and which of them shows what it "
            "has learned is not known: pass consolidate=False, and call "
            "callback.consolidate(data) after fit()"
        )


def _batches(trainer: Trainer, module: LightningModule) -> Iterator[Any]:
    """An epoch's batches, in the dtype and on the device of the module."""
    loader: Any = trainer.train_dataloader
    count = trainer.num_training_batches
    for batch in islice(loader, int(count) if math.isfinite(count) else None):
        converted = trainer.precision_plugin.convert_input(batch)
        yield trainer.strategy.batch_to_device(converted, module.device)
