r"""The precision of Ω: what it is accumulated in, and what it is stored in between tasks.

================  ==================  ==========================================================
``state_dtype``   bytes / parameter   the stored Ω, compared with the Ω that was measured
================  ==================  ==========================================================
``"float32"``     4                   the same (float64 for float64 parameters)
``"bfloat16"``    2                   rounded to 8 bits of precision: within 0.4 %
``"uint8"``       1 + 4/256           √Ω within √s/510, where s is its block's largest Ω
================  ==================  ==========================================================

With ``"uint8"``, Ω is stored as codes. Each block of 256 elements, in the order they have in
memory, shares a float32 scale. The code is linear in √Ω, since Ω spans many orders of magnitude
within a layer: small Ω get finer steps than large ones. Zero stays zero, a block's largest Ω stays
exact, and quantizing a dequantized Ω again gives the same bits. Float64 parameters keep a float64 Ω
for every ``state_dtype``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}

BLOCK = 256  # codes that share a scale
_LARGEST_CODE = 255


def check_state_dtype(name: object) -> str:
    """Returns the name if it is one of ``STATE_DTYPES``; raises ValueError otherwise."""
    if name not in STATE_DTYPES:
        names = ", ".join(map(repr, STATE_DTYPES))
        raise ValueError(f"state_dtype: {name!r} is not available; use one of {names}")
    return str(name)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are formed: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stored_dtype(param: torch.dtype, state_dtype: str) -> torch.dtype:
    """The dtype in which the Ω of a parameter is stored between tasks."""
    accumulated = accumulation_dtype(param)
    return accumulated if accumulated == torch.float64 else STATE_DTYPES[state_dtype]


def num_scales(numel: int) -> int:
    """The number of blocks, and so of scales, of ``numel`` codes."""
    return -(-numel // BLOCK)


def in_memory_order(tensor: Tensor) -> Tensor:
    """A flat view of a dense tensor in the order of its memory, which is the order of blocks."""
    return tensor.as_strided((tensor.numel(),), (1,))


@torch.no_grad()
def quantize_(codes: Tensor, scales: Tensor, omega: Tensor) -> None:
    r"""Writes the codes and scales of an Ω: those whose :func:`dequantize` is nearest to it.

    .. math:: s_b = \max_{i \in b} \Omega_i
        \qquad q_i = \operatorname{round}\bigl(255 \sqrt{\Omega_i / s_b}\bigr)

    Args:
        codes: q, uint8, dense; written.
        scales: s, float32 [:func:`num_scales`]; written.
        omega: Ω ≥ 0, float32, in the shape of ``codes``.
    """
    ordered = torch.empty_like(codes, dtype=torch.float32).copy_(omega)
    flat, flat_codes = in_memory_order(ordered), in_memory_order(codes)
    whole = flat.numel() // BLOCK * BLOCK
    for part in (slice(0, whole), slice(whole, None)):  # the whole blocks, then the rest
        if flat[part].numel() == 0:
            continue
        rows = flat[part].view(-1, min(BLOCK, flat[part].numel()))
        largest = scales[part.start // BLOCK :][: len(rows)]
        torch.amax(rows, 1, out=largest)
        divisor = torch.where(largest > 0, largest, 1).unsqueeze(1)
        flat_codes[part].copy_(rows.div_(divisor).sqrt_().mul_(_LARGEST_CODE).round_().view(-1))


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    r"""Ω from its codes: :math:`\Omega_i = s_b\,(q_i/255)^2`, where b is the block of element i.

    Args:
        codes: q, uint8, dense, with any strides.
        scales: s, float32 [:func:`num_scales`]: the largest Ω of each block.

    Returns:
        Ω, float32, with the shape and strides of ``codes``.
    """
    omega = torch.empty_like(codes, dtype=torch.float32)
    flat, squares = in_memory_order(omega), in_memory_order(codes).to(torch.float32)
    torch.mul(squares, squares, out=flat).mul_(1 / _LARGEST_CODE**2)
    flat.mul_(scales.repeat_interleave(BLOCK)[: flat.numel()])
    return omega


def to_accumulation_dtype(
    omega: Sequence[Tensor], omega_scales: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Stored Ω as it is computed with, in float32 or float64, one tensor at a time."""
    for i, stored in enumerate(omega):
        if stored.dtype == torch.uint8:
            yield dequantize(stored, omega_scales[i])
        else:
            yield stored.to(accumulation_dtype(stored.dtype))
