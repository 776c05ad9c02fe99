"""The study of λ and drift: it learns what it says, and shows what came out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

pytest.importorskip("mlxtend", reason="needs mas_ext[demo]")

from dataclasses import replace

from benchmarks.drift import plot, report, summary
from benchmarks.drift.learning import Learner, read, tasks_of
from benchmarks.drift.networks import Louder, Transformer, cnn, made, mlp
from benchmarks.drift.problems import CHANGES, DRIFTS, PROBLEMS
from benchmarks.drift.study import FREE
from mas_ext._penalty.auto_strength import DEFAULT
from mas_ext.demo.learning import accuracy

SMALL = {"epochs": 1, "images": 200}
QUICK = replace(PROBLEMS["permuted_small"], **SMALL)


# -- learning --------------------------------------------------------------------------------------


def test_without_a_strength_it_is_plain_training():
    found = Learner.started(QUICK, 0, 2).outcome(lambda_reg=0.0)
    model, (first, second) = made(QUICK.network, 0), tasks_of(QUICK, 0, 2)
    for number, task in enumerate((first, second)):
        optimizer = QUICK.optimizer(model.parameters())
        random = torch.Generator().manual_seed(number + 1)
        for chosen in torch.randperm(len(task.train), generator=random).split(64):
            optimizer.zero_grad()
            images, labels = task.train.images[chosen], task.train.labels[chosen]
            cross_entropy(model(images), labels).backward()
            optimizer.step()
    assert found["average_accuracy"] == (accuracy(model, first) + accuracy(model, second)) / 2


def test_an_outcome_leaves_the_start_where_it_is():
    start = Learner.started(QUICK, 0, 2)
    before = [p.detach().clone() for p in start.model.parameters()]
    free, held = start.outcome(lambda_reg=0.0), start.outcome(lambda_reg=1e6)
    assert all(map(torch.equal, before, start.model.parameters()))
    assert len(start.matrix) == 1
    assert held["forgetting"] < free["forgetting"]
    assert start.outcome() == start.outcome(drift=DEFAULT)


def test_what_does_not_stay_finite_is_none():
    explosive = replace(PROBLEMS["permuted_sgd"], **SMALL)
    assert Learner.started(explosive, 0, 2).outcome(lambda_reg=1e35) is None


def test_tasks_compete_where_they_are_incremental():
    apart = Learner.started(replace(PROBLEMS["split"], **SMALL), 0, 3)
    together = Learner.started(replace(PROBLEMS["incremental"], **SMALL), 0, 3)
    assert apart._asked(apart.tasks[2]).classes == (4, 5)
    assert together._asked(together.tasks[0]).classes == (0, 1, 2, 3)  # the second is learned next
    assert together._asked(together.tasks[2]).classes == (0, 1, 2, 3, 4, 5)
    output = torch.randn(5, 10)
    assert torch.equal(read(output, apart.tasks[2]), output[:, 4:6])


@pytest.mark.parametrize("network", [mlp, cnn, Transformer])
def test_networks(network):
    images = torch.rand(3, 784)
    model = made(network, 0)
    assert model(images).shape == (3, 10)
    assert torch.equal(model(images), made(network, 0)(images))
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone)
    torch.testing.assert_close(Louder(model, 10.0)(images), 10 * model(images))


def test_the_default_is_on_the_grid_and_changes_are_changes():
    assert DEFAULT in DRIFTS
    base = PROBLEMS["permuted"]
    changed = {name: change(base) for name, (_, change) in CHANGES.items()}
    assert changed.pop("base") == base
    assert all(problem != base for problem in changed.values())


def test_other_units_change_nothing_but_lambda():
    base, (_, change) = Learner.started(QUICK, 0, 2), CHANGES["units"]
    other = Learner.started(change(QUICK), 0, 2)
    assert other.mas.lambda_proximal == pytest.approx(base.mas.lambda_proximal / 100, rel=1e-3)
    for strength, same in (({}, {}), ({"lambda_reg": 0.3}, {"lambda_reg": 30.0})):
        found, expected = other.outcome(**strength), base.outcome(**same)
        assert found["average_accuracy"] == pytest.approx(expected["average_accuracy"], abs=0.005)


# -- what is shown ---------------------------------------------------------------------------------


def runs(*accuracies):
    return [a if a is None else {"average_accuracy": a, "forgetting": 1 - a} for a in accuracies]


PROBLEM = {
    "title": "a problem",
    "scenario": "permuted",
    "optimizer": "Adam",
    "mode": "proximal",
    "parameters": 1000,
    "found": [3.0, 5.0],
    FREE: runs(0.5, 0.6),
    "lambda": {"1": runs(0.7, 0.8), "10": runs(0.9, 0.8), "100": runs(0.99, None)},
    "drift": {"0.02": runs(0.6, 0.6), "0.2": runs(0.8, 0.86), "2": runs(None, None)},
}
CHANGED = {
    "title": "a problem",
    "kept": 4.0,
    "changes": {
        "base": {
            "title": "as it is",
            "found": [4.0],
            "lambda": {"1": runs(0.7), "10": runs(0.85)},
            "drift": {"0.2": runs(0.8)},
            "kept": runs(0.8),
        },
        "louder": {
            "title": "louder",
            "found": [0.04],
            "lambda": {"1": runs(0.8), "10": runs(0.75)},
            "drift": {"0.2": runs(0.79)},
            "kept": runs(None),
        },
    },
}
RESULTS = {"one": PROBLEM, "two": {**PROBLEM, "mode": "gradient"}, "changes of one": CHANGED}


def test_the_best_is_of_what_stayed_finite():
    assert summary.best(PROBLEM) == (10.0, pytest.approx(0.85))
    assert summary.behind(PROBLEM) == pytest.approx(0.02)
    assert summary.gain(PROBLEM) == pytest.approx(0.28)
    assert list(summary.curve(PROBLEM, "drift")) == [0.02, 0.2]


def test_what_a_change_moves_and_what_another_strength_would_have_reached():
    moved, lacking = summary.moved(CHANGED), summary.lacking(CHANGED)
    assert moved == {"louder": pytest.approx({"best": -0.05, "drift": -0.01, "kept": -0.8})}
    assert list(lacking) == ["base", "louder"]
    assert lacking["base"] == pytest.approx({"best": 0.0, "drift": 0.05, "kept": 0.05})
    assert lacking["louder"] == pytest.approx({"best": 0.0, "drift": 0.01, "kept": 0.8})


def test_tables():
    problems, changes, steady = report.overview(RESULTS)
    row = problems.rows[0]
    assert row[4:] == ["10", "85.0 ± 7.1 / 15.0", "3 to 5", "83.0 ± 4.2 / 17.0", "−2.0"]
    assert "2 of 2; not below fine-tuning: 2 of 2" in problems.note
    base = ["10", "85.0 ± 0.0", "4", "80.0 ± 0.0", "4", "80.0 ± 0.0"]
    assert changes.rows[0] == ["a problem", "as it is", *base]
    moved = ["79.0 ± 0.0 (−1.0)", "4", "not finite (−80.0)"]
    assert changes.rows[1] == ["a problem", "louder", "1", "80.0 ± 0.0 (−5.0)", "0.04", *moved]
    assert steady.rows == [
        ["best λ", "5.0", "0 of 1", "0.0"],
        ["drift 0.2", "1.0", "1 of 1", "5.0"],
        ["λ kept", "80.0", "0 of 1", "80.0"],
    ]
    lost = {**PROBLEM, "drift": {"0.2": runs(None, 0.9)}}
    (table,) = report.overview({"lost": lost})
    assert table.rows[0][-2] == "not finite"
    assert "0 of 1; not below fine-tuning: 0 of 1" in table.note


def test_plots():
    figures = plot.figures(RESULTS, "a machine")
    assert list(figures) == list(report.ENTRY.plots)
    left, right = figures["drift"].axes
    assert len(left.lines) == 2
    assert len(right.lines) == 2 + 1  # and the default
    assert list(left.lines[0].get_ydata()) == pytest.approx([-10.0, 0.0])


def test_the_network_is_the_demos():
    """So that what the study says is said of the demo."""
    from mas_ext.demo.learning import make_model

    ours, theirs = made(PROBLEMS["permuted"].network, 0), make_model(0)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert isinstance(ours, nn.Sequential)
