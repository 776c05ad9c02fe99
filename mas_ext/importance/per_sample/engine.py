"""The exact estimator: makes and verifies a plan once, then takes one backward pass per target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mas_ext.importance.batches import Batch, CannotSplit, Inputs
from mas_ext.importance.estimation import Estimation
from mas_ext.importance.isolation import readable_graph
from mas_ext.importance.per_sample import self_check
from mas_ext.importance.per_sample.accumulation import BatchAccumulator
from mas_ext.importance.per_sample.graph import Graph, NoPlan
from mas_ext.importance.per_sample.parts import scalars_of_part
from mas_ext.importance.per_sample.plan import LARGE, SMALL, Plan, another_course, make_plan
from mas_ext.importance.per_sample.sample_assignment import assign_layouts, find_moved_rows

_KEPT = 64  # plans stored per model; every shape of the inputs has its own


class Plans:
    """The plans of one model; the most recently used one is last."""

    def __init__(self) -> None:
        self._plans: list[Plan] = []

    def find(self, graph: Graph) -> Plan | None:
        """The stored plan for a graph, or None."""
        plan = next((p for p in reversed(self._plans) if p.matches(graph, len(graph.root))), None)
        if plan is not None:
            self.keep(plan)
        return plan

    def know(self, graph: Graph) -> bool:
        """Whether there is a plan for a graph with this signature, possibly with other shapes."""
        return any(plan.signature == graph.signature for plan in self._plans)

    def keep(self, plan: Plan) -> None:
        """Stores a plan as the most recently used one."""
        self.forget(plan)
        self._plans = [*self._plans, plan][-_KEPT:]

    def forget(self, plan: Plan) -> None:
        """Removes a plan, so that the next batch makes a new one."""
        self._plans = [kept for kept in self._plans if kept is not plan]


_plans: WeakKeyDictionary[nn.Module, Plans] = WeakKeyDictionary()


def output(estimation: Estimation, batch: Batch) -> Tensor:
    """The output for a batch, with a graph that :func:`add_target` can read.

    Raises:
        ValueError: it depends on random numbers.
    """
    is_one = isinstance(batch, Inputs) and batch.size() == 1
    with nullcontext() if is_one else readable_graph():
        return _deterministic_output(estimation, batch)


def add_target(
    estimation: Estimation, batch: Batch, output: Tensor, limit: int, keep_graph: bool
) -> Tensor:
    """Adds Σ_k f(∂s_k/∂θ) of the batch's first samples, at most ``limit``, and returns their s_k.

    Args:
        batch: the batch with a target, if the criterion needs one.
        output: what :func:`output` returned for it.
        keep_graph: whether another target follows.

    Raises:
        ValueError: importance per sample is not defined for the model, or a value is NaN or Inf.
    """
    scalars = estimation.scalars_of(output, batch)
    count = min(len(scalars), limit)
    if len(scalars) == 1:
        estimation.add_gradient(scalars[0], keep_graph=keep_graph)
    elif count > 0 and scalars.requires_grad:
        _add_several(estimation, batch, scalars, count, keep_graph)
    return scalars[:count]


def _add_several(
    estimation: Estimation, batch: Batch, scalars: Tensor, count: int, keep_graph: bool
) -> None:
    dtype = torch.float16  # the loosest tolerance, until a graph tells
    if estimation.is_tensor_parallel:
        reasons = dict.fromkeys(estimation.params, _TENSOR_PARALLEL)
        _add_one_by_one(estimation, batch, reasons, scalars, count, dtype)
        return
    weights = torch.ones_like(scalars)
    weights[count:] = 0
    try:
        graph = Graph(scalars, {id(p): name for name, p in estimation.params.items()})
        dtype = graph.dtype
        with readable_graph():
            plan = _plan_for(estimation, batch, graph)
    except NoPlan as problem:
        reasons = dict.fromkeys(estimation.params, str(problem))
    else:
        with readable_graph():
            accumulator = BatchAccumulator(
                plan, graph, estimation.sums, estimation.reduction, keep_graph=keep_graph
            )
            unserved = accumulator.run(weights) if plan.groups else {}
        estimation.record_paths(plan.coverage())
        if unserved:
            _plans[estimation.model].forget(plan)
        reasons = plan.fallbacks | unserved
    _add_one_by_one(estimation, batch, reasons, scalars, count, dtype)


def _plan_for(estimation: Estimation, batch: Batch, graph: Graph) -> Plan:
    """A plan that is valid for this batch: a stored one, or a new one that was verified."""
    plans = _plans.setdefault(estimation.model, Plans())
    is_first_target = estimation.checked < estimation.batches  # of this batch
    plan = plans.find(graph)
    if plan is None:
        plan = _checked_plan(estimation, batch, graph, plans.know(graph))
        plans.keep(plan)
    elif is_first_target:
        _check_later_batch(estimation, batch, graph, plan)
    if is_first_target:
        estimation.checked = estimation.batches
        plan.batches += 1
    return plan.without(find_moved_rows(plan, graph)) if plan.may_move_rows else plan


def _add_one_by_one(
    estimation: Estimation,
    batch: Batch,
    reasons: Mapping[str, str],
    scalars: Tensor,
    count: int,
    dtype: torch.dtype,
) -> None:
    """Measures the parameters in ``reasons`` one sample at a time, and warns about them.

    Raises:
        ValueError: a sample gives another scalar alone than in the batch.
    """
    if not reasons:
        return
    estimation.warn_one_at_a_time(reasons)
    estimation.record_paths(dict.fromkeys(reasons, "one sample at a time"))
    if isinstance(batch, Inputs):
        alone = []
        for k in range(count):
            (scalar,) = scalars_of_part(estimation, batch, [k], scalars, None)
            estimation.add_gradient(scalar, reasons, keep_graph=True)
            alone.append(scalar.detach())
        if not self_check.agree(scalars.detach()[:count], torch.stack(alone), dtype):
            raise ValueError(_NOT_A_FUNCTION)
        return
    # How to divide a custom batch is not known: one backward pass per sample over the whole batch.
    scalars = estimation.scalars(batch)
    for k in range(count):
        estimation.add_gradient(scalars[k], reasons, keep_graph=True)


def _deterministic_output(estimation: Estimation, batch: Batch) -> Tensor:
    before = torch.get_rng_state()
    output = estimation.output(batch)
    drawn = not torch.equal(before, torch.get_rng_state())
    # A batch of one sample is not run again elsewhere, and forward may have its own generator.
    if drawn or (len(output) == 1 and estimation.batches == 0):
        again = estimation.output(batch)
        is_same = torch.equal if drawn else _about_equal
        if not is_same(output.detach(), again.detach()):
            raise ValueError(
                "the model's output depends on random numbers, also in evaluation mode: the "
                "importance for a sample is not defined. Look for dropout and noise that do not "
                "check whether the module is training"
            )
    return output


def _about_equal(a: Tensor, b: Tensor) -> bool:
    return self_check.agree(a, b, torch.float16)


def _checked_plan(estimation: Estimation, batch: Batch, graph: Graph, is_known: bool) -> Plan:
    """Makes a plan for the graph of a batch, and verifies it against ordinary autograd.

    Args:
        is_known: whether there is a plan for a graph with this signature and other shapes.

    Raises:
        NoPlan: no plan can be made for such graphs.
        ValueError: importance per sample is not defined for the model.
    """
    size = len(graph.root)
    chosen = [0, size // 2, size - 1]  # in order, as sorted sequences have to stay
    names = {id(p): name for name, p in estimation.params.items()}
    large = graph
    try:
        small = graph.root
        if size > SMALL:
            small = scalars_of_part(estimation, batch, chosen[:SMALL], graph.root, graph.dtype)
            _check_samples_are_independent(batch, graph, chosen[:SMALL], small)
        if is_known or size < LARGE:  # the rows of a few samples are enough, or too few
            part = scalars_of_part(estimation, batch, chosen, graph.root, graph.dtype)
            _check_samples_are_independent(batch, graph, chosen, part)
            large = Graph(part, names)
        # Before the passes with one sample, which are in vain where there is no plan.
        pair = Graph(small, names)
        plan = make_plan(large, pair, estimation.params)
        if not plan.matches(graph, size):
            raise NoPlan(another_course(size, LARGE))
        # Nor is there one where the data decides how many rows go where, as for experts.
        if size > LARGE and not plan.matches(pair, SMALL):
            raise NoPlan(another_course(size, SMALL))
        assign_layouts(plan, large)
        exact, decisions = _add_alone(estimation, batch, graph, chosen[:SMALL], plan)
    except CannotSplit as problem:
        if isinstance(batch, Inputs):  # then one sample at a time is not possible either
            raise
        raise NoPlan(
            f"the batch cannot be divided into samples: {problem}; yield batches whose tensors "
            "have the sample as dimension 0, or of one sample"
        ) from problem
    if decisions.names:
        _check_samples(estimation, batch, graph, range(size), decisions.names[0])
    _check_sums(estimation, plan, pair, exact)
    plan.decides = decisions.names[0] if decisions.names else None
    plan.decides_on_values = decisions.on_values
    return plan


def _add_alone(
    estimation: Estimation, batch: Batch, graph: Graph, chosen: Sequence[int], plan: Plan
) -> tuple[dict[str, Tensor], self_check.Decisions]:
    """Σ f(M_k) of samples that are alone, one after the other, so that one graph is in memory.

    Returns:
        The sums of the parameters that the plan serves; what forward decided for the first sample.
    """
    exact = {name: torch.zeros_like(estimation.sums[name]) for g in plan.groups for name in g.names}
    alone = []
    with self_check.recorded_decisions() as decisions:
        one = batch.take(chosen[:1], len(graph.root), estimation.division)
        scalar = estimation.unchecked_scalars_of(estimation.output(one), one)
    for k in chosen[1:]:
        estimation.add_gradient(scalar[0], names=exact, sums=exact, keep_graph=True)
        alone.append(scalar.detach())
        scalar = scalars_of_part(estimation, batch, [k], graph.root, graph.dtype)
    estimation.add_gradient(scalar[0], names=exact, sums=exact, keep_graph=True)
    alone.append(scalar.detach())
    _check_samples_are_independent(batch, graph, chosen, torch.cat(alone))
    return exact, decisions


def _check_sums(
    estimation: Estimation, plan: Plan, pair: Graph, exact: Mapping[str, Tensor]
) -> None:
    """Compares the plan's sums for two samples with ordinary autograd's.

    Parameters for which they disagree, or which the plan could not serve, fall back to one sample
    at a time.
    """
    if not plan.groups:
        return
    ours = {name: torch.zeros_like(total) for name, total in exact.items()}
    accumulator = BatchAccumulator(plan, pair, ours, estimation.reduction, learn=True)
    failed = accumulator.run(torch.ones_like(pair.root))
    served = {name: total for name, total in exact.items() if name not in failed}
    wrong = self_check.find_disagreements(ours, served, pair.dtype, estimation.reduction)
    plan.fall_back(wrong, _DISAGREES)
    for name, reason in failed.items():
        plan.fall_back([name], reason)


def _check_samples_are_independent(
    batch: Batch, graph: Graph, chosen: Sequence[int], part: Tensor
) -> None:
    """Checks that the chosen samples give the same scalars alone as in the batch.

    Raises:
        ValueError: they do not.
        NoPlan: they do not, and the batch is a custom one, which may have been divided wrongly.
    """
    if self_check.agree(graph.root.detach()[list(chosen)], part.detach(), graph.dtype):
        return
    if isinstance(batch, Inputs):
        raise ValueError(_NOT_A_FUNCTION)
    raise NoPlan(_OTHER_OUTPUTS)


def _check_later_batch(estimation: Estimation, batch: Batch, graph: Graph, plan: Plan) -> None:
    """Checks samples of a later batch, for whose values the plan was not verified.

    All are checked if the forward pass reads computed values into Python. Two are checked if it
    reads only masks and lengths, and otherwise in the first batch of each measurement and, ever
    more rarely, of those that the plan serves: a maximum over the batch may matter in some batches
    only, and at most one of two attains it.
    """
    size, number = len(graph.root), plan.batches
    if plan.decides_on_values:
        chosen: Sequence[int] = range(size)
    elif plan.decides or estimation.batches == 0 or number & (number - 1) == 0:
        first = int(number * 0.618034 % 1 * size)  # spread over the positions in a batch
        chosen = [first, (first + size // 2) % size]
    else:
        return
    _check_samples(estimation, batch, graph, chosen, plan.decides)


def _check_samples(
    estimation: Estimation, batch: Batch, graph: Graph, chosen: Sequence[int], decision: str | None
) -> None:
    """Checks that every chosen sample gives the same scalar alone as in the batch.

    A forward pass that reads its data may take another branch for a sample that is alone.

    Raises:
        ValueError: one does not.
        NoPlan: one does not, or the batch cannot be divided, and it is a custom one.
    """
    # With gradients: without them other kernels may run, and hooks on tensors cannot be registered.
    try:
        alone = torch.cat(
            [scalars_of_part(estimation, batch, [k], graph.root, None).detach() for k in chosen]
        )
    except CannotSplit as problem:
        if isinstance(batch, Inputs):
            raise
        raise NoPlan(str(problem)) from problem
    if not self_check.agree(graph.root.detach()[list(chosen)], alone, graph.dtype):
        if decision is None and not isinstance(batch, Inputs):
            raise NoPlan(_OTHER_OUTPUTS)
        hint = f" (It looks at the batch with {decision}.)" if decision else ""
        raise ValueError(_NOT_A_FUNCTION + hint)


_TENSOR_PARALLEL = (
    "the model is tensor-parallel, and this process sees only a part of each operation; measure "
    "fewer samples (max_samples=) if it takes too long"
)

_OTHER_OUTPUTS = (
    "forward gives other outputs for a part of the batch than for all of it; make it treat "
    "every row of its tensors alike, or yield batches of one sample"
)

_DISAGREES = (
    "its importance in a batch differs from that of single samples; check the custom autograd "
    "functions and the rules (register_rule) that its gradient passes through"
)

_NOT_A_FUNCTION = (
    "the model's output for a sample depends on the other samples in its batch, or on the call: "
    "importance per sample is not defined. Look for batch statistics, operations across dimension "
    "0, a dimension 0 that is not the sample, and state that forward changes; normalisation has to "
    'be in evaluation mode. estimator="batch" measures the batch as a whole'
)
