"""Fisher informations and other criteria: against equations, and autograd of one sample a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mas_ext import EWC, estimate_importance
from mas_ext.importance import criteria
from tests.support import zoo
from tests.support.oracle import REDUCTIONS, assert_exact, one_by_one, split
from tests.support.regularizers import assert_states_equal
from tests.support.targets import IGNORED, judged, scalar_of, targets
from tests.support.unchanged import snapshot, used_model
from tests.support.zoo.layers import Net
from tests.support.zoo.models import transformer
from tests.support.zoo.small import assert_same, convnet, ids, images, mlp, padding, vectors

FAST = pytest.mark.filterwarnings("error:the importance of")
EITHER = pytest.mark.parametrize("reduction", REDUCTIONS)
X, Y = vectors(), torch.arange(10) * 7 % 4


# -- Softmax regression, where the equations are known ---------------------------------------------
def regression() -> tuple[nn.Linear, Tensor]:
    """And its probabilities."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    return model, model(X).softmax(1).detach()


def of_each_class(squares: Tensor, power: int = 2) -> dict[str, Tensor]:
    """The mean of squares_kc · x_ki², and of squares_kc."""
    return {"weight": squares.T @ X.abs() ** power / len(X), "bias": squares.mean(0)}


def test_exact_fisher_analytically():
    model, p = regression()
    omega = estimate_importance(model, X.split(4), criterion="exact_fisher")
    assert_same(omega, of_each_class(p * (1 - p)))
    assert omega.energy == pytest.approx(-(p * p.log()).sum(1).mean().item())


@pytest.mark.parametrize("form", ["numbers", "int32", "uint8", "one hot", "probabilities"])
def test_empirical_fisher_analytically(form):
    model, p = regression()
    true = nn.functional.one_hot(Y, 4).double()
    if form == "probabilities":
        true = torch.rand(10, 4).double().softmax(1)
    narrow = {"int32": Y.int(), "uint8": Y.byte()}
    labels = narrow.get(form, Y if form == "numbers" else true)
    data = list(zip(X.split(4), labels.split(4), strict=True))
    omega = estimate_importance(model, data, criterion="empirical_fisher")
    assert_same(omega, of_each_class((p - true) ** 2))
    assert omega.energy == pytest.approx(-(true * p.log()).sum(1).mean().item())


def variances(criterion: str, p: Tensor) -> dict[str, Tensor]:
    """Of Ω with one draw for each sample."""
    if criterion == "gauss_newton":
        spread = torch.full_like(p, 2.0)  # of a squared normal number
    else:
        spread = p * (1 - p) ** 4 + (1 - p) * p**4 - (p * (1 - p)) ** 2
    return {name: v / len(X) for name, v in of_each_class(spread, 4).items()}


@pytest.mark.parametrize("criterion", ["fisher", "gauss_newton"])
@pytest.mark.parametrize("draws", [1, 10, 100])
def test_draws_converge_to_the_expectation_as_their_root(criterion, draws):
    model, p = regression()
    expected = of_each_class(p * (1 - p) if criterion == "fisher" else torch.ones_like(p))
    error = sum(v.sum() for v in variances(criterion, p).values()) / draws
    found = []
    for seed in range(3):
        omega = estimate_importance(model, [X], criterion=criterion, draws=draws, seed=seed)
        found.append(sum((omega[n] - value).square().sum() for n, value in expected.items()))
    assert 0.15 < torch.stack(found).mean() / error < 4


# -- Networks, against autograd --------------------------------------------------------------------
def judged_in_order(
    criterion: str, model: nn.Module, batches: list[dict], reduction: str = "square", **options: Any
) -> dict[str, Tensor]:
    """Ω of batches that come one after the other."""
    before, data = 0, []
    for batch in batches:
        found = targets(criterion, model, batch, before=before, **options)
        data.append((batch, found))
        before += len(found[0].weight)
    return judged(criterion, model, data, reduction)


def recurrent() -> nn.Module:
    torch.manual_seed(0)
    parts = {"layer": nn.LSTM(6, 5, batch_first=True), "head": nn.Linear(5, 4)}
    return Net(lambda m, input: m.head(m.layer(input)[0]), **parts).double()


def of_pixels() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 1)).double()


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
    "vectors": lambda: (mlp(), X, Y),
    "images": lambda: (convnet(), images(), Y[:6] % 3),
    "sequences": lambda: (recurrent(), torch.randn(5, 3, 6).double(), ids(3, below=4)),
    "pixels": lambda: (of_pixels(), images(4), torch.randint(3, (4, 6, 6))),
}
CRITERIA = [c for c in criteria.CRITERIA if c != "exact_fisher"]


@FAST
@EITHER
@pytest.mark.parametrize(
    ("criterion", "name"),
    [(c, n) for c in CRITERIA for n in NETWORKS]
    + [("exact_fisher", "vectors"), ("exact_fisher", "images")],
)
def test_criteria_by_autograd(criterion, name, reduction):
    """In batches of several sizes, some labels being ignored."""
    model, x, labels = NETWORKS[name]()
    model.eval()
    labels = labels.clone()
    labels[1] = IGNORED
    if labels.dim() > 1:
        labels[:, 1:] = torch.where(torch.rand(labels[:, 1:].shape) < 0.3, IGNORED, labels[:, 1:])
    key = "input"
    batches = list(split({key: x, "labels": labels}, (3, len(x) - 3)))
    drawn = {"draws": 2, "seed": 3} if criterion in ("fisher", "gauss_newton") else {}
    options: dict[str, Any] = {"criterion": criterion, "reduction": reduction, **drawn}
    expected = judged_in_order(criterion, model, batches, reduction, **drawn)
    forward = lambda m, batch: m(batch["input"])  # noqa: E731
    pairs = [(batch["input"], batch["labels"]) for batch in batches]
    for data, more in ((batches, {}), (pairs, {}), (batches, {"forward": forward})):
        omega = estimate_importance(model, data, **options, **more)
        assert_exact(omega, expected)
        assert omega.num_samples == len(x)


@EITHER
def test_a_callable_gets_the_output_and_the_batch(reduction):
    """In the form in which the data yields it, cut as the outputs are."""

    def margin(output: Tensor, batch: Any) -> Tensor:
        labels = batch["labels"] if isinstance(batch, dict) else batch[1]
        labels = torch.as_tensor(labels)
        assert len(labels) == len(output)
        return output.gather(1, labels[:, None])[:, 0] - output.logsumexp(1).square()

    model, options = mlp(), {"criterion": margin, "reduction": reduction}
    judge = {"forward": lambda m, b: m(b[0]), **options}
    expected = one_by_one(model, [(X, Y)], **judge)
    forms: dict[str, tuple[Callable[[Tensor, Tensor], Any], dict]] = {
        "tuple": (lambda x, y: (x, y), {}),
        "a list of numbers": (lambda x, y: [x, y.tolist()], {}),
        "mapping": (lambda x, y: {"input": x, "labels": y}, {}),
        "a mapping with numbers": (lambda x, y: {"input": x, "labels": y.tolist()}, {}),
        "a list of tensors": (lambda x, y: (x, list(y)), {}),
        "forward": (lambda x, y: (x, y), {"forward": lambda m, batch: m(batch[0])}),
    }
    for name, (pack, more) in forms.items():
        data = [pack(x, y) for x, y in zip(X.split(4), Y.split(4), strict=True)]
        omega = estimate_importance(model, data, **options, **more)
        assert not (wrong := [n for n in omega if not torch.allclose(omega[n], expected[n])]), (
            name,
            wrong,
        )
    assert estimate_importance(model, data, criterion=margin)["0.bias"].equal(
        estimate_importance(model, data, criterion=margin, reduction="abs")["0.bias"]
    )


def test_what_comes_with_the_inputs_may_be_of_any_kind():
    model = mlp()
    expected = one_by_one(model, [X])
    ragged = torch.nested.nested_tensor([torch.ones(k + 1) for k in range(10)])
    for label in (torch.eye(10).to_sparse(), ragged, "text", None, {"deep": [Y, "name"]}):
        assert_exact(estimate_importance(model, [(X, label)]), expected)


# -- Language models -------------------------------------------------------------------------------
_BERT = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}


def language_model(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    if name != "bert, tokens":
        model, batch, _ = zoo.build(name)
        return model, batch
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "max_position_embeddings": 8, "num_labels": 5}
    model = transformer("BertForTokenClassification", _BERT, sizes)
    return model.double().eval(), {"input_ids": ids(6, below=19), "attention_mask": padding(6)}


def labelled(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """One in three is ignored; so is padding."""
    with torch.no_grad():
        shape = model(**batch).logits.shape
    labels = torch.randint(shape[-1], shape[:-1])
    labels[torch.rand(labels.shape) < 0.3] = IGNORED
    if shape[1] == batch["attention_mask"].shape[1]:
        labels[batch["attention_mask"] == 0] = IGNORED
    return {**batch, "labels": labels}


LANGUAGE = {"gpt2": True, "llama": True, "t5": False, "bert, tokens": False}  # whether causal


def loss_of_transformers(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """−log p of a sequence by the model's own loss: a mean, times the number of labels."""
    name = type(model).__name__
    labels = batch["labels"][:, 1:] if "CausalLM" in name or "GPT2" in name else batch["labels"]
    count = int((labels != IGNORED).sum())
    return model(**batch).loss * count if count else model(**batch).logits.sum() * 0


@FAST
@pytest.mark.parametrize("name", LANGUAGE)
def test_labels_of_language_models_are_those_of_their_loss(name):
    """Causal ones predict the next token. (The loss of some is computed in float32.)"""
    model, batch = language_model(name)
    batch = labelled(model, batch)
    expected = one_by_one(
        *(model, [batch]),
        forward=lambda m, b: loss_of_transformers(m, b).reshape(1),
        objective=lambda loss: loss,
        reduction="square",
    )
    options: dict[str, Any] = {"criterion": "empirical_fisher"}
    omega = estimate_importance(model, split(batch, (3, 2)), **options)
    assert_exact(omega, expected, rtol=1e-5, floor=1e-9)

    def own(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits

    again = estimate_importance(model, [batch], forward=own, **options)
    assert_exact(again, dict(omega))
    one_hot = nn.functional.one_hot(batch["labels"].clamp(min=0), own(model, batch).shape[-1])
    soft = one_hot.double() * (batch["labels"] != IGNORED)[..., None]
    assert_exact(estimate_importance(model, [{**batch, "labels": soft}], **options), dict(omega))


@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("name", LANGUAGE)
def test_tokens_are_drawn_where_there_are_any(name, has_labels):
    """At the positions of labels, or else at those that the attention mask has."""
    model, batch = language_model(name)
    counts, is_decoder = batch["attention_mask"] != 0, "decoder_input_ids" in batch
    if is_decoder:
        batch["decoder_attention_mask"] = padding(4)
        counts = batch["decoder_attention_mask"] != 0
    if has_labels:
        batch = labelled(model, batch)
        counts = batch["labels"] != IGNORED
        if LANGUAGE[name]:
            counts = torch.cat([counts[:, 1:], torch.zeros_like(counts[:, :1])], 1)
    (target,) = targets("fisher", model, batch)
    assert torch.equal(target.values != IGNORED, counts)
    omega = estimate_importance(model, split(batch, (3, 2)), criterion="fisher")
    assert_exact(omega, judged_in_order("fisher", model, list(split(batch, (3, 2)))))


def test_pairs_of_tokens_and_labels():
    model, batch = language_model("gpt2")
    tokens, labels = batch["input_ids"], labelled(model, batch)["labels"]
    omega = estimate_importance(model, [(tokens, labels)], criterion="empirical_fisher")
    mapping = {"input_ids": tokens, "labels": labels}
    assert_same(omega, dict(estimate_importance(model, [mapping], criterion="empirical_fisher")))


class Inside(nn.Module):
    """A module of one's own around a language model, as a LightningModule is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).logits


def test_a_language_model_inside_another_module():
    model, batch = language_model("gpt2")
    mapping = {"input_ids": batch["input_ids"], "labels": labelled(model, batch)["labels"]}
    omega = estimate_importance(model, [mapping], criterion="empirical_fisher")
    inside = estimate_importance(Inside(model), [mapping], criterion="empirical_fisher")
    assert_same({name.removeprefix("model."): t for name, t in inside.items()}, dict(omega))


# -- Masked classes, empty batches -----------------------------------------------------------------
def masked(classes: list[int]) -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        mask = torch.zeros(4, dtype=torch.bool)
        mask[classes] = True
        return m.body(x).masked_fill(mask, -torch.inf)

    return Net(forward, body=mlp())


@FAST
@pytest.mark.parametrize("classes", [[0], [1, 3], [3]], ids=str)
def test_classes_that_are_masked_out(classes):
    """As if the last layer had only the others; no parameter is slow."""
    model, kept = masked(classes), [c for c in range(4) if c not in classes]
    small = Net(lambda m, x: m.body(x)[:, kept], body=mlp())
    for criterion in ("exact_fisher", "empirical_fisher"):
        labels, own = torch.tensor(kept)[Y % len(kept)], Y % len(kept)
        if criterion == "empirical_fisher":  # also as probabilities
            true = nn.functional.one_hot(labels, 4).double()
            omega = estimate_importance(model, [(X, true)], criterion=criterion)
            assert_exact(omega, dict(estimate_importance(small, [(X, own)], criterion=criterion)))
        omega = estimate_importance(model, [(X, labels)], criterion=criterion)
        assert_exact(omega, dict(estimate_importance(small, [(X, own)], criterion=criterion)))
    drawn = estimate_importance(model, [X], criterion="fisher", draws=64)
    exact = estimate_importance(model, [X], criterion="exact_fisher")
    for name, omega in drawn.items():
        torch.testing.assert_close(omega.sum(), exact[name].sum(), rtol=0.2, atol=0)
    assert not drawn["body.2.bias"][classes].any()


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
def test_empty_batches_count_nothing(criterion):
    model, pairs = mlp(), [(X[:4], Y[:4]), (X[4:], Y[4:])]
    expected = estimate_importance(model, pairs, criterion=criterion)
    empty = (X[:0], Y[:0])
    for data in ([empty, *pairs], [pairs[0], empty, pairs[1], empty]):
        omega = estimate_importance(model, data, criterion=criterion)
        assert_same(omega, dict(expected), 0, 0)
        assert (omega.num_samples, omega.energy) == (10, expected.energy)


# -- Narrow dtypes ---------------------------------------------------------------------------------
@pytest.mark.parametrize("criterion", criteria.CRITERIA)
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "autocast"])
def test_narrow_dtypes_have_sums_in_float32(criterion, kind):
    """Draws are those of the narrow outputs."""
    dtype = torch.float32 if kind == "autocast" else getattr(torch, kind)
    model, x = mlp(dtype), X.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        omega = estimate_importance(model, [(x, Y)], criterion=criterion)
        values = targets(criterion, model, {"input": x, "labels": Y})
    assert {o.dtype for o in omega.values()} == {torch.float32}
    exact = [
        one_by_one(
            *(mlp(), [{"x": x.double(), "v": target.values, "w": target.weight}]),
            forward=lambda m, b: m(b["x"]),
            criterion=lambda y, b: scalar_of(criterion, y, b["v"]) * b["w"].double().sqrt(),
            reduction="square",
        )
        for target in values
    ]
    expected = {name: sum(each[name] for each in exact) for name in omega}
    assert_exact(omega, expected, rtol=0.1)


# -- Reproducibility -------------------------------------------------------------------------------
DRAWN = {"fisher": {"criterion": "fisher", "draws": 2}, "gauss": {"criterion": "gauss_newton"}}
PAIRS = list(zip(X.split(3), Y.split(3), strict=True))


@pytest.mark.parametrize("kind", DRAWN)
def test_draws_are_those_of_the_seed_and_of_nothing_else(kind):
    options, model = DRAWN[kind], mlp()
    first = estimate_importance(copy.deepcopy(model), X.split(3), **options)
    torch.manual_seed(99)
    torch.rand(7)
    before = torch.get_rng_state()
    again = estimate_importance(model, X.split(3), seed=0, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(again, dict(first), 0, 0)
    for seed in (1, 2**70):
        other = estimate_importance(model, X.split(3), seed=seed, **options)
        assert all(not torch.equal(other[name], omega) for name, omega in first.items())


def test_every_batch_and_every_rank_draws_anew():
    seeds = {criteria.seed_of(s, r, n) for s in range(5) for r in range(5) for n in range(5)}
    assert len(seeds) == 125
    model, same = mlp(), X[:1].expand(64, -1)
    omega = estimate_importance(model, same.split(1), criterion="fisher")
    exact = estimate_importance(model, same.split(1), criterion="exact_fisher")
    torch.testing.assert_close(omega["2.bias"].sum(), exact["2.bias"].sum(), rtol=0.25, atol=0)


@pytest.mark.parametrize("kind", DRAWN)
def test_a_task_in_parts_draws_what_it_draws_at_once(kind):
    """Not the same numbers in every part, of which many may be a single sample."""
    whole, parts = EWC(mlp()), EWC(mlp())
    whole.consolidate(X.split(1), **DRAWN[kind])
    for x in X.split(1):
        parts.update_importance([x], **DRAWN[kind])
    state, resumed = parts.state_dict(), EWC(mlp())
    parts.consolidate()
    assert_states_equal(parts.state_dict(), whole.state_dict())
    resumed.load_state_dict(state)
    for ewc in (resumed, whole):
        ewc.update_importance(X.split(1), **DRAWN[kind])
        ewc.consolidate(X.split(1), **DRAWN[kind])
    assert resumed.num_tasks == whole.num_tasks - 1 == 1


@pytest.mark.parametrize("max_samples", [1, 4, 6, 99])
@pytest.mark.parametrize("criterion", criteria.CRITERIA)
def test_max_samples_cuts_a_batch_with_its_targets(criterion, max_samples):
    """With forward= the whole batch is run; a batch that is not custom is cut before."""
    model = mlp()
    options: dict[str, Any] = {"criterion": criterion, "max_samples": max_samples}
    data = [{"input": x, "labels": y} for x, y in PAIRS]
    cut = list(split({"input": X, "labels": Y}, cut_sizes(max_samples)))
    omega = estimate_importance(model, data, **options)
    assert omega.num_samples == min(max_samples, 10)
    assert_exact(omega, judged_in_order(criterion, model, cut))
    own = estimate_importance(model, data, forward=lambda m, b: m(b["input"]), **options)
    assert own.num_samples == omega.num_samples
    if criterion in ("empirical_fisher", "exact_fisher"):
        assert_exact(own, dict(omega))


def cut_sizes(samples: int) -> Iterator[int]:
    left = min(samples, 10)
    while left > 0:
        yield min(3, left)
        left -= 3


@pytest.mark.filterwarnings("ignore:.*only the first")
@pytest.mark.parametrize("criterion", ["fisher", "exact_fisher", "gauss_newton"])
def test_everything_is_put_back(criterion):
    model = used_model()
    before = snapshot(model)
    estimate_importance(model, images().split(2), criterion=criterion)
    assert_states_equal(snapshot(model), before)


# -- Other estimators, and what surrounds a model --------------------------------------------------
BATCH = {"estimator": "batch"}


@EITHER
@pytest.mark.parametrize("weighting", ["samples", "batches"])
@pytest.mark.parametrize("criterion", ["mas", "empirical_fisher", "fisher", "gauss_newton"])
def test_the_batch_estimator_by_autograd(criterion, weighting, reduction):
    """Σ w f(∇ mean s) / Σ w, and w/draws for every target of several."""
    model, draws = mlp(), 2 if criterion in ("fisher", "gauss_newton") else 1
    sums, total, before = {name: 0.0 for name, _ in model.named_parameters()}, 0, 0
    for x, y in PAIRS:
        weight = len(x) if weighting == "samples" else 1
        output = model(x)
        if criterion == "mas":
            scalars = [output.square().sum(1)]
        else:
            batch = {"input": x, "labels": y}
            found = targets(criterion, model, batch, draws, before=before)
            scalars = [scalar_of(criterion, output, target.values) for target in found]
        for s in scalars:
            grads = torch.autograd.grad(s.mean(), list(model.parameters()), retain_graph=True)
            for name, g in zip(sums, grads, strict=True):
                sums[name] = sums[name] + weight / draws * REDUCTIONS[reduction](g)
        total, before = total + weight, before + len(x)
    options: dict[str, Any] = {"criterion": criterion, "reduction": reduction, "draws": draws}
    omega = estimate_importance(model, PAIRS, weighting=weighting, **BATCH, **options)
    assert_same(omega, {name: value / total for name, value in sums.items()})


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models(backend):
    torch.compiler.reset()
    model = mlp()
    expected = estimate_importance(model, PAIRS, criterion="exact_fisher")
    compiled = torch.compile(copy.deepcopy(model), backend=backend)
    omega = estimate_importance(compiled, PAIRS, criterion="exact_fisher")
    assert_exact(omega, dict(expected))


def test_the_model_runs_once_for_all_targets():
    """But for the first batches, of which some samples are checked."""
    counts = []
    for draws in (1, 8):
        model, calls = mlp(), []
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        estimate_importance(model, X.repeat(7, 1).split(1), criterion="fisher", draws=draws)
        counts.append(len(calls))
    assert counts[0] == counts[1] <= 70 + 1
