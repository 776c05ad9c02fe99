"""What is saved of a drift budget, and the floor of Ω: a resumed training is the same one."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mas_ext import MAS, DriftBudget
from tests.support.regularizers import (
    assert_bits,
    assert_refused,
    assert_states_equal,
    move,
    plain_state,
    refusal,
)
from tests.support.zoo.small import convnet, images, mlp, vectors

X = vectors(64, torch.float32)
Y = (X.sum(1) > 0).long()


def named(model, batch):
    return model(batch["x"])


def budget_of(kind):
    """By kind: a budget, a model, the data, forward=."""
    options = {"samples": 20, "every": 3}
    if kind == "reference":  # more than samples
        return DriftBudget(0.02, reference=list(X.flip(0).split(9)), **options), X.split(8), None
    if kind == "forward":
        data = [{"x": x, "n": (1, None, "a")} for x in X.split(8)]
        return DriftBudget(0.02, forward=named, **options), data, named
    return DriftBudget(0.02, kind, **options), [(x, 0) for x in X.split(8)], None


def train(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(X), (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(-X[rows]), Y[rows]).backward()
        optimizer.step()


def made(kind, mode="proximal", **options):
    budget, _, _ = budget_of(kind)
    model = mlp(torch.float32)
    mas = MAS(model, budget=budget, **options)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    mas.attach(optimizer, mode)
    return model, mas, optimizer


def in_the_middle(kind, **options):
    """Of its third task's measurement, and of training in it."""
    model, mas, optimizer = made(kind, **options)
    _, data, forward = budget_of(kind)
    for task in range(2):
        mas.consolidate(data, forward=forward)
        train(model, optimizer, 10, task)
    mas.update_importance(data[:3], forward=forward)
    return model, mas, optimizer


def goes_on(kind, model, mas, optimizer):
    _, data, forward = budget_of(kind)
    train(model, optimizer, 20, 7)
    settled = mas.settle(0.01)
    mas.consolidate(data[3:], forward=forward)
    train(model, optimizer, 20, 8)
    return settled


def by_file(mas, other, folder):
    mas.save(folder / "mas")
    other.load(folder / "mas")


def by_state_dict(mas, other, folder):
    torch.save(mas.state_dict(), folder / "mas.pt")
    other.load_state_dict(torch.load(folder / "mas.pt", weights_only=True))


def by_plain_state(mas, other, folder):
    other.load_state_dict(plain_state(mas))


@pytest.mark.parametrize("kind", ["kl", "relative", "forward", "reference"])
@pytest.mark.parametrize(
    ("load", "options"),
    [
        (by_file, {}),
        (by_file, {"mode": "gradient", "state_dtype": "uint8"}),
        (by_state_dict, {}),
        (by_plain_state, {}),
    ],
)
@pytest.mark.filterwarnings("ignore:budget:UserWarning")
def test_a_resumed_training_has_the_same_bits(tmp_path, load, kind, options):
    model, mas, optimizer = in_the_middle(kind, **options)
    other, resumed, its_optimizer = made(kind, **options)
    other.load_state_dict(model.state_dict())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    load(mas, resumed, tmp_path)
    assert resumed.drift_measured() == mas.drift_measured() > 0
    assert resumed.lambda_reg == mas.lambda_reg
    before = len(mas.drift_trace)
    assert goes_on(kind, model, mas, optimizer) == goes_on(kind, other, resumed, its_optimizer)
    assert_bits(other, model)
    assert resumed.drift_trace == mas.drift_trace[before:] != []
    assert_states_equal(plain_state(resumed), plain_state(mas))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_by_itself(copied):
    model, mas, optimizer = in_the_middle("kl")
    other, its = copied((model, mas))
    state = copy.deepcopy(its.state_dict())
    train(model, optimizer, 5)
    mas.consolidate()
    assert_states_equal(its.state_dict(), state)
    assert its.drift_measured() != mas.drift_measured()
    again = torch.optim.Adam(other.parameters(), 0.01)
    its.attach(again, "proximal")
    train(other, again, 5)
    assert its.settle(1e-3).after <= 1e-3


def test_a_state_is_a_copy():
    _, mas, _ = in_the_middle("kl")
    drift, state = mas.drift_measured(), mas.state_dict()
    for tensor in state["references"].values():
        tensor.zero_()
    assert mas.drift_measured() == drift


def test_running_statistics_survive():
    data = [images(dtype=torch.float32)]
    ends = []
    for is_loaded in (False, True):
        model = convnet(torch.float32).eval()
        mas = MAS(model, budget=1e-3)
        mas.consolidate(data)
        if is_loaded:
            state, mas = mas.state_dict(), MAS(model, budget=1e-3)
            mas.load_state_dict(state)
        move(model)
        model[1].running_mean.add_(0.3)
        assert mas.settle().c > 0
        ends.append(model)
    assert_bits(*ends)


def test_forward_has_to_be_passed_again():
    _, mas, _ = in_the_middle("forward")
    for state in (plain_state(mas), mas.state_dict()):
        other = MAS(mlp(torch.float32), budget=0.1)
        case = refusal(lambda o=other, s=state: o.load_state_dict(s), ValueError, "forward")
        assert_refused(case, unchanged=(other,))


OLDER = {
    "without a budget": lambda state: {**state, "control": {}, "references": {}},
    "version 4": lambda state: {
        **{k: v for k, v in state.items() if k not in ("control", "references")},
        "version": 4,
    },
}


@pytest.mark.parametrize("older", OLDER)
def test_a_state_without_a_budget_warns_and_has_no_drift_until_the_next_task(older):
    model, mas, optimizer = in_the_middle("kl")
    state = OLDER[older](plain_state(mas))
    resumed = MAS(model, budget=0.1)
    with pytest.warns(UserWarning, match="budget"):
        resumed.load_state_dict(state)
    for call in (resumed.drift_measured, resumed.settle):
        with pytest.raises(RuntimeError, match="drift"):
            call()
    strength = resumed.lambda_reg
    train(model, optimizer, 3)
    assert resumed.lambda_reg == strength
    resumed.consolidate([X])
    assert resumed.drift_measured() == pytest.approx(0, abs=1e-5)


def test_a_mas_without_a_budget_reads_a_state_with_one():
    _, mas, _ = in_the_middle("kl")
    plain = MAS(mlp(torch.float32))
    plain.load_state_dict(mas.state_dict())
    assert plain.num_tasks == 2
    assert_states_equal(dict(plain.importance), dict(mas.importance))


def without(state, key):
    return {k: v for k, v in state["control"].items() if k != key}


def changed(state, value, *path):
    """The settings with another value at a place."""
    control = copy.deepcopy(state["control"])
    *holders, last = path
    inner = control
    for key in holders:
        inner = inner[key]
    inner[last] = value
    return control


DAMAGED = {
    "not a mapping": lambda s: {"control": 3},
    "no controller": lambda s: {"control": without(s, "controller")},
    "no tasks": lambda s: {"control": without(s, "tasks")},
    "tasks": lambda s: {"control": {**s["control"], "tasks": [{}]}},
    "open": lambda s: {"control": {**s["control"], "open": {}}},
    "controller": lambda s: {"control": {**s["control"], "controller": {"other": 1.0}}},
    "log_factor": lambda s: {"control": {**s["control"], "controller": {"log_factor": "x"}}},
    "references": lambda s: {"references": dict(list(s["references"].items())[1:])},
    "no references": lambda s: {"references": 3},
    "a reference more": lambda s: {"references": {**s["references"], "x": torch.ones(1)}},
    "log_factor too large": lambda s: {"control": changed(s, 800.0, "controller", "log_factor")},
    "a size below 0": lambda s: {"control": changed(s, -1.0, "controller", "size")},
    "batch_size": lambda s: {"control": changed(s, 0, "tasks", 0, "batch_size")},
    "samples": lambda s: {"control": changed(s, 3, "tasks", 0, "parts", 0, "samples")},
    "rowwise": lambda s: {"control": changed(s, [True] * 9, "tasks", 0, "parts", 0, "rowwise")},
    "inputs": lambda s: {"control": changed(s, {"list": []}, "tasks", 0, "parts", 0, "inputs")},
    "names": lambda s: {"control": changed(s, [[]], "tasks", 0, "parts", 0, "outputs", "names")},
    "seed": lambda s: {"control": changed(s, ["x"], "open", "seed")},
    "outputs that are not finite": lambda s: {
        "references": {n: t / 0 if "before" in n else t for n, t in s["references"].items()}
    },
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_state_is_refused(case):
    _, mas, _ = in_the_middle("kl")
    state = plain_state(mas)
    state = {**state, **DAMAGED[case](state)}
    assert_refused(
        refusal(lambda: mas.load_state_dict(state), ValueError, "damaged"), unchanged=(mas,)
    )


@pytest.mark.parametrize("is_open", [False, True])
def test_what_cannot_be_saved_is_left_out_with_a_warning(tmp_path, is_open):
    def forward(model, batch):
        return model(batch.x)

    model, budget = mlp(torch.float32), DriftBudget(0.1, forward=forward)
    mas = MAS(model, budget=budget)
    batches = [SimpleNamespace(x=x) for x in X.split(1)]
    if is_open:
        mas.update_importance(batches, forward=forward)
    else:
        mas.consolidate(batches, forward=forward)
    with pytest.warns(UserWarning, match="references"):
        mas.save(tmp_path / "mas")
    other = MAS(model, budget=budget)
    if not is_open:
        with pytest.warns(UserWarning, match="budget"):
            other.load(tmp_path / "mas")
    else:
        other.load(tmp_path / "mas")
    assert_states_equal(dict(other.importance), dict(mas.importance))


def test_names_in_batches_are_told_apart(tmp_path):
    def forward(model, batch):
        return model(batch["a"]["b"] + batch["a.b"])

    model = mlp(torch.float32)
    mas, other = (MAS(model, budget=DriftBudget(0.1, forward=forward)) for _ in range(2))
    mas.consolidate([{"a": {"b": X}, "a.b": 2 * X}], forward=forward)
    by_file(mas, other, tmp_path)
    move(model)
    assert other.drift_measured() == mas.drift_measured()


# -- floor -----------------------------------------------------------------------------------------
def forked():
    torch.manual_seed(0)
    return nn.ModuleDict({"used": mlp(torch.float64), "unused": nn.Linear(6, 2).double()})


@pytest.mark.parametrize("floor", [0.0, 0.05, 2, None])
@pytest.mark.parametrize("budget", [None, 0.1])
@pytest.mark.filterwarnings("ignore:no measured output:UserWarning")
def test_the_floor_is_a_fraction_of_the_mean_where_there_is_importance(floor, budget):
    def forward(model, batch):
        return model["used"](batch)

    found = []
    for options in ({"floor": 0.0}, {"floor": floor, "budget": budget}):
        model = forked()
        mas = MAS(model, 1.0, **options)
        for batch in (X.double(), 3 * X.double()):
            mas.consolidate([batch], forward=forward)
        found.append(dict(mas.importance))
    measured, raised = found
    fraction = (0.0 if budget is None else 0.01) if floor is None else floor
    used = [omega for name, omega in measured.items() if name.startswith("used")]
    mean = sum(omega.sum() for omega in used) / sum(omega.numel() for omega in used)
    for name, omega in measured.items():
        least = fraction * mean if name.startswith("used") else torch.zeros(())
        torch.testing.assert_close(raised[name], omega + least, rtol=1e-12, atol=1e-15)
        assert name.startswith("used") or not raised[name].any()


BAD_FLOORS = {-0.1: ValueError, float("nan"): ValueError, float("inf"): ValueError}
BAD_FLOORS |= {"x": TypeError, True: TypeError}


@pytest.mark.parametrize("floor", BAD_FLOORS)
def test_bad_floors_are_refused(floor):
    assert_refused(refusal(lambda: MAS(mlp(), floor=floor), BAD_FLOORS[floor], "floor"))
