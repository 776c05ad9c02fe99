"""Exact importance of programs that hypothesis writes: random operations, put together at random.

A program is a list of steps (a name and a seed each), every one of which takes [B, T, D] to
[B, T, D] and lets no two samples meet. What a step needs of parameters is a parameter of its own,
or a view, slice or function of one that others use, too. Hypothesis finds programs and shortens
those that fail; ``MAS_EXT_TEST_PROGRAMS=5000`` lets it write more of them.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mas_ext import estimate_importance
from tests.support.oracle import REDUCTIONS, assert_exact, one_by_one

T, D = 3, 4  # tokens and features
PROGRAMS = int(os.environ.get("MAS_EXT_TEST_PROGRAMS", "150"))

Function = Callable[[Tensor], Tensor]  # [B, T, D] → [B, T, D]
Weight = Callable[[], Tensor]


class Step(NamedTuple):
    name: str
    seed: int


class Program(nn.Module):
    """Steps one after the other, squashed in between so that nothing grows."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.params, self.layers = nn.ParameterDict(), nn.ModuleList()
        self.offset = 0  # of what a batch looks at, where its data says so
        self.functions = [Maker(self, random.Random(s.seed)).function(s.name) for s in steps]
        if not list(self.parameters()):
            self.functions.append(Maker(self, random.Random(0)).function("affine"))

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        self.offset = offset
        for function in self.functions:
            y = function(x)
            assert y.shape == x.shape
            x = y.tanh()
        return x


class Maker:
    """What a step is made with: chance, and parameters old and new."""

    def __init__(self, program: Program, chance: random.Random) -> None:
        self.program, self.choose = program, chance.choice
        self.happens = lambda probability: chance.random() < probability

    def function(self, name: str) -> Function:
        """A step: its weights, and one of the functions in its row of the table."""
        if name == "layer":
            make, call = self.choose(MODULES)
            module = make().double()
            self.program.layers.append(module)
            return lambda x: call(module, x)
        if name in AROUND:
            inner = self.function(self.choose([*STEPS, "layer"]))
            around = self.choose(AROUND[name])
            return lambda x: around(inner, x)
        shapes, functions = STEPS[name]
        weights = [self.weight(*self.choose(s) if isinstance(s, list) else s) for s in shapes]
        function = self.choose(functions)
        return lambda x: function(x, *(w() for w in weights))

    def parameter(self, *shape: int) -> nn.Parameter:
        """A new one, or one of this shape that is there."""
        same = [p for p in self.program.params.values() if p.shape == torch.Size(shape)]
        if same and self.happens(0.5):
            return self.choose(same)
        values = torch.randn(shape, dtype=torch.float64)
        if len(shape) > 1 and self.happens(0.2):
            values = values.mT.contiguous().mT
        param = nn.Parameter(values)
        self.program.params[f"p{len(self.program.params)}"] = param
        return param

    def weight(self, *shape: int) -> Weight:
        """A function that makes a tensor of this shape from parameters."""
        if self.happens(0.4):
            param = self.parameter(*shape)
            return lambda: param
        if self.happens(0.5):
            return self.choose(VIEWS)(self, shape)
        _, make = self.choose([row for row in COMPUTED if len(shape) in row[0]])
        count = 2 if make.__code__.co_argcount == 2 else 1
        inner = [self.weight(*shape) for _ in range(count)]
        return lambda: make(*(w() for w in inner))


# -- Weights ---------------------------------------------------------------------------------------
Shape = tuple[int, ...]


def from_bank(make: Maker, shape: Shape) -> Weight:
    """Out of one parameter that many steps take overlapping parts of."""
    bank, size = make.parameter(96), torch.Size(shape).numel()
    start, step = make.choose([0, 1, 7, size % 5]), make.choose([1, 1, 2 if size < 40 else 1])
    return lambda: bank[start : start + size * step : step].view(shape)


def transposed(make: Maker, shape: Shape) -> Weight:
    order = torch.randperm(len(shape)).tolist()
    param = make.parameter(*(shape[d] for d in order))
    return lambda: param.permute(sorted(range(len(shape)), key=order.__getitem__))


def sliced(make: Maker, shape: Shape) -> Weight:
    dim, offset = make.choose(range(len(shape))) if shape else 0, make.choose([0, 1, 2])
    param = make.parameter(*(n + 2 * (d == dim) for d, n in enumerate(shape or (1,))))
    return lambda: param.narrow(dim, offset, (shape or (1,))[dim]).view(shape)


def selected(make: Maker, shape: Shape) -> Weight:
    """The same part, or another part in another batch: a crop, or the head of a task."""
    param, fixed = make.parameter(3, *shape), make.choose([0, 1, None, None])
    take = make.choose(
        [lambda k: param[k], lambda k: param.unbind(0)[k], lambda k: param.split(1)[k].squeeze(0)]
    )
    return lambda: take(make.program.offset if fixed is None else fixed)


def reshaped(make: Maker, shape: Shape) -> Weight:
    param = make.parameter(torch.Size(shape).numel())
    return lambda: param.view(shape)


def picked(make: Maker, shape: Shape) -> Weight:
    """Rows looked up by fixed numbers, some of them twice."""
    table, index = make.parameter(5, *shape[1:]), torch.randint(5, shape[:1])
    return lambda: table[index].view(shape)


def joined(make: Maker, shape: Shape) -> Weight:
    if not shape or shape[0] < 2:
        return make.weight(*shape)
    parts = [make.weight(1, *shape[1:]), make.weight(shape[0] - 1, *shape[1:])]
    return lambda: torch.cat([part() for part in parts])


def low_rank(make: Maker, shape: Shape) -> Weight:
    if len(shape) != 2:
        return make.weight(*shape)
    a, b = make.weight(shape[0], 2), make.weight(2, shape[1])
    return lambda: a() @ b()


def repeated(make: Maker, shape: Shape) -> Weight:
    inner = make.weight(*shape[1:])
    return lambda: inner().expand(shape)


VIEWS = [from_bank, transposed, sliced, selected, reshaped]
VIEWS += [picked, joined, low_rank, repeated]
ANY, NOT_SCALAR, MATRIX = range(4), range(1, 4), range(2, 3)
COMPUTED: list[tuple[range, Callable[..., Tensor]]] = [  # of weights of the same shape
    (ANY, lambda w: w * (w > -1)),
    (ANY, lambda w, v: w * v),
    (ANY, lambda w: w.exp() / (1 + w.norm())),
    (NOT_SCALAR, lambda w: w.softmax(-1) + w.sigmoid()),
    (NOT_SCALAR, lambda w: w.cumsum(0)),
    (NOT_SCALAR, lambda w: w.flip(-1).roll(1, 0)),
    (MATRIX, lambda w: (w @ w.mT) @ w),
]

# -- Steps -----------------------------------------------------------------------------------------
WIDE = [(), (D,), (1,), (T, 1), (T, D), (1, D), (1, 1, D), (1, T, 1), (1, T, D), (1, 1, 1)]
TIME_FIRST = [(), (D,), (T, 1, 1), (T, 1, D), (1, 1, D)]
MEAN, VARIANCE = torch.tensor([0.5, -1, 2, 0]).double(), torch.tensor([0.7, 1, 2, 3]).double()
BATCH_LAST = [(), (D, 1), (T, 1, 1), (T, D, 1), (1, D, 1)]


def turned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of [T, B, D]."""
    return lambda x, *weights: function(x.transpose(0, 1), *weights).transpose(0, 1)


def rows_of(x: Tensor) -> Tensor:
    return (x > 0).sum(-1)  # 0 to D for each token


class Scaled(torch.autograd.Function):
    """A backward in Python."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w.sin()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w.sin(), (g * x * w.cos()).sum((0, 1))


def recurrent(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    hidden, out = x.new_zeros(len(x), D), []
    for t in x.unbind(1):
        hidden = torch.tanh(t @ w + hidden @ v + b)
        out.append(hidden)
    return torch.stack(out, 1)


def packed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Only the tokens that the data chooses, of all samples together."""
    mask, out = x[..., 0] > 0, torch.zeros_like(x)
    out[mask] = F.linear(x[mask], w, b)
    return out


def in_place(write: Callable[..., Any]) -> Callable[..., Tensor]:
    def run(x: Tensor, *weights: Tensor) -> Tensor:
        out = x.clone()
        write(out, *weights)
        return out

    return run


def sorted_samples(inner: Function, x: Tensor) -> Tensor:
    """Samples change places as the data says, and come back."""
    order = (x[:, 0, 0] > 0).long().argsort(stable=True)
    return inner(x[order])[order.argsort()] + inner(x)


# Name → shapes of weights (a list: one of them), and functions of x and these weights.
STEPS: dict[str, tuple[list[Any], list[Callable[..., Tensor]]]] = {
    "affine": (
        [WIDE, WIDE],
        [
            lambda x, w, v: x * w + v,
            lambda x, w, v: torch.sub(torch.add(w, x, alpha=2), v, alpha=3),
            lambda x, w, v: w / (1 + x.square()) - x / (1 + v.square()),
            lambda x, w, v: x.mul(x).mul_(w).add_(w),
            lambda x, w, v: torch.addcmul(w.expand_as(x), x, v),
            lambda x, w, v: torch.lerp(x, w.expand_as(x), 0.3),
            lambda x, w, v: torch.where(x > 0, x * v, w),
            lambda x, w, v: torch.maximum(x, w),
            lambda x, w, v: (1 + x.square()) ** w,
            lambda x, w, v: x + torch.zeros_like(x).add_(w),
        ],
    ),
    "time first": ([TIME_FIRST], [turned(lambda x, w: x.sin() * w - w)]),
    "batch last": ([BATCH_LAST], [lambda x, w: (x.permute(1, 2, 0) * w + w).permute(2, 0, 1)]),
    "linear": (
        [(D, D), (D,)],
        [
            F.linear,
            turned(F.linear),
            lambda x, w, b: F.linear(x, w),
            lambda x, w, b: F.linear(x.flatten(0, 1), w, b).view_as(x),
            lambda x, w, b: (
                F.linear(x.transpose(0, 1).flatten(0, 1), w).view(T, -1, D).transpose(0, 1)
            ),
            lambda x, w, b: torch.stack([F.linear(t, w, b) for t in x.unbind(1)], 1),
            lambda x, w, b: F.linear(x.reshape(len(x), T, 2, 2), w[:2, :2]).flatten(2),
            lambda x, w, b: torch.func.vmap(lambda sample: F.linear(sample, w, b))(x),
            lambda x, w, b: checkpoint(F.linear, x, w, b, use_reentrant=False),
        ],
    ),
    "packed": ([(D, D), (D,)], [packed]),
    "matrix": (
        [(D, D), (T, T)],
        [
            lambda x, w, v: x @ w,
            lambda x, w, v: v @ (w @ x.mT).mT,
            lambda x, w, v: (w @ x.permute(2, 1, 0).reshape(D, -1)).view(D, T, -1).permute(2, 1, 0),
            lambda x, w, v: torch.einsum("btd,ts,de->bse", x, v, w),
            lambda x, w, v: torch.baddbmm(x, x, w.expand(len(x), D, D), beta=0.5, alpha=2),
            lambda x, w, v: torch.bmm(v.repeat(len(x), 1, 1), x),
            lambda x, w, v: torch.addmm(x[:, 0], x[:, 1], w, beta=2, alpha=0.5)[:, None] + x,
            lambda x, w, v: torch.cat([x[..., :2] @ w[:2], x[..., 2:] @ w[2:]], 1)[:, :T],
            lambda x, w, v: x @ w + (x @ w).sin() @ w.mT,
        ],
    ),
    "vector": (
        [(D,)],
        [
            lambda x, w: (x @ w)[..., None] * x,
            lambda x, w: torch.mv(x.flatten(0, 1), w).view(-1, T, 1) + x,
            lambda x, w: torch.einsum("bt,d->btd", x.mean(2), w),
            lambda x, w: F.cosine_similarity(x, w, dim=-1)[..., None] - x,
            lambda x, w: torch.addmv(x[:, 0, 0], x[:, 1], w)[:, None, None] * x,
            Scaled.apply,
        ],
    ),
    "heads": (
        [(T, D, D)],
        [
            turned(torch.bmm),
            lambda x, w: (x.unsqueeze(2) @ w).squeeze(2),
            lambda x, w: torch.stack([x[:, t] @ w[t] for t in range(T)], 1),
            lambda x, w: torch.einsum("bi,tij,bj->bti", x[:, 0], w, x[:, 1]),
            lambda x, w: F.bilinear(x, x, w)[..., :1] * x,
        ],
    ),
    "convolution": (
        [(D, D, 3), (D,), (D, 1, 3), (T, T, 1)],
        [
            lambda x, w, b, d, t: F.conv1d(x.mT, w, b, padding=1).mT,
            lambda x, w, b, d, t: F.conv1d(x.mT, d, b, padding=1, groups=D).mT,
            lambda x, w, b, d, t: F.conv1d(x.mT, w[:, :2], padding=2, dilation=2, groups=2).mT,
            lambda x, w, b, d, t: F.conv1d(x, t),
            lambda x, w, b, d, t: F.conv_transpose1d(x.mT, w, b, padding=1).mT,
        ],
    ),
    "norm": (
        [(D,), (D,), (T, D)],
        [
            lambda x, w, b, t: F.layer_norm(x, (D,), w, b),
            lambda x, w, b, t: F.layer_norm(x, (T, D), t, t),
            lambda x, w, b, t: F.rms_norm(x, (D,), w),
            lambda x, w, b, t: F.group_norm(x.mT, 2, w, b).mT,
            lambda x, w, b, t: F.batch_norm(x.mT, MEAN, VARIANCE, w, b).mT,
            turned(lambda x, w, b, t: F.layer_norm(x, (D,), w, b)),
            lambda x, w, b, t: F.prelu(x.mT, w).mT,
        ],
    ),
    "table": (
        [(D + 1, D)],
        [
            lambda x, w: F.embedding(rows_of(x), w, padding_idx=2) * x,
            lambda x, w: F.embedding(rows_of(x).mT.contiguous().mT, w) + x,
            lambda x, w: w[rows_of(x) - D - 1] - x,
            lambda x, w: w.index_select(0, rows_of(x).flatten()).view_as(x),
            lambda x, w: w[rows_of(x), rows_of(x).clamp(max=D - 1)][..., None] + x,
            lambda x, w: w.gather(0, rows_of(x).flatten()[:, None].expand(-1, D)).view_as(x),
            lambda x, w: F.embedding_bag(rows_of(x), w, mode="mean")[:, None] * x,
            lambda x, w: F.one_hot(rows_of(x), D + 1).double() @ w,
            turned(lambda x, w: F.embedding(rows_of(x), w)),
            lambda x, w: (F.embedding(rows_of(x), w) @ w.mT)[..., :D],
        ],
    ),
    "token": (
        [(1, D)],
        [
            lambda x, w: torch.cat([w.expand(len(x), 1, D), x], 1)[:, :T],
            lambda x, w: torch.cat([x[:, 1:], w.repeat(len(x), 1, 1)], 1),
            lambda x, w: torch.stack([w.expand(len(x), D), x[:, 0], x[:, 1]], 1),
            lambda x, w: x.index_put((torch.arange(len(x)), torch.ones(len(x)).long()), w),
            lambda x, w: x.slice_scatter(w.expand(len(x), 1, D), 1, 1, 2),
        ],
    ),
    "in place": (
        [(D,)],
        [
            in_place(lambda out, w: out[:, 0].mul_(w)),
            in_place(lambda out, w: out[:, 1].copy_(w)),
            in_place(lambda out, w: out.transpose(0, 1)[1].sub_(w)),
            in_place(lambda out, w: out.mul_(w).add_(w)),
            in_place(lambda out, w: out[:, ::2].addcmul_(out[:, 1:2].clone(), w)),
        ],
    ),
    "attention": (
        [(T, D), (2, D), (T, T)],
        [
            lambda x, q, k, b: (q @ x.mT).softmax(-1) @ x,
            lambda x, q, k, b: F.scaled_dot_product_attention(q.expand_as(x), x, x, attn_mask=b),
            lambda x, q, k, b: F.scaled_dot_product_attention(
                x,
                torch.cat([k.expand(len(x), 2, D), x], 1),
                torch.cat([x, k.expand(len(x), 2, D)], 1),
            ),
            lambda x, q, k, b: torch.cdist(x[:, 0], k)[:, None].repeat(1, T, 2),
        ],
    ),
    "recurrent": ([(D, D), (D, D), (D,)], [recurrent]),
    "without parameters": (
        [],
        [
            lambda x: x.flip(1),
            lambda x: x[:, [2, 0, 1]],
            lambda x: x.mT.reshape_as(x),
            lambda x: x.flip(0).cumsum(1).flip(0),
            lambda x: torch.stack(x.chunk(2, 2), 2).flatten(2),
            lambda x: F.pixel_shuffle(x.reshape(-1, D, T, 1), 2).reshape(x.shape),
            lambda x: torch.zeros_like(x).scatter(1, x.argsort(1), x),
            lambda x: x.softmax(1),
            lambda x: x.topk(2, 2).values.repeat(1, 1, 2),
            lambda x: x / (1 + x.var(2, keepdim=True)),
            lambda x: torch.linalg.solve(x @ x.mT + 3 * torch.eye(T).double(), x),
            lambda x: F.gelu(x) * x.detach(),
        ],
    ),
    # no gradient where the data is negative
    "rectified": ([], [F.relu, lambda x: F.relu(x) * (x[:, :1, :1] > 0)]),
}
AROUND: dict[str, list[Callable[[Function, Tensor], Tensor]]] = {
    "residual": [
        lambda inner, x: x + inner(x),
        lambda inner, x: inner(x) * inner(x.sin()),
        lambda inner, x: checkpoint(inner, x, use_reentrant=False),
    ],
    "sorted": [sorted_samples],
}
MODULES: list[tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = [
    (lambda: nn.LSTM(D, D, batch_first=True), lambda m, x: m(x)[0]),
    (lambda: nn.RNN(D, D), lambda m, x: m(x.transpose(0, 1))[0].transpose(0, 1)),
    (lambda: nn.GRUCell(D, D), lambda m, x: m(x[:, 0], m(x[:, 1])).unsqueeze(1) + x),
    (lambda: nn.MultiheadAttention(D, 2, batch_first=True), lambda m, x: m(x, x, x)[0]),
    (lambda: nn.TransformerEncoderLayer(D, 2, 5, batch_first=True), lambda m, x: m(x)),
    (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, D)), lambda m, x: m(x)),
    (lambda: nn.Linear(D, D), lambda m, x: m(m(x).tanh()) + x @ m.weight),
]

# -- The test --------------------------------------------------------------------------------------
steps = st.builds(Step, st.sampled_from([*STEPS, *AROUND, "layer"]), st.integers(0, 2**16))
DATA_DEPENDENT = {"packed", "rectified", *AROUND}  # may be computed slowly
CUTS = [(5,), (4, 3), (2, 1, 5), (3, 3), (7,)]
FIRST: dict[str, Function] = {  # what the first batch shows of how a program may behave
    "like the others": lambda x: x,
    "positive": torch.abs,
    "negative but for a sample": lambda x: torch.cat([x[:1].abs(), -x[1:].abs()]),
    "one after the other": lambda x: torch.cat([x[:, :1].abs(), -x[:, 1:].abs()], 1),
}


@settings(
    deadline=None,
    print_blob=True,
    max_examples=PROGRAMS,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    steps=st.lists(steps, min_size=1, max_size=6),
    cut=st.sampled_from(CUTS),
    first=st.sampled_from(list(FIRST)),
    offsets=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    reduction=st.sampled_from(list(REDUCTIONS)),
)
def test_programs_are_exact(
    steps: list[Step], cut: tuple[int, ...], first: str, offsets: list[int], reduction: str
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        program = Program(steps).eval()
        data = [torch.randn(size, T, D, dtype=torch.float64) for size in cut]
        data[0] = FIRST[first](data[0])
        batches = [{"x": x, "offset": k} for x, k in zip(data, offsets, strict=False)]
        expected = one_by_one(program, batches, reduction=reduction)
        assume(all(omega.isfinite().all() for omega in expected.values()))  # std of one number
        with warnings.catch_warnings():
            if not any(step.name in DATA_DEPENDENT for step in steps):
                # A use without a gradient in the first batch may be served slowly in the next.
                slow = r"(?s).*one sample at a time(?!.*no gradient)"
                warnings.filterwarnings("error", message=slow)
            omega = estimate_importance(program, batches, reduction=reduction)
    assert_exact(omega, expected, floor=1e-12)
