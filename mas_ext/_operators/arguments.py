"""What an operator's arguments are: their schema types, their roles, and the rules for values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

from torch import Tensor

# Raises RuntimeError if a number is out of range: (operator, argument's name, value).
NumberCheck = Callable[[str, str, Any], None]


class Role(Enum):
    """What an argument is to the checks."""

    VALUES = auto()  # tensors that share one dtype at each position: θ, θ*, gradients, moments
    OMEGA = auto()  # Ω, whose dtype depends on that of the values
    OMEGA_SCALES = auto()
    SCALAR = auto()  # a 0-dim tensor, on the CPU or with the values
    COUNTS = auto()  # one number per parameter, in one tensor
    OPTION = auto()  # a Python number or flag


class _Required(Enum):
    REQUIRED = auto()


REQUIRED = _Required.REQUIRED


@dataclass(frozen=True)
class Argument:
    """One argument of an operator.

    Attributes:
        name: as in the schema, in error messages and in :mod:`mas_ext.reference`.
        type: the schema's type.
        role: what the checks take it for.
        default: its value where a call leaves it out.
        written: whether the operator writes to it.
        check: the rule for its value. Tensors on a device are not read, since that would wait.
        only_with: the name of an option; where that is 0, this list must be empty.
    """

    name: str
    type: str
    role: Role
    default: Any = REQUIRED
    written: bool = False
    check: NumberCheck | None = None
    only_with: str = ""

    @property
    def is_list(self) -> bool:
        return self.type == "Tensor[]"

    @property
    def is_omega(self) -> bool:
        return self.role is Role.OMEGA

    def schema(self, alias: str = "") -> str:
        """The argument in a schema; ``alias`` marks it where it is written."""
        kind = self.type.replace("Tensor", f"Tensor({alias}!)") if alias else self.type
        default = "" if self.default is REQUIRED else f"={self.default!r}"
        return f"{kind} {self.name}{default}"


def values(name: str, *, only_with: str = "") -> Argument:
    """A list with one tensor per parameter."""
    return Argument(name, "Tensor[]", Role.VALUES, only_with=only_with)


def matrix(name: str, role: Role = Role.VALUES) -> Argument:
    """A single tensor."""
    return Argument(name, "Tensor", role)


def scalar(name: str, check: NumberCheck | None = None) -> Argument:
    """A number that may be on the device: a 0-dim tensor."""
    return Argument(name, "Tensor", Role.SCALAR, check=check)


def optional_scalar(name: str, check: NumberCheck | None = None) -> Argument:
    return Argument(name, "Tensor?", Role.SCALAR, default=None, check=check)


def number(name: str, default: Any, check: NumberCheck) -> Argument:
    """A float; ``default=REQUIRED`` if every call has to pass it."""
    return Argument(name, "float", Role.OPTION, default=default, check=check)


def flag(name: str, default: bool = False) -> Argument:
    return Argument(name, "bool", Role.OPTION, default=default)


def written(argument: Argument) -> Argument:
    """The same argument, written by the operator."""
    return replace(argument, written=True)


@dataclass(frozen=True)
class Operands:
    """The tensors that a call gives for one argument; a single tensor is a list of one."""

    argument: Argument
    tensors: Sequence[Tensor]

    @property
    def name(self) -> str:
        return self.argument.name

    @property
    def is_omega(self) -> bool:
        return self.argument.is_omega

    @property
    def written(self) -> bool:
        return self.argument.written

    def at(self, i: int) -> str:
        """The i-th tensor's name in messages."""
        return f"{self.name}[{i}]" if self.argument.is_list else self.name
