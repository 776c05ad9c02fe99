r"""What Ω is kept in between tasks: float32, or less memory with a bounded error.

================  ==================  ==========================================================
``state_dtype``   bytes a parameter   Ω that is kept of an Ω that was measured
================  ==================  ==========================================================
``"float32"``     4                   the same (float64 for float64 parameters)
``"bfloat16"``    2                   rounded to 8 bits of precision: within 0.4 %
``"uint8"``       1 + 4/256           √Ω within √s/510, where s is its block's largest Ω
================  ==================  ==========================================================

Blocks of 256 elements, as they lie in memory, share a float32 scale. Codes are companded by the
square root, since Ω spans many orders of magnitude within a layer: small Ω get finer steps than
large ones. Zero stays zero, a block's largest Ω stays what it is, and what is compressed again is
the same to the bit. Float64 parameters keep a float64 Ω whatever is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from mas_ext._state.flat_tensors import FlatTensors
from mas_ext.reference import BLOCK, accumulation_dtype, expanded, in_memory_order, num_scales

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}


def check_state_dtype(name: object) -> str:
    """One of the names of ``STATE_DTYPES``."""
    if name not in STATE_DTYPES:
        names = ", ".join(map(repr, STATE_DTYPES))
        raise ValueError(f"state_dtype: {name!r} is not available; use one of {names}")
    return str(name)


def kept_dtype(param: torch.dtype, state_dtype: str) -> torch.dtype:
    """The dtype of a parameter's Ω between tasks."""
    wide = accumulation_dtype(param)
    return wide if wide == torch.float64 else STATE_DTYPES[state_dtype]


@torch.no_grad()
def compress_(codes: Tensor, scales: Tensor, omega: Tensor) -> None:
    r"""Codes and scales of an Ω: those of :func:`expanded` that come nearest.

    .. math:: s_b = \max_{i \in b} \Omega_i
        \qquad q_i = \operatorname{round}\bigl(255 \sqrt{\Omega_i / s_b}\bigr)

    Args:
        codes: uint8, dense; written.
        scales: float32 [:func:`num_scales`]; written.
        omega: Ω ≥ 0, float32, in the shape of ``codes``.
    """
    ordered = torch.empty_like(codes, dtype=torch.float32).copy_(omega)
    flat, places = in_memory_order(ordered), in_memory_order(codes)
    whole = flat.numel() // BLOCK * BLOCK
    for part in (slice(0, whole), slice(whole, None)):  # whole blocks, and what is left over
        if flat[part].numel() == 0:
            continue
        rows = flat[part].view(-1, min(BLOCK, flat[part].numel()))
        largest = scales[part.start // BLOCK :][: len(rows)]
        torch.amax(rows, 1, out=largest)
        divisor = torch.where(largest > 0, largest, 1).unsqueeze(1)
        places[part].copy_(rows.div_(divisor).sqrt_().mul_(255).round_().view(-1))


class KeptImportance(Mapping[str, Tensor]):
    """Ω by parameter name, kept in ``state_dtype``.

    As a mapping it shows Ω: views in float32, float64 or bfloat16; what is kept in codes is
    expanded to float32 anew each time.

    Args:
        like: tensors in whose shapes, strides and devices, and for whose dtypes, Ω is kept; zeros.
        state_dtype: a name of ``STATE_DTYPES``.
    """

    def __init__(self, like: Mapping[str, Tensor], state_dtype: str) -> None:
        self.state_dtype = state_dtype
        kept = FlatTensors(like, partial(kept_dtype, state_dtype=state_dtype))
        scales = FlatTensors(
            {
                name: torch.empty(num_scales(codes.numel()), device=codes.device)
                for name, codes in kept.items()
                if codes.dtype == torch.uint8
            }
        )
        # Looked up for every parameter in every step: a dictionary is what is quick.
        self._kept = {name: (kept[name], scales.get(name)) for name in like}

    def __getitem__(self, name: str) -> Tensor:
        kept, scales = self._kept[name]
        return kept if scales is None else expanded(kept, scales)

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} parameters, {self.state_dtype})"

    def kept(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Ω as it is kept: the tensor, and its scales where it is codes."""
        return self._kept[name]

    @torch.no_grad()
    def put(self, name: str, omega: Tensor, scales: Tensor | None = None) -> None:
        """Takes over an Ω; one that is kept alike, to the bit.

        Args:
            name: of the parameter.
            omega: Ω of its shape, in float32, float64 or bfloat16; or codes, with ``scales``.
            scales: of the codes.
        """
        kept, places = self.kept(name)
        if scales is not None and (places is None or omega.stride() != kept.stride()):
            omega, scales = expanded(omega, scales), None
        if places is None:
            kept.copy_(omega)
        elif scales is None:
            compress_(kept, places, omega)
        else:
            kept.copy_(omega)
            places.copy_(scales)

    def read(self, name: str, part: slice) -> Tensor:
        """A part of Ω as its elements lie in memory, in the dtype that sums are formed in.

        Args:
            name: of the parameter.
            part: begins at a multiple of 256.
        """
        flat, scales = self._kept_part(name, part)
        if scales is not None:
            return expanded(flat, scales)
        return flat.to(accumulation_dtype(flat.dtype))

    @torch.no_grad()
    def write(self, name: str, part: slice, omega: Tensor) -> None:
        """Takes over what :meth:`read` gave, after a change."""
        flat, scales = self._kept_part(name, part)
        if scales is None:
            flat.copy_(omega)
        else:
            compress_(flat, scales, omega)

    def _kept_part(self, name: str, part: slice) -> tuple[Tensor, Tensor | None]:
        kept, scales = self.kept(name)
        flat = in_memory_order(kept)[part]
        if scales is not None:
            first = part.start // BLOCK
            scales = scales[first : first + num_scales(len(flat))]
        return flat, scales
