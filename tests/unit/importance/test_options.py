"""Every argument of ``estimate_importance``, and every form of data, against autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mas_ext import MAS, estimate_importance
from tests.support.oracle import REDUCTIONS, assert_exact, by_reduction, one_by_one, split
from tests.support.zoo.layers import Net, vector_weight
from tests.support.zoo.small import assert_same, convnet, images, mlp, vectors

X = vectors()


# -- objective=, and outputs of any rank -----------------------------------------------------------
def flat(y: Tensor) -> Tensor:
    return y.reshape(len(y), -1)


def classes_last(y: Tensor) -> Tensor:
    return y.movedim(1, -1) if y.dim() == 4 else y


NAMED: dict[Any, Callable[[Tensor], Tensor]] = {
    "squared_l2": lambda y: flat(y).square().sum(1),
    "l2": lambda y: flat(y).square().sum(1).sqrt(),
    "l1": lambda y: flat(y).abs().sum(1),
    "probabilities": lambda y: flat(classes_last(y).softmax(-1)).square().sum(1),
}
CALLABLES: list[Callable[[Tensor], Tensor]] = [
    lambda y: (flat(y) ** 3).sum(1),
    lambda y: -(flat(y).softmax(1) * flat(y).log_softmax(1)).sum(1),
    lambda y: flat(y)[:, 0],
    lambda y: flat(y).amax(1),
]
OUTPUTS: dict[int, Callable[[], tuple[nn.Module, Tensor]]] = {
    1: lambda: (vector_weight(6), vectors(5)),
    2: lambda: (mlp(), vectors(5)),
    3: lambda: (nn.Sequential(nn.Linear(3, 4), nn.Tanh()), vectors(5).view(5, 2, 3)),
    4: lambda: (convnet()[:3], images(5)),
}


OF_ANY_RANK = {
    f"{name}-{rank}": (objective, rank)
    for name, objective in [*zip(NAMED, NAMED, strict=True), *enumerate(CALLABLES)]
    for rank in OUTPUTS
    if (name, rank) != ("probabilities", 1)  # of one class, which is refused
}


@pytest.mark.parametrize(("objective", "rank"), OF_ANY_RANK.values(), ids=OF_ANY_RANK)
def test_objectives_of_outputs_of_any_rank(objective, rank):
    model, x = OUTPUTS[rank]()
    means = by_reduction(model.double(), [x], NAMED.get(objective, objective))
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"objective": objective, "reduction": reduction}
        assert_exact(estimate_importance(model, x.split([3, 2]), **options), means[reduction])


def test_energy_is_the_mean_of_the_objective():
    model, weights = mlp(), {"estimator": "batch", "weighting": "batches"}
    energy = model(X).square().sum(1).mean().item()
    for options in ({}, {"estimator": "batch"}, weights):
        omega = estimate_importance(model, X.split(4), **options)
        assert omega.energy == pytest.approx(energy)


# -- estimator=, weighting=, training=, max_samples= -----------------------------------------------
def batch_means(model: nn.Module, batches: Iterable[Tensor], by_size: bool) -> dict[str, Tensor]:
    """Σ w |∇ mean ‖F‖²| / Σ w, w a batch's size or 1, in the mode the model is in."""
    total, weights = {name: torch.zeros_like(p) for name, p in model.named_parameters()}, 0
    for batch in batches:
        weight = len(batch) if by_size else 1
        scalar = model(batch).flatten(1).square().sum(1).mean()
        grads = torch.autograd.grad(scalar, list(model.parameters()))
        for name, g in zip(total, grads, strict=True):
            total[name] += weight * g.abs()
        weights += weight
    return {name: value / weights for name, value in total.items()}


BATCH: dict[str, dict[str, Any]] = {
    "samples": {"estimator": "batch"},
    "batches": {"estimator": "batch", "weighting": "batches"},
}


@pytest.mark.parametrize("max_samples", [1, 4, 6, 10, 99, None])
@pytest.mark.parametrize("weighting", ["per_sample", *BATCH])
@pytest.mark.parametrize("custom", [False, True], ids=["", "forward="])
def test_max_samples_counts_samples_not_batches(weighting, max_samples, custom):
    """Batches of 4, 4 and 2 are cut; an empty one counts nothing."""
    model, wanted = mlp(), X[:max_samples]
    data = [X[:4], X[:0], *X[4:].split(4)]
    options: dict[str, Any] = dict(BATCH.get(weighting, {}), max_samples=max_samples)
    if custom:
        data = [{"deep": [part]} for part in data if len(part)]
        options["forward"] = lambda m, batch: m(batch["deep"][0])
    omega = estimate_importance(model, data, **options)
    assert omega.num_samples == len(wanted)
    if weighting == "per_sample":
        assert_exact(omega, one_by_one(model, [wanted]))
    else:
        assert_same(omega, batch_means(model, wanted.split(4), weighting == "samples"))
        assert set(omega.coverage.values()) == {"batch"}


def test_the_batch_estimator_loses_what_cancels():
    model = mlp()
    exact = estimate_importance(model, [X])
    lossy = estimate_importance(model, [X], estimator="batch")
    assert all((lossy[name] <= exact[name] + 1e-12).all() for name in exact)
    assert sum(t.sum() for t in lossy.values()) < 0.95 * sum(t.sum() for t in exact.values())


def test_a_batch_counts_once_over_several_updates():
    model = mlp()
    mas = MAS(model)
    mas.update_importance([X[:4], X[4:8]], **BATCH["batches"])
    mas.consolidate([X[8:]], **BATCH["batches"])
    assert_same(mas.importance, batch_means(model, [X[:4], X[4:8], X[8:]], by_size=False))


def without_running_statistics() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False)).double()


@pytest.mark.parametrize(
    ("make", "batches"),
    [(convnet, images().split(2)), (without_running_statistics, [X])],
    ids=["dropout", "no running statistics"],
)
def test_training_mode_leaves_no_trace(make, batches):
    model = make().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    generator = torch.get_rng_state()
    omega = estimate_importance(model, batches, **BATCH["batches"], training=True)
    assert not any(module.training for module in model.modules())
    assert_same(model.state_dict(), before, 0, 0)
    assert torch.equal(torch.get_rng_state(), generator)
    expected = batch_means(model.train(), batches, by_size=False)
    assert_same(omega, expected, rtol=1e-9, atol=1e-12)


# -- params= ---------------------------------------------------------------------------------------
PARAMS: dict[str, tuple[Any, set[str]]] = {
    "names": (["0.weight"], {"0.weight"}),
    "a glob": ("0.*", {"0.weight", "0.bias"}),
    "globs": (["*.bias", "6.w*"], {"0.bias", "1.bias", "6.bias", "6.weight"}),
    "of the first layer": (["0.bias"], {"0.bias"}),
    "a callable": (lambda name, p: p.dim() == 2, {"6.weight"}),
}


@pytest.mark.parametrize("case", PARAMS)
def test_params_selects(case):
    model, (params, names) = convnet(), PARAMS[case]
    omega = estimate_importance(model, [images()], params=params)
    expected = one_by_one(model, [images()])
    assert_exact(omega, {name: expected[name] for name in names})
    assert set(omega.coverage) == names


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "0.", "2."])
def test_frozen_parameters_are_left_out(frozen):
    model = mlp()
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    omega = estimate_importance(model, X.split(4))
    assert not any(name.startswith(frozen) for name in omega)
    assert_exact(omega, one_by_one(model, [X]))


def test_tied_parameters_are_measured_once_under_their_first_name():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model.double()[2].weight = model[0].weight
    omega = estimate_importance(model, [X[:, :4]])
    assert list(omega) == ["0.weight"]
    assert_exact(omega, one_by_one(model, [X[:, :4]]))


# -- data, and forward= ----------------------------------------------------------------------------
def several(m: Net, tokens: Tensor, features: Tensor, table: Tensor, squash: bool = True) -> Any:
    hidden = m.embedding(tokens).mean(1) + m.linear(features) @ table
    return {"loss": None, "logits": m.mix(hidden.tanh() if squash else hidden)}


def test_a_mapping_becomes_keyword_arguments_without_labels():
    """What has no sample dimension belongs to every sample; what requires gradients still does."""
    parts = {"embedding": nn.Embedding(7, 4), "linear": nn.Linear(3, 4), "mix": nn.Linear(4, 2)}
    model = Net(several, **parts).double()
    batch = {
        "tokens": torch.randint(7, (5, 6)),
        "features": torch.randn(5, 3).double().requires_grad_(),
        "table": torch.randn(4, 4).double(),
        "squash": False,
    }

    def logits(model: nn.Module, batch: dict) -> Tensor:
        return model(**batch)["logits"]

    expected = one_by_one(model, [batch], forward=logits)
    labelled = [{**part, "labels": 1, "label": 2} for part in split(batch, (3, 2))]
    assert_exact(estimate_importance(model, labelled), expected)
    assert batch["features"].grad is None
    assert batch["features"].requires_grad


DATA: dict[str, Callable[[Tensor], Any]] = {
    "tensors": lambda x: x.split(4),
    "tuples": lambda x: [(part, torch.zeros(len(part))) for part in x.split(4)],
    "lists": lambda x: [[part, "label"] for part in x.split(4)],
    "a loader": lambda x: torch.utils.data.DataLoader(x, batch_size=4, shuffle=True),
    "a generator": lambda x: iter(x.split(4)),
    "without gradients": lambda x: without_gradients(x.split(4)),
    "one buffer, filled again": lambda x: refilled(x.split(5)),
    "requiring gradients": lambda x: [x.clone().requires_grad_()],
    "from a graph": lambda x: [x.clone().requires_grad_() * 1],
}


def without_gradients(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Gradients stay switched off while the consumer works."""
    with torch.no_grad():
        yield from batches


def refilled(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    buffer = torch.empty(5, 6).double()
    for batch in batches:
        yield buffer.copy_(batch)


@pytest.mark.parametrize("form", DATA)
def test_forms_of_data(form):
    model = mlp()
    assert_exact(estimate_importance(model, DATA[form](X)), one_by_one(model, [X]))


RESULTS: dict[str, Callable[[Tensor], Any]] = {
    "an object": lambda y: type("Output", (), {"logits": y, "loss": None})(),
    "a mapping": lambda y: {"loss": None, "logits": y},
}


@pytest.mark.parametrize("kind", RESULTS)
def test_kinds_of_output(kind):
    model = Net(lambda m, x: RESULTS[kind](m.body(x)), body=mlp())
    expected = {f"body.{name}": value for name, value in one_by_one(model.body, [X]).items()}
    assert_exact(estimate_importance(model, [X]), expected)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "batch last in memory": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda x: x[:1].expand(5, -1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_memory_layout(layout):
    model, x = convnet(), LAYOUTS[layout](images())
    assert_exact(estimate_importance(model, [x]), one_by_one(model, [x]))


FORWARDS: dict[str, tuple[Callable[[Tensor], Any], Callable[[nn.Module, Any], Tensor]]] = {
    "nested": (lambda x: {"deep": [x, "name"]}, lambda m, b: m(b["deep"][0])),
    "transposed": (lambda x: (x.T,), lambda m, b: m(b[0].T)),
    "list of samples": (list, lambda m, b: m(torch.stack(b))),
    "an object": (lambda x: type("Batch", (), {"x": x}), lambda m, b: m(b.x)),
    "indices": (lambda x: torch.arange(len(x)), lambda m, b: m(X[b])),
    "fails for a part": (lambda x: (x, len(x)), lambda m, b: m(b[0].view(b[1], 6))),
    "filled up to a full batch": (lambda x: x, lambda m, b: m(torch.cat([b, X[len(b) :]]))),
}


@pytest.mark.parametrize("max_samples", [None, 4])
@pytest.mark.parametrize("name", FORWARDS)
def test_forward_takes_batches_of_any_form(name, max_samples):
    pack, forward = FORWARDS[name]
    model = mlp()
    omega = estimate_importance(model, [pack(X)], forward=forward, max_samples=max_samples)
    assert_exact(omega, one_by_one(model, [X[:max_samples]]))


def test_forward_may_leave_out_layers():
    model = mlp()

    def without_bias(model: nn.Module, batch: Tensor) -> Tensor:
        return model[2](batch @ model[0].weight.T)

    omega = estimate_importance(model, X.split(4), forward=without_bias)
    assert_exact(omega, one_by_one(model, [X], forward=without_bias))
    assert omega.coverage["0.bias"] == "unused"


def test_a_list_with_a_value_per_sample_is_cut_with_the_batch():
    lengths = list(range(1, 11))

    def forward(m: Net, x: Tensor, lengths: list[int]) -> Tensor:
        assert len(x) == len(lengths)
        return m.linear(x) * torch.tensor(lengths).unsqueeze(1)

    model = Net(forward, linear=nn.Linear(6, 2)).double()
    alone = [{"x": X[k : k + 1], "lengths": lengths[k : k + 1]} for k in range(10)]
    whole = estimate_importance(model, [{"x": X, "lengths": lengths}])
    assert_same(whole, estimate_importance(model, alone))


# -- progress= -------------------------------------------------------------------------------------
def test_progress(capsys):
    seen: list[int] = []
    estimate_importance(mlp(), X.split(4), progress=seen.append)
    assert seen == [4, 8, 10]
    estimate_importance(mlp(), X.split(4), progress=True)
    assert "10 samples" in capsys.readouterr().err
