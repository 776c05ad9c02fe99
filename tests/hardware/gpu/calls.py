"""Every operator as a call that can be repeated from the same tensors, and verified."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import mas_ext
from tests.hardware.gpu.device import DEVICE
from tests.support import operators, tensors
from tests.support.operators import LOW_RANK_OPS, OPERATORS, PENALTY_OPS, Outcome, Scalars
from tests.support.tensors import State

KEPT = {
    f"{op}, Ω in {kept}": (op, kept)
    for op in (*PENALTY_OPS, *LOW_RANK_OPS)
    for kept in tensors.KEPT
}
ALL = [*operators.ALL, *KEPT]
SHAPES = [(20_000,), (33, 7), (), (8192,)]


@dataclass
class Call:
    """An operator with its tensors on the device; the values of its scalars can be changed."""

    op: str
    before: State  # on the CPU, as it was at first
    state: State
    scalars: Scalars  # tensors
    outcome: Outcome = field(init=False)  # of the last run

    def run(self) -> None:
        self.outcome = operators.call(mas_ext.functional, self.op, self.state, self.scalars)

    def assert_right(self) -> None:
        if not self.scalars.found_inf:
            operators.assert_right(self.op, self.before, self.outcome, self.scalars)
            return
        for name in OPERATORS[self.op].written:
            pairs = zip(getattr(self.state, name), getattr(self.before, name), strict=True)
            assert all(torch.equal(now.cpu(), before) for now, before in pairs), name

    def set_scalars(self, factor: float) -> None:
        for name in OPERATORS[self.op].scalars:
            getattr(self.scalars, name).mul_(factor)

    def restore(self) -> None:
        for name in OPERATORS[self.op].written:
            pairs = zip(getattr(self.state, name), getattr(self.before, name), strict=True)
            for now, before in pairs:
                now.copy_(before)


def make(
    name: str,
    dtype: torch.dtype = torch.float32,
    scalar_dtype: torch.dtype = torch.float32,
    scalars_on: str = DEVICE,
) -> Call:
    """An operator of ``ALL`` on lists of a few shapes."""
    op, kept = KEPT.get(name, (name, None))
    if OPERATORS[op].takes_lists:
        before = operators.make(op, [dtype] * len(SHAPES), SHAPES, kept=kept)
    else:
        more = {"kept": kept} if kept else {}
        before = operators.medium(op, dtype, **more)
    scalars = Scalars(found_inf=0.0).as_tensors(scalar_dtype, scalars_on)
    return Call(op, before, before.copy(DEVICE), scalars)
