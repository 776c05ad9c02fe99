"""Named tensors laid out one after another in a few flat buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from mas_ext._checks import is_dense

ALIGNMENT = 64  # bytes: a cache line, and the widest vector a kernel loads


def _aligned(elements: int, dtype: torch.dtype) -> int:
    """The number of elements rounded up to a whole number of alignments."""
    per_line = ALIGNMENT // dtype.itemsize
    return -(-elements // per_line) * per_line


class FlatTensors(Mapping[str, Tensor]):
    """A mapping from name to tensor, whose tensors are views of one buffer a device and dtype.

    Neighbours in a model are neighbours in memory, each view starts on a 64-byte boundary, and the
    state of a whole model is a handful of allocations. A view has the strides of the tensor it was
    made for where those are dense, so that kernels walk both as flat memory.
    """

    @torch.inference_mode(False)  # what is made in inference mode could never be trained with
    def __init__(
        self,
        like: Mapping[str, Tensor],
        dtype: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype,
    ) -> None:
        """Zeros in the shapes and on the devices of ``like``, in ``dtype`` of its dtypes."""
        groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
        for name, tensor in like.items():
            groups.setdefault((tensor.device, dtype(tensor.dtype)), []).append(name)
        views: dict[str, Tensor] = {}
        for (device, to), names in groups.items():
            starts = [0]
            for name in names:
                starts.append(starts[-1] + _aligned(like[name].numel(), to))
            buffer = torch.zeros(starts[-1], dtype=to, device=device)
            for name, start in zip(names, starts, strict=False):
                views[name] = _view(buffer, start, like[name])
        self._views = {name: views[name] for name in like}

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __repr__(self) -> str:
        elements = sum(tensor.numel() for tensor in self._views.values())
        return f"{type(self).__name__}({len(self)} tensors, {elements:,} elements)"


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    if is_dense(like):
        return buffer.as_strided(like.shape, like.stride(), start)
    return buffer[start : start + like.numel()].view(like.shape)


def leading(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The part of a tensor that grew which was there when it had ``shape``."""
    return tensor[tuple(slice(0, size) for size in shape)]
