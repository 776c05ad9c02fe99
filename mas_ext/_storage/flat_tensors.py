"""Named tensors in a few flat buffers."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from mas_ext._operators.checks import is_dense

ALIGNMENT = 64  # bytes: a cache line, and the widest vector a kernel loads
HUGE_PAGE = 2**21  # bytes, on x86-64 and most ARM systems


def _aligned(elements: int, dtype: torch.dtype) -> int:
    """The number of elements rounded up to a whole number of alignments."""
    per_line = ALIGNMENT // dtype.itemsize
    return -(-elements // per_line) * per_line


class FlatTensors(Mapping[str, Tensor]):
    """A mapping from name to tensor; the tensors are views of one buffer per device and dtype.

    The state of a whole model is a handful of allocations, in the model's order, and each view
    starts on a 64-byte boundary. A view has the strides of the tensor that it was made for if those
    are dense, so that kernels walk both as flat memory.
    """

    @torch.inference_mode(False)  # autograd cannot use what is made in inference mode
    def __init__(
        self,
        like: Mapping[str, Tensor],
        dtype: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype,
        in_host_memory: bool = False,
    ) -> None:
        """Zeros in the shapes of ``like``, in ``dtype`` of its dtypes.

        Args:
            like: by name.
            dtype: from that of ``like``.
            in_host_memory: whether they are on the CPU, pinned where ``like`` is on a CUDA device
                or pinned itself. Otherwise they are on the devices of ``like``.
        """
        groups: dict[tuple[torch.device, bool, torch.dtype], list[str]] = {}
        for name, tensor in like.items():
            device = torch.device("cpu") if in_host_memory else tensor.device
            pinned = in_host_memory and (is_to_be_pinned(tensor) or is_pinned(tensor))
            groups.setdefault((device, pinned, dtype(tensor.dtype)), []).append(name)
        views: dict[str, Tensor] = {}
        for (device, pinned, to), names in groups.items():
            starts = [0]
            for name in names:
                starts.append(starts[-1] + _aligned(like[name].numel(), to))
            buffer = _zeros(starts[-1], to, device, pinned)
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


def is_to_be_pinned(tensor: Tensor) -> bool:
    """Whether what is copied to this tensor's device should be in pinned memory.

    Only from there does a copy run beside kernels.
    """
    return tensor.is_cuda and torch.cuda.is_available()


def is_pinned(tensor: Tensor) -> bool:
    return torch.cuda.is_available() and tensor.is_pinned()


def _zeros(elements: int, dtype: torch.dtype, device: torch.device, pinned: bool) -> Tensor:
    buffer = torch.empty(elements, dtype=dtype, device=device, pin_memory=pinned)
    if device.type == "cpu" and not pinned:
        _ask_for_huge_pages(buffer)  # before they are first written
    return buffer.zero_()


def _ask_for_huge_pages(buffer: Tensor) -> None:
    """Asks Linux for huge pages: Ω and θ* are read in full in every step, with fewer TLB misses."""
    advice, size = getattr(mmap, "MADV_HUGEPAGE", None), buffer.numel() * buffer.element_size()
    if advice is None or size < 2 * HUGE_PAGE or type(buffer) is not Tensor:  # a fake tensor
        return
    begin = -(-buffer.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    length = (buffer.data_ptr() + size - begin) // HUGE_PAGE * HUGE_PAGE
    madvise = ctypes.CDLL(None).madvise  # advice: nothing depends on whether it is taken
    madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), ctypes.c_int(advice))


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    if is_dense(like):
        return buffer.as_strided(like.shape, like.stride(), start)
    return buffer[start : start + like.numel()].view(like.shape)


def leading(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The leading part of a tensor: the one that was there when it had ``shape``."""
    return tensor[tuple(slice(0, size) for size in shape)]


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies, by name."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def check_growth(name: str, old: Tensor, new: Tensor) -> None:
    """Raises ValueError unless a parameter has kept its rank, and its sizes or more."""
    grown = old.dim() == new.dim() and all(
        a <= b for a, b in zip(old.shape, new.shape, strict=True)
    )
    if not grown:
        raise ValueError(
            f"parameter {name!r} had shape {list(old.shape)} and now has {list(new.shape)}: it may "
            "grow between tasks, not shrink or change its rank; start a new MAS, or leave it out "
            "with params="
        )
