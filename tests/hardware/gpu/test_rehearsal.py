"""`make gpu` without a GPU: the rehearsal, and that whatever goes wrong fails the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import venv
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from mas_ext import functional
from tests.hardware.gpu import build, checks, graphs, jobs, report, sanitizer, steps
from tests.hardware.gpu.checks import Check, Session
from tests.hardware.gpu.steps import ROOT, Result, Step

# ================================================================================================
# The rehearsal
# ================================================================================================
MEANT = ("torch", "pytest", "setuptools")  # what is there beside nvcc and a compiler


def installed_with(names: tuple[str, ...]) -> set[Path]:
    """What these packages, and all that they require, have in site-packages."""
    seen: dict[str, metadata.Distribution] = {}
    wanted = [Requirement(name) for name in names]
    while wanted:
        requirement = wanted.pop()
        if requirement.name in seen:
            continue
        try:
            found = seen[requirement.name] = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:  # for another platform
            continue
        needed = [Requirement(text) for text in found.requires or []]
        wanted += [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    tops = {
        Path(str(found.locate_file(file.parts[0])))
        for found in seen.values()
        for file in found.files or []
    }
    return {top for top in tops if top.name not in ("..", "__pycache__") and top.exists()}


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter that finds torch, pytest and setuptools, and nothing of anyone else's."""
    home = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(home, symlinks=True)
    (site_packages,) = home.glob("lib/python*/site-packages")
    for entry in installed_with(MEANT):
        (site_packages / entry.name).symlink_to(entry)
    return str(home / "bin/python")


def python(interpreter: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [interpreter, *words],
        cwd=ROOT,
        env={**known, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def results_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text("utf-8"))


@pytest.mark.slow
def test_rehearsal_where_only_torch_and_pytest_are_installed(
    bare_python: str, tmp_path: Path
) -> None:
    assert "No module named 'numpy'" in python(bare_python, "-c", "import numpy").stderr
    done = python(
        bare_python, "-m", "tests.hardware.gpu", "--device", "cpu", "--out", str(tmp_path)
    )
    assert done.returncode == 0, done.stdout
    results, text = results_in(tmp_path), (tmp_path / "report.md").read_text("utf-8")
    assert text in done.stdout
    assert "nothing is shown about the CUDA kernels" in text
    assert results["good"]
    assert set(results["steps"]) == {step.name for step in steps.STEPS}
    for step in steps.STEPS:
        assert results["steps"][step.name]["status"] == checks.NEEDS_GPU
        assert step.title in text
    equivalence = {check["name"] for check in results["steps"]["equivalence"]["checks"]}
    assert {"test_against_the_oracle", "test_mas_on_the_device_is_mas_on_the_cpu"} <= equivalence


def test_setup_needs_no_pybind11(bare_python: str) -> None:
    done = python(bare_python, "setup.py", "--name", MAS_EXT_NATIVE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "mas_ext"


def test_without_a_gpu_the_run_fails(tmp_path: Path) -> None:
    words = ["-m", "tests.hardware.gpu", "--out", str(tmp_path)]
    done = python(sys.executable, *words, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "finds no GPU that it can use; --device cpu is a rehearsal without one" in done.stdout
    results = results_in(tmp_path)
    assert {step["status"] for step in results["steps"].values()} == {checks.DID_NOT_RUN}
    assert not results["good"]


def test_without_time_the_run_fails(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--only", "graphs", "--seconds", "0.5", "--out", str(tmp_path)]
    done = python(sys.executable, "-m", "tests.hardware.gpu", *words)
    assert done.returncode == 1
    assert "the 0 s for all steps are over" in done.stdout
    assert list(results_in(tmp_path)["steps"]) == ["machine", "graphs"]


# ================================================================================================
# What a wrong operator looks like
# ================================================================================================
def test_a_wrong_result_fails_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.penalty
    monkeypatch.setattr(functional, "penalty", lambda *args: right(*args) * 1.001)
    session = Session("cpu")
    graphs.run(session)
    statuses = {check.name: check.status for check in session.checks}
    assert statuses["penalty, float32"] == checks.FAILED
    assert statuses["proximal_step_, float32"] == checks.NEEDS_GPU


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.proximal_step_
    monkeypatch.setattr(
        functional, "proximal_step_", lambda p, a, o, strength, lr: right(p, a, o, strength, 2 * lr)
    )
    state = jobs.make_state([(100,)], "cpu", jobs.torch.float32)
    for op in ("add_penalty_grad_", "penalty"):
        jobs.assert_right(op, jobs.ours(op), state, op)
    with pytest.raises(AssertionError, match="x the bound"):
        jobs.assert_right("proximal_step_", jobs.ours("proximal_step_"), state, "ours")


# ================================================================================================
# Steps that end badly
# ================================================================================================
def step_that(
    monkeypatch: pytest.MonkeyPatch, folder: Path, script: str, limit: int = 30
) -> Result:
    """Runs a step whose process is this script; its arguments are those of a step's process."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\nfile=$5\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return steps.run(Step("graphs", "Graphs", limit), "cuda", folder, limit)


def left_behind(*found: Check, finished: bool) -> str:
    """A line of shell that leaves a session's file."""
    session = Session("cuda", checks=list(found), finished=finished)
    content = {k: v for k, v in vars(session).items() if k not in ("file", "_lost")}
    return f"cat > $file <<'END'\n{json.dumps(content, default=vars)}\nEND"


@pytest.mark.parametrize(
    ("status", "good"),
    [
        (checks.PASSED, True),
        (checks.NOT_HERE, True),
        (checks.FAILED, False),
        (checks.DID_NOT_RUN, False),
        (checks.NEEDS_GPU, False),
    ],
)
def test_one_check_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: str, good: bool
) -> None:
    found = Check("one", checks.PASSED), Check("two", status, "a reason")
    result = step_that(monkeypatch, tmp_path, left_behind(*found, finished=True))
    assert result.status == (checks.PASSED if good else status)
    assert steps.is_good(result, rehearsal=False) is good
    text = report.markdown([result], "cuda", 1.0)
    assert ("Not shown to be right: graphs" in text) is not good
    assert status == checks.PASSED or f"**{status}**: a reason (two)" in text


@pytest.mark.parametrize(
    ("begins", "note"),
    [
        (True, f"ended with signal {int(signal.SIGSEGV)} after 'one' (1 passed)"),
        (False, "exit code 3 after 'the first check'"),
    ],
)
def test_a_step_that_crashes_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, begins: bool, note: str
) -> None:
    begun = left_behind(Check("one", checks.PASSED), finished=False) + "\nkill -SEGV $$"
    result = step_that(monkeypatch, tmp_path, begun if begins else "exit 3")
    assert result.status == checks.FAILED
    assert note in result.note


def test_a_step_that_hangs_ends_with_all_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = f"sleep 60 & echo $! > {tmp_path / 'child'}; wait"
    result = step_that(monkeypatch, tmp_path, script, limit=4)
    assert result.status == checks.FAILED
    assert "4 s were not enough" in result.note
    child = int((tmp_path / "child").read_text())
    for _ in range(200):  # of the 60 s that it would have slept, 20
        if not is_running(child):
            return
        time.sleep(0.1)
    raise AssertionError("what the step started is still there")


def is_running(process: int) -> bool:
    try:
        return Path("/proc", str(process), "stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_after_a_lost_device_nothing_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an illegal access, when every later call fails, whatever it is."""

    def wait(session: Session) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    session = Session("cuda")
    monkeypatch.setattr(Session, "_wait", wait)
    assert not session.check("one", lambda: "")
    assert not session.check("two", lambda: "")
    assert [check.status for check in session.checks] == [checks.FAILED, checks.DID_NOT_RUN]
    assert "'one' left the device unusable" in session.checks[1].note


# ================================================================================================
# compute-sanitizer
# ================================================================================================
SUMMARIES = {
    "memcheck": "========= ERROR SUMMARY: {} errors",
    "initcheck": "========= ERROR SUMMARY: {} errors",
    "synccheck": "========= ERROR SUMMARY: {} errors",
    "racecheck": "========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)",
}


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, says: str, code: int) -> None:
    program = folder / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_what_the_sanitizer_says_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tool: str
) -> None:
    pretend(monkeypatch, tmp_path, SUMMARIES[tool].format(0, 0), 0)
    assert sanitizer.finds_nothing(tool, "cuda") == "0 errors"
    with pytest.raises(AssertionError, match="it found nothing"):
        sanitizer.finds_planted(tool, tmp_path, "cuda")
    pretend(monkeypatch, tmp_path, SUMMARIES[tool].format(3, 3), sanitizer.FOUND)
    with pytest.raises(AssertionError, match="3 errors"):
        sanitizer.finds_nothing(tool, "cuda")
    assert sanitizer.finds_planted(tool, tmp_path, "cuda") == "3 errors"


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (SUMMARIES["memcheck"].format(0), "exit code 1"),
        ("unsupported device", "without a summary: unsupported device"),
    ],
)
def test_a_sanitizer_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, says: str, message: str
) -> None:
    pretend(monkeypatch, tmp_path, says, 1)
    with pytest.raises((AssertionError, RuntimeError), match=message):
        sanitizer.finds_nothing("memcheck", "cuda")


def test_no_sanitizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    with pytest.raises(checks.DidNotRun, match="compute-sanitizer not found"):
        sanitizer.finds_nothing("memcheck", "cuda")


# ================================================================================================
# Which kernels serve which card
# ================================================================================================
@pytest.mark.parametrize(
    ("built_for", "capability", "served"),
    [
        (["8.0"], (8, 0), True),
        (["8.0"], (8, 9), True),
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (12, 0), True),
        (["9.0+PTX"], (8, 9), False),
        (["9.0a"], (9, 0), True),
        (["8.0", "9.0", "10.0", "12.0+PTX"], (10, 3), True),
        (["8.0", "9.0", "10.0", "12.0+PTX"], (7, 5), False),
        ([], (8, 0), False),
    ],
)
def test_covers(built_for: list[str], capability: tuple[int, int], served: bool) -> None:
    assert build.covers(built_for, capability) is served


def test_reasons_to_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "architectures", lambda: ["9.0"])
    for name in ("csrc/cuda/kernel.cu", "setup.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert build.reason_to_build(tmp_path, (9, 0)) == "they are missing"
    (tmp_path / "mas_ext").mkdir()
    for name in ("mas_ext/_kernels.abi3.so", "mas_ext/_C.so"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (2e9, 2e9))
    assert build.reason_to_build(tmp_path, (9, 0)) is None
    assert build.reason_to_build(tmp_path, (8, 0)) == "they are built for 9.0"
    os.utime(tmp_path / "csrc/cuda/kernel.cu", (3e9, 3e9))
    assert build.reason_to_build(tmp_path, (9, 0)) == "csrc/ or setup.py is newer than they are"
