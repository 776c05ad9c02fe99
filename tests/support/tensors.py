"""Inputs of the operators: dtypes, shapes, memory layouts, and the tensors of one call.

To cover another dtype, shape or layout, add it to ``DTYPES``, ``SHAPES`` or ``LAYOUTS``: every
operator of :mod:`tests.support.operators` is then tested with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from mas_ext.precision import num_scales, quantize_

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# How Ω may be stored where it is only read. Beside float64 values it is always float64.
KEPT = {"bfloat16": torch.bfloat16, "uint8": torch.uint8}

# The CPU kernels keep 16 partial sums (32 of bfloat16), cut tensors into chunks of 16384 elements
# and expand 1024 values of Ω at a time, of which 256 codes share a scale. The CUDA kernels cut
# tensors into chunks of 8192. These sizes lie below, at and above each of those.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "empty_list": [],
    "zero_size": [(0,), (3, 0, 2)],
    "0_dim": [()],
    "one_element": [(1,)],
    "odd": [(3,), (7, 5), (13,)],
    "15_16_17": [(15,), (16,), (17,)],
    "31_32_33": [(31,), (32,), (33,)],
    "255_256_257": [(255,), (256,), (257,)],
    "1023_1024_1025": [(1023,), (1024,), (1025,)],
    "8191_8192_8193": [(8191,), (8192,), (8193,)],
    "16384": [(16384,)],
    "several_chunks": [(16383,), (128, 128), (16385,)],
    "matrix": [(31, 17)],
    "conv": [(8, 3, 5, 5), (4, 8, 1, 1)],
    "mixed": [(5,), (), (0, 4), (33, 7), (1,), (8, 3, 3, 3), (17,)],
}


# -- Memory layouts --------------------------------------------------------------------------------
Layout = Callable[[Tensor], Tensor]


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def transposed(tensor: Tensor) -> Tensor:
    """The same values, with the first dimension varying fastest in memory."""
    reverse = list(reversed(range(tensor.dim())))
    return contiguous(tensor.permute(reverse)).permute(reverse)


def channels_last(tensor: Tensor) -> Tensor:
    if tensor.dim() != 4:
        return contiguous(tensor)
    return tensor.clone(memory_format=torch.channels_last)


def sliced(tensor: Tensor) -> Tensor:
    """The same values in every second place of their memory, with NaN between them."""
    base = tensor.new_full((*tensor.shape, 2), math.nan)
    base[..., 0] = tensor
    return base[..., 0]


def behind(tensor: Tensor, elements: int) -> Tensor:
    """The same values, starting this many elements after an aligned address."""
    around = math.nan if tensor.is_floating_point() else 255
    base = tensor.new_full((tensor.numel() + 2 * elements,), around)
    return base[elements : elements + tensor.numel()].view(tensor.shape).copy_(tensor)


def unaligned(tensor: Tensor) -> Tensor:
    return behind(tensor, 1)


# The layouts of params, anchors, omega and grads. Moments take those of anchors and omega.
LAYOUTS: dict[str, tuple[Layout, Layout, Layout, Layout]] = {
    "contiguous": (contiguous,) * 4,
    "transposed": (transposed,) * 4,
    "channels_last": (channels_last,) * 4,
    "sliced": (sliced,) * 4,
    "unaligned": (unaligned,) * 4,
    "params_transposed": (transposed, contiguous, contiguous, contiguous),
    "each_differently": (channels_last, transposed, sliced, unaligned),
}
# Layouts that change nothing below this number of dimensions.
_NEEDS_DIMENSIONS = {"transposed": 2, "params_transposed": 2, "channels_last": 4}


def assert_gaps_untouched(tensor: Tensor) -> None:
    """The layouts that leave room around a tensor fill it with NaN; none of it may be written."""
    base = tensor._base
    if base is not None and base.numel() > tensor.numel() and tensor.is_floating_point():
        assert int(base.isnan().sum()) == base.numel() - tensor.numel()


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    """Unlike equality, this tells -0.0 from 0.0, and NaN equals itself."""

    def stored(tensor: Tensor) -> Tensor:
        return contiguous(tensor.detach()).view(-1).view(torch.uint8)

    assert left.dtype == right.dtype
    assert torch.equal(stored(left), stored(right))


# -- The tensors of one call -----------------------------------------------------------------------
def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class State:
    """A list for every argument, with one tensor per parameter; operators use some of them."""

    params: list[Tensor] = field(default_factory=list)
    anchors: list[Tensor] = field(default_factory=list)
    omega: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    omega_scales: list[Tensor] = field(default_factory=list)  # of the Ω that are uint8 codes
    momentum_buffers: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)  # one tensor of counts, as a list of one
    left: list[Tensor] = field(default_factory=list)  # the factors of accumulate_outer_
    right: list[Tensor] = field(default_factory=list)
    a: list[Tensor] = field(default_factory=list)  # those of low_rank_penalty, and their gradients
    b: list[Tensor] = field(default_factory=list)
    grad_a: list[Tensor] = field(default_factory=list)
    grad_b: list[Tensor] = field(default_factory=list)

    def lists(self) -> dict[str, list[Tensor]]:
        """The lists by name, in order; optional ones only where there is something in them."""
        always = ("params", "anchors", "omega", "grads")
        return {name: ts for name, ts in vars(self).items() if ts or name in always}

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        return State(**{name: [function(t) for t in ts] for name, ts in vars(self).items()})

    def copy(self, device: str | torch.device = "cpu") -> State:
        return self.map(lambda t: t.detach().to(device, copy=True))

    def double(self) -> State:
        """A float64 copy on the CPU, with Ω as its codes define it."""
        copy = self.map(lambda t: t.detach().to("cpu", torch.float64, copy=True))
        for i, (kept, scales) in enumerate(zip(self.omega, self.omega_scales, strict=False)):
            if kept.dtype == torch.uint8:
                copy.omega[i] = _expand(kept.cpu(), scales.cpu())
        return copy


STATE_LISTS = [f.name for f in fields(State)]


def _expand(codes: Tensor, scales: Tensor) -> Tensor:
    """Ω = s·(q/255)², where 256 neighbours in the codes' memory share s."""
    flat = codes.as_strided((codes.numel(),), (1,)).double()
    scale = scales.double().repeat_interleave(256)[: codes.numel()]
    omega = torch.empty_like(codes, dtype=torch.float64)
    omega.as_strided((codes.numel(),), (1,)).copy_(scale * (flat / 255) ** 2)
    return omega


def compressed(omega: Tensor, layout: Layout = contiguous) -> tuple[Tensor, Tensor]:
    """The codes of an Ω, dense in the order of ``layout``, and their scales."""
    codes = (contiguous if layout is sliced else layout)(torch.zeros_like(omega, dtype=torch.uint8))
    scales = omega.new_empty(num_scales(omega.numel()), dtype=torch.float32)
    quantize_(codes, scales, omega)
    return codes, scales


def make_state(
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[tuple[int, ...]],
    layouts: str | tuple[Layout, Layout, Layout, Layout] = "contiguous",
    seed: int = 0,
    device: str | torch.device = "cpu",
    kept: str | None = None,
    moments: Sequence[str] = (),
) -> State:
    """Normal values; a quarter of Ω is zero, as in a network with dead units.

    The values are the same on every device. Ω has the accumulation dtype or, where ``kept`` names
    one of ``KEPT`` and the values aren't float64, that. ``moments`` names the optimizer's lists,
    of which second moments are positive, and ``"steps"``, which differ between parameters.
    """
    lay = LAYOUTS[layouts] if isinstance(layouts, str) else layouts
    generator = torch.Generator().manual_seed(seed)
    state = State()
    for dtype, shape in zip(dtypes, shapes, strict=True):
        params, anchors, omega, grads = torch.randn(4, *shape, generator=generator).unbind()
        omega = omega.abs() * (torch.rand(shape, generator=generator) > 0.25)
        keeps = kept is not None and dtype != torch.float64
        state.params.append(lay[0](params.to(dtype).to(device)))
        state.anchors.append(lay[1](anchors.to(dtype).to(device)))
        state.grads.append(lay[3](grads.to(dtype).to(device)))
        if keeps and kept == "uint8":
            codes, scales = compressed(omega.to(device), lay[2])
        else:
            codes = lay[2](omega.to(KEPT[kept] if keeps else accumulation_dtype(dtype)).to(device))
            scales = torch.empty(0, device=device)
        state.omega.append(codes)
        state.omega_scales += [scales] if kept == "uint8" else []
        for k, name in enumerate(m for m in moments if m != "steps"):
            value = torch.randn(shape, generator=generator)
            value = value.square() + 0.1 if name == "exp_avg_sqs" else value
            getattr(state, name).append(lay[k + 1](value.to(dtype).to(device)))
    if "steps" in moments:
        state.steps = [torch.arange(len(shapes), dtype=torch.float32).to(device)]
    return state


# -- Samples ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sample:
    """Names of a dtype, a list of shapes, a layout and a way to store Ω."""

    dtype: str
    shapes: str
    layout: str = "contiguous"
    kept: str | None = None

    def __str__(self) -> str:
        name = f"{self.dtype}-{self.shapes}-{self.layout}"
        return f"{name}-{self.kept}_omega" if self.kept else name

    def make(self, moments: Sequence[str] = (), device: str | torch.device = "cpu") -> State:
        shapes = SHAPES[self.shapes]
        dtypes = [DTYPES[self.dtype]] * len(shapes)
        return make_state(dtypes, shapes, self.layout, len(shapes), device, self.kept, moments)


def _is_worthwhile(shapes: str, layout: str) -> bool:
    dimensions = max((len(shape) for shape in SHAPES[shapes]), default=-1)
    return layout == "contiguous" or dimensions >= _NEEDS_DIMENSIONS.get(layout, 0)


def _samples(all_shapes: Sequence[str], kinds: Sequence[tuple[str, str | None]]) -> list[Sample]:
    """Every list of shapes in every layout, and every layout with every dtype and kind of Ω.

    Kinds (a dtype and a way to store Ω) take turns along the shapes that a layout is used with.
    """
    samples = []
    for j, layout in enumerate(LAYOUTS):
        shapes = [name for name in all_shapes if _is_worthwhile(name, layout)]
        turns = max(len(shapes), len(kinds))
        if layout == "contiguous":  # every list of shapes with every kind
            samples += [Sample(d, name, layout, kept) for name in shapes for d, kept in kinds]
            continue
        for i in range(turns):
            dtype, kept = kinds[(i + j) % len(kinds)]
            samples.append(Sample(dtype, shapes[i % len(shapes)], layout, kept))
    return samples


_KEPT_SHAPES = ["empty_list", "zero_size", "255_256_257", "1023_1024_1025", "16384", "conv"]
_KEPT_SHAPES += ["several_chunks", "mixed"]
_KEPT_KINDS = [(dtype, kept) for kept in KEPT for dtype in ("float32", "bfloat16", "float16")]

SAMPLES = _samples(list(SHAPES), [(dtype, None) for dtype in DTYPES])
KEPT_SAMPLES = _samples(_KEPT_SHAPES, _KEPT_KINDS)
