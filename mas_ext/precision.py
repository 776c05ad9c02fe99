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

Rounding to nearest would lose every merge that changes Ω by less than half a step. So only the Ω
of the first task is rounded to nearest (with ``merge="max"``, every Ω is). From the second task on,
the merged Ω is rounded up or down at random, so that its expectation is exact
(:func:`rounding_thresholds`). The errors then average out over elements and tasks instead of adding
up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}

BLOCK = 256  # codes that share a scale
_LARGEST_CODE = 255
_WORD = 2**32 - 1
_GOLDEN_RATIO = 0x9E3779B9  # its fractional part, of 2^32


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
def rounding_thresholds(omega: Tensor, counter: int) -> Tensor:
    r"""Thresholds for stochastic rounding: a value is rounded up with probability 1 − threshold.

    .. math:: u_i = \operatorname{frac}\bigl(\operatorname{hash}(\Omega_i) + n\varphi\bigr)

    Counter-based: they depend on n and on the element's own Ω, and on nothing else, so they are the
    same in every process, however a tensor is sharded. Over n they are spread evenly (Weyl's
    sequence, with the golden ratio φ), so that the same Ω, merged again and again, stays correct to
    about one step; with independent random numbers, the errors would add up to many steps.

    Args:
        omega: Ω of the task that is merged, float32.
        counter: n, how many tasks were merged before.

    Returns:
        u, float32 in [0, 1), in the shape of ``omega``.
    """
    bits = omega.contiguous().view(torch.int32).to(torch.int64) & _WORD
    for _ in range(2):
        bits = ((bits ^ (bits >> 16)) * 0x45D9F3B) & _WORD
    bits = ((bits ^ (bits >> 16)) + (counter * _GOLDEN_RATIO & _WORD)) & _WORD
    return (bits >> 8).to(torch.float32) * 2.0**-24


@torch.no_grad()
def round_to_bfloat16(omega: Tensor, thresholds: Tensor) -> Tensor:
    """Ω ≥ 0 in bfloat16, rounded to either neighbour so that the expectation is Ω.

    Args:
        omega: Ω, float32.
        thresholds: u in the shape of ``omega``; see :func:`rounding_thresholds`.
    """
    dropped = 2**16  # bfloat16 is the upper half of a float32
    bits = omega.contiguous().view(torch.int32) + (thresholds * dropped).to(torch.int32)
    return (bits & -dropped).view(torch.float32).to(torch.bfloat16)


@torch.no_grad()
def quantize_(
    codes: Tensor, scales: Tensor, omega: Tensor, thresholds: Tensor | None = None
) -> None:
    r"""Writes the codes and scales of an Ω: those whose :func:`dequantize` is nearest to it.

    .. math:: s_b = \max_{i \in b} \Omega_i
        \qquad q_i = \operatorname{round}\bigl(255 \sqrt{\Omega_i / s_b}\bigr)

    Args:
        codes: q, uint8, dense; written.
        scales: s, float32 [:func:`num_scales`]; written.
        omega: Ω ≥ 0, float32, in the shape of ``codes``.
        thresholds: u in the shape of ``codes``. If given, a code is rounded to either neighbour so
            that the expectation of the dequantized value is Ω.
    """
    flat, flat_codes = _ordered(omega, codes), in_memory_order(codes)
    flat_thresholds = None if thresholds is None else _ordered(thresholds, codes)
    whole = flat.numel() // BLOCK * BLOCK
    for part in (slice(0, whole), slice(whole, None)):  # the whole blocks, then the rest
        if flat[part].numel() == 0:
            continue
        rows = flat[part].view(-1, min(BLOCK, flat[part].numel()))
        largest = scales[part.start // BLOCK :][: len(rows)]
        torch.amax(rows, 1, out=largest)
        divisor = torch.where(largest > 0, largest, 1).unsqueeze(1)
        rows.div_(divisor)
        if flat_thresholds is None:
            rows = rows.sqrt_().mul_(_LARGEST_CODE).round_()
        else:
            rows = _rounded(rows, flat_thresholds[part].view_as(rows))
        flat_codes[part].copy_(rows.view(-1))


def _ordered(values: Tensor, like: Tensor) -> Tensor:
    """A flat float32 copy in the memory order of ``like``."""
    return in_memory_order(torch.empty_like(like, dtype=torch.float32).copy_(values))


def _rounded(shares: Tensor, thresholds: Tensor) -> Tensor:
    """Codes of Ω/s; between q and q + 1, which stand for q² and (q + 1)², by the thresholds."""
    below = shares.sqrt().mul_(_LARGEST_CODE).floor_().clamp_(max=_LARGEST_CODE - 1)
    part = (shares * _LARGEST_CODE**2 - below * below) / (2 * below + 1)
    return below + (thresholds < part)


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
