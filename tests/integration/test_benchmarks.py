"""The benchmarks: every provider is right, and what is shown is what was measured."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import runner
from benchmarks.entry import Entry, Options
from benchmarks.lists import JOBS, measure, plot, roofline, show
from benchmarks.lists.providers import Provider
from benchmarks.lists.shapes import Size, linear
from benchmarks.lists.state import flatten, make_state
from benchmarks.registry import ENTRIES
from benchmarks.show import page, readme
from benchmarks.show.table import Table
from benchmarks.show.text import count, duration, milliseconds, percent
from benchmarks.tools import memory
from benchmarks.tools.machine import machine
from benchmarks.tools.timing import interleave

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
TINY = Size("a linear layer", lambda: linear(4, 2))


@pytest.fixture
def uncompiled():
    """What torch.compile is given, run as it is: compiling is torch's and takes seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


def refused(*arguments):
    with pytest.raises(AssertionError):
        measure.check(*arguments)


# -- lists -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_every_provider_of_a_list(job):
    state = make_state(linear(5, 3, 2))
    measure.check(job, list(job.providers), state, flatten(state))


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_a_wrong_provider_is_found(job):
    state = make_state(linear(5, 3, 2))

    def does_nothing(s):
        return job.providers[0].step(make_state(linear(5, 3, 2)))  # the right value

    def no_value(s):
        job.providers[0].step(s)

    refused(job, [Provider("does nothing", does_nothing, 0)], state, state)
    if job.expected(state)[1] is not None:
        refused(job, [Provider("returns no value", no_value, 0)], state, state)


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_one_pass_moves_the_bytes_of_the_streams(job):
    streams = job.streams(make_state(linear(4, 2)))
    written = roofline.WRITTEN[len(streams)]
    assert job.bytes_per_parameter == 4 * (len(streams) + written)  # all are read
    assert job.providers[0].moved == job.bytes_per_parameter
    assert min(p.moved for p in job.providers) == job.bytes_per_parameter


@needs_compiler
@pytest.mark.parametrize("streams", roofline.WRITTEN)
def test_the_roofline_visits_every_element(streams):
    roofline.check(streams)


def test_what_is_skipped_says_why():
    flat = Provider("flat", lambda s: None, 0, flat=True)
    compiled = Provider("compiled", lambda s: None, 0, most_tensors=20)
    assert "one flat tensor already" in flat.skip_reason(1, True)
    assert "second copy" in flat.skip_reason(2, False)
    assert flat.skip_reason(2, True) is None
    assert compiled.skip_reason(20, True) is None
    assert "compiling 21 tensors" in compiled.skip_reason(21, True)
    assert "compiling 20 tensors" in compiled.skip_reason(20, True, quick=True)


# -- end to end and scaling ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training():
    pytest.importorskip("avalanche", reason="needs mas_ext[avalanche]")
    from benchmarks.training import measure, models

    return measure, models.MODELS["mlp"]


@pytest.mark.usefixtures("uncompiled")
def test_every_way_to_train_takes_autograds_step(training, monkeypatch):
    measure_training, mlp = training
    measure_training.check(mlp, list(measure_training.WAYS))
    forgets = {**measure_training.WAYS, "Avalanche": measure_training.WAYS["without MAS"]}
    monkeypatch.setattr(measure_training, "WAYS", forgets)
    with pytest.raises(AssertionError, match="Avalanche: the step is off"):
        measure_training.check(mlp, ["Avalanche"])


def test_what_is_added_is_taken_from_the_parts_that_differ(training):
    from benchmarks.training import report

    Seconds = training[0].Seconds
    seconds = {
        "without MAS": [Seconds(10, 1), Seconds(20, 1), Seconds(30, 1)],
        "after": [Seconds(30, 3), Seconds(10, 3), Seconds(20, 3)],
        "in the loss": [Seconds(15, 1), Seconds(25, 1), Seconds(35, 1)],
    }
    in_the_loss = {"without MAS": False, "after": False, "in the loss": True}
    nothing = dict.fromkeys(seconds, None)
    measured = training[0].Measurement("mlp", 1, 1, seconds, in_the_loss, bytes=nothing)
    added = {way: report._way(measured, way)["added_seconds"]["median"] for way in seconds}
    assert added == {"without MAS": 0, "after": 2, "in the loss": 5}
    assert report._way(measured, "after")["seconds"]["median"] == 23


def test_a_steps_parts_are_timed_apart(training):
    from time import sleep

    from benchmarks.training.ways import Step

    found = training[0].sample(Step(lambda: None, lambda: sleep(0.01)), 3)
    assert found.backward < 0.01 <= found.finish


def test_every_way_to_end_a_task(training, monkeypatch):
    measure_training, mlp = training
    measure_training.check_task_end(mlp, samples=256)
    ways = measure_training.task_end.WAYS
    monkeypatch.setitem(ways, measure_training.EXACT, ways[measure_training.BATCH])
    with pytest.raises(AssertionError, match="Ω is not exact"):
        measure_training.check_task_end(mlp, samples=256)


@needs_compiler
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("axis", "value"),
    [("parameters", 10), ("parameters_in_tensors", 100), ("tensors", 1000), ("tasks", 3)],
)
def test_ways_along_an_axis_of_the_penalty(axis, value):
    from benchmarks.scaling.axes import AXES

    calls = AXES[axis].prepare(value, True)  # which checks them
    assert next(iter(calls)) == "mas_ext"
    assert len(calls) >= 3


@pytest.mark.parametrize(("axis", "value"), [("batch", 2), ("length", 4)])
def test_ways_along_an_axis_of_importance(axis, value):
    pytest.importorskip("transformers")
    from benchmarks.scaling.axes import AXES

    assert len(AXES[axis].prepare(value, True)) == 4


# -- tools -----------------------------------------------------------------------------------------


def test_rounds_fit_their_time_but_are_never_too_few():
    calls = {"a": lambda: None, "b": lambda: None}
    assert [len(s) for s in interleave(calls, rounds=50, budget=0.0).values()] == [3, 3]
    assert [len(s) for s in interleave(calls, rounds=5, budget=60.0).values()] == [5, 5]
    seconds = interleave(calls, rounds=5, every={"b": 2})
    assert (len(seconds["a"]), len(seconds["b"])) == (5, 3)


@pytest.mark.skipif(not memory.is_available(), reason="needs Linux")
def test_growth_is_what_a_call_allocates():
    size = 2**26

    def fill():
        torch.ones(size, dtype=torch.uint8)

    assert 0.9 * size < memory.growth_of(fill) < 1.5 * size
    assert memory.growth_of(lambda: None) < 0.1 * size


def test_numbers_for_a_reader():
    assert [count(n) for n in (10, 269_322, 25_557_032)] == ["10", "269 k", "25.6 M"]
    seconds = (2e-6, 1.5e-5, 0.0042, 0.042, 4.2, 42)
    expected = ["2.0 µs", "15 µs", "4.2 ms", "42 ms", "4.2 s", "42 s"]
    assert [duration(s) for s in seconds] == expected
    assert milliseconds({"q1": 0.01, "median": 0.02, "q3": 0.03}) == "20.0 (10.0–30.0)"
    assert percent(-0.123) == "−12.3 %"


def test_a_table_in_markdown():
    table = Table("t", ("", "a|b"), [["mas_ext", "1"], ["other", "2"]], frozenset({"mas_ext"}))
    lines = ["|  | a\\|b |", "|---|---|", "| **mas_ext** | **1** |", "| other | 2 |"]
    assert table.markdown().splitlines() == lines
    with pytest.raises(AssertionError):
        replace(table, rows=[["too short"]])


# -- a run -----------------------------------------------------------------------------------------


def _rounds(job, options: Options):
    measured = measure.measure(job, TINY, options.rounds, options.tell, 0.0, quick=True)
    yield "tiny", show.summary(job, measured)


def tiny(name: str) -> Entry:
    return replace(ENTRIES[name], run=partial(_rounds, JOBS[name]))


def run(out, *names: str) -> dict:
    from rich.console import Console

    asked = {"quick": True, "rounds": 3, "sizes": (), "workloads": (), "seeds": (0,)}
    results = runner.opened(out / "results.json")
    entries = [tiny(name) for name in names]
    runner.run(entries, asked, results, out, Console(quiet=True))
    return runner.read_json(out / "results.json")


@needs_compiler
@pytest.mark.usefixtures("uncompiled")
def test_a_run_leaves_results_plots_and_a_page(tmp_path):
    results = run(tmp_path, "penalty")
    size = results["benchmarks"]["penalty"]["tiny"]
    assert size["parameters"] == 10
    assert {p.name for p in JOBS["penalty"].providers} <= size["providers"].keys()
    ours = size["providers"]["mas_ext"]
    assert ours["time_over_ours"]["median"] == 1
    assert ours["bytes_moved"] == 200
    assert results["machine"]["torch"] == torch.__version__
    assert (tmp_path / "penalty.png").stat().st_size > 10_000
    text = (tmp_path / "report.html").read_text("utf-8")
    shown = f"{ours['seconds']['median'] * 1e3:.3g}"
    assert f"<td>{shown}</td>" in text
    assert "<svg" in text
    assert results["machine"]["cpu"] in text
    assert not re.search(r'(src|href)="http', text)  # it needs nothing but itself

    results = run(tmp_path, "accumulate")  # alone: the other results stay
    assert results["benchmarks"]["penalty"]["tiny"] == size
    assert results["benchmarks"].keys() == results["runs"].keys() == {"penalty", "accumulate"}


def test_a_run_beside_results_of_another_machine_names_its_own(tmp_path):
    path = tmp_path / "results.json"
    other = {"machine": {**machine(), "cpu": "another"}, "runs": {}, "benchmarks": {}}
    runner.write_json(path, other)
    results = run(tmp_path, "penalty")
    assert results["machine"] == other["machine"]
    assert results["runs"]["penalty"]["machine"]["cpu"] == machine()["cpu"]
    named = f"of another run: {machine()['cpu']}"
    assert named in (tmp_path / "report.html").read_text("utf-8")
    block = readme.block(ENTRIES["penalty"], results, "plots")
    assert f"(Of another run: {machine()['cpu']}" in block

    # A run of all others keeps it: now it is the file's machine, and the first was another.
    anew = runner.opened(path, kept=["penalty"])
    assert anew["machine"]["cpu"] == machine()["cpu"]
    assert "machine" not in anew["runs"]["penalty"]
    assert anew["benchmarks"] == results["benchmarks"]
    assert runner.opened(path, kept=[])["benchmarks"] == {}


@needs_compiler
@pytest.mark.usefixtures("uncompiled")
def test_a_run_that_is_cut_off_leaves_the_results_as_they_were(tmp_path, monkeypatch):
    before = run(tmp_path, "penalty")
    files = {path.name for path in tmp_path.iterdir()}

    measured = measure.measure

    def cut_off(job, *arguments, **options):
        if job.name == "accumulate":
            raise KeyboardInterrupt
        return measured(job, *arguments, **options)

    monkeypatch.setattr(measure, "measure", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "penalty", "accumulate")
    assert runner.read_json(tmp_path / "results.json") == before
    assert {path.name for path in tmp_path.iterdir()} - files == {"results.part.json"}


# -- what is committed -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed():
    return json.loads(readme.RESULTS.read_text("utf-8"))


@pytest.mark.parametrize("path", readme.READMES, ids=lambda path: path.parent.name)
def test_the_readmes_tables_are_those_of_the_results(committed, path):
    """If not: python -m benchmarks report --out benchmarks/results."""
    text, entries = path.read_text("utf-8"), list(ENTRIES.values())
    assert readme.rewritten(text, entries, committed, readme.READMES[path]) == text
    altered = re.sub(r"(<!-- machine -->\n).", r"\1?", text)
    if altered != text:
        assert readme.rewritten(altered, entries, committed, readme.READMES[path]) == text


def test_every_benchmark_is_in_its_readme():
    text = (readme.ROOT / "benchmarks/README.md").read_text("utf-8")
    assert {"machine", *ENTRIES} == set(readme.names(text))


def test_the_readmes_sentence_about_the_penalty(committed):
    rows = committed["benchmarks"]["penalty"]["resnet50"]["providers"]

    def over_ours(name):
        return f"{rows[name]['time_over_ours']['median']:.1f} times"

    text = " ".join((readme.ROOT / "README.md").read_text("utf-8").split())
    assert f"{rows['mas_ext']['seconds']['median'] * 1e3:.1f} ms" in text
    assert over_ours("torch.compile, flat") in text
    assert over_ours("eager autograd") in text


def test_the_readmes_sentence_about_the_steps(committed):
    text = " ".join((readme.ROOT / "README.md").read_text("utf-8").split())
    peer = "add_penalty_grad_, torch fused"
    sgd, momentum, adamw = (
        committed["benchmarks"][f"{name}_gradient"]["resnet50"]["providers"][peer]
        for name in ("sgd", "momentum", "adamw")
    )
    sgd, momentum, adamw = (
        f"{row['time_over_ours']['median']:.1f}" for row in (sgd, momentum, adamw)
    )
    assert f"{sgd} times as fast for SGD, {momentum} with momentum and {adamw} for AdamW" in text


def test_the_committed_results_make_a_page_and_plots(committed):
    entries = list(ENTRIES.values())
    text = page.render(entries, committed, {})
    for entry in entries:
        assert (f'id="{entry.name}"' in text) == (entry.name in committed["benchmarks"])
    job = JOBS["penalty"]
    figure = plot.figure(job, committed["benchmarks"]["penalty"], "a machine")
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]
    assert [title.split(",")[0] for title in titles[1:4]] == ["MLP", "ResNet-50", "GPT-2"]
