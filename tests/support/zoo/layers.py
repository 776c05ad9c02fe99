"""Single layers, each of which uses its parameters in a way of its own."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.zoo.small import ids, noise


class Net(nn.Module):
    """A function of its attributes and of the batch.

    Attributes are layers, tensors that become parameters, or shapes of random parameters. Their
    names must not be those of nn.Module's own members (``to``, ``half``, …).
    """

    def __init__(
        self, function: Callable[..., Any], **parts: nn.Module | Tensor | tuple[int, ...]
    ) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if not isinstance(part, nn.Module):
                part = nn.Parameter(weight(*part) if isinstance(part, tuple) else part)
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def weight(*shape: int) -> Tensor:
    """Of scale 1/√fan-in, so that deep stacks neither vanish nor explode."""
    return torch.randn(shape) / max([*shape[-1:], 1]) ** 0.5


def time_first(layer: nn.Module) -> Net:
    """A layer that wants time first, for batches whose dimension 0 is the sample."""

    def forward(m: Net, *inputs: Tensor) -> Tensor:
        output = m.layer(*(x.transpose(0, 1) for x in inputs))
        return (output[0] if isinstance(output, tuple) else output).transpose(0, 1)

    return Net(forward, layer=layer)


# -- Parts -----------------------------------------------------------------------------------------
def tied_language_model(vocabulary: int, d: int) -> Net:
    table, body = nn.Embedding(vocabulary, d), nn.Linear(d, d)
    head = nn.Linear(d, vocabulary, bias=False)
    head.weight = table.weight
    return Net(lambda m, x: m.head(m.body(m.table(x)).tanh()), table=table, body=body, head=head)


def low_rank(d: int, n: int, rank: int) -> Net:
    """LoRA by hand, B·A formed first: a sub-graph of parameters only, and the weight directly."""
    return Net(
        lambda m, x: F.linear(x, m.weight + m.b @ m.a).tanh() @ m.weight,
        weight=(n, d),
        a=(rank, d),
        b=(n, rank),
    )


def vector_weight(d: int) -> Net:
    """matmul with a vector, and an output [B]."""
    return Net(lambda m, x: (x @ m.weight + m.bias).tanh(), weight=(d,), bias=(1,))


def learned_queries(n: int, d: int) -> Net:
    """Attention pooling: the queries are parameters, repeated for the batch before a bmm."""

    def forward(m: Net, x: Tensor) -> Tensor:
        queries = m.queries.repeat(len(x), 1, 1)
        return torch.bmm(torch.bmm(queries, m.key(x).transpose(1, 2)).softmax(-1), x)

    return Net(forward, queries=(n, d), key=nn.Linear(d, d))


def rnn_by_hand(d: int, h: int) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), len(m.bias))
        for step in x.unbind(1):
            state = torch.tanh(step @ m.inward.T + state @ m.recurrent.T + m.bias)
        return state

    return Net(forward, inward=(h, d), recurrent=(h, h), bias=(h,))


def rms_norm(d: int) -> Net:
    """Written out, as in most language models."""
    return Net(
        lambda m, x: m.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)),
        weight=torch.ones(d),
    )


def gated_mlp(d: int, h: int) -> Net:
    return Net(
        lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
        gate=nn.Linear(d, h),
        up=nn.Linear(d, h),
        down=nn.Linear(h, d),
    )


class StandardizedConv(nn.Conv2d):
    """Weight standardization: the convolution's weight is computed from the parameter."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(x, w, self.bias)


class Quadratic(torch.autograd.Function):
    """y = (x Wᵀ)² + b, with a backward of its own."""

    @staticmethod
    def forward(ctx, x, w, b):
        y = x @ w.T
        ctx.save_for_backward(x, w, y)
        return y * y + b

    @staticmethod
    def backward(ctx, g):
        x, w, y = ctx.saved_tensors
        inner = 2 * g * y
        return inner @ w, inner.flatten(0, -2).T @ x.flatten(0, -2), g.flatten(0, -2).sum(0)


class TwoOutputs(torch.autograd.Function):
    """If one of them is not used, its gradient is zeros, and not None."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w, x + w

    @staticmethod
    def backward(ctx, a, b):
        x, w = ctx.saved_tensors
        return a * w + b, (a * x + b).sum(0)


# -- Forward functions -----------------------------------------------------------------------------
def gru_learned_start(m: Net, x: Tensor) -> Tensor:
    """The initial state is a parameter, repeated for the batch in dimension 1."""
    return m.gru(x, m.start.repeat(1, len(x), 1))[0]


def with_class_token(m: Net, x: Tensor) -> Tensor:
    x = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.position
    return m.layer(x)[:, 0]


def prefix_attention(m: Net, x: Tensor) -> Tensor:
    """Prefix tuning: learned keys and values before those of the input."""
    k, v = (
        torch.cat([p.expand(len(x), -1, -1), m.project(x)], 1) for p in (m.keys, m.prefix_values)
    )
    return F.scaled_dot_product_attention(x, k, v)


def heads_by_einsum(m: Net, x: Tensor) -> Tensor:
    heads = torch.einsum("btd,hde->bthe", x, m.split).tanh()
    return torch.einsum("bthe,hed->btd", heads, m.join)


def prototypes(m: Net, x: Tensor, ids: Tensor) -> Tensor:
    """Rows of a parameter picked by ids of the sample, by indexing and by index_select."""
    return (x - m.prototypes[ids]).tanh() * m.offsets.index_select(0, ids)[:, None]


def overlapping_slices(m: Net, x: Tensor) -> Tensor:
    """As in supernets and nested representations."""
    slices = [(2, 3), (4, 5), (3, 4)]
    parts = [F.linear(x[:, :k], m.weight[:n, :k], m.bias[:n]) for n, k in slices]
    return torch.cat(parts, 1).tanh()


def columns(m: Net, x: Tensor) -> Tensor:
    """Samples as columns: the weight is the matrix product's left operand."""
    return (m.out @ torch.addmm(m.bias, m.weight, x.T).tanh()).T


def scaled_addmm(m: Net, x: Tensor) -> Tensor:
    hidden = torch.addmm(m.bias, x, m.weight, beta=0.3, alpha=-1.7).tanh()
    batched = m.batched.expand(len(x), -1, -1)
    return torch.baddbmm(m.bias[:2], hidden.unsqueeze(1), batched, beta=0.5, alpha=2.0)


def relative_bias(m: Net, x: Tensor) -> Tensor:
    """A table of parameters, indexed by position only, added to every sample's scores."""
    q, k, v = m.project(x).chunk(3, -1)
    positions = torch.arange(x.shape[1])
    bias = m.table[positions[:, None] - positions + x.shape[1] - 1]
    return (q @ k.transpose(1, 2) + bias).softmax(-1) @ v


def two_heads(m: Net, x: Tensor) -> SimpleNamespace:
    """Only the logits count; the other head is in the output's graph, but not in theirs."""
    hidden = m.body(x).tanh()
    return SimpleNamespace(hidden=hidden, logits=m.head(hidden), aux=m.other(hidden))


def two_views(m: Net, x: Tensor) -> Tensor:
    """Both views of every sample through the layers as one batch of 2B rows (Siamese)."""
    first, second = m.body(torch.cat([x, x.flip(1)], 0)).chunk(2)
    return first * second


def crops(m: Net, x: Tensor) -> Tensor:
    """The other order of such rows: the views of a sample lie side by side."""
    views = x.repeat_interleave(3, 0)
    views = views * torch.linspace(0.5, 1, 3, dtype=x.dtype).repeat(len(x))[:, None]
    return m.body(views).view(len(x), 3, -1).amax(1)


def batch_as_channels(m: Net, x: Tensor) -> Tensor:
    """The batch folded into the channels of one grouped convolution (modulated convolutions)."""
    b, c, h, w = x.shape
    style = m.style(x.mean((2, 3)))[:, None, :, None, None]
    weights = (m.weight * style).flatten(0, 1)  # a weight of its own for every sample
    y = F.conv2d(x.reshape(1, b * c, h, w), weights, padding=1, groups=b)
    return y.view(b, -1, h, w)


def hypernetwork(m: Net, x: Tensor) -> Tensor:
    """Weights computed from the input, one matrix per sample."""
    return torch.bmm(m.make(x).view(len(x), -1, x.shape[1]), x.unsqueeze(2)).squeeze(2)


def spectral_convolution(m: Net, x: Tensor) -> Tensor:
    """Its complex weight is a view of a real parameter."""
    spectrum = torch.fft.rfft(x, dim=1)
    mixed = torch.einsum("btd,tde->bte", spectrum, torch.view_as_complex(m.weight))
    return torch.fft.irfft(mixed, n=x.shape[1], dim=1)


def functional_under_vmap(m: Net, x: Tensor) -> Tensor:
    """Its layer is called with parameters computed from the layer's own, and under vmap."""
    scaled = {name: p * m.scale for name, p in m.layer.named_parameters()}
    return torch.vmap(lambda row: torch.func.functional_call(m.layer, scaled, row))(x).tanh()


def force_field(m: Net, x: Tensor) -> Tensor:
    """The output is itself a gradient: the graph holds the backward of its own forward."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(m.energy(x).sum(), x, create_graph=True)
    return -force


def in_place(m: Net, x: Tensor) -> Tensor:
    """On results, on views of them, and on a freshly made buffer."""
    y = m.linear(x).mul_(m.gain)
    y[:, :2] += m.shift
    y.tanh_()
    out = y.new_zeros(len(y), y.shape[1] + 1)
    out[:, 1:] = y
    out[:, 0] = m.shift.sum()
    return out.sin_()


def views_out(m: Net, x: Tensor) -> Tensor:
    """Outputs and inner tensors that are views, not contiguous, or expanded."""
    y = m.mix(m.linear(x[:, :, ::2]).transpose(1, 2))
    return y.unsqueeze(1).expand(-1, 2, -1, -1).transpose(2, 3)[..., 1:]


def many_uses(m: Net, x: Tensor) -> Tensor:
    for _ in range(256):
        x = (x @ m.w).tanh()
    return x


# -- Rows ------------------------------------------------------------------------------------------
def recurrent(kind: type[nn.RNNBase], batch_first: bool, **options: Any) -> tuple:
    layer = kind(4, 3, num_layers=2, bidirectional=True, batch_first=batch_first, **options)
    return layer if batch_first else time_first(layer), noise(6, 4)


def attention(batch_first: bool, kdim: int = 6, vdim: int = 4, **options: Any) -> tuple:
    layer = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=vdim, batch_first=batch_first, **options)
    q, k, v = noise(3, 8), noise(7, kdim), noise(7, vdim)
    if batch_first:
        return layer, {"query": q, "key": k, "value": v, "need_weights": False}
    turned = time_first(layer)
    return Net(lambda m, q, k, v: m.turned(q, k, v), turned=turned), {"q": q, "k": k, "v": v}


def normed_mlp(norm: Callable[[nn.Module], nn.Module]) -> tuple:
    model = nn.Sequential(norm(nn.Linear(4, 6)), nn.Tanh(), norm(nn.Linear(6, 3)))
    for _ in range(9):
        model(torch.randn(2, 4))  # spectral norm finds its singular vectors in training mode
    return model, noise(4)


def shared_positions() -> tuple:
    """A ``forward=``: positions that belong to no sample, and a batch of an unusual form."""
    model = nn.ModuleDict({"position": nn.Embedding(4, 3), "linear": nn.Linear(3, 2)})

    def forward(model: nn.ModuleDict, batch: dict) -> Tensor:
        return model["linear"](batch["x"][0] + model["position"](torch.arange(4))).tanh()

    return model, {"x": [noise(4, 3)], "name": "odd"}, forward


def one_weight(function: Callable[[Tensor, Tensor], Tensor], w: Tensor) -> tuple:
    return Net(lambda m, x: function(m.w, x), w=w), noise(4)


PARAMETRIZATIONS = nn.utils.parametrizations

LAYERS: dict[str, Callable[[], tuple]] = {
    # matrices
    "linear": lambda: (nn.Linear(6, 4), noise(6)),
    "linear, one position": lambda: (nn.Linear(6, 4), noise(1, 6)),
    "linear, 3-d": lambda: (nn.Linear(6, 4), noise(3, 6)),
    "linear, 3-d, no bias": lambda: (nn.Linear(6, 4, bias=False), noise(3, 6)),
    "linear, 4-d": lambda: (nn.Linear(6, 4), noise(2, 3, 6)),
    "linear, 4-d, no bias": lambda: (nn.Linear(6, 4, bias=False), noise(2, 3, 6)),
    "linear, twice": lambda: (
        Net(lambda m, x: m.linear(m.linear(x).tanh()), linear=nn.Linear(4, 4)),
        noise(3, 4),
    ),
    "bilinear": lambda: (nn.Bilinear(3, 4, 2), {"input1": noise(3), "input2": noise(4)}),
    "bilinear, 3-d": lambda: (nn.Bilinear(3, 4, 2), {"input1": noise(2, 3), "input2": noise(2, 4)}),
    "vector weight": lambda: (vector_weight(4), noise(4)),
    "vector weight, sequence": lambda: (vector_weight(4), noise(3, 4)),
    "columns": lambda: (Net(columns, weight=(4, 6), bias=(4, 1), out=(6, 4)), noise(6)),
    "addmm, scaled": lambda: (
        Net(scaled_addmm, bias=(3,), weight=(4, 3), batched=(1, 3, 2)),
        noise(4),
    ),
    "inner": lambda: one_weight(lambda w, x: torch.inner(x, w), weight(2, 4)),
    "permuted from the end": lambda: one_weight(lambda w, x: x @ w.permute(-1, 0), weight(2, 4)),
    "channels last, flattened": lambda: one_weight(
        lambda w, x: F.linear(x, w.flatten(1)),
        weight(3, 2, 2, 1).to(memory_format=torch.channels_last),
    ),
    "256 uses": lambda: (Net(many_uses, w=0.5 * torch.randn(4, 4)), noise(4)),
    "einsum": lambda: (Net(heads_by_einsum, split=(2, 6, 3), join=(2, 3, 6)), noise(4, 6)),
    "einsum over heads": lambda: (  # becomes a bmm over heads, with B·T rows
        Net(lambda m, x: torch.einsum("bthd,hde->bthe", x, m.weight), weight=(2, 3, 4)),
        noise(4, 2, 3),
    ),
    "slices": lambda: (Net(overlapping_slices, weight=(4, 5), bias=(4,)), noise(5)),
    "cosine head": lambda: (
        Net(lambda m, x: F.linear(F.normalize(x), F.normalize(m.weight)), weight=(3, 4)),
        noise(4),
    ),
    "low rank": lambda: (low_rank(6, 4, 2), noise(6)),
    "weight norm": lambda: normed_mlp(PARAMETRIZATIONS.weight_norm),
    "weight norm, old": lambda: normed_mlp(nn.utils.weight_norm),
    "spectral norm": lambda: normed_mlp(PARAMETRIZATIONS.spectral_norm),
    "spectral norm, old": lambda: normed_mlp(nn.utils.spectral_norm),
    "orthogonal": lambda: (PARAMETRIZATIONS.orthogonal(nn.Linear(4, 4)), noise(4)),
    "distances": lambda: one_weight(lambda w, x: torch.cdist(x, w), weight(3, 4)),
    "functional": lambda: (
        Net(functional_under_vmap, layer=nn.Linear(4, 4), scale=torch.tensor(1.5)),
        noise(4),
    ),
    "hypernetwork": lambda: (Net(hypernetwork, make=nn.Linear(3, 12)), noise(3)),
    "two views": lambda: (
        Net(two_views, body=nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))),
        noise(4),
    ),
    "crops": lambda: (
        Net(crops, body=nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))),
        noise(4),
    ),
    # tables
    "embedding": lambda: (nn.Embedding(7, 3), ids(6)),
    "embedding, ids alone": lambda: (nn.Embedding(7, 3), ids()),
    "embedding, padding": lambda: (nn.Embedding(7, 3, padding_idx=0), ids(6)),
    "embedding, by frequency": lambda: (nn.Embedding(7, 3, scale_grad_by_freq=True), ids(6)),
    "embedding, sparse": lambda: (nn.Embedding(7, 3, sparse=True), ids(6)),
    "embedding, max norm": lambda: (nn.Embedding(7, 3, max_norm=1.0), ids(6)),
    "embedding bag, sum": lambda: (nn.EmbeddingBag(7, 3, mode="sum"), ids(6)),
    "embedding bag, mean": lambda: (nn.EmbeddingBag(7, 3, mode="mean"), ids(6)),
    "embedding bag, max": lambda: (nn.EmbeddingBag(7, 3, mode="max"), ids(6)),
    "embedding bag, padding": lambda: (nn.EmbeddingBag(7, 3, padding_idx=0), ids(6)),
    "embedding bag, weighted": lambda: (
        nn.EmbeddingBag(7, 3, mode="sum"),
        {"input": ids(6), "per_sample_weights": noise(6)},
    ),
    "prototypes": lambda: (
        Net(prototypes, prototypes=(3, 4), offsets=(3,)),
        {"x": noise(4), "ids": ids(below=3)},
    ),
    # convolutions
    "conv1d": lambda: (nn.Conv1d(4, 6, 3), noise(4, 8)),
    "conv1d, groups": lambda: (nn.Conv1d(4, 6, 3, groups=2, bias=False), noise(4, 8)),
    "conv1d, dilated, same": lambda: (nn.Conv1d(4, 6, 4, dilation=2, padding="same"), noise(4, 9)),
    "conv2d": lambda: (nn.Conv2d(3, 4, 3, padding=1), noise(3, 6, 6)),
    "conv2d, pointwise": lambda: (nn.Conv2d(3, 4, 1), noise(3, 4, 4)),
    "conv2d, depthwise": lambda: (nn.Conv2d(4, 4, 3, padding=1, groups=4), noise(4, 5, 5)),
    "conv2d, depth multiplier": lambda: (nn.Conv2d(4, 8, 3, groups=4), noise(4, 5, 5)),
    "conv2d, stride with a rest": lambda: (nn.Conv2d(3, 4, 3, stride=3), noise(3, 8, 10)),
    "conv2d, uneven": lambda: (
        nn.Conv2d(4, 6, (3, 2), (2, 1), (0, 1), (1, 2), groups=2),
        noise(4, 8, 7),
    ),
    "conv2d, same, even kernel": lambda: (nn.Conv2d(3, 4, 4, padding="same"), noise(3, 5, 5)),
    "conv2d, valid": lambda: (nn.Conv2d(3, 4, 3, padding="valid"), noise(3, 5, 5)),
    "conv2d, replicate": lambda: (
        nn.Conv2d(3, 4, 3, padding="same", padding_mode="replicate"),
        noise(3, 5, 5),
    ),
    "conv2d, reflect": lambda: (
        nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"),
        noise(3, 5, 5),
    ),
    "conv2d, circular": lambda: (
        nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="circular"),
        noise(3, 5, 5),
    ),
    "conv2d, whole image": lambda: (nn.Conv2d(3, 4, 5), noise(3, 5, 5)),
    "conv2d, channels last": lambda: (
        nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        noise(3, 6, 6).to(memory_format=torch.channels_last),
    ),
    "conv3d": lambda: (nn.Conv3d(2, 4, 2), noise(2, 4, 4, 4)),
    "conv3d, groups, stride": lambda: (nn.Conv3d(2, 4, 3, 2, 1, groups=2), noise(2, 4, 5, 4)),
    "transposed 1d": lambda: (nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2), noise(4, 5)),
    "transposed 2d": lambda: (nn.ConvTranspose2d(3, 4, 3, stride=2), noise(3, 4, 4)),
    "transposed 2d, uneven": lambda: (
        nn.ConvTranspose2d(4, 2, (3, 2), (2, 3), 1, (1, 2), groups=2, dilation=(2, 1), bias=False),
        noise(4, 4, 3),
    ),
    "transposed 3d": lambda: (nn.ConvTranspose3d(2, 3, 2), noise(2, 2, 3, 2)),
    "batch as channels": lambda: (
        Net(batch_as_channels, weight=torch.randn(2, 3, 3, 3) / 3, style=nn.Linear(3, 3)),
        noise(3, 5, 5),
    ),
    "batch as length": lambda: (  # of a convolution of width 1: samples do not meet
        Net(lambda m, x: m.conv(x.T.unsqueeze(0)).squeeze(0).T, conv=nn.Conv1d(4, 3, 1)),
        noise(4),
    ),
    "unfold": lambda: (nn.Sequential(nn.Unfold(2), nn.Linear(9, 3)), noise(2, 4, 4)),
    # scales and shifts
    "prelu": lambda: (nn.PReLU(), noise(3, 4)),
    "prelu, channels": lambda: (nn.PReLU(3), noise(3, 4)),
    "layer norm": lambda: (nn.LayerNorm(4), noise(3, 4)),
    "layer norm, 2-d": lambda: (nn.LayerNorm((3, 4)), noise(2, 3, 4)),
    "layer norm, no bias": lambda: (nn.LayerNorm(4, bias=False), noise(4)),
    "layer norm after a shift": lambda: (  # whose gradient is nothing but rounding
        Net(lambda m, x: m.norm(x * m.scale + m.shift), norm=nn.LayerNorm(4), scale=(4,), shift=()),
        noise(3, 4),
    ),
    "rms norm": lambda: (nn.RMSNorm(4), noise(3, 4)),
    "rms norm, by hand": lambda: (rms_norm(4), noise(3, 4)),
    "group norm": lambda: (nn.GroupNorm(2, 4), noise(4, 3, 3)),
    "instance norm": lambda: (nn.InstanceNorm2d(3, affine=True), noise(3, 4, 4)),
    "instance norm, running": lambda: (
        nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
        noise(3, 4),
    ),
    "batch norm, vectors": lambda: (nn.BatchNorm1d(4), noise(4)),
    "batch norm, sequences": lambda: (nn.BatchNorm1d(4), noise(4, 6)),
    "batch norm, volumes": lambda: (nn.BatchNorm3d(2), noise(2, 2, 3, 2)),
    "gain": lambda: (  # a scalar for a whole tensor, and one through its exponential (CLIP's)
        Net(
            lambda m, x: torch.sin(m.gain * m.linear(x)) * m.log_scale.exp(),
            linear=nn.Linear(4, 4),
            gain=torch.tensor(0.7),
            log_scale=torch.ones(()),
        ),
        noise(4),
    ),
    "mask token": lambda: (
        Net(
            lambda m, x, mask: m.linear(torch.where(mask.unsqueeze(-1), m.token, x)).tanh(),
            token=(4,),
            linear=nn.Linear(4, 4),
        ),
        {"x": noise(3, 4), "mask": ids(3, below=2) > 0},
    ),
    "parameters out": lambda: (  # a parameter next to an output that depends on the sample
        Net(
            lambda m, x: torch.stack([m.constant.expand_as(x), m.linear(x)], 1),
            constant=(4,),
            linear=nn.Linear(4, 4),
        ),
        noise(4),
    ),
    "a rounded quotient": lambda: one_weight(
        lambda w, x: x * w + torch.div(x, w, rounding_mode="floor"), 1 + torch.rand(4)
    ),
    # sequences
    "lstm, batch first": lambda: recurrent(nn.LSTM, True),
    "lstm, time first": lambda: recurrent(nn.LSTM, False),
    "lstm, projected": lambda: recurrent(nn.LSTM, True, proj_size=2),
    "gru, batch first": lambda: recurrent(nn.GRU, True),
    "gru, time first": lambda: recurrent(nn.GRU, False),
    "gru, learned start": lambda: (
        Net(gru_learned_start, start=(1, 1, 3), gru=nn.GRU(4, 3, batch_first=True)),
        noise(6, 4),
    ),
    "rnn": lambda: (nn.RNN(3, 4, batch_first=True), noise(2, 3)),
    "rnn by hand": lambda: (rnn_by_hand(4, 3), noise(6, 4)),
    "attention, batch first": lambda: attention(True, add_bias_kv=True),
    "attention, time first": lambda: attention(False, add_bias_kv=True),
    "attention, one width": lambda: attention(False, 8, 8, add_zero_attn=True),
    "class token": lambda: (
        Net(
            with_class_token,
            layer=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
            token=(1, 1, 4),
            position=(1, 4, 4),
        ),
        noise(3, 4),
    ),
    "learned queries": lambda: (learned_queries(2, 4), noise(3, 4)),
    "prefix": lambda: (
        Net(prefix_attention, keys=(2, 4), prefix_values=(2, 4), project=nn.Linear(4, 4)),
        noise(3, 4),
    ),
    "relative bias": lambda: (
        Net(relative_bias, table=(11,), project=nn.Linear(4, 12)),
        noise(6, 4),
    ),
    "last token": lambda: (  # a parameter that only one token meets, after one that all meet
        Net(
            lambda m, x: m.last(m.every(x).tanh()[:, -1] + m.shift),
            every=nn.Linear(4, 4),
            last=nn.Linear(4, 3),
            shift=(4,),
        ),
        noise(6, 4),
    ),
    "fourier": lambda: (Net(spectral_convolution, weight=(4, 3, 3, 2)), noise(6, 3)),
    "added to a spectrum": lambda: one_weight(lambda w, x: (torch.fft.fft(x) + w).abs(), weight(4)),
    "times a spectrum": lambda: one_weight(lambda w, x: (torch.fft.fft(x) * w).abs(), weight(4)),
    "complex matrices": lambda: one_weight(
        lambda w, x: (torch.fft.fft(x) @ w.to(torch.complex128)).abs(), weight(4, 3)
    ),
    # autograd
    "two heads": lambda: (
        Net(two_heads, body=nn.Linear(4, 4), head=nn.Linear(4, 3), other=nn.Linear(4, 2)),
        noise(4),
    ),
    "custom function": lambda: (
        Net(
            lambda m, x: m.out(Quadratic.apply(x, m.weight, m.bias)),
            weight=(3, 4),
            bias=(3,),
            out=nn.Linear(3, 3),
        ),
        noise(2, 4),
    ),
    "an output that is not used": lambda: one_weight(
        lambda w, x: TwoOutputs.apply(x, w)[0], weight(4)
    ),
    "the other output": lambda: one_weight(lambda w, x: TwoOutputs.apply(x, w)[1].sin(), weight(4)),
    "force field": lambda: (
        Net(
            force_field,
            energy=nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1, bias=False)),
        ),
        noise(4),
    ),
    "in place": lambda: (Net(in_place, linear=nn.Linear(4, 4), gain=(4,), shift=(2,)), noise(4)),
    "views": lambda: (Net(views_out, linear=nn.Linear(4, 4), mix=nn.Linear(3, 3)), noise(3, 8)),
    "custom forward": shared_positions,
}
