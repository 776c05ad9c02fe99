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
def test_a_language_model_is_fine_tuned_with_and_without_mas(tmp_path):
    pytest.importorskip("accelerate", reason="needs mas_ext[transformers]")
    pytest.importorskip("transformers", reason="needs mas_ext[transformers]")
    output = run("finetune_llm.py", "--steps", "12", "--samples", "4", "--out", str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    untrained = 128
    for learned, perplexity in results.items():
        row = f"| {learned} | {perplexity['A']:.1f} | {perplexity['B']:.1f} |"
        assert row in output
        assert 1 < perplexity["A"] < untrained / 2
    without, held = (results[f"A, then B {how}"] for how in ("without MAS", "with MAS, settled"))
    assert without["B"] < results["A"]["B"]
    assert held != without, "MAS did nothing"
