"""The groups of parameters that steps before have used, as long as they are still right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

from torch import Tensor

from mas_ext._distributed.shards import are_plain
from mas_ext._operators.native import FixedList
from mas_ext._penalty.parameter_groups import ParameterGroup

_requires_grad = attrgetter("requires_grad")
_MOST = 4096  # as many optimizers as parameters are possible, and each has groups of its own


@dataclass(frozen=True)
class _Kept:
    """Groups, and what a change of theirs would show in.

    Attributes:
        asked_for: the parameters that the groups were to be of; their ids are in use while kept.
        candidates: those of them that the groups have, or would have if they required gradients.
        states: of each candidate, whether it requires gradients, and where its memory is. It is
            elsewhere after the parameter has grown, or moved to another device or dtype.
        groups: what was found.
    """

    asked_for: Sequence[Tensor] | None
    candidates: Sequence[Tensor]
    states: tuple[list[bool], list[int]]
    groups: list[ParameterGroup]

    def is_current(self) -> bool:
        return self.states == _states(self.candidates)


def _states(params: Sequence[Tensor]) -> tuple[list[bool], list[int]]:
    return list(map(_requires_grad, params)), list(map(Tensor.data_ptr, params))


def _with_fixed_state(group: ParameterGroup) -> ParameterGroup:
    anchors, omega, scales = map(FixedList, (group.anchors, group.omega, group.scales))
    return group._replace(anchors=anchors, omega=omega, scales=scales)


class KeptGroups:
    """Groups by what they were asked for with: to form them takes longer than to use them."""

    def __init__(self) -> None:
        self._sources: tuple[Any, ...] = ()
        self._kept: dict[Any, _Kept] = {}

    def get(self, key: Any, sources: tuple[Any, ...]) -> list[ParameterGroup] | None:
        """The groups of a key, if nothing has changed since.

        Args:
            key: hashable.
            sources: the objects that groups were made from; with another, all are forgotten.
        """
        if len(sources) != len(self._sources) or not all(map(is_, sources, self._sources)):
            self.clear()
            return None
        kept = self._kept.get(key)
        return kept.groups if kept is not None and kept.is_current() else None

    def put(
        self,
        key: Any,
        sources: tuple[Any, ...],
        asked_for: Sequence[Tensor] | None,
        candidates: Sequence[Tensor],
        groups: list[ParameterGroup],
    ) -> None:
        """Keeps groups; but not those of DTensors and other subclasses, which hide their memory."""
        if not are_plain(candidates):
            return
        if len(self._kept) >= _MOST:
            self.clear()
        groups = [_with_fixed_state(group) for group in groups]
        self._sources = sources
        asked_for = None if asked_for is None else [*asked_for]  # which may change its list
        self._kept[key] = _Kept(asked_for, candidates, _states(candidates), groups)

    def clear(self) -> None:
        """Forgets everything, and lets go of the tensors in it."""
        self._sources, self._kept = (), {}
