"""Counts what PyTorch's own operators read and write, as they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Counted(NamedTuple):
    """One operator's call, in bytes; ``elements``: of the largest tensor it was given or made."""

    name: str
    read: int
    written: int
    elements: int


class Traffic(TorchDispatchMode):
    """Every call below autograd, so backward passes too. Views move nothing.

    What is changed in place is read and written, what is new is written. What an operator is given
    twice (x·x) is read once: the second time it is in the nearest cache.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Counted] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.calls.append(_count(func, args, kwargs or {}, result))
        return result


def _count(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Counted:
    given, made = list(_tensors((args, kwargs))), list(_tensors(result))
    changed = list(_tensors(_changed(func, args, kwargs)))
    known = {t.data_ptr() for t in given}
    new = [t for t in made if t.data_ptr() not in known]
    return Counted(
        str(func),
        sum({t.data_ptr(): _bytes(t) for t in given}.values()),
        sum(map(_bytes, changed + new)),
        max((t.numel() for t in given + made), default=0),
    )


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    arguments = func._schema.arguments
    by_name = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
    return [
        by_name.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write
    ]


def _bytes(tensor: Tensor) -> int:
    """In memory: an expanded dimension is there once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


def count(call: Callable[[], object]) -> list[Counted]:
    with Traffic() as traffic:
        call()
    return traffic.calls


def passes(calls: list[Counted], elements: int) -> list[Counted]:
    """The calls that go over tensors of at least that size; the others handle single numbers."""
    assert elements > 16, "too small to tell a tensor from a list of sums"
    return [call for call in calls if call.elements >= elements]
