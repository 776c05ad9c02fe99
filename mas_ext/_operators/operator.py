"""What a declaration of an operator consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mas_ext._operators import autograd
from mas_ext._operators.arguments import REQUIRED, Argument, Operands

Call = Mapping[str, Any]  # the arguments of one call by name, defaults included


@dataclass(frozen=True)
class Result:
    """What an operator returns: its type in the schema, and empty tensors of that kind."""

    type: str
    empty: Callable[[Call], Any]


def _no_more_to_check(op: str, call: Call, read: bool) -> None:
    pass


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        name: in ``torch.ops.mas_ext``; it ends in ``_`` if the operator writes.
        arguments: in the schema's order. The first list is the one whose shapes and device the
            others must have.
        result: what it returns.
        default: its computation in plain PyTorch; takes the arguments by name.
        check: what is required beyond the rules of single arguments. The last parameter says
            whether values may be read, which fake tensors do not have.
        check_operands: what shapes, dtypes and devices must be; None for the rules of lists.
        backward: its gradient, where it is differentiable.
        save: what the backward pass needs of a call.
    """

    name: str
    arguments: tuple[Argument, ...]
    result: Result
    default: Callable[..., Any]
    check: Callable[[str, Call, bool], None] = _no_more_to_check
    check_operands: Callable[[str, Sequence[Operands]], None] | None = None
    backward: Callable[..., tuple[Any, ...]] | None = None
    save: Callable[..., None] = autograd.save_state

    @property
    def writes(self) -> bool:
        return any(argument.written for argument in self.arguments)

    @property
    def schema(self) -> str:
        aliases = iter("abcdefgh")
        arguments = (a.schema(next(aliases) if a.written else "") for a in self.arguments)
        return f"{self.name}({', '.join(arguments)}) -> {self.result.type}"

    @property
    def takes_packed_lists(self) -> bool:
        """Whether it has an overload for lists that are packed: one that writes to lists has."""
        return any(argument.written and argument.is_list for argument in self.arguments)

    @property
    def packed_schema(self) -> str:
        """Of that overload. ``home`` is a tensor on the device of the lists."""
        others = (a.schema() for a in self.arguments if not a.is_list)
        arguments = ", ".join(("Tensor lists", "Tensor home", *others))
        return f"{self.name}.packed({arguments}) -> {self.result.type}"

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """The arguments of a call by name."""
        defaults = {a.name: a.default for a in self.arguments if a.default is not REQUIRED}
        given = dict(zip((a.name for a in self.arguments), args, strict=False))
        return {**defaults, **given, **kwargs}
