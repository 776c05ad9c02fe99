"""The examples run, each in a process of its own, with little to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(name, *arguments):
    process = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "saved"),
    [
        ((), "model.safetensors"),
        (("--lora", "--keep", "self"), "adapter_model.safetensors"),
    ],
    ids=["weights", "lora, own text"],
)
def test_a_language_model_learns_a_text_within_the_budget(tmp_path, how, saved):
    for package in ("accelerate", "transformers", "peft", "matplotlib"):
        pytest.importorskip(package, reason="needs mas_ext[llm]")
    limit = 0.05
    output = run("finetune_llm.py", "--budget", str(limit), "--out", str(tmp_path), *how)
    results = json.loads((tmp_path / "results.json").read_text())
    (code, english) = (
        next(of for path, of in results["perplexity"].items() if path.endswith(name))
        for name in ("code.txt", "english.txt")
    )
    for of in (code, english):
        row = f"| {of['before']:.2f} | {of['trained']:.2f} | {of['settled']:.2f} |"
        assert row in output
        assert row in (tmp_path / "report.md").read_text()
    drift = results["drift"]
    assert drift["settled"] <= limit < drift["trained"]
    assert drift["trained"] == pytest.approx(results["trace"][-2][1], rel=0.5)
    assert english["settled"] < 1.05 * english["before"] < english["trained"], "not kept"
    assert code["settled"] < 0.9 * code["before"], "not learned"
    assert all(moved > 0 for moved in results["movement"].values())
    assert (tmp_path / "model" / saved).exists()
    assert (tmp_path / "drift.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_language_model_drifts_less_if_the_drift_is_in_its_loss(tmp_path):
    for package in ("accelerate", "transformers", "peft", "matplotlib"):
        pytest.importorskip(package, reason="needs mas_ext[llm]")
    drifts = []
    for factor in ("0", "1"):
        run("finetune_llm.py", "--drift-loss", factor, "--steps", "40", "--out", str(tmp_path))
        drifts.append(json.loads((tmp_path / "results.json").read_text())["drift"]["trained"])
    assert drifts[1] < 0.7 * drifts[0]
