"""Avalanche's MAS plugin, with exact importance and the fused penalty.

Change the import, and an Avalanche strategy uses this package::

    from mas_ext.integrations.avalanche import MASPlugin

    strategy = Naive(model=model, optimizer=optimizer, plugins=[MASPlugin(lambda_reg=1.0)], ...)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from mas_ext._parameters import Selection
from mas_ext._penalty.attachment import Attachment
from mas_ext._state.merging import Merge, check_merge
from mas_ext.functional import check_mode
from mas_ext.importance.batches import Forward
from mas_ext.importance.objectives import Objective
from mas_ext.importance.options import Measurement
from mas_ext.presets import preset
from mas_ext.regularizer import MAS

try:
    from avalanche.core import SupervisedPlugin
    from avalanche.models.utils import avalanche_forward, is_multi_task_module
except ImportError as error:
    raise ImportError(
        f"mas_ext.integrations.avalanche needs avalanche-lib ({error}): "
        "pip install 'mas_ext[avalanche]'"
    ) from error


class MASPlugin(SupervisedPlugin):
    r"""A drop-in for ``avalanche.training.plugins.MASPlugin``.

    .. math:: L(\theta) = L_\text{new}(\theta) + \lambda\sum_i\Omega_i(\theta_i-\theta^*_i)^2
        \qquad \Omega \leftarrow \alpha\,\Omega + (1-\alpha)\,\Omega_\text{experience}

    The first three arguments mean what they mean there: λ without the ½ of :class:`mas_ext.MAS`,
    and an average that starts with the first experience's Ω. Importance is exact by default, in
    evaluation mode. Avalanche's own numbers, to rounding::

        MASPlugin(lambda_reg, alpha, **mas_ext.preset("avalanche").importance)

    Different all the same: measuring leaves the gradients, the running statistics of batch
    normalisation and the random numbers as they were, so with the same seed later experiences are
    shuffled otherwise (seed before each to compare); a parameter that is frozen keeps its Ω,
    where Avalanche's fades; a loss of exactly zero is no error.

    Args:
        lambda_reg: λ ≥ 0, or ``"auto"``.
        alpha: what is kept of the old Ω, in [0, 1).
        verbose: shows a progress bar while importance is measured.
        mode: ``"gradient"``, the penalty is part of ``strategy.loss``, and so of whatever other
            plugins do with the loss or the gradients, in any order; or ``"proximal"``, the step
            that is stable at any strength, after the optimizer's, and ``strategy.loss`` is the
            new experience's alone.
        merge: instead of the average with ``alpha``; see :class:`mas_ext.MAS`.
        params: see :class:`mas_ext.MAS`.
        estimator, objective, max_samples, weighting, training: see
            :func:`mas_ext.estimate_importance`.

    Attributes:
        mas: the :class:`mas_ext.MAS` of the strategy's model; None before it first trains. Its
            ``lambda_reg`` is twice the plugin's.

    Raises:
        ValueError: an argument that is out of range or unknown.
    """

    def __init__(
        self,
        lambda_reg: float | str = 1.0,
        alpha: float = 0.5,
        verbose: bool = False,
        *,
        mode: str = "gradient",
        merge: Merge | None = None,
        params: Selection = None,
        estimator: str = "per_sample",
        objective: Objective = "squared_l2",
        max_samples: int | None = None,
        weighting: str = "samples",
        training: bool = False,
    ) -> None:
        super().__init__()
        check_mode(mode)
        Measurement(estimator=estimator, weighting=weighting, training=training).check()
        self.mas: MAS | None = None
        self._mode = mode
        self._regularizer = {
            **preset("avalanche").regularizer(lambda_reg),
            "merge": check_merge(("ema", alpha) if merge is None else merge),
            "params": params,
        }
        self._importance: dict[str, Any] = {
            "estimator": estimator,
            "objective": objective,
            "max_samples": max_samples,
            "weighting": weighting,
            "training": training,
            "progress": verbose,
        }
        self._model: nn.Module | None = None
        self._attached: Attachment | None = None

    @property
    def importance(self) -> Mapping[str, Tensor]:
        """Parameter name → Ω; empty before the first experience has ended."""
        return {} if self.mas is None else self.mas.importance

    @property
    def params(self) -> Mapping[str, Tensor]:
        """Parameter name → θ*, the parameters after the last experience; empty before that."""
        return {} if self.mas is None else self.mas.anchor

    # -- what Avalanche calls ------------------------------------------------------------------

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Finds the model, which exists since the strategy does, and its optimizer."""
        mas = self._bound(strategy.model)
        self._detach()  # of an experience that was broken off
        if self._mode == "proximal":
            self._attached = mas.attach(strategy.optimizer, self._mode)

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Adds the penalty to the loss.

        Not to the gradients afterwards: other plugins clip or project them, or differentiate the
        loss themselves, and would do so without it.
        """
        if self.mas is not None and self.mas.num_tasks and self._mode == "gradient":
            strategy.loss = strategy.loss + self.mas.penalty()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Measures the experience's importance, merges it, and takes θ* ← θ."""
        self._detach()
        self._bound(strategy.model).consolidate(
            _batches(strategy), forward=_forward(strategy), **self._importance
        )

    def _bound(self, model: nn.Module) -> MAS:
        """The regularizer of this model; what is known follows when it has been wrapped anew."""
        if self.mas is None or self._model is not model:
            mas = MAS(model, **self._regularizer)
            if self.mas is not None:
                mas.load_state_dict(self.mas.state_dict())
            self.mas, self._model = mas, model
        return self.mas

    def _detach(self) -> None:
        if self._attached is not None:
            self._attached.remove()
            self._attached = None


def _batches(strategy: Any) -> DataLoader[Any]:
    """The experience in order, in batches of the size it was trained in."""
    dataset = strategy.experience.dataset
    return DataLoader(
        dataset,
        batch_size=strategy.train_mb_size,
        collate_fn=getattr(dataset, "collate_fn", None),
    )


def _forward(strategy: Any) -> Forward | None:
    """How a model that is told the task is called; the inputs come first, the tasks last."""
    if not is_multi_task_module(strategy.model):
        return None
    device = strategy.device
    return lambda model, batch: avalanche_forward(model, batch[0].to(device), batch[-1])
