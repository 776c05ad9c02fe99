"""λ: one number, or one for each group of parameters, given or found from the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from mas_ext._penalty import auto_strength as drifts
from mas_ext._penalty.auto_strength import Group, Lambdas

AUTO = "auto"
Lambda = float | str | Mapping[str, float | str]
Drift = float | Mapping[str, float]


def check_lambda(value: Any) -> float:
    """A finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"lambda_reg is {value!r}; pass a number or 'auto', or a mapping from name or glob to "
            "either"
        )
    if not value >= 0 or math.isinf(value):
        raise ValueError(f"lambda_reg is {value}; pass a finite number that is not negative")
    return float(value)


class Strength:
    """λ of every parameter: the same, or that of the first name or glob that matches.

    Args:
        value: a number or ``"auto"``, or a mapping from name or glob to either.
        drift: ε of what is ``"auto"`` (``auto_strength.py``): a number, or a mapping from the globs
            of ``value`` that are.

    Attributes:
        value: the same: a float, ``"auto"``, or a dict of them.
        drift: the same: a float, or a dict of floats.

    Raises:
        ValueError: a number is out of range, the mapping is empty, or ``drift`` has other globs.
        TypeError: something else than numbers and strings.
    """

    def __init__(self, value: Any, drift: Any = drifts.DEFAULT) -> None:
        is_mapping = isinstance(value, Mapping)
        by_glob = {
            _pattern(g): _kept(v) for g, v in (value if is_mapping else {"*": value}).items()
        }
        if not by_glob:
            raise ValueError("lambda_reg is an empty mapping; pass a number, or {'*': number}")
        self.value: float | str | dict[str, float | str] = by_glob if is_mapping else by_glob["*"]
        found = [glob for glob, number in by_glob.items() if number == AUTO]
        self.drift, self._drifts = _checked_drift(drift, found)
        self._globs = list(by_glob)
        self._lambdas = {g: Lambdas(v, v) for g, v in by_glob.items() if not isinstance(v, str)}
        # λ of what is found later; nothing is held in place before.
        self._tensors = {g: _scalars(self._lambdas.get(g, Lambdas(0.0, 0.0))) for g in by_glob}
        self._known: dict[str, str] = {}

    @property
    def is_auto(self) -> bool:
        """Whether a λ has to be found."""
        return bool(self._drifts)

    def settle(self, sizes: Mapping[str, Group], energy: float) -> None:
        """Finds what is ``"auto"``.

        Args:
            sizes: of every parameter, by name.
            energy: E of the tasks learned so far.
        """
        groups = {glob: Group() for glob in self._drifts}
        for name, size in sizes.items():
            if (group := groups.get(self.glob_of(name))) is not None:
                group.numel += size.numel
                group.importance += size.importance
        for glob, group in groups.items():
            self._lambdas[glob] = group.strengths(self._drifts[glob], energy)
            self._tensors[glob] = _scalars(self._lambdas[glob])

    def shown(self, kind: str) -> float | str | dict[str, float | str]:
        """λ as numbers, where it is known; ``kind``: of :class:`.Lambdas`."""
        numbers = {
            glob: getattr(self._lambdas[glob], kind) if glob in self._lambdas else AUTO
            for glob in self._globs
        }
        return numbers if isinstance(self.value, dict) else numbers["*"]

    def of(self, name: str, kind: str = "gradient") -> Tensor:
        """λ of a parameter, a 0-dim tensor: compiled code reads it, and takes a new one.

        Raises:
            ValueError: nothing in the mapping matches it.
        """
        return self._tensors[self.glob_of(name)][kind]

    def glob_of(self, name: str) -> str:
        """What decides on a parameter's λ; ValueError if nothing does."""
        if name not in self._known:  # asked for every parameter in every step
            self._known[name] = self._look_up(name)
        return self._known[name]

    def _look_up(self, name: str) -> str:
        for glob in self._globs:
            if fnmatchcase(name, glob):
                return glob
        raise ValueError(
            f"lambda_reg: nothing in {self._globs} matches parameter {name!r}; add '*' for "
            "all others, with 0 to leave them free"
        )

    def check(self, names: Iterable[str]) -> None:
        """That each of these parameters has a λ."""
        for name in names:
            self.of(name)

    def check_patterns(self, names: Iterable[str]) -> None:
        """That everything in the mapping is about some parameter of the model."""
        known = list(names)
        for glob in self.value if isinstance(self.value, dict) else ():
            if not any(fnmatchcase(name, glob) for name in known):
                raise ValueError(f"lambda_reg: {glob!r} matches no parameter of the model")

    def __repr__(self) -> str:
        return f"{self.value:g}" if isinstance(self.value, float) else repr(self.value)


def _kept(value: Any) -> float | str:
    return AUTO if value == AUTO else check_lambda(value)


def _checked_drift(
    drift: Any, found: list[str]
) -> tuple[float | dict[str, float], dict[str, float]]:
    """ε as it was given, and of every glob whose λ is found."""
    if not isinstance(drift, Mapping):
        number = drifts.check_drift(drift)
        return number, dict.fromkeys(found, number)
    numbers = {_pattern(glob, "drift"): drifts.check_drift(v) for glob, v in drift.items()}
    if numbers.keys() != set(found):
        raise ValueError(
            f"drift is for {list(numbers)}, and lambda_reg is 'auto' for {found}; name the same "
            "ones, or pass one number for all"
        )
    return numbers, numbers


@torch.inference_mode(False)  # autograd could not save what is made in inference mode
def _scalars(lambdas: Lambdas) -> dict[str, Tensor]:
    return {
        kind: torch.scalar_tensor(number, dtype=torch.float64, device="cpu")
        for kind, number in lambdas._asdict().items()
    }


def _pattern(glob: Any, name: str = "lambda_reg") -> str:
    if not isinstance(glob, str):
        raise TypeError(f"{name} has the key {glob!r}; pass names or globs")
    return glob
