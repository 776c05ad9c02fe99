"""Hand-written modules for the zoo: each uses its parameters in a way that no nn layer does."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def weight(*shape: int) -> nn.Parameter:
    """Of scale 1/√fan-in, so that deep stacks neither vanish nor explode."""
    return nn.Parameter(torch.randn(shape) / max(shape[-1], 1) ** 0.5)


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.body(x)


class TimeFirst(nn.Module):
    """A layer that wants time first, for batches whose dimension 0 is the sample."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        output = self.layer(x.transpose(0, 1))
        return (output[0] if isinstance(output, tuple) else output).transpose(0, 1)


class TimeFirstAttention(nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(*args, **kwargs)

    def forward(self, query, key, value):
        turned = (t.transpose(0, 1) for t in (query, key, value))
        return self.attention(*turned)[0].transpose(0, 1)


class LearnedStart(nn.Module):
    """A GRU with a learned initial state, repeated for the batch in dimension 1."""

    def __init__(self, d, h):
        super().__init__()
        self.start = weight(1, 1, h)
        self.gru = nn.GRU(d, h, batch_first=True)

    def forward(self, x):
        return self.gru(x, self.start.repeat(1, len(x), 1))[0]


class HandRNN(nn.Module):
    """The same weights at every step."""

    def __init__(self, d, h):
        super().__init__()
        self.inward, self.recurrent, self.bias = weight(h, d), weight(h, h), weight(h)

    def forward(self, x):
        state = x.new_zeros(len(x), len(self.bias))
        for step in x.unbind(1):
            state = torch.tanh(step @ self.inward.T + state @ self.recurrent.T + self.bias)
        return state


class Twice(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.linear = nn.Linear(d, d)

    def forward(self, x):
        return self.linear(torch.tanh(self.linear(x)))


class TiedLM(nn.Module):
    def __init__(self, vocabulary, d):
        super().__init__()
        self.embedding, self.body = nn.Embedding(vocabulary, d), nn.Linear(d, d)
        self.head = nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.body(self.embedding(x))))


class Gain(nn.Module):
    """A scalar parameter for a whole tensor, and one through its exponential (CLIP's)."""

    def __init__(self, d):
        super().__init__()
        self.linear = nn.Linear(d, d)
        self.gain, self.log_scale = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return torch.sin(self.gain * self.linear(x)) * self.log_scale.exp()


class ClassToken(nn.Module):
    def __init__(self, t, d):
        super().__init__()
        self.token, self.position = weight(1, 1, d), weight(1, t + 1, d)
        self.layer = nn.TransformerEncoderLayer(d, 2, 2 * d, batch_first=True)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.layer(x)[:, 0]


class LearnedQueries(nn.Module):
    """Attention pooling: the queries are parameters, repeated for the batch before a bmm."""

    def __init__(self, n, d):
        super().__init__()
        self.queries, self.key = weight(n, d), nn.Linear(d, d)

    def forward(self, x):
        queries = self.queries.repeat(len(x), 1, 1)
        return torch.bmm(torch.bmm(queries, self.key(x).transpose(1, 2)).softmax(-1), x)


class Prefix(nn.Module):
    """Prefix tuning: learned keys and values before those of the input."""

    def __init__(self, n, d):
        super().__init__()
        self.keys, self.values, self.project = weight(n, d), weight(n, d), nn.Linear(d, d)

    def forward(self, x):
        k, v = (
            torch.cat([p.expand(len(x), -1, -1), self.project(x)], 1)
            for p in (self.keys, self.values)
        )
        return F.scaled_dot_product_attention(x, k, v)


class MaskToken(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.token, self.linear = weight(d), nn.Linear(d, d)

    def forward(self, x, mask):
        return self.linear(torch.where(mask.unsqueeze(-1), self.token, x)).tanh()


class Heads(nn.Module):
    """Projections to heads and back by einsum with 3-d weights."""

    def __init__(self, d, h, e):
        super().__init__()
        self.split, self.join = weight(h, d, e), weight(h, e, d)

    def forward(self, x):
        heads = torch.einsum("btd,hde->bthe", x, self.split).tanh()
        return torch.einsum("bthe,hed->btd", heads, self.join)


class SplitHeads(nn.Module):
    """einsum whose operands both have the head: becomes a bmm over heads, rows of B×T."""

    def __init__(self, h, d, e):
        super().__init__()
        self.weight = weight(h, d, e)

    def forward(self, x):
        return torch.einsum("bthd,hde->bthe", x, self.weight)


class Prototypes(nn.Module):
    """Rows of a parameter picked by ids of the sample, by indexing and by index_select."""

    def __init__(self, n, d):
        super().__init__()
        self.prototypes, self.offsets = weight(n, d), weight(n)

    def forward(self, x, ids):
        return (x - self.prototypes[ids]).tanh() * self.offsets.index_select(0, ids)[:, None]


class Distances(nn.Module):
    def __init__(self, n, d):
        super().__init__()
        self.centres = weight(n, d)

    def forward(self, x):
        return torch.cdist(x, self.centres)


class Slices(nn.Module):
    """Overlapping slices of one weight, as in supernets and nested representations."""

    def __init__(self, d, h):
        super().__init__()
        self.weight, self.bias = weight(h, d), weight(h)

    def forward(self, x):
        parts = [F.linear(x[:, :k], self.weight[:n, :k], self.bias[:n]) for n, k in SLICES]
        return torch.cat(parts, 1).tanh()


SLICES = [(2, 3), (4, 5), (3, 4)]


class StandardisedConv(nn.Conv2d):
    """Weight standardisation: the convolution's weight is computed from the parameter."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(x, w, self.bias)


class CosineHead(nn.Module):
    def __init__(self, d, n):
        super().__init__()
        self.weight = weight(n, d)

    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


class LowRank(nn.Module):
    """LoRA by hand, B·A formed first: a sub-graph of parameters only, and the weight directly."""

    def __init__(self, d, n, rank):
        super().__init__()
        self.weight, self.a, self.b = weight(n, d), weight(rank, d), weight(n, rank)

    def forward(self, x):
        return F.linear(x, self.weight + self.b @ self.a).tanh() @ self.weight


class VectorWeight(nn.Module):
    """matmul with a vector, and an output [B]."""

    def __init__(self, d):
        super().__init__()
        self.weight, self.bias = weight(d), weight(1)

    def forward(self, x):
        return torch.tanh(x @ self.weight + self.bias)


class Columns(nn.Module):
    """Samples as columns: the weight is the matrix product's left operand."""

    def __init__(self, d, h):
        super().__init__()
        self.weight, self.bias, self.out = weight(h, d), weight(h, 1), weight(d, h)

    def forward(self, x):
        hidden = torch.addmm(self.bias, self.weight, x.T).tanh()
        return (self.out @ hidden).T


class ScaledAddmm(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.bias, self.weight, self.batched = weight(h), weight(d, h), weight(1, h, 2)

    def forward(self, x):
        hidden = torch.addmm(self.bias, x, self.weight, beta=0.3, alpha=-1.7).tanh()
        batched = self.batched.expand(len(x), -1, -1)
        return torch.baddbmm(self.bias[:2], hidden.unsqueeze(1), batched, beta=0.5, alpha=2.0)


class LastToken(nn.Module):
    """A parameter that only the last token meets, after a layer that all meet."""

    def __init__(self, d):
        super().__init__()
        self.every, self.last, self.shift = nn.Linear(d, d), nn.Linear(d, 3), weight(d)

    def forward(self, x):
        return self.last(self.every(x).tanh()[:, -1] + self.shift)


class RelativeBias(nn.Module):
    """A table of parameters, indexed by position only, added to every sample's scores."""

    def __init__(self, t, d):
        super().__init__()
        self.table, self.project = weight(2 * t - 1), nn.Linear(d, 3 * d)
        positions = torch.arange(t)
        self.register_buffer("index", positions[:, None] - positions[None, :] + t - 1)

    def forward(self, x):
        q, k, v = self.project(x).chunk(3, -1)
        return (q @ k.transpose(1, 2) + self.table[self.index]).softmax(-1) @ v


class Gated(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(d, h), nn.Linear(d, h), nn.Linear(h, d)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class TwoHeads(nn.Module):
    """Only the logits count; the other head is in the output's graph, but not in the logits'."""

    def __init__(self, d):
        super().__init__()
        self.body, self.head, self.other = nn.Linear(d, d), nn.Linear(d, 3), nn.Linear(d, 2)

    def forward(self, x):
        hidden = self.body(x).tanh()
        return SimpleNamespace(hidden=hidden, logits=self.head(hidden), aux=self.other(hidden))


class RMSNorm(nn.Module):
    """Written out, as in most language models."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class _Quadratic(torch.autograd.Function):
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


class CustomFunction(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.weight, self.bias, self.out = weight(h, d), weight(h), nn.Linear(h, 3)

    def forward(self, x):
        return self.out(_Quadratic.apply(x, self.weight, self.bias))


class TwoViews(nn.Module):
    """Both views of every sample through the layers as one batch of 2B rows (Siamese)."""

    def __init__(self, d):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, 3))

    def forward(self, x):
        first, second = self.body(torch.cat([x, x.flip(1)], 0)).chunk(2)
        return first * second


class Crops(nn.Module):
    """The other order of such rows: the views of a sample lie side by side."""

    def __init__(self, d):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, 3))

    def forward(self, x):
        crops = x.repeat_interleave(3, 0)
        crops = crops * torch.linspace(0.5, 1, 3, dtype=x.dtype).repeat(len(x))[:, None]
        return self.body(crops).view(len(x), 3, -1).amax(1)


class BatchAsChannels(nn.Module):
    """The batch folded into the channels of one grouped convolution (modulated convolutions)."""

    def __init__(self, c, n):
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.randn(n, c, 3, 3) / 3), nn.Linear(c, c)

    def forward(self, x):
        b, c, h, w = x.shape
        style = self.style(x.mean((2, 3)))[:, None, :, None, None]
        weights = (self.weight * style).flatten(0, 1)  # a weight of its own for every sample
        y = F.conv2d(x.reshape(1, b * c, h, w), weights, padding=1, groups=b)
        return y.view(b, -1, h, w)


class PointwiseOverBatch(nn.Module):
    """The batch as the length of a convolution of width 1: samples do not meet."""

    def __init__(self, d, n):
        super().__init__()
        self.conv = nn.Conv1d(d, n, 1)

    def forward(self, x):
        return self.conv(x.T.unsqueeze(0)).squeeze(0).T


class Hypernetwork(nn.Module):
    """Weights computed from the input, one matrix a sample."""

    def __init__(self, d, h):
        super().__init__()
        self.make, self.shape = nn.Linear(d, h * d), (h, d)

    def forward(self, x):
        weights = self.make(x).view(-1, *self.shape)
        return torch.bmm(weights, x.unsqueeze(2)).squeeze(2)


class Fourier(nn.Module):
    """A spectral convolution; its complex weight is a view of a real parameter."""

    def __init__(self, t, d):
        super().__init__()
        self.weight = weight(t // 2 + 1, d, d, 2)

    def forward(self, x):
        spectrum = torch.fft.rfft(x, dim=1)
        mixed = torch.einsum("btd,tde->bte", spectrum, torch.view_as_complex(self.weight))
        return torch.fft.irfft(mixed, n=x.shape[1], dim=1)


class Functional(nn.Module):
    """Its layer is called with parameters computed from the layer's own, and under vmap."""

    def __init__(self, d):
        super().__init__()
        self.layer, self.scale = nn.Linear(d, d), nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        scaled = {name: p * self.scale for name, p in self.layer.named_parameters()}
        return torch.vmap(lambda row: torch.func.functional_call(self.layer, scaled, row))(x).tanh()


class ForceField(nn.Module):
    """The output is itself a gradient: the graph holds the backward of its own forward."""

    def __init__(self, d, h):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(d, h), nn.Tanh(), nn.Linear(h, 1, bias=False))

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return -force


class ParametersOut(nn.Module):
    """The output is a parameter, the same for all samples, next to one that depends on them."""

    def __init__(self, d):
        super().__init__()
        self.constant, self.linear = weight(d), nn.Linear(d, d)

    def forward(self, x):
        return torch.stack([self.constant.expand_as(x), self.linear(x)], 1)


class InPlace(nn.Module):
    """In-place operations on results, on views of them, and on a freshly made buffer."""

    def __init__(self, d):
        super().__init__()
        self.linear, self.gain, self.shift = nn.Linear(d, d), weight(d), weight(2)

    def forward(self, x):
        y = self.linear(x).mul_(self.gain)
        y[:, :2] += self.shift
        y.tanh_()
        out = y.new_zeros(len(y), y.shape[1] + 1)
        out[:, 1:] = y
        out[:, 0] = self.shift.sum()
        return out.sin_()


class ViewsOut(nn.Module):
    """Outputs and inner tensors that are views, not contiguous, or expanded."""

    def __init__(self, t, d):
        super().__init__()
        self.linear, self.mix = nn.Linear(d, d), nn.Linear(t, t)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(self.linear(x[:, :, ::2]).transpose(1, 2))
        return y.unsqueeze(1).expand(-1, 2, -1, -1).transpose(2, 3)[..., 1:]
