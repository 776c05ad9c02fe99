"""Real Trainers, of transformers and of Lightning: against the loop by hand, and resumed."""

import copy
import importlib
import sys
from functools import partial

import pytest
import torch
from torch import nn

import mas_ext
from tests.support.hand_loop import HandLoop, Protection, sgd
from tests.support.oracle import assert_exact, one_by_one
from tests.support.regularizers import assert_refused, assert_states_equal, refusal
from tests.support.trainers import EPOCHS, LIBRARIES, STOP, Stop, batches, logits, loss_of, vectors
from tests.support.zoo.small import assert_same

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*logging interval", "ignore:.*ckpt_path"
)
X = vectors(1)[0]


@pytest.fixture(params=LIBRARIES)
def library(request):
    return LIBRARIES[request.param]()


def exact(model, x):
    return one_by_one(copy.deepcopy(model), [x], forward=logits)


# -- The loop --------------------------------------------------------------------------------------
def train_by_hand(library, hand, seed, accumulate=1, **how):
    for _ in range(EPOCHS):
        data = batches(seed)
        for k in range(0, len(data), accumulate):
            part = data[k : k + accumulate]
            factor = len(part) / library.divisor(len(part), accumulate)
            hand.step([lambda m, b=b, f=factor: f * loss_of(m, b) for b in part], **how)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_a_trainer_is_the_loop_by_hand(library, tmp_path, mode, accumulate):
    model, callback, recorder = (
        library.model(),
        library.MASCallback(5.0, mode=mode, every=1),
        library.Recorder(),
    )
    library.learn(model, library.data(1), callback, tmp_path)
    hand = HandLoop(model, Protection.of(callback.mas), sgd(0.5, 0.0))
    options = {"accumulate": accumulate, "clip": 0.02, "others": [recorder]}
    made = library.learn(model, library.data(2), callback, tmp_path, **options)
    train_by_hand(library, hand, 2, accumulate, clip=0.02, proximal=mode == "proximal")
    assert_same(dict(model.named_parameters()), hand.theta)
    assert max(hand.penalties) > 1e-6
    # Lightning logs in float32.
    assert recorder.logged == pytest.approx(hand.penalties, rel=1e-6)
    if library.name == "transformers":
        logged = [entry["mas_penalty"] for entry in made.state.log_history if "loss" in entry]
        assert logged == pytest.approx(hand.penalties, rel=1e-12)


def test_before_the_first_task_a_trainer_trains_as_without(library, tmp_path):
    models, recorder = (library.model(), library.model()), library.Recorder()
    library.learn(models[0], library.data(1), library.Callback(), tmp_path)
    library.learn(models[1], library.data(1), library.MASCallback(9.0), tmp_path, others=[recorder])
    assert_states_equal(models[1].state_dict(), models[0].state_dict())
    assert recorder.logged == [None] * 10


# -- The end of a task -----------------------------------------------------------------------------
def test_the_end_of_training_measures_its_data_exactly(library, tmp_path):
    model, callback = library.model(dropout=0.5), library.MASCallback()
    library.learn(model, library.data(1), callback, tmp_path)
    assert_exact(callback.mas.importance, exact(model, X))
    assert_same(dict(callback.mas.anchor), dict(model.named_parameters()), 0, 0)


def test_consolidating_by_hand(library, tmp_path):
    model, callback = library.model(), library.MASCallback(consolidate=False, max_samples=8)
    library.learn(model, library.data(1), callback, tmp_path)
    assert callback.mas.num_tasks == 0
    callback.consolidate([X], estimator="batch")
    expected = mas_ext.estimate_importance(model, [X], estimator="batch", max_samples=8)
    assert_same(callback.mas.importance, expected, 0, 0)


def test_options_reach_mas_and_its_measurements(library, tmp_path):
    model = library.model()
    how = {"estimator": "batch", "objective": "l1", "max_samples": 6}
    if library.name == "transformers":
        how["forward"] = lambda model, batch: model.body(batch["x"])
    callback = library.MASCallback(0.5, merge="max", params=["body.3.*"], **how)
    library.learn(model, library.data(1), callback, tmp_path)
    assert repr(callback.mas).startswith("MAS(lambda_reg=0.5, merge='max'")
    how.pop("forward", None)
    expected = mas_ext.estimate_importance(model, X.split(4), params=["body.3.*"], **how)
    assert_same(callback.mas.importance, expected)


@pytest.mark.parametrize(
    ("method", "options"),
    [("ewc", {"criterion": "empirical_fisher"}), (mas_ext.L2SP, {"max_samples": 8})],
    ids=["ewc", "l2sp"],
)
def test_another_method(library, tmp_path, method, options):
    model = library.model()
    callback = library.MASCallback(0.5, method=method, params=["body.3.*"], **options)
    library.learn(model, library.data(1), callback, tmp_path)
    if method == "ewc":
        expected = one_by_one(
            copy.deepcopy(model).double(),
            batches(1),
            criterion=lambda output, batch: nn.functional.cross_entropy(
                output, batch[1], reduction="none"
            ),
            reduction="square",
            forward=lambda model, batch: logits(model, batch[0]),
        )
        expected = {name: expected[name] for name in callback.mas.importance}
    else:
        expected = {name: torch.ones_like(t) for name, t in callback.mas.importance.items()}
    assert len(callback.mas.importance) == 2
    assert_same(callback.mas.importance, expected, 1e-6, 1e-12)
    name = type(callback.mas).__name__.lower()
    recorder = library.Recorder(f"{name}_penalty")
    library.learn(model, library.data(2), callback, tmp_path, others=[recorder])
    assert recorder.logged[-1] > 0


def test_a_mas_that_is_passed_in_goes_on(library, tmp_path):
    """Also of a part of the model, and from a file."""
    model = library.model()
    callback = library.MASCallback(mas=mas_ext.MAS(model, 2.0))
    library.learn(model, library.data(1), callback, tmp_path)
    callback.mas.save(tmp_path / "mas.safetensors")
    again = copy.deepcopy(model)
    mas = mas_ext.MAS(again)
    mas.load(tmp_path / "mas.safetensors")
    for one, with_mas in ((model, callback), (again, library.MASCallback(mas=mas))):
        library.learn(one, library.data(2), with_mas, tmp_path)
    assert_states_equal(again.state_dict(), model.state_dict())
    assert_states_equal(mas.state_dict(), callback.mas.state_dict())
    assert mas.num_tasks == 2


def test_a_model_that_was_made_anew_is_followed(library, tmp_path):
    model, callback, recorder = library.model(), library.MASCallback(2.0), library.Recorder()
    library.learn(model, library.data(1), callback, tmp_path)
    before = {name: omega.clone() for name, omega in callback.mas.importance.items()}
    again = copy.deepcopy(model)
    library.learn(again, library.data(2), callback, tmp_path, others=[recorder])
    assert recorder.logged[-1] > 0
    assert callback.mas.num_tasks == 2
    assert all((callback.mas.importance[n] >= before[n]).all() for n in before)


def test_a_training_that_is_broken_off_leaves_nothing_behind(library, tmp_path):
    model, callback = library.model(), library.MASCallback(2.0)
    library.learn(model, library.data(1), callback, tmp_path)
    stopping = [library.Stopping(3)]
    with pytest.raises(Stop):
        library.learn(model, library.data(2), callback, tmp_path, others=stopping)
    optimizer = library.optimizer(library.last)
    if library.name == "transformers":  # which does not tell its callbacks of an error
        library.learn(model, library.data(2), callback, tmp_path, optimizer=optimizer)
    else:
        library.learn(model, library.data(2), callback, tmp_path)
    assert not optimizer._optimizer_step_pre_hooks
    assert callback.mas.num_tasks == 2


# -- Resumed ---------------------------------------------------------------------------------------
def second_task(library, callback, folder, data, **options):
    """A task whose end this Trainer does not see, and one with a checkpoint at every step."""
    model = library.model(dropout=library.dropout)
    library.learn(model, library.data(1), callback, folder / "first", lr=0.05)
    made = library.learn(model, data, callback, folder, **options, **SAVING)
    return model, made


SAVING = {"lr": 0.05, "momentum": 0.9, "saves": True}


class Resumable:
    """Batches that continue where a checkpoint was made, which a DataLoader's do not."""

    def __init__(self, seed):
        self.data, self.position = batches(seed), 0

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        for k in range(self.position % len(self), len(self)):
            self.position = k + 1
            yield self.data[k]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


STEPS = [
    *[(name, step) for name in LIBRARIES for step in (STOP - 1, 5)],
    ("lightning", 10),  # which resumes at the end too, and then ends the task
]


@pytest.mark.parametrize(("library", "step"), STEPS, indirect=["library"])
@pytest.mark.parametrize("mode", ["gradient", "proximal", "with a budget"])
def test_a_training_resumed_from_its_checkpoint_ends_in_the_same_bits(
    library, tmp_path, mode, step
):
    data = (lambda: Resumable(2)) if library.name == "lightning" else partial(library.data, 2)
    options = {"mode": mode, "max_samples": 10}
    if mode == "with a budget":
        budget = mas_ext.DriftBudget(0.01, every=3, slack=2.0)
        options |= {"mode": "gradient", "budget": budget}
    uninterrupted, folder = library.MASCallback(20.0, **options), tmp_path / "whole"
    whole, first = second_task(library, uninterrupted, folder, data())
    if step == STOP - 1:
        folder, callback = tmp_path / "part", library.MASCallback(20.0, **options)
        stopping = [library.Stopping(STOP)]
        with pytest.raises(Stop):
            second_task(library, callback, folder, data(), others=stopping)
    # Nothing but a file is left of it: another model, another callback.
    model, callback = library.model(7, library.dropout), library.MASCallback(**options)
    is_last = library.name == "transformers" and step == STOP - 1
    resume = True if is_last else library.checkpoint(folder, step)
    made = library.learn(model, data(), callback, folder, resume=resume, **SAVING)
    assert_states_equal(model.state_dict(), whole.state_dict())
    states = [library.optimizer(t).state_dict()["state"] for t in (made, first)]
    assert_states_equal(*states)
    assert_states_equal(callback.mas.state_dict(), uninterrupted.mas.state_dict())
    assert (callback.mas.lambda_reg, callback.mas.num_tasks) == (uninterrupted.mas.lambda_reg, 2)
    resumed, trace = callback.mas.drift_trace, uninterrupted.mas.drift_trace
    assert resumed == trace[len(trace) - len(resumed) :]


def test_a_budget_is_kept_and_logged(library, tmp_path):
    """The same as in a loop of one's own."""
    model, budget = library.model(), mas_ext.DriftBudget(0.01, every=2)
    callback, recorder = library.MASCallback(budget=budget), library.Recorder("mas_drift")
    for seed in (1, 2):
        library.learn(model, library.data(seed), callback, tmp_path, others=[recorder])
    trace = callback.mas.drift_trace
    assert recorder.logged[-1] == pytest.approx(trace[-1].drift, rel=1e-6)
    plain = library.model()
    by_hand = mas_ext.MAS(plain, budget=budget)
    for seed in (1, 2):
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
        handle = by_hand.attach(optimizer)
        for batch in batches(seed) * EPOCHS:
            optimizer.zero_grad()
            loss_of(plain, batch).backward()
            optimizer.step()
        handle.remove()
        settled = by_hand.settle()
        assert settled.after <= 0.01
        by_hand.consolidate([x for x, _ in batches(seed)], forward=logits)
    assert_same(dict(model.named_parameters()), dict(plain.named_parameters()))
    assert (callback.settled.before, callback.settled.after) == pytest.approx(
        (settled.before, settled.after)
    )
    assert len(trace) > 4
    for record, other in zip(trace, by_hand.drift_trace, strict=True):
        assert tuple(record) == pytest.approx(tuple(other))


# -- Refusals --------------------------------------------------------------------------------------
def test_before_the_first_training_there_is_nothing(library):
    callback = library.MASCallback()
    assert callback.mas is None
    case = refusal(lambda: callback.consolidate([X]), RuntimeError, "train first", "mas=")
    assert_refused(case)


@pytest.mark.parametrize("name", [*LIBRARIES, "avalanche"])
def test_without_the_library_the_error_says_what_to_install(name, monkeypatch):
    package = {"lightning": "lightning.pytorch", "avalanche": "avalanche.core"}.get(name, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"mas_ext.integrations.{name}", raising=False)
    case = refusal(importlib.import_module, ImportError, "needs", f"pip install 'mas_ext[{name}")
    assert_refused(case, f"mas_ext.integrations.{name}")


MAS = mas_ext.MAS(nn.Linear(1, 1))
BAD = {
    "lambda_reg": ({"lambda_reg": -1}, ValueError, "-1"),
    "drift": ({"lambda_reg": "auto", "drift": -1}, ValueError, "-1"),
    "merge": ({"merge": "median"}, ValueError, "'sum'"),
    "mode": ({"mode": "both"}, ValueError, "'proximal'"),
    "estimator": ({"estimator": "exact"}, ValueError, "'per_sample'"),
    "training": ({"training": True}, ValueError, "estimator='batch'"),
    "samples": ({"samples": 3}, TypeError, "max_samples"),
    "mas": ({"mas": MAS, "merge": "max"}, ValueError, "leave merge"),
    "method": ({"method": "si"}, ValueError, "'ewc'"),
    "option of another method": ({"method": "l2sp", "merge": "max"}, TypeError, "L2SP"),
    "method beside": ({"mas": MAS, "method": "ewc"}, ValueError, "leave one"),
    "lambda_reg beside": ({"mas": MAS, "lambda_reg": 1}, ValueError, "leave lambda_reg"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(library, case):
    options, kind, *words = BAD[case]
    create = refusal(lambda: library.MASCallback(**options), kind, case.split()[0], *words)
    assert_refused(create)


def test_what_cannot_be_measured_or_penalised_is_refused_before_training(library, tmp_path):
    """Data without an end, another model's MAS."""
    model, other = library.model(), mas_ext.MAS(library.model())

    def learn(data, callback):
        return lambda: library.learn(model, data, callback, tmp_path, max_steps=4)

    endless = refusal(learn(library.endless(), library.MASCallback()), ValueError, "max_samples=")
    foreign = library.MASCallback(mas=other)
    another = refusal(learn(library.data(1), foreign), ValueError, "optimizer", "none")
    for case in (endless, another):
        assert_refused(case, unchanged=(model,))
    callback = library.MASCallback(max_samples=8)
    learn(library.endless(), callback)()
    assert callback.mas.num_tasks == 1
