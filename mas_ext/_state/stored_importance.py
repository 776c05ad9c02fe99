"""Ω between tasks, stored in the precision that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from mas_ext._storage.flat_tensors import FlatTensors
from mas_ext.precision import (
    BLOCK,
    accumulation_dtype,
    dequantize,
    in_memory_order,
    num_scales,
    quantize_,
    round_to_bfloat16,
    stored_dtype,
)

Thresholds = Callable[[], Tensor]  # called only if something is rounded


class StoredImportance(Mapping[str, Tensor]):
    """Ω by parameter name, stored in ``state_dtype``; zeros at first.

    As a mapping it gives Ω: views in float32, float64 or bfloat16. Codes are dequantized to float32
    at each access.

    Args:
        like: the parameters, or tensors with their shapes, strides, dtypes and devices.
        state_dtype: a name of ``STATE_DTYPES``.
        state_device: None: the devices of ``like``; ``"cpu"``: host memory.
    """

    def __init__(
        self, like: Mapping[str, Tensor], state_dtype: str, state_device: str | None = None
    ) -> None:
        self.state_dtype = state_dtype
        in_host_memory = state_device == "cpu"
        stored = FlatTensors(like, partial(stored_dtype, state_dtype=state_dtype), in_host_memory)
        scales = FlatTensors(
            {
                name: in_memory_order(codes)[: num_scales(codes.numel())]
                for name, codes in stored.items()
                if codes.dtype == torch.uint8
            },
            lambda _: torch.float32,
            in_host_memory,
        )
        # A dictionary, since every step looks up every parameter.
        self._stored = {name: (stored[name], scales.get(name)) for name in like}

    def __getitem__(self, name: str) -> Tensor:
        stored, scales = self._stored[name]
        return stored if scales is None else dequantize(stored, scales)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} parameters, {self.state_dtype})"

    def stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The stored tensor, and its scales if it consists of codes."""
        return self._stored[name]

    @torch.no_grad()
    def put(
        self,
        name: str,
        omega: Tensor,
        scales: Tensor | None = None,
        thresholds: Thresholds | None = None,
    ) -> None:
        """Stores an Ω. One that is already in the stored form is copied bit for bit.

        Args:
            name: the parameter's name.
            omega: Ω in its shape, in float32, float64 or bfloat16, or as codes with ``scales``.
            scales: the scales of the codes.
            thresholds: for stochastic rounding; None: round to the nearest.
        """
        stored, stored_scales = self.stored(name)
        if scales is not None and (stored_scales is None or omega.stride() != stored.stride()):
            omega, scales = dequantize(omega, scales), None
        if scales is None:
            _round_(stored, stored_scales, omega, thresholds)
        else:
            assert stored_scales is not None
            stored.copy_(omega)
            stored_scales.copy_(scales)

    def read(self, name: str, part: slice) -> Tensor:
        """A part of Ω in memory order, in the accumulation dtype.

        Args:
            name: the parameter's name.
            part: the elements; begins at a multiple of 256.
        """
        flat, scales = self._stored_part(name, part)
        if scales is not None:
            return dequantize(flat, scales)
        return flat.to(accumulation_dtype(flat.dtype))

    @torch.no_grad()
    def write(
        self, name: str, part: slice, omega: Tensor, thresholds: Thresholds | None = None
    ) -> None:
        """Stores a part of Ω, in the form that :meth:`read` gives."""
        _round_(*self._stored_part(name, part), omega, thresholds)

    def _stored_part(self, name: str, part: slice) -> tuple[Tensor, Tensor | None]:
        stored, scales = self.stored(name)
        flat = in_memory_order(stored)[part]
        if scales is not None:
            first = part.start // BLOCK
            scales = scales[first : first + num_scales(len(flat))]
        return flat, scales


def _round_(
    stored: Tensor, scales: Tensor | None, omega: Tensor, thresholds: Thresholds | None
) -> None:
    """Writes an Ω in the form that is stored."""
    if scales is not None:
        quantize_(stored, scales, omega, thresholds and thresholds())
    elif stored.dtype == torch.bfloat16 and omega.dtype == torch.float32 and thresholds:
        stored.copy_(round_to_bfloat16(omega, thresholds()))
    else:
        stored.copy_(omega)
