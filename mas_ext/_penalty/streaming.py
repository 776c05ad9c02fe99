"""Ω and θ* that are in host memory, brought to the parameters' device a piece at a time.

On a CUDA device the next piece is copied on a stream of its own while kernels work on the present
one. Two buffers are used in turn. They are allocated for one use and released after it, which costs
no time, since PyTorch's allocator keeps the memory and activations can have it between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mas_ext._distributed.shards import are_plain, local
from mas_ext._operators.arguments import Operands
from mas_ext._operators.checks import check_lists, check_no_overlap
from mas_ext._operators.declarations import OPERATORS
from mas_ext._storage.flat_tensors import ALIGNMENT
from mas_ext.precision import BLOCK, in_memory_order, num_scales

if TYPE_CHECKING:
    from mas_ext._penalty.parameter_groups import ParameterGroup

PIECE = 2**24  # elements that are on the device at a time; a multiple of precision.BLOCK

Lists = list[list[Tensor]]
Call = Callable[["ParameterGroup", Lists], Tensor]


def is_elsewhere(state: Tensor, device: torch.device) -> bool:
    """Whether Ω or θ* is on another device than the parameter, which is on ``device``."""
    return state.device != device


class Part(NamedTuple):
    """What a piece has of one parameter.

    Attributes:
        place: the parameter's, in its group.
        elements: in the order of memory; None for all of them, in the parameter's shape.
    """

    place: int
    elements: slice | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor in the parameter's layout, in the same memory."""
        if self.elements is None:
            return tensor
        return in_memory_order(local(tensor).detach())[self.elements]

    def of_scales(self, scales: Tensor) -> Tensor:
        """The part of the scales of codes; none where there are none."""
        if self.elements is None or not scales.numel():
            return scales
        start, stop = self.elements.start, self.elements.stop
        return scales[start // BLOCK : num_scales(stop)]


# ================================================================================================
# What is in which piece
# ================================================================================================
def plan(sizes: Sequence[int], may_be_cut: Sequence[bool], piece: int) -> list[list[Part]]:
    """Pieces of at most ``piece`` elements, or of one parameter that is larger and stays whole.

    Args:
        sizes: the number of elements of each parameter.
        may_be_cut: whether a piece may have a part of it; parts begin at multiples of 256.
        piece: a multiple of 256.
    """
    pieces: list[list[Part]] = [[]]
    room = piece
    for i, size in enumerate(sizes):
        start = 0
        while size - start > room:
            cut = room // BLOCK * BLOCK if may_be_cut[i] else 0
            if cut:
                pieces[-1].append(Part(i, slice(start, start + cut)))
            elif not pieces[-1]:
                break  # it is larger than a piece
            start += cut
            pieces.append([])
            room = piece
        pieces[-1].append(Part(i, slice(start, size) if start else None))
        room = max(room - (size - start), 0)
    return pieces


def _may_be_cut(group: ParameterGroup, index: int, lists: Sequence[Sequence[Tensor]]) -> bool:
    """Whether θ, θ*, Ω and the tensors in ``lists`` have one dense layout, in which Ω always is."""
    layout = group.omega[index].stride()
    others = (local(group.params[index]), group.anchors[index], *(one[index] for one in lists))
    return all(tensor.stride() == layout for tensor in others)


# ================================================================================================
# Calls in pieces
# ================================================================================================
@torch.compiler.disable  # a compiler would unroll the pieces
def sum_over_pieces(
    group: ParameterGroup, call: Call, *lists: list[Tensor], whole: bool = False
) -> Tensor:
    """The sum of the values that ``call`` returns for each piece; see :func:`pieces_of`."""
    return total([call(piece, parts) for piece, parts in pieces_of(group, *lists, whole=whole)])


def total(values: list[Tensor]) -> Tensor:
    """The sum of 0-dim values of one device, formed in float64."""
    if len(values) == 1:
        return values[0]
    widest = max((value.dtype for value in values), key=lambda dtype: dtype.itemsize)
    return torch.stack([value.double() for value in values]).sum().to(widest)


@torch.compiler.disable
def check(group: ParameterGroup, operator: str, **lists: list[Tensor]) -> None:
    """Raises what an operator would, for all parameters before the first piece is written.

    Args:
        group: its state suits its parameters.
        operator: a name of ``OPERATORS``.
        lists: of its arguments, θ and what else is not of the state.
    """
    arguments = [a for a in OPERATORS[operator].arguments if a.name in lists]
    operands = [Operands(argument, lists[argument.name]) for argument in arguments]
    with group.naming_parameters():
        check_lists(operator, operands)
        if all(map(are_plain, lists.values())):  # else they have no memory that could be compared
            check_no_overlap(operator, operands)


# ================================================================================================
# Copies on the device
# ================================================================================================
def pieces_of(
    group: ParameterGroup, *lists: Sequence[Tensor], whole: bool = False
) -> Iterator[tuple[ParameterGroup, list[list[Tensor]]]]:
    """The group in pieces, with Ω and θ* beside the parameters until the next one is asked for.

    Args:
        group: its state is elsewhere.
        lists: plain tensors in the shapes of the parameters' local parts, such as gradients.
        whole: whether no parameter may be cut.

    Yields:
        A group, of parameters themselves or of flat views of their memory, and the same parts of
        the tensors in each of ``lists``.
    """
    sizes = [omega.numel() for omega in group.omega]
    may_be_cut = [not whole and _may_be_cut(group, i, lists) for i in range(len(sizes))]
    pieces = plan(sizes, may_be_cut, PIECE)
    for piece, state in zip(pieces, _brought(group, pieces), strict=True):
        anchors, omega, scales = state
        part = group._replace(
            names=[group.names[one.place] for one in piece],
            params=[one.of(group.params[one.place]) for one in piece],
            anchors=anchors,
            omega=omega,
            scales=scales,
        )
        yield part, [[one.of(tensors[one.place]) for one in piece] for tensors in lists]


def _brought(group: ParameterGroup, pieces: list[list[Part]]) -> Iterator[list[list[Tensor]]]:
    """θ*, Ω and scales of each piece on the device; the next is being copied meanwhile."""
    device = group.placement.device
    sources = [_sources(group, piece) for piece in pieces]
    size = max(sum(map(_room, chain(*lists))) for lists in sources)
    buffers = [
        torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(2, len(pieces)))
    ]
    copies = _copies_on(device)
    try:
        copied = copies.begin(buffers[0], sources[0])
        for i in range(len(pieces)):
            ready = copied
            if i + 1 < len(pieces):  # into the buffer of the piece before, whose kernels are queued
                copied = copies.begin(buffers[(i + 1) % 2], sources[i + 1])
            yield copies.end(ready)
    finally:
        copies.finish()  # also if a kernel was refused: nothing is copied to what is released


def _sources(group: ParameterGroup, piece: list[Part]) -> list[list[Tensor]]:
    return [
        [part.of(group.anchors[part.place]) for part in piece],
        [part.of(group.omega[part.place]) for part in piece],
        [part.of_scales(group.scales[part.place]) for part in piece] if group.scales else [],
    ]


def _room(tensor: Tensor) -> int:
    """Bytes that it takes in a buffer, where each begins at a multiple of the alignment."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


def _copied(buffer: Tensor, lists: list[list[Tensor]]) -> list[list[Tensor]]:
    """Copies in a buffer, one after another, with the shapes and strides of the tensors."""
    start, copies = 0, Lists()
    for tensors in lists:
        copies.append([])
        for tensor in tensors:
            bytes_ = buffer[start : start + tensor.numel() * tensor.element_size()]
            flat = bytes_.view(tensor.dtype)
            flat.copy_(in_memory_order(tensor), non_blocking=True)
            copies[-1].append(flat.as_strided(tensor.shape, tensor.stride()))
            start += _room(tensor)
    return copies


class _Copies:
    """Plain copies."""

    def begin(self, buffer: Tensor, lists: list[list[Tensor]]) -> Any:
        """Starts to copy; what it returns is to be given to :meth:`end`."""
        return _copied(buffer, lists)

    def end(self, copied: Any) -> list[list[Tensor]]:
        """The copies, for kernels that are launched from now on."""
        found: Lists = copied
        return found

    def finish(self) -> None:
        """To be called when no more copies are needed."""


class _CudaCopies(_Copies):
    """Copies on a stream of their own, from pinned memory: beside the current stream's kernels."""

    def __init__(self, device: torch.device) -> None:
        self._current = torch.cuda.current_stream(device)
        self._stream = _copy_stream(device)

    def begin(self, buffer: Tensor, lists: list[list[Tensor]]) -> Any:
        # Behind the kernels that were launched before: they read what was in this memory.
        self._stream.wait_stream(self._current)
        with torch.cuda.stream(self._stream):
            copies = _copied(buffer, lists)
        return copies, self._stream.record_event()

    def end(self, copied: Any) -> list[list[Tensor]]:
        copies: Lists
        copies, is_copied = copied
        self._current.wait_event(is_copied)
        return copies

    def finish(self) -> None:
        # The buffers are the current stream's, and the allocator knows of no other.
        self._current.wait_stream(self._stream)


def _copies_on(device: torch.device) -> _Copies:
    is_cuda = device.type == "cuda" and torch.cuda.is_available()
    return _CudaCopies(device) if is_cuda else _Copies()


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
