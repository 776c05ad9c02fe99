"""Ω of any model as it is defined: each sample alone, plain autograd, |·| or ·², sum, divide by N.

Shares no code with mas_ext, so that the two can disagree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Call = Callable[[nn.Module, Any], Any]
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"abs": torch.abs, "square": torch.square}


def size(batch: Any) -> int:
    return len(next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)))


def cut(batch: Any, start: int, stop: int) -> Any:
    """Samples start to stop of a batch; a tensor of another length belongs to every sample."""
    total = size(batch)

    def of(leaf: Any) -> Any:
        is_batched = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == total
        return leaf[start:stop] if is_batched else leaf

    return tree_map(of, batch)


def split(batch: Any, sizes: Iterable[int]) -> Iterator[Any]:
    """The batch in batches of these sizes."""
    start = 0
    for count in sizes:
        yield cut(batch, start, start + count)
        start += count


def call(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def first_tensor(output: Any) -> Tensor:
    output = getattr(output, "logits", output)
    return output[0] if isinstance(output, (tuple, list)) else output


def squared_l2(rows: Tensor) -> Tensor:
    return rows.square().reshape(len(rows), -1).sum(1)


def _measured(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _means(model: nn.Module, samples: Iterable[Tensor]) -> dict[str, dict[str, Tensor]]:
    """By reduction: the mean over samples of Σ f(∂s/∂θ), where a sample has one s or several."""
    params = _measured(model)
    sums = {
        reduction: {n: torch.zeros_like(p, dtype=torch.float64) for n, p in params.items()}
        for reduction in REDUCTIONS
    }
    count = 0
    for scalars in samples:
        count += 1
        for scalar in scalars.flatten():
            grads = torch.autograd.grad(
                scalar, list(params.values()), allow_unused=True, retain_graph=True
            )
            for name, grad in zip(params, grads, strict=True):
                if grad is not None:
                    grad = grad.to_dense() if grad.layout != torch.strided else grad
                    for reduction, function in REDUCTIONS.items():
                        sums[reduction][name] += function(grad.double())
    return {r: {n: total / count for n, total in named.items()} for r, named in sums.items()}


def _evaluating(model: nn.Module) -> None:
    for module in model.modules():  # not model.eval(), which a model may override
        module.training = False


def by_reduction(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Callable[[Tensor], Tensor] = squared_l2,
    forward: Call | None = None,
    context: Callable[[], AbstractContextManager] = nullcontext,
    criterion: Callable[[Tensor, Any], Tensor] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Every sample in a batch of its own, by reduction. Leaves the model in evaluation mode.

    ``criterion`` takes the output and the batch, and may return several scalars for a sample.
    """

    def scalars() -> Iterator[Tensor]:
        for batch in batches:
            for k in range(size(batch)):
                sample = cut(batch, k, k + 1)
                with context():
                    output = first_tensor((forward or call)(model, sample))
                    found = criterion(output, sample) if criterion else objective(output)
                yield found

    _evaluating(model)
    return _means(model, scalars())


def one_by_one(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Callable[[Tensor], Tensor] = squared_l2,
    forward: Call | None = None,
    context: Callable[[], AbstractContextManager] = nullcontext,
    criterion: Callable[[Tensor, Any], Tensor] | None = None,
    reduction: str = "abs",
) -> dict[str, Tensor]:
    """The same for one reduction."""
    return by_reduction(model, batches, objective, forward, context, criterion)[reduction]


def row_by_row(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """One forward a batch, one backward a row: what Ω is when the forward has a memory."""
    _evaluating(model)
    return _means(model, (s for b in batches for s in squared_l2(first_tensor(call(model, b)))))[
        "abs"
    ]


def differences(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    rtol: float = 1e-10,
    floor: float = 1e-13,
) -> dict[str, float]:
    """Parameter → the largest error relative to its largest Ω, of those that are off.

    ``floor``, relative to the largest Ω of the model, is for parameters whose true gradient is
    zero and whose computed one is rounding: a key's bias under a softmax, say.
    """
    assert set(actual) == set(expected)
    top = max(float(value.max()) for value in expected.values() if value.numel())
    wrong = {}
    for name, value in expected.items():
        if value.numel() == 0:
            continue
        assert actual[name].shape == value.shape, name
        peak = float(value.max())
        error = float((actual[name].double() - value).abs().max())
        if not error <= max(rtol * peak, floor * top):
            wrong[name] = error / max(peak, floor * top)
    return wrong


def assert_exact(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], **bounds: float):
    wrong = differences(actual, expected, **bounds)
    assert not wrong, "relative errors: " + ", ".join(f"{n} {e:.2g}" for n, e in wrong.items())


@contextmanager
def refused_or(about: str) -> Iterator[None]:
    """The block ends well, or with an error of the kind that is meant and that speaks of this."""
    try:
        yield
    except (ValueError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        if not re.search(about, str(error)):
            raise
