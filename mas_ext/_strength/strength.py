"""λ of every parameter: one number, or one per name pattern, given or found from the data."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mas_ext._parameters import matches
from mas_ext._strength.auto import DEFAULT_DRIFT, GroupStatistics, Lambdas, UpdateKind, check_drift

AUTO = "auto"
Lambda = float | str | Mapping[str, float | str]
Drift = float | Mapping[str, float]


def check_lambda(value: Any) -> float:
    """Returns ``value`` as a float; raises if it is not a finite number ≥ 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"lambda_reg is {value!r}; pass a number or 'auto', or a mapping from name or glob to "
            "either"
        )
    if not 0 <= value <= sys.float_info.max:
        raise ValueError(f"lambda_reg is {value}; pass a finite number that is not negative")
    return float(value)


class RegularizationStrength:
    """λ of every parameter: the same, or that of the first name or glob that matches.

    Args:
        value: a number or ``"auto"``, or a mapping from name or glob to either.
        drift: ε for every pattern whose λ is ``"auto"``: a number for all, or a mapping with
            exactly those patterns.

    Attributes:
        value: as given: a float, ``"auto"``, or a dict of them.
        drift: as given: a float, or a dict of floats.
        factor: what every λ is multiplied by: 1, unless a drift budget changes it.

    Raises:
        ValueError: a number is out of range, the mapping is empty, or ``drift`` has other patterns.
        TypeError: something other than numbers and strings.
    """

    factor = 1.0  # of an instance that an earlier mas_ext has pickled

    def __init__(self, value: Any, drift: Any = DEFAULT_DRIFT) -> None:
        is_mapping = isinstance(value, Mapping)
        by_pattern = {
            _check_pattern(pattern): _check_value(number)
            for pattern, number in (value if is_mapping else {"*": value}).items()
        }
        if not by_pattern:
            raise ValueError("lambda_reg is an empty mapping; pass a number, or {'*': number}")
        self.value: float | str | dict[str, float | str] = (
            by_pattern if is_mapping else by_pattern["*"]
        )
        automatic = [pattern for pattern, number in by_pattern.items() if number == AUTO]
        self.drift, self._drifts = _check_drift(drift, automatic)
        self._patterns = list(by_pattern)
        self._lambdas = {p: Lambdas(v, v) for p, v in by_pattern.items() if not isinstance(v, str)}
        # Where λ is not found yet, nothing is protected: it is 0.
        self._tensors = {p: _scalars(self._lambdas.get(p, Lambdas(0.0, 0.0))) for p in by_pattern}
        self._pattern_of: dict[str, str] = {}

    def multiply_by(self, factor: float) -> None:
        """Multiplies every λ, as given or found, by a factor, which replaces the one before."""
        self.factor = factor
        for pattern, lambdas in self._lambdas.items():
            for kind, number in lambdas._asdict().items():
                self._tensors[pattern][kind].fill_(number * factor)

    @property
    def is_auto(self) -> bool:
        """Whether any λ is found from the data."""
        return bool(self._drifts)

    def resolve(self, statistics: Mapping[str, GroupStatistics], energy: float | None) -> None:
        """Finds λ where it is ``"auto"``.

        Args:
            statistics: of every parameter, by name.
            energy: E of the tasks learned so far; None if Ω is not a derivative of E.
        """
        groups = {pattern: GroupStatistics() for pattern in self._drifts}
        for name, one in statistics.items():
            if (group := groups.get(self.pattern_of(name))) is not None:
                group.numel += one.numel
                group.importance += one.importance
        for pattern, group in groups.items():
            self._lambdas[pattern] = group.lambdas(self._drifts[pattern], energy)
            self._tensors[pattern] = _scalars(self._lambdas[pattern])
        self.multiply_by(self.factor)

    def numbers(self, update: UpdateKind) -> float | str | dict[str, float | str]:
        """λ in the form it was given, as numbers where they are known."""
        numbers = {
            pattern: self.factor * getattr(self._lambdas[pattern], update)
            if pattern in self._lambdas
            else AUTO
            for pattern in self._patterns
        }
        return numbers if isinstance(self.value, dict) else numbers["*"]

    def lambda_of(self, name: str, update: UpdateKind = "gradient") -> Tensor:
        """λ of a parameter: a 0-dim tensor, which compiled code can read anew in every step.

        Raises:
            ValueError: no pattern matches the name.
        """
        return self._tensors[self.pattern_of(name)][update]

    def pattern_of(self, name: str) -> str:
        """The pattern that decides a parameter's λ; ValueError if none does."""
        if name not in self._pattern_of:  # asked for every parameter in every step
            self._pattern_of[name] = self._first_match(name)
        return self._pattern_of[name]

    def _match(self, name: str) -> str | None:
        return next((pattern for pattern in self._patterns if matches(name, pattern)), None)

    def _first_match(self, name: str) -> str:
        pattern = self._match(name)
        if pattern is not None:
            return pattern
        raise ValueError(
            f"lambda_reg: nothing in {self._patterns} matches parameter {name!r}; add '*' for "
            "all others, with 0 to leave them free"
        )

    def check_covers(self, names: Iterable[str]) -> None:
        """Raises ValueError if one of these parameters has no λ."""
        for name in names:
            self.pattern_of(name)

    def check_finite(self) -> None:
        """Raises ValueError if a λ that was found, or multiplied, is Inf or NaN."""
        for pattern, scalars in self._tensors.items():
            if not all(math.isfinite(scalar.item()) for scalar in scalars.values()):
                raise ValueError(
                    f"lambda_reg: λ of {pattern!r} is not finite, since Ω, drift or the energy is "
                    "out of range; pass a number"
                )

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raises ValueError if a pattern decides the λ of no parameter of the model."""
        known = list(names)
        used = {self._match(name) for name in known}
        for pattern in self._patterns:
            if pattern in used or pattern == "*" or not isinstance(self.value, dict):
                continue
            if not any(matches(name, pattern) for name in known):
                raise ValueError(f"lambda_reg: {pattern!r} matches no parameter of the model")
            raise ValueError(
                f"lambda_reg: {pattern!r} decides nothing, since the patterns before it match all "
                "of its parameters and the first that matches counts; put it first"
            )

    def __repr__(self) -> str:
        return f"{self.value:g}" if isinstance(self.value, float) else repr(self.value)


def _check_value(value: Any) -> float | str:
    return AUTO if value == AUTO else check_lambda(value)


def _check_pattern(pattern: Any, argument: str = "lambda_reg") -> str:
    if not isinstance(pattern, str):
        raise TypeError(f"{argument} has the key {pattern!r}; pass names or globs")
    return pattern


def _check_drift(
    drift: Any, automatic: list[str]
) -> tuple[float | dict[str, float], dict[str, float]]:
    """ε as it was given, and ε of every pattern whose λ is found."""
    if not isinstance(drift, Mapping):
        number = check_drift(drift)
        return number, dict.fromkeys(automatic, number)
    numbers = {_check_pattern(p, "drift"): check_drift(v) for p, v in drift.items()}
    if numbers.keys() != set(automatic):
        raise ValueError(
            f"drift is for {list(numbers)}, and lambda_reg is 'auto' for {automatic}; name the "
            "same ones, or pass one number for all"
        )
    return numbers, numbers


@torch.inference_mode(False)  # autograd could not save what is made in inference mode
def _scalars(lambdas: Lambdas) -> dict[str, Tensor]:
    return {
        kind: torch.scalar_tensor(number, dtype=torch.float64, device="cpu")
        for kind, number in lambdas._asdict().items()
    }
