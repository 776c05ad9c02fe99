"""MAS in the Trainer of transformers, in one line::

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

from mas_ext.integrations._managed import HasMAS, ManagedMAS
from mas_ext.regularizer import MAS

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


class MASCallback(HasMAS, TrainerCallback):
    r"""Every optimizer step includes MAS, and the end of training is the end of a task.

    .. math:: L(\theta) = L_\text{new}(\theta)
        + \frac{\lambda}{2}\sum_i \Omega_i (\theta_i - \theta^*_i)^2

    The same callback goes from Trainer to Trainer, a task each::

        callback = MASCallback(lambda_reg=0.1)
        for task in tasks:
            Trainer(model, args, train_dataset=task, callbacks=[callback]).train()

    The penalty is added to the gradients once an optimizer step, whatever
    ``gradient_accumulation_steps`` is, after clipping, and beside whatever ``compute_loss`` does;
    the loss that is logged is the new task's alone. The penalty is logged with it as
    ``mas_penalty``, in ``state.log_history`` and for callbacks that come after this one; those of
    ``report_to`` come before: to have it there, pass ``report_to="none"`` and, after this
    one, the callback itself (``TensorBoardCallback()``).

    Every ``checkpoint-N`` gets the state too, and ``train(resume_from_checkpoint=…)`` takes it up
    from there, λ and ``merge`` included, to the same bits. After the last task keep it with
    ``callback.mas.save(path)``: the Trainer's last checkpoint is from before the task's end.

    Args:
        lambda_reg: λ, as for :class:`mas_ext.MAS`; 1 by default.
        mas: a :class:`mas_ext.MAS` of the model, instead of one made with these options.
        mode: ``"gradient"`` or ``"proximal"``, as for :meth:`mas_ext.MAS.attach`.
        consolidate: at the end of training, measure importance with the Trainer's own data and take
            θ* ← θ. The data are those of one epoch, in that order; ``max_samples`` bounds them.
            Otherwise it is up to :meth:`consolidate`. Not in a hyperparameter search, of which
            nothing is saved either.
        resume_from_checkpoint: the folder, if the ``train()`` that resumes gets one that is not in
            its ``output_dir``, and the training arguments do not have it.
        options: further arguments of :class:`mas_ext.MAS` (``merge``, ``params``,
            ``state_dtype``, …) and of :meth:`mas_ext.MAS.consolidate` (``estimator``,
            ``objective``, ``forward``, ``max_samples``, …). Without ``forward`` the model gets of
            each batch what its ``forward`` names, but no labels, and padding counts as the model
            makes it count.

    Attributes:
        mas: the :class:`mas_ext.MAS` of the Trainer's model; None before it first trains.

    Raises:
        ValueError, TypeError: an argument that is out of range or unknown; when training begins,
            a checkpoint without a state, data without an end, or DeepSpeed, which steps copies of
            the parameters.
    """

    def __init__(
        self,
        lambda_reg: Any = None,
        *,
        mas: MAS | None = None,
        mode: str = "gradient",
        consolidate: bool = True,
        resume_from_checkpoint: str | None = None,
        **options: Any,
    ) -> None:
        self._managed = ManagedMAS(lambda_reg, mas, mode, options)
        self._consolidates = consolidate
        self._resume_from = resume_from_checkpoint

    # -- what the Trainer calls ------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finds the model and its optimizer, and what a checkpoint knows."""
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
        """Adds the penalty where the loss is logged: only there is the device waited for."""
        if logs is None or "loss" not in logs or self._managed.penalty is None:
            return
        # The history already has its own copy of the entry.
        logs["mas_penalty"] = state.log_history[-1]["mas_penalty"] = float(self._managed.penalty)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Puts the state into the checkpoint that has just been written."""
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
            data = _selected(data, _columns(kwargs["model"], args))
        shows = state.is_world_process_zero and not args.disable_tqdm
        self._managed.consolidate(data, shows_progress=shows)

    def _ends_tasks(self, state: TrainerState) -> bool:
        return self._consolidates and not state.is_hyper_param_search

    def _checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The folder that training resumes from, which the Trainer does not tell its callbacks."""
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
    """Where the Trainer puts, or has put, the checkpoint of this step."""
    assert args.output_dir is not None
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _is_of(folder: Path, state: TrainerState) -> bool:
    """Whether a checkpoint is where this state was read from, and not one of another run."""
    try:
        kept = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    except OSError:
        return False
    # As text, in which a loss that is NaN equals itself.
    mine, its = (json.dumps([s.global_step, s.log_history]) for s in (state, kept))
    return mine == its


def _from_the_start(data: Any) -> Iterable[Any]:
    """In the order of the first epoch, so that a resumed training measures the same samples."""
    if callable(set_epoch := getattr(data, "set_epoch", None)):
        set_epoch(0)
    return data


def _columns(model: nn.Module, args: TrainingArguments) -> frozenset[str]:
    """What the model's ``forward`` names, without the labels; none if it names nothing."""
    # PEFT's forward passes on what it gets.
    inner: Any = getattr(model, "get_base_model", None)
    base = model if inner is None else inner()
    parameters = inspect.signature(type(base).forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    labels = {"labels", "label", "label_ids", *(args.label_names or find_labels(type(base)))}
    return frozenset(named - {"self"} - labels)


def _selected(data: Iterable[Any], columns: frozenset[str]) -> Iterator[Any]:
    for batch in data:
        if columns and isinstance(batch, Mapping):
            yield {name: value for name, value in batch.items() if name in columns}
        else:
            yield batch
