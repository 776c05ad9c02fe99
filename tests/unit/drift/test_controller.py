"""λ follows the measured drift in training, and measuring disturbs nothing."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import mas_ext
from mas_ext import EWC, L2SP, MAS, DriftBudget
from mas_ext._drift.budget import SLACK
from mas_ext._drift.tracker import LOWEST
from tests.support.regularizers import assert_bits, assert_states_equal, move, penalty_by_hand
from tests.support.unchanged import snapshot, used_model
from tests.support.zoo.small import images

LIMIT = 0.05


def task(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 10, generator=generator)
    return x, (x @ torch.randn(10, 4, generator=generator)).argmax(1)


def train(model, optimizers, steps, seed=0, number=2):
    (x, y), generator = task(number), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (32,), generator=generator)
        model.zero_grad()
        cross_entropy(model(x[rows]), y[rows]).backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.fixture(scope="module")
def learned():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.Dropout(0.1), nn.ReLU(), nn.Linear(32, 4))
    train(model, [torch.optim.Adam(model.parameters(), 0.01)], 200, number=1)
    return model


def begun(learned, budget=LIMIT, factor=1.0, method=MAS, **options):
    model = copy.deepcopy(learned)
    mas = method(model, budget=budget, **options)
    mas.consolidate(task(1)[0].split(32))
    if factor != 1.0:
        mas.lambda_reg = factor * mas.lambda_reg
    return model, mas


def optimizer_of(kind, mode, model, mas, lr=None, every=None):
    lr = lr or {"Adam": 0.003, "SGD": 0.1}[kind.removeprefix("ours.")]
    if kind.startswith("ours."):
        ours = getattr(mas_ext.optim, kind.removeprefix("ours."))
        return ours(model.parameters(), lr, mas=mas, mode=mode)
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr)
    mas.attach(optimizer, mode, every)
    return optimizer


TRAININGS = [
    ("Adam", "proximal"),
    ("Adam", "gradient"),
    ("SGD", "gradient"),
    ("SGD", "proximal"),
    ("ours.Adam", "proximal"),
    ("ours.SGD", "gradient"),
]


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(("kind", "mode"), TRAININGS)
def test_the_drift_comes_near_the_limit_from_any_lambda(learned, kind, mode, factor):
    model, mas = begun(learned, factor=factor)
    train(model, [optimizer_of(kind, mode, model, mas)], 800)
    drift = mas.drift_measured() / (SLACK * LIMIT)
    # Adam moves little while λ is far too strong, and λ falls slowly.
    least = 0.02 if (kind, mode, factor) == ("Adam", "gradient", 1e6) else 0.35
    assert least < drift < 1.5


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize(("method", "kind"), [(EWC, "Adam"), (EWC, "SGD"), (L2SP, "Adam")])
def test_so_it_does_for_the_other_methods(learned, method, kind, factor):
    """A proximal step is stable at the λ that a Fisher information needs."""
    model, regularizer = begun(learned, factor=factor, method=method)
    train(model, [optimizer_of(kind, "proximal", model, regularizer)], 800)
    assert 0.35 < regularizer.drift_measured() / (SLACK * LIMIT) < 1.5


def test_a_second_start_from_another_lambda_does_not_diverge(learned):
    """What is stable depends on the λ that it starts from."""
    model, mas = begun(learned, factor=1e-6)
    optimizer = optimizer_of("SGD", "gradient", model, mas)
    start, first = copy.deepcopy(model.state_dict()), mas.lambda_reg
    train(model, [optimizer], 20)
    model.load_state_dict(start)
    mas.lambda_reg = 1e12 * first
    train(model, [optimizer], 400)
    assert mas.drift_measured() < 2 * SLACK * LIMIT


@pytest.mark.parametrize("first", ["SGD", "Adam"])
def test_the_optimizer_with_the_larger_steps_does_not_diverge(learned, first):
    """Also where the first of a round is Adam, which cannot diverge."""
    model, mas = begun(learned, factor=1e6)
    halves = [getattr(torch.optim, first)(model[3].parameters(), 1e-5)]
    halves.append(torch.optim.SGD(model[0].parameters(), 0.1))
    for each in halves:
        mas.attach(each)
    train(model, halves, 400)
    assert mas.drift_measured() < 2 * SLACK * LIMIT


def test_a_learning_rate_that_grows_between_measurements_does_not_diverge(learned):
    model, mas = begun(learned, factor=1e6)
    (optimizer,) = [torch.optim.SGD(model.parameters(), 1e-4)]
    mas.attach(optimizer)
    train(model, [optimizer], 25)
    optimizer.param_groups[0]["lr"] = 0.1
    train(model, [optimizer], 10)
    assert mas.drift_measured() < 2 * SLACK * LIMIT


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_a_predicted_lambda_falls_so_far_and_a_given_one_further(learned, mode):
    """Under a budget that no training of this length spends."""
    lowest = {}
    for factor in (1.0, 1.001):  # predicted, and given as a number
        model, mas = begun(learned, budget=100.0, factor=factor)
        train(model, [optimizer_of("Adam", mode, model, mas)], 400)
        lowest[factor] = mas.drift_trace[-1].lambda_reg / mas.drift_trace[0].lambda_reg
    assert lowest[1.0] == pytest.approx(LOWEST)
    assert lowest[1.001] < LOWEST / 10


@pytest.mark.parametrize("kind", ["Adam", "SGD", "ours.Adam"])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_the_first_step_corrects_a_prediction_from_logits_with_an_offset(kind, offset):
    """As those of language models have: ‖F‖² depends on it a great deal, the loss not at all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 200).requires_grad_(False))
    model[1].weight.add_(offset)
    x = torch.randn(16, 20, 8)
    mas = MAS(model, budget=DriftBudget(LIMIT, every=5))
    mas.consolidate(x.split(16))
    optimizer = optimizer_of(kind, "gradient", model, mas, lr=1.0 if kind == "SGD" else 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(x).flatten(0, 1), torch.zeros(16 * 20).long()).backward()
        optimizer.step()
    assert mas.drift_measured() > LIMIT / 2


# -- when it is measured, and what is noted --------------------------------------------------------
def steps_of(mas):
    return [record.step for record in mas.drift_trace]


EVERY = {
    1: list(range(1, 21)),
    3: [1, 2, 4, 7, 10, 13, 16, 19],
    8: [1, 2, 4, 8, 16],
    None: [1, 2, 4, 8, 16],
}


@pytest.mark.parametrize("every", EVERY)
def test_every_is_kept_to(learned, every):
    model, mas = begun(learned, DriftBudget(10.0, every=every))
    train(model, [optimizer_of("Adam", "proximal", model, mas)], 20)
    assert steps_of(mas) == EVERY[every]


def test_above_the_limit_it_is_measured_more_often(learned):
    model, mas = begun(learned, DriftBudget(0.1, lambda a, b: torch.ones(len(b)), every=8))
    train(model, [optimizer_of("Adam", "proximal", model, mas)], 12)
    assert steps_of(mas) == [1, 2, 4, 6, 8, 10, 12]


def test_two_optimizers_for_two_halves_count_one_step_a_round(learned):
    model, mas = begun(learned, 10.0)
    halves = [torch.optim.Adam(model[k].parameters(), 0.001) for k in (0, 3)]
    for each in halves:
        mas.attach(each, "proximal")
    train(model, halves, 40)
    assert steps_of(mas) == [1, 2, 4, 8, 16, 32]


def test_a_new_optimizer_goes_on(learned):
    model, mas = begun(learned, 10.0)
    mas.attach(mode="proximal")
    for _ in range(2):
        train(model, [torch.optim.Adam(model.parameters(), 0.001)], 20)
    assert steps_of(mas)[:5] == [1, 2, 4, 8, 16]
    assert 32 <= steps_of(mas)[5] <= 33
    mas.consolidate(task(2)[0].split(32))
    train(model, [torch.optim.Adam(model.parameters(), 0.001)], 9)
    assert steps_of(mas)[6:] in ([1, 2, 4, 8], [1, 2, 4])
    assert [record.task for record in mas.drift_trace] == [1] * 6 + [2] * len(steps_of(mas)[6:])


def test_records_say_what_was(learned):
    """With as many samples in a batch as there are references, all are measured."""
    model = copy.deepcopy(learned)
    mas = MAS(model, budget=DriftBudget(1e-5, "relative", every=1))
    assert mas.drift_trace == []
    mas.consolidate([task(1)[0]])
    optimizer = optimizer_of("Adam", "gradient", model, mas)
    train(model, [optimizer], 1)
    begins_with = mas.lambda_reg
    for count in range(2, 8):
        strength = mas.lambda_reg
        train(model, [optimizer], 1, seed=count)
        record = mas.drift_trace[-1]
        assert len(mas.drift_trace) == record.step == count
        assert record.drift == mas.drift_measured()
        assert record.lambda_reg == mas.lambda_reg
        expected = penalty_by_hand(mas, model, strength).item()
        assert record.penalty == pytest.approx(expected, rel=1e-5)
    assert mas.lambda_reg > begins_with


def test_a_lambda_of_0_stays_and_patterns_keep_their_proportions(learned):
    model, mas = begun(learned, 1e-4, lambda_reg={"0.bias": 0, "0.*": 1.0, "*": 5.0})
    train(model, [optimizer_of("Adam", "proximal", model, mas)], 60)
    strengths = mas.lambda_reg
    assert strengths["0.bias"] == 0
    assert strengths["*"] == pytest.approx(5 * strengths["0.*"], rel=1e-12)
    assert strengths["0.*"] > 10
    assert mas.protected.state.strength.lambda_of("3.weight").item() == strengths["*"]


# -- measuring disturbs nothing --------------------------------------------------------------------
def test_measuring_leaves_the_model_as_it_was():
    model = used_model()
    mas = MAS(model, budget=DriftBudget(0.1, "relative"))
    mas.consolidate([images()])
    before = snapshot(model)
    mas.drift_measured()
    assert_states_equal(snapshot(model), before)


@pytest.mark.parametrize("enabled", [False, True])
def test_the_caller_s_autocast_neither_matters_nor_ends(learned, enabled):
    model, mas = begun(learned)
    move(model)
    expected = mas.drift_measured()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        assert mas.drift_measured() == expected
        assert torch.is_autocast_enabled("cpu") == enabled
    assert not torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        assert mas.drift_measured() == expected


def test_a_compiled_model_drifts_as_its_own_does(learned):
    drifts = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="eager")):
        model = copy.deepcopy(learned)
        mas = MAS(wrap(model), budget=LIMIT)
        mas.consolidate(task(1)[0].split(32))
        move(model)
        drifts.append((mas.drift_measured(), mas.settle()))
    assert drifts[0] == drifts[1]


def nothing(before, now):
    return torch.zeros(len(now))


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_a_drift_of_0_changes_nothing_in_training(learned, mode):
    """As without a budget, dropout and random numbers included."""
    ends = []
    for budget in (None, DriftBudget(LIMIT, nothing, every=1)):
        torch.manual_seed(0)
        model, mas = begun(learned, budget, lambda_reg="auto", floor=0.0)
        train(model, [optimizer_of("Adam", mode, model, mas, every=1)], 40)
        ends.append((model, torch.rand(3)))
        assert len(mas.drift_trace) == (0 if budget is None else 40)
    assert_bits(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_the_same_training_again_gives_the_same_bits(learned):
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        model, mas = begun(learned)
        train(model, [optimizer_of("Adam", "proximal", model, mas)], 60)
        ends.append((model, mas))
    assert_bits(ends[0][0], ends[1][0])
    assert ends[0][1].drift_trace == ends[1][1].drift_trace


def test_training_to_nan_goes_on(learned):
    model, mas = begun(learned)
    strength = mas.lambda_reg
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    train(model, [optimizer_of("Adam", "gradient", model, mas)], 3)
    assert mas.drift_measured() == math.inf
    assert mas.drift_trace[-1].drift == math.inf
    assert mas.lambda_reg == strength  # which no λ could repair
