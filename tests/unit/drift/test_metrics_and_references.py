"""What the drift is: how outputs are compared, and on which samples."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax

from mas_ext import MAS, DriftBudget
from mas_ext._drift.sampling import ReferenceSampler
from tests.support.regularizers import assert_refused, assert_states_equal, move, refusal
from tests.support.zoo.layers import Net
from tests.support.zoo.small import images, mlp, vectors

X = vectors(12)


def began(model, data, budget=0.1, **options):
    """Its first task has ended."""
    mas = MAS(model, 1.0, budget=budget)
    mas.consolidate(data, **options)
    return mas


def seen(model, mas):
    """What the model is run on to measure the drift, in the order of the first numbers."""
    inputs = []
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: inputs.append(next(iter([*args, *kwargs.values()]))),
        with_kwargs=True,
    )
    mas.drift_measured()
    hook.remove()
    assert all(isinstance(x, torch.Tensor) for x in inputs)
    return inputs


def rows(inputs):
    return sorted(row.flatten().tolist() for batch in inputs for row in batch)


# -- metrics ---------------------------------------------------------------------------------------
def kl(before, now, keep):
    """Mean over predictions, the classes being last."""
    p, q = log_softmax(before, -1), log_softmax(now, -1)
    return (p.exp() * (p - q)).sum(-1)[keep].mean().item()


def relative(before, now, keep):
    return float((now - before)[keep].square().sum() / before[keep].square().sum())


def tagger():
    torch.manual_seed(0)
    return Net(lambda m, x, attention_mask=None: m.head(x), head=nn.Linear(6, 4)).double()


def segmenter():
    torch.manual_seed(0)
    return nn.Conv2d(2, 5, 3).double()


TOKENS = torch.randn(6, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
MASK = torch.arange(5) < torch.tensor([5, 1, 3, 2, 5, 4])[:, None]
# model, batch, where the classes are, which predictions count
FORMS = {
    "[B, C]": (mlp, X, -1, None),
    "[B, T, C]": (tagger, {"x": TOKENS}, -1, None),
    "[B, T, C], masked": (tagger, {"x": TOKENS, "attention_mask": MASK.long()}, -1, MASK),
    "[B, C, H, W]": (segmenter, images(4), 1, None),
}
METRICS = {"kl": (kl, 5e-3), "relative": (relative, 1e-12)}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("form", FORMS)
def test_the_drift_is_that_of_its_definition(form, metric):
    make, batch, dim, keep = FORMS[form]
    oracle, within = METRICS[metric]
    model = make()

    def output():
        with torch.no_grad():
            found = model(**batch) if isinstance(batch, dict) else model(batch)
        return found.movedim(dim, -1)

    before = output()
    keep = torch.ones(before.shape[:-1], dtype=torch.bool) if keep is None else keep
    mas = began(model, [batch], DriftBudget(0.1, metric))
    assert mas.drift_measured() == pytest.approx(0, abs=1e-5)
    move(model, 0.3)
    expected = oracle(before, output(), keep)
    assert expected > 0.01
    assert mas.drift_measured() == pytest.approx(expected, rel=within)


def test_a_callable_is_averaged_over_samples():
    model = mlp()
    mas = began(model, X.split(5), DriftBudget(0.1, lambda a, b: (b - a).abs().amax(1)))
    before = model(X)
    move(model)
    expected = (model(X) - before).abs().amax(1).mean().item()
    assert mas.drift_measured() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
@pytest.mark.parametrize("classes", [2, 1000, 50_000])
def test_what_is_kept_in_float16_adds_little(classes, scale):
    model = nn.Linear(4, classes, dtype=torch.float32)
    nn.init.normal_(model.weight, std=scale)
    mas = began(model, [torch.randn(8, 4)])
    assert 0 <= mas.drift_measured() + 1e-7 < 1e-5


def test_many_outputs_are_compared_in_pieces():
    model, x = nn.Linear(4, 100_000), torch.randn(8, 4)
    mas = began(model, [x])
    before = model(x).detach().double()
    move(model, 0.3)
    expected = kl(before, model(x).detach().double(), torch.ones(8, dtype=torch.bool))
    found = mas.drift_measured()
    assert found == pytest.approx(expected, rel=1e-3)
    assert mas.drift_measured() == found  # what was kept is as it was


# -- as a term of the loss -------------------------------------------------------------------------
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("form", FORMS)
def test_the_drift_as_a_loss_has_the_gradient_of_its_definition(form, metric):
    make, batch, dim, keep = FORMS[form]
    model = make()

    def output():
        return (model(**batch) if isinstance(batch, dict) else model(batch)).movedim(dim, -1)

    before = output().detach()
    mas = began(model, [batch], DriftBudget(0.1, metric))
    move(model, 0.3)
    loss = mas.drift_loss()
    assert loss.item() == pytest.approx(mas.drift_measured(), rel=1e-5)
    now = output()
    keep = torch.ones(before.shape[:-1], dtype=torch.bool) if keep is None else keep
    if metric == "kl":
        p, q = log_softmax(before, -1), log_softmax(now, -1)
        expected = (p.exp() * (p - q)).sum(-1)[keep].mean()
    else:
        expected = (now - before)[keep].square().sum() / before[keep].square().sum()
    params = list(model.parameters())
    grads, oracle = (torch.autograd.grad(value, params) for value in (loss, expected))
    for mine, theirs in zip(grads, oracle, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=5e-3, atol=1e-4)


def test_the_loss_is_the_mean_over_random_references():
    model = mlp()
    mas = began(model, X.split(5), DriftBudget(0.1, lambda a, b: (b - a).square().sum(1)))
    before = model(X)
    move(model, 0.3)
    each = (model(X) - before).square().sum(1).detach()
    assert len(mas.protected.state.drift.references.tasks[0].parts) > 1
    torch.manual_seed(0)
    found = torch.stack([mas.drift_loss(samples=1).detach() for _ in range(4000)])
    distance = (found[:, None] - each.float()).abs()
    assert distance.min(1).values.max() < 1e-6
    counts = distance.argmin(1).bincount(minlength=12)
    assert (counts - 4000 / 12).abs().max() < 4.5 * (4000 / 12) ** 0.5
    torch.manual_seed(0)
    assert torch.equal(mas.drift_loss(samples=1), found[0])


def test_the_loss_is_that_of_evaluation_and_leaves_the_model_in_its_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4))
    model.double()[1].eval()
    mas = began(model, [X])
    move(model, 0.3)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    assert mas.drift_loss().item() == pytest.approx(mas.drift_measured(), rel=1e-5)
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_before_the_first_task_ends_the_loss_is_zero_with_a_warning():
    with pytest.warns(UserWarning, match="consolidate"):
        assert MAS(mlp(), budget=0.1).drift_loss() == 0


@pytest.mark.parametrize("metric", METRICS)
def test_only_the_former_outputs_of_a_head_that_grew_count(metric):
    model = mlp()
    mas = began(model, [X], DriftBudget(0.1, metric))
    head, old = nn.Linear(8, 7).double(), model[2]
    before = model(X)
    with torch.no_grad():
        head.weight[:4], head.bias[:4] = old.weight, old.bias
    model[2] = head
    assert mas.drift_measured() == pytest.approx(0, abs=1e-5)
    move(model)
    oracle, within = METRICS[metric]
    expected = oracle(before, model(X)[:, :4], torch.ones(12, dtype=torch.bool))
    assert mas.drift_measured() == pytest.approx(expected, rel=within)
    model[2] = nn.Linear(8, 3).double()
    assert_refused(refusal(mas.drift_measured, ValueError, "budget"))


@pytest.mark.parametrize("metric", [*METRICS, lambda a, b: (b - a).square().sum(1)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_have_drifted_infinitely(metric, value):
    model = mlp()
    mas = began(model, [X], DriftBudget(0.1, metric))
    with torch.no_grad():
        model[2].weight[0, 0] = value
    assert mas.drift_measured() == math.inf


def single():
    return nn.Linear(6, 1).double()


REFUSED_OUTPUTS = {
    "one output": (single, X, "kl", ("kl", "relative")),
    "not finite": (mlp, torch.full_like(X, math.nan), "kl", ("budget",)),
    "infinite": (mlp, torch.full_like(X, math.inf), "relative", ("budget",)),
}


@pytest.mark.parametrize("case", REFUSED_OUTPUTS)
def test_references_without_a_drift_are_refused_and_change_nothing(case):
    make, reference, metric, words = REFUSED_OUTPUTS[case]
    model = make()
    mas = MAS(model, 1.0, budget=DriftBudget(0.1, metric))
    mas.update_importance([X[:3]])
    refused = refusal(lambda: mas.consolidate([X], reference=[reference]), ValueError, *words)
    assert_refused(refused, unchanged=(mas, model))
    assert (mas.num_tasks, mas.drift_measured()) == (0, 0.0)


@pytest.mark.parametrize("shape", [(), (4,), (12, 4), (12, 1), None], ids=str)
def test_a_callable_of_another_shape_is_refused(shape):
    result = 0.5 if shape is None else torch.zeros(shape)
    mas = began(mlp(), [X], DriftBudget(0.1, lambda a, b: result))
    assert_refused(refusal(mas.drift_measured, ValueError, "metric", "[12]"))


BAD_BUDGETS = {
    "text": (lambda: MAS(mlp(), budget="x"), TypeError, "budget"),
    "True": (lambda: MAS(mlp(), budget=True), TypeError, "budget"),
    "0": (lambda: DriftBudget(0), ValueError, "budget"),
    "negative": (lambda: DriftBudget(-0.1), ValueError, "budget"),
    "NaN": (lambda: DriftBudget(math.nan), ValueError, "budget"),
    "Inf": (lambda: DriftBudget(math.inf), ValueError, "budget"),
    "metric": (lambda: DriftBudget(0.1, "l2"), ValueError, "metric"),
    "samples": (lambda: DriftBudget(0.1, samples=0), ValueError, "samples"),
    "samples 1.5": (lambda: DriftBudget(0.1, samples=1.5), ValueError, "samples"),
    "every": (lambda: DriftBudget(0.1, every=0), ValueError, "every"),
    "every True": (lambda: DriftBudget(0.1, every=True), ValueError, "every"),
    "slack": (lambda: DriftBudget(0.1, slack=0.9), ValueError, "slack"),
    "slack NaN": (lambda: DriftBudget(0.1, slack=math.nan), ValueError, "slack"),
    "slack True": (lambda: DriftBudget(0.1, slack=True), TypeError, "slack"),
    "reference": (lambda: DriftBudget(0.1, reference=3), TypeError, "reference"),
    "forward": (lambda: DriftBudget(0.1, forward=3), TypeError, "forward"),
    "no budget": (lambda: MAS(mlp()).drift_measured(), ValueError, "budget"),
    "no budget, loss": (lambda: MAS(mlp()).drift_loss(), ValueError, "budget"),
    "no samples": (lambda: began(mlp(), [X]).drift_loss(samples=0), ValueError, "samples"),
    "no budget, settle": (lambda: MAS(mlp()).settle(), ValueError, "budget"),
    "no budget, reference": (lambda: began(mlp(), [X], None, reference=[X]), ValueError, "budget"),
    "empty reference": (lambda: began(mlp(), [X], reference=[]), ValueError, "reference"),
    "empty, too": (
        lambda: began(mlp(), [X], DriftBudget(0.1, reference=[])),
        *(ValueError, "reference"),
    ),
    "no data": (lambda: began(mlp(), None), RuntimeError, "data"),
}


@pytest.mark.parametrize("case", BAD_BUDGETS)
def test_refusals(case):
    assert_refused(refusal(*BAD_BUDGETS[case]))


# -- references ------------------------------------------------------------------------------------
def test_every_sample_and_every_pair_is_kept_as_often():
    """In batches of any size: 3 of 12 samples, by many seeds."""
    count, seeds = torch.zeros(12, 12), 4000
    for seed in range(seeds):
        sampler = ReferenceSampler(3, seed=(seed, 0))
        for batch in torch.arange(12.0)[:, None].split([5, 1, 4, 2]):
            sampler.add(batch)
        kept = torch.cat([one.batch.args[0][:, 0] for one in sampler.kept]).long()
        assert len(kept.unique()) == 3
        count[kept[:, None], kept] += 1
    for pairs, p in (
        (count.diag(), 3 / 12),
        (count[tuple(torch.triu_indices(12, 12, 1))], 6 / 132),
    ):
        assert (pairs - seeds * p).abs().max() < 4.5 * math.sqrt(seeds * p * (1 - p))


@pytest.mark.parametrize("samples", [1, 5, 12, 100])
@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 1, 4, 2], [2, 8, 2]], ids=str)
def test_at_most_so_many_in_batches_no_larger_than_the_datas(sizes, samples):
    model = mlp()
    inputs = seen(model, began(model, X.split(sizes), DriftBudget(0.1, samples=samples)))
    assert max(map(len, inputs)) <= max(sizes)
    kept = rows(inputs)
    assert len(kept) == min(samples, 12)
    assert all(row in rows([X]) for row in kept)
    assert len({tuple(row) for row in kept}) == len(kept)


def array_forward(model, batch):
    return model(torch.from_numpy(batch["x"]))


# Batches that hold the tensor x, and forward=.
FORMATS = {
    "tensor": (lambda x: x, None),
    "tuple": (lambda x: (x, x[:, :1]), None),
    "list": (lambda x: [x, None], None),
    "dict": (lambda x: {"input": x}, None),
    "forward": (lambda x: {"x": x, "n": 3}, lambda m, b: m(b["x"])),
    "array": (lambda x: {"x": x.numpy()}, array_forward),
}


@pytest.mark.parametrize("form", FORMATS)
def test_references_have_memory_of_their_own(form):
    """The loader may write its next batch to the same tensors."""
    make, forward = FORMATS[form]
    model, x = mlp(), X.clone()
    mas = began(model, [make(x)], forward=forward)
    x.zero_()
    inputs = seen(model, mas)
    assert rows(inputs) == rows([X])
    before = model(X)
    move(model)
    expected = kl(before, model(X), slice(None))
    assert mas.drift_measured() == pytest.approx(expected, rel=5e-3)


def test_sequences_of_any_length_are_kept():
    model = tagger()
    batches = [{"x": TOKENS[k : k + 2, : k + 1]} for k in (0, 2, 4)]
    batches.append({"x": TOKENS[2:3, :3]})
    assert rows(seen(model, began(model, batches))) == rows(b["x"] for b in batches)


def pooled(m, images):
    """[B, C] of a list of images, whatever their sizes."""
    return m.head(torch.stack([image.mean((1, 2)) for image in images]))


@pytest.mark.parametrize("count", [1, 3, 5, 12, 50])
def test_a_measurement_in_training_goes_on_where_the_last_one_ended(count):
    task = began(mlp(), X.split(5)).protected.state.drift.references.tasks[0]
    assert [part.samples for part in task.parts] == [5, 5, 2]

    def content(parts):
        inputs, kept = zip(*((part.batch.args[0], part.before[0]) for part in parts), strict=True)
        return torch.cat(inputs).tolist(), torch.cat(kept).tolist()

    inputs, kept = content(task.parts)
    for start in range(0, 30, 4):
        chosen = [(start + k) % 12 for k in range(min(count, 12))]
        parts = list(task.window(start, count))
        assert sum(part.samples for part in parts) == len(chosen)
        assert content(parts) == ([inputs[k] for k in chosen], [kept[k] for k in chosen])


@pytest.mark.parametrize("channels", [1, 3])
def test_lists_of_images_are_kept_whole(channels):
    pictures = [torch.rand(channels, 4 + k, 5, dtype=torch.float64) for k in (0, 0, 1, 2)]
    found = []

    def forward(m, images):
        found.append([image.clone() for image in images])
        return pooled(m, images)

    model = Net(forward, head=nn.Linear(channels, 3)).double()
    mas = began(model, [{"images": pictures[a:b]} for a, b in ((0, 1), (1, 2), (2, 4))])
    found.clear()
    mas.drift_measured()
    given, kept = (
        sorted(image.flatten().tolist() for one in lists for image in one)
        for lists in ([pictures], found)
    )
    assert kept == given


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_all_samples_share_stays_whole(count):
    """Also where a part of a batch has as many samples as it has rows."""
    table = torch.randn(count, 6, dtype=torch.float64)
    model = Net(lambda m, x, table: m.head(x @ table.T), head=nn.Linear(count, 3)).double()
    mas = began(model, [{"x": x, "table": table} for x in X.split(4)], DriftBudget(0.1, samples=5))
    assert mas.drift_measured() == pytest.approx(0, abs=1e-5)
    tables = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: tables.append(kwargs["table"]), with_kwargs=True
    )
    mas.drift_measured()
    assert_states_equal(tables, [table] * len(tables))


def test_what_cannot_be_told_from_samples_is_refused_unless_batches_stay_as_they_are():
    """All samples share a table with as many rows as a batch has samples."""
    table = torch.randn(4, 6, dtype=torch.float64)
    model = Net(lambda m, x, table: m.head(x @ table.T), head=nn.Linear(4, 3)).double()
    data = [{"x": x, "table": table} for x in X.split(4)]
    with pytest.raises(ValueError, match="reference"):
        began(model, data, DriftBudget(0.1, samples=5))
    mas = began(model, data, DriftBudget(0.1, samples=5), reference=data)
    assert mas.drift_measured() == pytest.approx(0, abs=1e-5)


def test_each_sample_keeps_its_own_entry_of_a_list():
    lengths = [1, 2, 3, 4]
    batches = [(TOKENS[:4, :5], lengths), (TOKENS[2:6, :5], lengths[::-1])]
    found = []

    def forward(m, batch):
        found.append(batch)
        return m(batch[0]).mean(1)

    mas = began(tagger(), batches, DriftBudget(0.1, samples=3), forward=forward)
    found.clear()
    mas.drift_measured()
    given = [(row.tolist(), n) for x, ns in batches for row, n in zip(x, ns, strict=True)]
    kept = [(row.tolist(), n) for x, ns in found for row, n in zip(x, ns, strict=True)]
    assert len(kept) >= 3
    assert all(sample in given for sample in kept)


def test_references_of_ones_own_leave_no_data_behind():
    mas = MAS(mlp(), budget=DriftBudget(0.1, reference=[X]))
    mas.update_importance([X + 77])
    assert not mas.state_dict().get("references")


def test_labels_are_not_kept():
    model, labels = mlp(), torch.full((12,), 77)
    for batch in ((X, labels), {"input": X, "labels": labels}):
        state = began(model, [batch]).state_dict()
        assert all(not (t == 77).any() for t in state["references"].values())


def test_calls_in_one_task_add_up():
    model = mlp()
    mas = MAS(model, budget=0.1)
    mas.update_importance([X[:3]])
    mas.update_importance(X[3:7].split(2))
    mas.consolidate([X[7:]])
    assert rows(seen(model, mas)) == rows([X])
    with pytest.raises(RuntimeError, match="broken"):
        mas.update_importance(broken())
    mas.consolidate([-X])
    assert rows(seen(model, mas)) == rows([X, -X])


def broken():
    yield 5 * X
    raise RuntimeError("broken")


def test_calls_in_one_task_may_have_different_forms():
    """Each with its own forward=."""
    model = mlp()
    mas = MAS(model, budget=0.1)
    mas.update_importance([X[:3]])
    mas.consolidate([{"x": X[3:]}], forward=lambda m, b: m(b["x"]))
    assert rows(seen(model, mas)) == rows([X])


def test_references_of_ones_own_replace_samples_of_the_data():
    model, held_out = mlp(), 3 * X
    mas = began(model, [X], reference=[held_out[:5], (held_out[5:7], 0)])
    assert rows(seen(model, mas)) == rows([held_out[:7]])
    mas.consolidate([X])
    assert rows(seen(model, mas)) == rows([held_out[:7], X])
    fixed = began(model, [X], DriftBudget(0.1, reference=iter(held_out.split(5)), samples=7))
    first = rows(seen(model, fixed))
    assert len(first) == 7
    assert all(row in rows([held_out]) for row in first)
    fixed.consolidate([X])
    assert rows(seen(model, fixed)) == first


def test_references_of_ones_own_do_without_samples_of_the_data():
    """As of a task that was measured without a budget."""
    model = mlp()
    plain = MAS(model, 1.0)
    plain.update_importance([X])
    mas = MAS(model, budget=0.1)
    mas.load_state_dict(plain.state_dict())
    mas.consolidate(reference=[X])
    assert rows(seen(model, mas)) == rows([X])


def test_a_task_begins_where_the_model_then_is():
    model = mlp()
    mas = began(model, [X])
    move(model)
    other = copy.deepcopy(model)
    mas.consolidate([-X])
    assert mas.drift_measured() == pytest.approx(0, abs=1e-5)
    move(model)
    both = torch.cat([X, -X])
    expected = kl(other(both), model(both), slice(None))
    assert mas.drift_measured() == pytest.approx(expected, rel=5e-3)
