"""DTensors, of which every process holds a part.

Kernels and state work on the local parts, which are plain tensors. A :class:`Sharding` turns a
local part back into a DTensor that is placed as its parameter is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def are_plain(tensors: Iterable[Any]) -> bool:
    """Whether all are tensors or parameters, and none is a DTensor or another subclass."""
    return _PLAIN.issuperset(map(type, tensors))


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor. Does not import the module that defines it, which takes a second."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """A DTensor's local part, in the same memory, detached; any other tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def locals_of(tensors: Sequence[Any]) -> list[Any]:
    """:func:`local` of each."""
    return list(tensors) if are_plain(tensors) else [local(tensor) for tensor in tensors]


def local_grad(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient's local part, after any pending sum over processes."""
    return local(redistribute_like(grad, param))


def local_grads(params: Sequence[Tensor]) -> list[Tensor]:
    """:func:`local_grad` of each."""
    if are_plain(params):
        return [p.grad for p in params]  # type: ignore[misc]
    return [local_grad(p.grad, p) for p in params]  # type: ignore[arg-type]


def local_parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """:func:`local` by name."""
    return {name: local(tensor) for name, tensor in tensors.items()}


def differentiable_part(tensor: Tensor) -> Tensor:
    """A DTensor's local part, differentiable; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def full_tensor(tensor: Tensor) -> Tensor:
    """A DTensor's full tensor, on every process, differentiable; any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def redistribute_like(tensor: Tensor, param: Tensor) -> Tensor:
    """A gradient placed as its parameter is; pending sums over processes are carried out."""
    if not is_sharded(param) or tensor.placements == param.placements:  # type: ignore[attr-defined]
        return tensor
    return tensor.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Sharding:
    """Where the parts of a DTensor are, and what they make up."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Any) -> Sharding | None:
        """None for a plain tensor."""
        if not is_sharded(tensor):
            return None
        return cls(tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride())

    def place(self, part: Tensor) -> Tensor:
        """The DTensor of which this is the local part, in the same memory."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            part,
            self.mesh,
            self.placements,
            run_check=False,
            shape=self.shape,
            stride=self.stride,
        )

    def part_of(self, value: Tensor) -> Tensor:
        """The local part of a whole tensor, or of a DTensor however placed."""
        from torch.distributed.tensor import distribute_tensor

        if is_sharded(value):
            return value.redistribute(self.mesh, self.placements).to_local()  # type: ignore[attr-defined]
        return distribute_tensor(value, self.mesh, self.placements, src_data_rank=None).to_local()


class Shardings:
    """How each parameter was sharded when it was first remembered, by name; None if it was not."""

    def __init__(self, known: Mapping[str, Sharding | None] | None = None) -> None:
        self._known = dict(known or {})

    def joined_by(self, params: Mapping[str, Tensor]) -> Shardings:
        """These and those of more parameters.

        Raises:
            ValueError: one is known and is sharded otherwise now, or has grown.
        """
        found = {name: Sharding.of(p) for name, p in params.items()}
        for name, now in found.items():
            before = self._known.get(name, now)
            if before != now:
                raise ValueError(_changed(name, before, now))
        return Shardings({**self._known, **found})

    def names(self) -> list[str]:
        """Of those that are sharded."""
        return [name for name, sharding in self._known.items() if sharding is not None]

    def parts(self, values: Mapping[str, Tensor], device: str | None = None) -> dict[str, Tensor]:
        """The local parts of values, which may be whole or placed in whatever way.

        Args:
            values: by name.
            device: where each part is moved before the next one is taken; None: they are not.
        """
        return {
            name: value
            if (sharding := self._known.get(name)) is None
            else sharding.part_of(value).to(device)
            for name, value in values.items()
        }

    def placed(self, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Local parts as DTensors where the parameters are; the mapping itself if none is."""
        if not any(self._known.get(name) for name in parts):
            return parts
        return DTensorView(parts, self._known)

    def placed_where_they_are(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As :meth:`placed`, but parts that are not on the mesh's device are not copied to it.

        The DTensors serve to be stored: they are not where processes can exchange them.
        """
        return {name: t.to(parts[name].device) for name, t in self.placed(parts).items()}


class DTensorView(Mapping[str, Tensor]):
    """Local parts, shown as the DTensors that they are parts of."""

    def __init__(
        self, parts: Mapping[str, Tensor], shardings: Mapping[str, Sharding | None]
    ) -> None:
        self._parts = parts
        self._shardings = shardings

    def __getitem__(self, name: str) -> Tensor:
        part, sharding = self._parts[name], self._shardings.get(name)
        return part if sharding is None else sharding.place(part)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} tensors)"


def _changed(name: str, before: Sharding | None, now: Sharding | None) -> str:
    if before and now and before.shape != now.shape:
        return (
            f"parameter {name!r} had shape {list(before.shape)} and now has {list(now.shape)}: one "
            "that is sharded may not grow between tasks; grow it before the model is sharded, "
            "start a new MAS, or leave it out with params="
        )
    return (
        f"parameter {name!r} was remembered {_described(before)} and is {_described(now)} now; "
        "shard the model before it is measured, or save() the state before and load() it after"
    )


def _described(sharding: Sharding | None) -> str:
    if sharding is None:
        return "whole"
    return f"as {sharding.placements} over a mesh of {list(sharding.mesh.shape)}"


class Placement(NamedTuple):
    """What parameters must have in common to share an operator call.

    Attributes:
        device: where this process's part is.
        mesh: the DTensor's; None for plain tensors.
        sharded: the dimensions of the mesh over which the parts differ.
    """

    device: torch.device
    mesh: Any = None
    sharded: tuple[int, ...] = ()

    @classmethod
    def of(cls, param: Any) -> Placement:
        """A parameter's placement."""
        if not is_sharded(param):
            return cls(param.device)
        dims = [d for d, placement in enumerate(param.placements) if not placement.is_replicate()]
        return cls(param.device, param.device_mesh, tuple(dims))

    def sum_over_shards(self, value: Tensor) -> Tensor:
        """The sum of a 0-dim value over all parts, on every process; differentiable."""
        if not self.sharded:
            return value
        from torch.distributed.tensor import DTensor, Partial, Replicate

        placements = [
            Partial() if d in self.sharded else Replicate() for d in range(self.mesh.ndim)
        ]
        total = DTensor.from_local(value, self.mesh, placements, run_check=False)
        for dim in self.sharded:  # one by one: PyTorch warns of sums over several at once
            placements[dim] = Replicate()
            total = total.redistribute(self.mesh, placements)
        return total.to_local()


def placement_key(param: Tensor) -> Placement | torch.device:
    """Equal for parameters of one placement, and cheap for plain tensors."""
    return Placement.of(param) if is_sharded(param) else param.device
