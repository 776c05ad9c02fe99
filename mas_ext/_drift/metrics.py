"""How two outputs for the same samples are compared: KL divergence, relative, or a callable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from mas_ext.importance.outputs import classes_last

AT_ONCE = 2**24  # outputs that are compared at a time, in float32
IN_CACHE = 2**18  # the same on a CPU, per thread: most passes then read from its cache
Metric = str | Callable[[Tensor, Tensor], Tensor]


class Comparison(Protocol):
    """A metric. The drift is Σ distance / Σ weight over all references."""

    def kept(self, output: Tensor) -> Tensor:
        """What is kept of an output, to compare later ones with.

        Raises:
            ValueError: nothing could ever change by this metric.
        """

    def compare(self, kept: Tensor, output: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Distance and weight of a batch, 0-dim.

        Args:
            kept: what :meth:`kept` returned for an earlier output.
            output: the output now.
            mask: [B, T]: 0 at positions that do not count; None: all count.
        """


class KL:
    """KL(before ‖ now) in nats, summed over predictions; its weight is their number."""

    def kept(self, output: Tensor) -> Tensor:
        """log p in float16: as logits, which are normalized again when they are used.

        What the rounding adds is below 1e-5 nats, also with 100,000 classes.
        """
        logits = classes_last(output)
        if logits.shape[-1] < 2:
            raise ValueError(
                f"budget: the metric 'kl' compares probabilities of classes, and an output of "
                f"shape {list(output.shape)} has only one per prediction; pass "
                "DriftBudget(limit, metric='relative')"
            )
        return logits.float().log_softmax(-1).clamp_(min=-60_000).half()

    def compare(self, kept: Tensor, output: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :class:`Comparison`."""
        now = _as_before(classes_last(output), kept)
        at_once = IN_CACHE * torch.get_num_threads() if now.device.type == "cpu" else AT_ONCE
        rows = max(1, at_once // max(1, kept[0].numel()))
        kl = [self._rows(*pair) for pair in zip(kept.split(rows), now.split(rows), strict=True)]
        return _counted(torch.cat(kl), mask)

    def _rows(self, kept: Tensor, output: Tensor) -> Tensor:
        """Σ p/s (log p/s − log q), where s = Σ p is not quite 1, since p was rounded."""
        if torch.is_grad_enabled() and output.requires_grad:
            before = kept.float()
            p = before.exp()
            total = p.sum(-1)
            return (p * (before - output.float().log_softmax(-1))).sum(-1) / total - total.log()
        p, difference = kept.to(torch.float32, copy=True), output.float().log_softmax(-1)
        difference.sub_(p)
        total = p.exp_().sum(-1)
        return -(difference.mul_(p).sum(-1) / total + total.log())


class Relative:
    """‖now − before‖², summed; its weight is Σ‖before‖²."""

    def kept(self, output: Tensor) -> Tensor:
        """The output as it is."""
        return output.clone()

    def compare(self, kept: Tensor, output: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :class:`Comparison`."""
        before = kept.double()
        now = _as_before(output, before).double()
        change, size = _per_row(now - before, mask), _per_row(before, mask)
        return _counted(change, mask)[0], _counted(size, mask)[0]


class Custom:
    """A user's metric, summed over samples; its weight is their number."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._function = function

    def kept(self, output: Tensor) -> Tensor:
        """The output as it is."""
        return output.clone()

    def compare(self, kept: Tensor, output: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :class:`Comparison`."""
        values = self._function(kept, output)
        if not isinstance(values, Tensor) or values.shape != output.shape[:1]:
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"budget: the metric returned {got} for outputs of shape {list(output.shape)}; it "
                f"must return one number per sample, [{len(output)}]"
            )
        return _counted(values, None)


def resolve(metric: Any) -> Comparison:
    """The comparison that ``metric`` stands for; raises ValueError for an unknown name."""
    if callable(metric):
        return Custom(metric)
    if metric not in ("kl", "relative"):
        raise ValueError(f"metric: {metric!r} is unknown; use 'kl', 'relative' or a callable")
    return KL() if metric == "kl" else Relative()


def _as_before(now: Tensor, before: Tensor) -> Tensor:
    """Without the classes, or outputs, that have been added since."""
    if now.shape[:-1] != before.shape[:-1] or now.shape[-1] < before.shape[-1]:
        raise ValueError(
            f"budget: the model's output for the references had shape {list(before.shape)} when "
            f"the task began and has {list(now.shape)} now; only more outputs in the last "
            "dimension can be compared: the references are for a model with the same outputs"
        )
    return now[..., : before.shape[-1]]


def _per_row(values: Tensor, mask: Tensor | None) -> Tensor:
    """Σ v² per sample, or per position of a mask."""
    leading = 1 if mask is None else mask.dim()
    return values.square().flatten(leading).sum(-1) if values.dim() > leading else values.square()


def _counted(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    values = values.double()
    if mask is None:
        return values.sum(), values.new_full((), values.numel())
    counts = (mask != 0).to(values)
    return torch.where(counts != 0, values, 0.0).sum(), counts.sum()
