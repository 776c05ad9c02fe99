"""The demo, on the real digits that come with it, with as little training as shows the point."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mlxtend", reason="needs mas_ext[demo]")

from mas_ext import estimate_importance
from mas_ext.demo import Run, Settings, comparison, metrics, plots, run_demo, sweep
from mas_ext.demo.data import Digits, load_digits, split_by_class
from mas_ext.demo.learning import (
    accuracy,
    forward_of,
    make_model,
    measured_batches,
    within,
)
from mas_ext.demo.methods import METHODS
from mas_ext.demo.report import headline
from mas_ext.demo.scenarios import make_tasks, permutations, rotate
from tests.support.regularizers import assert_refused, refusal

QUICK = Settings(tasks=2, epochs=1, importance_samples=128)
PICTURES = {"accuracy.png", "drift.png", "importance.png", "estimators.png"}
FILES = PICTURES | {"results.json", "report.html"}
NUMBERS = {"average_accuracy", "forgetting", "backward_transfer", "accuracy_matrix", "seconds"}


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, Digits]:
    return load_digits("bundled", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "made" / "for it"


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return run_demo(QUICK, folder, progress=False)


# -- A run -----------------------------------------------------------------------------------------


def test_results_have_the_documented_form(run: Run, folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text("utf-8"))
    assert results == json.loads(json.dumps(run.results))
    assert results["scenario"] == "permuted"
    assert results["settings"]["tasks"] == 2
    assert list(results["methods"]) == ["finetune", "l2sp", "ewc", "mas_proximal", "mas"]
    for numbers in results["methods"].values():
        assert set(numbers) >= NUMBERS
        matrix = numbers["accuracy_matrix"]
        assert [len(row) for row in matrix] == [2, 2]
        assert numbers["average_accuracy"] == metrics.average_accuracy(matrix)
        assert numbers["seconds"] > 0
        assert matrix[0][0] > 0.8  # one epoch is enough to learn the digits


def test_the_first_task_is_the_same_for_all(run: Run) -> None:
    # Same start, same batches, and nothing to protect yet.
    first = [outcome.accuracy_matrix[0] for outcome in run.outcomes.values()]
    assert all(row == first[0] for row in first)
    measured = [name for name, outcome in run.outcomes.items() if outcome.importance[0]]
    assert measured == ["ewc", "mas_proximal", "mas"]
    of_ewc, *of_mas = [run.outcomes[name].importance[0] for name in measured]
    for name, omega in of_mas[0].items():
        torch.testing.assert_close(omega, of_mas[1][name], rtol=0, atol=0)
        assert not torch.allclose(omega, of_ewc[name])


def test_mas_remembers_more_than_fine_tuning(run: Run) -> None:
    methods = run.results["methods"]
    assert methods["mas"]["forgetting"] < methods["finetune"]["forgetting"]
    assert methods["mas_proximal"]["forgetting"] < methods["finetune"]["forgetting"]


def test_every_method_with_a_budget_keeps_it(run: Run) -> None:
    for method, outcome in run.outcomes.items():
        (first, last), numbers = outcome.drifts, run.results["methods"][method]
        assert (last is None) == ("drift" not in numbers) == (method == "finetune")
        if last is not None:
            assert (first.before, first.after) == (0, 0)
            assert 0 < last.after <= QUICK.budget
            assert numbers["drift"][1] == [last.before, last.after]
        assert bool(outcome.trace) == (last is not None)
        if outcome.trace:  # with its own λ, and not that of the other mode
            assert outcome.trace[0].lambda_reg == pytest.approx(outcome.lambdas[0])


def test_same_seed_same_numbers_and_another_seed_others(run: Run) -> None:
    def matrices(seed: int, methods: tuple[str, ...]) -> dict[str, list[list[float]]]:
        settings = Settings(tasks=2, epochs=1, importance_samples=128, seed=seed, methods=methods)
        done = run_demo(settings, progress=False)
        return {method: o.accuracy_matrix for method, o in done.outcomes.items()}

    again = matrices(QUICK.seed, ("finetune", "mas"))
    # Which methods run beside it makes no difference to a method.
    assert again == {method: run.outcomes[method].accuracy_matrix for method in again}
    assert matrices(1, ("finetune",))["finetune"] != again["finetune"]


def test_global_state_stays(digits: tuple[Digits, Digits]) -> None:
    torch.set_num_threads(2)
    before = torch.get_rng_state()
    run_demo(Settings(tasks=1, epochs=1, methods=("finetune",)), progress=False)
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "options",
    [
        {"scenario": "rotated", "tasks": 2, "batch_size": 256},
        {"scenario": "split", "tasks": 2, "batch_size": 256},
        {
            "tasks": 2,
            "lambda_reg": "auto",
            "lambda_proximal": 20.0,
            "methods": ("mas", "mas_proximal"),
        },
        {"tasks": 1, "methods": ("l2sp",)},
    ],
    ids=str,
)
def test_other_scenarios_run_and_report(options: dict, tmp_path: Path) -> None:
    """Also with λ in place of a budget, and of one task and no importance."""
    settings = Settings(epochs=1, importance_samples=32, **options)
    done = run_demo(settings, tmp_path, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert done.tasks[-1].name in page
    assert settings.command() in re.sub(r"</?span>", "", page)
    fixed = settings.lambda_reg is not None
    assert ("λ, MAS" in page) == fixed
    assert ("What was held in place" in page) == (settings.methods != ("l2sp",))
    assert ("How far it drifted" in page) == (not fixed and settings.tasks > 1)
    assert not fixed or not any("drift" in one for one in done.results["methods"].values())
    if settings.tasks == 1:
        numbers = done.results["methods"]["l2sp"]
        assert numbers["forgetting"] == numbers["backward_transfer"] == 0
        assert numbers["average_accuracy"] == numbers["accuracy_matrix"][0][0]


# -- The report ------------------------------------------------------------------------------------


def test_report_needs_nothing_but_itself(run: Run, folder: Path) -> None:
    page = (folder / "report.html").read_text("utf-8")
    assert "http:" not in page
    assert "https:" not in page
    assert not re.search(r"<(script|link|iframe|img)\b", page)
    targets = re.findall(r'(?:src|href)="([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page)
    assert targets
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in targets)


def test_report_says_what_matters(run: Run, folder: Path) -> None:
    page = (folder / "report.html").read_text("utf-8")
    for method, numbers in run.results["methods"].items():
        assert METHODS[method].label in page
        assert f"{100 * numbers['average_accuracy']:.1f} %" in page
    for words in metrics.DEFINITIONS.values():
        assert words in page
    assert QUICK.command() in re.sub(r"</?span>", "", page)
    assert run.results["versions"]["torch"] in page
    assert page.count("<svg") == 6
    assert headline(run) in page


#: The accuracies of methods, and what the report then says of MAS.
SAID = {
    "ahead": (
        {"finetune": 0.5, "l2sp": 0.6, "ewc": 0.7, "mas_proximal": 0.8, "mas": 0.9},
        "With the same kind of step, MAS is 10.0 points ahead of EWC, the best of the others.",
    ),
    "ahead for its step": (
        {"finetune": 0.5, "ewc": 0.8, "mas_proximal": 0.805, "mas": 0.9},
        "With the same kind of step, MAS gains nothing over EWC here: 80.5 % and 80.0 %.",
    ),
    "behind": (
        {"finetune": 0.5, "l2sp": 0.9, "ewc": 0.7, "mas_proximal": 0.8},
        "With the same kind of step, MAS gains nothing over L2-SP here: 80.0 % and 90.0 %.",
    ),
    "behind with another step": (
        {"l2sp": 0.9, "mas": 0.8},
        "MAS, gradient gains nothing over L2-SP here: 80.0 % and 90.0 %.",
    ),
    "behind without protection": (
        {"finetune": 0.9, "mas_proximal": 0.8},
        "MAS, proximal gains nothing over Fine-tuning here: 80.0 % and 90.0 %.",
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_the_headline_names_the_best_whichever_it_is(run: Run, case: str) -> None:
    accuracies, said = SAID[case]
    methods = {
        name: {"average_accuracy": accuracy, "forgetting": 0.1}
        for name, accuracy in accuracies.items()
    }
    one = replace(run)
    one.__dict__["results"] = {"methods": methods}
    words = headline(one)
    best = max(accuracies, key=lambda name: accuracies[name])
    assert words.startswith(f"{METHODS[best].label} did best")
    assert words.endswith(said)
    assert ("ordinary way" in words) == ("finetune" in accuracies and best != "finetune")


def test_nothing_is_said_of_a_single_method(run: Run) -> None:
    one = replace(run)
    one.__dict__["results"] = {"methods": {"mas": {"average_accuracy": 0.9}}}
    assert headline(one) == ""


def test_every_method_looks_different() -> None:
    for looks in (plots.COLOURS, plots.MARKERS, plots.LINES):
        assert list(looks) == list(METHODS)
        assert len(set(looks.values())) == len(METHODS)


# -- The exact Ω against that of batches -----------------------------------------------------------


def test_comparison_of_the_estimators(run: Run, folder: Path) -> None:
    compared = json.loads((folder / "results.json").read_text("utf-8"))["estimators"]
    assert compared["samples"] == QUICK.importance_samples
    rows = {row.pop("batch_size"): row for row in compared["batch"]}
    assert list(rows) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert rows[1] == pytest.approx({"mass": 1, "rank_correlation": 1, "top_overlap": 1}, abs=1e-3)
    # Batches are joined from smaller ones: |a + b| is at most |a| + |b|.
    masses = [row["mass"] for row in rows.values()]
    assert masses == sorted(masses, reverse=True)
    assert masses[-1] < 0.9
    assert all(0 < row["top_overlap"] <= 1 for row in rows.values())
    page = (folder / "report.html").read_text("utf-8")
    assert f"{100 * rows[64]['mass']:.1f} % of Ω is left" in page
    assert f"{100 * (1 - rows[64]['top_overlap']):.1f} % of the" in page
    for words in comparison.DEFINITIONS.values():
        assert words in page


def test_comparison_is_of_the_network_after_the_first_task(
    run: Run, digits: tuple[Digits, Digits]
) -> None:
    torch.set_num_threads(1)  # as in the run: to the bit
    networks = [outcome.first_network for outcome in run.outcomes.values()]
    first = [accuracy(network, run.tasks[0]) for network in networks]
    assert first == [outcome.accuracy_matrix[0][0] for outcome in run.outcomes.values()]
    again = comparison.compare(networks[-1], run.tasks[0], QUICK, lambda doing, step: None)
    assert again == run.estimators


def test_comparison_ticks_as_often_as_it_says(run: Run) -> None:
    done = []
    network, task = run.outcomes["mas"].first_network, run.tasks[0]
    comparison.compare(network, task, QUICK, lambda doing, step: done.append(step))
    assert sum(done) == comparison.work(task, QUICK)


def test_agreement_by_hand() -> None:
    exact = np.arange(20.0) + 1
    assert comparison.agreement(exact, exact / 2) == {
        "mass": 0.5,
        "rank_correlation": pytest.approx(1),
        "top_overlap": 1,
    }
    swapped = exact.copy()
    swapped[[0, 19]] = swapped[[19, 0]]  # of the two largest one is now the smallest
    found = comparison.agreement(exact, swapped)
    assert found["mass"] == 1
    assert found["top_overlap"] == 0.5
    assert found["rank_correlation"] == pytest.approx(1 - 6 * 2 * 19**2 / (20 * (20**2 - 1)))


def test_rank_correlation_is_that_of_scipy() -> None:
    """Also of equal values."""
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.randint(1, 9, (2, 50)).astype(float)
    expected = stats.spearmanr(a, b).statistic
    assert comparison.agreement(a, b)["rank_correlation"] == pytest.approx(expected)


# -- Metrics ---------------------------------------------------------------------------------------

MATRIX = [
    [0.9, 0.1, 0.2],
    [0.95, 0.8, 0.1],
    [0.6, 0.7, 0.85],
]


def test_metrics_by_hand() -> None:
    assert metrics.average_accuracy(MATRIX) == pytest.approx((0.6 + 0.7 + 0.85) / 3)
    # The best of task 1 came after task 2.
    assert metrics.forgetting(MATRIX) == pytest.approx(((0.95 - 0.6) + (0.8 - 0.7)) / 2)
    assert metrics.backward_transfer(MATRIX) == pytest.approx(((0.6 - 0.9) + (0.7 - 0.8)) / 2)
    assert metrics.accuracy_so_far(MATRIX) == pytest.approx([0.9, 0.875, 2.15 / 3])
    assert metrics.first_task_accuracy(MATRIX) == [0.9, 0.95, 0.6]


# -- Data and scenarios ----------------------------------------------------------------------------


def test_bundled_digits(digits: tuple[Digits, Digits]) -> None:
    train, test = digits
    assert train.images.shape == (4000, 784)
    assert train.labels.bincount().tolist() == [400] * 10
    assert test.labels.bincount().tolist() == [100] * 10
    assert train.images.min() == 0
    assert train.images.max() == 1


def test_split_by_class_puts_every_image_on_one_side() -> None:
    labels = torch.arange(50) % 2
    train, test = split_by_class(Digits(torch.arange(50.0)[:, None].expand(50, 784), labels))
    numbers = torch.cat([train.images[:, 0], test.images[:, 0]])
    assert sorted(numbers.tolist()) == list(range(50))
    assert test.labels.bincount().tolist() == [5, 5]


def test_permuted_tasks(digits: tuple[Digits, Digits]) -> None:
    orders = permutations(4, seed=3)
    assert torch.equal(orders[0], torch.arange(784))
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(784))
    assert not torch.equal(orders[1], orders[2])
    assert not torch.equal(permutations(2, seed=4)[1], orders[1])
    tasks = make_tasks("permuted", 2, 3, *digits)  # more tasks only add
    for order, task in zip(orders, tasks, strict=False):
        for before, after in zip(digits, (task.train, task.test), strict=True):
            assert torch.equal(after.images, before.images[:, order])
            assert torch.equal(after.labels, before.labels)


def test_rotation() -> None:
    images = torch.rand(3, 784)
    square = images.reshape(3, 28, 28)
    assert torch.equal(rotate(images, 0), images)
    torch.testing.assert_close(rotate(images, 1e-4), images, rtol=0, atol=1e-3)
    # torch.rot90 turns anticlockwise too.
    quarter = torch.rot90(square, 1, (1, 2)).reshape(3, 784)
    torch.testing.assert_close(rotate(images, 90), quarter, rtol=0, atol=1e-4)


def test_rotated_tasks(digits: tuple[Digits, Digits]) -> None:
    tasks = make_tasks("rotated", 3, 0, *digits)
    assert [task.name for task in tasks] == ["0°", "20°", "40°"]
    assert torch.equal(tasks[0].test.images, digits[1].images)
    torch.testing.assert_close(tasks[2].test.images, rotate(digits[1].images, 40))


def test_split_tasks_share_no_class(digits: tuple[Digits, Digits]) -> None:
    tasks = make_tasks("split", 5, 0, *digits)
    assert sorted(c for task in tasks for c in task.classes) == list(range(10))
    for task in tasks:
        assert (
            set(task.train.labels.tolist()) == set(task.classes) == set(task.test.labels.tolist())
        )
        assert set(within(task, task.test.labels).tolist()) == {0, 1}


def test_a_split_task_is_measured_by_the_outputs_that_it_reads(
    digits: tuple[Digits, Digits],
) -> None:
    task, model = make_tasks("split", 2, 0, *digits)[1], make_model(0)
    images = [task.train.images[:64]]
    found = estimate_importance(model, images, forward=forward_of(task))
    right = estimate_importance(model, images, objective=lambda out: out[:, 2:4].square().sum(1))
    for name, omega in right.items():
        torch.testing.assert_close(found[name], omega)


def test_importance_of_a_part_is_measured_on_every_class(digits: tuple[Digits, Digits]) -> None:
    (task,) = make_tasks("permuted", 1, 0, *digits)
    labels = torch.cat([y for _, y in measured_batches(task, QUICK)])
    assert len(labels) == QUICK.importance_samples
    assert labels.bincount().min() >= 12
    everything = measured_batches(task, Settings())
    assert torch.equal(torch.cat([x for x, _ in everything]), task.train.images)


def test_same_start_for_the_same_seed() -> None:
    weights = [make_model(seed).get_parameter("hidden1.weight") for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_sweep_is_over_strengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "LAMBDAS", (1.0, 1e9))
    monkeypatch.setattr(sweep, "BUDGETS", (QUICK.budget, 1e-4))
    settings = replace(QUICK, sweep=True, methods=("mas_proximal",))
    run = run_demo(settings, tmp_path, progress=False)
    found = json.loads((tmp_path / "results.json").read_text("utf-8"))["sweep"]
    assert found == run.sweep
    for kind in ("lambda", "budget"):
        weak, strong = found[kind]["average_accuracy"]
        assert strong < weak, "what is held altogether learns nothing"
        assert found[kind]["forgetting"][1] == pytest.approx(0, abs=0.01)
    (default,) = run.results["methods"].values()
    assert found["budget"]["average_accuracy"][0] == default["average_accuracy"]
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    assert "How strong" in (tmp_path / "report.html").read_text("utf-8")


# -- Settings --------------------------------------------------------------------------------------


WRONG = {
    "scenario": ({"scenario": "shuffled"}, "'permuted'"),
    "data": ({"data": "cifar"}, "'bundled'"),
    "methods": ({"methods": ("l2",)}, "'l2sp'"),
    "methods is empty": ({"methods": ()}, "methods"),
    "tasks": ({"tasks": 0}, "0"),
    "tasks of split": ({"scenario": "split", "tasks": 6}, "at most 5"),
    "epochs": ({"epochs": 0}, "0"),
    "batch_size": ({"batch_size": 1.5}, "1.5"),
    "seed": ({"seed": -1}, "-1"),
    "lr": ({"lr": 0.0}, "0"),
    "lambda_reg": ({"lambda_reg": -1.0}, "-1"),
    "lambda_proximal": ({"lambda_proximal": float("nan")}, "nan"),
    "budget": ({"budget": 0.0}, "0"),
    "drift": ({"drift": 0.0}, "0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_settings_that_cannot_be_used(case: str) -> None:
    wrong, word = WRONG[case]
    assert_refused(refusal(lambda: Settings(**wrong), ValueError, case.split()[0], word))
