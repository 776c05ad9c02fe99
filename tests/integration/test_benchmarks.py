"""The benchmarks: wrong providers are found, and what is shown is what was measured."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from math import prod

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("mlxtend", reason="needs mas_ext[demo]")
pytest.importorskip("avalanche", reason="needs mas_ext[avalanche]")
pytest.importorskip("transformers", reason="needs mas_ext[transformers]")

from rich.console import Console

from benchmarks import (
    job,
    memory_traffic,
    narrow,
    plot,
    report,
    roofline,
    runner,
    scaling,
    training,
)
from benchmarks.benchmark import Options
from benchmarks.drift.learning import Learner, tasks_of
from benchmarks.drift.problems import PROBLEMS, seeded
from benchmarks.job import Provider
from benchmarks.machine import machine
from benchmarks.measure import interleave
from benchmarks.models import TRAINING
from benchmarks.per_sample.floor import products
from benchmarks.registry import BENCHMARKS, JOBS
from benchmarks.retention import summary as retained
from benchmarks.retention.methods import METHODS, TRAININGS, UNIFORM, Method
from benchmarks.retention.texts import LENGTH, Texts
from benchmarks.state import Size, flatten, linear, make_state
from benchmarks.text import Table, count, duration, percent
from mas_ext import functional
from mas_ext.demo.learning import accuracy, make_model

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
TINY = Size("a linear layer", lambda: linear(4, 2))


@pytest.fixture
def uncompiled():
    """Runs what is given to torch.compile as it is, because compiling takes seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


# -- providers -------------------------------------------------------------------------------------
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", JOBS)
def test_wrong_providers_of_a_list_are_found(name):
    chosen, state = JOBS[name], make_state(linear(5, 3, 2))
    job.check(chosen, chosen.providers, state, flatten(state))

    def changes_nothing(s):
        return chosen.providers[0].step(make_state(linear(5, 3, 2)))  # the right value

    with pytest.raises(AssertionError, match="tensor"):
        job.check(chosen, [Provider("wrong", changes_nothing, 0)], state, state)


@pytest.mark.parametrize("name", JOBS)
def test_one_pass_moves_the_bytes_of_the_rooflines_streams(name):
    streams = JOBS[name].streams(make_state(linear(4, 2)))
    moved = 4 * (len(streams) + roofline.WRITTEN[len(streams)])  # all are read
    assert JOBS[name].bytes_per_parameter == JOBS[name].providers[0].moved == moved
    assert min(p.moved for p in JOBS[name].providers) == moved


@needs_compiler
@pytest.mark.parametrize("streams", roofline.WRITTEN)
def test_the_roofline_visits_every_element(streams):
    roofline.check(streams)


@pytest.mark.usefixtures("uncompiled")
def test_wrong_providers_of_training_are_found(monkeypatch):
    mlp = TRAINING["mlp"]
    training.check(mlp, list(training.PROVIDERS))
    monkeypatch.setitem(training.PROVIDERS, "Avalanche", training.PROVIDERS[training.PLAIN])
    with pytest.raises(AssertionError, match="Avalanche: the step is off"):
        training.check(mlp, ["Avalanche"])

    ends = training.task_end.PROVIDERS
    training.check_task_end(mlp, samples=256)
    monkeypatch.setitem(ends, training.EXACT, ends[training.BATCH])
    with pytest.raises(AssertionError, match="Ω is not exact"):
        training.check_task_end(mlp, samples=256)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtypes", narrow.DTYPES.values(), ids=narrow.DTYPES)
def test_wrong_providers_of_narrow_values_are_found(dtypes):
    tensors = narrow.make(2048, *dtypes)
    for name, step in narrow.PROVIDERS.items():
        narrow.check(tensors, step, name)
    with pytest.raises(AssertionError, match="wrong"):
        narrow.check(tensors, lambda s: narrow.fused(narrow.make(2048, *dtypes)), "wrong")


@needs_compiler
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", scaling.AXES)
def test_every_axis_verifies_its_providers(name):
    calls = scaling.AXES[name].prepare(25 if name.startswith("parameters") else 4, True)
    assert next(iter(calls)) == "mas_ext"
    assert len(calls) >= 3


# -- memory traffic --------------------------------------------------------------------------------
class Counter(TorchDispatchMode):
    """Counts the bytes that mas_ext's operators read and write, from schemas and tensors."""

    moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "mas_ext":
            schema = zip(func._schema.arguments, args, strict=False)
            written = [v for a, v in schema if a.alias_info is not None and a.alias_info.is_write]
            given, written = tree_leaves((args, kwargs)), tree_leaves(written)
            tensors = [t for t in given + written if isinstance(t, torch.Tensor) and t.numel() > 1]
            self.moved += sum(t.nbytes for t in tensors)
        return result


@pytest.mark.parametrize("operator", memory_traffic.OPERATORS)
@pytest.mark.parametrize("theta", memory_traffic.THETA)
@pytest.mark.parametrize("omega", memory_traffic.OMEGA)
def test_bytes_per_parameter_are_those_of_a_call(operator, theta, omega):
    numel = 4096
    tensors = narrow.make(numel, getattr(torch, theta), getattr(torch, omega))
    g, p, a, o = [tensors.grads], [tensors.params], [tensors.anchors], [tensors.omega]
    first, second = [torch.rand_like(g[0])], [torch.rand_like(g[0])]
    codes = {"omega_scales": [tensors.scales]} if omega == "uint8" else {}
    f, gradient = functional, {"mode": "gradient", **codes}
    adam = {"exp_avgs": first, "exp_avg_sqs": second, "steps": torch.ones(1), "eps": 1e-8}
    calls = {
        "accumulate_importance_": lambda: f.accumulate_importance_([torch.zeros(numel)], g, 1.0),
        "penalty": lambda: f.penalty(p, a, o, 1.0, **codes),
        "add_penalty_grad_": lambda: f.add_penalty_grad_(g, p, a, o, 1.0, **codes),
        "proximal_step_": lambda: f.proximal_step_(p, a, o, 1.0, 0.1, **codes),
        "sgd_step_": lambda: f.sgd_step_(p, g, a, o, 1.0, 0.1, **gradient),
        "sgd_step_, momentum": lambda: f.sgd_step_(
            p, g, a, o, 1.0, 0.1, momentum_buffers=first, momentum=0.9, **gradient
        ),
        "adamw_step_": lambda: f.adamw_step_(
            p, g, a, o, 1.0, 0.1, betas=(0.9, 0.999), weight_decay=0.0, **adam, **gradient
        ),
    }
    with Counter() as counter:
        calls[operator]()
    assert counter.moved / numel == memory_traffic.bytes_per_parameter(operator, theta, omega)


# -- measuring, numbers and tables -----------------------------------------------------------------
def test_rounds_fit_the_time_limit_but_are_never_too_few():
    calls = {"a": lambda: None, "b": lambda: None}
    assert [len(s) for s in interleave(calls, rounds=50, budget=0.0).values()] == [3, 3]
    assert [len(s) for s in interleave(calls, rounds=5, budget=60.0).values()] == [5, 5]
    seconds = interleave(calls, rounds=5, every={"b": 2})
    assert (len(seconds["a"]), len(seconds["b"])) == (5, 3)


def test_added_time_is_that_of_the_parts_that_differ():
    plain = [training.Seconds(b, 1) for b in (10, 20, 30)]
    after = [training.Seconds(b, 3) for b in (30, 10, 20)]
    assert training.added(after, plain, in_the_loss=False) == [2, 2, 2]
    assert training.added(after, plain, in_the_loss=True) == [22, -8, -8]


def test_numbers_and_tables():
    assert [count(n) for n in (10, 269_322, 25_557_032)] == ["10", "269 k", "25.6 M"]
    seconds = (2e-6, 1.5e-5, 0.0042, 0.042, 4.2, 42)
    assert [*map(duration, seconds)] == ["2.0 µs", "15 µs", "4.2 ms", "42 ms", "4.2 s", "42 s"]
    assert percent(-0.123) == "−12.3 %"
    table = Table("t", ("", "a|b"), [["mas_ext", "1"], ["x", "2"]], frozenset({"mas_ext"}))
    lines = ["t", "", "|  | a\\|b |", "|---|---|", "| **mas_ext** | **1** |", "| x | 2 |"]
    assert table.markdown().splitlines() == lines


# -- runs and files --------------------------------------------------------------------------------
def run(out, *names):
    def run_tiny(chosen, options: Options):
        yield "tiny", job.measure(chosen, TINY, options, budget=0.0)

    options = {"quick": True, "rounds": 3, "sizes": (), "workloads": (), "seeds": (0,)}
    chosen = [replace(BENCHMARKS[name], run=partial(run_tiny, JOBS[name])) for name in names]
    results = runner.load(out / "results.json")
    runner.run(chosen, options, results, out, Console(quiet=True))
    return report.read_json(out / "results.json")


@needs_compiler
@pytest.mark.usefixtures("uncompiled")
def test_a_run_writes_results_plots_and_a_report(tmp_path):
    other = {"machine": {**machine(), "cpu": "another"}, "runs": {}, "benchmarks": {}}
    report.write_json(tmp_path / "results.json", other)
    results = run(tmp_path, "penalty")
    size = results["benchmarks"]["penalty"]["tiny"]
    assert size["providers"]["mas_ext"]["bytes_moved"] == 200
    assert (tmp_path / "penalty.png").stat().st_size > 10_000
    text = (tmp_path / "report.html").read_text("utf-8")
    assert size["title"] in text
    assert "data:image/png" in text
    # The file's machine is another one, so the run names its own.
    assert results["runs"]["penalty"]["machine"]["cpu"] == machine()["cpu"]
    block = report.block(BENCHMARKS["penalty"], results, "plots")
    assert f"(Measured on: {machine()['cpu']}" in block

    again = run(tmp_path, "accumulate")  # keeps the other results
    assert again["benchmarks"]["penalty"]["tiny"] == size
    kept = runner.load(tmp_path / "results.json", kept=["penalty"])
    assert list(kept["benchmarks"]) == list(kept["runs"]) == ["penalty"]
    assert kept["machine"]["cpu"] == machine()["cpu"]
    assert "machine" not in kept["runs"]["penalty"]


@needs_compiler
@pytest.mark.usefixtures("uncompiled")
def test_an_interrupted_run_keeps_the_results(tmp_path, monkeypatch):
    before, measure = run(tmp_path, "penalty"), job.measure

    def interrupted(chosen, *arguments, **options):
        if chosen.name == "accumulate":
            raise KeyboardInterrupt
        return measure(chosen, *arguments, **options)

    monkeypatch.setattr(job, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "penalty", "accumulate")
    assert report.read_json(tmp_path / "results.json") == before


@pytest.mark.parametrize("page", report.pages(), ids=lambda page: page.name)
def test_tables_in_the_documentation_are_those_of_the_results(page):
    """If not: python -m benchmarks report --out benchmarks/results."""
    results, text = report.read_json(report.RESULTS), page.read_text("utf-8")
    assert report.updated(page, list(BENCHMARKS.values()), results) == text


def test_every_benchmark_has_tables_plots_and_committed_results():
    assert set(report.TABLES) == set(BENCHMARKS)
    assert set(report.read_json(report.RESULTS)["benchmarks"]) == set(BENCHMARKS)
    assert set(plot.PLOTS) == {path.stem for path in report.RESULTS.parent.glob("*.png")}


# -- exact importance ------------------------------------------------------------------------------
WEIGHTS = {
    "linear": (nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3, bias=False)), (5, 6)),
    "sequences": (nn.Linear(6, 4), (3, 5, 6)),
    "convolution": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 7, 7)),
    "groups": (nn.Conv1d(4, 6, 3, groups=2), (3, 4, 7)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), (3, 4, 5, 5)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_floor_has_the_products_of_the_weights(name):
    """A weight's gradient takes as many operations as its use in the forward pass."""
    model, shape = WEIGHTS[name]
    x = torch.randn(shape)
    with FlopCounterMode(display=False) as counter:
        model(x)
    found = products(model, x)
    assert counter.get_total_flops() == sum(2 * prod(s) * n for s, n in found.items())


# -- the drift study -------------------------------------------------------------------------------
SMALL = {"epochs": 1, "images": 200}
QUICK = replace(PROBLEMS["permuted_small"], **SMALL)


def test_without_a_penalty_the_study_is_plain_training():
    found = Learner.after_first_task(QUICK, 0, 2).outcome(lambda_reg=0.0)
    model, (first, second) = seeded(QUICK.network, 0), tasks_of(QUICK, 0, 2)
    for number, task in enumerate((first, second)):
        optimizer = QUICK.optimizer(model.parameters())
        random = torch.Generator().manual_seed(number + 1)
        for chosen in torch.randperm(len(task.train), generator=random).split(64):
            optimizer.zero_grad()
            images, labels = task.train.images[chosen], task.train.labels[chosen]
            cross_entropy(model(images), labels).backward()
            optimizer.step()
    assert found["average_accuracy"] == (accuracy(model, first) + accuracy(model, second)) / 2


def test_outcomes_start_from_the_same_state():
    start = Learner.after_first_task(QUICK, 0, 2)
    before = [p.detach().clone() for p in start.model.parameters()]
    free, strong = start.outcome(lambda_reg=0.0), start.outcome(lambda_reg=1e6)
    assert all(map(torch.equal, before, start.model.parameters()))
    assert strong["forgetting"] < free["forgetting"]
    assert start.outcome() == start.outcome(drift=start.mas.drift)
    explosive = replace(PROBLEMS["permuted_sgd"], **SMALL)
    assert Learner.after_first_task(explosive, 0, 2).outcome(lambda_reg=1e35) is None


def test_networks_and_scenarios():
    demo, ours = make_model(0), seeded(PROBLEMS["permuted"].network, 0)
    assert all(map(torch.equal, ours.parameters(), demo.parameters()))
    together = Learner.after_first_task(replace(PROBLEMS["incremental"], **SMALL), 0, 3)
    assert together.as_tested(together.tasks[2]).classes == (0, 1, 2, 3, 4, 5)


# -- what a pretrained model keeps -----------------------------------------------------------------
def point(drift, new):
    return {"drift": drift, "perplexity": {"new": new, "english": 2.0, "code": 3.0}, "answered": 1}


def test_the_lowest_perplexity_within_a_limit_of_the_drift():
    curves = {"steps": [point(0.04, 20.0), point(0.36, 5.0)], UNIFORM: [point(0.01, 30.0)]}
    runs = [{"before": point(0.0, 80.0), "curves": curves}]
    result = {"trainings": {"plain": runs}}

    def found(limit, way="steps"):
        return retained.perplexity(result, Method("plain", way), limit)[0]

    assert found(1.0) == found(0.36) == pytest.approx(5.0)
    assert found(0.01) == pytest.approx(40.0)  # halfway in the root of the drift
    assert found(0.16) == pytest.approx(10.0)
    assert found(0.01, UNIFORM) == pytest.approx(30.0)
    assert found(0.1225, UNIFORM) == pytest.approx((30.0 * 5.0) ** 0.5)
    first = retained.within(result, Method("plain"), 0.01)[0]
    assert first.over(retained.start(result), "new") == pytest.approx(0.5)


def test_what_is_tested_is_not_trained_on(tmp_path):
    for number, name in enumerate(("new", "english", "code")):
        tokens = [str(number * 100_000 + k) for k in range(40 * LENGTH + 5)]
        (tmp_path / f"{name}.txt").write_text(" ".join(tokens))

    class Numbers:
        def __call__(self, text):
            return type("", (), {"input_ids": [int(word) for word in text.split()]})

    texts = Texts.read(tmp_path, "new", Numbers(), kept=3, tested=4)
    trained = {*texts.learned.flatten().tolist(), *texts.old.flatten().tolist()}
    tested = {token for part in texts.held_out.values() for token in part.flatten().tolist()}
    assert not trained & tested
    assert {*texts.kept.flatten().tolist()} <= trained
    assert [len(part) for part in texts.held_out.values()] == [4, 4, 4]
    assert len(texts.kept) == 6


def test_every_method_is_shown_by_runs_that_take_its_way_back():
    for name, method in METHODS.items():
        assert method.way in ("steps", *TRAININGS[method.training].ways), name
