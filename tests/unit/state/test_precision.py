"""How Ω is compressed: error, zeros, memory order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mas_ext import precision
from tests.support.tensors import LAYOUTS, compressed

SHAPES = [(), (0,), (1,), (255,), (256,), (257,), (4, 300), (3, 5, 7, 11)]


def importance(shape: tuple[int, ...], decades: float = 8.0, seed: int = 0) -> Tensor:
    """Ω over many orders of magnitude, a quarter of it zero."""
    generator = torch.Generator().manual_seed(seed)
    exponents = -decades * torch.rand(shape, generator=generator)
    return 10**exponents * (torch.rand(shape, generator=generator) > 0.25)


def blocks(tensor: Tensor) -> list[Tensor]:
    """256 neighbours in memory, and 256 more."""
    return list(tensor.as_strided((tensor.numel(),), (1,)).split(256)) if tensor.numel() else []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last", "unaligned"])
def test_the_root_is_off_by_half_a_step_at_most(shape: tuple[int, ...], layout: str) -> None:
    omega = LAYOUTS[layout][2](importance(shape))
    codes, scales = compressed(omega, LAYOUTS[layout][2])
    kept = precision.dequantize(codes, scales)
    assert (kept.dtype, kept.shape, kept.stride()) == (torch.float32, omega.shape, codes.stride())
    assert scales.shape == (precision.num_scales(omega.numel()),)
    for k, o, s in zip(blocks(kept), blocks(omega), scales, strict=True):
        assert s == o.max()
        error = (k.double().sqrt() - o.double().sqrt()).abs()
        assert bool((error <= s.double().sqrt() / 510 * (1 + 1e-5)).all())


def test_zero_and_the_largest_of_a_block_are_exact() -> None:
    omega = importance((1000,))
    kept = precision.dequantize(*compressed(omega))
    assert bool((kept[omega == 0] == 0).all())
    assert [float(k.max()) for k in blocks(kept)] == [float(o.max()) for o in blocks(omega)]
    assert bool((precision.dequantize(*compressed(torch.zeros(300))) == 0).all())


def test_blocks_run_through_memory() -> None:
    """A row of large Ω among small ones: where it lies along memory, only it has a large scale."""
    omega = torch.full((256, 4), 1e-6)
    omega[:, 2] = 1.0
    columns, scales = compressed(omega, LAYOUTS["transposed"][2])
    assert scales.tolist() == pytest.approx([1e-6, 1e-6, 1.0, 1e-6])
    assert bool((columns == 255).all())
    rows, scales = compressed(omega)
    assert scales.tolist() == [1.0] * 4
    assert bool((rows[:, 2] == 255).all())
    assert bool((rows[:, 0] == 0).all())


def test_bytes_per_parameter() -> None:
    codes, scales = compressed(importance((100_000,)))
    size = codes.numel() * codes.element_size() + scales.numel() * scales.element_size()
    assert 1.0 < size / 100_000 < 1.016


@pytest.mark.parametrize("name", ["float16", "int8", None, torch.bfloat16])
def test_an_unknown_state_dtype_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match=r"state_dtype: .* use one of 'float32'"):
        precision.check_state_dtype(name)


@pytest.mark.parametrize("name", precision.STATE_DTYPES)
def test_float64_parameters_keep_float64(name: str) -> None:
    assert precision.stored_dtype(torch.float64, name) == torch.float64
    assert precision.stored_dtype(torch.bfloat16, name) == precision.STATE_DTYPES[name]
