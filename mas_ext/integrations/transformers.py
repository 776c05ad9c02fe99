"""MAS in the Trainer of transformers.

Pass a callback to the Trainer::

    from mas_ext.integrations.transformers import MASCallback

    trainer = Trainer(model, args, train_dataset=task, callbacks=[MASCallback(lambda_reg=0.1)])
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mas_ext.integrations._managed import HasRegularizer, ManagedRegularizer, Method
from mas_ext.quadratic import QuadraticRegularizer

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import has_length
    from transformers.utils import find_labels
except ImportError as error:
    raise ImportError(
        f"mas_ext.integrations.transformers needs transformers and accelerate ({error}): "
        "pip install 'mas_ext[transformers]'"
    ) from error

#: The file beside the model in every ``checkpoint-N`` folder, of the form of :meth:`MAS.save`.
FILE = "mas_ext.safetensors"


class MASCallback(HasRegularizer, TrainerCallback):
    r"""Includes MAS in every optimizer step, and ends a task at the end of training.

    .. math:: L(\theta) = L_\text{new}(\theta)
        + \frac{\lambda}{2}\sum_i \Omega_i (\theta_i - \theta^*_i)^2

    Pass the same callback to one Trainer per task::

        callback = MASCallback(lambda_reg=0.1)
        for task in tasks:
            Trainer(model, args, train_dataset=task, callbacks=[callback]).train()

    The penalty's gradient is added once per optimizer step, for any
    ``gradient_accumulation_steps`` and after clipping; ``compute_loss`` is not changed. The loss
    that the Trainer logs is therefore that of the new task alone. The penalty is logged along with
    it as ``mas_penalty``, in ``state.log_history`` and for callbacks that come after this one.
    Callbacks of ``report_to`` come before it. To report the penalty to them, pass
    ``report_to="none"`` and add the callback itself (such as ``TensorBoardCallback()``) after this
    one.

    Every ``checkpoint-N`` contains the state of MAS. ``train(resume_from_checkpoint=…)`` restores
    it, including λ and ``merge``, and the resumed training is bitwise identical. The Trainer's last
    checkpoint is from before the end of the task; to save the consolidated state, call
    ``callback.mas.save(path)``.

    Args:
        lambda_reg: λ, as for :class:`mas_ext.MAS`. None: 1, or ``"auto"`` with a budget.
        mas: a :class:`mas_ext.MAS` of the model, or another method, to use instead of creating one
            with these options.
        mode, every: ``"gradient"`` or ``"proximal"``, and how many steps one proximal step follows,
            as for :meth:`mas_ext.MAS.attach`.
        method: ``"mas"`` (default), ``"ewc"`` or ``"l2sp"``, or the class. Logs are named after it.
        consolidate: whether training ends by measuring importance on the Trainer's training data
            and taking θ* ← θ. The data are one epoch, in the order of the first, up to
            ``max_samples``. If False, call :meth:`consolidate` yourself. A hyperparameter search
            neither consolidates nor saves anything.
        resume_from_checkpoint: the checkpoint's folder. Pass it if you resume with
            ``train(resume_from_checkpoint=folder)`` from a folder outside ``output_dir`` that the
            training arguments do not name.
        options: further arguments of :class:`mas_ext.MAS` (``merge``, ``params``,
            ``state_dtype``, …) and of :meth:`mas_ext.MAS.consolidate` (``estimator``,
            ``objective``, ``forward``, ``max_samples``, …). Without ``forward``, the model gets the
            items of each batch that its ``forward`` names, except labels. Padding is included as
            far as the model's output includes it.

    Attributes:
        mas: the :class:`mas_ext.MAS` of the Trainer's model; None before the first training.

    Raises:
        TypeError: an option is unknown.
        ValueError: an argument is out of range; or, when training begins, a checkpoint has no
            state, the data has no end, or DeepSpeed is used, which steps copies of the parameters.
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
        resume_from_checkpoint: str | None = None,
        **options: Any,
    ) -> None:
        self._managed = ManagedRegularizer(lambda_reg, mas, mode, every, method, options)
        self._consolidates = consolidate
        self._resume_from = resume_from_checkpoint

    # -- what the Trainer calls ------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attaches MAS to the model's optimizer, and restores the state from a checkpoint."""
        if args.deepspeed:
            raise ValueError(
                "args.deepspeed: DeepSpeed steps copies of its own of the parameters, where no "
                "penalty can reach them; train without it, or with FSDP"
            )
        mas = self._managed.bind(kwargs["model"])
        if self._ends_tasks(state):
            self._managed.check_ends(has_length(kwargs["train_dataloader"]))
        if state.global_step > 0:
            mas.load(self._checkpoint(args, state) / FILE)
        self._managed.attach([kwargs["optimizer"]])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the penalty to the logged loss. Only here does training wait for the device."""
        if logs is None or "loss" not in logs:
            return
        for name, value in self._managed.logs.items():
            # The history already has its own copy of the entry.
            logs[name] = state.log_history[-1][name] = float(value)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Saves the state into the checkpoint that was just written."""
        if not state.is_hyper_param_search:
            self._managed.save(_folder(args, state) / FILE, writes=args.should_save)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures the task's importance, merges it, and takes θ* ← θ."""
        self._managed.detach()
        if not self._ends_tasks(state):
            return
        data = _from_the_start(kwargs["train_dataloader"])
        if not self._managed.has_forward:
            data = _selected(data, *_columns(kwargs["model"], args))
        shows = state.is_world_process_zero and not args.disable_tqdm
        self._managed.consolidate(data, shows_progress=shows)

    def _ends_tasks(self, state: TrainerState) -> bool:
        return self._consolidates and not state.is_hyper_param_search

    def _checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The folder that training resumes from, which the Trainer does not pass to callbacks.

        Raises:
            ValueError: the folder is not known, or has no state of MAS.
        """
        named = self._resume_from or args.resume_from_checkpoint
        folders = [Path(named)] if isinstance(named, str) else []
        folders.append(_folder(args, state))
        folder = next((folder for folder in folders if _is_of(folder, state)), None)
        if folder is None:
            raise ValueError(
                f"resume_from_checkpoint: training resumes at step {state.global_step} from a "
                f"folder that is not {folders[-1]}; pass it to MASCallback too"
            )
        if not (folder / FILE).is_file():
            raise ValueError(
                f"resume_from_checkpoint: {folder} has no {FILE}; it was made without "
                "MASCallback, or is not complete. Resume from another one, or put the state there "
                "with mas.save()"
            )
        return folder


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """The Trainer's folder for the checkpoint of this step."""
    assert args.output_dir is not None
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _is_of(folder: Path, state: TrainerState) -> bool:
    """Whether this state was read from the checkpoint in ``folder``, not from another run's."""
    try:
        kept = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    except OSError:
        return False
    # Compared as text, since a loss that is NaN does not equal itself.
    mine, its = (json.dumps([s.global_step, s.log_history]) for s in (state, kept))
    return mine == its


def _from_the_start(data: Any) -> Iterable[Any]:
    """The data in the order of the first epoch, so that resumed training measures the same."""
    if callable(set_epoch := getattr(data, "set_epoch", None)):
        set_epoch(0)
    return data


def _columns(model: nn.Module, args: TrainingArguments) -> tuple[frozenset[str], frozenset[str]]:
    """The names of the parameters of the model's ``forward`` except labels, and those of labels."""
    # PEFT's own forward takes any argument and passes it on.
    inner: Any = getattr(model, "get_base_model", None)
    base = model if inner is None else inner()
    parameters = inspect.signature(type(base).forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    labels = {"labels", "label", "label_ids", *(args.label_names or find_labels(type(base)))}
    return frozenset(named - {"self"} - labels), frozenset(labels)


def _selected(
    data: Iterable[Any], columns: frozenset[str], labels: frozenset[str]
) -> Iterator[Any]:
    """What the model takes of every batch, and its labels, by the name that a measurement reads."""
    for batch in data:
        if columns and isinstance(batch, Mapping):
            chosen = {name: value for name, value in batch.items() if name in columns}
            given = [value for name, value in batch.items() if name in labels]
            yield {**chosen, "labels": given[0]} if given else chosen
        else:
            yield batch
