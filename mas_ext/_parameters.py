"""Parameters by canonical name, selection by name, and changes of the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn import Parameter
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from mas_ext._distributed.fsdp import sharded_by_current_id
from mas_ext._operators.native import are_as_before

Selection = Iterable[str] | Callable[[str, Parameter], bool] | None

# Wrappers: their part of the path is left out of canonical names.
_WRAPPING_ATTRIBUTES = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_WRAPPING_TYPES = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def _is_wrapper_step(owner: nn.Module, attribute: str) -> bool:
    return attribute in _WRAPPING_ATTRIBUTES or (
        attribute == "module" and isinstance(owner, _WRAPPING_TYPES)
    )


def _walk(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    yield prefix, module
    for attribute, child in module._modules.items():
        if child is not None:
            below = prefix if _is_wrapper_step(module, attribute) else f"{prefix}{attribute}."
            yield from _walk(child, below, seen)


def modules_by_prefix(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, with what the canonical names of its parameters begin with."""
    return _walk(model, "", set())


def canonical_name(key: str, modules: int = 0) -> str:
    """The name of a state dictionary's key, without what wrappers add to it.

    Args:
        key: of the state dictionary.
        modules: how many ``module.`` at the beginning are wrappers'.
    """
    steps = [step for step in key.split(".") if step not in _WRAPPING_ATTRIBUTES]
    while modules > 0 and steps[0] == "module":
        steps, modules = steps[1:], modules - 1
    return ".".join(steps)


def wrapping_modules(model: nn.Module) -> int:
    """How many ``module.`` the wrappers around a model put before its names."""
    for attribute, child in model._modules.items():
        if child is not None and _is_wrapper_step(model, attribute):
            return int(attribute == "module") + wrapping_modules(child)
    return 0


class ParameterIndex:
    """A model's parameters by canonical name: without wrappers' prefixes, tied parameters once.

    A model may change between uses: a head is replaced, a module added. Names are then looked up
    again; a comparison of object identities detects it without walking the model. Where
    ``fully_shard`` has an unsharded parameter in a module, the sharded one is meant.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._named: dict[str, Parameter] = {}
        self._links: list[tuple[dict[str, Any], str, Any]] = []
        self._owners: list[tuple[dict[str, Any], int]] = []
        self._look_up()

    def _look_up(self) -> None:
        self._named, self._links, self._owners = {}, [], []
        seen: set[int] = set()
        sharded = sharded_by_current_id(self.model)
        for prefix, module in modules_by_prefix(self.model):
            for owner in (module._parameters, module._modules):
                self._owners.append((owner, len(owner)))
                self._links += [(owner, key, value) for key, value in owner.items()]
            for attribute, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    self._named[prefix + attribute] = sharded.get(id(parameter), parameter)

    def _is_current(self) -> bool:
        return are_as_before(self._links, self._owners)

    def named(self) -> Mapping[str, Parameter]:
        """All parameters by canonical name, as the model is now."""
        if not self._is_current():
            self._look_up()
        return self._named

    @property
    def adapted(self) -> Mapping[str, Any]:
        """The frozen parameters that are trained through their adapters, by name: none."""
        return {}

    def measurable(self) -> AbstractContextManager[None]:
        """Lets gradients reach all parameters that are measured."""
        return nullcontext()


def select(
    named: Mapping[str, Parameter], params: Selection, adapted: Collection[str] = ()
) -> dict[str, Parameter]:
    """The parameters that are trained and are selected by ``params``.

    Args:
        named: parameters by canonical name.
        adapted: the names of frozen ones that are trained through their adapters.
        params: None for all; a name or glob, or several, each of which must match a parameter; or
            a ``callable(name, parameter) -> bool``.

    Raises:
        ValueError: a pattern matches nothing.
        TypeError: ``params`` is none of these.
    """
    trainable = {n: p for n, p in named.items() if p.requires_grad or n in adapted}
    if params is None:
        return trainable
    if callable(params):
        return {name: p for name, p in trainable.items() if params(name, p)}
    patterns = _patterns(params)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in named):
            raise ValueError(
                f"params: {pattern!r} matches no parameter; the model has {_some(named)}"
            )
    return {n: p for n, p in trainable.items() if any(matches(n, g) for g in patterns)}


def matches(name: str, pattern: str) -> bool:
    """Whether a name is a pattern or matches it: a name such as ``d.w[0]`` looks like a glob."""
    return name == pattern or fnmatchcase(name, pattern)


def reusable(params: Selection) -> Selection:
    """The same selection, as a list if it is an iterator of names, which one look would use up."""
    return params if params is None or callable(params) or isinstance(params, str) else list(params)


def _patterns(params: Iterable[str]) -> list[str]:
    patterns = [params] if isinstance(params, str) else list(params)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            f"params must be None, names or globs, or a callable(name, parameter); got {params!r}"
        )
    return patterns


def select_some(
    named: Mapping[str, Parameter], params: Selection, adapted: Collection[str] = ()
) -> dict[str, Parameter]:
    """Like :func:`select`; raises ValueError if nothing, or what has no Ω, is selected."""
    selected = select(named, params, adapted)
    for name, p in selected.items():
        if is_lazy(p):
            raise ValueError(
                f"parameter {name!r} has no shape yet (a lazy module); run the model on one batch "
                "first"
            )
        if p.is_complex():
            raise ValueError(
                f"parameter {name!r} is complex, and importance is defined for real parameters; "
                "make its torch.view_as_real() the parameter, or leave it out with params="
            )
    if not selected:
        raise ValueError(
            "params: no parameter is selected that requires gradients; set requires_grad on "
            f"some of the model's parameters or widen params (the model has {_some(named)})"
        )
    return selected


def select_measurable(
    named: Mapping[str, Parameter], params: Selection, adapted: Collection[str] = ()
) -> dict[str, Parameter]:
    """Like :func:`select_some`; raises ValueError if the model has no values."""
    selected = select_some(named, params, adapted)
    check_materialised(selected)
    return selected


def check_materialised(params: Mapping[str, Parameter]) -> None:
    """Raises ValueError if a parameter is on the meta device and so has no values."""
    for name, p in params.items():
        if p.is_meta:
            raise ValueError(
                f"parameter {name!r} is on the meta device and has no values; give the model "
                "memory and weights first (to_empty() and load_state_dict(), or "
                "load_state_dict(assign=True))"
            )


def _some(named: Mapping[str, Any], most: int = 5) -> str:
    names = list(named)
    shown = ", ".join(names[:most]) or "no parameters"
    return shown if len(names) <= most else f"{shown}, … ({len(names)} in all)"
