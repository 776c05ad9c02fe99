"""Everything that a MAS remembers, and its conversion to and from a state dictionary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Parameter

from mas_ext._adapters.anchors import AdapterAnchors
from mas_ext._adapters.lora import AdaptedWeight
from mas_ext._distributed.shards import Shardings, local_parts
from mas_ext._drift.references import References
from mas_ext._drift.stored import DriftState
from mas_ext._parameters import check_materialised
from mas_ext._state import checkpoint, distributed_checkpoint
from mas_ext._state.importance_state import ImportanceState
from mas_ext._state.merging import Merge, check_merge
from mas_ext._state.pending_steps import StoredSteps, check_stored
from mas_ext._state.task_accumulator import TaskAccumulator
from mas_ext._storage.flat_tensors import copies
from mas_ext._storage.stored_numbers import restored
from mas_ext._strength.auto import OutputEnergy, check_energy
from mas_ext._strength.strength import RegularizationStrength
from mas_ext.importance.options import check_weighting

if TYPE_CHECKING:
    from mas_ext._drift.tracker import DriftTracker


@dataclass
class RegularizerState:
    """Ω, θ*, λ, and the sums of the task that is being measured.

    Attributes:
        consolidated: Ω and θ* of the tasks that have ended.
        strength: λ.
        merge: how a task's Ω is merged.
        task: the sums of the task that has not ended.
        energy: the objective's mean over tasks, from which ``lambda_reg="auto"`` finds λ.
        num_tasks: how many tasks have ended.
        method: whose Ω it is: ``"MAS"``, ``"EWC"`` or ``"L2SP"``.
        reduction: how gradients count in Ω; empty before the first measurement.
        floor: what is added to every Ω of a task, as a fraction of their mean.
        drift: what is remembered for a drift budget.
        shardings: how each parameter was sharded when it was first remembered.
        adapters: θ* of the weights that are trained through their adapters.
        pending: steps that were pending when the state was saved, until their optimizers step.
    """

    consolidated: ImportanceState
    strength: RegularizationStrength
    merge: Merge
    task: TaskAccumulator = field(default_factory=TaskAccumulator)
    energy: OutputEnergy = field(default_factory=OutputEnergy)
    num_tasks: int = 0
    method: str = "MAS"
    reduction: str = ""
    floor: float = 0.0
    drift: DriftState = field(default_factory=DriftState)
    shardings: Shardings = field(default_factory=Shardings)
    adapters: AdapterAnchors = field(default_factory=AdapterAnchors)
    pending: dict[str, StoredSteps] = field(default_factory=dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Older pickles lack some.
        added = {"drift": DriftState(), "reduction": "abs", "adapters": AdapterAnchors()}
        added["pending"] = {}
        self.__dict__.update({**added, **state})

    @property
    def state_dtype(self) -> str:
        """The name of the dtype that Ω is stored in."""
        return self.consolidated.importance.state_dtype

    @property
    def state_device(self) -> str | None:
        """Where Ω and θ* are; None: beside the parameters."""
        return self.consolidated.state_device

    def local(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's parts of the parameters; ValueError if they were sharded otherwise."""
        self.shardings = self.shardings.joined_by(params)
        return local_parts(params)

    @contextmanager
    def unchanged_after_an_error(self) -> Iterator[None]:
        """Puts back the task's sums and the shardings if the block raises."""
        before = self.task, self.drift.sampler, self.shardings, self.reduction
        try:
            yield
        except BaseException:
            self.task, self.drift.sampler, self.shardings, self.reduction = before
            raise

    def begin_measurement(self, reduction: str, *, predicts: bool) -> None:
        """Notes how gradients are going to count.

        Args:
            reduction: its name.
            predicts: whether a drift budget adjusts the λ that is predicted here.

        Raises:
            ValueError: it does not add up with what was measured before, or λ cannot be found.
        """
        if self.reduction not in ("", reduction):
            raise ValueError(
                f"reduction: Ω has been measured with {self.reduction!r} so far, and {reduction!r} "
                "does not add up with it; use the same for all tasks"
            )
        _check_auto(self.strength, self.method, reduction, predicts)
        self.reduction = reduction

    # -- λ and the end of a task -------------------------------------------------------------------

    def use_strength(
        self,
        strength: RegularizationStrength,
        named: Mapping[str, Parameter],
        selected: Mapping[str, Parameter],
        *,
        predicts: bool,
    ) -> None:
        """Takes over λ; raises ValueError if it does not suit these parameters, or Ω."""
        _check_auto(strength, self.method, self.reduction, predicts)
        strength.check_covers(selected)
        strength.check_patterns(named)
        self._resolve(strength, named)
        self.strength = strength
        self.drift.controller = self.drift.controller.begin_anew()

    def follow_controller(self) -> None:
        """Takes over the λ of the controller."""
        self.strength.multiply_by(self.drift.controller.factor)

    def _resolve(self, strength: RegularizationStrength, named: Mapping[str, Parameter]) -> None:
        """Finds λ where it is ``"auto"`` and a task has been measured."""
        if not strength.is_auto or not self.consolidated.anchor:
            return
        # In the model's order, which a file does not keep: sums depend on it in their last bit.
        known = {name: p for name, p in named.items() if name in self.consolidated.anchor}
        statistics = self.consolidated.statistics(known, self.merge)
        if self.reduction != "abs":
            strength.resolve(statistics, None)
            return
        if not self.energy.tasks:
            raise ValueError(
                "lambda_reg='auto': this state was saved by an earlier mas_ext, which kept no "
                "energy to find λ from; pass a number, and 'auto' after the next consolidate()"
            )
        check_energy(self.energy.mean)
        strength.resolve(statistics, self.energy.mean)

    def end_task(
        self,
        named: Mapping[str, Parameter],
        selected: Mapping[str, Parameter],
        adapted: Mapping[str, AdaptedWeight],
    ) -> None:
        """Merges the task's Ω, takes θ* ← θ, and finds λ where it is ``"auto"``."""
        task = self.task
        if not task.counts:
            raise RuntimeError(
                "consolidate() has no importance to merge: pass data, or call "
                "update_importance(data) first"
            )
        known = {name: p for name, p in named.items() if name in self.consolidated.anchor}
        params = self.local({**known, **selected})
        task.check_growth(params)
        self.strength.check_covers(params)
        energy = self.energy.with_task(task.statistics.samples, task.statistics.mean_energy)
        if self.strength.is_auto and self.reduction == "abs":
            check_energy(energy.mean)
        floors = task.floors(self.floor, named)
        self.consolidated.end_task(params, task, self.merge, floors, adapted)
        self.adapters = AdapterAnchors.of({n: a for n, a in adapted.items() if n in params})
        self.energy = energy
        self._resolve(self.strength, named)
        self.task = TaskAccumulator()
        self.num_tasks += 1

    def begin_task(self, references: References | None) -> None:
        """Begins the next task, with the references for it."""
        self.drift = self.drift.begin_task(references)
        self.follow_controller()

    def without_importance(self) -> list[str]:
        """The parameters that the last measurement did not reach and whose Ω is 0 everywhere.

        Waits for the device.
        """
        remembered = self.consolidated.importance
        return [
            name
            for name in self.task.unreached
            if not self.task.sums[name].any()
            and not (name in remembered and remembered.stored(name)[0].any())
        ]

    # -- state dictionaries ------------------------------------------------------------------------

    def to_dict(self, pending: Mapping[str, StoredSteps] | None = None) -> checkpoint.StateDict:
        """Everything that was measured, as plain values and tensors: a copy.

        Args:
            pending: steps that are pending now; None: those that were loaded.
        """
        drift = self.strength.drift
        control, references = self.drift.state_dict()
        pending = self.pending if pending is None else pending
        state = {
            "format": checkpoint.FORMAT,
            "version": checkpoint.VERSION,
            "lambda_reg": self.strength.value,
            "drift": drift if isinstance(drift, float) else dict(drift),
            "energy": asdict(self.energy),
            "merge": self.merge,
            "state_dtype": self.state_dtype,
            "num_tasks": self.num_tasks,
            "method": self.method,
            "reduction": self.reduction,
            "control": control,
            "references": copies(references),
            "adapters": self.adapters.state_dict(),
            "pending": {
                n: list(s) for n, s in (self.pending if pending is None else pending).items()
            },
            **self.consolidated.state_dict(),
            **self.task.state_dict(),
        }
        state = checkpoint.dequantized(state, self.shardings.names())
        placed = {g: self.shardings.placed_where_they_are(state[g]) for g in checkpoint.GROUPS}
        return {**state, **placed}

    def to_packed_dict(
        self,
        selected: Mapping[str, Parameter],
        adapted: Mapping[str, AdaptedWeight],
        pending: Mapping[str, StoredSteps] | None = None,
    ) -> checkpoint.StateDict:
        """The same as tensors only, with room for parameters that have not been measured."""
        unmeasured = {n: p for n, p in selected.items() if n not in self.consolidated.anchor}
        room = AdapterAnchors.room_for(adapted).state_dict()
        state = {**self.to_dict(pending), "adapters": {**room, **self.adapters.state_dict()}}
        return distributed_checkpoint.packed(state, unmeasured, adapted)

    @classmethod
    def from_dict(
        cls,
        state: Mapping[str, Any],
        named: Mapping[str, Parameter],
        selected: Mapping[str, Parameter],
        strict: bool,
        *,
        adapted: Mapping[str, AdaptedWeight],
        state_dtype: str,
        state_device: str | None = None,
        method: str = "MAS",
        floor: float = 0.0,
        tracker: DriftTracker | None = None,
    ) -> RegularizerState:
        """From what :meth:`to_dict` or :meth:`to_packed_dict` returned, in the model's layout.

        The keyword arguments stay as they are where the state is loaded.

        See :meth:`mas_ext.MAS.load_state_dict` for what it raises.
        """
        state = _checked(state, named, selected, strict, adapted)
        if state["method"] != method:
            raise ValueError(
                f"the state is of mas_ext.{state['method']}, and this is {method}, whose Ω is "
                "another; load it into one of its own method"
            )
        strength = _strength(state)
        strength.check_covers(state["importance"])
        energy = restored(OutputEnergy, state["energy"], "'energy'")
        if strength.is_auto and state["importance"] and state["reduction"] == "abs":
            check_energy(energy.mean)
        merge = check_merge(state["merge"])
        shardings = Shardings().joined_by(named)
        state = checkpoint.dequantized(state, shardings.names())
        # The sums of a task are beside the parameters in any case.
        places = dict.fromkeys(checkpoint.GROUPS, state_device) | {"open": None}
        state = {**state, **{g: shardings.parts(state[g], to) for g, to in places.items()}}
        params = local_parts(named)
        loaded = cls(
            ImportanceState.from_state_dict(state, params, state_dtype, adapted, state_device),
            strength,
            merge,
            TaskAccumulator.from_state_dict(state, params),
            energy,
            state["num_tasks"],
            method,
            state["reduction"],
            floor,
            DriftState() if tracker is None else tracker.restored(state),
            shardings,
            AdapterAnchors.from_state_dict(
                state["adapters"], {n: a for n, a in adapted.items() if n in state["importance"]}
            ),
            check_stored(state["pending"]),
        )
        loaded._resolve(strength, named)
        loaded.follow_controller()
        strength.check_finite()
        return loaded


def _strength(state: Mapping[str, Any]) -> RegularizationStrength:
    try:
        return RegularizationStrength(state["lambda_reg"], state["drift"])
    except TypeError as error:  # of an argument, but here it is what a file says
        raise ValueError(f"the state is damaged: {error}") from error


def _check_auto(
    strength: RegularizationStrength, method: str, reduction: str, predicts: bool
) -> None:
    """Raises ValueError if λ is to be found from an Ω that does not say it."""
    if not strength.is_auto or predicts:
        return
    if method != "MAS" or reduction not in ("", "abs"):
        raise ValueError(
            f"lambda_reg='auto' works with MAS's Ω alone, without a drift budget, and this Ω is "
            f"that of {method if method != 'MAS' else f'reduction={reduction!r}'}; pass a number, "
            "or budget=0.08, which finds λ during training"
        )


def _checked(
    state: Mapping[str, Any],
    named: Mapping[str, Parameter],
    selected: Mapping[str, Parameter],
    strict: bool,
    adapted: Mapping[str, AdaptedWeight],
) -> Mapping[str, Any]:
    """A state dictionary of the present version that belongs to this model."""
    if distributed_checkpoint.is_packed(state):
        state = distributed_checkpoint.unpacked(state)
    checkpoint.check_format(state, "the state")
    state = checkpoint.upgraded(state)
    checkpoint.check_contents(state)
    if adapted:
        state = checkpoint.known_parameters(state, {**selected})
    if not strict:
        had_parameters = bool(state["importance"] or state["open"])
        state = checkpoint.known_parameters(state, named)
        if had_parameters and not (state["importance"] or state["open"]):
            raise ValueError(
                "the state has no parameter of this model, also with strict=False: was the model "
                "wrapped or renamed? Load into one whose parameters have the names in the state"
            )
    checkpoint.check_parameters(state, named, selected, strict)
    state = checkpoint.with_anchors_of_base(state, named, adapted)
    check_materialised({name: named[name] for name in {**state["importance"], **state["open"]}})
    check_weighting(state["weighting"])
    return state
