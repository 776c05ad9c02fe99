"""Avalanche's MAS and EWC plugins, with exact importance and the fused penalty.

To use it in an Avalanche strategy, change the import::

    from mas_ext.integrations.avalanche import MASPlugin

    strategy = Naive(model=model, optimizer=optimizer, plugins=[MASPlugin(lambda_reg=1.0)], ...)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import Unpack

from mas_ext._drift.budget import DriftBudget
from mas_ext._parameters import Selection
from mas_ext._penalty.attachment import Attachment, check_every
from mas_ext._state.merging import Merge, check_merge
from mas_ext._strength.strength import AUTO
from mas_ext.importance.batches import Forward
from mas_ext.importance.options import Measurement, MeasurementOptions
from mas_ext.presets import preset
from mas_ext.quadratic import QuadraticRegularizer
from mas_ext.regularizer import METHODS

try:
    from avalanche.core import SupervisedPlugin
    from avalanche.models.utils import avalanche_forward
except ImportError as error:
    raise ImportError(
        f"mas_ext.integrations.avalanche needs avalanche-lib ({error}): "
        "pip install 'mas_ext[avalanche]'"
    ) from error


class _Plugin(SupervisedPlugin):
    """What the plugins share.

    Args:
        implementation: the preset of Avalanche's plugin.
        strength: λ as that plugin defines it; None: the default.
        merge: how the Ω of experiences is merged.
        mode, every: as for :meth:`mas_ext.MAS.attach`.
        importance: options of measuring.
        regularizer: further arguments of the regularizer.

    Attributes:
        mas: the regularizer of the strategy's model; None before the first training.
    """

    def __init__(
        self,
        implementation: str,
        strength: float | str | None,
        merge: Merge,
        mode: str,
        every: int | None,
        importance: dict[str, Any],
        **regularizer: Any,
    ) -> None:
        super().__init__()
        check_every(every, mode)
        self._mode, self._every = mode, every
        theirs = preset(implementation)
        method = METHODS[theirs.method]
        if "forward" in importance:
            raise TypeError("forward: the plugin runs the model as Avalanche does; leave it out")
        Measurement.from_options({**method.defaults, **importance}).check()
        self.mas: QuadraticRegularizer | None = None
        self._method = method
        self._regularizer = {
            **theirs.regularizer(_start(strength, regularizer["budget"])),
            **regularizer,
            "merge": check_merge(merge),
        }
        self._importance = importance
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
        """Creates the regularizer of the strategy's model, and in proximal mode attaches it."""
        mas = self._bound(strategy.model)
        self._detach()  # from an experience that was interrupted
        if self._mode == "proximal":
            self._attached = mas.attach(strategy.optimizer, self._mode, self._every)

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Adds the penalty to the loss.

        It is not added to the gradients afterwards, because other plugins clip or project the
        gradients or differentiate the loss themselves, and must include the penalty.
        """
        if self.mas is not None and self.mas.num_tasks and self._mode == "gradient":
            strategy.loss = strategy.loss + self.mas.penalty()

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        """Lets λ follow the drift, under a drift budget; when attached, the step itself does."""
        if self.mas is not None and self._mode == "gradient":
            self.mas.protected.after_step(strategy.optimizer, self._mode)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Settles under a drift budget; measures and merges the importance; takes θ* ← θ."""
        self._detach()
        mas = self._bound(strategy.model)
        if mas.budget is not None:
            mas.settle()
        mas.consolidate(_Batches(strategy), forward=_forward(strategy), **self._importance)

    def _bound(self, model: nn.Module) -> QuadraticRegularizer:
        """The regularizer of this model; that of a new model object gets the old state."""
        if self.mas is None or self._model is not model:
            mas = self._method(model, **self._regularizer)
            if self.mas is not None:
                mas.load_state_dict(self.mas.state_dict())
                mas.protected.tracker = self.mas.protected.tracker  # which has the trace
            self.mas, self._model = mas, model
        return self.mas

    def _detach(self) -> None:
        if self._attached is not None:
            self._attached.remove()
            self._attached = None


class MASPlugin(_Plugin):
    r"""A drop-in replacement for ``avalanche.training.plugins.MASPlugin``.

    .. math:: L(\theta) = L_\text{new}(\theta) + \lambda\sum_i\Omega_i(\theta_i-\theta^*_i)^2
        \qquad \Omega \leftarrow \alpha\,\Omega + (1-\alpha)\,\Omega_\text{experience}

    The first three arguments mean the same as in Avalanche: λ is without the factor ½ of
    :class:`mas_ext.MAS`, and the average over experiences starts with the first one's Ω. By
    default, importance is exact and measured in evaluation mode. To reproduce Avalanche's own
    numbers up to rounding, use::

        MASPlugin(lambda_reg, alpha, **mas_ext.preset("avalanche").importance)

    Three differences remain:

    - A measurement restores the gradients, the running statistics of batch normalisation, and the
      states of random number generators. With the same seed, later experiences are therefore
      shuffled differently (to compare, set the seed before each experience).
    - The Ω of a frozen parameter stays the same, whereas Avalanche's fades.
    - A loss of exactly zero is not an error.

    Args:
        lambda_reg: λ ≥ 0, or ``"auto"``. None: 1, or ``"auto"`` with a budget.
        alpha: the weight of the old Ω in the average, in [0, 1).
        verbose: whether to show a progress bar while importance is measured.
        mode: ``"gradient"`` adds the penalty to ``strategy.loss``, so that other plugins that use
            the loss or the gradients see it, in any order. ``"proximal"`` takes a proximal step
            after the optimizer's step, which is stable for every λ; ``strategy.loss`` is then the
            loss of the new experience alone.
        every: how many steps one proximal step follows; see :meth:`mas_ext.MAS.attach`.
        budget, floor: see :class:`mas_ext.MAS`. With a budget, each experience ends by settling.
        merge: how to merge the Ω of experiences, in place of the average with ``alpha``; see
            :class:`mas_ext.MAS`.
        params: see :class:`mas_ext.MAS`.
        importance: options of :func:`mas_ext.estimate_importance`, such as ``estimator``,
            ``objective``, ``max_samples``, ``weighting`` and ``training``.

    Attributes:
        mas: the :class:`mas_ext.MAS` of the strategy's model; None before the first training. Its
            ``lambda_reg`` is twice the plugin's.

    Raises:
        ValueError: an argument is out of range or unknown.
    """

    def __init__(
        self,
        lambda_reg: float | str | None = None,
        alpha: float = 0.5,
        verbose: bool = False,
        *,
        mode: str = "gradient",
        every: int | None = None,
        budget: float | DriftBudget | None = None,
        floor: float | None = None,
        merge: Merge | None = None,
        params: Selection = None,
        **importance: Unpack[MeasurementOptions],
    ) -> None:
        super().__init__(
            "avalanche",
            lambda_reg,
            ("ema", alpha) if merge is None else merge,
            mode,
            every,
            {"progress": verbose, **importance},
            budget=budget,
            floor=floor,
            params=params,
        )


class EWCPlugin(_Plugin):
    r"""A replacement for ``avalanche.training.plugins.EWCPlugin``.

    .. math:: L(\theta) = L_\text{new}(\theta) + \lambda\sum_i F_i(\theta_i-\theta^*_i)^2

    By default, F is the diagonal of the Fisher information, from the square of every sample's own
    gradient. To reproduce Avalanche's ``mode="online"`` up to rounding, use::

        EWCPlugin(ewc_lambda, decay_factor, **mas_ext.preset("avalanche_ewc").importance)

    All experiences share one θ*, the parameters after the last one. Avalanche's
    ``mode="separate"`` keeps one per experience; the two are the same until the second has ended.
    For the other differences, see :class:`MASPlugin`.

    Args:
        ewc_lambda: λ ≥ 0, without the factor ½ of :class:`mas_ext.EWC`, or with a budget
            ``"auto"``. None: 1, or ``"auto"`` with a budget.
        decay_factor: γ in [0, 1], as in F ← γF + F_experience. None: 1, the sum.
        verbose, mode, every, budget, floor, params: see :class:`MASPlugin`.
        importance: options of :func:`mas_ext.estimate_importance`, such as ``criterion`` and
            ``max_samples``.

    Attributes:
        mas: the :class:`mas_ext.EWC` of the strategy's model; None before the first training. Its
            ``lambda_reg`` is twice the plugin's.

    Raises:
        ValueError: an argument is out of range or unknown.
    """

    def __init__(
        self,
        ewc_lambda: float | str | None = None,
        decay_factor: float | None = None,
        verbose: bool = False,
        *,
        mode: str = "gradient",
        every: int | None = None,
        budget: float | DriftBudget | None = None,
        floor: float | None = None,
        params: Selection = None,
        **importance: Unpack[MeasurementOptions],
    ) -> None:
        if "separate" in (mode, decay_factor) or "online" in (mode, decay_factor):
            raise ValueError(
                "mode: 'separate' and 'online' are Avalanche's. Here EWCPlugin(ewc_lambda) is the "
                "former, with one θ* for all experiences, and EWCPlugin(ewc_lambda, decay_factor) "
                "the latter; mode= is 'gradient' or 'proximal'"
            )
        super().__init__(
            "avalanche_ewc",
            ewc_lambda,
            _merge_of(decay_factor),
            mode,
            every,
            {"progress": verbose, **importance},
            budget=budget,
            floor=floor,
            params=params,
        )


def _merge_of(decay_factor: Any) -> Merge:
    """How Fisher informations are merged; ValueError for a factor out of range."""
    if decay_factor is None or decay_factor == 1:
        return "sum"
    if not isinstance(decay_factor, (int, float)) or not 0 <= decay_factor < 1:
        raise ValueError(f"decay_factor is {decay_factor!r}; pass a number from 0 to 1, or None")
    return ("decay", float(decay_factor))


def _start(lambda_reg: float | str | None, budget: float | DriftBudget | None) -> float | str:
    if lambda_reg is not None:
        return lambda_reg
    return 1.0 if budget is None else AUTO


class _Batches:
    """The experience in order, in batches of the training batch size."""

    def __init__(self, strategy: Any) -> None:
        dataset = strategy.experience.dataset
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=strategy.train_mb_size,
            collate_fn=getattr(dataset, "collate_fn", None),
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for inputs, labels, *_, tasks in self._loader:
            yield {"inputs": inputs, "labels": labels, "tasks": tasks}


def _forward(strategy: Any) -> Forward:
    """Gives the model task labels where it takes them."""
    device = strategy.device
    return lambda model, batch: avalanche_forward(model, batch["inputs"].to(device), batch["tasks"])
