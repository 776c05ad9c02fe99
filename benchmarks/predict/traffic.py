"""What every way of doing a job reads and writes, kernel by kernel.

A kernel is written ``"gpaO>g"``: what it reads, an arrow, what it writes, a letter each. g, p, a
and O are gradients, parameters, anchors and Ω; every other letter is a temporary. Capitals are of
Ω's dtype (float32 beside bfloat16), small letters of the parameters'. The kernels of a phase are
passed over one tensor after another, or over the whole list; a phase is done for all tensors before
the next one begins, so that what it leaves is out of the cache when the next one reads it.

Nothing here is to be believed without ``tests/test_predictions.py``, which counts our operators by
their masks in ``csrc/cuda/operations.cuh`` and by their schemas, eager and foreach by the ATen
operators that the benchmarks' own functions call, and torch.compile by the Triton code that
inductor generates for sm_90 (``inductor.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

ITEMSIZE = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
LISTS = "gpaO"  # what a call is given; it outlives the call


def omega_itemsize(dtype: str) -> int:
    return 8 if dtype == "float64" else 4


def is_mixed(dtype: str) -> bool:
    """Whether Ω is of a dtype of its own."""
    return ITEMSIZE[dtype] != omega_itemsize(dtype)


@dataclass(frozen=True)
class Kernel:
    """One pass over the elements of its streams."""

    reads: str
    writes: str

    def bytes(self, dtype: str) -> int:
        return sum(width(stream, dtype) for stream in self.reads + self.writes)

    def bytes_read(self, dtype: str) -> int:
        return sum(width(stream, dtype) for stream in self.reads)


def width(stream: str, dtype: str) -> int:
    """Bytes an element."""
    return omega_itemsize(dtype) if stream.isupper() else ITEMSIZE[dtype]


Phase = tuple[Kernel, ...]


def phases(*notes: str) -> tuple[Phase, ...]:
    """One string a phase, its kernels separated by blanks."""
    return tuple(tuple(Kernel(*kernel.split(">")) for kernel in note.split()) for note in notes)


# How a way is launched: who walks the tensors, and what the host has to do for it.
FUSED, FUSED_AUTOGRAD = "fused", "fused, autograd"
EAGER, AUTOGRAD = "eager", "autograd"
FOREACH, COMPILED = "foreach", "compiled"


@dataclass(frozen=True)
class Way:
    """``small``: kernels a tensor on single numbers, such as adding up the tensors' sums."""

    style: str
    phases: tuple[Phase, ...]
    mixed: tuple[Phase, ...] | None = None  # where Ω's dtype is another, if that differs
    small: int = 0
    sums: bool = True
    is_flat: bool = False  # it is given the list as one tensor

    def of(self, dtype: str) -> tuple[Phase, ...]:
        return self.mixed if self.mixed is not None and is_mixed(dtype) else self.phases

    def bytes(self, dtype: str) -> int:
        """Read and written an element, whatever cache that comes from."""
        return sum(kernel.bytes(dtype) for phase in self.of(dtype) for kernel in phase)


def _fused(note: str, sums: bool = True) -> Way:
    return Way(FUSED, phases(note), sums=sums)


def _compiled(note: str) -> dict[str, Way]:
    """One kernel, where inductor can cut the sum evenly; ``model.py`` knows when it cannot."""
    return {
        "torch.compile, flat": Way(COMPILED, phases(note), is_flat=True),
        "torch.compile, list": Way(COMPILED, phases(note)),
    }


# δ = p−a is d; δ² is s or e; Ω·δ² is W.
_FORWARD = "pa>d d>s sO>W W>"
_BACKWARD, _BACKWARD_MIXED = "O>G d>e e>f Gf>k", "O>G G>h d>e e>f hf>k"
_ADD = " gk>g"

JOBS: dict[str, dict[str, Way]] = {
    "accumulate_importance_": {
        "mas_ext": _fused("Og>O", sums=False),
        "torch.compile, flat": Way(COMPILED, phases("Og>O"), sums=False, is_flat=True),
        "torch.compile, list": Way(COMPILED, phases("Og>O"), sums=False),
        "eager, in place": Way(EAGER, phases("g>m Om>O"), sums=False),
        "torch._foreach": Way(FOREACH, phases("g>m", "Om>O"), sums=False),
        "notebook loop": Way(EAGER, phases("g>m m>n n>k Ok>O"), sums=False),
    },
    "add_penalty_grad_": {
        "mas_ext": _fused("gpaO>g"),
        **_compiled("gpaO>g"),
        "eager, in place": Way(
            EAGER, phases("pa>d gOd>g d>d Od>"), phases("pa>d gOd>g d>d Od>W W>"), small=1
        ),
        "torch._foreach": Way(FOREACH, phases("pa>d", "gOd>g", "d>d", "dO>d", "d>")),
        "eager autograd": Way(
            AUTOGRAD,
            phases(_FORWARD, _BACKWARD + _ADD),
            phases(_FORWARD, _BACKWARD_MIXED + _ADD),
            small=1,
        ),
    },
    "penalty": {
        "mas_ext": _fused("paO>"),
        **_compiled("paO>"),
        "eager, in place": Way(EAGER, phases("pa>d d>d Od>"), phases("pa>d d>d Od>W W>"), small=1),
        "torch._foreach": Way(FOREACH, phases("pa>d", "d>d", "dO>d", "d>")),
    },
    "penalty, backward": {
        # The gradient is new memory, which autograd adds to what is there, tensor by tensor.
        "mas_ext": Way(FUSED_AUTOGRAD, phases("paO>", "paO>k", "gk>g")),
        "eager autograd": Way(
            AUTOGRAD,
            phases(_FORWARD, _BACKWARD + _ADD),
            phases(_FORWARD, _BACKWARD_MIXED + _ADD),
            small=1,
        ),
    },
    "penalty_and_grad": {
        "mas_ext": _fused("paO>k"),
        **_compiled("paO>k"),
        "eager, in place": Way(
            EAGER, phases("pa>d Od>G Gd> G>G"), phases("pa>d Od>G Gd>W W> G>G G>k"), small=1
        ),
        "torch._foreach": Way(
            FOREACH,
            phases("pa>d", "Od>G", "dG>d", "d>", "G>G"),
            phases("pa>d", "Od>G", "dG>d", "d>", "G>G", "G>k"),
        ),
        "eager autograd": Way(
            AUTOGRAD, phases(_FORWARD, _BACKWARD), phases(_FORWARD, _BACKWARD_MIXED), small=1
        ),
    },
    "proximal_step_": {
        "mas_ext": _fused("paO>p"),
        **_compiled("paOm>mp"),  # the new θ is a temporary first
        "eager, in place": Way(
            EAGER,
            phases("O>C C>E CE>C paC>p pa>d d>d Od>"),
            phases("O>C C>E CE>C C>c pac>p pa>d d>d Od>W W>"),
            small=1,
        ),
        "torch._foreach": Way(
            FOREACH,
            phases("O>C", "C>E", "CE>C", "paC>p", "pa>d", "d>d", "dO>d", "d>"),
            phases("O>C", "C>E", "CE>C", "C>c", "pac>p", "pa>d", "d>d", "dO>d", "d>"),
        ),
    },
}
OURS = "mas_ext"

# Arithmetic of our operators, an element; of the others it is as little, and never decides.
FLOPS = {
    "accumulate_importance_": 3,
    "add_penalty_grad_": 7,
    "penalty": 4,
    "penalty, backward": 11,
    "penalty_and_grad": 6,
    "proximal_step_": 12,
}
