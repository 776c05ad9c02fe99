"""`make gpu` without a GPU: the rehearsal, and that whatever goes wrong fails the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hardware.gpu import graphs, report, sanitizer, steps
from tests.hardware.gpu.steps import FAILED, PASSED, ROOT, Result, Step

# ================================================================================================
# The rehearsal
# ================================================================================================
# Of what is installed here, what a machine with only torch, pytest and setuptools has not.
ABSENT = ("numpy", "scipy", "hypothesis", "matplotlib", "rich", "pybind11", "transformers")
ABSENT += ("torchvision", "safetensors", "tqdm", "avalanche", "mlxtend", "xdist", "pandas")


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment whose interpreters find none of ``ABSENT``."""
    lines = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n"
    (tmp_path / "sitecustomize.py").write_text(lines)
    return {"PYTHONPATH": str(tmp_path)}


def python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_rehearsal_where_only_torch_and_pytest_are_installed(
    bare: dict[str, str], tmp_path: Path
) -> None:
    assert "import of numpy halted" in python("-c", "import numpy", **bare).stderr
    words = ["-m", "tests.hardware.gpu", "--device", "cpu", "--out", str(tmp_path)]
    done = python(*words, **bare)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "report.md").read_text("utf-8") in done.stdout
    assert "nothing is shown about the CUDA kernels" in done.stdout
    for name, step in steps.STEPS.items():
        assert step.title in done.stdout
        assert PASSED in {case.status for case in steps.read(tmp_path / f"{name}.xml")}


def test_setup_needs_no_pybind11(bare: dict[str, str]) -> None:
    done = python("setup.py", "--name", MAS_EXT_NATIVE="1", **bare)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "mas_ext"


def test_without_a_gpu_the_run_fails(tmp_path: Path) -> None:
    words = ["-m", "tests.hardware.gpu", "--out", str(tmp_path)]
    done = python(*words, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "finds no GPU that it can use; --device cpu is a rehearsal" in done.stdout
    assert f"Not shown to be right: {', '.join(steps.STEPS)}." in done.stdout


def test_without_time_the_run_fails(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--only", "graphs", "--seconds", "0.5", "--out", str(tmp_path)]
    done = python("-m", "tests.hardware.gpu", *words)
    assert done.returncode == 1
    assert "Not shown to be right: card, graphs." in done.stdout


def test_a_graph_that_keeps_its_first_scalars_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_once(function):
        function()
        return lambda: None

    monkeypatch.setattr(graphs, "captured", run_once)
    with pytest.raises(AssertionError):
        graphs.test_replays_follow_the_scalars("penalty", graphs.torch.float32)


# ================================================================================================
# Steps that end badly
# ================================================================================================
def result_of(
    source: str,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    device: str = "cpu",
    seconds: float = 300,
) -> Result:
    """Of a step whose tests are these."""
    file = folder / "tests_of_a_step.py"
    file.write_text(f"import os, pytest, subprocess, time\n{source}\n")
    monkeypatch.setitem(steps.STEPS, "graphs", Step("Graphs", 300, (str(file),)))
    return steps.run("graphs", device, folder, seconds)


RIGHT = "def test_right(): pass\n"
NOT_HERE = f"@pytest.mark.skip(reason='{steps.NOT_HERE}: one GPU')\ndef test_two(): pass"
HIDDEN = "@pytest.mark.skip(reason='not today')\ndef test_two(): pass"


@pytest.mark.parametrize(
    ("source", "good", "said"),
    [
        (RIGHT, True, "1 passed"),
        (RIGHT + "def test_two(): assert 1 == 2", False, "**failed**: assert 1 == 2 (test_two)"),
        (RIGHT + HIDDEN, True, "**skipped**: not today (test_two)"),
        (HIDDEN, False, "1 skipped"),
        ("", False, "it ended with 5"),
        (RIGHT + "def test_two(): os.abort()", False, f"it ended with -{int(signal.SIGABRT)}"),
    ],
    ids=["passes", "fails", "skips", "passes nothing", "has no test", "crashes"],
)
def test_how_a_step_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, good: bool, said: str
) -> None:
    result = result_of(source, monkeypatch, tmp_path)
    assert result.is_good is good
    text = report.markdown([result], "cuda", 1.0)
    assert ("Not shown to be right: graphs" in text) is not good
    assert said in text


@pytest.mark.parametrize(("source", "status"), [(NOT_HERE, steps.SKIPPED), (HIDDEN, FAILED)])
def test_what_is_skipped_on_a_card_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, status: str
) -> None:
    cases = result_of(source, monkeypatch, tmp_path, "cuda").cases
    assert [case.status for case in cases] == [status]


def test_a_step_that_hangs_ends_with_all_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    source = (
        f"def test_hangs():\n    child = subprocess.Popen(['sleep', '300'])\n"
        f"    open({str(child)!r}, 'w').write(str(child.pid))\n    child.wait()"
    )
    result = result_of(source, monkeypatch, tmp_path, seconds=20)
    assert "it was stopped after 20 s" in result.problem
    assert "test_hangs" in result.problem
    process = int(child.read_text())
    for _ in range(200):
        if not is_running(process):
            return
        time.sleep(0.1)
    raise AssertionError("what the step started is still there")


def is_running(process: int) -> bool:
    try:
        return Path("/proc", str(process), "stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ================================================================================================
# compute-sanitizer
# ================================================================================================
@pytest.mark.parametrize(
    ("tool", "summary"),
    [
        *((tool, "========= ERROR SUMMARY: 3 errors") for tool in ("memcheck", "initcheck")),
        ("synccheck", "========= ERROR SUMMARY: 3 errors"),
        ("racecheck", "= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)"),
    ],
)
def test_what_the_sanitizer_says_counts(tool: str, summary: str) -> None:
    assert sanitizer.errors_in(tool, summary) == 3
    assert sanitizer.errors_in(tool, summary.replace("3", "0")) == 0
    with pytest.raises(AssertionError, match="without a summary: unsupported device"):
        sanitizer.errors_in(tool, "unsupported device")


def test_no_sanitizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "candidates", lambda: iter([Path("nowhere")]))
    with pytest.raises(AssertionError, match="compute-sanitizer not found in nowhere"):
        sanitizer.sanitize("memcheck", [])
