r"""What is differentiated: one scalar per sample, made from the model's output and a target.

A criterion has one or several targets per sample, such as each class. Ω is the sum over targets of
:math:`w \cdot f(\partial s / \partial\theta)`, where f is the reduction, |·| or (·)², and w the
target's weight. A new criterion is a function and a row in :data:`CRITERIA`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mas_ext.importance import objectives
from mas_ext.importance.batches import Batch, Target, labels_in, mask_in
from mas_ext.importance.objectives import Objective
from mas_ext.importance.outputs import at_least_float32, classes_last
from mas_ext.importance.reductions import REDUCTIONS, Reduction

CriterionOption = str | Callable[[Tensor, Any], Tensor]

MAS = "mas"
IGNORED = -100  # the label of a position that does not count, as for torch.nn.CrossEntropyLoss


@dataclass(frozen=True)
class Situation:
    """What a criterion finds its targets from.

    Attributes:
        model: the model.
        batch: the batch that it was run on.
        output: its output [B, …].
        draws: how many targets to draw, where they are drawn.
        seed: of these draws.
        outputs: the names of the model's outputs, which are side by side in ``output``.
    """

    model: nn.Module
    batch: Batch
    output: Tensor
    draws: int
    seed: int
    outputs: tuple[str, ...] = ()

    @property
    def generator(self) -> torch.Generator:
        """A new generator on the output's device."""
        return torch.Generator(self.output.device).manual_seed(self.seed)

    @cached_property
    def logits(self) -> Tensor:
        """The output as logits [B, …, classes], in float32 at least, without a graph.

        Raises:
            ValueError: there are fewer than two classes, or several outputs.
        """
        if len(self.outputs) > 1:
            raise ValueError(
                f"criterion: the Fisher information needs the classes of one output, and the model "
                f"has the outputs {', '.join(self.outputs)}; pass forward=, a callable(model, "
                "batch) that returns the logits, or use criterion='gauss_newton', 'mas' or a "
                "callable"
            )
        logits = at_least_float32(classes_last(self.output.detach()))
        if logits.shape[-1] < 2:
            raise ValueError(
                f"criterion: the Fisher information needs the probabilities of classes, and an "
                f"output of shape {list(self.output.shape)} has only one per prediction; use "
                "criterion='gauss_newton', 'mas' or a callable"
            )
        return logits

    @cached_property
    def labels(self) -> Tensor | None:
        """The batch's labels, one per prediction or a distribution, or None if it has none.

        Causal language models predict the next token, so their labels are moved by one position.
        """
        labels, shape = labels_in(self.batch.content), self.logits.shape
        if not isinstance(labels, Tensor) or labels.is_complex():
            return None
        is_distribution = labels.is_floating_point()
        if labels.shape != (shape if is_distribution else shape[:-1]):
            self._check_classes_are_last(labels)
            return None
        labels = labels.to(self.output.device, labels.dtype if is_distribution else torch.long)
        if len(shape) > 2 and predicts_next_token(self.model):
            nothing = 0 if is_distribution else IGNORED
            return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], nothing)], 1)
        return labels

    def _check_classes_are_last(self, labels: Tensor) -> None:
        """Raises ValueError if the labels show that an output is [B, C, T]."""
        shape = self.output.shape
        if len(shape) == 3 and labels.shape == (shape[0], shape[2]):
            raise ValueError(
                f"criterion: an output of three dimensions is [B, T, C], and labels of shape "
                f"{list(labels.shape)} say that {list(shape)} is [B, C, T]; transpose it: "
                "forward=lambda model, batch: model(batch[0]).transpose(1, 2)"
            )

    @property
    def counts(self) -> Tensor | None:
        """Which predictions count; None if all do: neither ignored labels nor padding."""
        labels = self.labels
        if labels is not None and not labels.is_floating_point():
            return labels != IGNORED
        mask = mask_in(self.batch.content, self.output)
        return None if mask is None else mask != 0

    def target(self, values: Tensor, weight: Tensor | float = 1.0) -> Target:
        """A target for each sample."""
        weights = torch.as_tensor(weight, dtype=self.logits_dtype, device=self.output.device)
        return Target(values, weights.expand(len(self.output)))

    @property
    def logits_dtype(self) -> torch.dtype:
        """The dtype that scalars are computed in."""
        return at_least_float32(self.output[:0]).dtype


# ==================================================================================================
# Scalars: (output [B, …], values of the target [B, …]) → s [B]
# ==================================================================================================
def negative_log_likelihood(output: Tensor, labels: Tensor) -> Tensor:
    """−log p(y|x), summed over a sample's predictions without those whose label is ignored."""
    logits = at_least_float32(classes_last(output))
    if labels.is_floating_point():
        # A class that is masked out has an infinite logit, and may have no probability.
        likelihoods = logits.log_softmax(-1).masked_fill(labels == 0, 0.0)
        return -(labels * likelihoods).flatten(1).sum(1)
    losses = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(len(output), -1).sum(1)


def inner_product(output: Tensor, cotangent: Tensor) -> Tensor:
    """vᵀF(x)."""
    return (at_least_float32(output) * cotangent).reshape(len(output), -1).sum(1)


# ==================================================================================================
# Targets: Situation → the targets of its batch
# ==================================================================================================
def given_labels(situation: Situation) -> Iterator[Target]:
    """The labels of the batch.

    Raises:
        ValueError: it has none that suit the output, or a label is no class.
    """
    labels, classes = situation.labels, situation.logits.shape[-1]
    if labels is None:
        shape = list(situation.logits.shape)
        raise ValueError(
            f"criterion='empirical_fisher' needs labels: class numbers {shape[:-1]}, or "
            f"probabilities {shape}. The batch has {_found_in(situation.batch.content)}; yield "
            "(input, labels) or a mapping with 'labels', or use criterion='fisher', which draws "
            "labels from the model"
        )
    if labels.is_floating_point():
        sums = labels.double().sum(-1)
        is_one = torch.isclose(sums, torch.ones_like(sums), rtol=1e-2, atol=1e-2)
        if (labels < 0).any() or not (is_one | (sums == 0)).all():
            raise ValueError(
                "criterion='empirical_fisher': floating-point labels are probabilities, and these "
                "are negative or do not add up to 1; pass class numbers, or for regression use "
                "criterion='gauss_newton'"
            )
    else:
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
        if len(wrong):
            raise ValueError(
                f"criterion='empirical_fisher': the label {int(wrong[0])} is none of the output's "
                f"{classes} classes; number them from 0, with {IGNORED} for what does not count"
            )
    yield situation.target(labels)


def _found_in(content: Any) -> str:
    """What a batch has in place of labels, in words."""
    if isinstance(content, (tuple, list)) and len(content) > 2:
        return f"{len(content)} items, of which it is unclear which are labels"
    labels = labels_in(content)
    if isinstance(labels, Tensor):
        return f"{labels.dtype} labels of shape {list(labels.shape)}"
    return "none" if labels is None else f"a {type(labels).__name__}, which is not a tensor"


def drawn_labels(situation: Situation) -> Iterator[Target]:
    """Labels drawn from the model's own probabilities."""
    logits, counts, generator = situation.logits, situation.counts, situation.generator
    # NaN cannot be drawn from; it is found in the scalars.
    probabilities = logits.softmax(-1).flatten(0, -2).nan_to_num(1.0)
    for _ in range(situation.draws):
        drawn = torch.multinomial(probabilities, 1, replacement=True, generator=generator)
        labels = drawn.view(logits.shape[:-1])
        labels = labels if counts is None else labels.masked_fill(~counts, IGNORED)
        yield situation.target(labels, 1 / situation.draws)


def every_class(situation: Situation) -> Iterator[Target]:
    """Each class, weighted by its probability.

    Raises:
        ValueError: a sample has several predictions.
    """
    logits = situation.logits
    if logits.dim() > 2:
        raise ValueError(
            f"criterion='exact_fisher' goes through the classes of one prediction per sample, and "
            f"an output of shape {list(situation.output.shape)} has several; use "
            "criterion='fisher', which draws labels for all of them at once"
        )
    probabilities = logits.softmax(-1)
    likely = probabilities.argmax(-1)
    for label in range(logits.shape[-1]):
        weight = probabilities[:, label]
        # A class that is masked out has an infinite logit, which no gradient passes through.
        yield situation.target(torch.where(weight > 0, label, likely), weight)


def normal_cotangents(situation: Situation) -> Iterator[Target]:
    """Cotangents of independent standard normal numbers."""
    shape, generator, output = situation.output.shape, situation.generator, situation.output
    for _ in range(situation.draws):
        cotangent = torch.randn(
            shape, generator=generator, device=output.device, dtype=situation.logits_dtype
        )
        yield situation.target(cotangent, 1 / situation.draws)


# ==================================================================================================
# Criteria
# ==================================================================================================
@dataclass(frozen=True)
class Criterion:
    """What is differentiated.

    Attributes:
        scalar: the function of output and target.
        targets: finds the targets; None if there are none, and ``scalar`` gets the batch's content.
        reduction: the name of the reduction that belongs to it.
        is_drawn: whether targets are drawn at random, so that ``draws`` and ``seed`` matter.
    """

    scalar: Callable[[Tensor, Any], Tensor]
    targets: Callable[[Situation], Iterator[Target]] | None = None
    reduction: str = "square"
    is_drawn: bool = False

    def targeted(self, situation: Situation) -> Iterator[Batch]:
        """The batch with each of its targets."""
        if self.targets is None:
            yield situation.batch
            return
        for target in self.targets(situation):
            yield situation.batch.with_target(target)

    def scalars(self, output: Tensor, batch: Batch, reduction: Reduction) -> Tensor:
        """s [B] of which f(∂s/∂θ) counts: a target's weight is included."""
        if batch.target is None:
            return self.scalar(output, batch.content)
        return self.scalar(output, batch.target.values) * reduction.root(batch.target.weight)

    def energy(self, scalars: Tensor, batch: Batch, reduction: Reduction) -> Tensor:
        """What :meth:`scalars` contribute to the mean of s over a sample's targets, [B]."""
        if batch.target is None:
            return scalars.detach()
        weight = batch.target.weight[: len(scalars)]
        return scalars.detach() * (weight / reduction.root(weight)).nan_to_num(0.0)


CRITERIA: dict[str, Criterion] = {
    "empirical_fisher": Criterion(negative_log_likelihood, given_labels),
    "fisher": Criterion(negative_log_likelihood, drawn_labels, is_drawn=True),
    "exact_fisher": Criterion(negative_log_likelihood, every_class),
    "gauss_newton": Criterion(inner_product, normal_cotangents, is_drawn=True),
}
NAMES = (MAS, *CRITERIA)


def resolve(criterion: CriterionOption, objective: Objective) -> Criterion:
    """The criterion that the options stand for.

    Raises:
        ValueError: an unknown name; later, a callable's result that is not [B].
    """
    if callable(criterion):
        return Criterion(_checked(criterion, "criterion"), reduction="abs")
    if criterion == MAS:
        function = objectives.resolve(objective)
        return Criterion(_checked(lambda output, _: function(output), "objective"), None, "abs")
    if not isinstance(criterion, str) or criterion not in CRITERIA:
        names = ", ".join(map(repr, NAMES))
        raise ValueError(f"criterion: {criterion!r} is unknown; use {names} or a callable")
    return CRITERIA[criterion]


def reduction_of(criterion: Criterion, name: str | None) -> Reduction:
    """The reduction of this name; None for the criterion's own."""
    name = criterion.reduction if name is None else name
    if not isinstance(name, str) or name not in REDUCTIONS:
        known = " or ".join(map(repr, REDUCTIONS))
        raise ValueError(f"reduction: {name!r} is unknown; use {known}, or None")
    return REDUCTIONS[name]


def seed_of(seed: int, rank: int, samples: int) -> int:
    """The seed of a batch's draws: another one for every rank and every batch."""
    digest = hashlib.blake2b(f"{seed} {rank} {samples}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def predicts_next_token(model: nn.Module) -> bool:
    """Whether it is, or has inside, a causal language model of transformers."""
    return any(_is_causal(module) for module in model.modules())


def _is_causal(module: nn.Module) -> bool:
    generates = getattr(module, "can_generate", None)
    is_encoder_decoder = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    return callable(generates) and bool(generates()) and not is_encoder_decoder


def _checked(function: Callable[[Tensor, Any], Tensor], argument: str) -> Any:
    def scalars(output: Tensor, content: Any) -> Tensor:
        result = function(output, content)
        if not isinstance(result, Tensor) or result.shape != output.shape[:1]:
            got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(
                f"{argument}: the callable returned {got} for an output of shape "
                f"{list(output.shape)}; it must return one scalar per sample, [{len(output)}]"
            )
        return result

    return scalars
